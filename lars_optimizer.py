"""LARS (arXiv 1708.03888) as a Keras 3 optimizer, and the choice of an optimizer by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("simclr")
class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive rate scaling with momentum, the learning rate inside the momentum.

    For a weight w with gradient g, at learning rate lr:

        g' = g + weight_decay * w;  r = eeta * |w| / |g'|;  v <- momentum * v + lr * r * g';  w <- w - v

    where r = 1 when either norm is 0. A variable of rank 0 or 1 (bias, batch-norm scale and offset) or one named by
    `exclude` is neither decayed nor scaled: r = 1 and weight_decay = 0.

    Args:
      learning_rate: float, schedule, or callable of no argument.
      momentum: decay of v, in [0, 1).
      weight_decay: L2 coefficient, added to the gradient before the norm is taken.
      eeta: the trust coefficient.
    """

    def __init__(
        self, learning_rate: Any = 0.3, momentum: float = 0.9, weight_decay: float = 0.0, eeta: float = 1e-3,
        name: str = "lars", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)  # Keras' own weight decay stays off.
        self.momentum = momentum
        self.lars_weight_decay = weight_decay
        self.eeta = eeta
        self._excluded: set = set()

    def exclude(self, variables: Iterable[keras.Variable]) -> None:
        """Leaves these variables undecayed and unscaled. Call before the first step; not part of the config."""
        self._excluded |= {self._var_key(variable) for variable in variables}

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        lr = tf.cast(learning_rate, variable.dtype)
        velocity = self.momentums[self._get_variable_index(variable)]
        if len(variable.shape) > 1 and self._var_key(variable) not in self._excluded:
            gradient = gradient + self.lars_weight_decay * variable
            w_norm, g_norm = tf.norm(variable), tf.norm(gradient)
            ratio = tf.math.divide_no_nan(self.eeta * w_norm, g_norm)
            lr *= tf.where((w_norm > 0) & (g_norm > 0), ratio, 1.0)
        self.assign(velocity, self.momentum * velocity + lr * gradient)
        self.assign_sub(variable, velocity)

    def get_config(self) -> dict:
        options = dict(momentum=self.momentum, weight_decay=self.lars_weight_decay, eeta=self.eeta)
        return {**super().get_config(), **options}


def make_optimizer(
    name: str, learning_rate: Any, momentum: float = 0.9, weight_decay: float = 0.0, head: Iterable[keras.Variable] = ()
) -> keras.optimizers.Optimizer:
    """The optimizer `lars`, `momentum` (SGD with Nesterov momentum) or `adam`.

    Only LARS decays weights by itself, all but those of `head`, the supervised head; for the rest see
    `objective.weight_decay_loss`. The names are fixed, since checkpoints keep an optimizer's state under its name.
    """
    if name == "lars":
        optimizer = LARS(learning_rate, momentum=momentum, weight_decay=weight_decay)
        optimizer.exclude(head)
        return optimizer
    if name == "momentum":
        return keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=True, name="momentum")
    return keras.optimizers.Adam(learning_rate, name="adam")
