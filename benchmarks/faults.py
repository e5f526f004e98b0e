"""Kills, crowds and damages runs of this program, and says what was lost: the table of docs/reliability.md.

    python benchmarks/faults.py --output=runs/faults
    python benchmarks/faults.py --output=runs/faults --only=checkpoints,disks

Every fault happens to a real command in a process of its own. An uninterrupted run of the same command says what the
end must be: the same weights, optimizer, momentum encoder, queue and step, to the last bit, and the same TensorBoard
curve, with every step once. All runs have --deterministic. The networks are tiny, since the size changes nothing here.

A step's loss depends on its images, so a curve that is equal to the last bit says that every step saw its own images:
"examples lost or twice" are those of the steps that lack, that stand there twice, or that differ.

Prints a table, and writes table.md and results.json into --output. The exit status is 0 where everything survived.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import console
import engine

with engine.quiet_import():
    import bits
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import checkpoint.checksums as checksums

RUN_AGAIN = 75  # The exit status of a run that stopped before its end and can go on.
MISTAKE = 2
BATCH, STEPS, SAVE_EVERY = 16, 300, 20
NETWORK = ["--resnet_depth=10", "--width_multiplier=0.125", "--image_size=16"]
LENGTH = [f"--train_batch_size={BATCH}", f"--train_steps={STEPS}", f"--checkpoint_steps={SAVE_EVERY}"]
ALWAYS = [*LENGTH, "--mode=train", "--summary_steps=1", "--deterministic", "--learning_rate=0.05", "--warmup_epochs=0"]
MEMORY = [*NETWORK, "--train_mode=pretrain", "--memory=queue", "--memory_size=64", "--optimizer=momentum"]
SECONDS = 1800  # No command takes longer, also where other work keeps the machine busy, unless it hangs.
DISK_BYTES = 200_000_000  # of a disk that goes bad
FAILS = "the disk fails, and can then be read only"


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      fault: what happened.
      to: to which run.
      tried, survived: how often.
      steps_lost: the most steps that had to be taken again after one fault.
      examples: lost or seen twice, over all.
      tensors: of the final checkpoint that differ from the uninterrupted run's in a bit.
      note: what the program said or did.
    """

    fault: str
    to: str
    tried: int
    survived: int
    steps_lost: int | None = None
    examples: int | None = None
    tensors: int | None = None
    note: str = ""


class Scenario(NamedTuple):
    """A training command: its name, and its flags without --model_dir."""

    name: str
    flags: list[str]


