"""The encoder f: ResNets as one loop over the groups of blocks of each depth in `architecture.BLOCKS`.

These are the ResNet (arXiv 1512.03385) in its post-activation form, with a bottleneck's stride on its 3x3 convolution;
selective kernels (arXiv 1903.06586) with ResNet-D (arXiv 1812.01187); and squeeze-and-excitation (arXiv 1709.01507), as
section 2 and Table 1 of arXiv 2006.10029 combine them. Channels come last. Only the convolutions of
squeeze-and-excitation have a bias.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf
from keras import layers

from architecture import BASIC, BLOCKS

BATCH_NORM_EPSILON = 1e-5
ONEDNN_CHANNELS = 16  # oneDNN's block of channels on CPUs with AVX-512; on other CPUs its blocks are smaller.
# Keras' name of what layers do that compute in a precision: their weights are in float32 with each of them.
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
ENDPOINTS = (
    "initial_conv",
    "initial_max_pool",
    "block_group1",
    "block_group2",
    "block_group3",
    "block_group4",
    "final_avg_pool",
)


@keras.saving.register_keras_serializable("simclr")
class BatchNorm(layers.BatchNormalization):
    """Batch normalisation over the last axis, with statistics over the global batch where `synchronized`.

    It computes the same function as `keras.layers.BatchNormalization`, with the same weights and configuration. Where
    one replica's batch is the whole batch, feature maps go through the fused kernel. Statistics and arithmetic are in
    float32 for inputs of every type; the output has the type of the input.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: None = None) -> tf.Tensor:
        """Normalises `inputs` [N, C] or [N, H, W, C]. Updates the moving statistics when training."""
        gamma = tf.cast(self.gamma, tf.float32)
        beta = tf.cast(self.beta, tf.float32) if self.center else tf.zeros_like(gamma)
        # [N, C] and [N, 1, 1, C] have so few values in a channel that the fused kernel's gradient is not precise.
        is_map = len(inputs.shape) == 4 and inputs.shape[1:3] != (1, 1)
        if not (training and self.trainable):
            mean = tf.convert_to_tensor(self.moving_mean)
            variance = tf.convert_to_tensor(self.moving_variance)
            if is_map:
                y, _, _ = _fused(inputs, gamma, beta, self.epsilon, mean, variance)
                return y
            return self._normalized(inputs, mean, variance, beta, gamma)
        replicas = tf.distribute.get_replica_context()
        several = replicas.num_replicas_in_sync > 1
        if several and self.synchronized:
            y, mean, variance = _across_replicas(inputs, gamma, beta, self.epsilon)
        elif is_map:
            y, mean, variance = _fused(inputs, gamma, beta, self.epsilon)
        else:
            axes = list(range(len(inputs.shape) - 1))
            mean, variance = tf.nn.moments(tf.cast(inputs, tf.float32), axes)
            y = self._normalized(inputs, mean, variance, beta, gamma)
        mean = tf.stop_gradient(mean)
        variance = tf.stop_gradient(variance)
        if several and not self.synchronized:  # Each replica normalises by its own moments; the mean of all is kept.
            mean, variance = replicas.all_reduce(tf.distribute.ReduceOp.MEAN, [mean, variance])
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))
        return y

    def _normalized(
        self, inputs: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor
    ) -> tf.Tensor:
        """`inputs` [..., C] normalised by the moments [C], without the fused kernel."""
        x = tf.cast(inputs, tf.float32)
        return tf.cast(tf.nn.batch_normalization(x, mean, variance, beta, gamma, self.epsilon), inputs.dtype)


