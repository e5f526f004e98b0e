"""The losses: NT-Xent with and without memory (Eq. 1), distillation (Eq. 2, 3), supervised. Pure functions of tensors.

Losses come back one value per example, in float32; `tasks.py` takes their mean over the global batch. Views stand in
block order: view 1 of every image, then view 2 of every image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

MASKED = -1e9  # A candidate that does not count has this logit.
# Logits that take more bytes are computed in blocks of about this size. The C library gives back to the system what is
# larger than 32 MB as soon as it is not used, and fetching such pages anew takes a CPU longer than the arithmetic.
BLOCK_BYTES = 2**24


class Contrastive(NamedTuple):
    """NT-Xent of each anchor, and two metrics on the very logits of the loss. All float32 [2n]."""

    loss: tf.Tensor
    accuracy: tf.Tensor  # 1 where the positive has the largest logit
    entropy: tf.Tensor  # of the softmax over the candidates, in nats


def gather(x: tf.Tensor) -> tf.Tensor:
    """All replicas' `x` [n, ...] as [N, ...], in replica order, with gradient. Same shape on every replica."""
    replicas = tf.distribute.get_replica_context()
    return x if replicas.num_replicas_in_sync == 1 else replicas.all_gather(x, axis=0)  # [N, ...]


def gather_views(z: tf.Tensor) -> tf.Tensor:
    """All replicas' two views `z` [2n, D] as [2N, D], in block order of the global batch, with gradient."""
    return tf.concat([gather(view) for view in tf.split(z, 2)], axis=0)  # [2N, D]


def normalize(z: tf.Tensor, hidden_norm: bool = True) -> tf.Tensor:
    """`z` [..., D] in float32, on the unit sphere where `hidden_norm`."""
    z = tf.cast(z, tf.float32)
    return tf.math.l2_normalize(z, axis=-1) if hidden_norm else z


