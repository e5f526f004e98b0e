"""The one train loop: any task, any strategy, from its newest checkpoint to exactly its last step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from absl import logging

import augment
import checkpoint
import config as config_lib
import console
import data
import lars_optimizer
import published
import run_folder
import schedule as schedule_lib
import sources
import strategy as strategy_lib
import tasks
from config import Config, from_dict
from errors import UserError
from plan import footprint


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run trains with, as `prepare` makes it.

    Attributes:
      source: the training set.
      labelled: the names of its labelled examples where a subset of them was drawn.
      task: the networks and the loss.
      schedule: the learning rate by step, and the number of steps.
      checkpoints: where the state is kept.
      description: what config.json says.
      step: the steps that are done.
    """

    source: sources.Source
    labelled: list[str] | None
    task: tasks.Task
    optimizer: keras.optimizers.Optimizer
    schedule: schedule_lib.WarmupCosine
    checkpoints: checkpoint.RunCheckpoints
    description: dict[str, Any]
    step: int


def train(config: Config, strategy: tf.distribute.Strategy) -> int:
    """Trains the run of `config`, or goes on where it stopped. Returns the step it has reached.

    Raises:
      UserError: on a mistake in the config, the data or a checkpoint; nothing has been written then.
      FloatingPointError: when the loss, a metric or a weight is not finite; no checkpoint holds such a number.
      KeyboardInterrupt: on Ctrl-C, saying from which step the same command goes on.
    """
    run = prepare(config, strategy)
    step, steps, batch = run.step, run.schedule.total_steps, config.train_batch_size
    if step >= steps:
        return step
    chief = strategy_lib.is_chief(strategy)
    if chief:
        write_description(config, run)
        for line in views_in_words(run.task):
            console.say(line)
    # TensorFlow cannot shuffle by a seed that is a tensor, an epoch's, while its global seed is 0.
    tf.random.set_seed(config.seed + 1)
    stream = strategy.distribute_datasets_from_function(
        lambda context: data.train_stream(run.source, run.task.views, batch, config.seed, run.step, context)
    )
    batches = data.batches(stream)
    train_step = make_train_step(run.task, run.optimizer, strategy)
    epoch_steps = schedule_lib.epoch_steps(run.source.examples, batch)
    save_every = config.checkpoint_steps or config.checkpoint_epochs * epoch_steps
    with _scalar_writer(config, chief) as writer, console.Progress(config.train_mode, "step", steps, step) as progress:
        # The images per second are counted from this step and time on.
        counted, since = step, time.monotonic()
        try:
            while step < steps:
                metrics = train_step(next(batches))
                step += 1
                progress.advance()
                writes = step % config.summary_steps == 0 or step == steps
                saves = step % save_every == 0 or step == steps
                follows_checkpoint = step - 1 == run.checkpoints.newest
                if writes or saves or follows_checkpoint or progress.due:
                    values = {name: float(value) for name, value in metrics.items()}
                    check_finite(values)
                    now = time.monotonic()
                    values["learning_rate"] = float(run.schedule(step - 1))
                    values["images_per_second"] = (step - counted) * batch / max(now - since, 1e-9)
                    progress.say(summary(values))
                if writes:
                    with writer.as_default(step=step):
                        for name, value in values.items():
                            tf.summary.scalar(f"train/{name}", value)
                    counted, since = step, now
                if saves:
                    run.checkpoints.save()
                    writer.flush()
        except FloatingPointError as stop:
            if step - 1 == run.checkpoints.newest:  # Its weights, unchanged, gave this loss.
                run.checkpoints.set_aside_newest()
            advice = f"lower --learning_rate; the same command then {_goes_on(run.checkpoints)}"
            raise FloatingPointError(f"{stop} at step {step}: {advice}") from stop
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"at step {step}: the same command {_goes_on(run.checkpoints)}") from None
    # No worker may read the chief's last checkpoint before it is written.
    strategy_lib.check_agreement(strategy, {"the step": step}, "start all of them again")
    return step


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
        task.after_step()  # the momentum encoder follows
        return {"loss": loss, **metrics}

    @tf.function(autograph=False, jit_compile=jit_compile)
    def distributed_step(batch: Mapping) -> tasks.Metrics:
        shares = strategy.run(step, (batch,))
        return {name: strategy.reduce(tf.distribute.ReduceOp.SUM, share, axis=None) for name, share in shares.items()}

    return distributed_step


