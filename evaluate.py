"""The one evaluation loop: accuracy of any network on any split, kNN accuracy of its features, and the result files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

import augment
import checkpoint
import data
import published
import run_folder
import sources
import strategy as strategy_lib
import tasks
from config import Config, from_dict
from errors import UserError

KNN_TEMPERATURE = 0.07  # arXiv 1805.01978
KNN_BANK = 100_000  # at most so many training features


def evaluate(config: Config, strategy: tf.distribute.Strategy) -> dict[str, Any]:
    """Evaluates the newest checkpoint of the run in `config.model_dir` on `config.eval_split`.

    Where no run lives there, it evaluates `config.checkpoint`. Writes result.json, result_<step>.json and TensorBoard
    scalars. The result holds `examples`, `step` and `seconds`; with a supervised head and labels, `top_1`, `top_5` and
    `loss`; after pretraining with labels, `knn_top_1`; after distillation, `teacher_agreement`.

    Raises:
      UserError: where there is no checkpoint, or the data does not fit it.
    """
    strategy_lib.check_batch("eval_batch_size", config.eval_batch_size, strategy)
    weights = published.open_subject(config)
    step = weights.step
    trained = from_dict(weights.config)
    of_run = checkpoint.is_of_run(config)
    source = load_eval_source(config, config.eval_split, weights)
    with strategy.scope():
        model = tasks.restore_network(weights)
        teacher = published.open_teacher(config) if of_run and trained.train_mode == "distill" else None
        teacher_logits = tasks.frozen_logits(teacher) if teacher else None
    started = time.monotonic()

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        of_model = model(images, training=False)
        wanted = {"h": of_model.h, "logits": of_model.logits}
        if teacher_logits:
            wanted["teacher"] = teacher_logits(images)
        return {name: tf.cast(value, tf.float32) for name, value in wanted.items() if value is not None}

    limit = config.eval_steps * config.eval_batch_size or source.examples
    answers = collect(predict(outputs, source, config, strategy, min(limit, source.examples)))
    labels = answers["label"]
    result: dict[str, Any] = {"step": step, "examples": len(labels)}
    if "logits" in answers and (labels >= 0).any():
        result |= accuracy(answers["logits"][labels >= 0], labels[labels >= 0])
    if of_run and trained.train_mode == "pretrain" and config.knn_neighbors and (labels >= 0).any():
        bank_source = load_eval_source(trained, trained.train_split, weights)
        features = collect(predict(outputs, bank_source, config, strategy, min(KNN_BANK, bank_source.examples)))
        known = features["label"] >= 0
        if known.any():
            guesses = knn(features["h"][known], features["label"][known], answers["h"], config.knn_neighbors)
            result["knn_top_1"] = float(np.mean((guesses == labels)[labels >= 0]))
    if teacher_logits:
        same = answers["logits"].argmax(1) == answers["teacher"].argmax(1)
        result["teacher_agreement"] = float(same.mean())
    result["seconds"] = time.monotonic() - started
    if strategy_lib.is_chief(strategy):
        write_result(config, result)
    return result


def load_eval_source(config: Config, split: str, weights: checkpoint.Weights) -> sources.Source:
    """A split to evaluate on, its labels numbered as the network's classes are."""
    source = sources.load(config.dataset, split, config.data_dir, weights.named_classes, config.max_corrupt_fraction)
    classes = weights.classes_as(source.classes)
    if source.has_labels and classes and list(source.classes) != classes:
        raise UserError(
            f"--dataset={config.dataset} has {len(source.classes)} classes ({', '.join(source.classes[:5])}, ...), "
            f"the network {len(classes)} ({', '.join(classes[:5])}, ...): they must be the same"
        )
    return source


def predict(
    outputs: Callable[[tf.Tensor], dict[str, tf.Tensor]],
    source: sources.Source,
    config: Config,
    strategy: tf.distribute.Strategy,
    examples: int,
) -> Iterator[dict[str, np.ndarray]]:
    """What `outputs` makes of the first `examples` of `source`, with their `label`, batch by batch, each once."""
    stream = strategy.distribute_datasets_from_function(
        lambda context: data.eval_stream(
            source, lambda image: augment.center_crop(image, config.image_size), config.eval_batch_size, context
        )
    )

    @tf.function(autograph=False)
    def step(batch: dict) -> dict[str, tf.Tensor]:
        def replica(batch: dict) -> dict[str, tf.Tensor]:
            return {**outputs(batch["image"]), "label": batch["label"], "mask": batch["mask"]}

        return {name: strategy.gather(value, axis=0) for name, value in strategy.run(replica, (batch,)).items()}

    batches = iter(stream)
    for _ in tqdm(range(-(-examples // config.eval_batch_size)), "eval", unit="batch", disable=None, leave=False):
        arrays = {name: value.numpy() for name, value in step(next(batches)).items()}
        counted = arrays.pop("mask") > 0
        yield {name: value[counted] for name, value in arrays.items()}


def collect(batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The batches end to end."""
    every = list(batches)
    return {name: np.concatenate([batch[name] for batch in every]) for name in every[0]}


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1, top-5 and mean cross-entropy (nats) of `logits` [n, classes] for `labels` [n]."""
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels][:, None]  # [n, 1]
    ahead, tied = (logits > own).sum(1), (logits == own).sum(1)  # [n], [n] with the label itself
    peak = logits.max(1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(1)) + peak[:, 0]
    return {
        # Ties are drawn by lot: constant logits score chance.
        "top_1": float(np.clip((1 - ahead) / tied, 0, 1).mean()),
        "top_5": float(np.clip((5 - ahead) / tied, 0, 1).mean()),
        "loss": float((log_sum - own[:, 0]).mean()),
    }


def knn(bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, neighbors: int) -> np.ndarray:
    """The weighted kNN vote (arXiv 1805.01978): cosine similarity, weights exp(similarity / 0.07).

    Args:
      bank: [M, D] features with labels `bank_labels` [M].
      queries: [n, D].
      neighbors: how many vote.

    Returns:
      [n] predicted labels.
    """
    bank = bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
    queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    one_hot = np.eye(bank_labels.max() + 1)[bank_labels]  # [M, classes]
    guesses = []
    for part in np.array_split(queries, max(1, len(queries) // 1024)):
        similarity, index = tf.math.top_k(part @ bank.T, min(neighbors, len(bank)))  # [b, k]
        votes = np.exp(similarity.numpy() / KNN_TEMPERATURE)[..., None] * one_hot[index.numpy()]  # [b, k, classes]
        guesses.append(votes.sum(1).argmax(1))
    return np.concatenate(guesses)


def write_result(config: Config, result: dict[str, Any]) -> None:
    """Writes result.json, result_<step>.json and TensorBoard scalars into the model_dir."""
    name = f"result_{config.eval_name}" if config.eval_name else "result"
    tf.io.gfile.makedirs(config.model_dir)
    for file in (f"{name}.json", f"{name}_{result['step']}.json"):
        run_folder.write_json(os.path.join(config.model_dir, file), result)
    run = f"eval_{config.eval_name}" if config.eval_name else "eval"
    writer = tf.summary.create_file_writer(os.path.join(config.model_dir, run))
    with writer.as_default(step=result["step"]):
        for metric, value in result.items():
            if metric not in ("step", "seconds"):
                tf.summary.scalar(f"eval/{metric}", value)
    writer.close()
    logging.info("evaluated %s: %s", config.model_dir, result)
