"""The network: encoder h = f(x), projection head z = g(h) and supervised head; and the momentum (EMA) update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

import folding
import resnet

FREEZE_ENDPOINTS = ("initial_max_pool", "block_group1", "block_group2", "block_group3", "block_group4")


class Outputs(NamedTuple):
    """What the network computes for images [N, H, W, 3].

    Attributes:
      h: [N, D], the encoder's pooled output.
      hiddens: the outputs of the head's layers: hiddens[0] is h, hiddens[k] the k-th layer after its ReLU, the last z.
      z: [N, proj_out_dim], the projection; h where the head is `none`.
      logits: [N, classes], what the supervised head makes of hiddens[ft_proj_selector]; None without classes.
      endpoints: the encoder's named activations.

    All are in float32, but for the endpoints other than h of an encoder that computes in another precision.
    """

    h: tf.Tensor
    hiddens: Sequence[tf.Tensor]
    z: tf.Tensor
    logits: tf.Tensor | None
    endpoints: dict[str, tf.Tensor]


def projection_head(
    input_dim: int,
    mode: str = "nonlinear",
    out_dim: int = 128,
    num_layers: int = 3,
    keep: int | None = None,
    global_bn: bool = True,
    batch_norm_decay: float = 0.9,
    precision: str = "float32",
    name: str = "projection_head",
) -> keras.Model | None:
    """Builds g (section 2.1): dense layers, each with batch norm after it. All but the last are as wide as their input.

    Args:
      input_dim: width D of h.
      mode: `nonlinear` (ReLU between layers), `linear` (one layer) or `none`.
      out_dim: width of z.
      num_layers: layers of a nonlinear head.
      keep: build only this many first layers, for fine-tuning from a middle layer; None: build all.
      precision: a key of `resnet.POLICIES`, in which the dense layers multiply. All else, their outputs too, is in
        float32: that costs next to nothing here.

    Returns:
      A model from [N, D] to a dict of its layers' outputs, `proj_head_<k>`; None where no layer is built.
    """
    total = {"none": 0, "linear": 1, "nonlinear": num_layers}[mode]
    built = total if keep is None else keep
    if built == 0:
        return None
    inputs = keras.Input((input_dim,), name="proj_head_input")
    x = inputs
    hiddens = {}
    for layer in range(1, built + 1):
        last = layer == total
        x = keras.layers.Dense(
            out_dim if last else input_dim, use_bias=False, name=f"head{layer}_dense",
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.01), dtype=resnet.POLICIES[precision],
        )(x)  # fmt: skip
        x = resnet.BatchNorm(
            momentum=batch_norm_decay, epsilon=resnet.BATCH_NORM_EPSILON, center=not last, synchronized=global_bn,
            name=f"head{layer}_bn",
        )(x)  # fmt: skip
        if not last:
            x = keras.layers.ReLU(name=f"head{layer}_relu")(x)
        hiddens[f"proj_head_{layer}"] = x  # [N, D], the last [N, out_dim]
    return keras.Model(inputs, hiddens, name=name)


@keras.saving.register_keras_serializable("simclr")
class Model(keras.Model):
    """f, g and the supervised head in one.

    Args:
      encoder: the encoder f, as from `resnet.resnet`.
      head: the projection head g, as from `projection_head`, or None.
      num_classes: classes of the supervised head; 0: no supervised head.
      ft_proj_selector: the layer that the supervised head stands on; 0: h, -1: the last.
      detached: let no gradient of the supervised head into f and g (the linear evaluation beside pretraining).
      zero_init: start the supervised head from zeros.
      remat: in training, compute the activations of the encoder's blocks again in the backward pass.
    """

    def __init__(
        self, encoder: keras.Model, head: keras.Model | None, num_classes: int = 0, ft_proj_selector: int = 0,
        detached: bool = False, zero_init: bool = False, remat: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(name="simclr")
        self.encoder = encoder
        self._recomputing = resnet.Recomputing(encoder) if remat else None
        self.head = head
        self.ft_proj_selector = ft_proj_selector
        self.detached = detached
        self.num_classes = num_classes
        self.supervised_head = None
        if num_classes:
            normal = keras.initializers.RandomNormal(stddev=0.01)
            self.supervised_head = keras.layers.Dense(
                num_classes, kernel_initializer="zeros" if zero_init else normal, name="supervised_head"
            )
            inputs = [encoder.output["final_avg_pool"]]
            if head:
                inputs += head.outputs
            self.supervised_head.build(inputs[ft_proj_selector].shape)
        self.built = True

    def call(self, images: tf.Tensor, training: bool = False) -> Outputs:
        """The network's `Outputs` for `images` [N, H, W, 3], float in [0, 1]."""
        return self._outputs(self.encoder, self.head, images, training)

    def inference(self) -> Callable[[tf.Tensor], Outputs]:
        """The network in inference mode as a function of images, with batch norm folded (`folding.folded`).

        It computes what the call does up to rounding, always with the weights as they are, and is faster. Of the
        endpoints it has h alone.
        """
        h = {"final_avg_pool": self.encoder.output["final_avg_pool"]}
        encoder = folding.folded(keras.Model(self.encoder.input, h))
        head = folding.folded(self.head) if self.head else None
        return lambda images: self._outputs(encoder, head, images, training=False)

    def _outputs(self, encoder: keras.Model, head: keras.Model | None, images: tf.Tensor, training: bool) -> Outputs:
        """The outputs with an encoder and a head that stand for this model's own."""
        recomputing = self._recomputing if training else None
        endpoints = recomputing(images) if recomputing else encoder(images, training=training)
        h = endpoints["final_avg_pool"]  # [N, D]
        hiddens = [h]
        if head:
            hiddens += head(h, training=training).values()
        logits = None
        if self.supervised_head:
            x = hiddens[self.ft_proj_selector]
            if self.detached:
                x = tf.stop_gradient(x)
            logits = self.supervised_head(x)  # [N, classes]
        return Outputs(h, hiddens, hiddens[-1], logits, endpoints)

    @property
    def output_dim(self) -> int:
        """Width of z."""
        z = self.head.outputs[-1] if self.head else self.encoder.output["final_avg_pool"]
        return z.shape[-1]

    def named_weights(self) -> dict[str, dict[str, dict[str, keras.Variable]]]:
        """Every weight by part (`encoder`, `head`, `supervised_head`), layer and name."""
        parts = {
            "encoder": self.encoder.layers,
            "head": self.head.layers if self.head else [],
            "supervised_head": [self.supervised_head] if self.supervised_head else [],
        }
        named: dict[str, dict[str, dict[str, keras.Variable]]] = {}
        for part, layers in parts.items():
            named[part] = {}
            for layer in layers:
                if layer.variables:
                    named[part][layer.name] = {variable.name: variable for variable in layer.variables}
        return named

    def freeze(self, after_block: int) -> None:
        """Freezes the stem and the groups of blocks up to `after_block`.

        Frozen layers get no gradient, and their batch norm runs in inference mode. At 4 the projection head freezes
        too, so that only the supervised head is trained: linear evaluation. At -1 nothing freezes.
        """
        if after_block < 0:
            return
        frozen = keras.Model(self.encoder.inputs, self.encoder.output[FREEZE_ENDPOINTS[after_block]])
        for layer in frozen.layers:
            layer.trainable = False
        if after_block == 4 and self.head:
            self.head.trainable = False


def ema_update(target: keras.Model, source: keras.Model, decay: float | tf.Tensor) -> None:
    """Moves the weights of `target` towards those of `source`: theta_k <- decay theta_k + (1 - decay) theta_q.

    The target keeps its own batch-norm statistics. Both models are built alike, with their weights in the same order.
    """
    for k, q in zip(target.trainable_variables, source.trainable_variables, strict=True):
        k.assign(decay * k + (1.0 - decay) * q)
