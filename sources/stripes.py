"""An order of records in many files of which every worker reads a part, and which any number of workers give alike.

A batch has places. They are divided into stripes of neighbouring places: with a batch of 4,096 and 48 stripes, stripe 0
fills the places 0 to 84, and so on. Each stripe reads records of its own: an epoch takes the pieces of the files in an
order drawn from (seed, epoch), lays them end to end, and cuts this line into as many parts as there are stripes. A
stripe reads its part from the beginning to the end, some records at a time, and shuffles those in memory.

A worker that fills some places of every batch reads the stripes of these places, and no other file. Nothing in the
order depends on how many workers there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
import tensorflow as tf

from sources.share import Share
from sources.windows import Pieces, Windows

# How many stripes there may be. There are as many as there are files and places for; with fewer files than the least
# of them, records of few neighbourhoods would make up a batch. 48 stripes are shared evenly by 2, 3, 4, 6, 8, 12, 16,
# 24 and 48 workers.
STRIPES = (48, 24, 12, 8)
SHUFFLED = 9216  # records that all stripes together shuffle at a time; those of ImageNet take 1 GB


class Line(NamedTuple):
    """The pieces of an epoch, one after the other: of which piece, its first record in the file, how many, and the end.

    All are [p + 1] int64. The end counts the records of the line.
    """

    pieces: tf.Tensor
    begins: tf.Tensor
    sizes: tf.Tensor
    ends: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Stripes(Pieces):
    """The pieces of some files, and how batches take their records in the order of stripes.

    Attributes:
      batch: the places of a batch.
      count: how many stripes there are.
    """

    batch: int
    count: int

    @classmethod
    def of_files(cls, parts: Sequence[tuple[str, int, int]], batch: int) -> Self | None:
        """The stripes over `parts` of files, as for `Pieces.of`; None where there are too few files or places."""
        files = len({path for path, _, _ in parts})
        count = next((count for count in STRIPES if count <= min(files, batch)), None)
        return None if count is None else cls.of(parts, batch=batch, count=count)

    @property
    def windows(self) -> Windows:
        """The order of windows over the same pieces."""
        return Windows(self.files, self.begins, self.sizes)

    @property
    def examples(self) -> int:
        """How many records there are."""
        return int(self.sizes.sum())

    @property
    def edges(self) -> np.ndarray:
        """The first place of each stripe in a batch, and the end of the last one: [count + 1] int64."""
        return np.arange(self.count + 1, dtype=np.int64) * self.batch // self.count

    def stream(self, seed: int, first_step: int, share: Share) -> tf.data.Dataset:
        """The records of a worker's share of all batches from `first_step` on, without an end.

        They come batch by batch, in the order of the places, as `Pieces.records` gives them: (content, number within
        its file, number of piece). No stripe is read in which the share has no place.
        """
        return self._of_share(share, lambda stripe: self._records(stripe, seed, first_step))

    def once(self, share: Share) -> tf.data.Dataset:
        """All records once, in a fixed order: those of a worker's share of as few batches as hold them.

        They come as from `stream`, each with 1.0. Records with 0.0, which do not count, fill up the last batches.
        """
        sizes = tf.constant(self.sizes, tf.int64)
        pieces = tf.range(len(self.files), dtype=tf.int64)
        line = Line(pieces, tf.constant(self.begins, tf.int64), sizes, tf.cumsum(sizes))
        batches = -(-self.examples // self.batch)

        def of_stripe(stripe: tf.Tensor) -> tf.data.Dataset:
            begin, end = tf.gather(self.edges, stripe), tf.gather(self.edges, stripe + 1)  # scalars: places in a batch
            own = self._read(line, begin * self.examples // self.batch, end * self.examples // self.batch)
            filling = self._read(line, tf.constant(0, tf.int64), tf.constant(1, tf.int64)).repeat()
            counted, uncounted = own.map(lambda *record: (*record, 1.0)), filling.map(lambda *record: (*record, 0.0))
            return counted.concatenate(uncounted).take(batches * (end - begin))

        return self._of_share(share, of_stripe)

    def _of_share(self, share: Share, records: Callable[[tf.Tensor], tf.data.Dataset]) -> tf.data.Dataset:
        """What `records` gives of each stripe, batch by batch: in each, the places of a worker's share."""
        edges = self.edges
        first = int(np.searchsorted(edges, share.begin, side="right")) - 1
        end = int(np.searchsorted(edges, share.end))  # the first stripe after the share

        def of_stripe(stripe: tf.Tensor) -> tf.data.Dataset:
            begin_of_stripe, end_of_stripe = tf.gather(edges, stripe), tf.gather(edges, stripe + 1)
            begin = tf.maximum(share.begin - begin_of_stripe, 0)
            size = tf.minimum(share.end - begin_of_stripe, end_of_stripe - begin_of_stripe) - begin
            batches = records(stripe).batch(end_of_stripe - begin_of_stripe)
            # Of a stripe that two workers share, each takes its places.
            return batches.map(lambda *values: tuple(value[begin : begin + size] for value in values))

        # Each stripe gives its places of one batch at a time. All have as many, so the next stripe's always follow.
        stripes = tf.data.Dataset.range(first, end).interleave(
            of_stripe, cycle_length=end - first, block_length=1, num_parallel_calls=end - first, deterministic=True
        )
        return stripes.unbatch()

    def numbers(self, epoch: tf.Tensor, seed: int) -> tf.Tensor:
        """The order of an epoch, [n] int64: which record of all, counted piece by piece, comes at each place of it."""
        line = self._line(epoch, seed)
        begins_in_piece = line.begins - tf.gather(self.begins, line.pieces)
        of_line = tf.ragged.range(
            tf.gather(self.before, line.pieces) + begins_in_piece,
            tf.gather(self.before, line.pieces) + begins_in_piece + line.sizes,
        ).values  # [n] the records along the line

        def of_stripe(stripe: tf.Tensor) -> tf.data.Dataset:
            begin, end = self._part(epoch, stripe)
            return self._shuffled(tf.data.Dataset.from_tensor_slices(of_line[begin:end]), seed, epoch, stripe, 0)

        by_stripe = tf.data.Dataset.range(self.count).flat_map(of_stripe).batch(self.examples).get_single_element()
        places = (tf.range(self.examples, dtype=tf.int64) + epoch * self.examples) % self.batch
        stripe_of_place = tf.searchsorted(self.edges, places, side="right") - 1
        by_stripe_and_place = tf.argsort(stripe_of_place, stable=True)  # [n] the places of stripe 0, then of stripe 1
        return tf.scatter_nd(by_stripe_and_place[:, None], by_stripe, [self.examples])

    def _records(self, stripe: tf.Tensor, seed: int, first_step: int) -> tf.data.Dataset:
        """The records of one stripe from a step on, as `Pieces.records` gives them, without an end."""
        first_epoch = first_step * self.batch // self.examples

        def of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            before = self._below(epoch * self.examples, stripe)
            taken = tf.maximum(self._below(tf.constant(first_step * self.batch, tf.int64), stripe) - before, 0)
            begin, end = self._part(epoch, stripe)
            line = self._line(epoch, seed)
            window = taken // self._window * self._window  # The records of earlier windows are not read.
            read = self._read(line, begin + window, end)
            return self._shuffled(read, seed, epoch, stripe, taken // self._window).skip(taken - window)

        return tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max).flat_map(of_epoch)

    @property
    def _window(self) -> int:
        """How many records a stripe shuffles at a time."""
        return SHUFFLED // self.count

    def _below(self, position: tf.Tensor, stripe: tf.Tensor) -> tf.Tensor:
        """How many of the positions before `position` of the stream are of this stripe."""
        begin, end = tf.gather(self.edges, stripe), tf.gather(self.edges, stripe + 1)
        in_last = tf.clip_by_value(position % self.batch - begin, 0, end - begin)
        return position // self.batch * (end - begin) + in_last

    def _part(self, epoch: tf.Tensor, stripe: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The first record of a stripe on the line of an epoch, and the end."""
        stripes = tf.range(self.count, dtype=tf.int64)
        epoch = tf.cast(epoch, tf.int64)
        sizes = self._below((epoch + 1) * self.examples, stripes) - self._below(epoch * self.examples, stripes)
        end = tf.cumsum(sizes)[stripe]
        return end - sizes[stripe], end

    def _line(self, epoch: tf.Tensor, seed: int) -> Line:
        """The pieces in the order of an epoch. A part of the first one, of random size, is moved to the end.

        So the cuts between the stripes are not the same in every epoch where all pieces have one size.
        """
        draw = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(self.files), dtype=tf.int64), draw)  # [p]
        sizes, begins = tf.gather(self.sizes, order), tf.gather(self.begins, order)
        cut = tf.random.stateless_uniform([], draw, maxval=sizes[0], dtype=tf.int64)
        pieces = tf.concat([order, order[:1]], axis=0)
        sizes = tf.concat([sizes[:1] - cut, sizes[1:], cut[None]], axis=0)
        begins = tf.concat([begins[:1] + cut, begins[1:], begins[:1]], axis=0)
        return Line(pieces, begins, sizes, tf.cumsum(sizes))

    def _read(self, line: Line, begin: tf.Tensor, end: tf.Tensor) -> tf.data.Dataset:
        """The records of a line from `begin` to `end`, as `Pieces.records` gives them."""

        def of_piece(place: tf.Tensor) -> tf.data.Dataset:
            piece, begin_of_piece = line.pieces[place], line.ends[place] - line.sizes[place]
            skipped = tf.maximum(begin - begin_of_piece, 0)
            taken = tf.minimum(end, line.ends[place]) - begin_of_piece - skipped
            return self.part_of_piece(piece, line.begins[place] + skipped, taken)

        ends_of_part = tf.stack([begin, end - 1])
        first, last = tf.unstack(tf.searchsorted(line.ends, ends_of_part, side="right", out_type=tf.int64))
        return tf.data.Dataset.range(first, tf.where(begin < end, last + 1, first)).flat_map(of_piece)

    def _shuffled(
        self, read: tf.data.Dataset, seed: int, epoch: tf.Tensor, stripe: tf.Tensor, first_window: tf.Tensor | int
    ) -> tf.data.Dataset:
        """What is `read` of a stripe's part of an epoch from window `first_window` on, shuffled window by window."""
        draw = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
        own_draw = tf.random.experimental.stateless_fold_in(draw, stripe)

        def shuffled(window: tf.Tensor, records: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
            drawn = tf.random.experimental.stateless_fold_in(own_draw, window)
            first_values = tf.nest.flatten(records)[0]
            order = tf.random.experimental.stateless_shuffle(tf.range(tf.shape(first_values)[0]), drawn)
            return tf.nest.map_structure(lambda values: tf.gather(values, order), records)

        windows = read.batch(self._window).enumerate(tf.cast(first_window, tf.int64))
        return windows.map(shuffled).prefetch(1).unbatch()
