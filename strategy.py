"""Where to run: one device, all devices of this host, many hosts, or a TPU, as a `tf.distribute` strategy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import tensorflow as tf
from tensorflow.python.client import device_lib
from tensorflow.python.eager import context
from tensorflow.python.framework import config as tf_config

import cluster as cluster_lib
from errors import UserError, reason

# What a process takes before it builds a network: Python, TensorFlow and its threads.
CPU_PROCESS_BYTES = 700_000_000
# A processor with one of these flags, as Linux calls them on x86 and on ARM, computes in a precision by itself.
INSTRUCTIONS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
# The limit of this process's container, in Linux's control groups of version 2 and of version 1.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
BYTES_OF_A_NUMBER = 8  # texts go from worker to worker as int64


def make_strategy(
    name: str = "auto", tpu_name: str = "", tpu_zone: str = "", gcp_project: str = "", master: str = "",
    cluster: str = "env", worker_timeout: float = 900.0,
) -> tf.distribute.Strategy:  # fmt: skip
    """The strategy by name. A process joins a cluster or starts a TPU once: asked again, it gets the same strategy.

    Args:
      name: `one_device`, `mirrored` (all GPUs, or else all logical CPUs of this host), `multi_worker` (the cluster of
        the environment variable TF_CONFIG), `tpu`, or `auto`: multi_worker where TF_CONFIG names a cluster, mirrored
        where there are several GPUs, otherwise one device.
      tpu_name, tpu_zone, gcp_project, master: which TPU, as for `TPUClusterResolver`.
      cluster: who knows the cluster, as for `cluster.tf_config`. With another one than `env`, `auto` is multi_worker.
      worker_timeout: how many seconds the workers wait for one of them.

    Raises:
      UserError: where the TPU or the cluster cannot be reached as described.
      KeyboardInterrupt: where a worker does not come in time.
    """
    if name == "tpu":
        return _tpu(tpu_name, tpu_zone, gcp_project, master)
    if waits_for_workers(name, cluster):
        return _cluster(cluster, worker_timeout)
    if name == "multi_worker":
        raise UserError(
            "--strategy=multi_worker: set TF_CONFIG to the cluster, or use --cluster=slurm, --cluster=kubernetes or "
            "--strategy=mirrored"
        )
    # Listing the devices starts TensorFlow on them, so it must come after the cluster is joined.
    gpus = tf.config.list_logical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def waits_for_workers(name: str, cluster: str = "env") -> bool:
    """Whether `make_strategy` waits until other workers have started. Python stands still then, for signals too.

    Raises:
      UserError: where TF_CONFIG is not empty and no JSON object.
    """
    named = cluster != "env" or _names_cluster(os.environ.get("TF_CONFIG", ""))
    return name in ("auto", "multi_worker") and named


@functools.cache
def _tpu(tpu_name: str, tpu_zone: str, gcp_project: str, master: str) -> tf.distribute.Strategy:
    """The strategy of a TPU, which is started."""
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            tpu=tpu_name or master or None, zone=tpu_zone or None, project=gcp_project or None
        )
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, tf.errors.OpError, OSError) as error:
        where = tpu_name or master or "this machine"
        raise UserError(f"--strategy=tpu: no TPU at {where} ({reason(error)}); name one by --tpu_name") from error
    return tf.distribute.TPUStrategy(resolver)


@functools.cache
def _cluster(kind: str, worker_timeout: float) -> tf.distribute.Strategy:
    """The strategy of the cluster that `kind` knows. This process joins it."""
    os.environ["TF_CONFIG"] = cluster_lib.tf_config(kind, worker_timeout)
    return cluster_lib.join(worker_timeout)


def make_deterministic() -> None:
    """Makes every operation of this process give the same bits for the same inputs, on the same device.

    Operations that have no such way to compute raise an error. Call it before the first network is built.
    """
    tf.config.experimental.enable_op_determinism()


@contextlib.contextmanager
def parallel_pipelines() -> Iterator[None]:
    """Iterators that are made within it stay parallel where operations are deterministic (`make_deterministic`).

    TensorFlow would make them compute one element after the other and nothing in advance, as soon as a function of the
    dataset reads a file or a variable, since such functions might depend on each other. Those of this program do not:
    each element follows from its position, and nothing writes what they read.
    """
    if not tf_config.is_op_determinism_enabled():
        yield
        return
    tf_config.disable_op_determinism()
    try:
        yield
    finally:
        tf_config.enable_op_determinism()


def device_in_words(strategy: tf.distribute.Strategy) -> str:
    """The kind of device that the replicas are. On two devices of one kind, the same sums have the same bits.

    On a CPU the number of threads counts too, because it decides how sums are cut into parts.
    """
    if is_tpu(strategy):
        return "TPU"
    gpus = tf.config.list_physical_devices("GPU")
    if tf.config.list_logical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    return f"{_processor()} with {cores()} cores"


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The name of this host's processor, or else its architecture."""
    return _of_processor("model name") or platform.machine()


