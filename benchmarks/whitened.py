"""How far to whiten features: kNN, a linear classifier and spread labels, by how far the features are whitened.

    python benchmarks/whitened.py --pretrained=runs/pretrain --data_dir=DIR --labels_per_class=4 --label_seeds=0,1,2,3

Everything is measured on --split, which should be images that the network was trained on without their labels. kNN with
all labels is cross-validated in five parts, of its best number of neighbours in hindsight, beside raw pixels. With
--labels_per_class labels it is the mean over --label_seeds, on the images that are not labelled: kNN with as many
neighbours as a class has labels; logistic regression, whose penalty is the same for each degree; and the nearest
neighbours' graph of a distillation, along which the labels spread.

Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

import engine

with engine.quiet_import():
    import tensorflow as tf  # noqa: F401 - quietly, before all that imports it

import checkpoint
import frozen
import knn
import propagation
import quality
import recipe
import sources
import tasks
import whitening
from config import from_dict
from errors import UserError

MOST = 10_000  # So many images are looked at.
FOLDS = 5
PIXEL_SIZE = 24
FORMS = {"as they are": None, "centred": 0.0, "half whitened": whitening.HALF, "whitened": whitening.FULL}


class Forms:
    """Features in each of `FORMS`.

    Args:
      fitted: [m, D] features, by which others are whitened.
    """

    def __init__(self, fitted: np.ndarray) -> None:
        self._components = whitening.principal_components(knn.normalized(fitted))

    def of(self, features: np.ndarray, degree: float | None) -> np.ndarray:
        """`features` [n, D] at length 1, whitened to `degree` where that is given."""
        unit = knn.normalized(features)
        return unit if degree is None else knn.normalized(self._components.whitened(unit, degree))


def with_all_labels(features: np.ndarray, labels: np.ndarray) -> list[float]:
    """The accuracy of kNN, cross-validated, of its best number of neighbours, in each form."""
    hits: list[list[np.ndarray]] = [[] for _ in FORMS]
    for train, held_out in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, labels):
        forms = Forms(features[train])
        for of_form, degree in zip(hits, FORMS.values(), strict=True):
            guesses = votes(forms.of(features[train], degree), labels[train], forms.of(features[held_out], degree))
            of_form.append(guesses == labels[held_out])
    return [float(np.concatenate(of_form, axis=1).mean(axis=1).max()) for of_form in hits]


def with_few_labels(features: np.ndarray, labels: np.ndarray, count: int, seed: int) -> list[list[float]]:
    """The accuracies of kNN, logistic regression and spread labels on images without a label, in each form."""
    random = np.random.default_rng(seed)
    classes = np.unique(labels)
    chosen = np.concatenate([random.permutation(np.flatnonzero(labels == label))[:count] for label in classes])
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    seeds = (labels[:, np.newaxis] == classes) & np.isin(np.arange(len(labels)), chosen)[:, np.newaxis]
    of_labelled, of_all = Forms(features[chosen]), Forms(features)  # Classifiers know the labelled images alone.
    found = []
    for degree in FORMS.values():
        few, asked = of_labelled.of(features[chosen], degree), of_labelled.of(features[rest], degree)
        linear = LogisticRegression(C=quality.INVERSE_PENALTY, max_iter=quality.LINEAR_ITERATIONS)
        scale = np.sqrt(few.shape[1])
        with threadpool_limits(1, user_api="blas"):
            linear.fit(scale * few, labels[chosen])
        graph = propagation.neighbour_graph(of_all.of(features, degree), recipe.DISTILL_NEIGHBORS)
        spread = classes[propagation.propagate(graph, seeds.astype(np.float32)).argmax(axis=1)]
        guesses = votes(few, labels[chosen], asked, [count])[0], linear.predict(scale * asked), spread[rest]
        found.append([float(np.mean(guessed == labels[rest])) for guessed in guesses])
    return found


def votes(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, neighbors: Sequence[int] = quality.PIXEL_NEIGHBORS
) -> np.ndarray:
    """What a bank of these features votes for, [neighbors, n]."""
    filled = knn.Bank(*bank.shape)
    filled.add(bank, labels)
    return filled.votes(queries, neighbors)


def table(features: np.ndarray, pixels: np.ndarray, labels: np.ndarray, count: int, seeds: Sequence[int]) -> str:
    """A row for each way to whiten.

    Args:
      features: [n, D].
      pixels: [n, P] of the same images.
      labels: [n] of them, 0 or more.
      count, seeds: how many labels a class where there are few, and of which draws.
    """
    of_features, of_pixels = with_all_labels(features, labels), with_all_labels(pixels, labels)
    of_few = np.mean([with_few_labels(features, labels, count, seed) for seed in seeds], axis=0)  # [forms, 3]
    rows = [
        f"| features | kNN, all labels | raw pixels | kNN, {count} labels a class | linear | labels spread |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, *figures in zip(FORMS, of_features, of_pixels, *of_few.T, strict=True):
        rows.append(f"| {name} | {' | '.join(f'{100 * figure:.1f}%' for figure in figures)} |")
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    """Does what the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="a run, or one of its checkpoints")
    parser.add_argument("--dataset", default="image_folder")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--split", default="train")
    parser.add_argument("--labels_per_class", type=int, default=4)
    parser.add_argument("--label_seeds", type=frozen.numbers, default=[0, 1, 2, 3], help="default: 0,1,2,3")
    given = parser.parse_args(arguments)
    try:
        weights = checkpoint.Weights(given.pretrained, "pretrained")
        source = sources.load(given.dataset, given.split, given.data_dir)
    except UserError as mistake:
        print(f"whitened.py: error: {mistake}", file=sys.stderr)
        return 2
    config = from_dict(weights.config)
    network = tasks.restore_network(weights)
    seen = frozen.outputs(lambda images: {"h": network(images, training=False).h}, source, config, weights.step)
    small = dataclasses.replace(config, image_size=min(config.image_size, PIXEL_SIZE))
    pixels = frozen.outputs(lambda images: {"pixels": images}, source, small, weights.step)["pixels"]
    drawn = np.random.default_rng(0).permutation(len(pixels))[:MOST]
    pixels = pixels[drawn].reshape(len(drawn), -1)
    print(table(seen["h"][drawn], pixels, seen["label"][drawn], given.labels_per_class, given.label_seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
