"""Augmentation policies: image operators with a magnitude, and AutoAugment, RandAugment and others made of them.

Images are [H, W, 3] float32 in [0, 1]. Every operator is `fn(image, magnitude, seed)` with a magnitude of 0 to 10 and
a stateless seed [2] int32; only the geometric operators use the seed, to draw their direction. The ranges are those of
AutoAugment (arXiv 1805.09501, table 6). The operators are defined as Pillow's functions. Where Keras has the same
function, it is used with a given magnitude instead of Keras's own random one; a comment says where Keras's differs.
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
GREY = 128 / 255  # The colour beyond the border.
SHEAR = 0.3
TRANSLATION = 150 / 331  # The paper shifts an image of 331 pixels by up to 150 pixels.
ROTATION = 30.0  # degrees
LARGEST_SOBEL = 20**0.5  # The largest gradient of values in [0, 1] is 4 along one axis and 2 along the other.


@functools.cache
def _layer(name: str, **options: Any) -> Any:
    """A Keras layer, of which only the deterministic part is used.

    It is made once and outside of graphs, because its seed, which is not used, is a variable.
    """
    with tf.init_scope():
        return getattr(keras.layers, name)(dtype="float32", **options)  # The model's layers may have another dtype.


def _levels(image: tf.Tensor) -> tf.Tensor:
    """Rounds `image` [H, W, 3] in [0, 1] to 256 levels, 0 to 255, as float32."""
    return tf.round(image * 255.0)


def _warp(
    image: tf.Tensor, linear: Sequence[Magnitude], shift: Sequence[Magnitude] = (0.0, 0.0), centre: bool = False
) -> tf.Tensor:
    """Gives the pixel at p the value of the pixel nearest to `linear` (p - c) + c + `shift`; beyond the border, grey.

    Args:
      image: [H, W, 3].
      linear: xx, xy, yx, yy.
      shift: x, y, in pixels.
      centre: whether c is the image's centre; otherwise it is the upper left corner.
    """
    xx, xy, yx, yy = linear
    height, width = image.shape[:2]
    # The place of c, counted from the middle of the first pixel.
    x, y = -0.5, -0.5
    if centre:
        x, y = (width - 1) / 2, (height - 1) / 2
    first_row = [xx, xy, x - xx * x - xy * y + shift[0]]
    second_row = [yx, yy, y - yx * x - yy * y + shift[1]]
    entries = [*first_row, *second_row, 0.0, 0.0]
    transform = tf.stack([tf.cast(value, tf.float32) for value in entries])  # [8]
    return keras.ops.image.affine_transform(image, transform, "nearest", "constant", GREY, data_format="channels_last")


def _amount(magnitude: Magnitude, largest: float, seed: tf.Tensor) -> tf.Tensor:
    """The share `magnitude` / 10 of `largest`, with a random sign."""
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
    """Returns the image as it is."""
    return image


def auto_contrast(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to the whole of [0, 1]; a constant channel stays as it is. Has no magnitude."""
    return _layer("AutoContrast", value_range=(0, 1)).transform_single_image(image, None)