def _of_processor(name: str) -> str:
    """What Linux says about the first core of this host under `name`; empty where it says nothing."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith(name)), "")
    except OSError:
        return ""


def lacks_instructions(strategy: tf.distribute.Strategy, precision: str) -> bool:
    """Whether the replicas are on a processor that is known to have no instructions for a precision of `Config`."""
    if precision == "float32" or has_accelerator(strategy):
        return False
    flags = set((_of_processor("flags") or _of_processor("Features")).split())
    return bool(flags) and not flags & INSTRUCTIONS[precision]


def is_tpu(strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas are the cores of a TPU."""
    return isinstance(strategy, tf.distribute.TPUStrategy)


def has_accelerator(strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas are GPUs or TPUs."""
    return is_tpu(strategy) or bool(tf.config.list_logical_devices("GPU"))


def _names_cluster(tf_config: str) -> bool:
    """Whether the content of TF_CONFIG names a cluster.

    Raises:
      UserError: where it is not empty and no JSON object.
    """
    if not tf_config.strip():
        return False
    try:
        return bool(json.loads(tf_config).get("cluster"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"TF_CONFIG is set and is no JSON object: repair or unset it ({reason(error)})") from error


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this worker is the one that writes files."""
    resolver = strategy.cluster_resolver
    if resolver is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    if "chief" in resolver.cluster_spec().jobs:
        return resolver.task_type == "chief"
    return resolver.task_type is None or (resolver.task_type == "worker" and resolver.task_id == 0)


def device_memory(strategy: tf.distribute.Strategy) -> int | None:
    """Bytes of memory that one replica of `strategy` may fill on its device; None where that is not known (a TPU).

    On a GPU it is what TensorFlow may allocate there, of several GPUs the least. On a CPU it is this host's memory, or
    its container's limit, without what the process itself takes, divided by the replicas in this process.
    """
    if is_tpu(strategy):
        return None
    if isinstance(strategy, tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy):
        names = strategy.extended.worker_devices
    else:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        names = [devices[0].name]
    specs = [tf.DeviceSpec.from_string(name) for name in names]
    if specs[0].device_type == "CPU":
        return (_host_memory() - CPU_PROCESS_BYTES) // len(specs)
    local = device_lib.list_local_devices(context.context().config)
    limits = {device.name: device.memory_limit for device in local}
    known = [limits.get(f"/device:{spec.device_type}:{spec.device_index}") for spec in specs]
    return min((limit for limit in known if limit), default=None)


def _host_memory() -> int:
    """Bytes of memory that this host has, or that its container may use if that is less."""
    available = psutil.virtual_memory().total
    for path in CONTAINER_LIMITS:
        try:
            with open(path) as file:
                limit = file.read().strip()
        except OSError:
            continue
        if limit.isdecimal():  # otherwise it is `max`: no limit
            available = min(available, int(limit))
    return available


def check_batch(flag: str, batch: int, replicas: int) -> None:
    """Raises UserError unless the batch divides evenly among the replicas."""
    if batch % replicas:
        raise UserError(f"--{flag}={batch}: must be a multiple of the {replicas} replicas")


def check_chunks(chunks: int, batch: int, replicas: int) -> None:
    """Raises UserError unless each replica's share of the batch divides evenly into the chunks of grad_accumulation."""
    share = batch // replicas
    if share % chunks:
        raise UserError(
            f"--grad_accumulation={chunks}: must divide each replica's share of the batch, {share} images "
            f"(--train_batch_size={batch} / {replicas})"
        )


def check_shards(memory_size: int, replicas: int) -> None:
    """Raises UserError unless the keys of the queue divide evenly among the replicas, for shard_queue."""
    if memory_size % replicas:
        raise UserError(f"--shard_queue: --memory_size={memory_size} must be a multiple of the {replicas} replicas")


def check_compiled(strategy: tf.distribute.Strategy) -> None:
    """Raises UserError unless XLA can compile the step of all replicas at once, for jit_compile."""
    replicas = strategy.num_replicas_in_sync
    if replicas > 1 and not is_tpu(strategy):
        raise UserError(f"--jit_compile: compiles the step of one device, and here are {replicas}: leave it out")


@contextlib.contextmanager
def together(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """For work that each worker does by itself: where it fails for one of them, all of them stop.

    Raises:
      UserError: this worker's own mistake, or, where it made none, that another one has stopped.
    """
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = error
    failed = _of_every_worker(strategy, [int(mistake is not None)])
    if mistake:
        raise mistake
    for worker in np.flatnonzero(failed):
        raise UserError(f"worker {worker} has stopped: see its message")


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Waits until every worker has come here."""
    _of_every_worker(strategy, [0])


def as_chief_says(strategy: tf.distribute.Strategy, numbers: Sequence[int]) -> list[int]:
    """What the chief gave as `numbers`. Waits until every worker has come here."""
    return _of_every_worker(strategy, numbers)[0].tolist()  # The chief is the first worker.


def largest(strategy: tf.distribute.Strategy, numbers: Sequence[int]) -> list[int]:
    """The largest that any worker gave, for each of `numbers`. Waits until every worker has come here."""
    return _of_every_worker(strategy, numbers).max(axis=0).tolist()


def has_several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas are in several processes, which must take every step together."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def check_agreement(strategy: tf.distribute.Strategy, what: Mapping[str, Any], advice: str) -> None:
    """Makes sure that all workers found the same. Waits until every worker has come here.

    Args:
      what: what this worker found, by name: numbers, texts and truth values.
      advice: what to do where workers differ.

    Raises:
      UserError: on every worker alike, naming the first thing in which they differ, and what each of them found.
    """
    found = [json.loads(text) for text in _texts_of_every_worker(strategy, json.dumps(what))]
    for name in what:
        values = [of_worker.get(name) for of_worker in found]
        if any(value != values[0] for value in values):
            each = ", ".join(f"worker {worker} {value}" for worker, value in enumerate(values))
            raise UserError(f"the workers differ in {name} ({each}): {advice}")


def _texts_of_every_worker(strategy: tf.distribute.Strategy, text: str) -> list[str]:
    """The text that each worker gave. Waits until every worker has come here."""
    mine = text.encode()
    words = -(-len(mine) // BYTES_OF_A_NUMBER)
    (most,) = largest(strategy, [words])
    numbers = np.frombuffer(mine.ljust(most * BYTES_OF_A_NUMBER), np.int64)  # filled up with spaces
    return [row.tobytes().decode().rstrip() for row in _of_every_worker(strategy, numbers.tolist())]


def _of_every_worker(strategy: tf.distribute.Strategy, numbers: Sequence[int]) -> np.ndarray:
    """What each worker gave as `numbers`, as [workers, len(numbers)] int64. Waits until every worker has come here."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return np.array([numbers], np.int64)
    mine = tf.constant([numbers], tf.int64)  # [1, len(numbers)]
    cluster = strategy.cluster_resolver.cluster_spec()
    workers = max(1, sum(cluster.num_tasks(job) for job in cluster.jobs))
    replicas_per_worker = strategy.num_replicas_in_sync // workers
    return _gatherer(strategy)(mine).numpy()[::replicas_per_worker]


@functools.cache
def _gatherer(strategy: tf.distribute.Strategy) -> Callable[[tf.Tensor], tf.Tensor]:
    """A compiled function from what each worker gives, [1, n], to what all of them gave, [replicas, n]."""

    @tf.function(autograph=False)
    def gathered(mine: tf.Tensor) -> tf.Tensor:
        return strategy.gather(strategy.run(tf.identity, args=(mine,)), axis=0)  # [replicas, n]

    return gathered
