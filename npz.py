"""Arrays that this program has kept in an .npz file, read as if a stranger had written it."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import IO

import numpy as np

from errors import reason

# What zipfile and NumPy raise where a file is damaged. MemoryError: it says that it holds more than there is memory.
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, SyntaxError, RuntimeError,
    MemoryError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


class Damaged(ValueError):
    """A file does not hold what this program writes. The message says why."""


def read(file: str | IO[bytes]) -> dict[str, np.ndarray]:
    """Every array in a file that `numpy.savez` has written, by name. Nothing is unpickled, nothing decompressed.

    So the arrays take no more memory than the file.

    Raises:
      OSError: where there is no file, or it cannot be read.
      Damaged: where it is not such a file.
    """
    try:
        with np.load(file, allow_pickle=False) as kept:
            if any(member.compress_type != zipfile.ZIP_STORED for member in kept.zip.infolist()):
                raise Damaged("it is compressed")
            return {name: kept[name] for name in kept.files}
    except _DAMAGE as error:
        raise Damaged(reason(error)) from error
