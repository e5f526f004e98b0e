"""A copy of a run's state on the host, to be written while training goes on.

TensorFlow has an asynchronous checkpoint of its own (`CheckpointOptions.enable_async`). It cannot copy the variables of
Keras 3: it makes a new variable for each of them at every save, and the second save raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


class StateCopy:
    """Variables on the host that take over the values of a run's variables.

    They are made at the first `take`, which must not be in the scope of a strategy. Where the state lies in the host's
    memory already, the copy doubles what it takes there.

    Args:
      state: nested dicts and `tf.Module`s of variables, of TensorFlow or Keras.
      compiled: whether to compile the copying. Workers need that, since they read averages together. Otherwise the
        seconds that it takes are not worth the milliseconds that it saves.

    Attributes:
      variables: the same nesting as `state`, with a dict for each module, with the copies in it. A checkpoint of it has
        the keys that a checkpoint of `state` has. Empty before the first `take`.
    """

    def __init__(self, state: Mapping[str, Any], compiled: bool = False) -> None:
        self._state = as_dicts(state)
        self._compiled = compiled
        self.variables: dict[str, Any] = {}
        self._names: list[str] = []
        self._copy: Callable[[], tf.Tensor] | None = None

    def take(self) -> str:
        """Copies the values that the state has now. Where there are several workers, each must call it.

        Returns:
          The name of the first variable with a number that is not finite; an empty string where all are finite.
        """
        if self._copy is None:
            pairs = _pairs(self._state)
            with tf.device("CPU:0"):
                copies = [tf.Variable(tf.zeros(variable.shape, variable.dtype)) for _, variable in pairs]
            self.variables = _nested([name for name, _ in pairs], copies)
            floats = [(name, variable) for name, variable in pairs if tf.as_dtype(variable.dtype).is_floating]
            self._names = ["/".join(name) for name, _ in floats]
            copy = functools.partial(_copy, [variable for _, variable in pairs], copies)
            self._copy = tf.function(copy, autograph=False) if self._compiled else copy
        finite = self._copy().numpy()  # [floating-point variables] bool
        return "" if finite.all() else self._names[int(np.argmin(finite))]


def as_dicts(state: Any) -> Any:
    """Nested dicts and modules as nested dicts alone. A checkpoint of both has the same keys."""
    if isinstance(state, Mapping):
        return {name: as_dicts(value) for name, value in state.items()}
    if isinstance(state, tf.Module):
        children = tf.train.TrackableView(state).children(state)
        return {name: as_dicts(value) for name, value in children.items()}
    return state


def _pairs(state: Any, name: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every variable in nested dicts, with the keys that lead to it."""
    if not isinstance(state, Mapping):
        return [(name, state)]
    return [pair for key, value in state.items() for pair in _pairs(value, (*name, key))]


def _nested(names: Sequence[tuple[str, ...]], values: Sequence[Any]) -> dict[str, Any]:
    """Nested dicts in which the keys of each name lead to its value."""
    root: dict[str, Any] = {}
    for (*folders, last), value in zip(names, values, strict=True):
        inner = root
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return root


def _copy(variables: Sequence[Any], copies: Sequence[tf.Variable]) -> tf.Tensor:
    """Copies the values of variables. Returns which of the floating-point ones have finite numbers only, [n] bool."""
    finite = []
    for variable, copy in zip(variables, copies, strict=True):
        value = tf.convert_to_tensor(variable)  # Of averages that differ between replicas it is their mean.
        copy.assign(value)
        if value.dtype.is_floating:
            finite.append(tf.reduce_all(tf.math.is_finite(value)))
    return tf.stack(finite)
