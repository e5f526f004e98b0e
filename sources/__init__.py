"""Where images come from. Every kind of data set gives its splits as `Source`s, and `load` chooses the kind.

Each kind has a file of its own: `digits.py`, `tfds.py`, `folder.py`. To add a kind, write another such file and a
branch in `load`. `base.py` says what a `Source` is, and holds what the kinds share; `files.py` reads images that lie
in files, for every kind that knows their paths. `kinds.py` says what a person sees in them, `lists.py` reads tables of
labels, `manifest.py` keeps what was found for the next start.
"""

from __future__ import annotations

from collections.abc import Sequence

from errors import UserError
from sources import digits, folder, tfds
from sources.base import (
    UNLABELLED,
    ListedSource,
    MemorySource,
    NoSuchSplit,
    Source,
    decode_image,
    hash_order,
    sent_away,
    some_of,
    split_ranges,
)
from sources.files import FileSource, file_source, find_images
from sources.folder import HELD_OUT, KEPT
from sources.kinds import MAX_PIXELS
from sources.share import Share
from sources.stripes import Stripes
from sources.tfds import TfdsSource

__all__ = [
    "HELD_OUT",
    "KEPT",
    "MAX_PIXELS",
    "UNLABELLED",
    "FileSource",
    "ListedSource",
    "MemorySource",
    "NoSuchSplit",
    "Share",
    "Source",
    "Stripes",
    "TfdsSource",
    "decode_image",
    "file_source",
    "hash_order",
    "load",
    "load_folder",
    "sent_away",
    "some_of",
    "split_ranges",
]


def load(
    dataset: str,
    split: str,
    data_dir: str = "",
    classes: Sequence[str] | None = None,
    max_corrupt: float | None = None,
    known_by: str = "",
    labels: str = "",
    images: str = "",
    max_pixels: int = MAX_PIXELS,
    side: str = "",
) -> Source:
    """The split of a data set: `digits`, `image_folder`, or a TensorFlow dataset by name.

    Args:
      dataset, split, data_dir: which, as the flags of these names say.
      classes: the classes to number a folder's labels by; None or empty: the folder's own.
      max_corrupt: the share of a folder's images that may be unreadable; where more are, reading stops. None: all.
      known_by: who knows `classes`, for messages: "--teacher=runs/a" or "the run in --model_dir=runs/a".
      labels, images: for a folder, a table of labels and a list of images, as the flags of these names say.
      max_pixels: an image of a folder with more pixels counts as unreadable.
      side: for a folder, `HELD_OUT` for the images of the split that are held out to evaluate on, `KEPT` for the rest.

    Raises:
      UserError: where the split does not exist or cannot be read; the message says what does exist.

    Example:
      `load("image_folder", "train[:80%]", "photos")` reads 80 % of the images in photos/train/.
    """
    if dataset == "digits":
        return digits.load(split)
    if dataset == "image_folder":
        return folder.load(data_dir, split, classes, max_corrupt, known_by, labels, images, max_pixels, side)
    return tfds.load(dataset, split, data_dir)


def load_folder(folder: str, max_pixels: int = MAX_PIXELS) -> FileSource:
    """Every image in a folder, at any depth, without labels. Its name is its path from there.

    Args:
      folder: the folder.
      max_pixels: an image with more pixels counts as unreadable.

    Raises:
      UserError: where there is no image, or the folder cannot be read.
    """
    files = find_images(folder)
    if not files:
        raise UserError(f"--data_dir={folder} holds no image")
    return file_source(folder, files, [UNLABELLED] * len(files), [], max_pixels=max_pixels)
