"""Texts of strangers in CSV files that people open in a spreadsheet, which takes some texts for formulas.

Every CSV file of this program is written by `write_rows`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from typing import TextIO

# A cell that begins with one of these may be computed instead of shown. The last four are the wide forms of the first.
_STARTS = "=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20"
# What a spreadsheet may drop from the beginning of a cell: spaces, control characters, marks that are not seen.
_DROPPED = "\\s\x00-\x20\x7f-\xa0\u200b-\u200f\u2028-\u202f\u2060-\u2064\ufeff"
_FORMULA = re.compile(f"[{_DROPPED}]*[{_STARTS}]")
_GUARD = "'"
# Spreadsheets of other countries separate cells at these, and all of them end a row at a line break.
_SEPARATORS = re.compile(r"[;\t|\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")


def guarded(text: str) -> str:
    """The text with an apostrophe before it where a spreadsheet might compute it, or where it begins with one itself.

    `plain` is the way back.

    Example:
      guarded("=1+1") == "'=1+1" and guarded("cat") == "cat"
    """
    return _GUARD + text if text.startswith(_GUARD) or _FORMULA.match(text) else text


def plain(cell: str) -> str:
    """The text that `guarded` made this cell of."""
    return cell.removeprefix(_GUARD)


def guarded_path(path: str) -> str:
    """The path with `./` before it where a spreadsheet might compute it. It is still a path to the same file.

    Example:
      guarded_path("=1+1.jpg") == "./=1+1.jpg" and guarded_path("cat/1.jpg") == "cat/1.jpg"
    """
    return f"./{path}" if _FORMULA.match(path) else path


def write_rows(file: TextIO, rows: Iterable[Sequence[str]]) -> None:
    """Writes rows of cells as CSV. No cell falls into two, whatever a spreadsheet separates cells by.

    Args:
      file: opened with newline="".
      rows: cells that `guarded` or `guarded_path` has made, or texts of this program.
    """
    usual = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        (quoted if _SEPARATORS.search(",".join(row)) else usual).writerow(row)
