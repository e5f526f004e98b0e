"""A network in inference mode whose batch norms are folded into the convolutions and dense layers before them.

With its moving statistics, batch norm is a scale and an offset of each channel. The scale goes into the kernel, so that
no pass over the feature maps is left for it, and TensorFlow joins the offset and the ReLU with the convolution.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers


def folded(model: keras.Model) -> keras.Model:
    """`model` in inference mode, without batch norm. It computes the same up to rounding, and shares the weights.

    The kernels are folded anew in each call, so they are always those of the weights as they are: that takes a few
    operations for each weight, and a convolution many.

    Args:
      model: a functional model in which every batch norm stands directly behind a convolution or a dense layer whose
        output nothing else reads, and which has no bias.

    Raises:
      ValueError: naming a batch norm that stands elsewhere.
    """
    norms: dict[layers.Layer, layers.Layer] = {}
    for norm in model.layers:
        if isinstance(norm, layers.BatchNormalization):
            linear = norm.input._keras_history.operation
            if not isinstance(linear, layers.Conv2D | layers.Dense) or linear.use_bias:
                raise ValueError(f"{norm.name} does not stand behind a convolution or dense layer without a bias")
            norms[linear] = norm

    def clone(layer: keras.Operation) -> keras.Operation:
        return Folded(layer, norms[layer]) if layer in norms else layer

    def call(layer: keras.Operation, *inputs: keras.KerasTensor, **more: Any) -> keras.KerasTensor:
        return inputs[0] if layer in norms.values() else layer(*inputs, **more)

    return keras.models.clone_model(model, clone_function=clone, call_function=call)


class Folded(layers.Layer):
    """A convolution or dense layer and the batch norm behind it, in inference mode, as one layer. It owns no weights.

    Args:
      linear: the convolution or dense layer.
      norm: the batch norm behind it.
    """

    def __init__(self, linear: layers.Layer, norm: layers.BatchNormalization) -> None:
        # Without autocast the weights are folded in float32, whatever the layers compute in.
        super().__init__(dtype=norm.dtype_policy, autocast=False, name=linear.name)
        self.linear, self.norm = linear, norm
        self.built = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """[N, ..., C] of inputs [N, ..., D], in the type in which the batch norm computes."""
        scale = tf.math.rsqrt(self.norm.moving_variance + self.norm.epsilon) * self.norm.gamma  # [C]
        offset = -self.norm.moving_mean * scale  # [C]
        if self.norm.center:
            offset += self.norm.beta
        dtype = self.linear.compute_dtype
        x, kernel = tf.cast(inputs, dtype), tf.cast(self.linear.kernel * scale, dtype)
        if isinstance(self.linear, layers.Dense):
            y = tf.matmul(x, kernel)
        else:
            y = tf.nn.conv2d(x, kernel, self.linear.strides, self.linear.padding.upper())
        return tf.nn.bias_add(tf.cast(y, self.compute_dtype), tf.cast(offset, self.compute_dtype))

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return self.linear.compute_output_shape(input_shape)
