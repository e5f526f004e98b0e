"""The memory: a first-in-first-out queue of momentum-encoder keys (section 2, after arXiv 1911.05722)."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

VALUE = "VARIABLE_VALUE"  # The name of a variable's value in a checkpoint.


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
    def here(self) -> tf.Variable:
        """The keys on this replica, [size, dim]."""
        return self.keys

    @property
    def valid(self) -> tf.Tensor:
        """The slots on this replica that hold a key, [size] bool."""
        return tf.range(self.size, dtype=tf.int64) < self.count

    def push(self, keys: tf.Tensor) -> None:
        """Overwrites the oldest slots with `keys` [M, dim] of the global batch; of more than `size`, the last stay."""
        pushed = tf.shape(keys, out_type=tf.int64)[0]
        kept = keys[-self.size :]  # [min(M, size), dim]
        kept_count = tf.shape(kept, out_type=tf.int64)[0]
        slots = (self.count + (pushed - kept_count) + tf.range(kept_count)) % self.size  # [min(M, size)]
        self.keys.scatter_update(tf.IndexedSlices(kept, slots))
        self.count.assign_add(pushed)


class ShardedQueue:
    """A queue whose slots are split over the replicas: slot i is on replica i modulo their number R.

    It is made under the strategy's scope. R divides `size`, and the keys that are pushed at a time.

    Attributes:
      keys: of all replicas, as a checkpoint has those of a `Queue`.
      count: int64 scalar, keys pushed so far.
    """

    def __init__(self, size: int, dim: int) -> None:
        self.size = size
        self.keys = ShardedKeys(size, dim)
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False, name="count")

    @property
    def here(self) -> tf.Variable:
        """The keys on this replica, [size / R, dim]."""
        return self.keys.shard

    @property
    def valid(self) -> tf.Tensor:
        """The slots on this replica that hold a key, [size / R] bool."""
        replica, replicas = _place()
        return tf.range(self.here.shape[0], dtype=tf.int64) * replicas + replica < self.count

    def push(self, keys: tf.Tensor) -> None:
        """As `Queue.push`, with the same `keys` on every replica."""
        replica, replicas = _place()
        pushed = tf.shape(keys, out_type=tf.int64)[0]
        kept = keys[-self.size :]  # [min(M, size), dim]
        kept_count = tf.shape(kept, out_type=tf.int64)[0]
        first = self.count + (pushed - kept_count)  # the slot of the first, modulo size
        mine = (replica - first) % replicas + replicas * tf.range(kept_count // replicas)  # [min(M, size) / R]
        places = (first + mine) % self.size // replicas
        self.here.scatter_update(tf.IndexedSlices(tf.gather(kept, mine), places))
        self.count.assign_add(pushed)


class ShardedKeys(tf.__internal__.tracking.Trackable):
    """Keys [size, dim] float32 of which each replica holds a part. In a checkpoint they are one variable.

    Attributes:
      shard: the part, [size / R, dim]; what the replicas hold of it differs.
    """

    def __init__(self, size: int, dim: int) -> None:
        self._strategy = tf.distribute.get_strategy()
        self.shape, self.dtype = tf.TensorShape([size, dim]), tf.float32
        self.shard = tf.Variable(tf.zeros([size // self._strategy.num_replicas_in_sync, dim]), trainable=False)

    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        """All keys, in the order of their slots, for the cross-replica context."""
        parts = self._strategy.gather(self._strategy.run(lambda: tf.identity(self.shard)), axis=0)  # [size, dim]
        by_replica = tf.reshape(parts, [-1, *self.shard.shape])  # [R, size / R, dim]
        return tf.reshape(tf.transpose(by_replica, [1, 0, 2]), self.shape)

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {VALUE: tf.convert_to_tensor(self)}

    def _restore_from_tensors(self, restored: Mapping[str, tf.Tensor]) -> None:
        self._strategy.run(self._take, (restored[VALUE],))

    def _take(self, keys: tf.Tensor) -> None:
        """Makes this replica hold its part of `keys` [size, dim]."""
        replica, _ = _place()
        by_place = tf.reshape(keys, [self.shard.shape[0], -1, self.shape[1]])  # [size / R, R, dim]
        self.shard.assign(tf.gather(by_place, replica, axis=1))


def _place() -> tuple[tf.Tensor, int]:
    """The number of this replica, an int64 scalar, and how many there are."""
    replicas = tf.distribute.get_replica_context()
    return tf.cast(replicas.replica_id_in_sync_group, tf.int64), replicas.num_replicas_in_sync
