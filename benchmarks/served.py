"""What a trainer pays for its images with servers of data and without: images a second, and seconds of processor.

    python benchmarks/served.py

The images are photographs of ImageNet's usual size, of which pretraining makes two views of 224 pixels. The trainer
takes batches and does nothing else. Trainer and servers share this machine, so the clock says little about servers
that have machines of their own; the trainer's processor time says how many images one of its cores can take.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine

with engine.quiet_import():
    import tensorflow as tf

import numpy as np
import scaling
from PIL import Image

import augment
import data
import service
import sources

PHOTOGRAPHS, WIDTH, HEIGHT = 64, 500, 375
SIZE, BATCH = 224, 32
BEFORE = 4  # Batches before the measurement fill what is read ahead.


def write_photographs(folder: Path) -> None:
    """Writes JPEG files of smooth noise, which take as much room as photographs of this size."""
    random = np.random.default_rng(0)
    (folder / "train").mkdir()
    for number in range(PHOTOGRAPHS):
        small = Image.fromarray(random.integers(0, 256, [HEIGHT // 6, WIDTH // 6, 3], np.uint8))
        small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / "train" / f"{number}.jpg", quality=90)


def processor_seconds(process: int) -> float:
    """The seconds of processor that a process has taken so far, all its threads together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, servers: int, batches: int) -> str:
    """A row of the table: what so many servers and the trainer need for the batches."""
    source = sources.load("image_folder", "train", str(folder))
    views = {name: augment.pretrain_view(SIZE) for name in ("view_1", "view_2")}
    with scaling.data_servers(servers) as processes:

        def part(which: tuple[int, int] | None) -> tf.data.Dataset:
            return data.train_stream(source, views, BATCH, 0, part=which)

        stream = iter(service.joined(list(processes), part, 0, 1) if servers else part(None))
        for _ in range(BEFORE):
            next(stream)
        all_processes = [os.getpid(), *processes.values()]
        clock, before = time.perf_counter(), [processor_seconds(process) for process in all_processes]
        for _ in range(batches):
            next(stream)
        clock = time.perf_counter() - clock
        after = [processor_seconds(process) for process in all_processes]
    trainer, *others = (end - begin for begin, end in zip(before, after, strict=True))
    images = batches * BATCH
    by_servers = f"{1000 * sum(others) / images:.1f}" if servers else ""
    return (
        f"| {servers or 'none'} | {1000 * trainer / images:.1f} | {by_servers} | {images / trainer:,.0f} | "
        f"{images / (trainer + sum(others)):,.0f} | {images / clock:,.0f} |"
    )


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--batches", type=int, default=12)
    given = parser.parse_args()
    print(
        "| servers | ms of the trainer's processor an image | of the servers' | images a second of the trainer's "
        "processor | of all processors | by the clock |"
    )
    print("| --- " * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        for servers in (0, 1, 2):
            print(measure(Path(folder), servers, given.batches), flush=True)
    os._exit(0)  # TensorFlow would wait for the servers.


if __name__ == "__main__":
    main()
