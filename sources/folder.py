"""Folders of images: what is a split, what is a class, and which images are held out.

The splits of a folder `DIR`:

- Where a folder in `DIR` is called `train`, `validation`, `valid`, `val`, `test`, `labelled` or `unlabelled`, the
  folders in `DIR` are splits: `--train_split=train` is `DIR/train`.
- Otherwise all images of `DIR`, at any depth, are the split `train`. A folder in it may still be named as a split.
- A table of labels with a column `split` decides alone (`lists.py`). An image that it does not name is in `train`.

How the images of one split get their labels:

- From a table of labels, where there is one. An image that it does not name, or without a label there, has none.
- Where two or more folders in the split hold images, these are class folders. The name of the class folder is
  the label of every image in it, at any depth: `train/cat/1.jpg` and `train/cat/2024/2.jpg` are both of class `cat`.
- Where images lie in one folder or in none, there are no classes to tell apart: the images are unlabelled. One folder
  alone is a class only where the trained network knows a class of this name, or where another split that is read
  together with this one has a class folder of this name.
- Images beside class folders are stray. Where they are fewer than the images in the class folders, they are left out.
  Otherwise it is not clear what the folders mean, and the user is asked to sort the images.

Where a split is not simply `DIR/<split>/<class>/*`, the log says what was decided.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

import sources.kinds as kinds
import sources.lists as lists
from errors import UserError, did_you_mean
from sources.base import UNLABELLED, hash_order, names_of_splits, some_of, split_ranges, warn_once
from sources.files import FileSource, file_source, find_images, is_folder, names_in, path_bytes, printable
from sources.held_out import held_out

# A folder that has one of these folders has splits.
SPLIT_FOLDERS = (
    "train", "validation", "valid", "val", "test", "labelled", "labeled", "unlabelled", "unlabeled",
)  # fmt: skip
MOST_DIGITS = 18  # A label of more digits is a text.
# The sides of a split of which a part is held out.
KEPT, HELD_OUT = "kept", "held_out"


class Part(NamedTuple):
    """The images of a split.

    Attributes:
      folder: the split's folder in the folder of images; empty where it has none of its own.
      files: the images, as paths relative to it.
    """

    folder: str
    files: list[str]


def load(
    folder: str,
    split: str,
    classes: Sequence[str] | None = None,
    max_corrupt: float | None = None,
    known_by: str = "",
    labels: str = "",
    images: str = "",
    max_pixels: int = kinds.MAX_PIXELS,
    side: str = "",
) -> FileSource:
    """The images of a split of `folder`, of a part of one, or of a sum of these.

    A whole split has its files in sorted order. A part such as `train[:80%]` is taken from the files in an order drawn
    from their names, so that every part has images of every class.

    Args:
      folder: the folder of images; the module's docstring says what its splits are.
      split: such as `train`, `train[:80%]` or `train[:50%]+train[80%:]+test`.
      classes: the classes to number labels by; None or empty: the class folders or the labels of the table, sorted.
      max_corrupt: the share of the images that may be unreadable; None: all.
      known_by: who knows `classes`, for messages.
      labels: a table of labels, or empty.
      images: a list of images, the only ones that count; empty: all.
      max_pixels: an image with more counts as unreadable.
      side: `held_out`: the images of the split that are held out to evaluate on; `kept`: the others; empty: all.

    Raises:
      UserError: where the folder, the split or its images are missing, where a class is not among `classes`, or where
        it is not clear which labels the images have.
    """
    known_by = known_by or "the trained network"
    table = lists.read_labels(labels, folder) if labels else None
    if table is None and not images:
        parts = {name: Part(place, _files_of(folder, place)) for name, place in _places(folder, split).items()}
    else:
        parts = _listed_parts(folder, split, table or {}, labels, images)
    if not classes:
        classes = _class_folders(parts.values()) if table is None else _classes_in(table)
    _name_classes_alike(classes)
    number = {name: i for i, name in enumerate(classes)}
    alone = len(parts) == 1
    root = os.path.join(folder, next(iter(parts.values())).folder) if alone else folder
    files: list[str] = []
    numbers: list[int] = []
    members: dict[str, list[str]] = {}  # the images of each split, by their names there
    for name, part in parts.items():
        if table is None:
            class_of = _class_of_each(folder, part, classes, known_by)
        else:
            class_of = _class_by_table(folder, name, part, table, number, known_by)
        members[name] = [printable(file) for file in class_of]
        files += class_of if alone else [os.path.join(part.folder, file) for file in class_of]
        numbers += [number[name_of_class] if name_of_class else UNLABELLED for name_of_class in class_of.values()]
    used_classes = classes if any(label != UNLABELLED for label in numbers) else []
    source = file_source(root, files, numbers, used_classes, max_corrupt, max_pixels)
    chosen = np.arange(source.examples) if list(parts) == [split] else _chosen(split, members)
    if side:
        names = [name for names in members.values() for name in names]
        is_held_out = held_out([names[i] for i in chosen], source.labels[chosen])
        chosen = chosen[is_held_out == (side == HELD_OUT)]
        if not len(chosen):
            raise UserError(f"{printable(folder)}: split {split} has one image, and none can be held out: give more")
    return source if len(chosen) == source.examples and list(parts) == [split] else source.take(chosen)


def _places(folder: str, split: str) -> dict[str, str]:
    """The folders in `folder` of the splits of which `split` takes all or a part, by the splits' names.

    Raises:
      UserError: where the folder or one of them does not exist.
    """
    where = f"--data_dir={printable(folder)}"
    _check_is_folder(folder)
    existing = sorted(name for name in names_in(folder) if is_folder(os.path.join(folder, name)))
    if split in existing:
        return {split: split}
    whole = not _has_splits(existing)
    places = {}
    for name in names_of_splits(split):
        if name not in existing and not (whole and name == lists.USUAL_SPLIT):
            raise UserError(_no_split(where, name, [printable(name) for name in existing]))
        places[name] = name if name in existing else ""
    return places


def _check_is_folder(folder: str) -> None:
    """Raises UserError where there is no folder of images at `folder`."""
    if not is_folder(folder):
        is_file = os.path.exists(path_bytes(folder))
        what = "is a file: give the folder of the images, unpacked" if is_file else "no such folder"
        raise UserError(f"--data_dir={printable(folder)}: {what}")


def _has_splits(folders: Collection[str]) -> bool:
    """Whether the folders in a folder of images are splits."""
    return not set(folders).isdisjoint(SPLIT_FOLDERS)


def _no_split(where: str, name: str, existing: Sequence[str]) -> str:
    """What to say where there is no split of this name."""
    if {"labelled", "labeled"} & set(existing) and name == lists.USUAL_SPLIT:
        advice = f"take both, by --train_split={'+'.join(existing)}"
    else:
        place = f"DIR/{printable(name)}"
        advice = f"put the images into {place}/<class>/, or {place}/all/ without labels, or name another split"
    listed = ", ".join(existing) or "no subfolder"
    meant = did_you_mean(printable(name), existing)
    return f"{where} has no split {printable(name)}; it has {listed}: {advice}{meant}"


def _listed_parts(folder: str, split: str, table: Mapping[str, lists.Row], labels: str, images: str) -> dict[str, Part]:
    """The parts that `split` is made of, where there is a table of labels or a list of images.

    Raises:
      UserError: where a list names an image that is not there, or there is no such split.
    """
    _check_is_folder(folder)
    files = find_images(folder)
    if images:
        listed = lists.read_images(images, folder)
        _check_there(f"--images={images}", listed, files, f"the images in {printable(folder)}")
        files = sorted(listed)
    if labels:
        others = f"the images in --images={images}" if images else f"the images in {printable(folder)}"
        _check_there(f"--labels={labels}", table, files, others)
    parts: dict[str, Part] = {}
    if any(row.split for row in table.values()):
        for file in files:
            row = table.get(file)
            name = (row and row.split) or lists.USUAL_SPLIT
            parts.setdefault(name, Part("", [])).files.append(file)
    elif _has_splits(first := {file.split("/")[0] for file in files if "/" in file}) or (
        lists.USUAL_SPLIT not in names_of_splits(split) and first
    ):
        for file in files:
            if "/" in file:
                name, below = file.split("/", 1)
                parts.setdefault(name, Part(name, [])).files.append(below)
    else:
        parts[lists.USUAL_SPLIT] = Part("", files)
    if split in parts:
        return {split: parts[split]}
    names = names_of_splits(split)
    for name in names:
        if name not in parts:
            raise UserError(_no_split(f"--data_dir={printable(folder)}", name, sorted(parts)))
    return {name: parts[name] for name in names}


def _check_there(where: str, rows: Mapping[str, lists.Row], files: Collection[str], what: str) -> None:
    """Raises UserError where a row names an image that is not among `files`, and says which row."""
    there = set(files)
    for path, row in rows.items():
        if path not in there:
            name = os.path.basename(path).lower()
            like_it = [file for file in files if os.path.basename(file).lower() == name]
            meant = f"; did you mean {printable(like_it[0])}?" if like_it else ""
            raise UserError(
                f"{where}: row {row.number}: {printable(path)} is not among {what} "
                f"({', '.join(kinds.SUFFIXES)}): correct the path, which begins in --data_dir, or remove the row{meant}"
            )


def _classes_in(table: Mapping[str, lists.Row]) -> list[str]:
    """The labels of a table, sorted: as numbers where all are whole numbers, and otherwise as text."""
    found = sorted({row.label for row in table.values() if row.label})
    return sorted(found, key=int) if all(_is_number(label) for label in found) else found


def _is_number(label: str) -> bool:
    return label.isdecimal() and len(label) <= MOST_DIGITS


def _name_classes_alike(classes: Sequence[str]) -> None:
    """Warns of classes whose names differ in capital letters or in spaces alone: they may be meant to be one."""
    seen: dict[str, str] = {}
    for name in classes:
        first = seen.setdefault(" ".join(name.casefold().split()), name)
        if first != name:
            warn_once(f"{first!r} and {name!r} count as two classes: give them one name if they are one")


def _class_by_table(
    folder: str, split: str, part: Part, table: Mapping[str, lists.Row], known: Mapping[str, int], known_by: str
) -> dict[str, str | None]:
    """The images of a split, each with the class that the table says, or None.

    Raises:
      UserError: where a class is not known.
    """
    class_of: dict[str, str | None] = {}
    unknown = set()
    for file in part.files:
        row = table.get(os.path.join(part.folder, file))
        label = row.label if row else ""
        class_of[file] = label or None
        if label and label not in known:
            unknown.add(label)
    if unknown:
        raise UserError(
            f"--data_dir={printable(folder)}: split {split} has the classes {some_of(sorted(unknown))}, which "
            f"{known_by} does not know; it knows {some_of(list(known))}: correct the labels, or empty them"
            f"{did_you_mean(min(unknown), known)}"
        )
    return class_of


def _files_of(folder: str, place: str) -> list[str]:
    """The images of a split, as paths relative to its folder `place` in `folder`."""
    root = os.path.join(folder, place)
    files = find_images(root)
    if not files:
        if not place:
            raise UserError(_no_split(f"--data_dir={printable(folder)}", lists.USUAL_SPLIT, _folders_in(folder)))
        raise UserError(f"{printable(root)} holds no image ({', '.join(kinds.SUFFIXES)})")
    return files


def _folders_in(folder: str) -> list[str]:
    return sorted(printable(name) for name in names_in(folder) if is_folder(os.path.join(folder, name)))


def _first_folders(files: Collection[str]) -> list[str]:
    """The first-level folders of a split that hold images, at any depth."""
    return sorted(map(printable, {file.split("/", 1)[0] for file in files if "/" in file}))


def _class_folders(parts: Collection[Part]) -> list[str]:
    """The class folders of several splits together."""
    found: set[str] = set()
    for part in parts:
        folders = _first_folders(part.files)
        if len(folders) > 1:
            found.update(folders)
    return sorted(found)


def _class_of_each(folder: str, part: Part, classes: Sequence[str], known_by: str) -> dict[str, str | None]:
    """The images of a split that are used, each with its class, or None. The module's docstring has the rules.

    Args:
      folder: the folder of images.
      part: the split.
      classes: the classes that are known.
      known_by: who knows them, for messages.

    Raises:
      UserError: where a class folder is not among `classes`, or most images lie beside the class folders.
    """
    where = printable(os.path.join(folder, part.folder) if part.folder else folder)
    files = part.files
    folders = _first_folders(files)
    beside = [file for file in files if "/" not in file]
    inside = [file for file in files if "/" in file]
    if len(folders) < 2 and not set(folders) & set(classes):
        warn_once(f"{where}: no labels, since {_why_unlabelled(folders, classes, known_by)}")
        return dict.fromkeys(files)
    unknown = [name for name in folders if name not in classes]
    if unknown:
        split = printable(part.folder) or lists.USUAL_SPLIT
        raise UserError(
            f"--data_dir={printable(folder)}: split {split} has the classes {some_of(unknown)}, which {known_by} does "
            f"not know; it knows {some_of(classes)}: rename or remove these folders, or, to use the images without "
            f"labels, put all of them into one folder {where}/all{did_you_mean(unknown[0], classes)}"
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
    if not part.folder:
        said = ", ".join(SPLIT_FOLDERS[:5])
        warn_once(
            f"{where}: its {len(folders)} folders are the classes ({some_of(folders)}), since none is called {said}"
        )
    deeper = [printable(file) for file in inside if file.count("/") > 1]
    if deeper:
        warn_once(
            f"{where}: the classes are the folders {some_of(folders)}, also of the images in folders below them "
            f"({len(deeper)} of {len(files)} images, the first is {deeper[0]})"
        )
    name_of = functools.cache(printable)
    return {file: name_of(file.split("/", 1)[0]) for file in inside}


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
