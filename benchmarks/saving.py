"""What a checkpoint costs a pretraining run: how long training waits for it, and how long it is written.

    python benchmarks/saving.py --model_dir=/tmp/saving

The state is that of a run with the memory: a ResNet, its momentum encoder, the optimizer's slots and the queue. Each
number is the least and the median of some saves, in seconds of the clock. Between them come saves for which training
has to wait from their beginning to their end: by TensorFlow's `CheckpointManager`, which is what this program used
before, after the same look for numbers that are not finite.

How much of the time that is depends on the time between two saves, so it is said for ImageNet at the default interval,
an epoch, on machines of different speed, and as the interval at which training waits for 5 % of the time.
"""

from __future__ import annotations

import argparse
import operator
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine

with engine.quiet_import():
    import tensorflow as tf

import checkpoint
import lars_optimizer
import run_folder
import subject
import tasks
from checkpoint import state_copy
from config import FIELDS

CLASSES = ["one", "two"]
IMAGENET = 1_281_167
SPEEDS = (100, 1_000, 10_000)  # images a second: less than a GPU, a GPU, and a host of them
MOST = 0.05  # of the time may be spent waiting for checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", required=True, help="an empty folder on the disk to measure")
    parser.add_argument("--resnet_depth", type=int, default=50)
    parser.add_argument("--memory_size", type=int, default=65536)
    parser.add_argument("--saves", type=int, default=5)
    given = parser.parse_args()
    made = subject.resolve({
        "train_mode": "pretrain", "recipe": "paper", "memory": "queue", "image_size": 224, "width_multiplier": 1.0,
        "resnet_depth": given.resnet_depth, "memory_size": given.memory_size, "model_dir": given.model_dir,
    })  # fmt: skip
    task = tasks.make_task(made, CLASSES)
    optimizer = lars_optimizer.make_optimizer("lars", 0.1, head=task.model.supervised_head.trainable_variables)
    optimizer.build(task.model.trainable_variables)
    description = run_folder.describe(made.to_dict(), CLASSES, 99)
    saved = checkpoint.RunCheckpoints(
        os.path.join(given.model_dir, "beside"), description, 2, task.model, optimizer, task.state
    )
    slots = {str(number): variable for number, variable in enumerate(optimizer.variables)}
    state = state_copy.as_dicts({"weights": task.model.named_weights(), "optimizer": slots, **task.state})
    finite = state_copy.StateCopy(state)
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(**state), os.path.join(given.model_dir, "instead"), max_to_keep=2
    )
    waits, writes, instead = [], [], []
    for step in range(1 + given.saves):  # The first save makes the copy.
        optimizer.iterations.assign(step)
        began = time.monotonic()
        saved.save()
        waits.append(time.monotonic() - began)
        saved.finish()
        writes.append(time.monotonic() - began)
        began = time.monotonic()
        finite.take()
        manager.save(checkpoint_number=step)
        instead.append(time.monotonic() - began)
    newest = os.path.join(given.model_dir, "beside", f"ckpt-{given.saves}")
    size = sum(os.path.getsize(file) for file in run_folder.files_of(newest))
    began = time.monotonic()
    assert checkpoint.newest_that_reads(os.path.dirname(newest), "", "") == newest
    reads = time.monotonic() - began
    print(f"ResNet-{given.resnet_depth}, {given.memory_size:,} keys: {size / 1e6:,.0f} MB")
    for name, seconds in (("instead of training", instead), ("training waits", waits), ("until it is written", writes)):
        print(f"{name}: {min(seconds[1:]):.2f} s, {statistics.median(seconds[1:]):.2f} s; the first {seconds[0]:.2f} s")
    stall = statistics.median(waits[1:])
    images = FIELDS["checkpoint_epochs"].default * IMAGENET
    shares = ", ".join(f"{100 * stall * speed / images:.2g} % at {speed:,} images/s" for speed in SPEEDS)
    print(f"of the time between two saves at the default interval, {images:,} images, training waits {shares}")
    print(f"it is less than {MOST:.0%} where a checkpoint is written no more often than every {stall / MOST:.0f} s")
    print(f"training waits less by {statistics.median(map(operator.truediv, instead[1:], waits[1:])):.1f} times")
    print(f"verified and read: {reads:.2f} s")


if __name__ == "__main__":
    main()
