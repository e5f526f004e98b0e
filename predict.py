"""What a network makes of each example of a split, batch by batch, under any strategy."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

import augment
import console
import data
import sources
from config import Config

# The outputs to check, in this order, and what a message calls them.
OUTPUTS = {"logits": "logits", "teacher": "logits of the teacher", "h": "features", "z": "projections"}


class Predictor:
    """What `outputs` makes of each example. It is compiled once for any number of passes over the examples.

    Args:
      outputs: from images [n, size, size, 3] to a dict of tensors [n, ...].
      source: the examples.
      view: from a decoded image to the network's input [size, size, 3], float32 in [0, 1].
      batch: images in a global batch.
      strategy: where to compute.
      limit, labelled_only, any_order: which examples, as for `data.eval_stream`.
    """

    def __init__(
        self,
        outputs: Callable[[tf.Tensor], dict[str, tf.Tensor]],
        source: sources.Source,
        view: Callable[[tf.Tensor], tf.Tensor],
        batch: int,
        strategy: tf.distribute.Strategy,
        limit: int = 0,
        labelled_only: bool = False,
        any_order: bool = False,
    ) -> None:
        def stream(taken: int) -> Iterable:
            return strategy.distribute_datasets_from_function(
                lambda context: data.eval_stream(source, view, batch, context, limit, labelled_only, taken, any_order)
            )

        self._source = source
        self._stream = stream
        self._whole_stream = stream(0)  # made once for all passes

        self._step = make_step(outputs, strategy)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """One pass over the examples.

        Yields:
          The outputs as float32, and `label` [n] int32. Each example counts once, whatever the batch size and replicas.
        """
        ready = [self._whole_stream]

        def stream(taken: int) -> Iterable:
            return ready.pop() if ready else self._stream(taken)  # After a failure, the stream is made anew.

        for batch in data.patient_batches(self._source, stream):
            arrays = {name: value.numpy() for name, value in self._step(batch).items()}
            counted = arrays.pop("mask") > 0
            yield {name: value[counted] for name, value in arrays.items()}


def make_step(
    outputs: Callable[[tf.Tensor], dict[str, tf.Tensor]], strategy: tf.distribute.Strategy
) -> Callable[[dict], dict[str, tf.Tensor]]:
    """The compiled step: a distributed batch in, the `outputs` of its `image` as float32 out, and its other entries."""

    @tf.function(autograph=False)
    def step(batch: dict) -> dict[str, tf.Tensor]:
        def replica(batch: dict) -> dict[str, tf.Tensor]:
            made = {name: tf.cast(value, tf.float32) for name, value in outputs(batch["image"]).items()}
            return {**made, **{name: value for name, value in batch.items() if name != "image"}}

        of_replicas = strategy.run(replica, (batch,))
        return {name: strategy.gather(value, axis=0) for name, value in of_replicas.items()}  # [N, ...]

    return step


def predict(
    outputs: Callable[[tf.Tensor], dict[str, tf.Tensor]],
    source: sources.Source,
    config: Config,
    strategy: tf.distribute.Strategy,
    limit: int = 0,
    labelled_only: bool = False,
    what: str = "eval",
    view: Callable[[tf.Tensor], tf.Tensor] | None = None,
    any_order: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """What `outputs` makes of each example, with a progress bar.

    Args:
      outputs, source, strategy, limit, labelled_only, any_order: as for `Predictor`.
      config: image_size and eval_batch_size of the examples.
      what: what the examples are read for, for the terminal.
      view: as for `Predictor`; None: the central crop.

    Yields:
      Batches as `Predictor.batches`.
    """

    def central_crop(image: tf.Tensor) -> tf.Tensor:
        return augment.center_crop(image, config.image_size)

    predictor = Predictor(
        outputs, source, view or central_crop, config.eval_batch_size, strategy, limit, labelled_only, any_order
    )
    examples = min(limit or source.examples, source.examples)
    # How many labelled examples there are is not known.
    total = None if labelled_only else math.ceil(examples / config.eval_batch_size)
    with console.Progress(what, "batch", total, keep=False) as progress:
        for batch in predictor.batches():
            yield batch
            progress.advance()
            progress.show("")


def only_finite(batches: Iterator[dict[str, np.ndarray]], step: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches, up to the first with an output that is not finite; with such an output it ends in an error.

    Args:
      batches: as `predict` yields them.
      step: the network's step, for the message.

    Raises:
      FloatingPointError: after the last batch, where an output was not finite. It says of how many examples.
    """
    bad: collections.Counter[str] = collections.Counter()
    examples = 0
    for batch in batches:
        examples += len(batch["label"])
        for name in OUTPUTS:
            if name in batch:
                bad[name] += int((~np.isfinite(batch[name]).all(1)).sum())
        if not bad.total():  # From the first bad batch on there will be no result; the rest is only counted.
            yield batch
    for name, called in OUTPUTS.items():
        if bad[name]:
            raise FloatingPointError(
                f"the {called} of {bad[name]} of {examples} examples are not finite at step {step}: "
                f"the network has diverged; train again with a lower --learning_rate"
            )
