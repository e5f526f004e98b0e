"""The processes of a run on many hosts: who they are (TF_CONFIG, SLURM, Kubernetes), and how this one joins them."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import multi_worker_util
from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver as slurm
from tensorflow.python.eager import context

from errors import UserError, reason

# A worker that gives no sign of life for so long is lost. TensorFlow would wait 10 seconds, which a host that swaps can
# need. A worker's connections break before that where its process has ended.
HEARTBEAT_SECONDS = 30.0
# The workers of a SLURM job listen on ports from here on, below those that Linux gives to clients.
FIRST_PORT, PORTS = 12_000, 20_000
KUBERNETES_PORT = 8470  # as TensorFlow's KubernetesClusterResolver has it
NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
JOB_LABEL = "batch.kubernetes.io/job-name"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
POLL_SECONDS = 2.0
_AGAIN = "give the same command to all workers again"


def tf_config(kind: str, timeout: float) -> str:
    """The content of TF_CONFIG: which processes the cluster has, and which of them this one is.

    Args:
      kind: who knows it: `env`, the environment variable itself; `slurm`, the variables that srun sets; `kubernetes`,
        the API of the cluster in which this process's pod is one of an Indexed Job.
      timeout: how many seconds pods may take to come.

    Returns:
      JSON; what the variable has, which may be nothing, with `env`.

    Raises:
      UserError: where the cluster is not known.
      KeyboardInterrupt: where the pods do not come in time, naming those that are missing.
    """
    if kind == "slurm":
        return of_slurm(os.environ)
    if kind == "kubernetes":
        return of_kubernetes(kubernetes_client(), timeout)
    return os.environ.get("TF_CONFIG", "")


def of_slurm(environment: Mapping[str, str]) -> str:
    """TF_CONFIG of a process that srun has started, as JSON.

    TensorFlow's SlurmClusterResolver reads the same variables. It numbers the hosts in the order of their names, where
    n10 comes before n9, while SLURM counts; and it fails where there are no GPUs. So its readers are used without it.

    Args:
      environment: with SLURM_JOB_ID, SLURM_PROCID, SLURM_STEP_NODELIST and SLURM_STEP_TASKS_PER_NODE.

    Raises:
      UserError: where they are not there, or contradict each other.

    Example:
      two tasks on n9 and n10, job 7: {"cluster": {"worker": ["n9:12007", "n10:12007"]}, "task": ...}
    """
    try:
        job, rank = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_PROCID"])
        hosts = slurm.expand_hostlist(environment["SLURM_STEP_NODELIST"])
        tasks = slurm.expand_tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        port = FIRST_PORT + job % PORTS
        workers = [f"{host}:{port + i}" for host, count in zip(hosts, tasks, strict=True) for i in range(count)]
        workers[rank]  # It raises IndexError where there is none.
    except KeyError as missing:
        raise UserError(f"--cluster=slurm: {missing.args[0]} is not set: start the program by srun") from missing
    except (ValueError, IndexError) as error:
        raise UserError(f"--cluster=slurm: the variables of srun contradict each other: {reason(error)}") from error
    return _as_json(workers, rank)


def kubernetes_client() -> Any:
    """The package `kubernetes`, which has read this pod's credentials.

    Raises:
      UserError: where it is not installed, or this process is in no pod.
    """
    try:
        import kubernetes
    except ImportError as error:
        raise UserError("--cluster=kubernetes needs the package: pip install kubernetes") from error
    try:
        kubernetes.config.load_incluster_config()
    except kubernetes.config.ConfigException as error:
        raise UserError(f"--cluster=kubernetes: this process is in no pod: {reason(error)}") from error
    return kubernetes


def of_kubernetes(kubernetes: Any, timeout: float) -> str:
    """TF_CONFIG of a process in a pod of an Indexed Job, as JSON. Waits until every pod of the Job has an address.

    TensorFlow's KubernetesClusterResolver is not used: it does not know which of the pods it is in, takes the addresses
    of their hosts, puts pod 10 before pod 2, and gives up where a pod has ended, as it has when a Job goes on.

    Args:
      kubernetes: the package, or a stand-in for it.
      timeout: how many seconds the pods may take to come.

    Raises:
      UserError: where the variable POD_NAME is not set, the pod belongs to no Indexed Job, or the API refuses.
      KeyboardInterrupt: where pods do not come in time, naming them.
    """
    name = os.environ.get("POD_NAME", "")
    if not name:
        raise UserError("--cluster=kubernetes needs POD_NAME, the name of the pod: see docs/scaling.md")
    pods, jobs = kubernetes.client.CoreV1Api(), kubernetes.client.BatchV1Api()
    try:
        with open(NAMESPACE_FILE) as file:
            namespace = file.read().strip()
        own = pods.read_namespaced_pod(name, namespace).metadata
        job = (own.labels or {}).get(JOB_LABEL)
        index = (own.annotations or {}).get(INDEX_ANNOTATION)
        if job is None or index is None:
            raise UserError(f"--cluster=kubernetes: pod {name} belongs to no Job with completionMode: Indexed")
        count = jobs.read_namespaced_job(job, namespace).spec.completions
        ends = time.monotonic() + timeout
        while True:
            found = pods.list_namespaced_pod(namespace, label_selector=f"{JOB_LABEL}={job}").items
            alive = [pod for pod in found if pod.status.phase in ("Pending", "Running") and pod.status.pod_ip]
            addresses = {int(pod.metadata.annotations[INDEX_ANNOTATION]): pod.status.pod_ip for pod in alive}
            missing = [f"worker {i}" for i in range(count) if i not in addresses]
            if not missing:
                return _as_json([f"{addresses[i]}:{KUBERNETES_PORT}" for i in range(count)], int(index))
            if time.monotonic() > ends:
                raise _did_not_come(missing, timeout)
            time.sleep(POLL_SECONDS)
    except (kubernetes.client.ApiException, OSError) as error:
        raise UserError(f"--cluster=kubernetes: the API does not say who the workers are: {reason(error)}") from error


def _as_json(workers: list[str], index: int) -> str:
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})


def join(timeout: float) -> tf.distribute.MultiWorkerMirroredStrategy:
    """Joins the cluster of the environment variable TF_CONFIG, and waits until all of its workers have.

    TensorFlow's coordination service gathers them and listens for their signs of life. From then on each operation of
    all workers together fails where a worker is gone, gives no sign of life for `HEARTBEAT_SECONDS`, or takes no part
    for `timeout` seconds.

    Raises:
      UserError: where TF_CONFIG describes no cluster, or its port is taken.
      KeyboardInterrupt: where a worker does not come in time, naming it where that is known, or is lost meanwhile.
    """
    try:
        spec = multi_worker_util.normalize_cluster_spec(
            tf.distribute.cluster_resolver.TFConfigClusterResolver().cluster_spec()
        )
        _configure_coordination(spec, timeout)
        options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=timeout)
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    except tf.errors.DeadlineExceededError as error:
        missing = [_in_words(spec, job, int(task)) for job, task in _timed_out(error.message)]
        raise _did_not_come(missing or [_whom_the_leader_misses(spec)], timeout) from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
        why = f"because another worker was lost while all of them joined ({reason(error)[:200]})"
        raise KeyboardInterrupt(f"{why}: {_AGAIN}") from error
    except (ValueError, KeyError, TypeError, RuntimeError, tf.errors.OpError) as error:
        raise UserError(f"TF_CONFIG names no cluster that can be joined: {reason(error)}") from error


def _configure_coordination(spec: tf.train.ClusterSpec, timeout: float) -> None:
    """Says how long the coordination service waits. Before the strategy, which takes what it finds configured."""
    # The type of the messages is imported where the strategy imports it from; its place differs between versions.
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2

    jobs = [
        coordination_config_pb2.CoordinatedJob(name=job, num_tasks=spec.num_tasks(job))
        for job in ("chief", "worker")
        if job in spec.jobs
    ]
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=multi_worker_util.coordination_leader(spec),
        cluster_register_timeout_in_ms=round(1000 * timeout),
        heartbeat_timeout_in_ms=round(1000 * min(HEARTBEAT_SECONDS, timeout)),
        coordinated_jobs=jobs,
    )
    # Without it the worker that gathers the others would wait for them without an end.
    context.context().coordination_service.cluster_register_with_barrier = True


def _timed_out(message: str) -> list[tuple[str, str]]:
    """The tasks that the coordination service says have not come, as (job, number)."""
    names = message.partition("Some timed out task names:")[2].partition("Additional GRPC")[0]
    return re.findall(r"/job:(\w+)/replica:\d+/task:(\d+)", names)


def _whom_the_leader_misses(spec: tf.train.ClusterSpec) -> str:
    """Who is missing, for a worker that was not told: the one that gathers the others, or one that this one knows."""
    job = "chief" if "chief" in spec.jobs else "worker"
    host, _, port = spec.task_address(job, 0).rpartition(":")
    leader = _in_words(spec, job, 0)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError:
        return leader
    return f"another worker, as the message of {leader} says,"


def _in_words(spec: tf.train.ClusterSpec, job: str, task: int) -> str:
    return f"{job} {task} ({spec.task_address(job, task)})"


def _did_not_come(missing: list[str], timeout: float) -> KeyboardInterrupt:
    return KeyboardInterrupt(
        f"because {', '.join(missing)} did not come within --worker_timeout={timeout:g} seconds: {_AGAIN}"
    )
