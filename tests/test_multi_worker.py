"""Two real processes under TF_CONFIG on the loopback interface: they train, evaluate and resume as one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import ROOT

import errors
import run_folder

SMALL = [
    "--resnet_depth=10",
    "--width_multiplier=0.0625",
    "--image_size=8",
    "--train_batch_size=16",
    "--memory=queue",
    "--memory_size=32",
    "--global_bn=False",
]
SECONDS = 600
# One process gives several command lines, one after the other: to start TensorFlow takes longer than such a command.
# As in conftest.py, its network has one group of blocks instead of four and its graphs are not rewritten; and an export
# is a file with the step, which tells who makes one. tests/test_export.py is about what is in it.
COMMANDS = """
import json, os, sys
import run
import tensorflow as tf
import architecture, export
architecture.BLOCKS[10] = (architecture.BASIC, (1,))
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
def small_export(config, weights):
    path = os.path.join(config.model_dir, "export")
    with open(path, "x") as file:
        file.write(str(weights.step))
    return path
export.export = small_export
run.define_flags()
for arguments in json.loads(sys.argv[1]):
    for name in list(run.flags.FLAGS):
        run.flags.FLAGS[name].unparse()
    run.main(run.parse_flags(["run.py", *arguments]))
    print("ended", flush=True)
"""


def free_ports(count):
    """Ports of the loopback interface that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def of_slurm(index):
    """The variables by which srun tells one of two tasks on this host who they are."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    return {**job, "SLURM_PROCID": str(index)}


def start_both(folder, *arguments, of_worker=((), ()), then=None, slurm=False, which=(0, 1)):
    """Starts one command in two workers; with `then`, that command follows. Returns their processes.

    With `slurm`, they are tasks of a job. `which` of them are started.
    """
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    workers = []
    for index in which:
        task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        who = of_slurm(index) if slurm else {"TF_CONFIG": json.dumps(task)}
        environment = {**os.environ, **who, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, str(ROOT / "run.py"), *SMALL, *arguments, *of_worker[index]]
        if then:
            command = [sys.executable, "-c", COMMANDS, json.dumps([[*SMALL, *arguments], [*SMALL, *then]])]
            environment["PYTHONPATH"] = str(ROOT)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        workers.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    return workers


def both(folder, *arguments, **options):
    """Runs commands in two workers, as `start_both` does. Returns each one's (status, stdout, stderr)."""
    return ends(start_both(folder, *arguments, **options))


def ends(workers):
    """Waits until both workers have ended. Returns each one's (status, stdout, stderr)."""
    try:
        said = [worker.communicate(timeout=SECONDS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, *each) for worker, each in zip(workers, said, strict=True)]


def test_two_workers_train_evaluate_and_resume_and_the_chief_alone_writes(tmp_path):
    train = ["--mode=train_then_eval", "--model_dir=run", "--checkpoint_steps=2"]
    ended = both(tmp_path, *train, "--train_steps=2", then=["--mode=train", "--model_dir=run", "--train_steps=3"])
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert all("waits until all workers have started, 900 seconds at most" in out for _, out, _ in ended)
    model_dir = tmp_path / "run"
    results = [next(line for line in out.splitlines() if line.startswith("step ")) for _, out, _ in ended]
    assert results[0].split(", seconds")[0] == results[1].split(", seconds")[0]  # of one checkpoint, on both
    result = json.loads((model_dir / "result.json").read_text())
    assert (result["step"], result["examples"]) == (2, 360)
    assert len(list(model_dir.glob("train/events*"))) == 2 and len(list(model_dir.glob("eval/events*"))) == 1
    first, second = ([out.split("ended\n")[command] for _, out, _ in ended] for command in (0, 1))
    assert "SavedModel: " in first[0] and "SavedModel: " not in first[1]
    assert (model_dir / "export").read_text() == "2"
    assert all("goes on from step 2 of 3" in out for out in second)
    assert run_folder.checkpoints(str(model_dir)) == [str(model_dir / "ckpt-3"), str(model_dir / "ckpt-2")]
    probes = json.loads((model_dir / "probe.json").read_text())["probes"]
    assert [found["step"] for found in probes] == [0, 2, 3]
    best = max(probes[1:], key=lambda found: found["knn"])["step"]
    assert run_folder.checkpoints(str(model_dir / "best")) == [str(model_dir / "best" / f"ckpt-{best}")]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.slow