def prepare(config: Config, strategy: tf.distribute.Strategy) -> Run:
    """Opens the data, makes the networks, and restores the newest checkpoint. Writes nothing.

    Raises:
      UserError: on a mistake in the config, the data or a checkpoint.
    """
    strategy_lib.check_batch("train_batch_size", config.train_batch_size, strategy.num_replicas_in_sync)
    teacher = published.open_teacher(config) if config.teacher else None
    source, labelled = data.train_source(config, teacher.named_classes if teacher else None)
    classes = teacher.classes_as(source.classes) if teacher else list(source.classes)
    before = run_folder.read_config(config.model_dir)
    if before and before["classes"] != classes:
        raise UserError(f"--model_dir={config.model_dir} was trained on other classes: choose another folder")
    check_labels(config, source, classes)
    check_evaluation(config, strategy, classes, f"--teacher={config.teacher}" if teacher else "")
    teacher_config = from_dict(teacher.config) if teacher else None
    replicas, device_bytes = strategy.num_replicas_in_sync, strategy_lib.device_memory(strategy)
    footprint.check_training_memory(config, replicas, len(classes), device_bytes, teacher_config)
    if config.mode == "train_then_eval":
        footprint.check_evaluation_memory(config, replicas, len(classes), device_bytes, teacher_config)
    if teacher and teacher.config["train_mode"] == "pretrain" and "dataset" in teacher.config:
        told = config.teacher, teacher.config["dataset"]
        logging.warning("--teacher=%s is a pretraining run: its classifier has learnt every label of %s", *told)
    schedule = schedule_lib.of_run(config, source.examples)
    fingerprint = source.fingerprint
    description = run_folder.describe(config.to_dict(), classes, source.examples, fingerprint)
    newest = checkpoint.newest_that_reads(config.model_dir, f"--model_dir={config.model_dir}")
    strategy_lib.check_agreement(
        strategy,
        {
            "the step of their newest checkpoint": checkpoint.step_of(newest) if newest else 0,
            "the number of examples": source.examples,
            "the names of the examples": zlib.crc32(fingerprint.encode()),
        },
        "give all of them the same --model_dir and the same data on a file system that they share",
    )
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        task = tasks.make_task(config, classes, tasks.frozen_logits(teacher) if teacher else None)
        head = task.model.supervised_head
        optimizer = lars_optimizer.make_optimizer(
            config.optimizer, schedule, config.momentum, config.weight_decay, head.trainable_variables if head else ()
        )
        optimizer.build(task.model.trainable_variables)
        checkpoints = checkpoint.RunCheckpoints(
            config.model_dir, description, config.keep_checkpoint_max, task.model, optimizer, task.state,
            strategy_lib.is_chief(strategy),
        )  # fmt: skip
        step = checkpoints.resume(newest)
        if not step and config.checkpoint:
            tasks.start_from(published.open_weights(config.checkpoint, given=config.to_dict()), classes, task)
    if before and step:
        say_what_goes_on(config, before, description, step, schedule.total_steps)
    return Run(source, labelled, task, optimizer, schedule, checkpoints, description, step)


def say_what_goes_on(
    config: Config, before: Mapping[str, Any], description: Mapping[str, Any], step: int, steps: int
) -> None:
    """Says where a run stands, and what is no longer as it was when it was last trained."""
    changes = config_lib.changed_values(config, before).items()
    changed = ", ".join(f"--{name}={now} (before: {was})" for name, (was, now) in changes)
    if step >= steps:
        unused = f"; nothing is trained with {changed}" if changed else ""
        console.say(f"already at step {step} of {steps}{unused}")
        return
    console.say(f"goes on from step {step} of {steps}" + (f", with {changed}" if changed else ""))
    for name in ("train_examples", "data_fingerprint"):
        if name in before and before[name] != description[name]:
            examples = f"{before['train_examples']:,} examples then, {description['train_examples']:,} now"
            logging.warning("the training data have changed since the run began (%s): it goes on with these", examples)
            break


def write_description(config: Config, run: Run) -> None:
    """Writes what made the run into its folder: config.json and, where labels were drawn, labelled_subset.json."""
    run_folder.write_config(config.model_dir, run.description)
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
def _scalar_writer(config: Config, chief: bool) -> Iterator[tf.summary.SummaryWriter]:
    """The TensorBoard writer of the chief, closed on every way out; the other workers' writes nothing."""
    folder = os.path.join(config.model_dir, "train")
    with run_folder.writing(folder):
        writer = tf.summary.create_file_writer(folder) if chief else tf.summary.create_noop_writer()
    try:
        yield writer
    finally:
        writer.close()


def check_finite(values: Mapping[str, float]) -> None:
    """Raises FloatingPointError naming the first of `values` that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
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


def _goes_on(checkpoints: checkpoint.RunCheckpoints) -> str:
    newest = checkpoints.newest
    return "starts from the beginning, as nothing was saved" if newest is None else f"goes on from step {newest}"


def check_evaluation(config: Config, strategy: tf.distribute.Strategy, classes: list[str], known_by: str) -> None:
    """Refuses before the training what the evaluation after it would refuse, unreadable images too."""
    if config.mode != "train_then_eval":
        return
    strategy_lib.check_batch("eval_batch_size", config.eval_batch_size, strategy.num_replicas_in_sync)
    known_by = known_by or f"--train_split={config.train_split}"
    sources.load(config.dataset, config.eval_split, config.data_dir, classes, config.max_corrupt_fraction, known_by)


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
                f"--teacher={config.teacher} knows {len(classes)} classes ({', '.join(classes[:5])}, ...), the data "
                f"{len(source.classes)} ({', '.join(source.classes[:5])}, ...): give a teacher of the data's classes"
            )
        if config.distill_alpha < 1 and not source.has_labels:
            raise UserError(f"--distill_alpha={config.distill_alpha} needs labels, and the data has none: use 1")
