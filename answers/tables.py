"""Tables of answers: rows kept in parts while they are being made, and the CSV, Parquet or npz file made of them.

A table may be larger than the memory: it is written and read part by part, and the part that is being made is all that
is held. Every row has a column `unreadable`, the reason why there is no answer, or an empty text. The files leave this
column out, and the rows that have a reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import run_folder
from answers.spreadsheet import guarded, guarded_path, write_rows
from errors import UserError

UNREADABLE = "unreadable"
PATH, FEATURE = "path", "feature"
PART_SECONDS = 10.0  # An interruption loses at most the answers of so many seconds.
PART_BYTES = 2**25  # A part in memory takes about as much at most.
_ABOUT = "about.json"
_PART = re.compile(r"rows-(\d{12})\.parquet")


class Parts:
    """The rows of the table that is to become `output`, in the folder `<output>.partial`, where they survive.

    Each file in it holds consecutive rows, and is there whole or not at all.

    Args:
      output: the file that they are for.
      about: all that the rows depend on, by name. Rows that depend on something else cannot be gone on with.

    Attributes:
      rows: how many rows there are, those included that are not written yet.

    Raises:
      UserError: where the folder belongs to something else than `about`, or cannot be read or written.
    """

    def __init__(self, output: str, about: Mapping[str, Any]) -> None:
        self._output, self._folder = output, f"{output}.partial"
        self._waiting: list[pa.Table] = []
        self._since = time.monotonic()
        with run_folder.writing(f"--output={output}"):
            os.makedirs(self._folder, exist_ok=True)
            self._check(about)
            self._files, self.rows = self._whole_files()

    def _check(self, about: Mapping[str, Any]) -> None:
        path = os.path.join(self._folder, _ABOUT)
        if not os.path.exists(path):
            run_folder.write_json(path, about)
            return
        with run_folder.reading(path), open(path, encoding="utf-8") as file:
            before = json.load(file)
            if not isinstance(before, dict):
                raise ValueError("it holds no names with values")
        differ = [name for name in about if before.get(name) != about[name]]
        if differ:
            raise UserError(
                f"{self._folder} holds the beginning of another table ({', '.join(differ)} differ): remove it, or "
                f"choose another --output"
            )

    def _whole_files(self) -> tuple[list[str], int]:
        """The files of the rows from the first on, as far as all can be read, and the number of their rows.

        What comes after a file that is missing or damaged is removed.
        """
        files: list[str] = []
        rows = 0
        for name in sorted(name for name in os.listdir(self._folder) if _PART.fullmatch(name)):
            path = os.path.join(self._folder, name)
            try:
                count = pq.read_metadata(path).num_rows if name == _part_name(rows) else 0
            except (OSError, pa.ArrowException):
                count = 0
            if not count:
                os.remove(path)
                continue
            files.append(path)
            rows += count
        return files, rows

    def add(self, table: pa.Table) -> None:
        """Adds rows. They are written when there are many of them, or when some seconds have passed.

        Raises:
          UserError: where they cannot be written.
        """
        self._waiting.append(table)
        self.rows += len(table)
        enough = sum(waiting.nbytes for waiting in self._waiting) >= PART_BYTES
        if enough or time.monotonic() - self._since >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that wait to be written.

        Raises:
          UserError: where they cannot be written.
        """
        if self._waiting:
            table = pa.concat_tables(self._waiting).combine_chunks()
            path = os.path.join(self._folder, _part_name(self.rows - len(table)))
            with run_folder.writing(f"--output={self._output}"):
                pq.write_table(table, f"{path}.tmp")
                os.replace(f"{path}.tmp", path)
            self._files.append(path)
            self._waiting = []
        self._since = time.monotonic()

    def tables(self) -> Iterator[pa.Table]:
        """All rows that were written, in their order, part by part."""
        for path in self._files:
            with run_folder.reading(path):
                table = pq.read_table(path)
            yield table

    def answered(self) -> Iterator[pa.Table]:
        """The rows that have an answer, without the column `unreadable`."""
        for table in self.tables():
            yield table.filter(pc.equal(table[UNREADABLE], "")).drop_columns(UNREADABLE)

    def unreadable(self) -> dict[str, str]:
        """The images without an answer, and why they have none."""
        found: dict[str, str] = {}
        for table in self.tables():
            without = table.filter(pc.not_equal(table[UNREADABLE], ""))
            found |= zip(without[PATH].to_pylist(), without[UNREADABLE].to_pylist(), strict=True)
        return found

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder)


def _part_name(first_row: int) -> str:
    return f"rows-{first_row:012d}.parquet"


def write(parts: Parts, output: str, about: Mapping[str, Any]) -> None:
    """Writes the rows of `parts` that have an answer as the kind of file that the suffix of `output` says.

    The file is there whole or not at all.

    Raises:
      UserError: where it cannot be written.
    """
    suffix = os.path.splitext(output)[1]
    unfinished = f"{output}.tmp"
    with run_folder.writing(f"--output={output}"):
        if suffix == ".csv":
            write_csv(parts.answered(), unfinished)
        elif suffix == ".parquet":
            write_parquet(parts.answered(), unfinished, about)
        else:
            write_npz(parts, unfinished)
        os.replace(unfinished, output)


def write_csv(tables: Iterator[pa.Table], path: str) -> None:
    """Writes tables of texts and numbers, one after the other, as CSV. No text becomes a formula: see `spreadsheet`."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        for number, table in enumerate(tables):
            if number == 0:
                write_rows(file, [table.column_names])
            columns = [_cells(table[name], name) for name in table.column_names]
            write_rows(file, zip(*columns, strict=True))


def _cells(column: pa.ChunkedArray, name: str) -> Sequence[str]:
    values = column.to_pylist()
    if pa.types.is_floating(column.type):
        return [f"{value:.6g}" for value in values]
    guard = guarded_path if name == PATH else guarded
    return [guard(value) for value in values]


def write_parquet(tables: Iterator[pa.Table], path: str, about: Mapping[str, Any]) -> None:
    """Writes tables, one after the other, as Parquet, each as row groups of its own. `about` goes into its metadata."""
    metadata = {"simclr": json.dumps(about)}
    writer = None
    try:
        for table in tables:
            table = table.replace_schema_metadata(metadata)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def write_npz(parts: Parts, path: str) -> None:
    """Writes rows of a path and a feature as .npz: `features` [n, D] float32 and `paths` [n] texts of one width."""
    count, dim, width = 0, 0, 1
    for table in parts.answered():
        count += len(table)
        dim = table.schema.field(FEATURE).type.list_size
        width = max(width, pc.max(pc.utf8_length(table[PATH])).as_py() or 0)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as file:
            _write_header(file, np.dtype(np.float32), (count, dim))
            for table in parts.answered():
                file.write(features_of(table).tobytes())
        # Texts of one width are mostly zeros.
        texts = zipfile.ZipInfo("paths.npy")
        texts.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(texts, "w", force_zip64=True) as file:
            _write_header(file, np.dtype(f"<U{width}"), (count,))
            for table in parts.answered():
                file.write(np.array(table[PATH].to_pylist(), f"<U{width}").tobytes())


def _write_header(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Writes what stands before the numbers in an .npy file."""
    np.lib.format.write_array_header_2_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})


def feature_column(features: np.ndarray) -> pa.Array:
    """The column for `features` [n, D] float32."""
    flat = pa.array(np.ascontiguousarray(features, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, features.shape[1])


def features_of(table: pa.Table) -> np.ndarray:
    """The features [n, D] float32 in a table with a `feature_column`."""
    column = table[FEATURE].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