def _fused(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    mean: tf.Tensor | None = None,
    variance: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Batch normalisation of `x` [N, H, W, C] by TensorFlow's fused kernel.

    Args:
      x: the input.
      gamma, beta: scale and offset, [C] float32.
      epsilon: what is added to the variance.
      mean, variance: [C], to normalise by in inference; None: normalise by the batch's own, as in training.

    Returns:
      The normalised `x`, and the mean and the variance [C] of the batch.
    """
    training = mean is None
    empty = tf.zeros([0])  # what the kernel takes for mean and variance in training
    y, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, epsilon=epsilon, is_training=training,
        mean=empty if training else mean, variance=empty if training else variance,
    )  # fmt: skip
    count = tf.cast(tf.reduce_prod(tf.shape(x)[:3]), tf.float32)
    return y, batch_mean, batch_variance * (count - 1.0) / count  # The kernel returns the unbiased variance.


def _across_replicas(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Batch normalisation of `x` [..., C] by the moments of all replicas' values. Each has as many.

    The replicas exchange C numbers for the mean, and C for the variance, which is centred at that mean so that nothing
    cancels. The gradient is written out, since then they exchange 2 C numbers once, not C numbers twice.

    Args:
      x: this replica's values.
      gamma, beta, epsilon: as for `_fused`.

    Returns:
      The normalised `x`, and the mean and the variance [C] over all replicas, without gradient.
    """
    replicas = tf.distribute.get_replica_context()
    axes = list(range(len(x.shape) - 1))

    def mean_of_all(values: tf.Tensor) -> tf.Tensor:
        return replicas.all_reduce(tf.distribute.ReduceOp.MEAN, values)

    @tf.custom_gradient
    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Callable]:
        values = tf.cast(x, tf.float32)
        mean = mean_of_all(tf.reduce_mean(values, axes))  # [C]
        variance = mean_of_all(tf.reduce_mean(tf.math.squared_difference(values, mean), axes))  # [C]
        y = tf.cast(tf.nn.batch_normalization(values, mean, variance, beta, gamma, epsilon), x.dtype)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            dy = tf.cast(dy, tf.float32)
            inverse = tf.math.rsqrt(variance + epsilon)  # [C]
            normalized = (tf.cast(x, tf.float32) - mean) * inverse  # [..., C]
            products = dy * normalized
            mean_dy, mean_product = tf.unstack(
                mean_of_all(tf.stack([tf.reduce_mean(dy, axes), tf.reduce_mean(products, axes)]))  # [2, C]
            )
            dx = gamma * inverse * (dy - mean_dy - normalized * mean_product)
            return tf.cast(dx, x.dtype), tf.reduce_sum(products, axes), tf.reduce_sum(dy, axes)

        return (y, mean, variance), gradient

    return normalize(x, gamma, beta)


def resnet(
    depth: int,
    width_multiplier: float = 1.0,
    sk_ratio: float = 0.0,
    se_ratio: float = 0.0,
    cifar_stem: bool = False,
    global_bn: bool = True,
    batch_norm_decay: float = 0.9,
    image_size: int | None = None,
    precision: str = "float32",
    name: str = "encoder",
) -> keras.Model:
    """Builds the encoder h = f(x).

    Args:
      depth: a key of `architecture.BLOCKS`.
      width_multiplier: scales every width; fractions round down to whole channels.
      sk_ratio: above 0: ResNet-D's stem and shortcuts, and selective kernels in bottleneck blocks. The squeeze is this
        share of the block's width, at least 32. Basic blocks get no selective kernels, as in the 2020 release, because
        these are defined for the bottleneck's 3x3 convolution.
      se_ratio: above 0: squeeze-and-excitation on each block's output. The squeeze is this share of the block's width.
      cifar_stem: a 3x3 stride-1 stem without pooling, for images of at most `architecture.SMALL_IMAGE_PIXELS`.
      global_bn: take batch-norm statistics over all replicas.
      batch_norm_decay: decay of the moving statistics.
      image_size: fixes the images' height and width, so that every layer's shape is known; None: any.
      precision: a key of `POLICIES`, in which layers compute. Weights, batch norm's statistics and arithmetic, and
        global averages, h among them, are in float32 whatever it is.

    Returns:
      A model from images [N, H, W, 3], float in [0, 1], to a dict of `ENDPOINTS`; `final_avg_pool` [N, D] is h. Its
      attribute `weighted_layers` names the layers with weights, in the order in which the 2020 release makes them;
      `block_ends` names for each group the layers in which its blocks end.

    Raises:
      ValueError: where `depth` is not in `architecture.BLOCKS`.
    """
    if depth not in BLOCKS:
        raise ValueError(f"resnet_depth={depth}: choose one of {', '.join(map(str, BLOCKS))}")
    build = _Builder(sk_ratio, se_ratio, global_bn, batch_norm_decay, POLICIES[precision])
    kind, repeats = BLOCKS[depth]
    width = int(64 * width_multiplier)
    images = keras.Input((image_size, image_size, 3), name="images")
    endpoints = {}
    x = build.stem(images, width, cifar_stem)
    endpoints["initial_conv"] = x
    x = build.norm(x, "stem_bn", relu=True)
    if not cifar_stem:
        x = layers.MaxPooling2D(3, 2, padding="same", dtype=build.dtype, name="stem_pool")(x)
    endpoints["initial_max_pool"] = x
    block_ends = []
    for group, blocks in enumerate(repeats, start=1):
        block_ends.append([f"group{group}_block{block}_out" for block in range(1, blocks + 1)])
        for block in range(1, blocks + 1):
            is_first = block == 1
            strides = 2 if is_first and group > 1 else 1
            group_width = width * 2 ** (group - 1)
            x = build.block(x, kind, group_width, strides, project=is_first, name=f"group{group}_block{block}")
        endpoints[f"block_group{group}"] = x
    endpoints["final_avg_pool"] = build.average(x, "final_avg_pool")  # [N, D]
    encoder = keras.Model(images, endpoints, name=name)
    encoder.weighted_layers = build.made
    encoder.block_ends = block_ends
    return encoder


