"""Where to run: one device, all devices of this host, many hosts, or a TPU, as a `tf.distribute` strategy."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from errors import UserError


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


def check_batch(flag: str, batch: int, strategy: tf.distribute.Strategy) -> None:
    """Raises UserError unless the batch divides evenly among the replicas."""
    replicas = strategy.num_replicas_in_sync
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