def test_two_workers_choose_one_recipe_and_the_chief_says_how_many_epochs_fit(tmp_path):
    tiny.coloured_images(tmp_path / "images" / "train", 40)
    folder = ["--dataset=image_folder", "--data_dir=images", "--model_dir=run", "--memory=queue", "--eval_split=train"]
    ended = both(tmp_path, *folder, "--train_minutes=0.2")
    assert [status for status, _, _ in ended] == [0, 0], ended
    said = [[line for line in out.splitlines() if "0.2 minutes (" in line or "  --" in line] for _, out, _ in ended]
    assert said[0] == said[1] and len(said[0]) > 10
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run_folder.checkpoints(str(tmp_path / "run"))[0].endswith(f"ckpt-{80 * saved['train_epochs'] // 16 + 1}")
    assert saved["recipe_reasons"]["train_epochs"] == said[0][0]


@pytest.mark.slow
def test_two_workers_start_fine_tuning_from_the_linear_classifier_that_one_process_finds(tmp_path):
    pretrain = ["--mode=train", "--train_steps=40", "--warmup_epochs=0", "--model_dir=pretrain"]
    finetune = ["--mode=train", "--train_mode=finetune", "--checkpoint=pretrain", "--labels_per_class=2"]
    finetune += ["--linear_start", "--train_steps=1", "--learning_rate=0"]
    ended = both(tmp_path, *pretrain, then=[*finetune, "--model_dir=two"])
    assert [status for status, _, _ in ended] == [0, 0], ended
    one = [sys.executable, "-c", COMMANDS, json.dumps([[*SMALL, *finetune, "--model_dir=one"]])]
    subprocess.run(one, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    of_one, of_two = (tiny.saved_values(tmp_path / run) for run in ("one", "two"))
    kernel = "weights/supervised_head/supervised_head/kernel/.ATTRIBUTES/VARIABLE_VALUE"
    largest = np.abs(of_one[kernel]).max()
    assert largest > 0.2  # A random start has a standard deviation of 0.01.
    np.testing.assert_allclose(of_two[kernel], of_one[kernel], atol=1e-2 * largest)


def test_workers_that_share_no_folder_stop_with_one_line(tmp_path, tmp_path_factory):
    tiny.borrow(tiny.pretrained(tmp_path_factory), tmp_path / "first")
    network = [
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        "--image_size=16",
        "--memory=queue",
        "--memory_size=48",
        "--global_bn",
    ]
    started = time.monotonic()
    own = (["--model_dir=first"], ["--model_dir=second"])
    ended = both(
        tmp_path, "--cluster=slurm", "--optimizer=lars", *network, "--train_steps=5", of_worker=own, slurm=True
    )
    assert time.monotonic() - started < SECONDS
    for status, _, err in ended:
        assert status == 2, ended
        assert "the workers differ in their newest checkpoint (worker 0 ckpt-3, worker 1 none)" in err
        assert len([line for line in err.splitlines() if line.startswith("run.py: ")]) == 1
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("alone", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_worker_that_never_comes_is_named_and_the_same_command_goes_on(tmp_path, alone):
    workers = start_both(tmp_path, "--model_dir=run", "--worker_timeout=3", which=[alone])
    ((status, _, err),) = ends(workers)
    last = rf"run\.py: interrupted because worker {1 - alone} \(127\.0\.0\.1:\d+\) did not come within "
    last += r"--worker_timeout=3 seconds: give the same command to all workers again"
    assert re.fullmatch(last, err.splitlines()[-1]), err
    assert status == 75 and "Traceback" not in err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workers_with_other_flags_are_told_which_flag(tmp_path):
    ended = both(tmp_path, "--model_dir=run", of_worker=(["--learning_rate=0.1"], ["--learning_rate=0.2"]))
    for status, _, err in ended:
        assert status == 2, ended
        assert "the workers differ in --learning_rate (worker 0 0.1, worker 1 0.2): give all of them the same" in err
    assert not (tmp_path / "run").exists()


# Worker 0 waits in an operation of all workers, in which worker 1, who lives, takes no part.
TAKES_NO_PART = """
import sys, time
import errors, strategy
both = strategy.make_strategy(worker_timeout=5.0)
strategy.wait_for_all(both)
if sys.argv[1] == "1":
    time.sleep(20)
try:
    strategy.wait_for_all(both)
except Exception as error:
    print(errors.lost_worker(error), flush=True)
"""


@pytest.mark.slow
def test_a_worker_that_lives_and_takes_no_part_is_waited_for_no_longer_than_the_flag_says(tmp_path):
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    workers = []
    for index in range(2):
        task = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
        environment = {**os.environ, "TF_CONFIG": task, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        command = [sys.executable, "-c", TAKES_NO_PART, str(index)]
        workers.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
    said = [out.strip() for _, out, _ in ends(workers)]
    assert said[0] == "the wait for another worker, which takes no part for longer than --worker_timeout"
    # On a busy machine worker 0 may still be ending when worker 1 waits for it, who then says the same.
    assert said[1] == said[0] or said[1].startswith("the loss of another worker")


@pytest.mark.slow
def test_workers_stop_after_the_same_step_when_one_of_them_is_told_to(tmp_path):
    long_run = ["--mode=train_then_eval", "--model_dir=run", "--train_steps=100000", "--checkpoint_steps=100000"]
    workers = start_both(tmp_path, *long_run, "--eval_every_epochs=-1")
    line = ""
    while "pretrain: step 1 of" not in line:
        line = workers[0].stderr.readline()
        assert line, "the worker has ended"
    workers[1].send_signal(signal.SIGTERM)  # worker 1 alone
    ended = ends(workers)
    assert [status for status, _, _ in ended] == [75, 75], ended
    (newest,) = run_folder.checkpoints(str(tmp_path / "run"))
    step = newest.rsplit("-", 1)[1]
    for _, _, err in ended:
        last = err.splitlines()[-1]
        assert last == f"run.py: interrupted by SIGTERM at step {step}: the same command goes on from step {step}"
    assert not (tmp_path / "run" / "result.json").exists()
    ended = both(tmp_path, "--model_dir=run", f"--train_steps={int(step) + 1}", "--eval_every_epochs=-1")
    assert [status for status, _, _ in ended] == [0, 0], ended


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_worker_whose_fellow_is_killed_ends_and_both_go_on(tmp_path, killed, by):
    """A worker whose process is frozen counts as gone too. When it goes on, it ends as the other did."""
    long_run = ["--mode=train", "--model_dir=run", "--train_steps=100000", "--checkpoint_steps=5"]
    workers = start_both(tmp_path, *long_run, "--eval_every_epochs=-1")
    while not list(tmp_path.glob("run/ckpt-*.index")):
        assert [worker.poll() for worker in workers] == [None, None], ends(workers)
        time.sleep(0.05)
    workers[killed].send_signal(by)
    workers[1 - killed].wait(timeout=90)
    if by == signal.SIGSTOP:
        workers[killed].send_signal(signal.SIGCONT)
    ended = ends(workers)
    assert ended[killed][0] == (75 if by == signal.SIGSTOP else -9), ended[killed]
    status, _, err = ended[1 - killed]
    newest = run_folder.checkpoints(str(tmp_path / "run"))[0].rsplit("-", 1)[1]
    assert status == 75 and "Traceback" not in err, err
    which = rf"worker {killed}" if by == signal.SIGKILL or killed else "the first one, which all report to,"
    last = rf"run\.py: interrupted by the loss of another worker \({which} does not answer\) after step \d+: "
    said = re.fullmatch(rf"{last}the same command goes on from step (\d+)", err.splitlines()[-1])
    assert said, err.splitlines()[-1]
    # The chief may have been frozen while it saved, and then ends that when it goes on.
    saves_later = by == signal.SIGSTOP and killed == 0
    assert int(newest) - int(said[1]) in ((0, 5) if saves_later else (0,))
    ended = both(tmp_path, "--model_dir=run", f"--train_steps={int(newest) + 1}", "--eval_every_epochs=-1")
    assert [status for status, _, _ in ended] == [0, 0], ended


@pytest.mark.parametrize(
    ("said", "means"),
    [
        (
            "{{function_node __wrapped__CollectiveReduceV2_device_/job:worker/replica:0/task:0/device:CPU:0}} "
            "Collective ops is aborted by: Error reported from /job:worker/task:1: The following tasks are unhealthy "
            "(stopped sending heartbeats):\n/job:worker/replica:0/task:1\nThe tasks have crashed.",
            "the loss of another worker (worker 1 does not answer)",
        ),
        (
            "Graph execution error:\n\nCollective ops is aborted by: failed to connect to all addresses; last error: "
            "UNKNOWN: ipv4:127.0.0.1:58625: Failed to connect to remote host: Connection refused\nAdditional GRPC "
            "error information from remote target /job:worker/replica:0/task:0 while calling "
            "/tensorflow.WorkerService/CompleteInstance:\n:UNKNOWN:Error received from peer",
            "the loss of another worker (worker 0 does not answer)",
        ),
        ("Collective ops is aborted by: the shutdown", "the loss of another worker"),
        (
            "Collective ops is aborted by: Deadline Exceeded\n\nRPC: /tensorflow.CoordinationService/Heartbeat",
            "the loss of another worker (the first one, which all report to, does not answer)",
        ),
        (
            "Graph execution error:\n\nCollective has timed out during execution.",
            "the wait for another worker, which takes no part for longer than --worker_timeout",
        ),
        ("{{function_node ReadFile_device_/job:worker/replica:0/task:0}} gs://bucket/1.png; Socket closed", ""),
    ],
)
def test_what_tensorflow_says_of_a_lost_worker_is_understood(said, means):
    assert errors.lost_worker(tf.errors.UnavailableError(None, None, said)) == means
    assert errors.lost_worker(OSError(said)) == ""
