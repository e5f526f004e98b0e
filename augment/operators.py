"""What is done to a batch of crops: mirror, colour jitter, grey, blur (appendix B.1).

Images are [B, H, W, 3] float32. An operator draws nothing itself: it is a function of the images and of random numbers
u [B, draws], uniform in [0, 1), which come with each image. So a view depends only on its own numbers, not on the
thread, worker, replica or device that makes it, nor on the other images of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

BLUR_BLOCK = 32  # rows that one product of matrices blurs
SEEDS = 2**23  # how many numbers a uniform float32 tells apart


class Operator(NamedTuple):
    """What is done to a batch of images.

    Attributes:
      apply: from images [B, H, W, 3] and random numbers [B, draws] to images of the same shape.
      draws: how many random numbers each image needs.
      words: what it is, for people to read.
      is_static: whether every shape in it is known before it runs, as XLA needs it.
    """

    apply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    draws: int
    words: str
    is_static: bool = True


def clip() -> Operator:
    """Clips every value to [0, 1]."""
    return Operator(lambda images, u: tf.clip_by_value(images, 0.0, 1.0), 0, "clip")


def random_flip() -> Operator:
    """Mirrors left and right with probability 0.5."""

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        return tf.where(_of_image(u[:, 0] < 0.5), tf.reverse(images, [2]), images)

    return Operator(apply, 1, "random_flip")


def grayscale() -> Operator:
    """Gives all three channels the luma."""

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(images))

    return Operator(apply, 0, "grayscale")


def color_jitter(strength: float) -> Operator:
    """Changes brightness, contrast, saturation and hue, in random order. Values are clipped after each change.

    With s the `strength`, the factors of the first three are in 1 +- 0.8 s, and the hue turns by up to 0.2 s.
    """
    width = 0.8 * strength
    low = [max(0.0, 1.0 - width), 1.0 - width, 1.0 - width, -0.2 * strength]  # Brightness must not be negative.
    high = [1.0 + width, 1.0 + width, 1.0 + width, 0.2 * strength]

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        factors = u[:, :4] * (tf.constant(high) - low) + low  # [B, 4]
        # The four operators run in the order of four random numbers; of equal numbers, the first comes first.
        mine, other = u[:, 4:8, None], u[:, None, 4:8]
        stands_before = tf.constant([[j < i for j in range(4)] for i in range(4)])
        is_earlier = (other < mine) | ((other == mine) & stands_before)  # [B, 4, 4]
        places = tf.reduce_sum(tf.cast(is_earlier, tf.int32), axis=2)  # [B, 4]
        return change_colors(images, factors, places)

    return Operator(apply, 8, f"color_jitter(strength={strength:.3g})")


def change_colors(images: tf.Tensor, factors: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue of each image in an order of its own.

    The first three are `tf.image`'s and the release's: brightness multiplies every value, contrast the distance from
    the channel's mean, and saturation that from the largest channel; each with `factor`. Hue turns by `factor`.
    Values are clipped after each change.

    Args:
      images: [B, H, W, 3].
      factors: [B, 4], in the order above. A factor below 0 counts as 0, except for the hue.
      places: [B, 4] int32, a permutation of 0 to 3 in each row: when each of them runs.

    Returns:
      [B, H, W, 3] in [0, 1].
    """
    # One loop over all four places, of which each computes all four changes and keeps one of them for each image, is
    # what XLA makes a single pass over the channels of. It needs no branches, so images in any order share a batch.
    factors = tf.concat([tf.maximum(factors[:, :3], 0.0), factors[:, 3:]], axis=1)

    def change(place: tf.Tensor, r: tf.Tensor, g: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, ...]:
        runs = places == place  # [B, 4]: one True in each row
        factor = _of_channel(tf.reduce_sum(tf.where(runs, factors, 0.0), axis=1))  # [B, 1, 1]
        _, contrast, saturation, hue = (_of_channel(runs[:, i]) for i in range(4))
        largest = tf.maximum(tf.maximum(r, g), b)  # [B, H, W]
        spread = largest - tf.minimum(tf.minimum(r, g), b)  # [B, H, W]
        has_colour = spread > 0
        per_spread = 1.0 / tf.where(has_colour, spread, 1.0)
        # Colours cannot become more saturated than with a channel of 0.
        limit = tf.where(saturation & has_colour, largest * per_spread, factor)
        towards = tf.minimum(factor, limit)
        sextant = tf.where(r == largest, (g - b) * per_spread, tf.where(
            g == largest, 2.0 + (b - r) * per_spread, 4.0 + (r - g) * per_spread,
        ))  # fmt: skip  # the hue, from 0 to 6
        turned = sextant + 6.0 * factor
        changed = []
        for channel, offset in ((r, 5.0), (g, 3.0), (b, 1.0)):
            k = turned + offset
            k -= 6.0 * tf.floor(k / 6.0)
            with_hue = largest - spread * tf.clip_by_value(tf.minimum(k, 4.0 - k), 0.0, 1.0)
            mean = tf.reduce_mean(channel, axis=[1, 2], keepdims=True)  # [B, 1, 1]
            fixed = tf.where(contrast, mean, tf.where(saturation, largest, 0.0))  # the value that does not change
            other = fixed + towards * (channel - fixed)
            changed.append(tf.clip_by_value(tf.where(hue, with_hue, other), 0.0, 1.0))
        return (place + 1, *changed)

    channels = tf.unstack(images, num=3, axis=3)  # 3 x [B, H, W]
    _, *channels = tf.while_loop(lambda place, *_: place < 4, change, (0, *channels), maximum_iterations=4)
    return tf.stack(channels, axis=3)  # [B, H, W, 3]