class Recomputing:
    """An encoder in training whose blocks keep nothing but their input: their backward pass computes the rest again.

    Numbers are those of the encoder itself. Each block is a function of its input and its weights alone
    (`keras.StatelessScope`), so batch norm's averages do not move when TensorFlow's `recompute_grad` calls it again.

    Args:
      encoder: as from `resnet`. It keeps its layers and weights.
    """

    def __init__(self, encoder: keras.Model) -> None:
        self._stem = keras.Model(encoder.inputs, {name: encoder.output[name] for name in ENDPOINTS[:2]})
        self._groups: list[list[keras.Model]] = []
        x = encoder.output[ENDPOINTS[1]]
        for ends in encoder.block_ends:
            outputs = [encoder.get_layer(end).output for end in ends]
            inputs = [x, *outputs[:-1]]
            self._groups.append([keras.Model(*pair) for pair in zip(inputs, outputs, strict=True)])
            x = outputs[-1]
        self._pool = encoder.get_layer("final_avg_pool")

    @property
    def blocks(self) -> list[keras.Model]:
        """The blocks in their order, each from its input to its output."""
        return [block for blocks in self._groups for block in blocks]

    def __call__(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """What the encoder gives for `images` [N, H, W, 3] with `training=True`, by endpoint."""
        endpoints = self._stem(images, training=True)
        x = endpoints[ENDPOINTS[1]]
        for group, blocks in enumerate(self._groups, start=1):
            for block in blocks:
                x = _recomputed(block, x)
            endpoints[f"block_group{group}"] = x
        return {**endpoints, ENDPOINTS[-1]: self._pool(x)}


def _recomputed(block: keras.Model, x: tf.Tensor) -> tf.Tensor:
    """What `block` makes of `x` in training. It keeps `x` for the backward pass, and its activations not."""
    variables = block.variables
    norms = [layer for layer in block.layers if isinstance(layer, BatchNorm) and layer.trainable]
    averages = [average for norm in norms for average in (norm.moving_mean, norm.moving_variance)]

    def of_values(x: tf.Tensor, *values: tf.Tensor) -> list[tf.Tensor]:
        with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
            y = block(x, training=True)
        return [y, *(scope.get_current_value(average) for average in averages)]

    y, *moved = tf.recompute_grad(of_values)(x, *map(tf.convert_to_tensor, variables))
    for average, value in zip(averages, moved, strict=True):
        average.assign(value)
    return y


class _Builder:
    """The pieces of a ResNet, as functions on Keras tensors. It holds the options that all blocks share."""

    def __init__(self, sk_ratio: float, se_ratio: float, global_bn: bool, batch_norm_decay: float, dtype: str) -> None:
        self.sk_ratio = sk_ratio
        self.se_ratio = se_ratio
        self.global_bn = global_bn
        self.batch_norm_decay = batch_norm_decay
        self.dtype = dtype
        self.made: list[str] = []  # the layers with weights, in the order of their making

    def conv(
        self, x: keras.KerasTensor, filters: int, kernel: int, strides: int, name: str, use_bias: bool = False
    ) -> keras.KerasTensor:
        """A convolution. With a stride, the kernel alone decides the padding, so no image size shifts the output."""
        if strides > 1 and kernel > 1:
            x = layers.ZeroPadding2D(((kernel - 1) // 2, kernel // 2), dtype=self.dtype, name=f"{name}_pad")(x)
        if strides > 1 and kernel == 1 and x.shape[-1] < ONEDNN_CHANNELS:
            # oneDNN's gradient of such a convolution writes outside its memory where the input has fewer channels than
            # a block, and the process crashes (https://github.com/uxlfoundation/oneDNN/issues/6035). So this takes the
            # pixels that the convolution would read, and convolves them without a stride: the numbers are the same.
            x = layers.AveragePooling2D(1, strides, dtype=self.dtype, name=f"{name}_subsample")(x)
            strides = 1
        self.made.append(name)
        return layers.Conv2D(
            filters, kernel, strides, padding="same" if strides == 1 else "valid", use_bias=use_bias,
            kernel_initializer=keras.initializers.VarianceScaling(), dtype=self.dtype, name=name,
        )(x)  # fmt: skip

    def norm(self, x: keras.KerasTensor, name: str, relu: bool = False, zero: bool = False) -> keras.KerasTensor:
        self.made.append(name)
        x = BatchNorm(
            momentum=self.batch_norm_decay, epsilon=BATCH_NORM_EPSILON, synchronized=self.global_bn,
            gamma_initializer="zeros" if zero else "ones", dtype=self.dtype, name=name,
        )(x)  # fmt: skip
        return self.relu(x, name.replace("_bn", "_relu")) if relu else x

    def relu(self, x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        return layers.ReLU(dtype=self.dtype, name=name)(x)

    def average(self, x: keras.KerasTensor, name: str, keepdims: bool = False) -> keras.KerasTensor:
        """The mean of each channel, in float32: a half-precision sum of so many values would lose the last of them."""
        return layers.GlobalAveragePooling2D(keepdims=keepdims, dtype="float32", name=name)(x)

    def stem(self, x: keras.KerasTensor, width: int, cifar_stem: bool) -> keras.KerasTensor:
        if cifar_stem:
            return self.conv(x, width, 3, 1, "stem_conv")
        if self.sk_ratio == 0:
            return self.conv(x, width, 7, 2, "stem_conv")
        x = self.norm(self.conv(x, width // 2, 3, 2, "stem_conv1"), "stem_bn1", relu=True)
        x = self.norm(self.conv(x, width // 2, 3, 1, "stem_conv2"), "stem_bn2", relu=True)
        return self.conv(x, width, 3, 1, "stem_conv3")

    def shortcut(self, x: keras.KerasTensor, filters: int, strides: int, name: str) -> keras.KerasTensor:
        if self.sk_ratio > 0:  # ResNet-D: average, then a 1x1 convolution without stride
            if strides > 1:
                x = layers.ZeroPadding2D(((0, 1), (0, 1)), dtype=self.dtype, name=f"{name}_pad")(x)
            padding = "same" if strides == 1 else "valid"
            x = layers.AveragePooling2D(2, strides, padding=padding, dtype=self.dtype, name=f"{name}_pool")(x)
            strides = 1
        return self.norm(self.conv(x, filters, 1, strides, f"{name}_conv"), f"{name}_bn")

    def block(
        self, x: keras.KerasTensor, kind: str, width: int, strides: int, project: bool, name: str
    ) -> keras.KerasTensor:
        """A residual block of `width` filters; a bottleneck puts out four times as many. Its last scale starts at 0."""
        filters = width if kind == BASIC else 4 * width
        shortcut = self.shortcut(x, filters, strides, f"{name}_shortcut") if project else x
        if kind == BASIC:
            x = self.norm(self.conv(x, width, 3, strides, f"{name}_conv1"), f"{name}_bn1", relu=True)
            x = self.norm(self.conv(x, width, 3, 1, f"{name}_conv2"), f"{name}_bn2", zero=True)
        else:
            x = self.norm(self.conv(x, width, 1, 1, f"{name}_conv1"), f"{name}_bn1", relu=True)
            if self.sk_ratio > 0:
                x = self.selective_kernel(x, width, strides, f"{name}_sk")
            else:
                x = self.norm(self.conv(x, width, 3, strides, f"{name}_conv2"), f"{name}_bn2", relu=True)
            x = self.norm(self.conv(x, filters, 1, 1, f"{name}_conv3"), f"{name}_bn3", zero=True)
        if self.se_ratio > 0:
            x = self.squeeze_excite(x, width, f"{name}_se")
        return self.relu(layers.Add(dtype=self.dtype, name=f"{name}_add")([x, shortcut]), f"{name}_out")

    def selective_kernel(self, x: keras.KerasTensor, width: int, strides: int, name: str) -> keras.KerasTensor:
        """Two 3x3 streams. A softmax over the streams mixes them in each channel."""
        x = self.norm(self.conv(x, 2 * width, 3, strides, f"{name}_conv"), f"{name}_bn", relu=True)
        first, second = keras.ops.split(x, 2, axis=-1)  # 2 x [N, H, W, width]
        squeeze = self.average(first + second, f"{name}_pool", keepdims=True)
        squeeze = self.conv(squeeze, max(int(width * self.sk_ratio), 32), 1, 1, f"{name}_squeeze")
        squeeze = self.norm(squeeze, f"{name}_squeeze_bn", relu=True)
        logits = self.conv(squeeze, 2 * width, 1, 1, f"{name}_mix")
        first_logit, second_logit = keras.ops.split(logits, 2, axis=-1)
        mixing = keras.ops.sigmoid(first_logit - second_logit)  # [N, 1, 1, width]: softmax over two
        return first * mixing + second * (1.0 - mixing)

    def squeeze_excite(self, x: keras.KerasTensor, width: int, name: str) -> keras.KerasTensor:
        """Scales each channel by a gate: a sigmoid of what two convolutions make of the global average."""
        filters = x.shape[-1]
        gate = self.average(x, f"{name}_pool", keepdims=True)
        gate = self.conv(gate, max(1, int(width * self.se_ratio)), 1, 1, f"{name}_reduce", use_bias=True)
        gate = self.relu(gate, f"{name}_relu")
        gate = self.conv(gate, filters, 1, 1, f"{name}_expand", use_bias=True)
        return layers.Multiply(dtype=self.dtype, name=f"{name}_scale")([x, keras.ops.sigmoid(gate)])
