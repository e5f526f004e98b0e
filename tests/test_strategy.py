"""Where a run goes: the memory of the devices, and operations that are deterministic."""

import time
from types import SimpleNamespace

import pytest
import tensorflow as tf
from tensorflow.python.framework import config as tf_config

import data
import strategy

GB = 10**9


@pytest.fixture
def host(monkeypatch, tmp_path):
    """`host(total, limit)`: a host with so much memory, in a container with this text as its limit."""

    def make(total, limit=None):
        monkeypatch.setattr(strategy.psutil, "virtual_memory", lambda: SimpleNamespace(total=total))
        path = tmp_path / "memory.max"
        if limit is not None:
            path.write_text(f"{limit}\n")
        monkeypatch.setattr(strategy, "CONTAINER_LIMITS", (str(tmp_path / "nowhere"), str(path)))

    return make


@pytest.mark.parametrize(
    ("limit", "memory"), [(None, 24 * GB), ("max", 24 * GB), (4 * GB, 4 * GB), (2**63 - 4096, 24 * GB)]
)
def test_a_cpu_has_the_hosts_memory_or_its_containers(host, limit, memory):
    host(24 * GB, limit)
    assert strategy.device_memory(tf.distribute.get_strategy()) == memory - strategy.CPU_PROCESS_BYTES


def test_replicas_of_a_host_share_its_memory(host, mirrored):
    host(24 * GB)
    assert strategy.device_memory(mirrored(4)) == (24 * GB - strategy.CPU_PROCESS_BYTES) // 4


def test_this_hosts_memory_is_known():
    assert GB < strategy.device_memory(tf.distribute.get_strategy()) < 10**14


def gpus(monkeypatch, *limits):
    """A host with GPUs whose allocators have these limits."""
    named = [SimpleNamespace(name=f"/device:GPU:{i}") for i in range(len(limits))]
    local = [SimpleNamespace(name="/device:CPU:0", memory_limit=2**28)]
    local += [SimpleNamespace(name=f"/device:GPU:{i}", memory_limit=limit) for i, limit in enumerate(limits)]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: named if kind == "GPU" else [])
    monkeypatch.setattr(strategy.device_lib, "list_local_devices", lambda config: local)


def test_a_gpu_has_what_its_allocator_may_take(monkeypatch):
    gpus(monkeypatch, 80 * GB, 40 * GB)
    assert strategy.device_memory(tf.distribute.get_strategy()) == 80 * GB
    devices = [f"/job:localhost/replica:0/task:0/device:GPU:{i}" for i in range(2)]
    both = object.__new__(tf.distribute.MirroredStrategy)
    monkeypatch.setattr(tf.distribute.MirroredStrategy, "extended", SimpleNamespace(worker_devices=devices))
    assert strategy.device_memory(both) == 40 * GB


def test_the_memory_of_a_tpu_is_not_known():
    assert strategy.device_memory(object.__new__(tf.distribute.TPUStrategy)) is None


@pytest.mark.parametrize("replicas", [1, 2])
def test_in_one_process_the_chief_says_what_it_knows(mirrored, replicas):
    assert strategy.as_chief_says(mirrored(replicas), [3, 4]) == [3, 4]


def most_at_once(iterate):
    """How many elements of a dataset are computed at the same time, at most."""
    read, running, most = tf.Variable(1.0), [0], [0]

    def slow(value):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        running[0] -= 1
        return value

    def example(number):
        return tf.numpy_function(slow, [tf.cast(number, tf.float32) + read], tf.float32)

    made = iterate(tf.data.Dataset.range(12).map(example, num_parallel_calls=4, deterministic=True).prefetch(2))
    assert [float(value) for value in made] == [float(number + 1) for number in range(12)]
    return most[0]


def test_data_are_made_in_parallel_where_operations_are_deterministic():
    strategy.make_deterministic()
    try:
        assert most_at_once(iter) == 1  # TensorFlow's own way
        assert most_at_once(data.batches) > 1
        assert tf_config.is_op_determinism_enabled()
    finally:
        tf_config.disable_op_determinism()
