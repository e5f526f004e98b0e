"""What is done to a batch of crops: mirror, colour jitter, grey, blur (appendix B.1).

Images are [B, H, W, 3] float32. An operator draws nothing itself: it is a function of the images and of random numbers
u [B, draws], uniform in [0, 1), which come with each image. So a view depends only on its own numbers, not on the
thread, worker, replica or device that makes it, nor on the other images of its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

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
    factors = tf.concat([tf.maximum(factors[:, :3], 0.0), factors[:, 3:]], axis=1)
    changes = (_change_brightness, _change_contrast, _change_saturation, _change_hue)

    def change(place: tf.Tensor, *channels: tf.Tensor) -> tuple[tf.Tensor, ...]:
        runs = tf.reduce_sum(tf.where(places == place, tf.range(4), 0), axis=1)  # [B]: which of the four
        branches = [
            functools.partial(one, channels, _of_channel(factors[:, number])) for number, one in enumerate(changes)
        ]
        changed = one_of(runs, branches)
        return (place + 1, *(tf.clip_by_value(channel, 0.0, 1.0) for channel in changed))

    # Channels stay apart over all four changes, since a pass over every third value is slow.
    channels = tf.unstack(images, num=3, axis=3)  # 3 x [B, H, W]
    _, *channels = tf.while_loop(lambda place, *_: place < 4, change, (0, *channels), maximum_iterations=4)
    return tf.stack(channels, axis=3)  # [B, H, W, 3]


def _change_brightness(channels: Sequence[tf.Tensor], factor: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Multiplies each of the `channels` 3 x [B, H, W] by `factor` [B, 1, 1]. None of the four changes clips."""
    return tuple(factor * channel for channel in channels)


def _change_contrast(channels: Sequence[tf.Tensor], factor: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Multiplies the distance from the channel's mean."""
    means = [tf.reduce_mean(channel, axis=[1, 2], keepdims=True) for channel in channels]  # 3 x [B, 1, 1]
    return tuple(mean + factor * (channel - mean) for channel, mean in zip(channels, means, strict=True))


def _change_saturation(channels: Sequence[tf.Tensor], factor: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Multiplies the distance from the largest channel. Colours end where the smallest channel is 0."""
    largest, spread, per_spread = _spread(channels)
    factor = tf.minimum(factor, tf.where(spread > 0, largest * per_spread, factor))
    return tuple(largest + factor * (channel - largest) for channel in channels)


def _change_hue(channels: Sequence[tf.Tensor], factor: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Turns the hue by `factor` of the whole circle."""
    r, g, b = channels
    largest, spread, per_spread = _spread(channels)
    sextant = tf.where(r == largest, (g - b) * per_spread, tf.where(
        g == largest, 2.0 + (b - r) * per_spread, 4.0 + (r - g) * per_spread,
    ))  # fmt: skip  # the hue, from 0 to 6
    changed = []
    for offset in (5.0, 3.0, 1.0):
        k = sextant + 6.0 * factor + offset
        k -= 6.0 * tf.floor(k / 6.0)
        changed.append(largest - spread * tf.clip_by_value(tf.minimum(k, 4.0 - k), 0.0, 1.0))
    return tuple(changed)


def _spread(channels: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The largest of the three channels, its distance from the smallest, and 1 / that, or 1 for grey: [B, H, W]."""
    r, g, b = channels
    largest = tf.maximum(tf.maximum(r, g), b)
    spread = largest - tf.minimum(tf.minimum(r, g), b)
    return largest, spread, 1.0 / tf.where(spread > 0, spread, 1.0)


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
    radius = kernel_size // 2
    height, width = images.shape[1:3]
    distance = tf.range(-radius, radius + 1, dtype=tf.float32)
    weights = tf.exp(-tf.square(distance) / (2.0 * tf.square(sigma[:, None])))  # [B, 2 radius + 1]
    weights /= tf.reduce_sum(weights, axis=1, keepdims=True)
    shifts = [(shift, weights[:, shift, None, None]) for shift in range(2 * radius + 1)]
    # Sums of shifted images. A row is one axis of 3 W values, along which XLA's loops are fast; one of 3 is too short.
    rows = tf.reshape(images, [-1, height, 3 * width])  # [B, H, 3 W]
    rows = tf.pad(rows, [[0, 0], [radius, radius], [3 * radius, 3 * radius]])
    rows = tf.add_n([weight * rows[:, shift : shift + height] for shift, weight in shifts])
    rows = tf.add_n([weight * rows[:, :, 3 * shift : 3 * (shift + width)] for shift, weight in shifts])
    return tf.reshape(rows, [-1, height, width, 3])  # [B, H, W, 3]


def sometimes(probability: float, operator: Operator) -> Operator:
    """Applies `operator` to each image with `probability`."""

    def apply(images: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        runs = tf.cast(u[:, 0] < probability, tf.int32)  # [B]
        return one_of(runs, [lambda: images, lambda: operator.apply(images, u[:, 1:])])

    return Operator(apply, 1 + operator.draws, f"{operator.words} for {probability:.0%}", operator.is_static)


def one_of(choice: tf.Tensor, branches: Sequence[Callable[[], Any]]) -> Any:
    """For each image what the branch gives that `choice` names.

    Of an image alone, only its own branch is computed. Of a batch all of them are, as accelerators do it best.

    Args:
      choice: [B] int32, each the number of a branch.
      branches: functions to tensors [B, ...] or to tuples of them, all of the same shapes.
    """
    if choice.shape[0] == 1:
        return tf.switch_case(choice[0], branches)
    *others, chosen = [branch() for branch in branches]
    for number, other in enumerate(others):
        is_chosen = choice == number  # [B]

        def pick(one: tf.Tensor, rest: tf.Tensor, is_chosen: tf.Tensor = is_chosen) -> tf.Tensor:
            of_values = tf.reshape(is_chosen, [-1, *(1 for _ in one.shape[1:])])  # [B, 1, ...]
            return tf.where(of_values, one, rest)

        chosen = tf.nest.map_structure(pick, other, chosen)
    return chosen


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
