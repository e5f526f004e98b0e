"""The one exception for a user's mistake."""


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, and what to do about it."""
