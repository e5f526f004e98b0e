"""What a run trains with: opened, checked and restored before the first step, when nothing has been written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf
from absl import logging

import checkpoint
import continuation
import data
import lars_optimizer
import linear_start
import published
import run_folder
import schedule as schedule_lib
import service
import sources
import strategy as strategy_lib
import tasks
import teacher_answers
from config import Config, from_dict
from errors import UserError
from plan import footprint

# Flags that name places, which may have another name on each host.
OF_A_HOST = ("model_dir", "data_dir", "output")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run trains with, as `prepare` makes it.

    Attributes:
      source: the training set.
      labelled: the names of its labelled examples where a subset of them was drawn.
      task: the networks and the loss.
      optimizer: of the weights of `task.model`.
      schedule: the learning rate by step, and the number of steps.
      checkpoints: where the state is kept; `newest` is the step that it was restored from.
      description: what config.json says.
      opened: the network that a new run starts from, and the teacher, where there are such.
      answers: what the student learns where that is known before the first step (`distill_neighbors`,
        `cache_teacher`).
    """

    source: sources.Source
    labelled: list[str] | None
    task: tasks.Task
    optimizer: keras.optimizers.Optimizer
    schedule: schedule_lib.WarmupCosine
    checkpoints: checkpoint.RunCheckpoints
    description: dict[str, Any]
    opened: list[checkpoint.Weights]
    answers: teacher_answers.Answers | None


def prepare(config: Config, strategy: tf.distribute.Strategy, recipe_reasons: Mapping[str, str] | None = None) -> Run:
    """Opens the data, makes the networks, and restores the newest checkpoint. Writes nothing.

    A run that goes on keeps the reasons of its own recipe.

    Raises:
      UserError: on a mistake in the config, the data or a checkpoint.
    """
    with strategy_lib.together(strategy):
        if strategy_lib.is_chief(strategy):
            run_folder.check_writable(config.model_dir)
        service.check(config.data_service)
        before = run_folder.read_config(config.model_dir)
        where = f"--model_dir={config.model_dir}"
        advice = "put one back, or choose another --model_dir to start again"
        newest = checkpoint.newest_that_reads(config.model_dir, where, advice)
        start = None
        if config.checkpoint and not newest:
            path = run_folder.chosen(config.checkpoint, config.checkpoint_choice)
            start = published.open_weights(path, given=config.to_dict())
        teacher = published.open_teacher(config) if config.teacher else None
        # A run that has begun in another order of a TensorFlow dataset keeps to it.
        tfds_order = "stripes" if before is None else before.get("tfds_order", "buffer")
        source, labelled = data.train_source(config, teacher.named_classes if teacher else None, tfds_order)
        # Servers of data have no use for the images here.
        several = strategy_lib.has_several_workers(strategy) and not config.data_service
        if several and isinstance(source, sources.TfdsSource):
            source = source.for_several_workers()
        classes = teacher.classes_as(source.classes) if teacher else list(source.classes)
        schedule = tasks.make_schedule(config, source.examples)
        check_run(config, strategy, before, source, classes, teacher)
        if not newest or checkpoint.step_of(newest) < schedule.total_steps:
            check_memory(config, strategy, classes, teacher)
    check_agreement(strategy, source, newest)
    reasons = before.get("recipe_reasons") if before else recipe_reasons
    description = run_folder.describe(config.to_dict(), classes, source.examples, source.fingerprint, reasons)
    description |= circumstances(config, strategy, source, teacher)
    goes_on = newest is not None and checkpoint.step_of(newest) < schedule.total_steps
    if before and goes_on:
        with strategy_lib.together(strategy):
            continuation.check_facts(before, description)
    answers = None
    if teacher and (config.distill_neighbors or config.cache_teacher):
        source = source.in_memory()
        answers = teacher_answers.answers_of_run(teacher, source, config, strategy)
        source = source.with_answers(answers.logits)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        asked = None if answers else teacher  # the teacher that answers on every view
        task = tasks.make_task(config, classes, tasks.frozen_logits(asked, config.mixed_precision) if asked else None)
        head = task.model.supervised_head
        optimizer = lars_optimizer.make_optimizer(
            config.optimizer, schedule, config.momentum, config.weight_decay, head.trainable_variables if head else ()
        )
        optimizer.build(task.model.trainable_variables)
        checkpoints = checkpoint.RunCheckpoints(
            config.model_dir, description, config.keep_checkpoint_max, task.model, optimizer, task.state, strategy,
            config.keep_checkpoint_every_n_hours, config.on_checkpoint_failure,
        )  # fmt: skip
        if newest:
            checkpoints.resume(newest)
        elif start:
            tasks.start_from(start, classes, task)
    if start and config.linear_start:
        linear_start.start(task, source, strategy, start)
    if before and newest:
        continuation.say(before, description, checkpoint.step_of(newest), schedule.total_steps)
    opened = [network for network in (start, teacher) if network]
    return Run(source, labelled, task, optimizer, schedule, checkpoints, description, opened, answers)


def circumstances(
    config: Config, strategy: tf.distribute.Strategy, source: sources.Source, teacher: checkpoint.Weights | None
) -> dict[str, Any]:
    """What config.json holds beside the hyper-parameters: what may have changed when a run goes on."""
    found: dict[str, Any] = {
        "replicas": strategy.num_replicas_in_sync,
        "device": strategy_lib.device_in_words(strategy),
    }
    if config.dataset not in ("digits", "image_folder"):
        found["tfds_order"] = data.tfds_order(source)
    if teacher:
        found |= {"teacher_weights": teacher.fingerprint(), "teacher_step": teacher.step}
    return found


