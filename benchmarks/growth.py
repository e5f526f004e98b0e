"""What a training step costs as the run grows: processor time and memory, beside what the plan counts.

    python benchmarks/growth.py --output=growth.json
    python benchmarks/growth.py --output=growth.json --plot=growth.png
    python benchmarks/growth.py --output=growth.json --only=memory

One thing grows at a time, from a ResNet-18 of a quarter of its width on images of 32 pixels. The cost of an image is
the processor time of its share of a step, of all threads, the least of some steps: on a machine with other work it
moves less than time by the clock. Beside it stands the arithmetic: the FLOPs of `--mode=plan` and those of the loss.
For the views it is time by the clock, with one processor core and with more.

`memory` compares the peak of a whole process (`ru_maxrss`) with the plan's estimate, which counts what a step needs,
and with what a process takes before it builds a network, `strategy.CPU_PROCESS_BYTES`. Each measurement is a process of
its own. What stands in --output already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STEPS = 5
Shape = dict[str, Any]
BASE: Shape = {
    "train_mode": "pretrain", "recipe": "paper", "dataset": "cifar10", "memory": "none", "resnet_depth": 18,
    "width_multiplier": 0.25, "image_size": 32, "train_batch_size": 64, "optimizer": "momentum",
    "lineareval_while_pretraining": False, "model_dir": "unused",
}  # fmt: skip
# What grows: its words, the field, and the values. The first value is the one that the others are compared with.
GROWTH: dict[str, tuple[str, str, Sequence[float]]] = {
    "batch": ("batch", "train_batch_size", (16, 64, 256, 1024)),
    "queue": ("keys in the queue", "memory_size", (1024, 4096, 16384, 65536)),
    "depth": ("layers", "resnet_depth", (18, 34, 50, 101, 152)),
    "width": ("width", "width_multiplier", (0.125, 0.25, 0.5, 1)),
    "size": ("pixels of a side", "image_size", (16, 24, 32)),
    "large": ("pixels of a side", "image_size", (64, 128, 256)),
}
CORES = "cores"
# The shapes whose memory is compared with the plan. What they do not say is as in BASE.
MEMORY: dict[str, Shape] = {
    "ResNet-18 at 0.25, 32 pixels, batch 1,024": {"train_batch_size": 1024},
    "ResNet-18, 32 pixels, batch 128, queue of 65,536": {
        "width_multiplier": 1.0, "train_batch_size": 128, "memory": "queue", "memory_size": 65536,
    },
    "ResNet-50, 224 pixels, batch 16": {
        "resnet_depth": 50, "width_multiplier": 1.0, "image_size": 224, "train_batch_size": 16, "optimizer": "lars",
    },
    "ResNet-50 with SK, 224 pixels, batch 8, queue of 65,536": {
        "resnet_depth": 50, "width_multiplier": 1.0, "sk_ratio": 0.0625, "image_size": 224, "train_batch_size": 8,
        "optimizer": "lars", "memory": "queue", "memory_size": 65536,
    },
    "ResNet-50 at 2, supervised, 224 pixels, batch 16, Adam": {
        "train_mode": "supervised", "resnet_depth": 50, "width_multiplier": 2.0, "image_size": 224,
        "train_batch_size": 16, "optimizer": "adam",
    },
    "ResNet-101, 96 pixels, batch 32": {
        "resnet_depth": 101, "width_multiplier": 1.0, "image_size": 96, "train_batch_size": 32, "optimizer": "lars",
    },
}  # fmt: skip


def measure_step(shape: Shape) -> dict[str, float]:
    """Processor seconds of an image, peak bytes of the process, and what the plan says of both."""
    import engine

    with engine.quiet_import():
        import tensorflow as tf

    import lars_optimizer
    import plan
    import schedule
    import strategy
    import subject
    import tasks
    import train

    config = subject.resolve({**BASE, **shape})
    batch, size = config.train_batch_size, config.image_size
    task = tasks.make_task(config, [str(i) for i in range(10)])
    rates = schedule.WarmupCosine(0.1, 0, 100)
    optimizer = lars_optimizer.make_optimizer(config.optimizer, rates, config.momentum, config.weight_decay, ())
    optimizer.build(task.model.trainable_variables)
    step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
    labels = tf.random.stateless_uniform([batch], [1, 0], 0, 10, tf.int32)
    inputs = {
        **{key: tf.random.stateless_uniform([batch, size, size, 3], [i, 0]) for i, key in enumerate(task.views)},
        "label": labels,
    }
    seconds = []
    for _ in range(STEPS + 1):  # The first one traces.
        begin = time.process_time()
        float(step(inputs)["loss"])
        seconds.append(time.process_time() - begin)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = plan.plan(config, timing=False)
    loss = 0
    if config.train_mode == "pretrain":
        keys = 2 * batch + (config.memory_size if config.memory == "queue" else 0)
        products = 2 if config.memory == "queue" else 4  # logits and mean key; for the candidates' gradient two more
        loss = 2 * products * 2 * batch * keys * config.proj_out_dim
    return {
        "seconds": min(seconds[1:]) / batch,
        "peak": peak,
        "flops": (planned["flops_per_step"] + loss) / batch,
        "planned": planned["memory_bytes_per_replica"] + strategy.CPU_PROCESS_BYTES,
    }


def measure_views(cores: int) -> dict[str, float]:
    """Seconds of the clock for two views of an image of 32 pixels, with so many processor cores."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    import speed

    work = speed.our_views(speed.small_images(), lambda x: x, 32, 256, True)
    for _ in range(4):
        work.run()
    return {"seconds": 1 / statistics.median(speed.images_per_second(work, 1.0) for _ in range(STEPS))}


