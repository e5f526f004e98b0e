"""The one exception for a user's mistake; what an error of a library says; which name may be meant."""

import difflib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable

NEARLY = 0.05  # Of two names that may be meant, the second is named too where it is less like by no more than this.


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, and what to do about it.

    A name in it may come from a stranger, so what would break the line or steer the terminal is written out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    r"""The text in one line that every terminal can show, with what nobody sees but spaces written out.

    Such are line breaks, which a file's name may hold, what steers a terminal, and what turns the direction of a text.

    Example:
      one_line("my\nphotos") == r"my\nphotos"
    """
    return "".join(c.encode("unicode_escape").decode() if _is_unseen(c) else c for c in text)


def _is_unseen(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind.startswith("C") or kind in ("Zl", "Zp")


def reason(error: Exception) -> str:
    """What an error says, in one line, without the operations and nodes of its graph that TensorFlow adds.

    Example:
      reason(error) == "photos/1.jpg; Input/output error"
    """
    text = getattr(error, "message", "") or str(error)
    text = re.sub(r"\[\[\{\{.*?\}\}\]\]|\{\{.*?\}\}", "", text)  # [[{{node ReadFile}}]] and {{function_node ...}}
    text = re.sub(r"\[Op:\w+\]( name:.*)?", "", text)
    return " ".join(text.split()) or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that this machine, or a device of it, has no memory left."""
    tensorflow = sys.modules.get("tensorflow")  # Its errors come only from where it was imported.
    return isinstance(error, MemoryError) or bool(
        tensorflow and isinstance(error, tensorflow.errors.ResourceExhaustedError)
    )


def lost_worker(error: Exception) -> str:
    """What an error says about another worker that is gone; empty where it says nothing of that kind.

    TensorFlow gives up everything that the workers do together as soon as one of them does not answer.

    Example:
      lost_worker(error) == "the loss of another worker (worker 1 does not answer)"
    """
    tensorflow = sys.modules.get("tensorflow")  # Its errors come only from where it was imported.
    if not tensorflow or not isinstance(error, tensorflow.errors.OpError):
        return ""
    if "Collective has timed out" in error.message:
        return "the wait for another worker, which takes no part for longer than --worker_timeout"
    gave_up = re.search(r"Collective ops is aborted by|remote target /job:", error.message)
    if not gave_up:
        return ""
    which = re.search(r"/job:(\w+)(?:/replica:\d+)?/task:(\d+)", error.message[gave_up.start() :])
    if not which and "CoordinationService/Heartbeat" in error.message:
        return "the loss of another worker (the first one, which all report to, does not answer)"
    return "the loss of another worker" + (f" ({which[1]} {which[2]} does not answer)" if which else "")


def did_you_mean(wrong: str, right: Iterable[str], prefix: str = "") -> str:
    """A question for the end of a message that refuses a name: the right one that is close to it, or two if both are.

    Args:
      wrong: the name that was given. Capital and small letters count as the same.
      right: the names that there are.
      prefix: what a name is shown behind.

    Returns:
      A text that begins with "; ", or an empty text where no name is close.

    Example:
      did_you_mean("trian_mode", ["train_mode", "mode"], "--") == "; did you mean --train_mode?"
    """
    by_lower = {name.lower(): name for name in right if name != wrong}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=2)  # the closest first
    if not close:
        return ""
    likeness = [difflib.SequenceMatcher(None, name, wrong.lower()).ratio() for name in close]
    if likeness[-1] < likeness[0] - NEARLY:
        close.pop()
    return f"; did you mean {' or '.join(prefix + by_lower[name] for name in close)}?"


def did_you_mean_path(wrong: str) -> str:
    """As `did_you_mean`, for a path where nothing is: what lies in its folder under a name that is close."""
    folder, name = os.path.split(wrong.rstrip("/"))
    try:
        names = os.listdir(folder or ".")
    except OSError:  # There is no such folder, or it is not on this machine.
        return ""
    return did_you_mean(name, names, os.path.join(folder, ""))
