"""The one exception for a user's mistake, and what an error of a library says in one line."""

import re


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, and what to do about it."""


def reason(error: Exception) -> str:
    """What an error says, in one line, without the operations and nodes that TensorFlow adds."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:\w+\]( name:)?", "", str(error))
    return " ".join(text.split()) or type(error).__name__
