"""What a network makes of every image of a source: in order, from any place on, with a reason where there is nothing.

Unlike an evaluation, which is about a split as a whole, this is about each image: one that cannot be read is named and
does not stop the others.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

import augment
import console
import data
import predict
import sources
from config import Config
from errors import reason

BATCHES_AHEAD = 2  # So many are read while the device computes.

Outputs = Callable[[tf.Tensor], dict[str, tf.Tensor]]


class EveryImage:
    """A pass over some images of a source.

    Args:
      outputs: from images [n, size, size, 3] to a dict of tensors [n, ...].
      source: the images.
      config: image_size and eval_batch_size.
      strategy: where to compute: the devices of one machine.
      wanted: the positions of the images in the source's fixed order, ascending.
    """

    def __init__(
        self, outputs: Outputs, source: sources.Source, config: Config, strategy: tf.distribute.Strategy,
        wanted: np.ndarray,
    ) -> None:  # fmt: skip
        self._outputs, self._source, self._strategy, self._wanted = outputs, source, strategy, wanted
        self._size, self._batch = config.image_size, config.eval_batch_size
        self._step = predict.make_step(outputs, strategy)

    def batches(self, done: int, what: str) -> Iterator[dict[str, np.ndarray]]:
        """The wanted images after the first `done`, with a progress bar.

        Args:
          done: how many to leave out.
          what: what is done, for the terminal.

        Yields:
          `position` [n] int64, consecutive parts of `wanted`; `unreadable` [n] texts, the reason why an image cannot be
          read, or empty; and the outputs [n, ...] float32, which are 0 for an image that cannot be read.
        """
        started, before = time.monotonic(), done
        with console.Progress(what, "image", len(self._wanted), done, keep=False) as progress:
            for read in self._read(done):
                last = int(read["position"][-1])
                end = int(np.searchsorted(self._wanted, last, side="right"))
                yield self._with_unreadable(read, self._wanted[done:end])
                progress.advance(end - done)
                done = end
                speed = (done - before) / max(time.monotonic() - started, 1e-9)
                progress.show(f"{speed:,.0f} images/s" if progress.in_log else "")  # A bar says it by itself.
            # No image after the last that was read can be read.
            while done < len(self._wanted):
                expected = self._wanted[done : done + self._batch]
                yield self._with_unreadable({"position": np.empty([0], np.int64)}, expected)
                progress.advance(len(expected))
                done += len(expected)

    def _read(self, done: int) -> Iterator[dict[str, np.ndarray]]:
        """The outputs of the images that can be read, batch by batch. No batch is empty."""
        if done == len(self._wanted):
            return
        stream = self._strategy.distribute_datasets_from_function(lambda context: self.stream(done, context))
        on_device = None  # The device computes a batch while the one before is made into rows.
        for batch in data.batches(stream):
            before, on_device = on_device, self._step(batch)
            if before:
                yield _counted(before)
        if on_device:
            yield _counted(on_device)

    @tf.autograph.experimental.do_not_convert  # as for `data.train_stream`
    def stream(self, done: int, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Batches of one replica's share: `image` [n, size, size, 3] and `position` [n], -1 for a filler."""
        first = int(self._wanted[done])
        records = self._source.ordered().skip(first).enumerate(first)
        if len(self._wanted) < self._source.examples:
            chosen = np.zeros(self._source.examples, bool)
            chosen[self._wanted] = True
            is_wanted = tf.constant(chosen)
            records = records.filter(lambda position, record: is_wanted[position])

        options = tf.data.Options()
        options.autotune.enabled = False  # It takes longer to tune than it gains, and memory for what it tries.

        def example(position: tf.Tensor, record: dict) -> dict:
            return {"image": self._view(record["record"]), "position": position}

        images = records.map(example, num_parallel_calls=os.cpu_count(), deterministic=True)
        images = images.ignore_errors(log_warning=False)
        # How many images can be read is known only at the end. `batch - 1` fillers complete the last batch.
        filler = {"image": tf.zeros([self._size, self._size, 3]), "position": tf.constant(-1, tf.int64)}
        fillers = tf.data.Dataset.from_tensors(filler).repeat(self._batch - 1)
        whole = images.concatenate(fillers).batch(self._batch, drop_remainder=True)
        if context.num_replicas_in_sync > 1:
            whole = whole.rebatch(self._batch // context.num_replicas_in_sync)
        return whole.prefetch(BATCHES_AHEAD).with_options(options)

    def _view(self, record: tf.Tensor) -> tf.Tensor:
        return augment.center_crop(self._source.decode(record), self._size)

    def _with_unreadable(self, read: dict[str, np.ndarray], expected: np.ndarray) -> dict[str, np.ndarray]:
        """The batch with all `expected` positions. Those that are missing in `read` are tried once more.

        A disk or a network may have failed for a moment.
        """
        reasons = np.full(len(expected), "", object)
        if len(read["position"]) == len(expected):
            return {**read, "unreadable": reasons}
        whole = {name: np.zeros([len(expected), *shape], np.float32) for name, shape in self._shapes.items()}
        place = np.searchsorted(expected, read["position"])
        for name, values in whole.items():
            values[place] = read.get(name, values[:0])
        for i in np.flatnonzero(~np.isin(expected, read["position"])):
            try:
                image = self._view(self._record(int(expected[i])))
            except tf.errors.OpError as error:
                reasons[i] = reason(error)
                continue
            for name, value in self._outputs(image[None]).items():
                whole[name][i] = tf.cast(value, tf.float32)[0]
        return {**whole, "position": expected, "unreadable": reasons}

    @functools.cached_property
    def _shapes(self) -> dict[str, list[int]]:
        """The shape of each output of one image."""
        answer_of_black = self._outputs(tf.zeros([1, self._size, self._size, 3]))
        return {name: value.shape.as_list()[1:] for name, value in answer_of_black.items()}

    def _record(self, position: int) -> tf.Tensor:
        if isinstance(self._source, sources.ListedSource):
            return self._source.record(position)
        (example,) = self._source.ordered().skip(position).take(1)
        return example["record"]


def _counted(on_device: dict[str, tf.Tensor]) -> dict[str, np.ndarray]:
    """A batch without its fillers."""
    arrays = {name: value.numpy() for name, value in on_device.items()}
    counted = arrays["position"] >= 0
    return {name: value[counted] for name, value in arrays.items()}
