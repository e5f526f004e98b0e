"""The memory is a first-in-first-out queue, whatever the batch size, and the same on every replica."""

import collections

import numpy as np
import pytest
import tensorflow as tf
from helpers import per_replica, run, split

import memory

SIZE, DIM = 5, 2


def numbered(first, count):
    """[count, DIM] keys that say when they were pushed."""
    return np.repeat(np.arange(first, first + count, dtype=np.float32)[:, None], DIM, axis=1) + 1


def held(queue):
    """The keys that the queue says it holds, oldest first."""
    keys, valid = queue.keys.numpy(), queue.valid.numpy()
    return sorted(keys[valid].tolist())


def push_all(queue, sizes):
    """Pushes batches of these sizes, beside a deque; compares after each. Returns how many keys were pushed."""
    expected = collections.deque(maxlen=SIZE)
    pushed = 0
    for size in sizes:
        batch = numbered(pushed, size)
        queue.push(batch)
        expected.extend(batch.tolist())
        pushed += size
        assert held(queue) == list(expected), f"after {pushed}"
        assert int(queue.count) == pushed
        np.testing.assert_array_equal(queue.valid, np.arange(SIZE) < pushed)
    return pushed


@pytest.mark.parametrize("sizes", [[2] * 7, [1] * 12, [3] * 5, [4, 4, 4], [5, 5, 5], [7, 7, 7], [13, 2, 11]])
def test_first_in_first_out(sizes):
    queue = memory.Queue(SIZE, DIM)
    assert held(queue) == [] and int(queue.count) == 0
    push_all(queue, sizes)


def test_first_in_first_out_of_many_random_batches():
    push_all(memory.Queue(SIZE, DIM), np.random.default_rng(0).integers(1, 14, 40).tolist())


def test_a_key_goes_to_the_oldest_slot():
    queue = memory.Queue(SIZE, DIM)
    for first, count in ((0, 3), (3, 3), (6, 12)):
        queue.push(numbered(first, count))
        if first == 3:
            np.testing.assert_array_equal(queue.keys[:, 0], [6, 2, 3, 4, 5])
    # Keys 14 to 18 are the last of 18, each in the slot its place in the whole sequence gives it.
    np.testing.assert_array_equal(queue.keys[:, 0], [16, 17, 18, 14, 15])


def test_only_its_two_variables_are_state():
    queue = memory.Queue(SIZE, DIM)
    assert sorted(variable.name for variable in queue.variables) == ["count:0", "keys:0"]
    assert not queue.trainable_variables


@pytest.mark.parametrize("replicas", [2, 4])
def test_every_replica_holds_the_same(mirrored, replicas):
    strategy = mirrored(replicas)
    alone = memory.Queue(SIZE, DIM)
    with strategy.scope():
        queue = memory.Queue(SIZE, DIM)
    for first, count in ((0, 3), (3, 4), (7, 6)):
        batch = numbered(first, count)
        everywhere = split(strategy, np.concatenate([batch] * replicas))  # as gathered: the same keys on each
        valid = run(strategy, lambda keys: (queue.push(keys), queue.valid)[1], everywhere)
        alone.push(batch)
        for keys in per_replica(strategy, queue.keys):
            np.testing.assert_array_equal(keys, alone.keys)
        assert [int(n) for n in per_replica(strategy, queue.count)] == [first + count] * replicas
        for seen in per_replica(strategy, valid):
            np.testing.assert_array_equal(seen, alone.valid)


def test_a_queue_is_like_keras_variables_and_can_be_scattered_into_on_a_tpu():
    # TensorFlow refuses to scatter into an aggregated variable in a TPU's context.
    queue = memory.Queue(SIZE, DIM)
    assert {variable.aggregation for variable in queue.variables} == {tf.VariableAggregation.NONE}


@pytest.mark.parametrize("size", [3, 5, 7])
def test_pushing_compiles_with_xla(size):
    plain, compiled = memory.Queue(SIZE, DIM), memory.Queue(SIZE, DIM)
    push = tf.function(compiled.push, jit_compile=True)
    for first in range(0, 4 * size, size):
        plain.push(tf.constant(numbered(first, size)))
        push(tf.constant(numbered(first, size)))
        np.testing.assert_array_equal(compiled.keys, plain.keys)
        assert int(compiled.count) == int(plain.count)


def sharded(strategy):
    with strategy.scope():
        return memory.ShardedQueue(12, DIM)


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_shards_hold_what_the_queue_holds(mirrored, replicas):
    """A batch on each replica is the same; there are fewer keys than slots, as many, and more."""
    strategy, alone = mirrored(replicas), memory.Queue(12, DIM)
    queue = sharded(strategy)
    pushed = 0
    for size in (4, 4, 8, 12, 20, 4):
        batch = numbered(pushed, size)
        everywhere = split(strategy, np.concatenate([batch] * replicas))
        valid = run(strategy, lambda keys: (queue.push(keys), queue.valid)[1], everywhere)
        alone.push(batch)
        pushed += size
        np.testing.assert_array_equal(tf.convert_to_tensor(queue.keys), alone.keys)
        for replica, (part, seen) in enumerate(
            zip(per_replica(strategy, queue.here), per_replica(strategy, valid), strict=True)
        ):
            np.testing.assert_array_equal(part, alone.keys[replica::replicas])
            np.testing.assert_array_equal(seen, alone.valid[replica::replicas])


def test_shards_go_through_a_checkpoint_into_any_number_of_replicas(mirrored, tmp_path):
    whole = memory.Queue(12, DIM)
    whole.push(numbered(0, 20))
    prefix = tf.train.Checkpoint(queue=whole).write(str(tmp_path / "whole"))
    for replicas in (2, 4):
        queue = sharded(mirrored(replicas))
        live = tf.train.Checkpoint(queue={"keys": queue.keys, "count": queue.count})
        live.read(prefix).assert_existing_objects_matched().assert_consumed()
        for replica, part in enumerate(per_replica(mirrored(replicas), queue.here)):
            np.testing.assert_array_equal(part, whole.keys[replica::replicas])
        prefix = live.write(str(tmp_path / f"of_{replicas}"))
    back = memory.Queue(12, DIM)
    tf.train.Checkpoint(queue=back).read(prefix).assert_existing_objects_matched().assert_consumed()
    np.testing.assert_array_equal(back.keys, whole.keys)
    assert int(back.count) == 20
