"""Where to run: one device, all devices of this host, many hosts, or a TPU, as a `tf.distribute` strategy."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import psutil
import tensorflow as tf
from tensorflow.python.client import device_lib
from tensorflow.python.eager import context

from errors import UserError

CPU_PROCESS_BYTES = 700_000_000  # of a process before it builds a network: Python, TensorFlow and its threads
# The limit of this process's container, in Linux's control groups of version 2 and of version 1.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def make_strategy(
    name: str = "auto", tpu_name: str = "", tpu_zone: str = "", gcp_project: str = "", master: str = ""
) -> tf.distribute.Strategy:
    """The strategy by name.

    Args:
      name: `one_device`, `mirrored` (all GPUs, or else all logical CPUs of this host), `multi_worker` (the cluster of
        the environment variable TF_CONFIG), `tpu`, or `auto`: multi_worker where TF_CONFIG is set, mirrored where
        there are several GPUs, otherwise one device.
      tpu_name, tpu_zone, gcp_project, master: which TPU, as for `TPUClusterResolver`.

    Raises:
      UserError: where the TPU or the cluster cannot be reached as described.
    """
    if name == "auto" and "TF_CONFIG" in os.environ:
        name = "multi_worker"
    if name == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
                tpu=tpu_name or master or None, zone=tpu_zone or None, project=gcp_project or None
            )
            tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
        except (ValueError, tf.errors.OpError, OSError) as error:
            where = tpu_name or master or "this machine"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--strategy=tpu: no TPU at {where} ({reason}); name one by --tpu_name") from error
        return tf.distribute.TPUStrategy(resolver)
    if name == "multi_worker":
        if "TF_CONFIG" not in os.environ:
            raise UserError("--strategy=multi_worker: set TF_CONFIG to the cluster, or use --strategy=mirrored")
        return tf.distribute.MultiWorkerMirroredStrategy()
    # Listing the devices starts TensorFlow on them, so it must come after the cluster is joined.
    gpus = tf.config.list_logical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes, of all the workers."""
    resolver = strategy.cluster_resolver
    if resolver is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    return resolver.task_type in (None, "chief") or (
        resolver.task_type == "worker" and resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs
    )


def device_memory(strategy: tf.distribute.Strategy) -> int | None:
    """Bytes of memory that one replica of `strategy` may fill on its device; None where that is not known (a TPU).

    On a GPU it is what TensorFlow may allocate there, of several GPUs the least. On a CPU it is this host's memory, or
    its container's limit, without what the process itself takes, divided by the replicas in this process.
    """
    if isinstance(strategy, tf.distribute.TPUStrategy):
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


def check_agreement(strategy: tf.distribute.Strategy, what: Mapping[str, int], advice: str) -> None:
    """Waits until every worker has come here, and makes sure that all of them found the same.

    Args:
      what: what this worker found: numbers below 2**63 by name.
      advice: what to do where workers differ.

    Raises:
      UserError: on every worker alike, naming the first thing in which they differ.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    mine = tf.constant([list(what.values())], tf.int64)  # [1, things]

    @tf.function(autograph=False)
    def gathered() -> tf.Tensor:
        return strategy.gather(strategy.run(lambda: tf.identity(mine)), axis=0)  # [replicas, things]

    every = gathered().numpy()
    workers = strategy.cluster_resolver.cluster_spec()
    per_worker = every[:: len(every) // sum(workers.num_tasks(job) for job in workers.jobs)]  # [workers, things]
    for name, found in zip(what, np.transpose(per_worker), strict=True):
        if len(set(found.tolist())) > 1:
            said = ", ".join(f"worker {i} {value}" for i, value in enumerate(found.tolist()))
            raise UserError(f"the workers differ in {name} ({said}): {advice}")
