"""Lists of images: a table of labels (`--labels`) and a list of paths (`--images`), as CSV, Parquet or plain text.

A path in a list is relative to the folder of the images, `--data_dir`. An absolute path is taken where it leads into
that folder. No path may lead out of it, since a list may come from a stranger.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from errors import UserError, did_you_mean_path, reason

if TYPE_CHECKING:
    import pyarrow

PATH, LABEL, SPLIT = "path", "label", "split"
TABLES = (".csv", ".parquet")
LISTS = (".txt", *TABLES)
USUAL_SPLIT = "train"  # of the images for which the table names no split
MAX_ROWS = 100_000_000  # A Parquet file of a few bytes can say that it has any number of rows.
MAX_LENGTH = 2**17  # bytes of a cell, as in Python's own reader of CSV files
# What a damaged file makes the readers raise. pyarrow's own errors are kinds of these.
_UNREADABLE = (OSError, ValueError, csv.Error, LookupError, TypeError, ArithmeticError, MemoryError, RuntimeError)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      number: which row, counted from 1; of a CSV file the line, of a text file too.
      path: of the image, relative to the folder of the images.
      label: the name of its class; empty where it has none.
      split: the name of its split; empty where the table does not say.
    """

    number: int
    path: str
    label: str = ""
    split: str = ""


def read_labels(file: str, folder: str) -> dict[str, Row]:
    """The rows of the table of labels `file`, by the paths of the images, which are relative to `folder`.

    Raises:
      UserError: where it cannot be read, a column is missing, a path is there twice or leads out of the folder.
    """
    return _by_path(f"--labels={file}", file, TABLES, (PATH, LABEL), folder)


def read_images(file: str, folder: str) -> dict[str, Row]:
    """The rows of the list of images `file`, by their paths, which are relative to `folder`.

    Raises:
      UserError: as `read_labels`.
    """
    return _by_path(f"--images={file}", file, LISTS, (PATH,), folder)


def splits_in(file: str) -> list[str]:
    """The names of the splits in a table of labels, sorted; none where it has no such column.

    Raises:
      UserError: where it cannot be read.
    """
    names = {_text(cells.get(SPLIT)) for _, cells in _rows(f"--labels={file}", file, TABLES, (PATH, LABEL))}
    return sorted(names - {""})


def _by_path(where: str, file: str, suffixes: tuple[str, ...], columns: tuple[str, ...], folder: str) -> dict[str, Row]:
    """The rows of a list by path."""
    found: dict[str, Row] = {}
    root = os.path.abspath(folder)
    for number, cells in _rows(where, file, suffixes, columns):
        path = _inside(_text(cells[PATH]), root, f"{where}: row {number}")
        if path in found:
            raise UserError(f"{where}: row {number}: {path} is in row {found[path].number} too: remove one of them")
        found[path] = Row(number, path, _text(cells.get(LABEL)), _text(cells.get(SPLIT)))
    if not found:
        raise UserError(f"{where} has no row: list some images")
    return found


def _inside(path: str, root: str, where: str) -> str:
    """A path of a list, relative to the folder `root`.

    Raises:
      UserError: where it is empty or leads out of the folder.
    """
    if not path:
        raise UserError(f"{where} has no path: remove it, or fill it in")
    relative = os.path.relpath(path, root) if os.path.isabs(path) else posixpath.normpath(path)
    if relative == ".." or relative.startswith("../"):
        raise UserError(f"{where}: {path} leads out of the folder of the images, {root}: name images inside it")
    return relative


def _rows(
    where: str, file: str, suffixes: tuple[str, ...], columns: tuple[str, ...]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file with their numbers, as cells by column.

    Raises:
      UserError: where it cannot be read, is of another kind, or lacks one of `columns`.
    """
    suffix = os.path.splitext(file)[1].lower()
    if suffix not in suffixes:
        raise UserError(f"{where}: give a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    read = {".csv": _csv_rows, ".parquet": _parquet_rows, ".txt": _text_rows}[suffix]
    try:
        for number, cells in read(file):
            lacking = [name for name in columns if name not in cells]
            if lacking:
                has = ", ".join(str(name) for name in cells if name is not None) or "none"
                raise UserError(f"{where}: row {number} has no column {lacking[0]}; the columns are {has}")
            yield number, cells
    except UserError:
        raise
    except _UNREADABLE as error:
        meant = did_you_mean_path(file) if isinstance(error, FileNotFoundError) else ""
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{where} cannot be read: {why}{meant}") from error


def _csv_rows(file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Spreadsheets begin a file with a byte order mark, which utf-8-sig passes over.
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened, skipinitialspace=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        for cells in reader:
            yield reader.line_num, {name: cell for name, cell in cells.items() if cell is not None}


def _parquet_rows(file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(file)
    wanted = [name for name in (PATH, LABEL, SPLIT) if name in schema.names]
    if not wanted:
        yield 1, dict.fromkeys(schema.names)
        return
    # A text that many rows share stays one text in memory: a small file can make it long, and the rows many.
    shared = [name for name in wanted if _is_text(schema.field(name).type)]
    with pyarrow.parquet.ParquetFile(file, read_dictionary=shared) as opened:
        if opened.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"{opened.metadata.num_rows:,} rows are more than {MAX_ROWS:,}")
        number = 0
        for batch in opened.iter_batches(columns=wanted):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                _check_lengths(name, column)
            for cells in batch.to_pylist():
                number += 1
                yield number, cells


def _check_lengths(name: str, column: pyarrow.Array) -> None:
    """Raises ValueError where a column holds a text of more than `MAX_LENGTH` bytes, or lists or the like."""
    import pyarrow.compute

    values = column.dictionary if pyarrow.types.is_dictionary(column.type) else column
    if pyarrow.types.is_nested(values.type):
        raise ValueError(f"column {name} holds {values.type}, not a text or a number in each row")
    if _is_text(values.type):
        longest = pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() or 0
        if longest > MAX_LENGTH:
            raise ValueError(f"column {name} holds a text of {longest:,} bytes, more than {MAX_LENGTH:,}")


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return any(
        is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _text_rows(file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield number, {PATH: line.strip()}


def _text(cell: Any) -> str:
    """The content of a cell as text, without spaces around it. A number that is whole is written without a point."""
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if cell != cell else str(cell).strip()  # NaN, an empty cell of a column of numbers, is not itself
