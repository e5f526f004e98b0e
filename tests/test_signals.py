"""SIGTERM and SIGINT in real processes, which do not need TensorFlow."""

import signal
import subprocess
import sys
import time

from conftest import ROOT

PROGRAM = """
import ctypes, signal, sys, time
from signals import LISTENER
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a script
try:
    {before}
    LISTENER.install()
    print("ready", flush=True)
    {then}
except KeyboardInterrupt as stop:
    print("interrupted", stop, flush=True)
    sys.exit(3)
print("noted", LISTENER.first, flush=True)
"""
# Waits for a lock that it holds itself. Python runs no handler meanwhile, as in a long operation of TensorFlow.
DEADLOCK = "lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"


def start(before, then):
    program = PROGRAM.format(before=before, then=then)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_signal_interrupts_at_once_where_nothing_is_lost():
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start("pass", "time.sleep(60)")
        process.send_signal(number)
        assert (process.stdout.read(), process.wait()) == (f"interrupted by {number.name}\n", 3)


def test_a_deferred_signal_is_noted_and_a_second_one_ends_the_process_at_once():
    process = start("LISTENER.deferred = True", DEADLOCK)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # a terminal and a script that pass one request on
    assert "stops after this step and saves" in process.stderr.readline()
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said, err = process.stdout.read(), process.stderr.read()
    assert process.wait() == 75
    assert not said and err.startswith("run.py: stopped at once by SIGTERM, the second signal") and err.count("\n") == 1


def test_a_signal_that_was_ignored_stays_ignored():
    process = start("signal.signal(signal.SIGINT, signal.SIG_IGN)", "signal.raise_signal(signal.SIGINT)")
    assert (process.stdout.read(), process.wait()) == ("noted \n", 0)
