"""Which views suit the images: tried for some steps before a new run begins, judged by labels, then fixed.

Contrastive learning makes features that do not see what views change, nor what only a part of an image shows. Where
colours tell the classes apart, as with drawings, strong changes of them make features worse than raw pixels; where the
whole shape does, as with letters, small crops do, so that the recipe's crops of grey images are large. On photographs,
weak changes are worse. Only labels can tell (docs/own_images.md).
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from scipy.stats import wilcoxon

import preparation
import probe
import recipe
import strategy as strategy_lib
import tasks
import train
from config import Config
from predict import Predictor

# Each trial sees this share of the images that the run sees, and at most so many.
SHARE = 0.08
MOST_IMAGES = 20_000
# With fewer steps a trial has not learnt enough to tell views apart: one of a single step took others by chance.
FEWEST_STEPS = 10
# So many labelled images are looked at.
LABELLED = 2_000
# Other views are taken where the logarithm of the right label's probability is larger by a test at this level, and by
# so much in the mean: trials of the same views with other seeds differ by as much.
LEVEL = 0.025
LEAST_GAIN = 0.08


class Variant(NamedTuple):
    """Views that differ from the usual ones in one way.

    Attributes:
      way: in which they differ, in words.
      kind: how these are.
      values: by field of `Config`.
    """

    way: str
    kind: str
    values: dict[str, Any]


WEAK_COLOURS = Variant("changes of colour", "weak", recipe.WEAK_COLOURS)
LARGE_CROPS = Variant("crops", "large", recipe.LARGE_CROPS)
SMALL_CROPS = Variant("crops", "small", recipe.SMALL_CROPS)


class Trial(NamedTuple):
    """What a variant gave, beside the best views before it.

    Attributes:
      variant: what was tried, together with the variants that had won before.
      before, after: the logarithm of the probability of the right label, in the mean, without it and with it.
      p_value: of the images' logarithms being no larger with it, by Wilcoxon's signed-rank test.
    """

    variant: Variant
    before: float
    after: float
    p_value: float

    @property
    def is_better(self) -> bool:
        """Whether the variant is better beyond the noise of labels and of training."""
        return self.after - self.before > LEAST_GAIN and self.p_value < LEVEL

    def in_words(self) -> str:
        """What was found, for people to read."""
        kept, taken = ("", ", which are taken") if self.is_better else (", which are kept", "")
        usual = f"{math.exp(self.before):.1%} with usual {self.variant.way}{kept}"
        return f"{usual}, {math.exp(self.after):.1%} with {self.variant.kind} ones{taken}"


class Trials(NamedTuple):
    """What all trials gave, in their order.

    Attributes:
      steps: of each.
      images: how many labelled images the probabilities are of.
      trials: one for each variant.
    """

    steps: int
    images: int
    trials: tuple[Trial, ...]

    def in_words(self) -> str:
        """What was found, for people to read."""
        found = "; ".join(trial.in_words() for trial in self.trials)
        steps = f"{self.steps:,} step{'' if self.steps == 1 else 's'}"
        return f"probability of the right class of {self.images:,} images after {steps}: {found}"


def variants(config: Config, facts: recipe.Facts | None, chosen: Collection[str]) -> list[Variant]:
    """What a new run has to try; nothing where there are no labels to judge it by.

    Args:
      config: of the run.
      facts: what its recipe was chosen by, or None.
      chosen: the fields that the recipe chose.
    """
    if facts is None or facts.classes < 2 or facts.labelled < 2 * facts.classes:
        return []
    if not config.view_pilot or config.train_mode != "pretrain":
        return []
    possible = [WEAK_COLOURS, LARGE_CROPS] if facts.colour else [SMALL_CROPS]
    return [variant for variant in possible if variant.values.keys() <= set(chosen)]


def trainings(tried: Sequence[Variant]) -> int:
    """How many networks are trained to try these: one for each, and one with the usual views."""
    return 1 + len(tried) if tried else 0


def images_of_run(affordable: float, trained: int) -> float:
    """How many images the run may see, where it and so many trained networks before it may see `affordable` together.

    Example:
      images_of_run(116_000, 2) == 100_000
    """
    return max(affordable / (1 + trained * SHARE), affordable - trained * MOST_IMAGES)


def trial_steps(total_steps: int, batch: int) -> int:
    """The steps of a trial, before a run of `total_steps` steps of `batch` images."""
    return max(1, min(round(SHARE * total_steps), MOST_IMAGES // batch))


def shortened(config: Config, images: int) -> Config:
    """The config of a trial before the run of `config` on so many images: a whole run, but short.

    Its learning rate falls to nothing, since features at a high one say little: after as many steps of a run on
    letters, the order of the views changed from one look to the next (docs/own_images.md).
    """
    batch = config.train_batch_size
    steps = trial_steps(tasks.make_schedule(config, images).total_steps, batch)
    warmup = min(config.warmup_epochs, recipe.LARGEST_WARMUP * steps * batch / images)
    return dataclasses.replace(config, train_steps=steps, warmup_epochs=warmup)


def try_views(
    config: Config, facts: recipe.Facts, tried: Sequence[Variant], strategy: tf.distribute.Strategy
) -> Trials | None:
    """Trains with the usual views and with each variant, and throws all of it away. Writes nothing.

    A variant that wins is part of the next ones.

    Args:
      config: of the run.
      facts: what its recipe was chosen by.
      tried: the variants, from `variants`.
      strategy: of the run.

    Returns:
      What they gave, the same for every worker; None where too few images have labels, or the run is too short.

    Raises:
      UserError: on a mistake found before the first step, or where the memory is full.
      FloatingPointError: where the features are not finite.
    """
    config = shortened(config, facts.images)
    if config.train_steps < FEWEST_STEPS:
        return None
    before = _try(config, strategy)
    if before is None:
        return None
    trials = []
    for variant in tried:
        gc.collect()  # The network before is gone before the next one is built.
        with_it = dataclasses.replace(config, **variant.values)
        after = _try(with_it, strategy)
        assert after is not None
        mine = [round(1e6 * value) for value in (before.mean(), after.mean(), _p_value(before, after))]
        mean_before, mean_after, p_value = (said / 1e6 for said in strategy_lib.as_chief_says(strategy, mine))
        trials.append(Trial(variant, mean_before, mean_after, p_value))
        if trials[-1].is_better:
            config, before = with_it, after
    gc.collect()
    return Trials(config.train_steps, len(before), tuple(trials))


def _p_value(before: np.ndarray, after: np.ndarray) -> float:
    """Of `after` being no larger than `before`, both [n], by Wilcoxon's signed-rank test, one-sided."""
    return float(wilcoxon(after, before, alternative="greater").pvalue) if np.any(after != before) else 1.0


