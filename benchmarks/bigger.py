"""A pretraining step at once, in chunks, and with recomputed blocks: peak memory and time.

    python benchmarks/bigger.py
    python benchmarks/bigger.py --rows=4096:32:0

A row is batch:chunks:remat, of --train_batch_size, --grad_accumulation and --remat. Each is a process of its own. It
trains a narrow ResNet at 32 pixels on random images. The peak is how far the largest resident set of the process
(`ru_maxrss`) is above the one before the first step. Time is that of the processor, of the last step. The estimate is
that of --mode=plan, for the parts that a step adds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROWS = "512:1:0,512:4:0,512:1:1,512:4:1,4096:32:0"
CLASSES = 10
# Before the first step these are in memory.
THERE_BEFORE = ("weights", "slots", "momentum_encoder", "queue", "teacher", "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=ROWS, help="batch:chunks:remat, and more of them after commas")
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--memory", choices=("queue", "none"), default="none")
    parser.add_argument("--steps", type=int, default=2, help="the first traces the step, the last is timed")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given)))
        return
    print("| batch | chunks | blocks recomputed | peak | estimate | seconds of processor a step | for 1,000 images |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in given.rows.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], f"--measure={row}"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(said.splitlines()[-1])
        batch, chunks, remat = map(int, row.split(":"))
        sizes = f"{found['peak'] / 1e6:,.0f} MB | {found['estimate'] / 1e6:,.0f} MB"
        times = f"{found['cpu']:.1f} | {1000 * found['cpu'] / batch:.1f}"
        print(f"| {batch:,} | {chunks} | {'yes' if remat else 'no'} | {sizes} | {times} |", flush=True)


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Peak memory in bytes, the plan's estimate of it, and seconds of processor of a step."""
    import engine

    with engine.quiet_import():
        import tensorflow as tf

    import lars_optimizer
    import tasks
    import train
    from config import Config
    from plan import footprint

    batch, chunks, remat = map(int, given.measure.split(":"))
    config = Config(
        train_mode="pretrain", resnet_depth=given.depth, width_multiplier=given.width, image_size=32,
        train_batch_size=batch, grad_accumulation=chunks, remat=bool(remat), memory=given.memory,
    )  # fmt: skip
    network, _ = footprint.count(config)
    parts = footprint.memory_parts(config, 1, CLASSES, network)
    task = tasks.make_task(config, [str(i) for i in range(CLASSES)])
    optimizer = lars_optimizer.make_optimizer("lars", 0.1)
    optimizer.build(task.model.trainable_variables)
    step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
    views = {view: tf.random.uniform([batch, 32, 32, 3]) for view in task.views}
    images = {**views, "label": tf.zeros([batch], tf.int32)}
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for _ in range(given.steps):
        began = time.process_time()
        float(step(images)["loss"])
        cpu = time.process_time() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"peak": peak, "estimate": sum(parts.values()) - sum(parts[name] for name in THERE_BEFORE), "cpu": cpu}


if __name__ == "__main__":
    main()
