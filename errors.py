"""The one exception for a user's mistake; what an error of a library says in one line."""

import re


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, and what to do about it.

    A name in it may come from a stranger, so what would break the line or steer the terminal is written out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text with every character that is not seen, but for spaces, as Python writes it.

    Example:
      one_line("a\\nb\\x1b[2J") == r"a\\nb\\x1b[2J"
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def reason(error: Exception) -> str:
    """What an error says, in one line, without the operations and nodes of its graph that TensorFlow adds.

    Example:
      reason(error) == "photos/1.jpg; Input/output error"
    """
    text = getattr(error, "message", "") or str(error)
    text = re.sub(r"\[\[\{\{.*?\}\}\]\]|\{\{.*?\}\}", "", text)  # [[{{node ReadFile}}]] and {{function_node ...}}
    text = re.sub(r"\[Op:\w+\]( name:.*)?", "", text)
    return " ".join(text.split()) or type(error).__name__