def _try(config: Config, strategy: tf.distribute.Strategy) -> np.ndarray | None:
    """The logarithm of the probability of each image's label by the features of a trial, [n].

    None where too few images have labels.
    """
    run = preparation.prepare(config, strategy)
    model, batch = run.task.model, config.train_batch_size
    with strategy_lib.together(strategy):
        crops, labels = probe.labelled_crops(run.source, config.image_size, LABELLED)
    folds = probe.folds(labels)
    if not folds:
        return None
    batches = train.training_batches(config, run, strategy)
    step = train.make_train_step(run.task, run.optimizer, strategy)
    try:
        for _ in range(config.train_steps):
            step(next(batches))
    except tf.errors.ResourceExhaustedError as error:
        raise train.no_memory_left("while views were tried", error) from error

    def features(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"h": model(images, training=False).h}

    predictor = Predictor(features, probe.in_memory(crops), probe.from_bytes, batch, strategy)
    h = np.concatenate([made["h"] for made in predictor.batches()])  # [n, D]
    if not np.isfinite(h).all():
        raise FloatingPointError(f"the features are not finite after {config.train_steps} steps: lower --learning_rate")
    return probe.log_probabilities(h, labels, folds)


def choices(trials: Trials, config: Config) -> dict[str, recipe.Choice]:
    """The values of the views that won, by field name, with the reason.

    Args:
      trials: what was found.
      config: with the usual views.
    """
    made: dict[str, recipe.Choice] = {}
    for trial in trials.trials:
        way, kind, values = trial.variant
        ours, theirs, other = math.exp(trial.after), math.exp(trial.before), "usual"
        if not trial.is_better:
            values = {name: getattr(config, name) for name in values}
            ours, theirs, other = theirs, ours, kind
        reason = f"tried for {trials.steps:,} steps: the right class gets {ours:.1%}, with {other} {way} {theirs:.1%}"
        made |= {name: recipe.Choice(value, reason) for name, value in values.items()}
    return made
