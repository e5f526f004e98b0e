"""Folders of images: `DIR/<split>/<class>/*`, or without labels `DIR/<split>/` with images at any depth.

How the images of one split get their labels:

- Where two or more folders in `DIR/<split>/` hold images, these are class folders. The name of the class folder is
  the label of every image in it, at any depth: `train/cat/1.jpg` and `train/cat/2024/2.jpg` are both of class `cat`.
- Where images lie in one folder or in none, there are no classes to tell apart: the images are unlabelled. One folder
  alone is a class only where the trained network knows a class of this name, or where another split that is read
  together with this one has a class folder of this name.
- Images beside class folders are stray. Where they are fewer than the images in the class folders, they are left out.
  Otherwise it is not clear what the folders mean, and the user is asked to sort the images.

Where a split is not simply `DIR/<split>/<class>/*`, the log says what was decided.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import numpy as np

from errors import UserError
from sources.base import UNLABELLED, hash_order, some_of, split_ranges, warn_once
from sources.files import (
    IMAGE_SUFFIXES,
    FileSource,
    file_source,
    find_images,
    is_folder,
    names_in,
    printable,
    without_undecodable,
)


def load(
    folder: str,
    split: str,
    classes: Sequence[str] | None = None,
    max_corrupt: float | None = None,
    known_by: str = "",
) -> FileSource:
    """The images of a split, which is a folder in `folder`, a part of one, or a sum of these.

    A whole split has its files in sorted order. A part such as `train[:80%]` is taken from the files in an order drawn
    from their names, so that every part has images of every class.

    Args:
      folder: the folder with one folder for each split.
      split: such as `train`, `train[:80%]` or `train[:50%]+train[80%:]+test`.
      classes: the classes to number labels by; None or empty: the class folders, sorted.
      max_corrupt: open every image and leave out those whose content is bad, up to this fraction of all; None: open
        none.
      known_by: who knows `classes`, for messages.

    Raises:
      UserError: where the folder, the split or its images are missing, where a class is not among `classes`, or where
        it is not clear which labels the images have.
    """
    names_of_splits = _splits_used(folder, split)
    files = {name: _files_of(os.path.join(folder, name)) for name in names_of_splits}
    if not classes:
        classes = _class_folders(files.values())
    known_by = known_by or "the trained network"
    paths: list[str] = []
    labels: list[int] = []
    names: list[str] = []
    members: dict[str, list[str]] = {}  # the images of each split, by their names there
    number = {name: i for i, name in enumerate(classes)}
    for name_of_split in names_of_splits:
        root = os.path.join(folder, name_of_split)
        class_of = _class_of_each(root, files[name_of_split], classes, known_by)
        members[name_of_split] = [printable(file) for file in class_of]
        for file, name_of_class in class_of.items():
            paths.append(os.path.join(root, file))
            labels.append(number[name_of_class] if name_of_class else UNLABELLED)
            alone = len(names_of_splits) == 1
            names.append(printable(file if alone else os.path.join(name_of_split, file)))
    has_labels = any(label != UNLABELLED for label in labels)
    source = file_source(paths, labels, names, classes if has_labels else [])
    if names_of_splits != [split]:
        source = source.take(_chosen(split, members))
    return source if max_corrupt is None else without_undecodable(source, max_corrupt)


def _splits_used(folder: str, split: str) -> list[str]:
    """The names of the splits of which `split` takes all or a part, each once.

    Raises:
      UserError: where the folder or one of them does not exist.
    """
    where = f"--data_dir={printable(folder)}"
    if not is_folder(folder):
        raise UserError(f"{where}: no such folder")
    existing = sorted(name for name in names_in(folder) if is_folder(os.path.join(folder, name)))
    if split in existing:
        return [split]
    used = []
    for part in split.split("+"):
        name = part.split("[")[0].strip()
        if name not in existing:
            listed = ", ".join(printable(name) for name in existing) or "no subfolder"
            raise UserError(
                f"{where} has no split {printable(name)}; it has {listed}: put the images into "
                f"DIR/{printable(name)}/<class>/, or DIR/{printable(name)}/all/ without labels, or name another split"
            )
        if name not in used:
            used.append(name)
    return used


def _files_of(root: str) -> list[str]:
    """The images of a split, as paths relative to its folder `root`."""
    files = find_images(root)
    if not files:
        raise UserError(f"{printable(root)} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _first_folders(files: Collection[str]) -> list[str]:
    """The first-level folders of a split that hold images, at any depth."""
    return sorted({printable(file.split("/")[0]) for file in files if "/" in file})


def _class_folders(files_of_splits: Collection[Collection[str]]) -> list[str]:
    """The class folders of several splits together."""
    found: set[str] = set()
    for files in files_of_splits:
        folders = _first_folders(files)
        if len(folders) > 1:
            found.update(folders)
    return sorted(found)


def _class_of_each(root: str, files: list[str], classes: Sequence[str], known_by: str) -> dict[str, str | None]:
    """The images of a split that are used, each with its class, or None. The module's docstring has the rules.

    Args:
      root: the split's folder.
      files: its images, as paths relative to `root`.
      classes: the classes that are known.
      known_by: who knows them, for messages.

    Raises:
      UserError: where a class folder is not among `classes`, or most images lie beside the class folders.
    """
    where = printable(root)
    folders = _first_folders(files)
    beside = [file for file in files if "/" not in file]
    inside = [file for file in files if "/" in file]
    if len(folders) < 2 and not set(folders) & set(classes):
        warn_once(f"{where}: no labels, since {_why_unlabelled(folders, classes, known_by)}")
        return dict.fromkeys(files)
    unknown = [name for name in folders if name not in classes]
    if unknown:
        data_dir, split = os.path.split(where)
        raise UserError(
            f"--data_dir={data_dir}: split {split} has the classes {some_of(unknown)}, which {known_by} does not know; "
            f"it knows {some_of(classes)}: rename or remove these folders, or, to use the images without labels, put "
            f"all of them into one folder {where}/all"
        )
    if beside:
        share = f"{len(beside)} of {len(files)} images"
        if len(beside) >= len(inside):
            raise UserError(
                f"{where}: {share} lie beside the class folders {some_of(folders)}: sort them into the class folders, "
                f"or, to use the images without labels, put all of them into one folder {where}/all"
            )
        stray = some_of([printable(file) for file in beside])
        warn_once(f"{where}: left out {share}, which lie beside the class folders {some_of(folders)}: {stray}")
    deeper = [printable(file) for file in inside if file.count("/") > 1]
    if deeper:
        warn_once(
            f"{where}: the classes are the folders {some_of(folders)}, also of the images in folders below them "
            f"({len(deeper)} of {len(files)} images, the first is {deeper[0]})"
        )
    return {file: printable(file.split("/")[0]) for file in inside}


def _why_unlabelled(folders: Sequence[str], classes: Sequence[str], known_by: str) -> str:
    """Why images have no labels where `folders`, the folders that they lie in, is one folder or none."""
    if not folders:
        return "its images lie in no class folders"
    unknown = f", and {known_by} knows no class of this name" if classes else ""
    return f"{folders[0]} is its only folder with images, and one class tells nothing apart{unknown}"


def _chosen(split: str, members: dict[str, list[str]]) -> np.ndarray:
    """The images that `split` takes, as indices into the images of all `members`, one split after the other.

    Args:
      split: the parts to take.
      members: the names of the images in each split that `split` names.
    """
    first: dict[str, int] = {}  # the index at which each split begins
    order: dict[str, np.ndarray] = {}
    count = 0
    for name, files in members.items():
        first[name] = count
        order[name] = np.array(hash_order(files, 0)) if "[" in split else np.arange(len(files))
        count += len(files)
    sizes = {name: len(files) for name, files in members.items()}
    parts = [first[name] + order[name][begin:end] for name, begin, end in split_ranges(split, sizes)]
    return np.concatenate(parts)
