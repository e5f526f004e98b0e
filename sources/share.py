"""Which places of every batch a worker fills."""

from __future__ import annotations

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Share:
    """Consecutive places of every global batch.

    Attributes:
      batch: the places of a global batch.
      begin, end: the first place of the share, and the one after its last.
    """

    batch: int
    begin: int
    end: int

    @property
    def is_all(self) -> bool:
        """Whether the share is the whole batch."""
        return (self.begin, self.end) == (0, self.batch)

    @property
    def size(self) -> int:
        """How many places there are in the share."""
        return self.end - self.begin

    def part(self, i: int, parts: int) -> Share:
        """Part `i` of `parts` of these places, which are as equal as they can be."""
        begin, end = (self.begin + self.size * edge // parts for edge in (i, i + 1))
        return Share(self.batch, begin, end)

    def has(self, position: tf.Tensor) -> tf.Tensor:
        """Whether the share has a position of the stream of all examples, or each of several: bool."""
        place = position % self.batch
        return (self.begin <= place) & (place < self.end)

    def position(self, i: tf.Tensor) -> tf.Tensor:
        """The position of example `i` of the share, counted like `i` from the beginning of a batch on."""
        return i // self.size * self.batch + self.begin + i % self.size
