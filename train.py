"""The one train loop: any task, any strategy, from its newest checkpoint to exactly its last step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from absl import logging

import augment
import checkpoint
import console
import continuation
import data
import lars_optimizer
import probe
import propagation
import published
import run_folder
import schedule as schedule_lib
import sources
import strategy as strategy_lib
import tasks
from config import Config, from_dict
from errors import UserError, reason
from plan import footprint


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
      answers: what the student learns where the labels spread over all images (`distill_neighbors`).
    """

    source: sources.Source
    labelled: list[str] | None
    task: tasks.Task
    optimizer: keras.optimizers.Optimizer
    schedule: schedule_lib.WarmupCosine
    checkpoints: checkpoint.RunCheckpoints
    description: dict[str, Any]
    opened: list[checkpoint.Weights]
    answers: propagation.Answers | None


def train(config: Config, strategy: tf.distribute.Strategy, recipe_reasons: Mapping[str, str] | None = None) -> int:
    """Trains the run of `config`, or goes on where it stopped. Returns the step it has reached.

    `recipe_reasons` says by field name why the recipe chose a value; config.json keeps it.

    Raises:
      UserError: on a mistake found before the first step, when nothing has been written; or where, later, a file
        cannot be read or written or the memory is full.
      FloatingPointError: when the loss, a metric or a weight is not finite; no checkpoint holds such a number.
      KeyboardInterrupt: on Ctrl-C, saying from which step the same command goes on.
    """
    run = prepare(config, strategy, recipe_reasons)
    step, steps, batch = run.checkpoints.newest or 0, run.schedule.total_steps, config.train_batch_size
    if step >= steps:
        return step
    chief = strategy_lib.is_chief(strategy)
    if chief:
        write_description(config, run)
        if config.checkpoint_choice == "best" and run.opened:
            console.say(f"--checkpoint_choice=best: opened {' and '.join(network.prefix for network in run.opened)}")
        for line in views_in_words(run.task):
            console.say(line)
    eye = make_probe(config, run, strategy)
    batches = training_batches(config, run, strategy, step)
    train_step = make_train_step(run.task, run.optimizer, strategy)
    epoch_steps = schedule_lib.epoch_steps(run.source.examples, batch)
    save_every = config.checkpoint_steps or config.checkpoint_epochs * epoch_steps
    speed = Speed(step, batch)
    with scalar_writer(config, chief) as writer, console.Progress(config.train_mode, "step", steps, step) as progress:
        try:
            if eye and step == 0:
                look(eye, step, run.checkpoints, config.keep_best, writer, progress)
            while step < steps:
                metrics = train_step(next(batches))
                step += 1
                if eye:
                    eye.observe(metrics)
                progress.advance()
                writes = step % config.summary_steps == 0 or step == steps
                saves = step % save_every == 0 or step == steps
                tries_checkpoint = step - 1 == run.checkpoints.newest  # Its weights gave this loss.
                # Every worker checks at the same steps: one that stopped alone would leave the others waiting.
                checks = writes or saves or tries_checkpoint
                if checks or progress.due:
                    values = {name: float(value) for name, value in metrics.items()}
                    if checks:
                        check_finite(values, run.checkpoints if tries_checkpoint else None)
                    values["learning_rate"] = float(run.schedule(step - 1))
                    values["images_per_second"] = speed.images_per_second(step)
                    probed = eye.in_short() if eye else ""
                    progress.show(", ".join(part for part in (summary(values), probed) if part))
                if writes:
                    write_scalars(writer, step, values)
                    speed.restart(step)
                if eye and eye.due(step):
                    look(eye, step, run.checkpoints, config.keep_best, writer, progress)
                    speed.restart(step)
                # The checkpoint follows the probe, so that a run that goes on from it has the probe of its step.
                if saves:
                    run.checkpoints.save()
        except FloatingPointError as stop:
            advice = f"lower --learning_rate; the same command then {_goes_on(run.checkpoints)}"
            raise FloatingPointError(f"{stop} at step {step}: {advice}") from stop
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"at step {step}: the same command {_goes_on(run.checkpoints)}") from None
        except tf.errors.ResourceExhaustedError as error:
            raise no_memory_left(f"at step {step + 1}", error) from error
    # No worker may read the chief's last checkpoint before it is written.
    strategy_lib.wait_for_all(strategy)
    return step


def make_probe(config: Config, run: Run, strategy: tf.distribute.Strategy) -> probe.Probe | None:
    """The probes of a pretraining run; None where there are none. A probe compares images, so it takes two of them."""
    if config.train_mode != "pretrain" or config.eval_every_epochs < 0 or run.source.examples < 2:
        return None
    return probe.Probe(
        config, run.source, run.task.model, run.task.views, run.schedule.total_steps, run.schedule.warmup_steps,
        run.checkpoints.newest, strategy,
    )  # fmt: skip