def invert(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Returns the negative. Has no magnitude."""
    return 1.0 - image


def equalize(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Maps each channel's 256 levels so that they become about equally frequent. Has no magnitude."""
    # This is Pillow's table, in integers. Keras's layer leaves out the count of the lowest level instead of the highest
    # and differs by up to 16 levels on a photo. keras-cv's leaves out the rarest level and differs by up to 18.
    levels = tf.cast(_levels(image), tf.int32)
    pixels = tf.reshape(levels, [-1, 3])  # [H W, 3]
    counts = tf.math.bincount(tf.transpose(pixels), minlength=256, maxlength=256, axis=-1)  # [3, 256]
    of_highest = tf.gather(counts, tf.reduce_max(pixels, axis=0), batch_dims=1)  # [3]
    step = ((tf.shape(pixels)[0] - of_highest) // 255)[:, None]  # [3, 1]: pixels for each level
    table = (tf.cumsum(counts, axis=-1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    table = tf.where(step == 0, tf.range(256), tf.minimum(table, 255))  # Too few pixels: they stay.
    mapped = tf.gather(tf.reshape(table, [-1]), levels + tf.constant([0, 256, 512]))  # [H, W, 3]
    return tf.cast(mapped, tf.float32) / 255.0


def solarize(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Inverts the levels from a threshold on. It falls from 256 (no level) to 0 (all levels) as the magnitude rises."""
    threshold = 256.0 * (1.0 - tf.cast(magnitude, tf.float32) / MAX_MAGNITUDE)
    # The threshold lies between two levels, so that rounding does not matter.
    transformation = {"additions": 0.0, "thresholds": tf.math.ceil(threshold) - 0.5}
    return _layer("Solarization", value_range=(0, 1), seed=0).transform_single_image(image, transformation)


def posterize(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Keeps the upper bits of the levels: 8 at magnitude 0, 4 at magnitude 10."""
    dropped = tf.cast(tf.round(4.0 * tf.cast(magnitude, tf.float32) / MAX_MAGNITUDE), tf.uint8)
    # The layer rounds down, not to the nearest level; so it gets values that are rounded already.
    layer = _layer("RandomPosterization", factor=8, value_range=(0, 255), seed=0)
    return layer.transform_single_image(_levels(image), {"shift_factor": dropped[None]}) / 255.0


def _factor(magnitude: Magnitude) -> tf.Tensor:
    """A factor from 0.1 to 1.9. At 1 the image stays as it is."""
    return 0.1 + 1.8 * tf.cast(magnitude, tf.float32) / MAX_MAGNITUDE


def _blend(degenerate: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends `degenerate` (factor 0) with the image (factor 1); a larger factor goes beyond the image. Clips."""
    return tf.clip_by_value(degenerate + factor * (image - degenerate), 0.0, 1.0)


def contrast(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Multiplies the distance from the mean luma by 0.1 to 1.9."""
    # Keras's layer and tf.image take each channel's own mean instead.
    return _blend(tf.reduce_mean(tf.image.rgb_to_grayscale(image)), image, _factor(magnitude))


def color(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Multiplies the distance from each pixel's luma by 0.1 to 1.9."""
    layer = _layer("RandomColorDegeneration", factor=1.0, value_range=(0, 1), seed=0)
    return layer.transform_single_image(image, {"factor": 1.0 - _factor(magnitude)})


def brightness(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Multiplies every value by 0.1 to 1.9."""
    # Keras's layer adds an offset instead.
    return _blend(tf.zeros_like(image), image, _factor(magnitude))


def sharpness(image: tf.Tensor, magnitude: Magnitude, seed: tf.Tensor) -> tf.Tensor:
    """Multiplies the distance from the smoothed image by 0.1 to 1.9. The outermost pixels stay as they are."""
    # Keras's layer smoothes the outermost pixels too, with black beyond the border.
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

# The operators that RandAugment draws from (arXiv 1909.13719).
RANDAUGMENT = (
    "Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
BROAD = ("AutoContrast", "Equalize", "Invert", "Solarize", "Posterize", "Sharpness")
WITHOUT_MAGNITUDE = ("AutoContrast", "Equalize", "Invert")

# The ImageNet policy of arXiv 1805.09501, table 9: 25 sub-policies of two (operator, probability, magnitude).
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
    """Runs only the operator `names[chosen]`."""
    branches = [functools.partial(OPERATORS[name], image, magnitude, seed) for name in names]
    return tf.ensure_shape(tf.switch_case(chosen, branches), image.shape)


def autoaugment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """AutoAugment's ImageNet policy (arXiv 1805.09501): one of 25 pairs, each operator with its own probability.

    Takes and returns [H, W, 3] float32 in [0, 1].
    """
    used = {"Identity"}
    for first, second in AUTOAUGMENT:
        used |= {first[0], second[0]}
    names = sorted(used)
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
    """RandAugment (arXiv 1909.13719): N = `layers` operators, drawn from 14 with replacement, at M = `magnitude` of 10.

    Takes and returns [H, W, 3] float32 in [0, 1].
    """
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 2 * layers))
    for i in range(layers):
        chosen = tf.random.stateless_uniform([], seeds[2 * i], 0, len(RANDAUGMENT), tf.int32)
        image = _apply(RANDAUGMENT, chosen, image, magnitude, seeds[2 * i + 1])
    return image


def broad_color(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    """One of AutoContrast, Equalize, Invert, Solarize, Posterize and Sharpness, drawn with equal probability.

    SimCLRv2 trains on CIFAR-10 with "a broader set of color operations" (appendix G) and does not list them. The list
    is ours, and so is the `strength` s, of at most 1. An operator with a magnitude gets a uniform one in [0, 10 s];
    Sharpness gets one within 5 s of 5, which leaves the image as it is. An operator without a magnitude runs with
    probability s. At s = 0 nothing happens, except that Posterize rounds to 256 levels.

    Takes and returns [H, W, 3] float32 in [0, 1].
    """
    strength = min(max(strength, 0.0), 1.0)
    choose, draw, inner = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
    chosen = tf.random.stateless_uniform([], choose, 0, len(BROAD), tf.int32)
    drawn = tf.random.stateless_uniform([], draw)
    has_no_magnitude = tf.constant([name in WITHOUT_MAGNITUDE for name in BROAD])[chosen]
    lowest = tf.where(chosen == BROAD.index("Sharpness"), 0.5 * (1.0 - strength), 0.0)
    magnitude = MAX_MAGNITUDE * (lowest + strength * drawn)
    names = [*BROAD, "Identity"]
    chosen = tf.where(has_no_magnitude & (drawn >= strength), names.index("Identity"), chosen)
    return _apply(names, chosen, image, magnitude, inner)


def sobel(image: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
    """The magnitude of each channel's gradient by Sobel's filters: [H, W, 3] in [0, 1] -> [H, W, 3] in [0, 1].

    It is divided by sqrt(20), the largest value, which a corner has. A straight edge from black to white gets 0.89.
    """
    edges = tf.image.sobel_edges(image[None])[0]  # [H, W, 3, 2]
    return tf.minimum(tf.norm(edges, axis=-1) / LARGEST_SOBEL, 1.0)
