"""Orders of records in files that can be entered at any place without reading what comes before it.

A file of records is fast to read from some record on, and slow to read here and there. So the files are cut into
pieces of neighbouring records. How many records a piece has is known beforehand, so that the pieces which hold any
place of an epoch follow by counting.

In the order of windows, an epoch takes the pieces in an order drawn from (seed, epoch). Some pieces at a time make a
window, whose records are read into memory and shuffled, in an order drawn from (seed, epoch, window). `stripes.py` has
an order of which every worker reads a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import tensorflow as tf

PIECE = 2048  # records that a piece has at most; a shard of ImageNet (1,251 records) is one piece
PIECES = 8  # pieces in a window; a window of ImageNet takes 1.1 GB, and the next one is read meanwhile


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of some files, in a fixed order.

    Attributes:
      files: [p] the path of the file of each piece.
      begins: [p] int64, how many records of the file come before the piece.
      sizes: [p] int64, the records of the piece, at least one.
    """

    files: list[str]
    begins: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[tuple[str, int, int]], **more: Any) -> Self:
        """The pieces of `parts` of files: (path, records to leave out at its beginning, records to take).

        `more` are the attributes that a kind of order has of its own.
        """
        files: list[str] = []
        begins, sizes = [], []
        for path, skip, take in parts:
            # The pieces of a file differ in size by one record at most.
            pieces = -(-take // PIECE)
            edges = skip + take * np.arange(pieces + 1) // pieces
            files.extend(path for _ in range(pieces))
            begins.append(edges[:-1])
            sizes.append(np.diff(edges))
        return cls(files, np.concatenate(begins), np.concatenate(sizes), **more)

    @property
    def before(self) -> np.ndarray:
        """How many records the pieces before each piece have, [p] int64."""
        return np.cumsum(self.sizes) - self.sizes

    def records(self, pieces: tf.Tensor) -> tf.data.Dataset:
        """The records of `pieces` [k], piece after piece: each (content, number within its file, number of piece)."""

        def of_piece(piece: tf.Tensor) -> tf.data.Dataset:
            return self.part_of_piece(piece, tf.gather(self.begins, piece), tf.gather(self.sizes, piece))

        return tf.data.Dataset.from_tensor_slices(pieces).interleave(
            of_piece, cycle_length=PIECES, block_length=PIECE, num_parallel_calls=PIECES, deterministic=True
        )

    def part_of_piece(self, piece: tf.Tensor, begin: tf.Tensor, size: tf.Tensor) -> tf.data.Dataset:
        """The records of a piece from record `begin` of its file on, `size` of them, as `records` gives them.

        TensorFlow passes over the records before them without parsing what they hold.
        """
        content = tf.data.TFRecordDataset(tf.gather(self.files, piece)).skip(begin).take(size)
        return content.enumerate(begin).map(lambda number, record: (record, number, piece))


@dataclasses.dataclass(frozen=True)
class Windows(Pieces):
    """The pieces of some files, and how an epoch visits their records in the order of windows."""

    @property
    def windows(self) -> Self:
        """This order."""
        return self

    def epoch(self, epoch: tf.Tensor, seed: int, first: tf.Tensor | int = 0) -> tf.data.Dataset:
        """The records of an epoch in its order, from place `first` on, as `records` gives them."""
        return self._shuffled(epoch, seed, first, self.records)

    def numbers(self, epoch: tf.Tensor, seed: int) -> tf.Tensor:
        """The same order as [n] int64: which record of all, counted piece by piece, comes at each place."""
        before = self.before

        def counted(pieces: tf.Tensor) -> tf.data.Dataset:
            begins, sizes = tf.gather(before, pieces), tf.gather(self.sizes, pieces)  # [k], [k]
            return tf.data.Dataset.from_tensor_slices(tf.ragged.range(begins, begins + sizes).values)

        shuffled = self._shuffled(epoch, seed, 0, counted)
        return shuffled.batch(int(self.sizes.sum())).get_single_element()  # [n]

    def _shuffled(
        self, epoch: tf.Tensor, seed: int, first: tf.Tensor | int, read: Callable[[tf.Tensor], tf.data.Dataset]
    ) -> tf.data.Dataset:
        """What `read` gives for all pieces, in the order of an epoch, from place `first` on."""
        draw = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(self.files)), draw)  # [p]
        sizes = tf.math.segment_sum(tf.gather(self.sizes, order), tf.range(len(self.files)) // PIECES)  # [windows]
        ends = tf.cumsum(sizes)  # [windows]
        first = tf.cast(first, tf.int64)
        window_of_first = tf.searchsorted(ends, first[None], side="right", out_type=tf.int64)[0]

        def window(number: tf.Tensor) -> tf.Tensor:
            size = sizes[number]
            found = read(order[number * PIECES : (number + 1) * PIECES]).batch(size).get_single_element()  # [size] each
            own_draw = tf.random.experimental.stateless_fold_in(draw, number)
            shuffled = tf.random.experimental.stateless_shuffle(tf.range(size), own_draw)  # [size]
            return tf.nest.map_structure(lambda values: tf.gather(values, shuffled), found)

        windows = tf.data.Dataset.range(window_of_first, tf.size(ends, tf.int64)).map(window).prefetch(1)
        return windows.unbatch().skip(first - tf.concat([[0], ends], axis=0)[window_of_first])