def check_run(
    config: Config, strategy: tf.distribute.Strategy, before: Mapping[str, Any] | None, source: sources.Source,
    classes: list[str], teacher: checkpoint.Weights | None,
) -> None:  # fmt: skip
    """Refuses, before anything is built, what would fail later: batches, classes, labels, the evaluation.

    Args:
      before: the config of the run that is already in model_dir, or None.
      source: the training set.
      classes: the network's classes.
      teacher: the teacher of a distillation, or None.
    """
    strategy_lib.check_batch("train_batch_size", config.train_batch_size, strategy.num_replicas_in_sync)
    strategy_lib.check_chunks(config.grad_accumulation, config.train_batch_size, strategy.num_replicas_in_sync)
    if config.jit_compile:
        strategy_lib.check_compiled(strategy)
    if footprint.has_queue(config) and config.shard_queue:
        strategy_lib.check_shards(config.memory_size, strategy.num_replicas_in_sync)
    if before:
        continuation.check_classes(before, classes, config.model_dir)
    check_labels(config, source, classes)
    if config.mode == "train_then_eval":
        check_evaluation(config, strategy, classes)
    if teacher and teacher.config["train_mode"] == "pretrain" and "dataset" in teacher.config:
        logging.warning(
            "--teacher=%s is a pretraining run. Its classifier has learnt every label of %s, and the student learns "
            "them from it",
            config.teacher,
            teacher.config["dataset"],
        )


def check_memory(
    config: Config, strategy: tf.distribute.Strategy, classes: list[str], teacher: checkpoint.Weights | None
) -> None:
    """Refuses a run whose training, or whose evaluation after it, cannot fit in the memory of its device."""
    teacher_config = from_dict(teacher.config) if teacher else None
    device_bytes = strategy_lib.device_memory(strategy)
    run = (config, strategy.num_replicas_in_sync, len(classes), device_bytes, teacher_config)
    footprint.check_training_memory(*run)
    if config.mode == "train_then_eval":
        footprint.check_evaluation_memory(*run)


def check_labels(config: Config, source: sources.Source, classes: list[str]) -> None:
    """Raises UserError where the task needs labels that the data lacks, or a teacher knows other classes."""
    if config.train_mode in ("finetune", "supervised") and not source.has_labels:
        raise UserError(
            f"--train_mode={config.train_mode} needs labels, and --train_split={config.train_split} has none: "
            f"sort the images into DIR/{config.train_split}/<class>/"
        )
    if config.train_mode == "distill":
        if source.has_labels and list(source.classes) != classes:
            raise UserError(
                f"--teacher={config.teacher} knows {len(classes)} classes ({sources.some_of(classes)}), the data "
                f"{len(source.classes)} ({sources.some_of(source.classes)}): give a teacher of the data's classes"
            )
        if config.distill_alpha < 1 and not source.has_labels:
            raise UserError(f"--distill_alpha={config.distill_alpha} needs labels, and the data has none: use 1")
        if config.distill_neighbors and not source.has_labels:
            raise UserError(
                f"--distill_neighbors={config.distill_neighbors} needs some labels to spread, and the data has none: "
                f"use 0"
            )


def check_evaluation(config: Config, strategy: tf.distribute.Strategy, classes: list[str]) -> None:
    """Checks before training that the evaluation after it can run: batch size, split, classes, images."""
    strategy_lib.check_batch("eval_batch_size", config.eval_batch_size, strategy.num_replicas_in_sync)
    known_by = f"--teacher={config.teacher}" if config.teacher else f"--train_split={config.train_split}"
    data.open_split(config, config.eval_split, classes, config.max_corrupt_fraction, known_by)


def check_same_command(config: Config, strategy: tf.distribute.Strategy) -> None:
    """Makes sure that all workers run the same program with the same flags, on the same run.

    Raises:
      UserError: on every worker alike, naming what differs, and what each of them has.
    """
    if not strategy_lib.has_several_workers(strategy):
        return
    # First what explains other differences: a worker that does not see the run has not its flags either.
    kept = run_folder.checkpoints(config.model_dir)
    newest = os.path.basename(kept[0]) if kept else "none"
    flags = {f"--{name}": value for name, value in config.to_dict().items() if name not in OF_A_HOST}
    strategy_lib.check_agreement(
        strategy,
        {"their newest checkpoint": newest, "their program": run_folder.program(), **flags},
        "give all of them the same command, on one version of the program, with --model_dir on a file system that they "
        "share",
    )


def check_agreement(strategy: tf.distribute.Strategy, source: sources.Source, newest: str | None) -> None:
    """Makes sure that all workers have the same data and go on from the same checkpoint, `newest`."""
    strategy_lib.check_agreement(
        strategy,
        {
            "the step of their newest checkpoint": checkpoint.step_of(newest) if newest else 0,
            "the number of examples": source.examples,
            "the fingerprint of the names of the examples": source.fingerprint,
        },
        "give all of them the same --model_dir and data, on a file system that they share",
    )


def write_description(config: Config, run: Run) -> None:
    """Writes what made the run into its folder: config.json, the labels that were drawn, the answers to learn."""
    run_folder.write_config(config.model_dir, run.description)
    if run.answers and not run.answers.kept:
        teacher_answers.keep(config.model_dir, run.answers)
    if run.labelled is not None:
        with run_folder.writing(f"--model_dir={config.model_dir}"):
            path = os.path.join(config.model_dir, "labelled_subset.json")
            run_folder.write_json(path, {"seed": config.label_seed, "examples": run.labelled})


def views_in_words(task: tasks.Task) -> list[str]:
    """A line for each kind of view: which keys of a batch get it, and what makes it, in order."""
    keys: dict[str, list[str]] = {}
    for key, view in task.views.items():
        keys.setdefault(str(view), []).append(key)
    return [f"{', '.join(names)}: {words}" for words, names in keys.items()]
