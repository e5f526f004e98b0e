"""The gradient of a batch, at once or in chunks: for the contrastive loss by GradCache (arXiv 2101.06983).

The contrastive loss compares each image with all others of the global batch, so it is no sum over chunks. But what it
needs of an image is one row of numbers for each view. So the chunks go through the networks twice: the first time for
these rows alone, which is cheap in memory; then the loss of all rows gives the gradient to each row; and the second
time, with it, for the gradient to the weights. Other losses are sums over the images: their chunks go through once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

import tasks

Rows = dict[str, tf.Tensor]  # by name, [chunks, m, ...]
Scale = Callable[[], tf.Tensor] | None  # what the loss is multiplied by, read on each replica; None: nothing


def at_once(task: tasks.Task, batch: tasks.Batch, scale: Scale = None) -> tuple[list[tf.Tensor], tasks.Metrics]:
    """This replica's gradients to the trained weights, and its share of the metrics and the `loss`.

    With `scale`, the gradients are those of the loss times what it gives; the metrics are not.
    """
    variables = task.model.trainable_variables
    with _watching(variables) as tape:
        loss, metrics = task.loss(batch)  # this replica's share of Eq. 1, 2 or 3
        scaled = _times(loss, scale)
    return tape.gradient(scaled, variables), {"loss": loss, **metrics}


def in_chunks(
    task: tasks.Task, strategy: tf.distribute.Strategy, chunks: int, batch: Mapping[str, Any], scale: Scale = None
) -> tuple[list[Any], dict[str, Any]]:
    """What `at_once` gives, with the memory of one chunk. Call it in the cross-replica context of `strategy`.

    Value and gradient are those of the whole batch, but for batch norm, whose statistics are of a chunk. Its moving
    averages move once for each chunk, in their order. A chunk takes its images from each replica's share.

    The loop stands outside of the replicas, since they cannot exchange anything within a loop of their own.

    Args:
      task: what to train.
      strategy: of the replicas.
      chunks: their number, which divides each replica's share of the batch.
      batch: the images of each replica, as from `augment.of_canvases`, each [n, ...].
      scale: as for `at_once`.
    """
    variables = task.model.trainable_variables

    def begin(batch: tasks.Batch) -> tuple[tasks.Batch, tasks.Totals, list[tf.Tensor], tf.Tensor]:
        with _watching(variables) as tape:
            decay = task.weight_decay()
            scaled = _times(decay, scale)
        gradients = _sum([tf.zeros(v.shape, v.dtype) for v in variables], tape.gradient(scaled, variables))
        return batch, tasks.totals(batch["label"]), gradients, decay

    def no_rows(batch: tasks.Batch) -> tuple[Rows, Rows]:
        size = tf.shape(batch["label"])[0] // chunks
        shapes = (task.output_shapes, task.target_shapes)
        outputs, targets = ({name: tf.zeros([chunks, size, *row]) for name, row in of.items()} for of in shapes)
        return outputs, targets

    def embed(index: tf.Tensor, batch: tasks.Batch, outputs: Rows, targets: Rows) -> tuple[Rows, Rows]:
        """The rows, with those of a chunk behind the others. Keeps nothing for a backward pass."""
        chunk = _chunk(batch, index, chunks)
        with keras.StatelessScope():  # Batch norm's averages move in the second pass.
            found = task.outputs(chunk)
        return _with(outputs, found), _with(targets, task.targets(chunk))

    def compare(
        outputs: Rows, targets: Rows, batch: tasks.Batch, totals: tasks.Totals, decay: tf.Tensor
    ) -> tuple[Rows, tasks.Metrics]:
        """The gradient of the loss to the outputs of all chunks, and the shares of the metrics."""
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            loss, metrics = task.loss_of(_joined(outputs), _joined(targets), batch, totals)
            scaled = _times(loss, scale)
        return tape.gradient(scaled, outputs), {"loss": loss + decay, **metrics}

    def backward(
        index: tf.Tensor, batch: tasks.Batch, output_gradients: Rows, gradients: list[tf.Tensor]
    ) -> list[tf.Tensor]:
        """The gradients, and those of a chunk whose outputs have these gradients."""
        with _watching(variables) as tape:
            found = task.outputs(_chunk(batch, index, chunks))
            products = [tf.reduce_sum(x * output_gradients[name][index]) for name, x in found.items()]
            product = tf.add_n(products)  # Its gradient is that of the loss.
        return _sum(gradients, tape.gradient(product, variables))

    def forward_and_backward(
        index: tf.Tensor, batch: tasks.Batch, totals: tasks.Totals, outputs: Rows, targets: Rows,
        gradients: list[tf.Tensor],
    ) -> tuple[Rows, Rows, list[tf.Tensor]]:  # fmt: skip
        """The rows and the gradients, and those of a chunk of whose images the loss is a sum."""
        chunk = _chunk(batch, index, chunks)
        compared = task.targets(chunk)
        with _watching(variables) as tape:
            found = task.outputs(chunk)
            loss, _ = task.loss_of(found, compared, chunk, totals)
            scaled = _times(loss, scale)
        return _with(outputs, found), _with(targets, compared), _sum(gradients, tape.gradient(scaled, variables))

    batch, totals, gradients, decay = strategy.run(begin, (batch,))
    outputs, targets = strategy.run(no_rows, (batch,))
    if task.is_joint:

        def embed_next(index: tf.Tensor, outputs: Any, targets: Any) -> Any:
            return strategy.run(embed, (index, batch, outputs, targets))

        outputs, targets = _loop(chunks, embed_next, (outputs, targets))
        output_gradients, metrics = strategy.run(compare, (outputs, targets, batch, totals, decay))

        def go_back(index: tf.Tensor, gradients: Any) -> Any:
            return (strategy.run(backward, (index, batch, output_gradients, gradients)),)

        (gradients,) = _loop(chunks, go_back, (gradients,))
        return gradients, metrics

    def next_chunk(index: tf.Tensor, outputs: Any, targets: Any, gradients: Any) -> Any:
        return strategy.run(forward_and_backward, (index, batch, totals, outputs, targets, gradients))

    outputs, targets, gradients = _loop(chunks, next_chunk, (outputs, targets, gradients))
    _, metrics = strategy.run(compare, (outputs, targets, batch, totals, decay))
    return gradients, metrics


@contextlib.contextmanager
def _watching(variables: Sequence[keras.Variable]) -> Iterator[tf.GradientTape]:
    """A tape that watches these weights alone, so it keeps nothing of the passes of momentum encoder and teacher."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([variable.value for variable in variables])
        yield tape


