"""Augmentation policies: image operators with a magnitude, and AutoAugment, RandAugment and more made of them.

Images are [H, W, 3] float32 in [0, 1]. Every operator is `fn(image, magnitude, seed)` with a magnitude of 0 to 10 and
a stateless seed [2] int32, which only the geometric ones read, for their direction. Ranges are those of AutoAugment
(arXiv 1805.09501, table 6), and the functions those of Pillow, which define the operators. They stand on Keras where
it has the same function, with the randomness left outside; a comment says where it has another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

Magnitude: TypeAlias = tf.Tensor | float
Operator = Callable[[tf.Tensor, Magnitude, tf.Tensor], tf.Tensor]

MAX_MAGNITUDE = 10.0
GREY = 128 / 255  # This colour comes in from beyond the border.
SHEAR = 0.3
TRANSLATION = 150 / 331  # The paper shifts an image of 331 pixels by up to 150.
ROTATION = 30.0  # degrees
LARGEST_SOBEL = 20**0.5  # The largest gradient of values in [0, 1] is 4 along one axis and 2 along the other.


@functools.cache
def _layer(name: str, **options: Any) -> Any:
    """A Keras layer, for its deterministic part; made once and outside of graphs, as its unused seed is a variable."""
    with tf.init_scope():
        return getattr(keras.layers, name)(dtype="float32", **options)  # The model's layers may have another dtype.


def _levels(image: tf.Tensor) -> tf.Tensor:
    """[H, W, 3] in [0, 1] -> the nearest of 256 levels, 0 to 255, still float32."""
    return tf.round(image * 255.0)


def _warp(
    image: tf.Tensor, linear: Sequence[Magnitude], shift: Sequence[Magnitude] = (0.0, 0.0), centre: bool = False
) -> tf.Tensor:
    """Takes for the pixel at p what lies nearest to `linear` (p - c) + c + `shift`, and grey beyond the border.

    Args:
      image: [H, W, 3].
      linear: xx, xy, yx, yy.
      shift: x, y, in pixels.
      centre: whether c is the image's centre; else its upper left corner.
    """
    xx, xy, yx, yy = linear
    height, width = image.shape[:2]
    # x and y are the place of c, counted from the middle of the first pixel.
    x, y = ((width - 1) / 2, (height - 1) / 2) if centre else (-0.5, -0.5)
    rows = [xx, xy, x - xx * x - xy * y + shift[0], yx, yy, y - yx * x - yy * y + shift[1], 0.0, 0.0]
    transform = tf.stack([tf.cast(value, tf.float32) for value in rows])  # [8]
    return keras.ops.image.affine_transform(image, transform, "nearest", "constant", GREY, data_format="channels_last")


def _amount(magnitude: Magnitude, largest: float, seed: tf.Tensor) -> tf.Tensor:
    """A share of `largest`, with a random sign."""
    sign = tf.where(tf.random.stateless_uniform([], seed) < 0.5, -1.0, 1.0)
    return sign * largest * tf.cast(magnitude, tf.float32) / MAX_MAGNITUDE


def shear_x(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Shifts each row by up to 0.3 of its distance from the upper border, left or right."""
    return _warp(image, [1.0, _amount(magnitude, SHEAR, seed), 0.0, 1.0])


