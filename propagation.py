"""Label propagation: a few labels spread over all images, along the nearest neighbours in feature space.

After Zhou et al., "Learning with local and global consistency" (2003), and Iscen et al., arXiv 1904.04717.

A run keeps the answers beside it, in answers.npz, with what they were made from: the time for all neighbours grows with
the square of the images, and a run that goes on needs the same answers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from scipy import sparse, special
from scipy.sparse import linalg

import checkpoint
import console
import knn
import npz
import predict
import run_folder
import sources
import strategy as strategy_lib
import tasks
from config import Config

ALPHA = 0.9  # The share of an answer that comes from the neighbours.
SHARPENING = 2.0  # Answers that have spread are flatter than the teacher's; this power makes them about as sure.
TOLERANCE = 1e-12  # Of the conjugate gradients: far below LEAST, since what they leave is taken for an answer.
LEAST = 1e-9  # No division by less.
FILE = "answers.npz"


class Answers(NamedTuple):
    """What a student learns of each image.

    Attributes:
      probabilities: [n, classes] float32, in the fixed order of the images.
      made_from: what they were made from, as `made_from` says it.
      kept: whether they were read from the folder of the run.
    """

    probabilities: np.ndarray
    made_from: dict[str, Any]
    kept: bool


def answers_of_run(
    teacher: checkpoint.Weights, source: sources.MemorySource, config: Config, strategy: tf.distribute.Strategy
) -> Answers:
    """The answers that the folder of the run keeps, where they are still those of this teacher and these labels.

    Otherwise they are computed. Writes nothing: see `keep`.

    Args:
      teacher, source, config, strategy: as for `answers`; the run lives in `config.model_dir`.

    Raises:
      UserError: where the file cannot be read, or the workers do not see the same one.
    """
    with strategy_lib.together(strategy):
        made_of = made_from(teacher, source, config)
        kept = _read(os.path.join(config.model_dir, FILE), made_of)
    # The workers compute the answers together, or none of them does.
    strategy_lib.check_agreement(
        strategy,
        {f"whether they have the run's {FILE}": int(kept is not None)},
        "give all of them the same --model_dir on a file system that they share",
    )
    if kept is not None:
        return Answers(kept, made_of, kept=True)
    return Answers(answers(teacher, source, config, strategy), made_of, kept=False)


def keep(model_dir: str, found: Answers) -> None:
    """Writes answers into the folder of their run, whole or not at all. For the chief alone.

    Raises:
      UserError: where they cannot be written.
    """
    content = io.BytesIO()
    np.savez(content, probabilities=found.probabilities, made_from=json.dumps(found.made_from))
    path = os.path.join(model_dir, FILE)
    with run_folder.writing(path):
        run_folder.write_bytes(path, content.getvalue())


def made_from(teacher: checkpoint.Weights, source: sources.MemorySource, config: Config) -> dict[str, Any]:
    """All that decides the answers, in words and numbers that are equal where they are.

    The index of a checkpoint has a checksum of every weight, so it stands for them wherever the checkpoint lies.
    """
    with run_folder.reading(teacher.where), tf.io.gfile.GFile(f"{teacher.prefix}.index", "rb") as index:
        weights = hashlib.sha256(index.read()).hexdigest()
    return {
        "teacher": weights,
        "head layer of the teacher": teacher.config["ft_proj_selector"],
        "images": source.fingerprint,
        "labels": hashlib.sha256(source.labels.tobytes()).hexdigest(),
        "image_size": config.image_size,
        "distill_neighbors": config.distill_neighbors,
        "constants": [ALPHA, SHARPENING, knn.TEMPERATURE],
    }


def _read(path: str, made_of: dict[str, Any]) -> np.ndarray | None:
    """The answers [n, classes] in the file. None where there is none or, with a line that says why, others are needed.

    Raises:
      UserError: where the file cannot be read.
    """
    if not run_folder.exists(path, path):
        return None
    with run_folder.reading(path), tf.io.gfile.GFile(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        arrays = npz.read(content)
        before = json.loads(str(arrays["made_from"]))
        probabilities = arrays["probabilities"]
        others = [name for name, value in made_of.items() if before.get(name) != value]
    except (ValueError, KeyError, AttributeError, RecursionError):
        console.say(f"{path} is damaged: the answers are computed again")
        return None
    if others:
        console.say(f"the answers in {path} are of other values ({', '.join(others)}): they are computed again")
        return None
    return probabilities


def neighbour_graph(features: np.ndarray, neighbors: int) -> sparse.csr_matrix:
    """The images as a graph in which each is tied to its nearest neighbours: S = D^-1/2 W D^-1/2.

    W is symmetric. The weight of two neighbours is that of the kNN vote, exp(cosine similarity / 0.07), up to a common
    factor.

    Args:
      features: [n, D], finite.
      neighbors: how many each image is tied to, fewer than n.

    Returns:
      [n, n] float32, with eigenvalues in [-1, 1].
    """
    from sklearn.neighbors import NearestNeighbors

    n = len(features)
    finder = NearestNeighbors(n_neighbors=neighbors, algorithm="brute").fit(knn.normalized(features))
    distances, nearest = finder.kneighbors()  # [n, neighbors]; an image is no neighbour of its own
    weights = np.exp(-(distances**2) / 2 / knn.TEMPERATURE)  # |a - b|^2 / 2 = 1 - cosine
    rows = np.repeat(np.arange(n), neighbors)
    one_way = sparse.csr_matrix((weights.ravel(), (rows, nearest.ravel())), shape=(n, n))
    both_ways = one_way.maximum(one_way.T)
    degrees = np.asarray(both_ways.sum(1)).ravel()
    scale = sparse.diags(1 / np.sqrt(np.maximum(degrees, 1e-12)))
    return (scale @ both_ways @ scale).tocsr()


def propagate(graph: sparse.csr_matrix, seeds: np.ndarray) -> np.ndarray:
    """Spreads `seeds` over the graph: (I - alpha S)^-1 seeds, by conjugate gradients.

    Args:
      graph: S, from `neighbour_graph`.
      seeds: [n, classes], at least 0.

    Returns:
      [n, classes] float32, at least 0; a row of zeros where no seed is within reach.
    """
    system = sparse.eye(graph.shape[0], format="csr") - ALPHA * graph
    spread = [linalg.cg(system, column, rtol=TOLERANCE)[0] for column in seeds.astype(np.float64).T]
    return np.maximum(np.stack(spread, axis=1), 0.0).astype(np.float32)  # [n, classes]


def answers(
    teacher: checkpoint.Weights, source: sources.Source, config: Config, strategy: tf.distribute.Strategy
) -> np.ndarray:
    """What a student is to learn of each image: labels and teacher's answers, spread along the teacher's features.

    Args:
      teacher: a network with a classifier.
      source: the images, with the labels that the run may see.
      config: image_size, eval_batch_size and distill_neighbors.
      strategy: where to compute the features. Every worker gets the same answers.

    Returns:
      [n, classes] probabilities, float32, in the fixed order of `source`.
    """
    with strategy.scope():
        model = tasks.restore_network(teacher)

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        of_model = model(images, training=False)
        return {"h": of_model.h, "logits": of_model.logits}

    passes = predict.only_finite(predict.predict(outputs, source, config, strategy, what="teacher"), teacher.step)
    batches = list(passes)
    features = np.concatenate([batch["h"] for batch in batches])  # [n, D]
    logits = np.concatenate([batch["logits"] for batch in batches])  # [n, classes]
    labels = np.concatenate([batch["label"] for batch in batches])  # [n]
    graph = neighbour_graph(features, min(config.distill_neighbors, len(features) - 1))
    return spread_answers(graph, labels, special.softmax(logits, axis=1))


def spread_answers(graph: sparse.csr_matrix, labels: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The labels spread over the graph; then these answers and the teacher's own, together, once more.

    Where the images of a class lie together, the labels alone would do; where they do not, the teacher knows better.

    Args:
      graph: S, from `neighbour_graph`.
      labels: [n] int, -1 where unlabelled.
      own: [n, classes] the teacher's own probabilities.

    Returns:
      [n, classes] probabilities, float32.
    """
    labelled = np.flatnonzero(labels >= 0)
    seeds = np.zeros_like(own)
    seeds[labelled, labels[labelled]] = 1.0
    of_labels = _sharpened(propagate(graph, seeds))  # [n, classes]; zeros where no label reaches
    return _sharpened(propagate(graph, of_labels + own))


def _sharpened(spread: np.ndarray) -> np.ndarray:
    """What came of a propagation [n, classes], as probabilities; rows of zeros stay."""
    powers = (spread / np.maximum(spread.max(axis=1, keepdims=True), LEAST)) ** SHARPENING
    return powers / np.maximum(powers.sum(axis=1, keepdims=True), LEAST)
