"""The one exception for a user's mistake; what an error of a library says in one line."""

import re


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, and what to do about it."""


def reason(error: Exception) -> str:
    """What an error says, in one line, without the operations and nodes of its graph that TensorFlow adds.

    Example:
      reason(error) == "photos/1.jpg; Input/output error"
    """
    text = getattr(error, "message", "") or str(error)
    text = re.sub(r"\[\[\{\{.*?\}\}\]\]|\{\{.*?\}\}", "", text)  # [[{{node ReadFile}}]] and {{function_node ...}}
    text = re.sub(r"\[Op:\w+\]( name:.*)?", "", text)
    return " ".join(text.split()) or type(error).__name__