def _times(loss: tf.Tensor, scale: Scale) -> tf.Tensor:
    return loss * scale() if scale else loss


def _chunk(batch: tasks.Batch, index: tf.Tensor, chunks: int) -> dict[str, tf.Tensor]:
    """The images of a chunk, which stand together in the replica's share, [n / chunks, ...] each."""
    return {name: tf.reshape(x, [chunks, -1, *x.shape[1:]])[index] for name, x in batch.items()}


def _with(rows: Rows, found: Mapping[str, tf.Tensor]) -> Rows:
    """Rows [chunks, m, ...] without the first chunk, and `found` [m, ...] behind them. After a loop all are found."""
    return {name: tf.concat([kept[1:], found[name][None]], axis=0) for name, kept in rows.items()}


def _joined(rows: Rows) -> Rows:
    """Rows of all chunks as those of the share, [n, ...]."""
    return {name: tf.reshape(x, [-1, *x.shape[2:]]) for name, x in rows.items()}


def _sum(gradients: list[tf.Tensor], more: list[tf.Tensor | None]) -> list[tf.Tensor]:
    return [x if y is None else x + y for x, y in zip(gradients, more, strict=True)]


def _loop(count: int, body: Callable[..., Any], values: tuple) -> tuple:
    """What `body(index, *values)`, called for each index in turn, makes of `values`."""
    _, *values_after = tf.while_loop(
        lambda index, *_: index < count,
        lambda index, *values: (index + 1, *body(index, *values)),
        (tf.constant(0), *values),
        parallel_iterations=1,
    )
    return tuple(values_after)
