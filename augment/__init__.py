"""The views of training (random crop, flip, colour jitter, grey, blur) and of evaluation (centre crop): appendix B.1.

Every random operator is `fn(image, seed, ...)` with a stateless seed [2] int32. So a view depends only on its seed, not
on the thread, worker or replica that makes it. Images are [H, W, 3] float32 in [0, 1] where nothing else is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import tensorflow as tf

from architecture import SMALL_IMAGE_PIXELS

CROP_PROPORTION = 0.875  # Evaluation crops this share of the shorter side.
CROP_ATTEMPTS = 100

Transform = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def random_crop(image: tf.Tensor, seed: tf.Tensor, size: int, min_area: float, max_aspect: float) -> tf.Tensor:
    """A random crop, resized (bicubic) to `size`.

    As in the release, a crop of less than a tenth of the image is drawn again.

    Args:
      image: [H, W, 3] uint8 or float32.
      seed: see the module.
      size: height and width of the result, in pixels.
      min_area: the crop's least share of the image's area; the largest is 1.
      max_aspect: the crop's largest ratio of width to height; the least is 1 / `max_aspect`.

    Returns:
      [size, size, 3] float32, not clipped yet.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image), tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), seed, min_object_covered=0.1,
        aspect_ratio_range=(1 / max_aspect, max_aspect), area_range=(min_area, 1.0), max_attempts=CROP_ATTEMPTS,
    )  # fmt: skip
    return resize(tf.slice(image, begin, extent), size)


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes `image` [H, W, 3], uint8 or float32, to [size, size, 3] float32. Bicubic values may leave [0, 1]."""
    image = tf.image.convert_image_dtype(image, tf.float32)
    resized = tf.image.resize(image, [size, size], tf.image.ResizeMethod.BICUBIC)
    return tf.ensure_shape(resized, [size, size, 3])  # tf.slice forgets the number of channels.


def clip(image: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
    """Clips every value to [0, 1]."""
    return tf.clip_by_value(image, 0.0, 1.0)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors left and right with probability 0.5."""
    return tf.image.stateless_random_flip_left_right(image, seed)


def adjust_brightness(image: tf.Tensor, factor: tf.Tensor | float) -> tf.Tensor:
    """Multiplies every value by `factor`, as SimCLRv2 does; `tf.image` would add an offset."""
    return image * factor


