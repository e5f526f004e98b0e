"""Lists of images: a table of labels (`--labels`) and a list of paths (`--images`), as CSV, Parquet or plain text.

A path in a list is relative to the folder of the images, `--data_dir`. An absolute path is taken where it leads into
that folder. No path may lead out of it, since a list may come from a stranger.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from errors import UserError, did_you_mean_path, reason

PATH, LABEL, SPLIT = "path", "label", "split"
TABLES = (".csv", ".parquet")
LISTS = (".txt", *TABLES)
USUAL_SPLIT = "train"  # of the images for which the table names no split


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
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's own errors are ValueErrors or OSErrors
        meant = did_you_mean_path(file) if isinstance(error, FileNotFoundError) else ""
        raise UserError(
            f"{where} cannot be read: {getattr(error, 'strerror', None) or reason(error)}{meant}"
        ) from error


def _csv_rows(file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Spreadsheets begin a file with a byte order mark, which utf-8-sig passes over.
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened, skipinitialspace=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        for cells in reader:
            yield reader.line_num, {name: cell for name, cell in cells.items() if cell is not None}


def _parquet_rows(file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        wanted = [name for name in (PATH, LABEL, SPLIT) if name in opened.schema_arrow.names]
        number = 0
        if not wanted:
            yield 1, {name: None for name in opened.schema_arrow.names}
        for batch in opened.iter_batches(columns=wanted):
            for cells in batch.to_pylist():
                number += 1
                yield number, cells


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
