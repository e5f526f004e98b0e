"""Many paths in little memory: all of them in one array of bytes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class FileList:
    """The paths of n files below a common folder. A path takes its own length and 8 bytes.

    Attributes:
      content: [bytes] uint8, the paths one after the other, relative to the folder.
      begins: [n + 1] int64, where each of them begins, and where the last one ends.
    """

    content: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, paths: Iterable[bytes]) -> Self:
        """The list of these paths."""
        listed = list(paths)
        begins = np.zeros(len(listed) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, listed), np.int64, len(listed)), out=begins[1:])
        return cls(np.frombuffer(b"".join(listed), np.uint8), begins)

    @property
    def count(self) -> int:
        """How many paths there are."""
        return len(self.begins) - 1

    def path(self, i: int) -> bytes:
        """The path of file `i`."""
        return self.content[self.begins[i] : self.begins[i + 1]].tobytes()

    def paths(self) -> Iterator[bytes]:
        """Every path, in order."""
        content = self.content.tobytes()
        ends = self.begins.tolist()
        for begin, end in itertools.pairwise(ends):
            yield content[begin:end]

    def take(self, indices: np.ndarray) -> Self:
        """The paths at `indices` [m], as a list of its own."""
        begins = np.zeros(len(indices) + 1, np.int64)
        lengths = (self.begins[1:] - self.begins[:-1])[indices]
        np.cumsum(lengths, out=begins[1:])
        # Where each byte comes from: its place in the new list, moved to where its path was.
        moved = np.repeat(self.begins[:-1][indices] - begins[:-1], lengths)
        return type(self)(self.content[np.arange(begins[-1]) + moved], begins)
