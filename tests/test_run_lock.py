"""The lock of a run's folder: one training command at a time, and no longer than its process lives."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT

import run_lock
import subject
from errors import UserError

ONE_STAGE = True  # see conftest.py

HOLDS = """
import sys, run_lock
with run_lock.RunLock(sys.argv[1]) as lock:
    lock.take_if_there()
    lock.take()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "run"."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("take", ["take_if_there", "take"])
def test_a_second_process_is_refused_until_the_first_has_ended_even_by_kill(tmp_path, holder, take):
    model_dir = str(tmp_path / "run")
    with run_lock.RunLock(model_dir) as lock, pytest.raises(UserError) as error:
        getattr(lock, take)()
    first = f"process {holder.pid} on host {socket.gethostname()}"
    assert str(error.value).startswith(f"--model_dir={model_dir}: another run is writing there, {first}: ")
    assert "\n" not in str(error.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run_lock.RunLock(model_dir) as lock:
        getattr(lock, take)()
        with run_lock.RunLock(model_dir) as second, pytest.raises(UserError, match="another run is writing there"):
            second.take_if_there()


def test_the_end_of_the_context_gives_the_lock_back_and_empties_the_file(tmp_path):
    for _ in range(2):
        with run_lock.RunLock(str(tmp_path / "run")) as lock:
            lock.take()
            assert str(os.getpid()) in (tmp_path / "run" / "run.lock").read_text()
        assert (tmp_path / "run" / "run.lock").read_text() == ""


def test_nothing_is_written_before_the_lock_is_to_be_taken(tmp_path):
    with run_lock.RunLock(str(tmp_path / "run")) as lock:
        lock.take_if_there()
        assert not list(tmp_path.iterdir())
    (tmp_path / "a_file").write_text("")
    for folder in ("a_file", "a_file/run"):
        with run_lock.RunLock(str(tmp_path / folder)) as lock:
            lock.take_if_there()
            with pytest.raises(UserError, match=f"{folder} cannot be written"):
                lock.take()


def test_a_run_that_came_between_is_noticed(tmp_path):
    with run_lock.RunLock(str(tmp_path)) as lock:
        lock.take_if_there()
        (tmp_path / "ckpt-4.index").write_text("")
        with pytest.raises(UserError, match="another run has written checkpoints there while this one was preparing"):
            lock.take()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", without)
    with run_lock.RunLock(str(tmp_path)) as lock:
        lock.take()
    assert "run.lock cannot be locked (No locks available): nothing keeps a second run out" in caplog.text


@pytest.mark.parametrize(("folder", "locks"), [("gs://bucket/run", True), ("run", False)])
def test_a_bucket_and_a_worker_that_writes_nothing_have_no_lock(tmp_path, monkeypatch, folder, locks):
    monkeypatch.chdir(tmp_path)
    with run_lock.RunLock(folder, locks) as lock:
        lock.take_if_there()
        lock.take()
    assert not list(tmp_path.iterdir())


def test_training_is_refused_beside_another_and_evaluation_is_not(tmp_path, tmp_path_factory):
    model_dir = tiny.borrow(tiny.pretrained(tmp_path_factory), tmp_path / "run")
    with run_lock.RunLock(model_dir) as lock:
        lock.take_if_there()
        lock.take()
        before = tiny.files_in(model_dir)
        with pytest.raises(UserError, match=f"another run is writing there, process {os.getpid()} on host"):
            tiny.train_run(model_dir=model_dir, train_steps=5)
        assert tiny.files_in(model_dir) == before
        assert tiny.evaluated(subject.decide({"mode": "eval", "model_dir": model_dir}))["step"] == 3


def test_a_disk_that_fails_meanwhile_does_not_hide_why_the_run_ends(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(UserError, match=r"^the TensorBoard scalars"), run_lock.RunLock(str(tmp_path)) as lock:
        lock.take()
        monkeypatch.setattr(os, "ftruncate", fails)
        raise UserError("the TensorBoard scalars cannot be written")
    monkeypatch.undo()
    with run_lock.RunLock(str(tmp_path)) as lock:
        lock.take()
