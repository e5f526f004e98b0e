"""What was found out about a folder of images, kept for the next start: its images, and which of them are unreadable.

Of a TensorFlow dataset the names and labels of a split are kept, which take a pass over its files to learn.

It lies in `$XDG_CACHE_HOME/simclr` (`~/.cache/simclr`), never in the folder itself, and may be removed at any time. The
list of images holds as long as no folder has changed, by its modification time: adding, removing or renaming a file
changes the folder that it lies in. What is known of an unreadable image holds as long as its file has not changed.
Folders on a remote file system have no modification time, so nothing is kept of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import npz
from sources.file_list import FileList

VERSION = 1
# A folder that has changed so recently may change again within one tick of its clock, unseen.
SETTLED_SECONDS = 2.0

# What is raised where something that was kept has been damaged.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

State = tuple[int, int]


class Listing(NamedTuple):
    """The images below a folder.

    Attributes:
      files: their paths relative to it, as text (`files.py` says how), sorted.
      folders: the state of each folder below it by its relative path, the folder itself included.
      others: how many files of each kind of image are there that is not read, by suffix.
    """

    files: list[str]
    folders: dict[str, State]
    others: dict[str, int]


def state_of_folder(path: str) -> State:
    """What changes in a folder when a file in it comes or goes: its modification time in ns, and its inode.

    Raises:
      OSError: where it cannot be looked at.
    """
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ino


def read_listing(root: str, suffixes: Sequence[str]) -> Listing | None:
    """The listing of the folder `root` that was kept; None where there is none, it is damaged, or a folder has changed.

    Args:
      root: a local folder.
      suffixes: of the files that count as images.
    """
    try:
        kept = npz.read(_place(root, ".npz"))
        about = json.loads(kept["about"].tobytes())
        if about["version"] != VERSION or about["suffixes"] != list(suffixes):
            return None
        others = {str(suffix): int(count) for suffix, count in about["others"].items()}
        folders = dict(zip(_paths(kept, "folders"), map(tuple, kept["states"].tolist()), strict=True))
        if not folders or any(state_of_folder(os.path.join(root, name)) != folders[name] for name in folders):
            return None
        return Listing(_paths(kept, "files"), folders, others)
    except (OSError, *_DAMAGE):
        return None


def keep_listing(root: str, suffixes: Sequence[str], listing: Listing) -> None:
    """Keeps the listing of `root`, unless a folder has changed just now. A full or read-only disk does not matter."""
    newest = max(modified for modified, _ in listing.folders.values())
    if newest > time.time_ns() - SETTLED_SECONDS * 1e9:
        return
    about = {"version": VERSION, "suffixes": list(suffixes), "others": listing.others}
    columns: dict[str, Any] = {
        "states": np.array(list(listing.folders.values()), np.int64),
        **_columns("folders", list(listing.folders)),
        **_columns("files", listing.files),
    }
    _write(root, ".npz", about, columns)


def _write(root: str, suffix: str, about: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """Writes arrays about `root`, whole or not at all. A full or read-only disk does not matter."""
    with contextlib.suppress(OSError):
        path = _place(root, suffix)
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as file:
            try:
                np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **columns)
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise


class Index(NamedTuple):
    """What the examples of a split of a TensorFlow dataset are called.

    Attributes:
      names: [n] of the examples.
      labels: [n] int32, -1 where unlabelled.
      places: [n] the name of the file and the number of the record in it, as `tfds_id` has them.
    """

    names: list[str]
    labels: np.ndarray
    places: list[str]


def read_index(folder: str, split: str, files: Sequence[str]) -> Index | None:
    """The index of a split that was kept; None where there is none, it is damaged, or a file of `files` has changed."""
    try:
        kept = npz.read(_place(os.path.join(folder, split), ".index.npz"))
        about = json.loads(kept["about"].tobytes())
        if about != _about_index(split, files):
            return None
        found = Index(_texts(kept, "names"), kept["labels"], _texts(kept, "places"))
        sizes = {len(found.names), len(found.places), *found.labels.shape}
        return found if found.labels.dtype == np.int32 and found.labels.ndim == 1 and len(sizes) == 1 else None
    except (OSError, *_DAMAGE):
        return None


def keep_index(folder: str, split: str, files: Sequence[str], index: Index) -> None:
    """Keeps the index of a split in `files`, which lie in `folder`. A full or read-only disk does not matter."""
    about = _about_index(split, files)
    if None in about["states"]:  # They are not local.
        return
    columns = {"labels": index.labels, **_columns("names", index.names), **_columns("places", index.places)}
    _write(os.path.join(folder, split), ".index.npz", about, columns)


def _about_index(split: str, files: Sequence[str]) -> dict[str, Any]:
    """What must be the same for an index to hold, as JSON gives it back."""
    states = [state_of_file(file) for file in files]
    return {"version": VERSION, "split": split, "files": list(files), "states": [s and list(s) for s in states]}


class Unreadable(NamedTuple):
    """An image that cannot be read.

    Attributes:
      reason: why.
      state: the modification time in ns and the size of its file.
    """

    reason: str
    state: State


def state_of_file(path: str | bytes) -> State | None:
    """The modification time of a file in ns, and its size; None where it cannot be looked at, or is not local."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def read_unreadable(root: str) -> dict[str, str]:
    """The images below `root` that are known to be unreadable and have not changed, by relative path, with the reasons.

    Lines that are damaged are passed over.
    """
    found: dict[str, Unreadable] = {}
    try:
        with open(_place(root, ".jsonl"), encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for line in lines:
        with contextlib.suppress(*_DAMAGE):
            entry = json.loads(line)
            if isinstance(entry["reason"], str):
                found[_inside(entry["path"])] = Unreadable(entry["reason"], tuple(entry["state"]))
    return {
        path: known.reason
        for path, known in found.items()
        if known.state == state_of_file(os.path.join(root, path).encode("utf-8", "surrogateescape"))
    }


def keep_unreadable(root: str, path: str, reason: str) -> None:
    """Keeps that the image at `path` below `root` is unreadable. A full or read-only disk does not matter."""
    state = state_of_file(os.path.join(root, path).encode("utf-8", "surrogateescape"))
    if state is None:
        return
    line = json.dumps({"path": path, "reason": reason, "state": state}) + "\n"
    # Workers that write at the same time each append a line of their own.
    with contextlib.suppress(OSError), open(_place(root, ".jsonl"), "a", encoding="utf-8") as file:
        file.write(line)


def _place(root: str, suffix: str) -> str:
    """Where something about the folder `root` is kept.

    Raises:
      OSError: where the place cannot be made, or where another user could write into it.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(cache, "simclr")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = os.stat(folder)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} is not this user's alone")
    name = hashlib.sha256(os.path.realpath(root).encode("utf-8", "surrogateescape")).hexdigest()
    return os.path.join(folder, name[:32] + suffix)


def _columns(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as arrays."""
    listed = FileList.of(text.encode("utf-8", "surrogateescape") for text in texts)
    return {f"{name}_content": listed.content, f"{name}_begins": listed.begins}


def _paths(kept: Mapping[str, np.ndarray], name: str) -> list[str]:
    """The paths that `_columns` has made into arrays.

    Raises:
      ValueError: where the arrays do not belong together, or a path leads out of the folder.
    """
    return [_inside(path) for path in _texts(kept, name)]


def _texts(kept: Mapping[str, np.ndarray], name: str) -> list[str]:
    """The texts that `_columns` has made into arrays.

    Raises:
      ValueError: where the arrays do not belong together.
    """
    listed = FileList(kept[f"{name}_content"], kept[f"{name}_begins"])
    begins = listed.begins
    sound = begins.dtype == np.int64 and begins.ndim == 1 and begins.size and listed.content.dtype == np.uint8
    if not sound or begins[0] != 0 or begins[-1] != len(listed.content) or (np.diff(begins) < 0).any():
        raise ValueError("the places of the texts are damaged")
    return [text.decode("utf-8", "surrogateescape") for text in listed.paths()]


def _inside(path: str) -> str:
    """The path, which is relative to the folder that it was kept for.

    Raises:
      ValueError: where it leads out of that folder, or no file can have it.
    """
    if path.startswith("/") or "\0" in path or (".." in path and ".." in path.split("/")):
        raise ValueError("a path leads out of its folder")
    path.encode("utf-8", "surrogateescape")
    return path
