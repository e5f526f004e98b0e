"""What becomes of a run whose loss, gradient or weights are not finite: it stops, leaves the step out, or goes back.

In float16 a gradient may be too large for its type without anything being wrong: the step is left out, and the loss
scale falls.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

import memory
import tasks

SKIPPED_STEPS = "skipped_steps"  # How many steps of the run were left out so far, as a metric of each step.
RESTORES = "nan_restores"  # How often the run has gone back.
COUNTS = "counts"  # A metric: 1 where the step was taken, 0 where it was left out.
LOSS_SCALE = "loss_scale"  # A metric, and what a checkpoint remembers of `LossScale` by this name.
FIRST_SCALE, LARGEST_SCALE = 2.0**15, 2.0**24
GROWTH_STEPS = 2000
MOST_REMEMBERED = 1000
_ORDERS_APART = 0x9E3779B1


class LastSteps:
    """The metrics of the last steps, to find the first one that was not finite. It waits for none of them."""

    def __init__(self) -> None:
        self._steps: collections.deque[tuple[int, tasks.Metrics]] = collections.deque(maxlen=MOST_REMEMBERED)

    def add(self, step: int, metrics: tasks.Metrics) -> None:
        """Remembers the metrics of a step."""
        self._steps.append((step, metrics))

    def check(self, values: Mapping[str, float]) -> None:
        """Stops where one of `values`, the metrics of the last step, is not finite. Forgets all steps otherwise.

        Raises:
          FloatingPointError: naming the first step with such a metric, and the metric.
        """
        if not_finite(values):
            for step, metrics in self._steps:
                name = not_finite(metrics)
                if name:
                    raise FloatingPointError(f"{name} is {float(metrics[name])} at step {step}")
        self._steps.clear()


def not_finite(values: Mapping[str, Any]) -> str:
    """The name of the first of `values` that is not finite; an empty string where all are."""
    return next((name for name, value in values.items() if not math.isfinite(float(value))), "")


def check_skipped(skipped: int, most: int, step: int) -> None:
    """Stops a run that has left out more than `most` steps up to `step`.

    Raises:
      FloatingPointError: saying so.
    """
    if skipped > most:
        raise FloatingPointError(
            f"{skipped} steps gave numbers that are not finite, more than --max_nan_steps={most}, at step {step}"
        )


def order_seed(seed: int, restores: int) -> int:
    """The seed of a run's data after it has gone back `restores` times: another order for each time.

    Without any it is the run's own seed. Both are in [0, 2^32).
    """
    return (seed + restores * _ORDERS_APART) % 2**32


def changed_by_a_step(task: tasks.Task, optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The variables that a step changes, but for the number of steps: what a run remembers."""
    slots = [variable for variable in optimizer.variables if variable is not optimizer.iterations]
    others = []
    for part in tf.nest.flatten(task.state):
        others.append(part.shard if isinstance(part, memory.ShardedKeys) else part)
    return [*task.model.variables, *slots, *others]


