"""How much views change an image's colours: tried twice before a new run begins, judged by labels, then fixed.

Contrastive learning makes features that do not see what views change. Where colours tell the classes apart, as with
drawings, strong changes make features worse than raw pixels; on photographs, weak ones do. Only labels can tell, and a
few hundred steps are enough for them (docs/own_images.md).
"""

from __future__ import annotations

import dataclasses
import gc
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import alarms
import preparation
import probe
import recipe
import strategy as strategy_lib
import train
from config import Config
from predict import Predictor

# Each of both trials sees this share of the images that the run sees, and at most so many.
SHARE = 0.08
MOST_IMAGES = 20_000
# So many labelled images are looked at.
LABELLED = 2_000
# Weak colours must be better by so many standard errors: 36 labels of emoji, where they are worse, gave them 1.1.
STANDARD_ERRORS = 2.0


class Trials(NamedTuple):
    """What both trials gave.

    Attributes:
      steps: of each.
      images: how many labelled images the accuracies are measured on.
      usual, weak: the accuracy of kNN with the recipe's colours and with `recipe.WEAK_COLOURS`.
    """

    steps: int
    images: int
    usual: float
    weak: float

    @property
    def weak_is_better(self) -> bool:
        """Whether the weak colours are better by more than `STANDARD_ERRORS` of the difference."""
        errors = [alarms.noise(accuracy, self.images) for accuracy in (self.usual, self.weak)]
        return self.weak - self.usual > STANDARD_ERRORS * (errors[0] ** 2 + errors[1] ** 2) ** 0.5

    def in_words(self) -> str:
        """What was found, for people to read."""
        better = "weak ones are taken" if self.weak_is_better else "these are taken"
        return (
            f"after {self.steps:,} steps kNN gives {self.usual:.1%} with the usual changes of colour and "
            f"{self.weak:.1%} with weak ones ({self.images:,} labelled images): {better}"
        )


def is_possible(config: Config, facts: recipe.Facts | None, chosen: set[str]) -> bool:
    """Whether a new run has anything to try, and the labels to judge it by.

    Args:
      config: of the run.
      facts: what its recipe was chosen by, or None.
      chosen: the fields that the recipe chose.
    """
    return (
        config.color_pilot
        and config.train_mode == "pretrain"
        and facts is not None
        and facts.colour
        and facts.classes > 1
        and facts.labelled >= 2 * facts.classes
        and recipe.WEAK_COLOURS.keys() <= chosen
    )


def images_of_run(affordable: float) -> float:
    """How many images the run may see, where it and both trials may see `affordable` together.

    Example:
      images_of_run(116_000) == 100_000
    """
    return max(affordable / (1 + 2 * SHARE), affordable - 2 * MOST_IMAGES)


def trial_steps(total_steps: int, batch: int) -> int:
    """The steps of a trial, before a run of `total_steps` steps of `batch` images."""
    return max(1, min(round(SHARE * total_steps), MOST_IMAGES // batch))


def try_colours(config: Config, strategy: tf.distribute.Strategy) -> Trials | None:
    """Trains both trials, which begin as the run would, and throws them away. Writes nothing.

    Returns:
      What they gave, the same for every worker; None where too few images have labels.

    Raises:
      UserError: on a mistake found before the first step, or where the memory is full.
      FloatingPointError: where the features are not finite.
    """
    usual = _try(config, strategy)
    if usual is None:
        return None
    weak = _try(dataclasses.replace(config, **recipe.WEAK_COLOURS), strategy)
    assert weak is not None
    (steps, images, of_usual), (_, _, of_weak) = usual, weak
    mine = [round(1e6 * of_usual), round(1e6 * of_weak)]
    said = strategy_lib.as_chief_says(strategy, mine)
    return Trials(steps, images, said[0] / 1e6, said[1] / 1e6)


def _try(config: Config, strategy: tf.distribute.Strategy) -> tuple[int, int, float] | None:
    """The steps of a trial, the number of labelled images, and the accuracy of kNN on their features."""
    run = preparation.prepare(config, strategy)
    model, batch = run.task.model, config.train_batch_size
    with strategy_lib.together(strategy):
        crops, labels = probe.labelled_crops(run.source, config.image_size, LABELLED)
    folds = probe.folds(labels)
    if not folds:
        return None
    batches = train.training_batches(config, run, strategy)
    step = train.make_train_step(run.task, run.optimizer, strategy)
    steps = trial_steps(run.schedule.total_steps, batch)
    try:
        for _ in range(steps):
            step(next(batches))
    except tf.errors.ResourceExhaustedError as error:
        raise train.no_memory_left("while colours were tried", error) from error

    def features(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"h": model(images, training=False).h}

    predictor = Predictor(features, probe.in_memory(crops), probe.from_bytes, batch, strategy)
    h = np.concatenate([made["h"] for made in predictor.batches()])  # [n, D]
    if not np.isfinite(h).all():
        raise FloatingPointError(f"the features are not finite after {steps} steps: lower --learning_rate")
    accuracy = probe.accuracies(h, labels, folds)["knn"]
    gc.collect()  # This network is gone before the next one is built.
    return steps, len(labels), accuracy


def choices(trials: Trials) -> dict[str, recipe.Choice]:
    """The values that the better trial had, by field name, with the reason."""
    usual = {"color_jitter_strength": recipe.COLOR_STRENGTH, "grayscale_probability": recipe.GRAYSCALE_PROBABILITY}
    values = recipe.WEAK_COLOURS if trials.weak_is_better else usual
    ours, other = (trials.weak, trials.usual) if trials.weak_is_better else (trials.usual, trials.weak)
    kind = "usual" if trials.weak_is_better else "weak"
    reason = f"tried for {trials.steps:,} steps: kNN {ours:.1%}, with {kind} changes of colour {other:.1%}"
    return {name: recipe.Choice(value, reason) for name, value in values.items()}
