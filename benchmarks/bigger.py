"""A pretraining step at once, in chunks, and with recomputed blocks: peak memory and time.

    python benchmarks/bigger.py
    python benchmarks/bigger.py --rows=4096:32:0

A row is batch:chunks:remat, of --train_batch_size, --grad_accumulation and --remat. Each is a process of its own. It
trains a narrow ResNet at 32 pixels on random images. The tensors are what TensorFlow's allocator has in use at the peak
of the steps, beyond what it had before them. The estimate is that of --mode=plan, for the parts that a step adds. The
process is how far its largest resident set (`ru_maxrss`) is above the one before the first step: beside the tensors it
has the graph, and what the allocator keeps. Time is that of the processor, of the last step. Linux on x86 alone.
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
    columns = ("batch", "chunks", "blocks recomputed", "tensors", "estimate", "process", "s a step", "for 1,000 images")
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    for row in given.rows.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], f"--measure={row}"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(said.splitlines()[-1])
        batch, chunks, remat = map(int, row.split(":"))
        sizes = " | ".join(f"{found[name] / 1e6:,.0f} MB" for name in ("tensors", "estimate", "process"))
        times = f"{found['cpu']:.1f} | {1000 * found['cpu'] / batch:.1f}"
        print(f"| {batch:,} | {chunks} | {'yes' if remat else 'no'} | {sizes} | {times} |", flush=True)


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Peak memory in bytes, of the tensors and of the process, the plan's estimate, and seconds of processor a step."""
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
    tensors_before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    tf.config.experimental.reset_memory_stats("CPU:0")
    for _ in range(given.steps):
        began = time.process_time()
        float(step(images)["loss"])
        cpu = time.process_time() - began
    return {
        "tensors": tf.config.experimental.get_memory_info("CPU:0")["peak"] - tensors_before,
        "estimate": sum(parts.values()) - sum(parts[name] for name in THERE_BEFORE),
        "process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
        "cpu": cpu,
    }


if __name__ == "__main__":
    main()