def shapes_to_measure() -> dict[str, dict[str, Shape]]:
    """Every shape, by what grows and by its value."""
    found: dict[str, dict[str, Shape]] = {}
    for name, (_, field, values) in GROWTH.items():
        more = {"memory": "queue"} if field == "memory_size" else {}
        found[name] = {f"{value:g}": {field: value, **more} for value in values}
    found[CORES] = {str(n): {CORES: n} for n in range(1, len(os.sched_getaffinity(0)) + 1)}
    found["memory"] = MEMORY
    return found


def measured_in_child(shape: Shape) -> dict[str, float]:
    """What a process of its own measures."""
    command = [sys.executable, __file__, f"--measure={json.dumps(shape)}"]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def tables(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What was measured, as Markdown."""
    lines = ["| what grows | cost of an image, measured | arithmetic |", "| --- | --- | --- |"]
    for name, (words, _, _) in GROWTH.items():
        if of_value := found.get(name):
            first = next(iter(of_value.values()))
            for kind in ("seconds", "flops"):
                assert first[kind] > 0, kind
            ratios = [
                ", ".join(f"{each[kind] / first[kind]:.2f}" for each in of_value.values())
                for kind in ("seconds", "flops")
            ]
            lines.append(f"| {words}: {', '.join(of_value)} | {ratios[0]} | {ratios[1]} |")
    if of_value := found.get(CORES):
        first = next(iter(of_value.values()))
        ratios = [", ".join(f"{each['seconds'] / first['seconds']:.2f}" for each in of_value.values())]
        lines.append(f"| cores that make views: {', '.join(of_value)} | {ratios[0]} | |")
    if of_value := found.get("memory"):
        lines += ["", "| run | peak, MB | plan, MB | plan / peak |", "| --- | --- | --- | --- |"]
        for words, each in of_value.items():
            peak, planned = each["peak"] / 1e6, each["planned"] / 1e6
            lines.append(f"| {words} | {peak:,.0f} | {planned:,.0f} | {planned / peak:.2f} |")
    return "\n".join(lines)


def plot(found: Mapping[str, Mapping[str, Mapping[str, float]]], path: str) -> None:
    """Draws the cost of an image against what grows, measured and by arithmetic, relative to the first value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in GROWTH if name in found]
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
    for axis, name in zip(axes.flat, shown, strict=False):
        x = [float(value) for value in found[name]]
        for kind, style, words in (("seconds", "o-", "measured"), ("flops", "s--", "arithmetic")):
            y = [each[kind] for each in found[name].values()]
            axis.plot(x, [value / y[0] for value in y], style, label=words, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel=GROWTH[name][0])
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.45), max(high, 2.2))
        ticks = [2.0**power for power in range(-1, 7) if axis.get_ylim()[0] <= 2.0**power <= axis.get_ylim()[1]]
        axis.set_yticks(ticks, [f"{value:g}" for value in ticks])
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(frameon=False)
    figure.supylabel("cost of an image, relative")
    figure.savefig(path, dpi=90)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = shapes_to_measure()
    parser.add_argument("--output", type=Path, help="the JSON file of what was measured")
    parser.add_argument("--only", default=",".join(everything), help="what grows; default: %(default)s")
    parser.add_argument("--plot", help="the picture to write")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure is not None:
        shape = given.measure
        print(json.dumps(measure_views(shape[CORES]) if CORES in shape else measure_step(shape)))
        return
    if not given.output:
        parser.error("--output: name the file of what is measured")
    found = json.loads(given.output.read_text()) if given.output.exists() else {}
    names = given.only.split(",")
    if unknown := [name for name in names if name not in everything]:
        parser.error(f"--only={given.only}: there is no {', '.join(unknown)}; choose from {', '.join(everything)}")
    for name in names:
        for value, shape in everything[name].items():
            if value not in found.setdefault(name, {}):
                found[name][value] = measured_in_child(shape)
                print(f"{name} {value}: {found[name][value]}", file=sys.stderr, flush=True)
                given.output.write_text(json.dumps(found, indent=1))
    print(tables(found))
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