def nt_xent(
    anchors: tf.Tensor,
    candidates: tf.Tensor,
    tau: float,
    first: int | tf.Tensor = 0,
    queue: tf.Tensor | None = None,
    queue_valid: tf.Tensor | None = None,
    block: int = 0,
    sharded: bool = False,
) -> Contrastive:
    """Eq. 1 for this replica's anchors against the global batch and, with memory, the queue of past keys.

    The positive of an anchor is its image's other view among the candidates; its own view is masked; the same view of
    other images counts as a negative like any other.

    Large logits are never there as a whole. They are computed for one block of anchors after the other; what remains of
    a block is the loss and its gradient to the anchors. The gradient to the candidates computes their logits again, for
    one block of candidates after the other, and only where somebody asks for it. The queue has no gradient.

    Args:
      anchors: [2n, D] float32, the local views of n images.
      candidates: [2N, D] float32, the views (without memory) or momentum-encoder keys (with it) of the global batch.
      tau: temperature, > 0.
      first: the place of the first local image in the global batch.
      queue: [K, D] float32 past keys, or None.
      queue_valid: [K] bool, the slots that hold a key.
      block: the largest number of anchors, or of candidates, in a block; 0: as many as take about BLOCK_BYTES.
      sharded: whether `queue` is a part of the queue: each replica has another one, as large.

    Returns:
      `Contrastive`, one value per anchor.
    """
    candidates = tf.ensure_shape(candidates, [None, anchors.shape[1]])  # Gathered ones do not know their width.
    n, total = tf.shape(anchors)[0] // 2, tf.shape(candidates)[0] // 2
    images = tf.range(n) + first  # [n]
    own = tf.concat([images, images + total], axis=0)  # [2n]
    positive = tf.concat([images + total, images], axis=0)  # [2n]
    past, empty = [], [tf.zeros([2 * total], tf.bool)]
    if queue is not None and queue_valid is not None and not sharded:
        past.append(queue)
        empty.append(tf.logical_not(queue_valid))

    @tf.custom_gradient
    def in_blocks(anchors: tf.Tensor, candidates: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Callable]:
        # An outer tape would keep the logits of all blocks if it saw a tensor here that it watches.
        anchors, candidates = tf.stop_gradient(anchors), tf.stop_gradient(candidates)
        queries = anchors / tau  # [2n, D]
        keys = tf.concat([candidates, *past], axis=0)  # [2N + K, D]
        loss, accuracy, log_total, mean_key, _ = _against_keys(
            queries, keys, own, positive, tf.concat(empty, axis=0), block
        )  # [2n], [2n], [2n], [2n, D]
        if sharded:
            of_queue, mean_past, highest = _against_shards(queries, queue, queue_valid, block)  # [2n], [2n, D], [2n]
            accuracy *= tf.cast(log_total - loss >= highest, tf.float32)  # Where it is 1, the positive was the highest.
            of_batch, log_total = log_total, tf.reduce_logsumexp(tf.stack([log_total, of_queue]), axis=0)
            loss += log_total - of_batch
            share = tf.exp(of_batch - log_total)[:, None]  # [2n, 1], of the softmax
            mean_key = share * mean_key + (1.0 - share) * mean_past
        # The mean of the logits under the softmax is the product of the query and the mean key.
        entropy = log_total - tf.reduce_sum(queries * mean_key, axis=1)  # [2n]

        def gradient(d_loss: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            to_anchors = (mean_key - tf.gather(candidates, positive)) * d_loss[:, None] / tau  # [2n, D]
            return to_anchors, _to_candidates(candidates, queries, own, positive, log_total, d_loss, block)

        return (loss, accuracy, entropy), gradient

    loss, accuracy, entropy = in_blocks(anchors, candidates)
    return Contrastive(loss, tf.stop_gradient(accuracy), tf.stop_gradient(entropy))


def _against_keys(
    queries: tf.Tensor, keys: tf.Tensor, own: tf.Tensor, positive: tf.Tensor, empty: tf.Tensor, block: int
) -> tuple[tf.Tensor, ...]:
    """What remains of the logits of each query: loss, accuracy, logsumexp, highest logit [2n], and mean key [2n, D].

    Args:
      queries: [2n, D], the anchors over tau.
      keys: [M, D], the candidates and the queue.
      own, positive: [2n], the places of two keys of each query.
      empty: [M] bool, the keys that do not count.
      block: as for `nt_xent`.
    """
    across = tf.transpose(keys)  # [D, M]: a product that transposes by itself would do so for each block
    places = tf.range(tf.shape(keys)[0])  # [M]

    def of_block(queries: tf.Tensor, own: tf.Tensor, positive: tf.Tensor) -> tuple[tf.Tensor, ...]:
        logits = tf.matmul(queries, across)  # [B, M]
        logits = tf.where(tf.logical_or(own[:, None] == places, empty), MASKED, logits)
        best = tf.argmax(logits, axis=1, output_type=tf.int32)  # [B]
        highest = tf.gather(logits, best, batch_dims=1)  # [B]
        weights = tf.exp(logits - highest[:, None])  # [B, M], the softmax up to a factor
        total = tf.reduce_sum(weights, axis=1)  # [B]
        log_total = highest + tf.math.log(total)  # [B]
        loss = log_total - tf.gather(logits, positive, batch_dims=1)  # [B]
        mean_key = tf.matmul(weights, keys) / total[:, None]  # [B, D]
        return loss, tf.cast(best == positive, tf.float32), log_total, mean_key, highest

    return _map_blocks(of_block, (queries, own, positive), _length(keys), block, (tf.float32,) * 5)


def _against_shards(
    queries: tf.Tensor, shard: tf.Tensor, valid: tf.Tensor, block: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """What remains of the logits of each query with all shards of the queue: logsumexp, mean key and highest logit.

    Each replica compares the queries of all replicas with its own shard. Then they exchange what remains of it.

    Args:
      queries: [2n, D], this replica's anchors over tau.
      shard: [K / R, D], this replica's part of the queue.
      valid: [K / R] bool, the slots that hold a key.
      block: as for `nt_xent`.

    Returns:
      [2n], [2n, D], [2n].
    """
    replicas = tf.distribute.get_replica_context()
    queries_of_all = tf.ensure_shape(gather(queries), [None, queries.shape[1]])  # [R 2n, D]
    none, first = tf.fill([_length(queries_of_all)], -1), tf.zeros([_length(queries_of_all)], tf.int32)
    _, _, log_total, mean_key, highest = _against_keys(
        queries_of_all, shard, none, first, tf.logical_not(valid), block
    )  # [R 2n], [R 2n, D], [R 2n]
    of_shards = gather(tf.stack([log_total, highest])[None])  # [R, 2, R 2n]
    log_of_all = tf.reduce_logsumexp(of_shards[:, 0], axis=0)  # [R 2n]
    part = tf.exp(log_total - log_of_all)[:, None] * mean_key  # [R 2n, D]
    if replicas.num_replicas_in_sync > 1:
        part = replicas.all_reduce(tf.distribute.ReduceOp.SUM, part)
    n = _length(queries)
    begin = n * replicas.replica_id_in_sync_group
    rows = tf.range(begin, begin + n)  # of this replica
    return tuple(tf.gather(x, rows) for x in (log_of_all, part, tf.reduce_max(of_shards[:, 1], axis=0)))


def _to_candidates(
    candidates: tf.Tensor, queries: tf.Tensor, own: tf.Tensor, positive: tf.Tensor, log_total: tf.Tensor,
    d_loss: tf.Tensor, block: int,
) -> tf.Tensor:  # fmt: skip
    """The gradient to the candidates [2N, D], from the gradient `d_loss` to the loss of each query [2n].

    The other arguments are those of `_against_keys`, and what it returned.
    """
    across = tf.transpose(queries)  # [D, 2n]
    weighted = queries * d_loss[:, None]  # [2n, D]

    def of_block(candidates: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        p = tf.exp(tf.matmul(candidates, across) - log_total)  # [B, 2n]
        return tf.matmul(tf.where(places[:, None] == own, 0.0, p), weighted)  # [B, 2n] x [2n, D]

    places = tf.range(tf.shape(candidates)[0])  # [2N]
    to_all = _map_blocks(of_block, (candidates, places), _length(queries), block, tf.float32)  # [2N, D]
    of_positives = tf.math.unsorted_segment_sum(weighted, positive, _length(candidates))  # [2N, D]
    return to_all - of_positives


def blocks_of(rows: int | tf.Tensor, columns: int | tf.Tensor, block: int = 0) -> tuple[Any, Any]:
    """How the rows of a float32 matrix are shared out: the number of blocks, and the number of rows in each of them.

    Args:
      rows, columns: the sides of the matrix, numbers or integer scalars.
      block: the largest number of rows in a block; 0: as many as take about BLOCK_BYTES.

    Returns:
      Two numbers; integer scalars where the sides are such. The last block may lack some rows.
    """
    most = block or BLOCK_BYTES // (4 * columns) + 1
    blocks = -(-rows // most)
    return blocks, -(-rows // blocks)


def _length(x: tf.Tensor) -> int | tf.Tensor:
    """The number of rows of `x`; a tensor where it is known only when the step runs."""
    return tf.shape(x)[0] if x.shape[0] is None else x.shape[0]


def _map_blocks(
    function: Callable[..., Any], tensors: Sequence[tf.Tensor], columns: int | tf.Tensor, block: int, dtypes: Any
) -> Any:
    """The results of `function` for `tensors`, computed for one block of rows after the other.

    Args:
      function: from some rows of each tensor to one tensor or several, with as many rows.
      tensors: [R, ...], each.
      columns: the number of columns of the matrix that `function` makes.
      block: as for `blocks_of`. Rows of zeros fill the last block.
      dtypes: those of the results.
    """
    length = _length(tensors[0])
    blocks, rows = blocks_of(length, columns, block)
    filled = [tf.pad(x, [[0, blocks * rows - length]] + [[0, 0]] * (len(x.shape) - 1)) for x in tensors]
    stacked = [tf.reshape(x, [blocks, rows, *x.shape[1:]]) for x in filled]
    results = tf.map_fn(
        lambda parts: function(*parts), stacked, parallel_iterations=1, fn_output_signature=dtypes
    )  # [blocks, rows, ...], each
    return tf.nest.map_structure(lambda x: tf.reshape(x, [blocks * rows, *x.shape[2:]])[:length], results)


def distillation(student_logits: tf.Tensor, teacher_logits: tf.Tensor, tau: float) -> tf.Tensor:
    """Eq. 2 for each example: cross-entropy of the student's P_S under the fixed teacher's P_T, both at `tau`.

    Args:
      student_logits, teacher_logits: [n, classes].
      tau: distillation temperature, > 0.

    Returns:
      [n] float32.
    """
    targets = tf.nn.softmax(tf.stop_gradient(tf.cast(teacher_logits, tf.float32)) / tau)  # [n, classes]
    return tf.nn.softmax_cross_entropy_with_logits(targets, tf.cast(student_logits, tf.float32) / tau)  # [n]


def supervised(logits: tf.Tensor, labels: tf.Tensor, label_smoothing: float = 0.0) -> tuple[tf.Tensor, tf.Tensor]:
    """Softmax cross-entropy and correctness of each labelled example; 0 where the label is -1 (unlabelled).

    Args:
      logits: [n, classes].
      labels: [n] int32, -1 where unlabelled.
      label_smoothing: this share of the target is spread evenly over all classes (arXiv 1512.00567).

    Returns:
      Losses [n] and correctness [n], float32.
    """
    labelled = tf.cast(labels >= 0, tf.float32)
    logits = tf.cast(logits, tf.float32)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.maximum(labels, 0), logits=logits)
    if label_smoothing:
        evenly = tf.reduce_logsumexp(logits, axis=1) - tf.reduce_mean(logits, axis=1)  # [n]
        loss = (1.0 - label_smoothing) * loss + label_smoothing * evenly
    correct = tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == labels, tf.float32)
    return loss * labelled, correct * labelled


def weight_decay_loss(variables: Iterable, weight_decay: float) -> tf.Tensor:
    """`weight_decay` times half the squared norm of every variable of rank 2 or more: no bias, no batch norm."""
    kernels = [tf.nn.l2_loss(tf.cast(v, tf.float32)) for v in variables if len(v.shape) > 1]
    return weight_decay * tf.add_n(kernels) if kernels else tf.constant(0.0)