def random_blur() -> Operator:
    """A Gaussian blur with sigma uniform in [0.1, 2] and a kernel of a tenth of the image's height."""

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        blurred = gaussian_blur(images, blur_kernel_size(images.shape[1]), 0.1 + 1.9 * u[:, 0])
        return tf.clip_by_value(blurred, 0.0, 1.0)

    return Operator(apply, 1, "random_blur")


def blur_kernel_size(height: int) -> int:
    """The kernel size of the blur for images of this height, in pixels."""
    return height // 10


def gaussian_blur(images: tf.Tensor, kernel_size: int, sigma: tf.Tensor) -> tf.Tensor:
    """A separable Gaussian blur of each image, with radius `kernel_size // 2`. Beyond the border are zeros.

    Args:
      images: [B, H, W, 3].
      kernel_size: in pixels.
      sigma: [B], in pixels, > 0.
    """
    for _ in range(2):
        images = tf.transpose(_blur_rows(images, kernel_size // 2, sigma), [0, 2, 1, 3])  # [B, W, H, 3], [B, H, W, 3]
    return images


def _blur_rows(images: tf.Tensor, radius: int, sigma: tf.Tensor) -> tf.Tensor:
    """Blurs `images` [B, H, W, 3] from row to row."""
    height, width = images.shape[1:3]
    block = min(BLUR_BLOCK, height)  # A row depends on few rows, so blocks of rows need few products with 0.
    blocks = -(-height // block)
    distance = tf.range(block)[:, None] + radius - tf.range(block + 2 * radius)  # [block, block + 2 radius]
    exponent = -tf.square(tf.cast(distance, tf.float32)) / (2.0 * tf.square(sigma[:, None, None]))
    weights = tf.where(tf.abs(distance) <= radius, tf.exp(exponent), 0.0)  # [B, block, block + 2 radius]
    weights /= tf.reduce_sum(weights, axis=2, keepdims=True)
    rows = tf.reshape(images, [-1, height, 3 * width])
    rows = tf.pad(rows, [[0, 0], [radius, radius + blocks * block - height], [0, 0]])
    parts = [rows[:, i * block : (i + 1) * block + 2 * radius] for i in range(blocks)]
    blurred = tf.matmul(weights[:, None], tf.stack(parts, axis=1))  # [B, blocks, block, 3 W]
    return tf.reshape(blurred, [-1, blocks * block, width, 3])[:, :height]


def sometimes(probability: float, operator: Operator) -> Operator:
    """Applies `operator` to each image with `probability`. It is computed for all of them."""

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        return tf.where(_of_image(u[:, 0] < probability), operator.apply(images, u[:, 1:]), images)

    return Operator(apply, 1 + operator.draws, f"{operator.words} for {probability:.0%}", operator.is_static)


def for_some(probability: float, operator: Operator) -> Operator:
    """The same as `sometimes`, computed only for the images that get it. How many these are, XLA could not know."""

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        chosen = tf.where(u[:, 0] < probability)  # [b, 1] int64
        made = operator.apply(tf.gather_nd(images, chosen), tf.gather_nd(u[:, 1:], chosen))
        return tf.tensor_scatter_nd_update(images, chosen, made)

    return Operator(apply, 1 + operator.draws, f"{operator.words} for {probability:.0%}", is_static=False)


def each(transform: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], words: str, probability: float = 1.0) -> Operator:
    """Applies a transform of one image, image by image, each with `probability`.

    Args:
      transform: from an image [H, W, 3] and a stateless seed [2] int32 to an image of the same shape.
      words: what it is, for people to read.
      probability: share of the images that get it.
    """

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        def of_image(image: tf.Tensor, own: tf.Tensor) -> tf.Tensor:
            seed = tf.cast(own[1:] * SEEDS, tf.int32)  # [2]
            return tf.cond(own[0] < probability, lambda: transform(image, seed), lambda: image)

        return tf.map_fn(lambda pair: of_image(*pair), (images, u), fn_output_signature=images.dtype)

    some = "" if probability == 1 else f" for {probability:.0%}"
    return Operator(apply, 3, words + some, is_static=False)


def compose(operators: Sequence[Operator]) -> Operator:
    """Applies the operators one after the other, each with its own random numbers."""

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        used = 0
        for operator in operators:
            images = operator.apply(images, u[:, used : used + operator.draws])
            used += operator.draws
        return images

    draws = sum(one.draws for one in operators)
    return Operator(apply, draws, " | ".join(one.words for one in operators), all(one.is_static for one in operators))


def _of_image(values: tf.Tensor) -> tf.Tensor:
    """`values` [B] as [B, 1, 1, 1]."""
    return values[:, None, None, None]


def _of_channel(values: tf.Tensor) -> tf.Tensor:
    """`values` [B] as [B, 1, 1]."""
    return values[:, None, None]
