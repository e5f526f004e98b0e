"""Who the workers of a run are, by SLURM's variables and by Kubernetes' API, and how they find that they differ."""

import json
from types import SimpleNamespace

import pytest
import tensorflow as tf

import cluster
import strategy as strategy_lib
from config import Config
from errors import UserError

SRUN = {
    "SLURM_JOB_ID": "20007",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "n[9-10],big1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2),2",
}


def test_a_task_of_srun_knows_all_of_them_in_the_order_of_their_ranks():
    found = json.loads(cluster.of_slurm(SRUN))
    assert found["cluster"] == {"worker": ["n9:12007", "n10:12007", "big1:12007", "big1:12008"]}
    assert found["task"] == {"type": "worker", "index": 3}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set: start the program by srun"),
        ({"SLURM_PROCID": "4"}, "contradict each other"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2"}, "contradict each other"),
        ({"SLURM_STEP_NODELIST": "n[9-"}, "contradict each other"),
    ],
)
def test_srun_without_its_variables_is_one_line(changes, says):
    environment = {name: value for name, value in {**SRUN, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=says):
        cluster.of_slurm(environment)


class Kubernetes:
    """A stand-in for the package: a Job of three pods, whose last one gets its address when it is asked for again."""

    class ApiException(Exception):
        pass

    def __init__(self, comes=True, labels=None):
        self.asked, self.comes = 0, comes
        self.labels = {cluster.JOB_LABEL: "train"} if labels is None else labels
        self.client = SimpleNamespace(CoreV1Api=lambda: self, BatchV1Api=lambda: self, ApiException=self.ApiException)

    def pod(self, index, ip, phase="Running"):
        metadata = SimpleNamespace(labels=self.labels, annotations={cluster.INDEX_ANNOTATION: str(index)})
        return SimpleNamespace(metadata=metadata, status=SimpleNamespace(phase=phase, pod_ip=ip))

    def read_namespaced_pod(self, name, namespace):
        assert (name, namespace) == ("train-1-abcde", "lab")
        return self.pod(1, None)

    def read_namespaced_job(self, name, namespace):
        assert (name, namespace) == ("train", "lab")
        return SimpleNamespace(spec=SimpleNamespace(completions=3))

    def list_namespaced_pod(self, namespace, label_selector):
        assert (namespace, label_selector) == ("lab", f"{cluster.JOB_LABEL}=train")
        self.asked += 1
        last = self.pod(2, "10.0.0.3" if self.comes and self.asked > 1 else None, "Pending")
        return SimpleNamespace(
            items=[self.pod(1, "10.0.0.2"), self.pod(0, "10.0.0.9", "Failed"), self.pod(0, "10.0.0.1"), last]
        )


@pytest.fixture
def in_a_pod(monkeypatch, tmp_path):
    (tmp_path / "namespace").write_text("lab\n")
    monkeypatch.setattr(cluster, "NAMESPACE_FILE", str(tmp_path / "namespace"))
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("POD_NAME", "train-1-abcde")


def test_a_pod_of_an_indexed_job_waits_for_the_others_and_knows_its_index(in_a_pod):
    found = json.loads(cluster.of_kubernetes(Kubernetes(), 60.0))
    assert found["cluster"] == {"worker": ["10.0.0.1:8470", "10.0.0.2:8470", "10.0.0.3:8470"]}
    assert found["task"] == {"type": "worker", "index": 1}


def test_a_pod_that_does_not_come_is_named_and_the_same_command_goes_on(in_a_pod):
    with pytest.raises(KeyboardInterrupt, match="because worker 2 did not come within --worker_timeout"):
        cluster.of_kubernetes(Kubernetes(comes=False), 0.05)


def test_a_pod_of_another_kind_is_one_line(in_a_pod, monkeypatch):
    with pytest.raises(UserError, match="belongs to no Job with completionMode: Indexed"):
        cluster.of_kubernetes(Kubernetes(labels={}), 60.0)
    monkeypatch.delenv("POD_NAME")
    with pytest.raises(UserError, match="needs POD_NAME"):
        cluster.of_kubernetes(Kubernetes(), 60.0)


def test_without_kubernetes_package_it_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kubernetes", None)
    with pytest.raises(UserError, match="pip install kubernetes"):
        strategy_lib.make_strategy("auto", cluster="kubernetes")


def test_a_cluster_goes_with_many_hosts_alone():
    with pytest.raises(UserError, match="--cluster=slurm goes with --strategy=multi_worker, not mirrored"):
        Config(cluster="slurm", strategy="mirrored")
    assert Config(cluster="slurm").planned_strategy_name == "one_device"


def test_who_has_not_come_is_read_from_tensorflows_message():
    said = (
        "Barrier timed out. Id: [Init]Wait_for_all_tasks_to_register::0. This usually happens because ...\n"
        "# of tasks that reached the barrier: 2/4.\nThe first task at the barrier: /job:worker/replica:0/task:0. "
        "Some timed out task names:\n/job:worker/replica:0/task:2\n/job:worker/replica:0/task:3\n\nAdditional GRPC "
        "error information from remote target /job:worker/replica:0/task:0 while calling RegisterTask"
    )
    assert cluster._timed_out(said) == [("worker", "2"), ("worker", "3")]
    assert cluster._timed_out("Deadline Exceeded") == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            tf.errors.DeadlineExceededError(
                None, None, "... Some timed out task names:\n/job:worker/replica:0/task:1\n"
            ),
            "because worker 1 (h1:2222) did not come within --worker_timeout=5 seconds: give the same command to all",
        ),
        (
            tf.errors.UnavailableError(None, None, "Socket closed"),
            "because another worker was lost while all of them joined (Socket closed): give the same command to all",
        ),
    ],
)
def test_a_cluster_that_is_not_complete_is_one_to_try_again(monkeypatch, error, says):
    def join(communication_options):
        assert communication_options.timeout_seconds == 5.0
        raise error

    task = {"cluster": {"worker": ["h0:2222", "h1:2222"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(task))
    monkeypatch.setattr(cluster, "_configure_coordination", lambda spec, timeout: None)
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", join)
    with pytest.raises(KeyboardInterrupt) as stopped:
        cluster.join(5.0)
    assert str(stopped.value).startswith(says)


@pytest.fixture
def other_worker(monkeypatch):
    """`other_worker(what)`: beside this process there is another worker, which has found `what`."""

    def make(what):
        def of_every_worker(strategy, numbers):
            text = json.dumps(what).encode()
            words = -(-len(text) // strategy_lib.BYTES_OF_A_NUMBER)
            if len(numbers) == 1:  # the lengths
                return strategy_lib.np.array([numbers, [words]])
            size = len(numbers) * strategy_lib.BYTES_OF_A_NUMBER
            return strategy_lib.np.array([numbers, strategy_lib.np.frombuffer(text.ljust(size), "int64")])

        monkeypatch.setattr(strategy_lib, "_of_every_worker", of_every_worker)

    return make


def test_workers_that_differ_are_told_in_what_and_each_ones_value(other_worker):
    own = {"--learning_rate": 0.3, "--use_blur": True, "--dataset": "digits", "their program": "1234abcd"}
    other_worker(own)
    strategy_lib.check_agreement(tf.distribute.get_strategy(), own, "agree")
    for name, theirs, shown in (
        ("--learning_rate", 0.1, "worker 0 0.3, worker 1 0.1"),
        ("--use_blur", False, "worker 0 True, worker 1 False"),
        ("--dataset", "cifar10 für mich", "worker 0 digits, worker 1 cifar10 für mich"),
        ("their program", "ffff0000", "worker 0 1234abcd, worker 1 ffff0000"),
    ):
        other_worker({**own, name: theirs})
        with pytest.raises(UserError) as refused:
            strategy_lib.check_agreement(tf.distribute.get_strategy(), own, "agree")
        assert str(refused.value) == f"the workers differ in {name} ({shown}): agree"
