"""What a student learns of each image where that is known before the first step.

Where few images have labels, it is the teacher's answers and the labels, spread; with `cache_teacher`, what the teacher
says about the centre crop of each image.

A run keeps these answers beside it, in answers.npz, with what they were made from: the time for all neighbours grows
with the square of the images, and a run that goes on needs the same answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from scipy import special

import augment
import checkpoint
import console
import knn
import npz
import predict
import propagation
import run_folder
import sources
import strategy as strategy_lib
import tasks
import whitening
from config import Config

FILE = "answers.npz"
LEAST_PROBABILITY = 1e-6  # Of a class, in an answer that has spread.


class Answers(NamedTuple):
    """What a student learns of each image.

    Attributes:
      logits: [n, classes] float32, in the fixed order of the images.
      made_from: what they were made from, as `made_from` says it.
      kept: whether they were read from the folder of the run.
    """

    logits: np.ndarray
    made_from: dict[str, Any]
    kept: bool


def answers_of_run(
    teacher: checkpoint.Weights, source: sources.MemorySource, config: Config, strategy: tf.distribute.Strategy
) -> Answers:
    """The answers that the folder of the run keeps, where they are still those of this teacher and these labels.

    Otherwise they are computed. Writes nothing: see `keep`.

    Args:
      teacher, source, config, strategy: as for `spread`; the run lives in `config.model_dir`.

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
    if config.cache_teacher:
        logits = of_centre_crops(teacher, source, config, strategy)
    else:
        logits = _logits_of(spread(teacher, source, config, strategy))
    return Answers(logits, made_of, kept=False)


def keep(model_dir: str, found: Answers) -> None:
    """Writes answers into the folder of their run, whole or not at all. For the chief alone.

    Raises:
      UserError: where they cannot be written.
    """
    content = io.BytesIO()
    np.savez(content, logits=found.logits, made_from=json.dumps(found.made_from))
    path = os.path.join(model_dir, FILE)
    with run_folder.writing(path):
        run_folder.write_bytes(path, content.getvalue())


def made_from(teacher: checkpoint.Weights, source: sources.MemorySource, config: Config) -> dict[str, Any]:
    """All that decides the answers, in words and numbers that are equal where they are."""
    made = {
        "teacher": teacher.fingerprint(),
        "head layer of the teacher": teacher.config["ft_proj_selector"],
        "images": source.fingerprint,
        "image_size": config.image_size,
    }
    if config.cache_teacher:
        return {**made, "cache_teacher": True}
    made |= {
        "labels": hashlib.sha256(source.labels.tobytes()).hexdigest(),
        "distill_neighbors": config.distill_neighbors,
        "constants": [propagation.ALPHA, propagation.SHARPENING, knn.TEMPERATURE, whitening.HALF, whitening.FLOOR],
    }
    if config.distill_views > 1:
        made["views"] = [config.distill_views, config.crop_min_area, config.crop_max_aspect, config.use_flip]
    return made


def _read(path: str, made_of: dict[str, Any]) -> np.ndarray | None:
    """The logits [n, classes] in the file. None where there is none or, with a line that says why, others are needed.

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
        # Earlier versions wrote probabilities.
        logits = arrays["logits"] if "logits" in arrays else _logits_of(arrays["probabilities"])
        others = [name for name in {**made_of, **before} if before.get(name) != made_of.get(name)]
    except (ValueError, KeyError, AttributeError, RecursionError, TypeError):
        console.say(f"{path} is damaged: the answers are computed again")
        return None
    if others:
        console.say(f"the answers in {path} are of other values ({', '.join(others)}): they are computed again")
        return None
    return logits


def _logits_of(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, LEAST_PROBABILITY)).astype(np.float32)


def of_centre_crops(
    teacher: checkpoint.Weights, source: sources.Source, config: Config, strategy: tf.distribute.Strategy
) -> np.ndarray:
    """The teacher's logits [n, classes] for the central crop of each image, float32, in the fixed order of `source`.

    The arguments are those of `spread`.
    """
    with strategy.scope():
        logits_of = tasks.frozen_logits(teacher)

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": logits_of(images)}

    passes = predict.predict(outputs, source, config, strategy, what="teacher")
    return np.concatenate([batch["logits"] for batch in predict.only_finite(passes, teacher.step)])


def spread(
    teacher: checkpoint.Weights, source: sources.Source, config: Config, strategy: tf.distribute.Strategy
) -> np.ndarray:
    """What a student is to learn of each image: labels and teacher's answers, spread along the teacher's features.

    Answers and features are means over `distill_views` views of an image; neighbours are found in half-whitened
    features.

    Args:
      teacher: a network with a classifier.
      source: the images, with the labels that the run may see.
      config: image_size, the views, eval_batch_size and distill_neighbors.
      strategy: where to compute the features. Every worker gets the same answers.

    Returns:
      [n, classes] probabilities, float32, in the fixed order of `source`.
    """
    with strategy.scope():
        network = tasks.restore_network(teacher).inference()

    def outputs(views: tf.Tensor) -> dict[str, tf.Tensor]:
        """Of the views [n, V, size, size, 3]: the means of h, and the logits of the mean answer."""
        number = views.shape[1]
        of_views = network(tf.reshape(views, [-1, *views.shape[2:]]))  # [n * V, ...]
        assert of_views.logits is not None
        features = tf.reshape(of_views.h, [-1, number, of_views.h.shape[1]])  # [n, V, D]
        logits = tf.reshape(of_views.logits, [-1, number, of_views.logits.shape[1]])  # [n, V, classes]
        answers = tf.nn.log_softmax(tf.cast(logits, tf.float32))
        return {"h": tf.reduce_mean(features, axis=1), "logits": tf.reduce_logsumexp(answers, axis=1)}

    settings = _of_few_images(config, strategy.num_replicas_in_sync)
    passes = predict.predict(outputs, source, settings, strategy, what="teacher", view=views(config))
    batches = list(predict.only_finite(passes, teacher.step))
    features = np.concatenate([batch["h"] for batch in batches])  # [n, D]
    logits = np.concatenate([batch["logits"] for batch in batches])  # [n, classes]
    labels = np.concatenate([batch["label"] for batch in batches])  # [n]
    neighbors = min(config.distill_neighbors, len(features) - 1)
    graph = propagation.neighbour_graph(knn.half_whitened(features), neighbors)
    return propagation.spread_answers(graph, labels, special.softmax(logits, axis=1))


def views(config: Config) -> Callable[[tf.Tensor], tf.Tensor]:
    """From a decoded image to what the teacher sees of it, [V, size, size, 3]: V is `distill_views`.

    Where V is above 1, these are random crops and flips of the kind that the student sees, the same of every image.
    """
    crop = tasks.crop_and_flip(config)

    def views_of(image: tf.Tensor) -> tf.Tensor:
        if config.distill_views == 1:
            return augment.center_crop(image, config.image_size)[tf.newaxis]
        return tf.stack([crop(image, tf.constant([0, number])) for number in range(config.distill_views)])

    return views_of


def _of_few_images(config: Config, replicas: int) -> Config:
    """The config with batches of so few images that their views are as many as the images of an evaluation's batch."""
    images = max(1, config.eval_batch_size // replicas // config.distill_views)  # of each replica
    return dataclasses.replace(config, eval_batch_size=images * replicas)
