"""The parts of an image that views show: random crops in training, the centre in evaluation.

Images are [H, W, 3], uint8 or float32 in [0, 1], where nothing else is said. An accelerator crops images of any size
together: each stands in the upper left corner of a canvas, and all canvases have one size.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from architecture import SMALL_IMAGE_PIXELS

CROP_PROPORTION = 0.875  # Evaluation crops this share of the shorter side.
CROP_ATTEMPTS = 100
CUBIC_STEPS = 1024.0  # TensorFlow's bicubic kernel looks its weights up in a table with so many steps for a pixel.


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A random crop, resized (bicubic) to `size`. As in the release, a crop of less than a tenth is drawn again.

    Attributes:
      size: height and width of the result, in pixels.
      min_area: the crop's least share of the image's area; the largest is 1.
      max_aspect: the crop's largest ratio of width to height; the least is 1 / `max_aspect`.
    """

    size: int
    min_area: float = 0.08
    max_aspect: float = 4 / 3

    def box(self, shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws where to crop an image.

        Args:
          shape: [3] int32, the image's H, W and 3.
          seed: [2], stateless.

        Returns:
          [4] int32: top, left, height and width, in pixels.
        """
        begin, extent = self._draw(shape, seed)
        return tf.concat([begin[:2], extent[:2]], axis=0)

    def __call__(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """A crop of `image`, drawn by `seed` [2]: [size, size, 3] float32, not clipped yet."""
        return resize(tf.slice(image, *self._draw(tf.shape(image), seed)), self.size)

    def _draw(self, shape: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The crop's [top, left, 0], and its [height, width, -1], which `tf.slice` takes for all channels."""
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape, tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), seed, min_object_covered=0.1,
            aspect_ratio_range=(1 / self.max_aspect, self.max_aspect), area_range=(self.min_area, 1.0),
            max_attempts=CROP_ATTEMPTS,
        )  # fmt: skip
        return begin, extent

    def of_canvas(self, canvases: tf.Tensor, boxes: tf.Tensor) -> tf.Tensor:
        """The crops of many images at once, as products of matrices: what `__call__` makes of each, up to rounding.

        Args:
          canvases: [B, C, C, 3] uint8, as from `on_canvas`.
          boxes: [B, 4] int32, as from `box`.

        Returns:
          [B, size, size, 3] float32, not clipped yet.
        """
        side = canvases.shape[1]
        images = tf.image.convert_image_dtype(canvases, tf.float32)
        rows = _bicubic(boxes[:, 0], boxes[:, 2], self.size, side)  # [B, size, C]
        columns = _bicubic(boxes[:, 1], boxes[:, 3], self.size, side)  # [B, size, C]
        images = tf.einsum("byh,bhwc->bywc", rows, images)  # [B, size, C, 3]
        return tf.einsum("bxw,bywc->byxc", columns, images)  # [B, size, size, 3]

    def __str__(self) -> str:
        return f"random_crop(size={self.size}, min_area={self.min_area:.3g}, max_aspect={self.max_aspect:.3g})"


def on_canvas(image: tf.Tensor, side: int) -> tf.Tensor:
    """`image`, uint8, in the upper left corner of a black square: [side, side, 3] uint8. It must fit: see `shrink`."""
    height, width = tf.unstack(tf.shape(image)[:2])
    return tf.ensure_shape(tf.pad(image, [[0, side - height], [0, side - width], [0, 0]]), [side, side, 3])


def shrink(image: tf.Tensor, longest: int) -> tf.Tensor:
    """`image`, uint8, with no side longer than `longest`: the mean of the pixels that become one."""
    sides = tf.shape(image)[:2]

    def shrunk() -> tf.Tensor:
        scale = longest / tf.reduce_max(sides)
        smaller = tf.maximum(1, tf.cast(tf.math.rint(scale * tf.cast(sides, tf.float64)), tf.int32))
        small = tf.image.resize(image, smaller, tf.image.ResizeMethod.AREA)
        return tf.cast(tf.math.rint(small), tf.uint8)

    return tf.cond(tf.reduce_max(sides) > longest, shrunk, lambda: image)


def canvas_side(size: int) -> int:
    """The side of the canvas for views of `size` pixels: 512 for 224, where most photographs of ImageNet fit."""
    return -(-16 * size // 112) * 16


def _bicubic(begin: tf.Tensor, length: tf.Tensor, size: int, side: int) -> tf.Tensor:
    """Resizes along one axis, as a matrix for each image.

    Args:
      begin, length: [B] int32, which part of the axis is resized.
      size: to how many pixels.
      side: how many pixels the axis has.

    Returns:
      [B, size, side] float32: the weight of each pixel in each pixel of the result.
    """
    scale = tf.cast(length, tf.float32) / float(size)  # [B]
    place = (tf.range(size, dtype=tf.float32) + 0.5) * scale[:, None] - 0.5  # [B, size]
    before = tf.floor(place)
    place = before + tf.math.rint((place - before) * CUBIC_STEPS) / CUBIC_STEPS
    pixel = tf.range(side)[None] - begin[:, None]  # [B, side], counted from the part's first
    inside = (pixel >= 0) & (pixel < length[:, None])
    # The kernel of Keys (1981) with a = -1/2. Pixels beyond the part do not count.
    t = tf.abs(place[:, :, None] - tf.cast(pixel, tf.float32)[:, None])  # [B, size, side]
    near, far = (1.5 * t - 2.5) * t * t + 1.0, ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    weights = tf.where(t < 1.0, near, tf.where(t < 2.0, far, 0.0)) * tf.cast(inside, tf.float32)[:, None]
    return weights / tf.reduce_sum(weights, axis=2, keepdims=True)


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes `image` to [size, size, 3] float32. Bicubic values may leave [0, 1]."""
    image = tf.image.convert_image_dtype(image, tf.float32)
    resized = tf.image.resize(image, [size, size], tf.image.ResizeMethod.BICUBIC)
    return tf.ensure_shape(resized, [size, size, 3])  # tf.slice forgets the number of channels.


def center_crop(image: tf.Tensor, size: int) -> tf.Tensor:
    """The view of evaluation: the central square of 0.875 of the shorter side, resized to `size`.

    Where `size` is at most `SMALL_IMAGE_PIXELS`, the whole image is resized.

    Returns [size, size, 3] float32 in [0, 1].
    """
    if size <= SMALL_IMAGE_PIXELS:
        return tf.clip_by_value(resize(image, size), 0.0, 1.0)
    height, width = tf.unstack(tf.shape(image)[:2])
    side = tf.cast(tf.math.rint(CROP_PROPORTION * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return tf.clip_by_value(resize(tf.image.crop_to_bounding_box(image, top, left, side, side), size), 0.0, 1.0)
