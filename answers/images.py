"""Which images a command is about, and what they are called."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import console
import data
import sources
from config import AUTO_SPLIT, DATA_FIELDS, Config
from errors import UserError
from sources import lists

MAX_BYTES = 2**30  # The features of a suggestion take at most so much. Of more images it sees a draw.
DRAW_SEED = 0


class Images(NamedTuple):
    """The images that a command is about.

    Attributes:
      source: they are among its examples.
      names: of all examples of the source, as `names_of` gives them.
      labelled: [n] bool, of all examples: whether they have a label.
      wanted: the positions of the images, ascending.
    """

    source: sources.Source
    names: Sequence[str]
    labelled: np.ndarray
    wanted: np.ndarray


def find_images(config: Config) -> Images:
    """The images that the flags mean: see the help of `predict_split` and `unlabelled_only`.

    A suggestion is about the images of `train_split`, the labelled ones too.

    Raises:
      UserError: where there are none, or they cannot be listed.
    """
    suggests = config.mode == "suggest"
    split = "" if suggests else config.predict_split
    if suggests or config.unlabelled_only:
        split = split or config.train_split
        source = labelled_source(config, split)
    elif config.dataset == "image_folder" and not split:
        source = sources.load_folder(config.data_dir, config.max_image_pixels)
        if config.images:
            source = listed_alone(source, config)
    else:
        split = split or config.eval_split
        source = data.open_split(config, split, None)
    names, labels = names_of(source, config.data_dir), source.index()[1]
    labelled = labels >= 0
    free = int((~labelled).sum())
    if (suggests or config.unlabelled_only) and not free:
        raise UserError(
            f"all {len(names)} images of {split} have a label: if their folders are no classes, put all of them into "
            f"one folder {split}/all"
        )
    if suggests and config.count > free:
        raise UserError(f"--count={config.count}: of {len(names)} images of {split}, {free} have no label")
    wanted = np.flatnonzero(~labelled) if config.unlabelled_only and not suggests else np.arange(len(names))
    return Images(source, names, labelled, wanted)


def names_of(source: sources.Source, data_dir: str) -> Sequence[str]:
    """What the examples of a source are called: a file by its path from `data_dir`, also where it is in a split."""
    if not isinstance(source, sources.FileSource):
        return source.index()[0]
    folder = os.path.relpath(source.root, data_dir)
    return source.names if folder == "." else [os.path.join(folder, name) for name in source.names]


def listed_alone(source: sources.FileSource, config: Config) -> sources.FileSource:
    """Of every image in the folder those that are in the list `--images`.

    Raises:
      UserError: where the list cannot be read, or names none of them.
    """
    listed = lists.read_images(config.images, config.data_dir)
    found = np.array([name in listed for name in source.names], bool)
    if not found.any():
        raise UserError(f"--images={config.images}: none of its {len(listed)} images is in {config.data_dir}")
    return source.take(np.flatnonzero(found))


def labelled_source(config: Config, split: str) -> sources.Source:
    """All images of a split, with the labels that the run may see, those too that it holds out to evaluate on."""
    fields = ("data_dir", "labels", "images", "max_image_pixels", "max_corrupt_fraction", *DATA_FIELDS)
    whole = Config(**{**{name: getattr(config, name) for name in fields}, "train_split": split})
    holds_out = config.eval_split == AUTO_SPLIT and split == config.train_split
    if not (holds_out and config.subset):
        return data.train_source(whole, None)[0]
    # Its labels were drawn from the images that it does not hold out.
    kept = dataclasses.replace(whole, eval_split=AUTO_SPLIT)
    _, drawn = data.train_source(kept, None)
    return data.open_split(whole, split, None).with_labels(drawn or [], only=False)


def as_many_as_fit(images: Images, width: int) -> Images:
    """The images whose features, of `width` numbers each, fit into `MAX_BYTES`.

    Of more, it is a draw. At least half of it are images without a label, or all of these.
    """
    limit = MAX_BYTES // (4 * width)
    if len(images.wanted) <= limit:
        return images
    console.say(f"{limit:,} of {len(images.wanted):,} images are drawn: the features of more do not fit into memory")
    random = np.random.default_rng(DRAW_SEED)
    labelled = random.permutation(np.flatnonzero(images.labelled))
    free = random.permutation(np.flatnonzero(~images.labelled))
    labelled = labelled[: max(limit // 2, limit - len(free))]
    free = free[: limit - len(labelled)]
    return images._replace(wanted=np.sort(np.concatenate([labelled, free])))


def fingerprint_of_images(images: Images) -> str:
    """A text that no other choice of images has."""
    return hashlib.sha256(images.source.fingerprint.encode() + images.wanted.tobytes()).hexdigest()