def shear_y(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Shifts each column by up to 0.3 of its distance from the left border, up or down."""
    return _warp(image, [1.0, 0.0, _amount(magnitude, SHEAR, seed), 1.0])


def translate_x(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Shifts by up to 150/331 of the width, left or right."""
    return _warp(image, [1.0, 0.0, 0.0, 1.0], [_amount(magnitude, TRANSLATION * image.shape[1], seed), 0.0])


def translate_y(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Shifts by up to 150/331 of the height, up or down."""
    return _warp(image, [1.0, 0.0, 0.0, 1.0], [0.0, _amount(magnitude, TRANSLATION * image.shape[0], seed)])


def rotate(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Rotates about the centre by up to 30 degrees, one way or the other."""
    angle = _amount(magnitude, math.radians(ROTATION), seed)
    sin, cos = tf.sin(angle), tf.cos(angle)
    return _warp(image, [cos, -sin, sin, cos], centre=True)


def identity(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """The image."""
    return image


def auto_contrast(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to the whole of [0, 1]; a constant one stays. Has no magnitude."""
    return _layer("AutoContrast", value_range=(0, 1)).transform_single_image(image, None)


def invert(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """The negative. Has no magnitude."""
    return 1.0 - image


def equalize(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Maps each channel's 256 levels so that they are equally frequent, as nearly as can be. Has no magnitude."""
    # By Pillow's table, in integers. On a photo, Keras's layer, which leaves out the count of the lowest level instead
    # of the highest, is off it by up to 16 levels, and keras-cv's, which leaves out the rarest, by up to 18.
    levels = tf.cast(_levels(image), tf.int32)
    pixels = tf.reshape(levels, [-1, 3])  # [H W, 3]
    counts = tf.math.bincount(tf.transpose(pixels), minlength=256, maxlength=256, axis=-1)  # [3, 256]
    of_highest = tf.gather(counts, tf.reduce_max(pixels, axis=0), batch_dims=1)  # [3]
    step = ((tf.shape(pixels)[0] - of_highest) // 255)[:, None]  # [3, 1]: pixels to a level
    table = (tf.cumsum(counts, axis=-1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    table = tf.where(step == 0, tf.range(256), tf.minimum(table, 255))  # Too few pixels cannot be equalized: they stay.
    mapped = tf.gather(tf.reshape(table, [-1]), levels + tf.constant([0, 256, 512]))  # [H, W, 3]
    return tf.cast(mapped, tf.float32) / 255.0


def solarize(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """The negative of the levels from a threshold on, which falls from 256 (none) to 0 (all) as magnitude rises."""
    threshold = 256.0 * (1.0 - tf.cast(magnitude, tf.float32) / MAX_MAGNITUDE)
    # Between two levels, where no rounding decides.
    transformation = {"additions": 0.0, "thresholds": tf.math.ceil(threshold) - 0.5}
    return _layer("Solarization", value_range=(0, 1), seed=0).transform_single_image(image, transformation)


def posterize(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Keeps the upper 8 to 4 bits of the levels, the fewer the higher the magnitude."""
    dropped = tf.cast(tf.round(4.0 * tf.cast(magnitude, tf.float32) / MAX_MAGNITUDE), tf.uint8)
    # The layer gets whole levels, as it takes the level below a value, not the nearest.
    layer = _layer("RandomPosterization", factor=8, value_range=(0, 255), seed=0)
    return layer.transform_single_image(_levels(image), {"shift_factor": dropped[None]}) / 255.0


def _factor(magnitude: Magnitude) -> tf.Tensor:
    """0.1 to 1.9; 1 leaves the image as it is."""
    return 0.1 + 1.8 * tf.cast(magnitude, tf.float32) / MAX_MAGNITUDE


def _blend(degenerate: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """From `degenerate` (factor 0) to the image (1) and on beyond it, clipped."""
    return tf.clip_by_value(degenerate + factor * (image - degenerate), 0.0, 1.0)


def contrast(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """The distance from the mean luma, 0.1 to 1.9 times."""
    # Keras's layer, as tf.image, takes each channel's own mean instead.
    return _blend(tf.reduce_mean(tf.image.rgb_to_grayscale(image)), image, _factor(magnitude))


def color(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """The distance from each pixel's luma, 0.1 to 1.9 times."""
    layer = _layer("RandomColorDegeneration", factor=1.0, value_range=(0, 1), seed=0)
    return layer.transform_single_image(image, {"factor": 1.0 - _factor(magnitude)})


def brightness(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Every value, 0.1 to 1.9 times."""
    # Keras's layer adds instead.
    return _blend(tf.zeros_like(image), image, _factor(magnitude))


def sharpness(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """The distance from the smoothed image, 0.1 to 1.9 times; the outermost pixels stay."""
    # Keras's layer smoothes these too, with black beyond the border.
    kernel = tf.constant([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13.0
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    smooth = tf.nn.depthwise_conv2d(image[None], kernel, [1, 1, 1, 1], "VALID")[0]  # [H - 2, W - 2, 3]
    inner = tf.pad(smooth - image[1:-1, 1:-1], [[1, 1], [1, 1], [0, 0]])  # The border stays as it is.
    return _blend(image + inner, image, _factor(magnitude))


OPERATORS: dict[str, Operator] = {
    "Identity": identity,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "AutoContrast": auto_contrast,
    "Invert": invert,
    "Equalize": equalize,
    "Solarize": solarize,
    "Posterize": posterize,
    "Contrast": contrast,
    "Color": color,
    "Brightness": brightness,
    "Sharpness": sharpness,
}

# Of arXiv 1909.13719: what RandAugment draws from.
RANDAUGMENT = (
    "Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
BROAD = ("AutoContrast", "Equalize", "Invert", "Solarize", "Posterize", "Sharpness")
WITHOUT_MAGNITUDE = ("AutoContrast", "Equalize", "Invert")

# Of arXiv 1805.09501, table 9: the ImageNet policy, 25 sub-policies of two (operator, probability, magnitude).
AUTOAUGMENT = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)


def _apply(
    names: Sequence[str], chosen: tf.Tensor, image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor
) -> tf.Tensor:
    """Runs the one of the named operators that is chosen, and none of the others."""
    branches = [functools.partial(OPERATORS[name], image, magnitude, seed) for name in names]
    return tf.ensure_shape(tf.switch_case(chosen, branches), image.shape)


def autoaugment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """AutoAugment's ImageNet policy (arXiv 1805.09501): one of 25 pairs, each operator with its own probability.

    Takes and returns [H, W, 3] float32 in [0, 1].
    """
    names = sorted({"Identity"}.union(name for pair in AUTOAUGMENT for name, _, _ in pair))
    choose, *seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 5))
    pair = tf.random.stateless_uniform([], choose, 0, len(AUTOAUGMENT), tf.int32)
    for i in range(2):
        column = [entry[i] for entry in AUTOAUGMENT]
        operators = tf.constant([names.index(name) for name, _, _ in column])  # [25]
        probabilities = tf.constant([float(probability) for _, probability, _ in column])
        magnitudes = tf.constant([float(magnitude) for _, _, magnitude in column])
        runs = tf.random.stateless_uniform([], seeds[2 * i]) < probabilities[pair]
        chosen = tf.where(runs, operators[pair], names.index("Identity"))
        image = _apply(names, chosen, image, magnitudes[pair], seeds[2 * i + 1])
    return image


def randaugment(image: tf.Tensor, seed: tf.Tensor, layers: int = 2, magnitude: float = 9.0) -> tf.Tensor:
    """RandAugment (arXiv 1909.13719): `layers` operators, N, drawn from 14 with replacement, at `magnitude`, M of 10.

    Takes and returns [H, W, 3] float32 in [0, 1].
    """
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 2 * layers))
    for i in range(layers):
        chosen = tf.random.stateless_uniform([], seeds[2 * i], 0, len(RANDAUGMENT), tf.int32)
        image = _apply(RANDAUGMENT, chosen, image, magnitude, seeds[2 * i + 1])
    return image


def broad_color(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    """One of AutoContrast, Equalize, Invert, Solarize, Posterize and Sharpness, each as likely.

    SimCLRv2 trains on CIFAR-10 with "a broader set of color operations" (appendix G) and does not list them: the list
    is ours. So is the `strength` s, up to 1: an operator with a magnitude gets one uniform in [0, 10 s], or for
    Sharpness within 5 s of 5, its neutral one; an operator without runs with probability s. At s = 0 nothing happens,
    but for Posterize's rounding to 256 levels. Takes and returns [H, W, 3] float32 in [0, 1].
    """
    strength = min(max(strength, 0.0), 1.0)
    choose, draw, inner = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
    chosen = tf.random.stateless_uniform([], choose, 0, len(BROAD), tf.int32)
    drawn = tf.random.stateless_uniform([], draw)
    plain = tf.constant([name in WITHOUT_MAGNITUDE for name in BROAD])[chosen]
    lowest = tf.where(chosen == BROAD.index("Sharpness"), 0.5 * (1.0 - strength), 0.0)
    magnitude = MAX_MAGNITUDE * (lowest + strength * drawn)
    names = [*BROAD, "Identity"]
    return _apply(names, tf.where(plain & (drawn >= strength), len(BROAD), chosen), image, magnitude, inner)


def sobel(image: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
    """Each channel's gradient magnitude by Sobel's filters: [H, W, 3] in [0, 1] -> [H, W, 3] in [0, 1].

    Divided by sqrt(20), the largest there is, at a corner; a straight edge from black to white has 0.89.
    """
    edges = tf.image.sobel_edges(image[None])[0]  # [H, W, 3, 2]
    return tf.minimum(tf.norm(edges, axis=-1) / LARGEST_SOBEL, 1.0)
