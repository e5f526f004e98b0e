"""The losses: NT-Xent with and without memory (Eq. 1), distillation (Eq. 2, 3), supervised. Pure functions of tensors.

Losses come back one value per example, in float32; `tasks.py` takes their mean over the global batch. Views stand in
block order: view 1 of every image, then view 2 of every image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import tensorflow as tf

MASKED = -1e9  # A candidate that does not count has this logit.


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
) -> Contrastive:
    """Eq. 1 for this replica's anchors against the global batch and, with memory, the queue of past keys.

    The positive of an anchor is its image's other view among the candidates; its own view is masked; the same view of
    other images counts as a negative like any other.

    Args:
      anchors: [2n, D] float32, the local views of n images.
      candidates: [2N, D] float32, the views (without memory) or momentum-encoder keys (with it) of the global batch.
      tau: temperature, > 0.
      first: the place of the first local image in the global batch.
      queue: [K, D] float32 past keys, or None.
      queue_valid: [K] bool, the slots that hold a key.

    Returns:
      `Contrastive`, one value per anchor.
    """
    n, total = tf.shape(anchors)[0] // 2, tf.shape(candidates)[0] // 2
    images = tf.range(n) + first  # [n]
    own = tf.concat([images, images + total], axis=0)  # [2n]
    positive = tf.concat([images + total, images], axis=0)  # [2n]
    logits = tf.matmul(anchors, candidates, transpose_b=True) / tau  # [2n, 2N]
    logits = tf.where(tf.one_hot(own, 2 * total, on_value=True, off_value=False), MASKED, logits)
    if queue is not None and queue_valid is not None:
        past = tf.matmul(anchors, queue, transpose_b=True) / tau  # [2n, K]
        logits = tf.concat([logits, tf.where(queue_valid[None], past, MASKED)], axis=1)  # [2n, 2N + K]
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=positive, logits=logits)  # [2n]
    accuracy = tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == positive, tf.float32)  # [2n]
    p, log_p = tf.nn.softmax(logits), tf.nn.log_softmax(logits)
    entropy = -tf.reduce_sum(tf.stop_gradient(p * log_p), axis=1)  # [2n]
    return Contrastive(loss, accuracy, entropy)


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
