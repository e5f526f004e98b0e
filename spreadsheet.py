"""Texts of strangers in CSV files that people open in a spreadsheet, which takes some texts for formulas."""

from __future__ import annotations

# A cell that begins with one of these may be computed instead of shown. The last four are the wide forms of the first.
_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_GUARD = "'"


def guarded(text: str) -> str:
    """The text with an apostrophe before it where a spreadsheet might compute it, or where it begins with one itself.

    `plain` is the way back.

    Example:
      guarded("=1+1") == "'=1+1" and guarded("cat") == "cat"
    """
    return _GUARD + text if text.startswith((*_STARTS, _GUARD)) else text


def plain(cell: str) -> str:
    """The text that `guarded` made this cell of."""
    return cell.removeprefix(_GUARD)


def guarded_path(path: str) -> str:
    """The path with `./` before it where a spreadsheet might compute it. It is still a path to the same file.

    Example:
      guarded_path("=1+1.jpg") == "./=1+1.jpg" and guarded_path("cat/1.jpg") == "cat/1.jpg"
    """
    return f"./{path}" if path.startswith(_STARTS) else path