class LossScale:
    """What the loss is multiplied by before its gradient is taken, so that float16 can hold small gradients.

    It halves with each step whose gradient overflows, and doubles after `GROWTH_STEPS` steps without one (section 3.2
    of arXiv 1710.03740). Keras' `LossScaleOptimizer` would not do: it does not count a step that it leaves out, while
    the number of steps says here which images come next; it asks one replica alone whether there was an overflow; and
    batch norm, momentum encoder and queue would keep what they took from the step. Make it under the strategy's scope.
    """

    def __init__(self, remembered: Mapping[str, float] | None = None) -> None:
        self._scale = tf.Variable(FIRST_SCALE, trainable=False)
        self._good_steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.back_to(remembered)

    def back_to(self, remembered: Mapping[str, float] | None) -> None:
        """Takes what `state` has returned; None: begins anew."""
        remembered = remembered or {"scale": FIRST_SCALE, "good_steps": 0}
        self._scale.assign(remembered["scale"])
        self._good_steps.assign(int(remembered["good_steps"]))

    def state(self) -> dict[str, float]:
        """What a checkpoint remembers."""
        return {"scale": float(self.value), "good_steps": int(tf.convert_to_tensor(self._good_steps))}

    @property
    def value(self) -> tf.Tensor:
        """The scale, a float32 scalar."""
        return tf.convert_to_tensor(self._scale)

    @property
    def can_fall(self) -> tf.Tensor:
        """Whether a smaller scale is left to try, a bool scalar."""
        return self.value > 1.0

    def unscaled(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The gradients of the loss, from those of the loss times the scale. A power of two loses no bit."""
        return [gradient / self.value for gradient in gradients]

    def after_step(self, overflowed: tf.Tensor) -> None:
        """Moves the scale, in replica context. `overflowed`, a bool scalar, is the same on every replica."""
        good_steps = tf.where(overflowed, tf.constant(0, tf.int64), tf.convert_to_tensor(self._good_steps) + 1)
        grows = good_steps >= GROWTH_STEPS
        larger = tf.where(grows, tf.minimum(2.0 * self.value, LARGEST_SCALE), self.value)
        self._scale.assign(tf.where(overflowed, 0.5 * self.value, larger))
        self._good_steps.assign(tf.where(grows, tf.constant(0, tf.int64), good_steps))


class Guard:
    """Lets a step whose numbers are not finite leave no trace. All replicas decide alike.

    It takes the memory of a copy of `variables`.

    Args:
      variables: all that a step changes and that is to stay as it was, such as `changed_by_a_step`.
      skipped: int64 scalar, how many steps of the run were left out. It counts on. None: no step is left out for
        numbers that are not finite, unless `scaling` explains them.
      scaling: the loss scale of float16. Where the metrics are finite and a weight is not, the gradient has
        overflowed: the step is left out, the scale falls, and `skipped` does not count it.
    """

    def __init__(
        self, variables: Sequence[Any], skipped: tf.Variable | None = None, scaling: LossScale | None = None
    ) -> None:
        self._variables, self._skipped, self._scaling = variables, skipped, scaling

    def before(self) -> list[tf.Tensor]:
        """What the variables hold before the step. Call it on each replica, as `after`."""
        return [tf.identity(variable) for variable in self._variables]

    def after(self, metrics: tasks.Metrics, before: Sequence[tf.Tensor]) -> tasks.Metrics:
        """Puts back what the variables held `before`, where the step is left out. Moves the loss scale.

        Args:
          metrics: this replica's shares of the step's metrics.
          before: as from `before`.

        Returns:
          The metrics, with `COUNTS` besides, `SKIPPED_STEPS` where `skipped` is there and `LOSS_SCALE` with `scaling`.
        """
        floats = [variable for variable in self._variables if tf.as_dtype(variable.dtype).is_floating]
        replicas = tf.distribute.get_replica_context()
        bad_metrics, bad_variables = replicas.all_reduce(
            tf.distribute.ReduceOp.SUM, [_count_bad(metrics.values()), _count_bad(floats)]
        )
        bad = bad_metrics + bad_variables > 0.0
        left_out = bad if self._skipped is not None else tf.constant(False)
        overflowed = tf.constant(False)
        share = 1.0 / replicas.num_replicas_in_sync
        more: tasks.Metrics = {}
        if self._scaling is not None:
            overflowed = bad & (bad_metrics == 0.0) & self._scaling.can_fall
            left_out |= overflowed
            more[LOSS_SCALE] = self._scaling.value * share
        replicas.merge_call(self._put_back, args=(tf.logical_not(left_out), before))
        if self._scaling is not None:
            self._scaling.after_step(overflowed)
        if self._skipped is not None:
            self._skipped.assign_add(tf.cast(left_out & tf.logical_not(overflowed), tf.int64))
            more[SKIPPED_STEPS] = tf.cast(self._skipped, tf.float32) * share
        return {**metrics, **more, COUNTS: tf.cast(tf.logical_not(left_out), tf.float32) * share}

    def _put_back(self, strategy: tf.distribute.Strategy, taken: tf.Tensor, before: Sequence[tf.Tensor]) -> None:
        for variable, old in zip(self._variables, before, strict=True):
            container = variable.value if isinstance(variable, keras.Variable) else variable
            strategy.extended.update(container, _keep_if, args=(taken, old), group=False)


def _keep_if(variable: tf.Variable, taken: tf.Tensor, old: tf.Tensor) -> None:
    variable.assign(tf.where(taken, variable, old))


def _count_bad(numbers: Iterable[Any]) -> tf.Tensor:
    """How many of these tensors and variables hold a number that is not finite, a float32 scalar."""
    finite = [tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(number))) for number in numbers]
    return tf.reduce_sum(1.0 - tf.cast(tf.stack(finite), tf.float32))