def look(
    eye: probe.Probe, step: int, checkpoints: checkpoint.RunCheckpoints, keep_best: bool,
    writer: tf.summary.SummaryWriter, progress: console.Progress,
) -> None:  # fmt: skip
    """Probes the features after `step` steps, shows what it found, and keeps the best checkpoint so far."""
    found = eye.look(step)
    if found is None:
        logging.warning("the probe at step %d is left out: the features are not finite", step)
        return
    write_scalars(writer, step, found, "probe")
    if progress.in_log:
        progress.say(eye.in_words())
    for alarm in eye.new_alarms():
        progress.say(f"alarm: {alarm}")
    if keep_best and eye.last_is_best(checkpoints.best):
        checkpoints.save_best()


def training_batches(config: Config, run: Run, strategy: tf.distribute.Strategy, step: int = 0) -> Iterator[Mapping]:
    """The batches of a run that has taken `step` steps."""
    # An epoch's seed is a tensor. TensorFlow shuffles by such a seed only where its global seed is not 0.
    tf.random.set_seed(config.seed + 1)
    batch = config.train_batch_size

    def stream(taken: int) -> Iterable:
        return strategy.distribute_datasets_from_function(
            lambda context: data.train_stream(run.source, run.task.views, batch, config.seed, step + taken, context)
        )

    return data.patient_batches(run.source, stream)


def no_memory_left(when: str, error: tf.errors.ResourceExhaustedError) -> UserError:
    """What to say where the device has no memory left for a step."""
    return UserError(f"no memory is left {when}: lower --train_batch_size or --image_size: {reason(error)[:200]}")


