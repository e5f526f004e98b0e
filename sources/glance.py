"""A glance at a split: the usual size of its images, whether they have colours and a side, from some of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy.spatial import distance

from errors import UserError
from sources.base import ListedSource, Source, hash_order

IMAGES = 500  # how many images are looked at
PIXELS = 2 * 10**8  # Where images are very large, fewer are looked at: some seconds of decoding.
GREY_LEVELS = 4  # An image whose channels differ by less than this on average counts as grey: a scan has a slight tint.
COLOUR_SHARE = 0.05  # Where more of the images than this have colours, colours matter.

# Images have a side, as letters do, where their mirror images are unlike them: farther from the nearest of the others
# than the images themselves, in the median by this factor, and more often than not by so many standard errors. The
# medians are 1.3 on letters, 1.1 on figures that all face one way, and at most 1.01 on photographs, emoji and clip art.
MIRROR_IS_FARTHER = 1.05
STANDARD_ERRORS = 3
THUMBNAIL = 16  # pixels of a side


class Glance(NamedTuple):
    """What some images show.

    Attributes:
      height, width: the medians, in pixels.
      colour: whether the images have colours.
      mirrors: whether the mirror image of one could be one of them.
    """

    height: int
    width: int
    colour: bool
    mirrors: bool


def look(source: Source) -> Glance:
    """Looks at some images of a split, the same ones on every machine. Images that cannot be decoded do not count.

    Raises:
      UserError: where none of them can be decoded.
    """

    def decode(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = source.decode(record)
        return image, tf.image.resize(image, [THUMBNAIL, THUMBNAIL], antialias=True)

    compiled = tf.function(decode, autograph=False, reduce_retracing=True)
    heights: list[int] = []
    widths: list[int] = []
    coloured: list[bool] = []
    thumbnails: list[np.ndarray] = []
    pixels = 0
    for record in _some_records(source):
        try:
            image, thumbnail = (made.numpy() for made in compiled(record))  # uint8 [H, W, 3], float32 [S, S, 3]
        except tf.errors.OpError:
            continue
        heights.append(image.shape[0])
        widths.append(image.shape[1])
        coloured.append(_has_colour(image))
        thumbnails.append(thumbnail)
        pixels += image.shape[0] * image.shape[1]
        if pixels > PIXELS:
            break
    if not heights:
        raise UserError("no image of the training split can be decoded")
    colour = _enough(coloured)
    mirrors = not have_a_side(np.stack(thumbnails))
    return Glance(round(statistics.median(heights)), round(statistics.median(widths)), colour, mirrors)


def have_colours(images: Iterable[np.ndarray]) -> bool:
    """Whether images, uint8 [H, W, 3], have colours: more than a few of them do."""
    return _enough([_has_colour(image) for image in images])


def _has_colour(image: np.ndarray) -> bool:
    spread = image.max(axis=-1).astype(np.int16) - image.min(axis=-1)  # [H, W]
    return bool(spread.mean() > GREY_LEVELS)


def _enough(coloured: list[bool]) -> bool:
    return sum(coloured) > COLOUR_SHARE * len(coloured)


def have_a_side(images: np.ndarray) -> bool:
    """Whether the mirror images of `images`, [n, S, S, 3], are unlike them. False where there are too few to tell."""
    if len(images) < 2:
        return False
    pixels, mirrored = (made.reshape(len(images), -1) for made in (images, images[:, :, ::-1]))  # [n, S * S * 3]

    def nearest(queries: np.ndarray) -> np.ndarray:
        """How far the nearest of the other images is from each, [n]. Its own mirror image is none of them."""
        between = distance.cdist(queries, pixels)  # [n, n]
        np.fill_diagonal(between, np.inf)
        return between.min(axis=1)

    from_image, from_mirror = nearest(pixels), nearest(mirrored)  # What is within a thousandth is a tie.
    farther = int((from_mirror > 1.001 * from_image).sum())
    nearer = int((from_image > 1.001 * from_mirror).sum())
    is_sure = farther - nearer > STANDARD_ERRORS * (farther + nearer) ** 0.5
    return is_sure and bool(np.median(from_mirror / np.maximum(from_image, 1e-6)) > MIRROR_IS_FARTHER)


def _some_records(source: Source) -> Iterator[tf.Tensor]:
    """The records of some images.

    Where all names are known the images are drawn by them. TensorFlow Datasets have written their
    examples in a random order, so the first of them will do.
    """
    if isinstance(source, ListedSource):
        for i in hash_order(source.index()[0], 0, IMAGES):
            yield source.record(i)
    else:
        for example in source.ordered().take(IMAGES):
            yield example["record"]
