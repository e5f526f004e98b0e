"""What suggested labels are worth: N labels of images that --mode=suggest would choose, against N random ones.

    python benchmarks/suggest.py --pretrained=runs/pretrain --data_dir=DIR --eval_split=test --counts=10,40 \
        --seeds=0,1,2 --output=runs/suggest

Each seed draws half of the training images; both ways choose from these. So they are compared in pairs, and the
intervals (95 %, Student's t) cover the choice of the images. A random choice is not balanced over the classes, since
nobody knows the classes of images without a label. Each choice is judged by logistic regression on the frozen features
(`quality.linear_predictions`), on all labelled images of --eval_split.

Prints a table, and writes it into --output. Every choice is written there too, as suggested_<count>_<seed>.csv and
random_<count>_<seed>.csv with the labels filled in, for fine-tuning with the same labels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np

import engine

with engine.quiet_import():
    import tensorflow as tf

import checkpoint
import comparison
import frozen
import predict
import quality
import sources
import tasks
from answers.images import names_of
from answers.spreadsheet import guarded, guarded_path, write_rows
from answers.suggestion import suggest
from config import from_dict
from errors import UserError

WAYS = ("suggested", "random")
POOL_SHARE = 0.5  # of the training images


class Trial(NamedTuple):
    """A choice of images and what came of it.

    Attributes:
      way: one of `WAYS`.
      count, seed: how many images, from which half.
      chosen: [count] indices into the training images.
      classes: how many classes are among them.
      top_1: the accuracy on the test images.
    """

    way: str
    count: int
    seed: int
    chosen: np.ndarray
    classes: int
    top_1: float


def trials(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    counts: Sequence[int],
    seeds: Sequence[int],
) -> list[Trial]:
    """Every choice, and its accuracy.

    Args:
      features, labels: [n, D] and [n] of the training images.
      test_features, test_labels: [m, D] and [m] of the test images.
      counts: how many images to choose.
      seeds: of the halves.
    """
    found = []
    for seed in seeds:
        random = np.random.default_rng(seed)
        pool = np.sort(random.permutation(len(labels))[: int(POOL_SHARE * len(labels))])
        for count in counts:
            suggested = pool[suggest(features[pool], np.zeros(len(pool), bool), count)]
            for way, chosen in zip(WAYS, (suggested, random.choice(pool, count, replace=False)), strict=True):
                classes = len(set(labels[chosen].tolist()))
                guesses = labels[chosen[:1]]  # With one class there is nothing to learn.
                if classes > 1:
                    guesses = quality.linear_predictions(features[chosen], labels[chosen], test_features)
                top_1 = float((guesses == test_labels).mean())
                found.append(Trial(way, count, seed, chosen, classes, top_1))
    return found


def table(found: Sequence[Trial], classes: int) -> str:
    """The means over the seeds, and the paired differences."""
    rows = ["| labels | random | suggested | difference | classes seen |", "| --- | --- | --- | --- | --- |"]
    for count in sorted({trial.count for trial in found}):
        of = {way: [trial for trial in found if (trial.way, trial.count) == (way, count)] for way in WAYS}
        values = {way: [trial.top_1 for trial in trials_of_way] for way, trials_of_way in of.items()}
        gains = [ours - theirs for ours, theirs in zip(values["suggested"], values["random"], strict=True)]
        seen = {way: np.mean([trial.classes for trial in trials_of_way]) for way, trials_of_way in of.items()}
        rows.append(
            f"| {count} | {in_percent(values['random'])} | {in_percent(values['suggested'])} | {in_percent(gains)} | "
            f"{seen['random']:.1f} and {seen['suggested']:.1f} of {classes} |"
        )
    return "\n".join(rows)


def in_percent(values: Sequence[float]) -> str:
    """The mean of some shares with its interval, in percent."""
    mean, half_width, _ = comparison.estimate(values)
    interval = "" if half_width is None else f" ± {100 * half_width:.1f}"
    return f"{100 * mean:.1f}{interval}%"


def features_of(weights: checkpoint.Weights, source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
    """The features h [n, D] and the labels [n] of all examples, in the fixed order of the source."""
    model = tasks.restore_network(weights)
    config = from_dict(weights.config)
    passed = predict.predict(
        lambda images: {"h": model(images, training=False).h}, source, config, tf.distribute.get_strategy()
    )
    batches = list(predict.only_finite(passed, weights.step))
    return np.concatenate([batch["h"] for batch in batches]), np.concatenate([batch["label"] for batch in batches])


def write_choice(path: Path, trial: Trial, names: Sequence[str], labels: np.ndarray, classes: Sequence[str]) -> None:
    """Writes the chosen images with their labels, as --labels takes them."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        chosen = ([guarded_path(names[i]), guarded(classes[labels[i]])] for i in trial.chosen)
        write_rows(file, [["path", "label"], *chosen])


def main(arguments: Sequence[str]) -> int:
    """Does what the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="a run, or one of its checkpoints")
    parser.add_argument("--dataset", default="image_folder")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--eval_split", default="test")
    parser.add_argument(
        "--counts", type=frozen.numbers, default=[10, 40], help="how many labels in all; default: 10,40"
    )
    parser.add_argument("--seeds", type=frozen.numbers, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/suggest"))
    given = parser.parse_args(arguments)
    try:
        weights = checkpoint.Weights(given.pretrained, "pretrained")
        train = sources.load(given.dataset, given.train_split, given.data_dir)
        test = sources.load(given.dataset, given.eval_split, given.data_dir, train.classes)
    except UserError as mistake:
        print(f"suggest.py: error: {mistake}", file=sys.stderr)
        return 2
    features, labels = features_of(weights, train)
    test_features, test_labels = features_of(weights, test)
    known = test_labels >= 0
    found = trials(features, labels, test_features[known], test_labels[known], given.counts, given.seeds)
    given.output.mkdir(parents=True, exist_ok=True)
    names = names_of(train, given.data_dir)
    for trial in found:
        path = given.output / f"{trial.way}_{trial.count}_{trial.seed}.csv"
        write_choice(path, trial, names, labels, train.classes)
    text = table(found, len(train.classes))
    (given.output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