class Speed:
    """Images per second, measured from a step on."""

    def __init__(self, step: int, batch: int) -> None:
        self._batch = batch
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measures from `step` on."""
        self._step, self._time = step, time.monotonic()

    def images_per_second(self, step: int) -> float:
        """The mean up to now, when `step` steps are done."""
        return (step - self._step) * self._batch / max(time.monotonic() - self._time, 1e-9)


def _goes_on(checkpoints: checkpoint.RunCheckpoints) -> str:
    newest = checkpoints.newest
    return "starts from the beginning, as nothing was saved" if newest is None else f"goes on from step {newest}"


def make_train_step(
    task: tasks.Task, optimizer: keras.optimizers.Optimizer, strategy: tf.distribute.Strategy, jit_compile: bool = False
) -> Callable[[Mapping], tasks.Metrics]:
    """The compiled step: one distributed batch in, the metrics of the global batch out."""
    variables = task.model.trainable_variables

    def step(batch: Mapping[str, tf.Tensor]) -> tasks.Metrics:
        with tf.GradientTape() as tape:
            loss, metrics = task.loss(batch)  # this replica's share of Eq. 1, 2 or 3
        gradients = tape.gradient(loss, variables)
        optimizer.apply(gradients, variables)  # sums the replicas' gradients
        task.after_step(tf.convert_to_tensor(optimizer.iterations))  # the momentum encoder follows
        return {"loss": loss, **metrics}

    @tf.function(autograph=False, jit_compile=jit_compile)
    def distributed_step(batch: Mapping) -> tasks.Metrics:
        shares = strategy.run(step, (batch,))
        return {name: strategy.reduce(tf.distribute.ReduceOp.SUM, share, axis=None) for name, share in shares.items()}

    return distributed_step


def prepare(config: Config, strategy: tf.distribute.Strategy, recipe_reasons: Mapping[str, str] | None = None) -> Run:
    """Opens the data, makes the networks, and restores the newest checkpoint. Writes nothing.

    A run that goes on keeps the reasons of its own recipe.

    Raises:
      UserError: on a mistake in the config, the data or a checkpoint.
    """
    with strategy_lib.together(strategy):
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
        in_windows = before is None or before.get("tfds_order") == "windows"
        source, labelled = data.train_source(config, teacher.named_classes if teacher else None, in_windows)
        classes = teacher.classes_as(source.classes) if teacher else list(source.classes)
        schedule = tasks.make_schedule(config, source.examples)
        check_run(config, strategy, before, source, classes, teacher)
        if not newest or checkpoint.step_of(newest) < schedule.total_steps:
            check_memory(config, strategy, classes, teacher)
    check_agreement(config, strategy, source, newest)
    reasons = before.get("recipe_reasons") if before else recipe_reasons
    description = run_folder.describe(config.to_dict(), classes, source.examples, source.fingerprint, reasons)
    description |= circumstances(config, strategy, source, teacher)
    goes_on = newest is not None and checkpoint.step_of(newest) < schedule.total_steps
    if before and goes_on:
        with strategy_lib.together(strategy):
            continuation.check_facts(before, description)
    answers = None
    if teacher and config.distill_neighbors:
        source = source.in_memory()
        answers = propagation.answers_of_run(teacher, source, config, strategy)
        source = source.with_answers(answers.probabilities)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        asked = None if config.distill_neighbors else teacher  # the teacher that answers on every view
        task = tasks.make_task(config, classes, tasks.frozen_logits(asked) if asked else None)
        head = task.model.supervised_head
        optimizer = lars_optimizer.make_optimizer(
            config.optimizer, schedule, config.momentum, config.weight_decay, head.trainable_variables if head else ()
        )
        optimizer.build(task.model.trainable_variables)
        checkpoints = checkpoint.RunCheckpoints(
            config.model_dir, description, config.keep_checkpoint_max, task.model, optimizer, task.state,
            strategy_lib.is_chief(strategy),
        )  # fmt: skip
        if newest:
            checkpoints.resume(newest)
        elif start:
            tasks.start_from(start, classes, task)
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
        found["tfds_order"] = "windows" if data.is_in_windows(source) else "buffer"
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


def check_agreement(
    config: Config, strategy: tf.distribute.Strategy, source: sources.Source, newest: str | None
) -> None:
    """Makes sure that all workers have the same flags and data and go on from the same checkpoint, `newest`."""
    flags = {name: value for name, value in config.to_dict().items() if name not in ("model_dir", "data_dir")}
    strategy_lib.check_agreement(
        strategy,
        {
            "the step of their newest checkpoint": checkpoint.step_of(newest) if newest else 0,
            "the number of examples": source.examples,
            "the names of the examples": source.fingerprint,
            "their flags": json.dumps(flags, sort_keys=True),
        },
        "give all of them the same flags, and the same --model_dir and data on a file system that they share",
    )


def write_description(config: Config, run: Run) -> None:
    """Writes what made the run into its folder: config.json, the labels that were drawn, the answers to learn."""
    run_folder.write_config(config.model_dir, run.description)
    if run.answers and not run.answers.kept:
        propagation.keep(config.model_dir, run.answers)
    if run.labelled is not None:
        with run_folder.writing(f"--model_dir={config.model_dir}"):
            path = os.path.join(config.model_dir, "labelled_subset.json")
            run_folder.write_json(path, {"seed": config.label_seed, "examples": run.labelled})


def views_in_words(task: tasks.Task) -> list[str]:
    """A line for each kind of view: which keys of a batch get it, and its transforms in their order."""
    keys: dict[str, list[str]] = {}
    for key, view in task.views.items():
        keys.setdefault(augment.in_words(view), []).append(key)
    return [f"{', '.join(names)}: {words}" for words, names in keys.items()]


@contextlib.contextmanager
def scalar_writer(config: Config, chief: bool) -> Iterator[tf.summary.SummaryWriter]:
    """The chief's TensorBoard writer; the other workers get one that writes nothing.

    It is closed however the loop ends.
    """
    folder = os.path.join(config.model_dir, "train")
    with run_folder.writing(folder):
        writer = tf.summary.create_file_writer(folder) if chief else tf.summary.create_noop_writer()
    try:
        yield writer
    finally:
        with run_folder.writing(folder):
            writer.close()


def write_scalars(
    writer: tf.summary.SummaryWriter, step: int, values: Mapping[str, float], prefix: str = "train"
) -> None:
    """Writes the scalars of a step for TensorBoard, under `prefix`."""
    with run_folder.writing("the TensorBoard scalars"):
        with writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(f"{prefix}/{name}", value)
        writer.flush()


def check_finite(values: Mapping[str, float], tried: checkpoint.RunCheckpoints | None = None) -> None:
    """Stops on a number that is not finite.

    Args:
      values: a step's metrics by name.
      tried: the run's checkpoints, where the weights of the newest of them gave these values: it is then set aside.

    Raises:
      FloatingPointError: naming the first of `values` that is not finite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            if tried:
                tried.set_aside_newest()
            raise FloatingPointError(f"{name} is {value}")


def summary(values: Mapping[str, float]) -> str:
    """A step's metrics in a few words, for the terminal."""
    parts = [f"loss {values['loss']:.3f}"]
    if "contrastive_accuracy" in values:
        accuracy, chance = values["contrastive_accuracy"], values["contrastive_chance"]
        parts.append(f"contrastive accuracy {accuracy:.1%} (chance {100 * chance:.2g}%)")
    elif "teacher_agreement" in values:
        parts.append(f"agrees with the teacher on {values['teacher_agreement']:.1%}")
    elif "supervised_accuracy" in values:
        parts.append(f"accuracy {values['supervised_accuracy']:.1%}")
    parts.append(f"{values['images_per_second']:,.0f} images/s")
    return ", ".join(parts)
