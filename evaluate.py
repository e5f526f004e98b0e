"""The one evaluation loop: accuracy of any network on any split, kNN accuracy of its features, and the result files."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import calibration
import checkpoint
import data
import finite
import knn
import model as model_lib
import probe
import published
import run_folder
import sources
import strategy as strategy_lib
import tasks
from config import Config, from_dict
from errors import UserError
from plan import footprint
from predict import only_finite, predict

Batch = Mapping[str, np.ndarray]
NAN_COUNTS = (finite.SKIPPED_STEPS, finite.RESTORES)


def evaluate(
    config: Config, strategy: tf.distribute.Strategy, weights: checkpoint.Weights, of_run: bool
) -> dict[str, Any]:
    """Evaluates a network on `config.eval_split`. Writes nothing: see `write_result`.

    The result holds `step`, `examples` and `seconds`; with a supervised head and labels `top_1`, `top_5` and `loss`;
    after pretraining with labels `knn_top_1`, `knn_labels` (`run` or `all`), `knn_bank` (the number of its features),
    `knn_neighbors` and `knn_whitening`; after pretraining with probes `alarms`, their texts; `skipped_steps` and
    `nan_restores` where `--on_nan` had to help; after distillation `teacher_agreement`; of a trained classifier, with
    enough labels that it was not trained on, `calibration_error`, `calibration_error_after`, `calibration_temperature`
    and `calibration_labels` (see `calibration.Calibration`). Its memory does not grow with the number of examples.

    Args:
      config: what to evaluate on, and how.
      strategy: where to compute. Every worker gets the same result.
      weights: the network.
      of_run: whether the network is that of the run in `config.model_dir`; otherwise `--checkpoint` named it.

    Raises:
      UserError: where the data cannot be read or has other classes than the network.
      FloatingPointError: where the network's outputs are not finite.
    """
    strategy_lib.check_batch("eval_batch_size", config.eval_batch_size, strategy.num_replicas_in_sync)
    trained = from_dict(weights.config)
    with strategy_lib.together(strategy):
        source = load_eval_source(config, weights)
        wants_knn = of_run and trained.train_mode == "pretrain" and config.knn_neighbors and source.has_labels
        bank_source = load_bank_source(config, weights) if wants_knn else None
        teacher = None
        if of_run and trained.train_mode == "distill":
            teacher = open_teacher(dataclasses.replace(config, checkpoint_choice=trained.checkpoint_choice))
        replicas, device_bytes = strategy.num_replicas_in_sync, strategy_lib.device_memory(strategy)
        teacher_config = from_dict(teacher.config) if teacher else None
        footprint.check_evaluation_memory(config, replicas, len(weights.classes), device_bytes, teacher_config)
    strategy_lib.check_agreement(
        strategy,
        {
            "the step of the checkpoint": weights.step,
            "the number of examples": source.examples,
            "the number of training examples": bank_source.examples if bank_source else 0,
            "whether they have the teacher": int(teacher is not None),
        },
        "give all of them the same files on a file system that they share",
    )
    with strategy.scope():
        model = tasks.restore_network(weights)
        teacher_logits = tasks.frozen_logits(teacher) if teacher else None
    # TensorFlow shuffles files by its global seed too. A draw must not depend on what ran before.
    tf.random.set_seed(data.EVAL_SEED + 1)
    started = time.monotonic()
    bank = fill_bank(model, bank_source, config, strategy, weights.step) if bank_source else None
    neighbors = bank.choose() if bank and config.knn_neighbors < 0 else config.knn_neighbors

    network = model.inference()

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        of_model = network(images)
        wanted = {}
        if of_model.logits is not None:
            wanted["logits"] = of_model.logits
        if bank or of_model.logits is None:
            wanted["h"] = of_model.h
        if teacher_logits:
            wanted["teacher"] = teacher_logits(images)
        return wanted

    fits_temperature = trained.train_mode != "pretrain" and source.has_labels and is_held_out(source, config, weights)
    sample = calibration.Sample(len(weights.classes)) if fits_temperature else None
    examples, means = 0, Means()
    limit = config.eval_steps * config.eval_batch_size
    for batch in only_finite(predict(outputs, source, config, strategy, limit, any_order=True), weights.step):
        labels = batch["label"]
        labelled = labels >= 0
        examples += len(labels)
        if "logits" in batch:
            means.add(accuracy(batch["logits"][labelled], labels[labelled]))
            if sample:
                sample.add(batch["logits"][labelled], labels[labelled])
        if bank:
            guesses = bank.vote(batch["h"][labelled], neighbors)
            means.add({"knn_top_1": guesses == labels[labelled]})
        if "teacher" in batch:
            means.add({"teacher_agreement": batch["logits"].argmax(1) == batch["teacher"].argmax(1)})
    result: dict[str, Any] = {"step": weights.step, "examples": examples, **means.result()}
    if bank and "knn_top_1" in result:
        result |= {
            "knn_labels": config.knn_labels,
            "knn_bank": bank.count,
            "knn_neighbors": neighbors,
            "knn_whitening": bank.degree,
        }
    calibrated = calibration.calibrate(*sample.drawn()) if sample and "top_1" in result else None
    if calibrated:
        result |= calibration.as_result(calibrated)
    history = probe_history(config.model_dir) if of_run and trained.train_mode == "pretrain" else None
    if history:
        history.back_to(weights.step)
        result["alarms"] = [alarm["text"] for alarm in history.alarms]
    if of_run:  # what became of steps that were not finite, where there were any
        result |= {name: weights.progress[name] for name in NAN_COUNTS if name in weights.progress}
    result["seconds"] = time.monotonic() - started
    return result


def load_eval_source(config: Config, weights: checkpoint.Weights) -> sources.Source:
    """The split to evaluate on, its labels numbered as the network's classes are.

    Raises:
      UserError: where it cannot be read, or has other classes than the network.
    """
    source = data.open_split(
        config, config.eval_split, weights.named_classes, config.max_corrupt_fraction, weights.where
    )
    check_classes(source, config.dataset, weights)
    return source


def is_held_out(source: sources.Source, config: Config, weights: checkpoint.Weights) -> bool:
    """Whether the network was trained on none of the images of `source`, as far as can be known.

    Other splits have other images. Parts of one split, such as train[:80%] and train[80%:], are compared by the names
    of their images, which takes the training data; where they cannot be read, the answer is no.
    """
    trained = from_dict(weights.config)
    ours, theirs = whole_splits(config.eval_split), whole_splits(trained.train_split)
    if not ours & theirs:
        return True
    if len(ours | theirs) > 1 or config.dataset != trained.dataset:
        return False
    try:
        # A student has seen the images without a label too.
        here = dataclasses.replace(trained, data_dir=config.data_dir, labels=config.labels, images=config.images)
        seen = data.open_split(here, trained.train_split, weights.named_classes)
    except UserError:
        return False
    return not set(source.index()[0]) & set(seen.index()[0])


def whole_splits(split: str) -> set[str]:
    """The splits of which a split takes all or a part: `train[:50%]+test` takes `train` and `test`."""
    return {part.split("[")[0].strip() for part in split.split("+")}


def load_bank_source(config: Config, weights: checkpoint.Weights) -> sources.Source | None:
    """The split that a run was trained on, with the labels that `config.knn_labels` lets the kNN bank see.

    Where the run was trained on the data set that is evaluated, the split is looked for in `config.data_dir`: the data
    may have moved since then.

    Returns:
      The split; None where it has no labels, and, with a warning that says why, where it cannot be read.
    """
    trained = from_dict(weights.config)
    changes: dict[str, Any] = {"cache_dataset": False, "max_corrupt_fraction": config.max_corrupt_fraction}
    if config.dataset == trained.dataset:
        changes |= {"data_dir": config.data_dir, "labels": config.labels, "images": config.images}
    if config.knn_labels == "all":
        changes |= {"labels_per_class": 0, "label_fraction": 0.0, "labelled_dataset": ""}
    try:
        source, _ = data.train_source(dataclasses.replace(trained, **changes), weights.named_classes)
        check_classes(source, trained.dataset, weights)
    except UserError as mistake:
        logging.warning("the kNN accuracy is left out, because the training data cannot be used: %s", mistake)
        return None
    return source if source.has_labels else None


def open_teacher(config: Config) -> checkpoint.Weights | None:
    """The teacher of a distilled run; None, with a warning that says why, where it cannot be opened any more."""
    try:
        return published.open_teacher(config)
    except UserError as mistake:
        logging.warning("the agreement with the teacher is left out, because it cannot be opened: %s", mistake)
        return None


def probe_history(model_dir: str) -> probe.History | None:
    """What the probes of a run have found; None without any and, with a warning, where it cannot be read."""
    try:
        return probe.read(model_dir)
    except UserError as mistake:
        logging.warning("the alarms of the run are left out: %s", mistake)
        return None


def check_classes(source: sources.Source, dataset: str, weights: checkpoint.Weights) -> None:
    """Raises UserError where the labels of `source`, a split of `dataset`, are not those of the network."""
    ours, theirs = list(source.classes), weights.classes_as(source.classes)
    if source.has_labels and theirs and ours != theirs:
        raise UserError(
            f"--dataset={dataset} has {len(ours)} classes ({', '.join(ours[:5])}, ...), the network of {weights.where} "
            f"{len(theirs)} ({', '.join(theirs[:5])}, ...): give a --dataset with the network's classes, or fine-tune "
            f"the network on this one first, by --train_mode=finetune --checkpoint={weights.path}"
        )


def fill_bank(
    model: model_lib.Model, source: sources.Source, config: Config, strategy: tf.distribute.Strategy, step: int
) -> knn.Bank | None:
    """The features of the labelled examples of `source`, or of a class-balanced draw; None where none has a label."""

    network = model.inference()

    def features(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"h": network(images).h}

    dim = model.encoder.output["final_avg_pool"].shape[-1]
    limit = min(knn.capacity(dim), source.examples)
    bank = knn.Bank(limit, dim)
    for batch in only_finite(
        predict(features, source, config, strategy, limit, labelled_only=True, what="kNN bank"), step
    ):
        bank.add(batch["h"], batch["label"])
    return bank if bank.count else None


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """How right each example is: `top_1`, `top_5` (1: right, 0: wrong) and `loss`, its cross-entropy in nats.

    A label that ties with others counts as if the order among them were drawn by lot, so that constant logits score
    chance. Logits that are not finite are wrong.

    Args:
      logits: [n, classes].
      labels: [n], from 0.

    Returns:
      Three arrays [n] float64. The loss of logits that are not finite may be any number, or none.
    """
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels][:, None]  # [n, 1]
    ahead, tied = (logits > own).sum(1), (logits == own).sum(1)  # [n], [n] with the label itself
    right = np.isfinite(logits).all(1)
    with np.errstate(invalid="ignore"):
        peak = logits.max(1, keepdims=True)  # [n, 1]
        log_sum = np.log(np.exp(logits - peak).sum(1, keepdims=True)) + peak  # [n, 1]
        loss = (log_sum - own)[:, 0]
    tied = np.maximum(tied, 1)  # NaN equals nothing, not even itself
    return {
        "top_1": np.where(right, np.clip((1 - ahead) / tied, 0, 1), 0.0),
        "top_5": np.where(right, np.clip((5 - ahead) / tied, 0, 1), 0.0),
        "loss": loss,
    }


class Means:
    """The means of numbers that come batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Batch) -> None:
        """Adds arrays [n] by name."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.sum(dtype=np.float64))
            self._counts[name] = self._counts.get(name, 0) + len(value)

    def result(self) -> dict[str, float]:
        """The mean of each name that had any number."""
        return {name: self._sums[name] / count for name, count in self._counts.items() if count}


def write_result(config: Config, result: Mapping[str, Any]) -> None:
    """Writes result.json, result_<step>.json and TensorBoard scalars into the model_dir. For the chief alone.

    Raises:
      UserError: where they cannot be written.
    """
    suffix = f"_{config.eval_name}" if config.eval_name else ""
    with run_folder.writing(f"--model_dir={config.model_dir}: the result"):
        tf.io.gfile.makedirs(config.model_dir)
        for name in (f"result{suffix}.json", f"result{suffix}_{result['step']}.json"):
            run_folder.write_json(os.path.join(config.model_dir, name), result)
        writer = tf.summary.create_file_writer(os.path.join(config.model_dir, f"eval{suffix}"))
        with writer.as_default(step=result["step"]):
            for name, value in result.items():
                if name not in ("step", "seconds") and isinstance(value, int | float):
                    tf.summary.scalar(f"eval/{name}", value)
        writer.close()
