"""How long a folder of many small images takes to start, and what becomes of the damaged ones among them.

    python benchmarks/starts.py --output=/tmp/starts
    python benchmarks/starts.py --output=/tmp/starts --files=200000 --parts=epoch,orders

- `starts`: from the start of `run.py` to its first step, twice: the second start finds the list of the first. The table
  of docs/own_images.md, "Large folders".
- `epoch`: a whole epoch over a folder of which 1 % of the files are damaged. The run must end, name all of them, and no
  other.
- `orders`: two workers see, batch by batch, what one worker alone sees. None of them knows beforehand what is damaged.

The files are hard links of a few images. Every command runs in a process of its own, and what it keeps for the next
start lies in --output. Prints the tables. The exit status is 0 where what must be so is so.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import psutil
from PIL import Image

import console
import engine

SIZE, CLASSES, SEEDS = 32, 10, 64  # A file system may allow 65,000 links to a file.
DAMAGED_OF = 100  # One file of so many.
BATCH = 256
FIRST_STEP = re.compile(r"step 1 of ")
NAMED = re.compile(r"an image cannot be read: (.*?): ")
NETWORK = ["--resnet_depth=10"]
# What a real run has, in as little time as possible.
EPOCH = [
    *NETWORK, "--mode=train", "--train_mode=supervised", "--eval_split=train", "--image_size=16",
    "--width_multiplier=0.125", "--train_epochs=1", f"--train_batch_size={BATCH}", "--max_corrupt_fraction=0.02",
]  # fmt: skip
PARTS = ("starts", "epoch", "orders")


class Start(NamedTuple):
    """From the start of a command to its first step.

    Attributes:
      seconds: by the clock.
      processor: of all cores.
    """

    seconds: float
    processor: float


class Index(NamedTuple):
    """The names and labels of a folder.

    Attributes:
      first, second: how long it took to have them, without and with the list of the time before.
      bytes_per_image: what they take in memory.
    """

    first: float
    second: float
    bytes_per_image: float


def make_folder(folder: Path, count: int, damaged: bool) -> list[str]:
    """Fills `folder` with `count` files in class folders. Returns the paths of the damaged ones, relative to it."""
    seeds, ways = _seeds(folder.with_name(folder.name + "_seeds"))
    for label in range(CLASSES):
        (folder / f"class {label}").mkdir(parents=True)
    bad = []
    for number in range(count):
        path = f"class {number % CLASSES}/{number:07d}.jpg"
        # The places of the damaged ones, 37, 138, 239, ..., are of every class.
        is_bad = damaged and (number - number // DAMAGED_OF) % DAMAGED_OF == 37
        os.link((ways if is_bad else seeds)[number % (len(ways) if is_bad else SEEDS)], folder / path)
        if is_bad:
            bad.append(path)
    return bad


def _seeds(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images, and files that look like images."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    sound, damaged = [], []
    for number in range(SEEDS):
        coarse = Image.fromarray(random.integers(0, 256, [8, 8, 3], np.uint8))
        content = io.BytesIO()
        coarse.resize((SIZE, SIZE)).save(content, "JPEG", quality=90)
        path = folder / f"{number}.jpg"
        path.write_bytes(content.getvalue())
        sound.append(path)
    whole = sound[0].read_bytes()
    for number, content_of_it in enumerate((whole[: len(whole) // 2], b"", b"no image", bytes(200))):
        path = folder / f"damaged_{number}.jpg"
        path.write_bytes(content_of_it)
        damaged.append(path)
    return sound, damaged


def start(flags: Sequence[str], cache: Path, log: Path) -> Start:
    """Starts run.py, and stops the clock at its first step. Then it may end."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, str(ROOT / "run.py"), *flags]
    began = time.monotonic()
    measured = None
    with (
        open(log, "w") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run,
    ):
        assert run.stdout
        process = psutil.Process(run.pid)
        for line in run.stdout:
            if measured is None and FIRST_STEP.search(line):
                times = process.cpu_times()
                measured = Start(time.monotonic() - began, times.user + times.system)
            said.write(line)
    if run.returncode or measured is None:
        raise SystemExit(f"the command has failed: see {log}")
    return measured


