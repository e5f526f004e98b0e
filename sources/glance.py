"""A glance at a split: the usual size of its images, and whether they have colours, from a few of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from errors import UserError
from sources.base import ListedSource, Source, hash_order

IMAGES = 200  # how many images are looked at
PIXELS = 2 * 10**8  # Where images are very large, fewer are looked at: some seconds of decoding.
GREY_LEVELS = 4  # An image whose channels differ by less than this on average counts as grey: a scan has a slight tint.
COLOUR_SHARE = 0.05  # Where more of the images than this have colours, colours matter.


class Glance(NamedTuple):
    """What a few images show.

    Attributes:
      height, width: the medians, in pixels.
      colour: whether the images have colours.
    """

    height: int
    width: int
    colour: bool


def look(source: Source) -> Glance:
    """Looks at some images of a split, the same ones on every machine. Images that cannot be decoded do not count.

    Raises:
      UserError: where none of them can be decoded.
    """
    decode = tf.function(source.decode, autograph=False, reduce_retracing=True)
    heights: list[int] = []
    widths: list[int] = []
    coloured: list[bool] = []
    pixels = 0
    for record in _some_records(source):
        try:
            image = decode(record).numpy()  # uint8 [H, W, 3]
        except tf.errors.OpError:
            continue
        heights.append(image.shape[0])
        widths.append(image.shape[1])
        coloured.append(has_colour(image))
        pixels += image.shape[0] * image.shape[1]
        if pixels > PIXELS:
            break
    if not heights:
        raise UserError("no image of the training split can be decoded")
    colour = sum(coloured) > COLOUR_SHARE * len(coloured)
    return Glance(round(statistics.median(heights)), round(statistics.median(widths)), colour)


def has_colour(image: np.ndarray) -> bool:
    """Whether an image, uint8 [H, W, 3], has colours."""
    spread = image.max(axis=-1).astype(np.int16) - image.min(axis=-1)  # [H, W]
    return bool(spread.mean() > GREY_LEVELS)


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
