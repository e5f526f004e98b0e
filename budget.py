"""How long a run fits into --train_minutes: measured on the run itself before it begins, then fixed in its config."""

from __future__ import annotations

import gc
import time
from typing import NamedTuple

import tensorflow as tf
from absl import logging

import pilot
import preparation
import recipe
import strategy as strategy_lib
import train
from config import Config

# Steps are measured for this share of the time there is, and for at most so many seconds.
MEASURED_SHARE = 0.02
MEASURED_SECONDS = 5.0
# Share of the time for what is not a step: checkpoints, summaries, looks at the features.
RESERVE = 0.05
# Below so many epochs the length is given in steps: whole epochs would leave up to half of the time unused, and where
# not even one fits, take many times as long.
FEWEST_WHOLE_EPOCHS = 20
FEWEST_STEPS = 20  # Fewer teach nothing.


class Pace(NamedTuple):
    """How fast a run goes on this machine.

    Attributes:
      examples: images in an epoch.
      images_per_second: over all replicas, input pipeline included.
      start_seconds: from nothing to the end of the first step: opening the data, building, tracing.
    """

    examples: int
    images_per_second: float
    start_seconds: float


class Length(NamedTuple):
    """How long a run is.

    Attributes:
      field: of `Config` that says it: train_epochs or train_steps.
      value: of that field.
      epochs: what it comes to.
      in_words: how it was found, for people to read.
    """

    field: str
    value: int
    epochs: float
    in_words: str


def fit(config: Config, strategy: tf.distribute.Strategy, started: float, trainings: int = 0) -> Length:
    """The length with which a new run ends `config.train_minutes` after `started`.

    It is at least `FEWEST_STEPS` or an epoch, whichever is shorter, and at most `recipe.MAX_EPOCHS`. Every worker gets
    the chief's. Evaluation and export after training do not count.

    Args:
      config: of the run.
      strategy: of the run.
      started: when the command began, by `time.monotonic`.
      trainings: how many networks `pilot.try_views` trains before the run, in the same time.

    Raises:
      UserError: on a mistake found before the first step, or where the memory is full.
    """
    seconds = 60.0 * config.train_minutes
    pace = measure(config, strategy, min(MEASURED_SECONDS, MEASURED_SHARE * seconds))
    gc.collect()  # The run that was measured is gone before the real one is built.
    left = seconds - (time.monotonic() - started) - (1 + trainings) * pace.start_seconds
    mine = [images_that_fit(left, pace, trainings), round(pace.images_per_second)]
    images, images_per_second = strategy_lib.as_chief_says(strategy, mine)
    minutes = f"{config.train_minutes:g} minute{_plural(config.train_minutes)}"
    time_there_is = f"{minutes} ({images_per_second:,} images/s)"
    return length(images, pace.examples, config.train_batch_size, time_there_is)


def images_that_fit(seconds: float, pace: Pace, trainings: int = 0) -> int:
    """How many images a run may see in `seconds` of training, beside so many trainings of `pilot.py`.

    Example:
      images_that_fit(100.0, Pace(examples=950, images_per_second=30.0, start_seconds=5.0)) == 2850
    """
    images = max(0.0, seconds) * (1.0 - RESERVE) * pace.images_per_second
    return int(pilot.images_of_run(images, trainings))


def length(images: int, examples: int, batch: int, time_there_is: str) -> Length:
    """The length of a run that may see so many `images`, in epochs of so many `examples` and steps of `batch`."""
    epochs, most = images // examples, recipe.MAX_EPOCHS
    if epochs > most:
        said = f"{epochs:,} epochs fit into {time_there_is}: {most:,} are trained, the most for any run"
        return Length("train_epochs", most, most, said)
    if epochs >= FEWEST_WHOLE_EPOCHS:
        return Length("train_epochs", epochs, epochs, f"{epochs:,} epochs fit into {time_there_is}")
    least = min(FEWEST_STEPS, examples // batch + 1)
    steps = max(least, images // batch)
    said = f"{steps:,} step{_plural(steps)} ({steps * batch / examples:.2g} epochs)"
    if images // batch < least:
        said = f"next to nothing fits into {time_there_is} beside the start: {said}, which takes longer"
    else:
        said = f"{said} {'fits' if steps == 1 else 'fit'} into {time_there_is}"
    return Length("train_steps", steps, steps * batch / examples, said)


def warn_of_warmup(config: Config, epochs: float) -> None:
    """Warns where the learning rate of a preset or a flag is still warming up when the `epochs` that fit are over."""
    if config.warmup_epochs >= epochs:
        logging.warning(
            "--warmup_epochs=%g leaves none of the %.2g epochs that fit at the full learning rate: give a lower one, "
            "or --recipe=auto, which chooses it",
            config.warmup_epochs,
            epochs,
        )


def _plural(number: float) -> str:
    return "" if number == 1 else "s"


def measure(config: Config, strategy: tf.distribute.Strategy, seconds: float) -> Pace:
    """Builds the run of `config`, trains it for at least `seconds` and throws it away. Writes nothing.

    It calls the device as training does, for `config.steps_per_call` steps at a time. The calls are counted in blocks,
    each twice as long as the one before. Only the last block counts, since the first calls find batches that were made
    while the step was traced.
    """
    started = time.monotonic()
    run = preparation.prepare(config, strategy)
    batches = train.training_batches(config, run, strategy)
    step = train.make_train_step(run.task, run.optimizer, strategy)
    several = train.several_steps(step, strategy)
    steps_of_call = config.steps_per_call

    def seconds_of(calls: int) -> float:
        began = time.monotonic()
        for _ in range(calls):
            of_call = [next(batches) for _ in range(steps_of_call)]
            taken = several(of_call) if steps_of_call > 1 else [step(of_call[0])]
        float(taken[-1]["loss"])  # An accelerator takes steps faster than it does them: this waits for the last.
        return time.monotonic() - began

    try:
        seconds_of(1)
        start_seconds = time.monotonic() - started
        calls = 1
        while True:
            took = seconds_of(calls)
            (enough,) = strategy_lib.as_chief_says(strategy, [int(took >= seconds)])
            if enough:
                images = calls * steps_of_call * config.train_batch_size
                return Pace(run.source.examples, images / took, start_seconds)
            calls *= 2
    except tf.errors.ResourceExhaustedError as error:
        raise train.no_memory_left("while the speed was measured", error) from error