def start(flags: Sequence[str], log: Path, **more: str) -> subprocess.Popen:
    """Starts run.py with these flags, in a process group of its own. What it says is added to `log`."""
    command = [sys.executable, str(ROOT / "run.py"), *flags]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **more}
    with open(log, "a") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def end(process: subprocess.Popen) -> int:
    """Waits until a command has ended. Returns its exit status: -9 where it hung and had to be killed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run(flags: Sequence[str], log: Path, **more: str) -> int:
    """Runs run.py to its end. Returns its exit status."""
    return end(start(flags, log, **more))


def last_line(log: Path) -> str:
    """The last line of what a command said that is not empty."""
    return next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "nothing was said")


# What a run left


def newest(model_dir: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    found = [re.fullmatch(r"ckpt-(\d+)\.index", path.name) for path in model_dir.glob("ckpt-*.index")]
    return max((int(match[1]) for match in found if match), default=0)


def differing_tensors(one: Path, other: Path) -> int:
    """How many tensors of the last checkpoints of two runs are not equal to the last bit."""
    return len(bits.different(str(one), str(other)))


def curve(model_dir: Path) -> Counter[tuple[str, int, float]]:
    """Every (scalar, step, value) of a run's training as TensorBoard reads them, but for times."""
    events = EventAccumulator(str(model_dir / "train"), size_guidance={"tensors": 0})
    events.Reload()
    found: Counter[tuple[str, int, float]] = Counter()
    for tag in events.Tags()["tensors"]:
        if "images_per_second" not in tag and not tag.startswith("time/"):
            found.update((tag, event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors(tag))
    return found


def wrong_examples(one: Path, other: Path) -> int:
    """The examples of the steps whose scalars lack in one of two runs, are there twice, or differ."""
    differing = (curve(one) - curve(other)) + (curve(other) - curve(one))
    return BATCH * len({step for _, step, _ in differing})


def compared(fault: str, scenario: Scenario, tried: int, reference: Path, folder: Path, **more) -> Row:
    """A row about a run that has gone on to its end: it has survived where it ended as the reference did."""
    examples, tensors = wrong_examples(reference, folder), differing_tensors(reference, folder)
    survived = tried if not examples and not tensors else 0
    return Row(fault, scenario.name, tried, survived, examples=examples, tensors=tensors, **more)


class Workplace:
    """The folder of all runs, the data in it, and the uninterrupted runs."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.images = folder / "images"
        write_images(self.images)

    def fresh(self, name: str) -> Path:
        """An empty place for a run."""
        path = self.folder / name
        if path.is_mount():  # This program was killed the last time.
            subprocess.run(["umount", "-l", path], check=True)
        shutil.rmtree(path, ignore_errors=True)
        self.log(path).unlink(missing_ok=True)
        return path

    def log(self, model_dir: Path) -> Path:
        return model_dir.with_suffix(".log")

    def uninterrupted(self, scenario: Scenario) -> Path:
        """The folder of the run that nothing happened to. It is made once."""
        folder = self.folder / "uninterrupted" / scenario.name.replace(" ", "_")
        if newest(folder) < STEPS:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            status = run([*scenario.flags, f"--model_dir={folder}"], self.log(folder))
            if status:
                raise SystemExit(f"{scenario.name} does not even end without a fault: see {self.log(folder)}")
        return folder

    def scenarios(self) -> list[Scenario]:
        """A command of each kind, on each kind of data."""
        digits = Scenario("pretraining with memory, digits", [*ALWAYS, *MEMORY, "--dataset=digits"])
        folder = [f"--data_dir={self.images}", "--eval_split=test", "--recipe=paper", "--use_blur=false"]
        pretrain = Scenario("pretraining with memory, image folder", [*ALWAYS, *MEMORY, *folder])
        pretrained = f"--checkpoint={self.uninterrupted(pretrain)}"
        labels = ["--labels_per_class=20", "--optimizer=momentum"]
        finetune = Scenario(
            "fine-tuning, image folder", [*ALWAYS, "--train_mode=finetune", pretrained, *folder, *labels]
        )
        teacher = f"--teacher={self.uninterrupted(finetune)}"
        distill = Scenario(
            "distillation, image folder",
            [*ALWAYS, "--train_mode=distill", pretrained, teacher, *folder, "--distill_neighbors=5", *labels],
        )
        supervised = Scenario(
            "supervised, TFDS", [*ALWAYS, *NETWORK, "--train_mode=supervised", "--optimizer=momentum", *self.tfds()]
        )
        return [digits, pretrain, finetune, distill, supervised]

    def tfds(self) -> list[str]:
        """The flags of a TensorFlow data set with the same images, prepared here."""
        import tensorflow_datasets

        where = self.folder / "tfds"
        builder = tensorflow_datasets.ImageFolder(str(self.images))
        made = where / "digit_images"
        if not made.exists():
            split = builder.as_dataset("train")
            tensorflow_datasets.dataset_builders.store_as_tfds_dataset(
                name="digit_images",
                version="1.0.0",
                features=tensorflow_datasets.features.FeaturesDict(
                    {
                        "image": tensorflow_datasets.features.Image(shape=(None, None, 3)),
                        "label": tensorflow_datasets.features.ClassLabel(num_classes=10),
                    }
                ),
                split_datasets={"train": split.map(lambda e: {"image": e["image"], "label": e["label"]})},
                data_dir=str(where),
                disable_shuffling=True,
            )
        return ["--dataset=digit_images", f"--data_dir={where}", "--eval_split=train"]


def write_images(folder: Path, per_class: int = 40) -> None:
    """Writes digits as PNG files into folder/train/<digit>/ and folder/test/<digit>/."""
    bunch = load_digits()
    for digit in range(10):
        for place, row in enumerate(np.flatnonzero(bunch.target == digit)[: per_class + 5]):
            path = folder / ("train" if place < per_class else "test") / str(digit) / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                pixels = np.kron(bunch.images[row] * (255 / 16), np.ones([2, 2])).astype(np.uint8)
                Image.fromarray(pixels).save(path)


# kill -9


def wait_for_training(process: subprocess.Popen, model_dir: Path) -> None:
    """Waits until this process has taken a step, or has ended."""
    while process.poll() is None:
        if any(b"train/loss" in path.read_bytes() for path in model_dir.glob(f"train/events*.{process.pid}")):
            return
        time.sleep(0.02)


def is_saving(model_dir: Path) -> bool:
    """Whether a checkpoint is being written: it has files whose names are not final."""
    with contextlib.suppress(FileNotFoundError):
        return any("temp" in name or name.endswith(".tmp") for name in os.listdir(model_dir) if "ckpt" in name)
    return False


def kill(process: subprocess.Popen, model_dir: Path, in_save: bool, saves: int, seconds: float) -> bool:
    """Kills a run after so many saves: inside the next, or so many seconds later. Returns whether it still ran."""
    wait_for_training(process, model_dir)
    wanted = newest(model_dir) + saves * SAVE_EVERY
    while process.poll() is None and newest(model_dir) < wanted:
        time.sleep(0.002)
    if in_save:
        while process.poll() is None and not is_saving(model_dir):
            time.sleep(0.0005)
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
    running = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running


def kills(work: Workplace, count: int) -> Iterator[Row]:
    """kill -9, between saves and inside them: `count` times for the first scenario, a quarter of it for the others."""
    for place, scenario in enumerate(work.scenarios()):
        wanted = count if place == 0 else max(3, count // 4)
        reference = work.uninterrupted(scenario)
        done = in_saves = runs = most_lost = 0
        wrong: list[tuple[int, int]] = []
        while done < wanted:
            folder = work.fresh(f"kills_{scenario.name.replace(' ', '_')}_{runs}")
            command, ended = [*scenario.flags, f"--model_dir={folder}"], False
            while not ended:
                process = start(command, work.log(folder))
                if done >= wanted:
                    ended = end(process) == 0
                    break
                in_save = done % 2 == 1
                if kill(process, folder, in_save, work.random.randrange(3), work.random.uniform(0.0, 1.0)):
                    done, in_saves = done + 1, in_saves + (in_save and is_saving(folder))
                    most_lost = max(most_lost, last_step(folder) - newest(folder))
                else:
                    ended = process.returncode == 0
                    if not ended:
                        break
            runs += 1
            wrong.append(
                (wrong_examples(reference, folder), differing_tensors(reference, folder)) if ended else (-1, -1)
            )
        bad = sum(pair != (0, 0) for pair in wrong)
        yield Row(
            "kill -9", scenario.name, done, done if not bad else 0, most_lost, sum(pair[0] for pair in wrong),
            sum(pair[1] for pair in wrong), f"{in_saves} of them with a save half written; {runs} runs to their end",
        )  # fmt: skip


def last_step(model_dir: Path) -> int:
    """The last step whose scalars a run has written."""
    return max((step for _, step, _ in curve(model_dir)), default=0)


# Damaged checkpoints


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


DATA, INDEX = ".data-00000-of-00001", ".index"
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "the newest checkpoint is cut in half": (DATA, _truncate),
    "one bit of its tensors is flipped": (DATA, _flip),
    "one bit of its index is flipped": (INDEX, _flip),
    "its tensors are empty": (DATA, _empty),
    "its index is empty": (INDEX, _empty),
    "its tensors are gone": (DATA, Path.unlink),
}


def checkpoints(work: Workplace) -> Iterator[Row]:
    """Six kinds of damage to the newest checkpoint of a run."""
    scenario = work.scenarios()[0]
    reference = work.uninterrupted(scenario)
    for fault, (suffix, damage) in DAMAGES.items():
        folder = work.fresh(f"damage_{fault.replace(' ', '_')}")
        shutil.copytree(reference, folder)
        damage(folder / f"ckpt-{STEPS}{suffix}")
        status = run([*scenario.flags, f"--model_dir={folder}"], work.log(folder))
        said = work.log(folder).read_text()
        named = "skipped the checkpoint" in said and f"ckpt-{STEPS}" in said
        if status or not named:
            yield Row(fault, scenario.name, 1, 0, note=f"status {status}: {last_line(work.log(folder))}")
            continue
        yield compared(fault, scenario, 1, reference, folder, steps_lost=SAVE_EVERY, note="goes on from the one before")


# Disks


class Disk:
    """A small file system in a folder. Used as a context, which mounts it at the beginning and unmounts it at the end.

    Needs the right to mount: the context raises `CannotMount` where this process has none.

    Args:
      folder: where it is mounted.
      in_memory: whether it is a tmpfs; otherwise it is an ext4 in a file beside the folder.
    """

    def __init__(self, folder: Path, in_memory: bool) -> None:
        self.folder, self._image = folder, None if in_memory else folder.with_suffix(".ext4")

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True)
        try:
            if self._image:
                with open(self._image, "wb") as file:
                    file.truncate(DISK_BYTES)
                subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True)
            self.mount()
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotMount(str(error)) from error
        return self

    def __exit__(self, *error: object) -> None:
        self.unmount()

    def mount(self) -> None:
        """Mounts it; what is in it stays, unless it is in memory."""
        what = ["-o", "loop", self._image] if self._image else ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs"]
        subprocess.run(["mount", *what, self.folder], check=True)

    def unmount(self) -> None:
        """Unmounts it, as soon as nothing in it is open."""
        subprocess.run(["umount", "-l", self.folder], check=True)

    def fill(self, free: int) -> Path:
        """Fills it up to so many bytes. Returns the file that does."""
        filler = self.folder / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while shutil.disk_usage(self.folder).free > free:
                file.write(bytes(1 << 14))
        return filler

    def fail(self) -> None:
        """Makes it read-only as a disk that fails does: also for open files, and what it had not yet taken is lost.

        `mount -o remount,ro` would be refused, since the run's files are open. This is what ext4 does by itself when a
        write to its journal fails.
        """
        subprocess.run(["mount", "-o", "remount,abort", self.folder], check=True)

    def repair(self) -> None:
        """Makes it whole again, as a restart of the machine does."""
        self.unmount()
        self.mount()


class CannotMount(Exception):
    """This process may not mount a file system."""


def disks(work: Workplace) -> Iterator[Row]:
    """A disk that is full, and one that fails and can then be read only. The run goes on when the cause is gone."""
    scenario = work.scenarios()[0]
    reference = work.uninterrupted(scenario)
    size = sum(path.stat().st_size for path in reference.glob(f"ckpt-{STEPS}.*"))
    faults = {"the disk is full, at a checkpoint": size // 2, "the disk is full, to the last byte": 0, FAILS: None}
    for fault, free in faults.items():
        place = work.fresh(f"disk_{fault.replace(' ', '_').replace(',', '')}")
        try:
            with Disk(place, in_memory=free is not None) as disk:
                yield on_a_bad_disk(fault, free, disk, scenario, reference, work.log(place))
        except CannotMount:
            yield Row(fault, scenario.name, 0, 0, note="not tried: no file system may be mounted here")


def on_a_bad_disk(fault: str, free: int | None, disk: Disk, scenario: Scenario, reference: Path, log: Path) -> Row:
    """Lets a disk go bad after a checkpoint, and gives the same command again when it is good.

    `free` is how many bytes are free on the full disk; None: the disk fails.
    """
    folder = disk.folder / "run"
    command = [*scenario.flags, f"--model_dir={folder}", "--keep_checkpoint_max=1000"]
    first = start(command, log)
    while first.poll() is None and newest(folder) == 0:
        time.sleep(0.01)
    filler = None
    if free is None:
        disk.fail()
    else:
        filler = disk.fill(free)
    status, said = end(first), log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("run.py: ")]
    reached = last_step(folder)
    if filler:
        filler.unlink()
    else:
        disk.repair()
    kept = newest(folder)
    broken = checksums.damage(str(folder / f"ckpt-{kept}"))
    clear = status == MISTAKE and len(lines) == 1 and "Traceback" not in said
    again = run(command, log)
    if not clear or broken or again:
        return Row(fault, scenario.name, 1, 0, note=f"status {status}, then {again}: {broken} {last_line(log)}")
    note = f"status {status}, one line: {lines[0].removeprefix('run.py: ')}".replace(str(disk.folder), "...")
    return compared(fault, scenario, 1, reference, folder, steps_lost=reached - kept, note=note)


# Signals, time limits, company


def signals(work: Workplace) -> Iterator[Row]:
    """SIGTERM and SIGINT, and a time limit, until the run has come to its end."""
    scenario = work.scenarios()[0]
    reference = work.uninterrupted(scenario)
    for fault, which in (("SIGTERM", signal.SIGTERM), ("SIGINT (Ctrl-C)", signal.SIGINT)):
        folder = work.fresh(f"signal_{which.name}")
        command, sent, statuses, most_lost = [*scenario.flags, f"--model_dir={folder}"], 0, [], 0
        while True:
            process = start(command, work.log(folder))
            if sent < 3:
                wait_for_training(process, folder)
                time.sleep(work.random.uniform(0.05, 1.0))
                process.send_signal(which)
            statuses.append(end(process))
            most_lost = max(most_lost, last_step(folder) - newest(folder))
            if statuses[-1] != RUN_AGAIN:
                break
            sent += 1
        if statuses[-1]:
            yield Row(fault, scenario.name, sent + 1, 0, note=f"statuses {statuses}: {last_line(work.log(folder))}")
            continue
        note = f"statuses {', '.join(map(str, statuses))}"
        yield compared(fault, scenario, sent, reference, folder, steps_lost=most_lost, note=note)
    folder, statuses = work.fresh("time_limit"), []
    while not statuses or (statuses[-1] == RUN_AGAIN and len(statuses) < 20):
        limit = [f"--model_dir={folder}", "--max_minutes=0.3"] if len(statuses) < 2 else [f"--model_dir={folder}"]
        statuses.append(run([*scenario.flags, *limit], work.log(folder)))
    tried = statuses.count(RUN_AGAIN)
    if statuses[-1]:
        yield Row("time limit", scenario.name, tried, 0, note=f"statuses {statuses}: {last_line(work.log(folder))}")
    else:
        note = f"statuses {', '.join(map(str, statuses))}"
        yield compared("time limit", scenario, tried, reference, folder, steps_lost=0, note=note)


def company(work: Workplace) -> Iterator[Row]:
    """A second run in the folder of a run that trains."""
    scenario = work.scenarios()[0]
    reference = work.uninterrupted(scenario)
    folder = work.fresh("company")
    command = [*scenario.flags, f"--model_dir={folder}"]
    first = start(command, work.log(folder))
    wait_for_training(first, folder)
    second_log = folder.with_suffix(".second.log")
    second = run(command, second_log)
    status = end(first)
    fault = "a second run in the same folder"
    if status or second != MISTAKE:
        yield Row(fault, scenario.name, 1, 0, note=f"statuses {status} and {second}: {last_line(second_log)}")
        return
    yield compared(fault, scenario, 1, reference, folder, note="the second is refused, status 2")


def workers(work: Workplace) -> Iterator[Row]:
    """One of two workers is killed; then both are started again."""
    fault, to = "kill -9 of one of two workers", "pretraining with memory, digits"
    flags = [flag for flag in [*ALWAYS, *MEMORY, "--dataset=digits", "--global_bn=False"] if flag != "--deterministic"]
    folder = work.fresh("workers")

    def both() -> list[subprocess.Popen]:
        cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
        tasks = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}) for i in range(2)]
        command = [*flags, f"--model_dir={folder}"]
        return [start(command, folder.with_suffix(f".{i}.log"), TF_CONFIG=task) for i, task in enumerate(tasks)]

    first = both()
    wait_for_training(first[0], folder)
    time.sleep(1.0)
    os.killpg(first[1].pid, signal.SIGKILL)
    began = time.monotonic()
    status = end(first[0])
    waited, lost = time.monotonic() - began, last_step(folder) - newest(folder)
    statuses = [end(process) for process in both()]
    steps = Counter(step for tag, step, _ in curve(folder) if tag.endswith("/loss"))
    whole = steps == Counter(range(1, STEPS + 1)) and newest(folder) == STEPS
    good = status == RUN_AGAIN and statuses == [0, 0] and whole
    note = f"the other ended {waited:.0f} s later, status {status}; started again, both went on"
    yield Row(fault, to, 1, int(good), lost, BATCH * sum(abs(steps[s] - 1) for s in range(1, STEPS + 1)), None, note)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# What comes from outside


def images(work: Workplace) -> Iterator[Row]:
    """A folder in which one image of a hundred is damaged, each in one of four ways."""
    folder, model_dir = work.fresh("damaged_images"), work.fresh("images_run")
    shutil.copytree(work.images, folder)
    paths = sorted((folder / "train").rglob("*.png"))
    bad = work.random.sample(paths, len(paths) // 100)
    ways = (_truncate, _empty, lambda path: path.write_bytes(b"no image"), lambda path: path.write_bytes(bytes(200)))
    for place, path in enumerate(bad):
        ways[place % len(ways)](path)
    flags = [*ALWAYS, *MEMORY, f"--data_dir={folder}", "--eval_split=test", "--recipe=paper", "--use_blur=false"]
    status = run([*flags, "--max_corrupt_fraction=0.02", f"--model_dir={model_dir}"], work.log(model_dir))
    said = work.log(model_dir).read_text()
    named = sum(path.name in said and f"{path.parent.name}/{path.name}" in said for path in bad)
    good = status == 0 and newest(model_dir) == STEPS and named == len(bad)
    note = f"{named} of {len(bad)} named, others in their places" if not status else last_line(work.log(model_dir))
    yield Row("1 % of the images damaged", "pretraining, image folder", len(bad), len(bad) if good else 0, note=note)


def commands(work: Workplace) -> Iterator[Row]:
    """The wrong command lines of the tests."""
    test = [sys.executable, "-m", "pytest", "-p", "no:xdist", str(ROOT / "tests" / "test_wrong_commands.py")]
    done = subprocess.run(test, cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed)", done.stdout)}
    good, bad = counts.get("passed", 0), counts.get("failed", 0)
    yield Row("wrong command lines", "run.py", good + bad, good, note="status 2, one line, nothing written")


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "checkpoints": checkpoints,
    "disks": disks,
    "signals": signals,
    "company": company,
    "workers": workers,
    "images": images,
    "commands": commands,
}


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| fault | to | tried | survived | steps lost, at most | examples lost or twice | tensors different | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Does what the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", default="runs/faults", help="the folder of everything")
    parser.add_argument("--only", default="", help=f"some of kills, {', '.join(PARTS)}; default: all")
    parser.add_argument("--kills", type=int, default=20, help="how many in the first series; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills; default: 0")
    given = parser.parse_args()
    wanted = given.only.split(",") if given.only else ["kills", *PARTS]
    unknown = set(wanted) - {"kills", *PARTS}
    if unknown:
        parser.error(f"--only={given.only}: {', '.join(sorted(unknown))} is none of kills, {', '.join(PARTS)}")
    work = Workplace(Path(given.output).resolve(), given.seed)
    rows: list[Row] = []
    for name in wanted:
        for row in kills(work, given.kills) if name == "kills" else PARTS[name](work):
            rows.append(row)
            console.say(markdown([row]).splitlines()[-1])
    (work.folder / "table.md").write_text(markdown(rows))
    (work.folder / "results.json").write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    console.say(f"\n{markdown(rows)}\nIn {work.folder}: table.md, results.json, and the runs with their logs.")
    return 0 if all(row.survived == row.tried for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
