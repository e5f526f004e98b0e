"""Trains in three processes that die by kill -9: right after the start, between two saves, and inside a save.

`python tests/kills.py '{"model_dir": "run", "train_steps": 6, "checkpoint_steps": 3, ...}'` goes on each time where the
process before was killed. The three are forks of one that has imported everything and computed nothing, since the
import takes longer than the rest. test_exact_resume.py runs it.
"""

import json
import os
import signal
import sys
import time

import conftest  # It sets the devices up, before TensorFlow starts.
import tensorflow as tf
import tiny

import architecture
import console
import train


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def right_after_the_start(given):
    train.Loop.run_to_the_end = die


def between_two_saves(given):
    """Dies after a step that comes after the first save."""
    first = os.path.join(given["model_dir"], f"ckpt-{given['checkpoint_steps']}.index")
    advance, taken = console.Progress.advance, []

    def advance_or_die(progress, steps):
        taken.append(steps)
        if sum(taken) > given["checkpoint_steps"]:
            while not os.path.exists(first):  # A thread writes it.
                time.sleep(0.01)
            die()
        advance(progress, steps)

    console.Progress.advance = advance_or_die


def inside_a_save(given):
    """Dies while the last checkpoint moves to its place: all of it is there but the index."""
    rename = tf.io.gfile.rename
    last = os.path.join(given["model_dir"], f"ckpt-{given['train_steps']}.index")

    def rename_or_die(source, target, overwrite=False):
        if target == last:  # There may be one in best/ too.
            die()
        rename(source, target, overwrite)

    tf.io.gfile.rename = rename_or_die


def main():
    given = json.loads(sys.argv[1])
    architecture.BLOCKS[10] = conftest.ONE  # as in the module of the test
    for prepare_to_die in (right_after_the_start, between_two_saves, inside_a_save):
        process = os.fork()
        if not process:
            prepare_to_die(given)
            tiny.train_run(**given)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"{prepare_to_die.__name__}: the run was not killed, it ended with {status}")


if __name__ == "__main__":
    main()
