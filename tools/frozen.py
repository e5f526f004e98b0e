"""Accuracies without any training of a network: raw pixels, an untrained network, a pretrained one, with few labels.

    python tools/frozen.py --pretrained=runs/pretrain --data_dir=DIR --labels_per_class=4 --label_seeds=0,1,2 \
        --output=runs/frozen

The labels are those that run.py draws by the same --labels_per_class and --label_seed from the same split, and the
test images are all labelled images of --eval_split. Writes result.json into --output. Without --pretrained, it only
draws the labels and opens both splits, to find a mistake there before hours of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import engine

with engine.quiet_import():
    import keras
    import tensorflow as tf

import checkpoint
import data
import predict
import quality
import sources
import tasks
from config import Config, from_dict
from errors import UserError

Draw = tuple[int, int]  # labels a class, label seed

# kNN on pixels gains nothing from more of them than this, and 10,000 images of this size take 120 MB.
PIXEL_SIZE = 32
MAX_NEIGHBORS = 20
# The runs decide how many images may be unreadable. Here all of those are left out.
MAX_CORRUPT = 1.0


class Data(NamedTuple):
    """What is compared on.

    Attributes:
      bank: the images that have a label in any draw.
      rows: of each draw, where its images are in `bank`.
      test: the test split.
      train_images: how many images the training split has.
    """

    bank: sources.Source
    rows: dict[Draw, np.ndarray]
    test: sources.Source
    train_images: int


def open_data(config: Config, counts: Sequence[int], seeds: Sequence[int]) -> Data:
    """Opens both splits and draws the labels, as the runs do.

    Args:
      config: the data and their two splits.
      counts: the numbers of labels a class.
      seeds: the label seeds.

    Raises:
      UserError: where a split cannot be read, the test split has no labels, or a class has too few.
    """
    train = data.open_split(config, config.train_split, None, MAX_CORRUPT)
    known_by = f"--train_split={config.train_split}"
    test = data.open_split(config, config.eval_split, train.classes, MAX_CORRUPT, known_by)
    chosen = {(count, seed): data.draw_labelled(train, count, 0.0, seed) for count in counts for seed in seeds}
    if not test.has_labels:
        raise UserError(
            f"--eval_split={config.eval_split} has no labels to compare with: sort its images into class folders"
        )
    # In memory, each row is there: an image that cannot be read has been replaced.
    bank = train.with_labels({name for draw in chosen.values() for name in draw}, only=True).in_memory()
    place = {name: row for row, name in enumerate(bank.index()[0])}
    rows = {draw: np.array([place[name] for name in names]) for draw, names in chosen.items()}
    return Data(bank, rows, test, train.examples)


def accuracies(pretrained: checkpoint.Weights, opened: Data) -> list[dict[str, Any]]:
    """The accuracy on the test images of every method without training, for every draw of labels.

    The methods are `pixels` (kNN, the best over the number of neighbours, centring and whitening), `untrained` (kNN on
    the features h of the run's network as it was before its first step), and `frozen_knn` and `frozen_linear` (on the
    h of the pretrained network). Features are half whitened by the labelled images. kNN on them has as many neighbours
    as a class has labels, and at most 20.

    Raises:
      FloatingPointError: where the pretrained network's features are not finite.
    """
    config = from_dict(pretrained.config)
    networks = {"h": tasks.restore_network(pretrained), "untrained": untrained_network(config, pretrained.classes)}

    def features(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: network(images, training=False).h for name, network in networks.items()}

    def pixels(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"pixels": images}

    small = dataclasses.replace(config, image_size=min(config.image_size, PIXEL_SIZE))

    def outputs_of(source: sources.Source) -> dict[str, np.ndarray]:
        of_pixels = outputs(pixels, source, small, pretrained.step)
        return {**of_pixels, **outputs(features, source, config, pretrained.step)}

    bank, test = outputs_of(opened.bank), outputs_of(opened.test)
    found = []
    for (count, seed), rows in opened.rows.items():
        few = {name: values[rows] for name, values in bank.items()}
        for method, top_1 in _of_one_draw(few, test, min(count, MAX_NEIGHBORS)).items():
            found.append({"method": method, "labels_per_class": count, "label_seed": seed, "top_1": top_1})
    return found


def _of_one_draw(few: dict[str, np.ndarray], test: dict[str, np.ndarray], neighbors: int) -> dict[str, float]:
    """The accuracy of each method with these `few` labelled images."""
    labels = few["label"]

    def right(guesses: np.ndarray) -> float:
        return float(np.mean(guesses == test["label"]))

    return {
        "pixels": quality.best_pixel_knn(few["pixels"], labels, test["pixels"], test["label"]),
        "untrained": right(quality.knn_predictions(few["untrained"], labels, test["untrained"], neighbors)),
        "frozen_knn": right(quality.knn_predictions(few["h"], labels, test["h"], neighbors)),
        "frozen_linear": right(quality.linear_predictions(few["h"], labels, test["h"])),
    }


def untrained_network(config: Config, classes: Sequence[str]) -> Any:
    """The network of a run as it was before its first step: with the initial weights that the run's seed gives."""
    keras.utils.set_random_seed(config.seed)
    return tasks.make_task(config, classes).model


def outputs(
    of_images: Callable[[tf.Tensor], dict[str, tf.Tensor]], source: sources.Source, config: Config, step: int
) -> dict[str, np.ndarray]:
    """What `of_images` makes of the labelled images of a split, in their fixed order, and their `label` [n]."""
    batches = predict.predict(of_images, source, config, tf.distribute.get_strategy())
    kept = list(predict.only_finite(batches, step))
    whole = {name: np.concatenate([batch[name] for batch in kept]) for name in kept[0]}
    labelled = whole["label"] >= 0
    return {name: values[labelled] for name, values in whole.items()}


def numbers(text: str) -> list[int]:
    """Example: numbers("1,4,25") == [1, 4, 25]."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Computes the accuracies and writes them. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pretrained", default="", help="the folder of the pretraining run")
    parser.add_argument("--dataset", default="image_folder")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--eval_split", default="test")
    parser.add_argument("--labels", default="", help="a table with the labels of an image folder")
    parser.add_argument("--images", default="", help="a list of the images of an image folder")
    parser.add_argument("--labels_per_class", type=numbers, default=[1], help="one or several, such as 1,4,25")
    parser.add_argument("--label_seeds", type=numbers, default=[0], help="one or several, such as 0,1,2")
    parser.add_argument("--output", required=True, help="the folder of result.json")
    given = parser.parse_args()
    try:
        fields = ("dataset", "data_dir", "train_split", "eval_split", "labels", "images")
        config = Config(**{name: getattr(given, name) for name in fields})
        opened = open_data(config, given.labels_per_class, given.label_seeds)
        result: dict[str, Any] = {
            "classes": list(opened.test.classes),
            "train_images": opened.train_images,
            "test_images": int((opened.test.index()[1] >= 0).sum()),
        }
        if given.pretrained:
            result["accuracies"] = accuracies(checkpoint.Weights(given.pretrained, "pretrained"), opened)
    except (UserError, FloatingPointError) as mistake:
        print(f"frozen.py: error: {mistake}", file=sys.stderr)
        return 2 if isinstance(mistake, UserError) else 1
    try:
        os.makedirs(given.output, exist_ok=True)
        Path(given.output, "result.json").write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        print(f"frozen.py: error: --output={given.output}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
