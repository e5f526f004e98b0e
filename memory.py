"""The memory: a first-in-first-out queue of momentum-encoder keys (section 2, after arXiv 1911.05722)."""

from __future__ import annotations

import tensorflow as tf


class Queue(tf.Module):
    """The last `size` keys, the same on every replica. Make it under the strategy's scope.

    Attributes:
      keys: [size, dim] float32; slot i holds a key once more than i have been pushed.
      count: int64 scalar, keys pushed so far.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__(name="queue")
        self.size = size
        # Every replica pushes the same keys, so nothing is aggregated: a TPU cannot scatter into a variable that is.
        self.keys = tf.Variable(tf.zeros([size, dim]), trainable=False, name="keys")
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False, name="count")

    @property
    def valid(self) -> tf.Tensor:
        """[size] bool, the slots that hold a key."""
        return tf.range(self.size, dtype=tf.int64) < self.count

    def push(self, keys: tf.Tensor) -> None:
        """Overwrites the oldest slots with `keys` [M, dim] of the global batch; of more than `size`, the last stay."""
        pushed = tf.shape(keys, out_type=tf.int64)[0]
        kept = keys[-self.size :]  # [min(M, size), dim]
        kept_count = tf.shape(kept, out_type=tf.int64)[0]
        slots = (self.count + (pushed - kept_count) + tf.range(kept_count)) % self.size  # [min(M, size)]
        self.keys.scatter_update(tf.IndexedSlices(kept, slots))
        self.count.assign_add(pushed)
