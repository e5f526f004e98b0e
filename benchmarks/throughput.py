"""What --mode=predict costs beside the bare network: images a second, processor time, and memory by number of images.

    python benchmarks/throughput.py --model_dir=runs/mine_distilled --data_dir=DIR

The network alone computes on a batch that is already in memory. It and the whole command take turns in one process, so
that a machine with other work slows both; the processor time is that of all threads. Where decoding and the network
share the same processors, the whole can hardly be faster than both one after the other: see the last line of the table.
For the memory, folders with 1,000 and 50,000 links to the images of DIR are predicted by run.py, each in a process of
its own.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine

with engine.quiet_import():
    import tensorflow as tf

import predict
import sources
import subject
import tasks
from answers import tables
from answers.command import fill
from answers.every_image import EveryImage
from answers.images import find_images
from answers.questions import which_class
from errors import UserError

TURNS = 5
SIZES = (1000, 50_000)
# Says the most memory that the process had, in MiB, after it has run.
CHILD = """
import os, resource, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def measured(work: Callable[[], int]) -> tuple[float, float]:
    """Seconds and processor seconds for an image. `work` returns the number of images."""
    seconds, processor = time.monotonic(), time.process_time()
    images = work()
    return (time.monotonic() - seconds) / images, (time.process_time() - processor) / images


def speed(model_dir: str, data_dir: str) -> str:
    """The table of the speed."""
    flags = {"mode": "predict", "model_dir": model_dir, "data_dir": data_dir, "output": "unused.csv"}
    decided = subject.decide(flags)
    config, weights, strategy = decided.config, decided.open(), tf.distribute.get_strategy()
    images = find_images(config)
    question = which_class(config, weights, tasks.restore_network(weights), images.source.classes)
    step = predict.make_step(question.outputs, strategy)
    size, batch = config.image_size, config.eval_batch_size
    random = {"image": tf.random.uniform([batch, size, size, 3]), "position": tf.range(batch, dtype=tf.int64)}
    every = EveryImage(question.outputs, images.source, config, strategy, images.wanted)

    def network_alone() -> int:
        steps = max(1, len(images.wanted) // batch)
        for _ in range(steps):
            step(random)["probability"].numpy()
        return steps * batch

    def reading_alone() -> int:
        for _ in every.stream(0, tf.distribute.InputContext()):
            pass
        return len(images.wanted)

    def whole() -> int:
        with tempfile.TemporaryDirectory() as folder:
            parts = tables.Parts(f"{folder}/a.csv", {})
            fill(parts, every, images, question, config, weights.step)
            tables.write(parts, f"{folder}/a.csv", {})
        return len(images.wanted)

    works = {"network alone": network_alone, "reading alone": reading_alone, "predict": whole}
    for work in works.values():
        work()  # The first time, graphs are traced.
    turns = [{name: measured(work) for name, work in works.items()} for _ in range(TURNS)]
    rows = ["| | images a second | of the network alone | processor us an image |", "| --- | --- | --- | --- |"]
    for name in works:
        seconds, processor = (statistics.median(turn[name][kind] for turn in turns) for kind in (0, 1))
        ratio = statistics.median(turn["network alone"][0] / turn[name][0] for turn in turns)
        rows.append(f"| {name} | {1 / seconds:,.0f} | {ratio:.2f} | {1e6 * processor:,.0f} |")
    bound = statistics.median(
        (turn["network alone"][0] + turn["reading alone"][0]) / turn["predict"][0] for turn in turns
    )
    return "\n".join([*rows, "", f"predict, of network and reading one after the other: {bound:.2f}"])


def peak_memory(model_dir: str, data_dir: str, count: int) -> int:
    """The most memory that a prediction of `count` images takes, in MiB."""
    source = sources.load_folder(data_dir)
    names = source.index()[0]
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/images")
        for number, name in zip(range(count), itertools.cycle(names), strict=False):
            os.symlink(os.path.abspath(os.path.join(data_dir, name)), f"{folder}/images/{number:06d}_{Path(name).name}")
        command = [sys.executable, "-c", CHILD, str(ROOT / "run.py"), "--mode=predict", f"--model_dir={model_dir}"]
        command += [f"--data_dir={folder}/images", f"--output={folder}/a.csv"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split("peak ")[-1])


def main(arguments: Sequence[str]) -> int:
    """Measures, and prints the tables. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", required=True, help="a run with a classifier")
    parser.add_argument("--data_dir", required=True, help="a folder of images")
    given = parser.parse_args(arguments)
    try:
        print(speed(given.model_dir, given.data_dir), flush=True)
    except UserError as mistake:
        print(f"throughput.py: error: {mistake}", file=sys.stderr)
        return 2
    for count in SIZES:
        print(f"{count:,} images: at most {peak_memory(given.model_dir, given.data_dir, count):,} MiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
