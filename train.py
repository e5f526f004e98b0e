"""The one train loop: any task, any strategy, from its newest checkpoint to exactly its last step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping

import keras
import tensorflow as tf
from absl import logging
from tqdm import tqdm

import checkpoint
import data
import lars_optimizer
import published
import sources
import strategy as strategy_lib
import tasks
from config import Config
from errors import UserError


def train(config: Config, strategy: tf.distribute.Strategy) -> int:
    """Trains the run of `config`, or goes on where it stopped. Returns the step it has reached.

    Raises:
      UserError: on a mistake in the config, the data or a checkpoint; nothing has been written then.
      FloatingPointError: when the loss is not finite.
    """
    strategy_lib.check_batch("train_batch_size", config.train_batch_size, strategy)
    teacher = published.open_teacher(config) if config.teacher else None
    source, chosen = data.train_source(config, teacher.named_classes if teacher else None)
    classes = teacher.classes_as(source.classes) if teacher else list(source.classes)
    before = checkpoint.read_config(config.model_dir)
    if before and before["classes"] != classes:
        raise UserError(f"--model_dir={config.model_dir} was trained on other classes: choose another folder")
    check_labels(config, source, classes)
    if config.mode == "train_then_eval":  # better told now than after days of training
        strategy_lib.check_batch("eval_batch_size", config.eval_batch_size, strategy)
        data.load(config.dataset, config.eval_split, config.data_dir, classes)
    batch = config.train_batch_size
    steps = lars_optimizer.train_steps(source.examples, config.train_epochs, batch, config.train_steps)
    schedule = make_schedule(config, source.examples, steps)
    description = checkpoint.describe(config.to_dict(), classes, source.examples)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        task = tasks.make_task(config, classes, tasks.frozen_logits(teacher) if teacher else None)
        head = task.model.supervised_head
        optimizer = lars_optimizer.make_optimizer(
            config.optimizer, schedule, config.momentum, config.weight_decay, head.trainable_variables if head else ()
        )
        optimizer.build(task.model.trainable_variables)
        saved = checkpoint.RunCheckpoints(
            config.model_dir, description, config.keep_checkpoint_max, task.model, optimizer, task.state,
            strategy_lib.is_chief(strategy),
        )  # fmt: skip
        step = saved.resume()
        if step:
            logging.info("resumed %s at step %d", config.model_dir, step)
        elif config.checkpoint:
            tasks.start_from(published.open_weights(config.checkpoint, given=config.to_dict()), classes, task)
    chief = strategy_lib.is_chief(strategy)
    if chief:
        checkpoint.write_config(config.model_dir, description)
    if chief and chosen is not None:
        path = os.path.join(config.model_dir, "labelled_subset.json")
        checkpoint.write_json(path, {"seed": config.label_seed, "examples": chosen})
    # TensorFlow cannot shuffle by a seed that is a tensor, an epoch's, while its global seed is 0.
    tf.random.set_seed(config.seed + 1)
    stream = strategy.distribute_datasets_from_function(
        lambda context: data.train_stream(source, task.views, batch, config.seed, step, context)
    )
    every = config.checkpoint_steps or config.checkpoint_epochs * lars_optimizer.epoch_steps(source.examples, batch)
    train_step = make_train_step(task, optimizer, strategy)
    scalars = os.path.join(config.model_dir, "train")
    writer = tf.summary.create_file_writer(scalars) if chief else tf.summary.create_noop_writer()
    _loop(config, train_step, iter(stream), saved, schedule, writer, step, steps, every)
    return max(step, steps)


def _loop(
    config: Config, train_step: Callable, batches: Iterator, saved: checkpoint.RunCheckpoints, schedule: Callable,
    writer: tf.summary.SummaryWriter, step: int, steps: int, checkpoint_every: int,
) -> None:  # fmt: skip
    """Steps from `step` to `steps`, with a progress bar, TensorBoard scalars and checkpoints on the way."""
    with tqdm(total=steps, initial=step, desc=config.train_mode, unit="step", disable=None, smoothing=0.05) as bar:
        started, since = time.monotonic(), step
        while step < steps:
            metrics = train_step(next(batches))
            step += 1
            bar.update()
            if step % config.summary_steps == 0 or step == steps:
                values = {name: float(value) for name, value in metrics.items()}
                if not all(map(math.isfinite, values.values())):
                    name = next(name for name, value in values.items() if not math.isfinite(value))
                    raise FloatingPointError(f"{name} is {values[name]} at step {step}: lower --learning_rate")
                elapsed = time.monotonic() - started
                rate = (step - since) * config.train_batch_size / max(elapsed, 1e-9)
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.0f} images/s", refresh=False)
                values |= {"learning_rate": float(schedule(step - 1)), "images_per_second": rate}
                with writer.as_default(step=step):
                    for name, value in values.items():
                        tf.summary.scalar(f"train/{name}", value)
                started, since = time.monotonic(), step
            if step % checkpoint_every == 0 or step == steps:
                saved.save()
                writer.flush()
    writer.close()


def make_train_step(
    task: tasks.Task, optimizer: keras.optimizers.Optimizer, strategy: tf.distribute.Strategy
) -> Callable[[Mapping], tasks.Metrics]:
    """The compiled step: one distributed batch in, the metrics of the global batch out."""
    variables = task.model.trainable_variables

    def step(batch: Mapping[str, tf.Tensor]) -> tasks.Metrics:
        with tf.GradientTape() as tape:
            loss, metrics = task.loss(batch)
        optimizer.apply(tape.gradient(loss, variables), variables)  # sums the replicas' gradients
        task.after_step()
        return {"loss": loss, **metrics}

    @tf.function(autograph=False)
    def distributed_step(batch: Mapping) -> tasks.Metrics:
        shares = strategy.run(step, (batch,))
        return {name: strategy.reduce(tf.distribute.ReduceOp.SUM, share, axis=None) for name, share in shares.items()}

    return distributed_step


def make_schedule(config: Config, examples: int, steps: int) -> lars_optimizer.WarmupCosine:
    """The learning rate by step."""
    peak = lars_optimizer.peak_learning_rate(
        config.learning_rate, config.learning_rate_scaling, config.train_batch_size
    )
    warmup = lars_optimizer.warmup_steps(examples, config.warmup_epochs, config.train_batch_size)
    return lars_optimizer.WarmupCosine(peak, warmup, steps)


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
                f"{len(source.classes)} ({', '.join(source.classes[:5])}, ...): they must be the same"
            )
        if config.distill_alpha < 1 and not source.has_labels:
            raise UserError(f"--distill_alpha={config.distill_alpha} needs labels, and the data has none: use 1")