def color_jitter(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue, in random order. Values are clipped after each change.

    With s the `strength`, the factors of the first three are in 1 +- 0.8 s, and the hue turns by up to 0.2 s.
    """
    order_seed, factor_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
    width = 0.8 * strength
    low = [max(0.0, 1.0 - width), 1.0 - width, 1.0 - width, -0.2 * strength]  # Brightness must not be negative.
    high = [1.0 + width, 1.0 + width, 1.0 + width, 0.2 * strength]
    factors = tf.random.stateless_uniform([4], factor_seed) * (tf.constant(high) - low) + low  # [4]
    # With s > 1.25 a factor of contrast or saturation may be negative, which would invert it; so it is at least 0.
    operators = [
        lambda x: adjust_brightness(x, factors[0]),
        lambda x: tf.image.adjust_contrast(x, tf.maximum(factors[1], 0.0)),
        lambda x: tf.image.adjust_saturation(x, tf.maximum(factors[2], 0.0)),
        lambda x: tf.image.adjust_hue(x, factors[3]),
    ]
    order = tf.random.experimental.stateless_shuffle(tf.range(4), order_seed)  # [4]
    for i in range(4):
        branches = [functools.partial(operator, image) for operator in operators]
        image = clip(tf.switch_case(order[i], branches))
    return image


def grayscale(image: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
    """Gives all three channels the luma."""
    return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))


def gaussian_blur(image: tf.Tensor, kernel_size: int, sigma: tf.Tensor | float) -> tf.Tensor:
    """A separable Gaussian blur of `sigma` pixels and radius `kernel_size // 2`. Beyond the border are zeros."""
    radius = kernel_size // 2
    x = tf.range(-radius, radius + 1, dtype=tf.float32)
    kernel = tf.exp(-tf.square(x) / (2.0 * tf.square(tf.cast(sigma, tf.float32))))
    kernel /= tf.reduce_sum(kernel)
    channels = tf.transpose(image, [2, 0, 1])[..., None]  # [3, H, W, 1]
    channels = tf.nn.conv2d(channels, tf.reshape(kernel, [1, -1, 1, 1]), 1, "SAME")
    channels = tf.nn.conv2d(channels, tf.reshape(kernel, [-1, 1, 1, 1]), 1, "SAME")
    return tf.transpose(channels[..., 0], [1, 2, 0])  # [H, W, 3]


def random_blur(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A Gaussian blur with sigma uniform in [0.1, 2] and a kernel of a tenth of the image's height."""
    sigma = tf.random.stateless_uniform([], seed, 0.1, 2.0)
    return clip(gaussian_blur(image, blur_kernel_size(image.shape[0]), sigma))


def blur_kernel_size(height: int) -> int:
    """The kernel size of the blur for images of this height, in pixels."""
    return height // 10


def sometimes(probability: float, transform: Transform) -> Transform:
    """Applies `transform` with `probability`."""

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        coin, inner = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
        drawn = tf.random.stateless_uniform([], coin) < probability
        return tf.cond(drawn, lambda: transform(image, inner), lambda: image)

    apply.__name__ = f"{in_words(transform)} for {probability:.0%}"
    return apply


def compose(transforms: Sequence[Transform]) -> Transform:
    """Applies the transforms one after the other, each with its own seed."""

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        seeds = tf.unstack(tf.random.experimental.stateless_split(seed, len(transforms)))
        for transform, own in zip(transforms, seeds, strict=True):
            image = transform(image, own)
        return image

    apply.__name__ = " | ".join(map(in_words, transforms))
    return apply


def in_words(transform: Transform) -> str:
    """A transform in one line of text, for people to read.

    Example:
      in_words(crop_and_flip(32)) == "random_crop(size=32, min_area=0.08, max_aspect=1.33) | random_flip | clip"
    """
    if isinstance(transform, functools.partial):
        options = ", ".join(f"{name}={value:.3g}" for name, value in transform.keywords.items())
        return f"{transform.func.__name__}({options})"
    return transform.__name__


def crop_and_flip(size: int, min_area: float = 0.08, max_aspect: float = 4 / 3, flip: bool = True) -> Transform:
    """The view of fine-tuning, distillation and supervised training: [H, W, 3] -> [size, size, 3] float32."""
    crop = functools.partial(random_crop, size=size, min_area=min_area, max_aspect=max_aspect)
    return compose([crop, random_flip, clip] if flip else [crop, clip])


def pretrain_view(
    size: int,
    min_area: float = 0.08,
    max_aspect: float = 4 / 3,
    flip: bool = True,
    jitter: float = 1.0,
    gray: float = 0.2,
    blur: bool = True,
    more: Sequence[Transform] = (),
) -> Transform:
    """One view of pretraining: [H, W, 3] uint8 or float32 -> [size, size, 3] float32 in [0, 1].

    Args:
      size: height and width of the view, in pixels.
      min_area, max_aspect: see `random_crop`.
      flip: mirror half of the views.
      jitter: strength s of the colour jitter, which 80 % of the views get; 0: no view gets it.
      gray: share of the views that turn grey.
      blur: blur half of the views.
      more: further transforms, applied before the blur.

    Example:
      view = pretrain_view(size=32, jitter=0.5, blur=False)
      image_of_view = view(image, tf.constant([0, 1]))  # [32, 32, 3]
    """
    view: list[Transform] = [functools.partial(random_crop, size=size, min_area=min_area, max_aspect=max_aspect)]
    if flip:
        view.append(random_flip)
    if jitter > 0:
        view.append(sometimes(0.8, functools.partial(color_jitter, strength=jitter)))
    if gray > 0:
        view.append(sometimes(gray, grayscale))
    view += [clip, *more]
    if blur and blur_kernel_size(size) >= 2:  # A smaller kernel would change nothing: its radius is 0.
        view.append(sometimes(0.5, random_blur))
    return compose(view)


def center_crop(image: tf.Tensor, size: int) -> tf.Tensor:
    """The view of evaluation: the central square of 0.875 of the shorter side, resized to `size`.

    Where `size` is at most `SMALL_IMAGE_PIXELS`, the whole image is resized.

    Takes [H, W, 3] uint8 or float32 and returns [size, size, 3] float32 in [0, 1].
    """
    if size <= SMALL_IMAGE_PIXELS:
        return clip(resize(image, size))
    height, width = tf.unstack(tf.shape(image)[:2])
    side = tf.cast(tf.math.rint(CROP_PROPORTION * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return clip(resize(tf.image.crop_to_bounding_box(image, top, left, side, side), size))
