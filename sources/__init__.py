"""Where images come from. Every kind of data set gives its splits as `Source`s, and `load` chooses the kind.

Each kind has a file of its own: `digits.py`, `tfds.py`, `folder.py`. To add a kind, write another such file and a
branch in `load`. `base.py` says what a `Source` is, and holds what the kinds share; `files.py` reads images that lie
in files, for every kind that knows their paths.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from errors import UserError
from sources import digits, folder, tfds
from sources.base import UNLABELLED, MemorySource, Source, decode_image, hash_order, some_of, split_ranges
from sources.files import FileSource, file_source, find_images, printable
from sources.tfds import TfdsSource

__all__ = [
    "UNLABELLED",
    "FileSource",
    "MemorySource",
    "Source",
    "TfdsSource",
    "decode_image",
    "hash_order",
    "load",
    "load_folder",
    "printable",
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
) -> Source:
    """The split of a data set: `digits`, `image_folder`, or a TensorFlow dataset by name.

    Args:
      dataset, split, data_dir: which, as the flags of these names say.
      classes: the classes to number a folder's labels by; None or empty: the folder's own.
      max_corrupt: open every image of a folder and leave out those whose content is bad, up to this fraction of all;
        None: open none.
      known_by: who knows `classes`, for messages: "--teacher=runs/a" or "the run in --model_dir=runs/a".

    Raises:
      UserError: where the split does not exist or cannot be read; the message says what does exist.

    Example:
      `load("image_folder", "train[:80%]", "photos")` reads 80 % of the images in photos/train/.
    """
    if dataset == "digits":
        return digits.load(split)
    if dataset == "image_folder":
        return folder.load(data_dir, split, classes, max_corrupt, known_by)
    return tfds.load(dataset, split, data_dir)


def load_folder(folder: str) -> Source:
    """Every image in a folder, at any depth, without labels. Its name is its path from there.

    Raises:
      UserError: where there is no image, or the folder cannot be read.
    """
    names = find_images(folder)
    if not names:
        raise UserError(f"--data_dir={folder} holds no image")
    labels = [UNLABELLED] * len(names)
    return file_source([os.path.join(folder, name) for name in names], labels, [printable(name) for name in names], [])
