"""How long to train and at which learning rate: the number of steps, the warmup and the cosine (appendix B.1)."""

from __future__ import annotations

import math

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("simclr")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warmup from 0 to `peak`, then half a cosine down to 0 at `total_steps` (appendix B.1)."""

    def __init__(self, peak: float, warmup_steps: int, total_steps: int) -> None:
        self.peak, self.warmup_steps, self.total_steps = peak, warmup_steps, total_steps

    def __call__(self, step: int | tf.Tensor) -> tf.Tensor:
        """Learning rate (float32 scalar) of the step that follows `step` finished ones."""
        step = tf.cast(step, tf.float32)
        warmup = self.peak * step / max(self.warmup_steps, 1)
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        cosine = 0.5 * self.peak * (1.0 + tf.cos(math.pi * tf.clip_by_value(progress, 0.0, 1.0)))
        return tf.where(step < self.warmup_steps, warmup, cosine)

    def get_config(self) -> dict:
        return dict(peak=self.peak, warmup_steps=self.warmup_steps, total_steps=self.total_steps)


def train_steps(examples: int, epochs: int, batch: int, steps: int = 0) -> int:
    """Steps to train: `steps` where given, else those of the release, examples * epochs // batch + 1."""
    return steps or examples * epochs // batch + 1


def epoch_steps(examples: int, batch: int) -> int:
    """Steps of an epoch, rounded as in the release; at least one."""
    return max(1, round(examples / batch))


def warmup_steps(examples: int, warmup_epochs: float, batch: int) -> int:
    """Steps of warmup, rounded as in the release."""
    return round(warmup_epochs * examples // batch)


def ramped_decay(decay: float, step: tf.Tensor) -> tf.Tensor:
    """The decay of a moving average at step t, the first being 1: min(decay, (1 + t) / (10 + t)), float32 scalar.

    It averages over a tenth of the steps so far until that is as long as `decay` says. The ramp is that of
    `num_updates` in tf.train.ExponentialMovingAverage.

    Args:
      decay: what it rises to.
      step: t, an integer scalar.

    Example:
      ramped_decay(0.999, tf.constant(8)) == 0.5
    """
    step = tf.cast(step, tf.float32)
    return tf.minimum(decay, (1.0 + step) / (10.0 + step))


def peak_learning_rate(learning_rate: float, scaling: str, batch: int) -> float:
    """Learning rate after warmup: x batch / 256 for `linear`, x sqrt(batch) for `sqrt` scaling."""
    return learning_rate * (batch / 256.0 if scaling == "linear" else math.sqrt(batch))