def index_of(folder: Path, cache: Path) -> Index:
    """Finds the names and labels of a folder twice, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, f"--output={folder}", "--parts=index"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return Index(*json.loads(done.stdout.splitlines()[-1]))


def print_index(folder: str) -> None:
    """What `index_of` reads."""
    with engine.quiet_import():
        import sources
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        found = sources.load("image_folder", "train", folder)
        seconds.append(time.monotonic() - began)
    assert isinstance(found, sources.FileSource)
    size = found.files.content.nbytes + found.files.begins.nbytes + found.labels.nbytes
    print(json.dumps([*seconds, size / found.examples]))


def starts(output: Path, folder: Path, flags: Sequence[str]) -> tuple[Start, Start, Index]:
    """The first and the second start on a folder, and its names and labels."""
    measured = []
    cache = output / f"{folder.name}_cache"
    for name in ("first", "second"):
        model_dir = output / f"{folder.name}_{name}"
        given = ["--mode=train", "--train_steps=1", *NETWORK, f"--data_dir={folder}", f"--model_dir={model_dir}"]
        measured.append(start([*given, *flags], cache, output / f"{folder.name}_{name}.log"))
    return measured[0], measured[1], index_of(folder, output / f"{folder.name}_index_cache")


def row(what: str, first: Start, second: Start, index: Index) -> str:
    """A line of the table of starts."""
    cells = [f"{each.seconds:.1f} s ({each.processor:.1f})" for each in (first, second)]
    cells += [f"{index.first:.2f} s, {index.second:.2f} s", f"{index.bytes_per_image:.0f} bytes"]
    return f"| {what} | {' | '.join(cells)} |"


def epoch(output: Path, folder: Path, bad: Sequence[str], files: int) -> bool:
    """Trains for an epoch. Returns whether the run has ended, and has named the damaged files and no other."""
    model_dir, log = output / "epoch", output / "epoch.log"
    began = time.monotonic()
    took = start([*EPOCH, f"--data_dir={folder}", f"--model_dir={model_dir}"], output / "epoch_cache", log)
    seconds = time.monotonic() - began
    named = {str(Path(path).relative_to(folder)) for path in NAMED.findall(log.read_text())}
    missing, wrong = set(bad) - named, named - set(bad)
    step = json.loads((model_dir / "config.json").read_text())["train_examples"] // BATCH + 1
    console.say(
        f"an epoch over {files:,} files, {len(bad):,} of them damaged: {step:,} steps in {seconds:.0f} s, the first "
        f"after {took.seconds:.1f} s; {len(named):,} named, {len(missing)} missing, {len(wrong)} wrong"
    )
    return not missing and not wrong and (model_dir / f"ckpt-{step}.index").exists()


def orders(output: Path, folder: Path, bad: Sequence[str]) -> bool:
    """Reads an epoch by one worker, and by two. Returns whether the two see what the one sees, and nothing damaged."""
    with engine.quiet_import():
        import tensorflow as tf
        from absl import logging

        import augment
        import data
        import sources
    logging.set_verbosity(logging.ERROR)  # It would name every damaged image again.
    paths = sources.load_folder(str(folder)).names
    steps = len(paths) // BATCH

    def seen(worker: int, workers: int) -> np.ndarray:
        """The numbers of the images that a worker sees, [steps, its share of a batch]."""
        os.environ["XDG_CACHE_HOME"] = str(output / f"orders_cache_{worker}_of_{workers}")
        # The label of an image is its number, so that the labels of a batch say which images it has.
        source = sources.file_source(str(folder), paths, np.arange(len(paths)), [])
        context = tf.distribute.InputContext(workers, worker, workers)

        def stream(taken: int) -> tf.data.Dataset:
            views = {"image": augment.View(lambda image, seed: tf.reduce_mean(tf.cast(image, tf.float32)))}
            return data.train_stream(source, views, BATCH, 0, taken, context)

        batches = data.patient_batches(source, stream)
        return np.stack([next(batches)["label"].numpy() for _ in range(steps)])

    alone = seen(0, 1)
    together = np.concatenate([seen(0, 2), seen(1, 2)], axis=1)
    same = bool((alone == together).all())
    read = {paths[number] for number in alone.ravel()}
    good = same and not read & set(bad)
    how = "the same" if same else f"not the same in {(alone != together).any(1).sum():,}"
    console.say(f"two workers: {how} of {steps:,} batches; {len(read & set(bad)):,} damaged images in them")
    return good


def folders(output: Path, counts: Sequence[int]) -> Iterator[tuple[int, Path, list[str]]]:
    """The folders: of each size a sound one, and of the largest one with damaged files, with their paths."""
    for count, damaged in [*((count, False) for count in counts), (max(counts), True)]:
        folder = output / f"images_{count}{'_damaged' if damaged else ''}"
        yield count, folder, make_folder(folder, count, damaged)


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="an empty folder for the images, the runs and their logs")
    parser.add_argument("--files", default="2000,200000", help="how many files; default: 2000,200000")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("flags", nargs="*", help="more flags of the starts, behind --")
    given = parser.parse_args(argv)
    if given.parts == "index":
        print_index(given.output)
        return 0
    parts = given.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts={given.parts}: some of {', '.join(PARTS)}")
    output = Path(given.output).resolve()
    if output.exists() and any(output.iterdir()):
        parser.error(f"--output={given.output} is not empty: name another folder")
    made = list(folders(output, [int(count) for count in given.files.split(",")]))
    time.sleep(3)  # The list of a folder that has changed within two seconds is not kept.
    rows, good = [], True
    count, damaged, bad = made[-1]
    if "starts" in parts:
        console.say(
            "| files of 32 pixels | first start (processor) | second | names and labels, first and second | memory |\n"
            "| --- | --- | --- | --- | --- |"
        )
        for files, folder, damaged_here in made:
            what = f"{files:,}" + (", 1 % of them damaged" if damaged_here else "")
            rows.append(row(what, *starts(output, folder, given.flags)))
            console.say(rows[-1])
    if "epoch" in parts:
        good &= epoch(output, damaged, bad, count)
    if "orders" in parts:
        good &= orders(output, damaged, bad)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
