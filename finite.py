"""What becomes of a run whose loss, gradient or weights are not finite: it stops, leaves the step out, or goes back."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

import memory
import tasks

SKIPPED_STEPS = "skipped_steps"  # How many steps of the run were left out so far, as a metric of each step.
RESTORES = "nan_restores"  # How often the run has gone back.
COUNTS = "counts"  # A metric: 1 where the step was taken, 0 where it was left out.
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


class Guard:
    """Lets a step whose numbers are not finite leave no trace. All replicas decide alike.

    It takes the memory of a copy of `variables`.

    Args:
      variables: all that a step changes and that is to stay as it was, such as `changed_by_a_step`.
      skipped: int64 scalar, how many steps of the run were left out. It counts on.
    """

    def __init__(self, variables: Sequence[Any], skipped: tf.Variable) -> None:
        self._variables, self._skipped = variables, skipped

    def before(self) -> list[tf.Tensor]:
        """What the variables hold before the step. Call it on each replica, as `after`."""
        return [tf.identity(variable) for variable in self._variables]

    def after(self, metrics: tasks.Metrics, before: Sequence[tf.Tensor]) -> tasks.Metrics:
        """Puts back what the variables held `before`, where a metric or a variable is not finite.

        Args:
          metrics: this replica's shares of the step's metrics.
          before: as from `before`.

        Returns:
          The metrics, with `SKIPPED_STEPS` and `COUNTS` besides.
        """
        floats = [variable for variable in self._variables if tf.as_dtype(variable.dtype).is_floating]
        finite = [tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(x))) for x in [*metrics.values(), *floats]]
        bad_here = tf.cast(tf.logical_not(tf.reduce_all(finite)), tf.float32)
        replicas = tf.distribute.get_replica_context()
        taken = replicas.all_reduce(tf.distribute.ReduceOp.SUM, bad_here) == 0.0
        replicas.merge_call(self._put_back, args=(taken, before))
        self._skipped.assign_add(tf.cast(tf.logical_not(taken), tf.int64))
        count, share = tf.cast(self._skipped, tf.float32), 1.0 / replicas.num_replicas_in_sync
        return {**metrics, SKIPPED_STEPS: count * share, COUNTS: tf.cast(taken, tf.float32) * share}

    def _put_back(self, strategy: tf.distribute.Strategy, taken: tf.Tensor, before: Sequence[tf.Tensor]) -> None:
        for variable, old in zip(self._variables, before, strict=True):
            container = variable.value if isinstance(variable, keras.Variable) else variable
            strategy.extended.update(container, _keep_if, args=(taken, old), group=False)


def _keep_if(variable: tf.Variable, taken: tf.Tensor, old: tf.Tensor) -> None:
    variable.assign(tf.where(taken, variable, old))
