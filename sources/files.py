"""Images in files: find them, and read them; try again where a disk fails, and do without the images that are damaged.

A path is text here. Where the bytes of a file's name are not UTF-8, the text holds each such byte as a surrogate
(Python's `surrogateescape`): `path_bytes` gives the bytes to open, `printable` the text for people and for JSON.

No image is opened before it is needed. The stream of a `FileSource` is fast and stops at an image that it cannot read;
`data.patient_batches` then goes on with `read_carefully`, in which every image has a second way to be read: by
hand, in Python. An image that cannot be read even so is replaced by the next one in the fixed order that can be read,
so that the stream is the same in every worker and whenever a run goes on. The host of a remote TPU runs no Python:
there TensorFlow alone decodes, and an image that it cannot read stops the run.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import numpy as np
import tensorflow as tf

import sources.kinds as kinds
import sources.manifest as manifest
from errors import UserError, reason
from sources.base import (
    UNLABELLED,
    ListedSource,
    MemorySource,
    decode_image,
    is_sent_away,
    runs_python_there,
    some_of,
    warn_once,
)
from sources.file_list import FileList

PAUSES = (0.5, 1.0, 2.0)  # seconds before each further try to read
# Threads that read. They are more than the cores, because a thread mostly waits.
THREADS = 16
# Files handed to the threads at a time.
AT_ONCE = 4096

Result = TypeVar("Result")


class Troubles:
    """The images of a split that cannot be read, and whether its images are read carefully because of them.

    Args:
      root: the folder of the split.
      files: its images. Of those, the ones that were unreadable before and have not changed are known from the start.
      max_corrupt: the share of them that may be unreadable.

    Attributes:
      reasons: why an image cannot be read, by its path below `root`, in the order in which they were found.
      careful: whether every image has a second way to be read.

    Raises:
      UserError: where more images than `max_corrupt` are known to be unreadable.
    """

    def __init__(self, root: str, files: FileList, max_corrupt: float) -> None:
        self._root, self._examples, self._max_corrupt = root, files.count, max_corrupt
        before = {} if "://" in root else manifest.read_unreadable(root)
        listed = map(path_text, files.paths()) if before else ()
        self.reasons = {path: before[path] for path in listed if path in before}
        self.careful = False
        self._lock = threading.Lock()
        if self.reasons:
            named = some_of([printable(os.path.join(root, path)) for path in self.reasons])
            warn_once(f"{len(self.reasons)} of {files.count} images are known to be unreadable: {named}")
        self._check()

    def add(self, path: str, error: kinds.Unreadable) -> None:
        """Notes an image that cannot be read. It is named once in the log.

        Raises:
          UserError: where too many images are unreadable now.
        """
        with self._lock:
            is_new = path not in self.reasons
            self.reasons.setdefault(path, str(error))
        if is_new:
            warn_once(f"an image cannot be read: {printable(os.path.join(self._root, path))}: {error}")
            if not isinstance(error, kinds.TooLarge):  # The limit may be another one next time.
                manifest.keep_unreadable(self._root, path, str(error))
        self._check()

    def _check(self) -> None:
        if len(self.reasons) <= self._max_corrupt * self._examples:
            return
        first, why = next(iter(self.reasons.items()))
        raise UserError(
            f"{len(self.reasons)} of {self._examples} images cannot be read, the first is "
            f"{printable(os.path.join(self._root, first))} ({why}): repair or remove them, or raise "
            f"--max_corrupt_fraction={self._max_corrupt}"
        )


@dataclasses.dataclass(frozen=True)
class FileSource(ListedSource):
    """A split whose images are files below one folder. The record of an example is its number.

    Attributes:
      root: the folder.
      files: the paths of the images, relative to it.
      labels, classes, made_from, answers: as for every `ListedSource`.
      troubles: what is known of unreadable images. The splits that are made from this one share it.
      max_pixels: an image with more pixels counts as unreadable.
    """

    root: str
    files: FileList
    labels: np.ndarray
    classes: Sequence[str]
    troubles: Troubles
    max_pixels: int = kinds.MAX_PIXELS
    made_from: str = ""
    answers: np.ndarray | None = None
    _variables: dict[str, dict[str, tf.Variable]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    # The numbers of the images of this split that are known to be unreadable, in the order in which they were found.
    _unreadable: dict[int, str] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    # How many of them each class has.
    _lost: Counter[int] = dataclasses.field(default_factory=Counter, init=False, repr=False, compare=False)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.troubles.reasons:
            for number, path in enumerate(self.files.paths()):
                why = self.troubles.reasons.get(path_text(path))
                if why is not None:
                    self._mark(number, why)

    @property
    def names(self) -> list[str]:
        """[n] the images' paths below the folder, as text that can be printed. It is made anew each time."""
        return [printable(path) for path in self.files.paths()]

    def index(self) -> tuple[list[str], np.ndarray]:
        """Every example's name and label, in the fixed order."""
        return self.names, self.labels

    def path(self, number: int) -> bytes:
        """The path of an image."""
        return os.path.join(path_bytes(self.root), self.files.path(number))

    def unreadable(self) -> dict[int, str]:
        """The numbers of the images that are known so far to be unreadable, with the reasons."""
        with self._lock:
            return dict(self._unreadable)

    def take(self, indices: np.ndarray) -> Self:
        """Only the examples at `indices`, as a split of its own."""
        answers = None if self.answers is None else self.answers[indices]
        return self._with(files=self.files.take(indices), labels=self.labels[indices], answers=answers, made_from="")

    def record(self, i: int) -> tf.Tensor:
        """The record of example `i`."""
        return tf.constant(i, tf.int64)

    def _columns(self) -> dict[str, np.ndarray | bytes]:
        known = np.zeros(self.examples, bool)
        known[list(self.unreadable())] = True
        return {"files": self.files.content.tobytes(), "begins": self.files.begins, "known_unreadable": known}

    def _record(self, columns: Mapping[str, tf.Tensor], i: tf.Tensor) -> tf.Tensor:
        return tf.cast(i, tf.int64)

    def _path(self, number: tf.Tensor) -> tf.Tensor:
        """The path of an image, a string, in a graph."""
        columns = self._on_this_host()
        begin, end = tf.unstack(tf.gather(columns["begins"], tf.stack([number, number + 1])))
        root = os.path.join(path_bytes(self.root), b"")
        return root + tf.strings.substr(columns["files"], begin, end - begin)

    def _content(self, number: tf.Tensor) -> tf.Tensor:
        """The content of the file of an image, a string."""
        return tf.io.read_file(self._path(number))

    def decode(self, record: tf.Tensor) -> tf.Tensor:
        """The image with this number, uint8 [H, W, 3]. An error where it cannot be read."""
        return decode_content(self._content(record), self.max_pixels)

    def with_image(self, example: dict, replace: bool) -> dict:
        """The example with its image, as every `Source` says."""
        number = example["record"]
        rest = {name: value for name, value in example.items() if name not in ("record", "label", "answer")}
        if is_sent_away():
            image = kinds.decode_elsewhere(self._content(number), self.max_pixels, self._path(number))
            used, readable = number, tf.constant(True)
        elif self.troubles.careful and runs_python_there():
            image, used, readable = self._with_second_way(number, replace)
        else:
            image, used, readable = self._first_way(number, replace)
        return {**rest, **self._labels_of(used), "image": image, "readable": readable}

    def read_carefully(self) -> bool:
        """Gives every image a second way to be read, as every `Source` says."""
        changed = not self.troubles.careful and runs_python_there()
        self.troubles.careful = True
        return changed

    def _first_way(self, number: tf.Tensor, replace: bool) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """An image, the number of the example that it is, and whether it is readable. An error where reading fails."""
        encoded = self._content(number)
        if not runs_python_there():
            return decode_image(encoded), number, tf.constant(True)
        known = tf.gather(self._on_this_host()["known_unreadable"], number)
        return tf.cond(
            kinds.is_plain(encoded, self.max_pixels) & ~known,
            lambda: (decode_image(encoded), number, tf.constant(True)),
            lambda: self._second_way(number, encoded, replace),
        )

    def _second_way(
        self, number: tf.Tensor, encoded: tf.Tensor, replace: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """As `_first_way`, by hand. Where `encoded` is empty, the file is read again."""

        def by_hand(number: np.int64, encoded: bytes | np.ndarray) -> tuple[np.ndarray, np.int64, np.bool_]:
            content = encoded if isinstance(encoded, bytes) else encoded.item()  # outside a graph it is an array []
            image, used = self._read(int(number), content, replace)
            if image is None:
                return np.zeros([1, 1, 3], np.uint8), number, np.bool_(False)
            return image, np.int64(used), np.bool_(True)

        image, used, readable = tf.numpy_function(by_hand, [number, encoded], [tf.uint8, tf.int64, tf.bool])
        image.set_shape([None, None, 3])
        used.set_shape([])
        readable.set_shape([])
        return image, used, readable

    def _with_second_way(self, number: tf.Tensor, replace: bool) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """As `_first_way`, and where that fails as `_second_way`.

        A graph has no way to catch an error but a dataset that ignores it: it is then empty, and the next one follows.
        """
        once = tf.data.Dataset.from_tensors(number)
        first = once.map(lambda number: self._first_way(number, replace)).ignore_errors()
        second = once.map(lambda number: self._second_way(number, tf.constant(b""), replace))
        return first.concatenate(second).take(1).get_single_element()

    def _read(self, number: int, encoded: bytes, replace: bool) -> tuple[np.ndarray | None, int]:
        """An image and its number: the one asked for, or where it cannot be read the next one that can.

        Without `replace` there is no next one, and the image is None.

        Raises:
          UserError: where a file cannot be read, or too many images are unreadable.
        """
        for i in itertools.chain(range(number, self.examples), range(number)) if replace else [number]:
            if i in self._unreadable:
                continue
            content = encoded if i == number and encoded else read_file(self.path(i))
            try:
                return kinds.decode_by_hand(content, self.max_pixels), i
            except kinds.Unreadable as error:
                self._note(i, error)
        if replace:
            raise UserError(f"none of the {self.examples} images in {printable(self.root)} can be read")
        return None, number

    def _note(self, number: int, error: kinds.Unreadable) -> None:
        """Notes that an image cannot be read.

        Raises:
          UserError: where these are too many now.
        """
        self.troubles.add(path_text(self.files.path(number)), error)
        self._mark(number, str(error))

    def _mark(self, number: int, why: str) -> None:
        """Remembers that an image cannot be read. A class of which none is left is named."""
        label = int(self.labels[number])
        with self._lock:
            if number in self._unreadable:
                return
            self._unreadable[number] = why
            self._lost[label] += 1
            lost = self._lost[label]
        if label != UNLABELLED and lost == self._class_sizes[label]:
            name = self.classes[label] if len(self.classes) else label
            warn_once(f"class {name}: none of its {lost} images in {printable(self.root)} can be read")

    @functools.cached_property
    def _class_sizes(self) -> np.ndarray:
        """How many images each class has."""
        return np.bincount(self.labels[self.labels != UNLABELLED])

    def without_labels_of_unreadable(self, numbers: Iterable[int]) -> Self:
        """The same split, in which those of these images that cannot be read have no label.

        Raises:
          UserError: where a file cannot be read, or too many images are unreadable.
        """
        listed = list(numbers)
        found = _of_each(lambda number: self._read(number, b"", replace=False)[0] is None, listed)
        bad = [number for number, is_bad in zip(listed, found, strict=True) if is_bad]
        labels = self.labels.copy()
        labels[bad] = UNLABELLED
        return self._with(labels=labels, made_from=self.fingerprint) if bad else self

    def in_memory(self) -> MemorySource:
        """The same examples with the files' content in memory. Each image is decoded once, to replace those that fail.

        Raises:
          UserError: where a file cannot be read, or too many images are unreadable.
        """

        def content(number: int) -> tuple[bytes, int]:
            encoded = read_file(self.path(number))
            _, used = self._read(number, encoded, replace=True)
            return (encoded if used == number else read_file(self.path(used))), used

        encoded, used = zip(*_of_each(content, range(self.examples)), strict=True)
        labels = self.labels[list(used)]
        answers = None if self.answers is None else self.answers[list(used)]
        max_pixels = self.max_pixels
        return MemorySource(
            np.array(encoded, object), labels, self.names, self.classes,
            lambda content: decode_content(content, max_pixels), self.fingerprint, answers,
        )  # fmt: skip


def file_source(
    root: str,
    files: Iterable[str],
    labels: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    max_corrupt: float | None = None,
    max_pixels: int = kinds.MAX_PIXELS,
) -> FileSource:
    """The images at `files` [n], paths below the folder `root`, with their `labels` [n], -1 where unlabelled."""
    listed = FileList.of(path_bytes(file) for file in files)
    limit = 1.0 if max_corrupt is None else max_corrupt
    troubles = Troubles(root, listed, limit)
    return FileSource(root, listed, np.array(labels, np.int32), classes, troubles, max_pixels)


def decode_content(encoded: tf.Tensor, max_pixels: int = kinds.MAX_PIXELS) -> tf.Tensor:
    """The image in the content of a file, uint8 [H, W, 3], as a person sees it. An error where it cannot be read."""

    def by_hand(encoded: bytes | np.ndarray) -> np.ndarray:
        content = encoded if isinstance(encoded, bytes) else encoded.item()  # outside a graph it is an array []
        try:
            return kinds.decode_by_hand(content, max_pixels)
        except kinds.Unreadable as error:
            raise tf.errors.InvalidArgumentError(None, None, str(error)) from error

    if is_sent_away():
        return kinds.decode_elsewhere(encoded, max_pixels, tf.constant("an image in memory"))
    if not runs_python_there():
        return decode_image(encoded)
    image = tf.cond(
        kinds.is_plain(encoded, max_pixels),
        lambda: decode_image(encoded),
        lambda: tf.numpy_function(by_hand, [encoded], tf.uint8),
    )
    image.set_shape([None, None, 3])
    return image


def path_text(path: bytes) -> str:
    """The text of a path."""
    return path.decode("utf-8", "surrogateescape")


def path_bytes(path: str) -> bytes:
    """The bytes of a path."""
    return path.encode("utf-8", "surrogateescape")


def printable(path: str | bytes) -> str:
    """A path as text that can be printed: a byte that is not UTF-8 becomes an escape such as `\\xe4`."""
    if isinstance(path, str):
        path = path_bytes(path)
    return path.decode("utf-8", "backslashreplace")


def read_file(path: bytes) -> bytes:
    """The content of a file. Where reading fails, it is tried again.

    Raises:
      UserError: where reading keeps failing: no such file, no permission, a disk or a network that fails.
    """
    return _tried(lambda: tf.io.read_file(path).numpy(), path)


def is_folder(path: str) -> bool:
    """Whether `path` is a folder. A path that does not exist is not one.

    Raises:
      UserError: where the path cannot be looked at.
    """

    def looked_at() -> bool:
        try:
            path.encode()
        except UnicodeEncodeError:  # TensorFlow takes only UTF-8; other names occur only in local folders
            return os.path.isdir(path_bytes(path))
        try:
            return tf.io.gfile.stat(path).is_directory
        except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError):  # no such path, or below a file
            return False

    return _tried(looked_at, path)


def names_in(folder: str) -> list[str]:
    """The names of the files and folders in `folder`.

    Raises:
      UserError: where it cannot be read.
    """

    def listed() -> list[str]:
        try:
            return [name.rstrip("/") for name in tf.io.gfile.listdir(path_bytes(folder))]
        except UnicodeDecodeError:  # TensorFlow lists only UTF-8; other names occur only in local folders
            return [name.decode("utf-8", "surrogateescape") for name in os.listdir(path_bytes(folder))]

    return _tried(listed, folder)


def find_images(root: str) -> list[str]:
    """The images under `root` at any depth, as sorted paths relative to it; hidden files and folders do not count.

    Files are told by the ends of their names alone. The list is kept for the next start (`manifest.py`). The log names
    folders in `root` that hold no image, since a class may be missing.

    Raises:
      UserError: where a folder cannot be read.
    """
    is_local = "://" not in root
    listing = manifest.read_listing(root, kinds.SUFFIXES) if is_local else None
    if listing is None:
        listing = _listed(root)
        if is_local:
            manifest.keep_listing(root, kinds.SUFFIXES, listing)
    if listing.others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(listing.others.items()))
        warn_once(
            f"{printable(root)}: left out files of kinds that are not read: {counts}; convert them to JPEG or PNG"
        )
    with_images = {file.split("/", 1)[0] for file in listing.files}
    empty = sorted(name for name in listing.folders if name and "/" not in name and name not in with_images)
    if empty and listing.files:
        warn_once(f"{printable(root)}: no image in its folders {some_of([printable(name) for name in empty])}")
    return listing.files


def _listed(root: str) -> manifest.Listing:
    """The images under `root`, looked for."""
    listing = manifest.Listing([], {}, {})
    others: Counter[str] = Counter()
    _look_below(root, "", frozenset(), listing, others)
    listing.files.sort()
    return listing._replace(others=dict(others))


def _look_below(root: str, below: str, above: frozenset[str], listing: manifest.Listing, others: Counter[str]) -> None:
    """Adds the images in the folder `below` to `listing`. A link back to one of the folders `above` is not followed."""
    folder = os.path.join(root, below)
    real = os.path.realpath(folder)
    if real in above:
        return
    state, entries = _tried(lambda: _entries(folder), folder)
    listing.folders[below] = state
    for name, is_folder_too in entries:
        if name.startswith("."):
            continue
        path = os.path.join(below, name)
        if is_folder_too:
            _look_below(root, path, above | {real}, listing, others)
        elif name.lower().endswith(kinds.SUFFIXES):
            listing.files.append(path)
        elif name.lower().endswith(kinds.OTHER_SUFFIXES):
            others[os.path.splitext(name)[1].lower()] += 1


def _entries(folder: str) -> tuple[manifest.State, list[tuple[str, bool]]]:
    """The state of a folder, and the names in it, each with whether it is a folder.

    Raises:
      OSError, tf.errors.OpError, UserError: where it cannot be read.
    """
    if "://" in folder:
        return (0, 0), [(name, is_folder(os.path.join(folder, name))) for name in names_in(folder)]
    # What changes while it is listed must be found next time: so the state is that of before.
    state = manifest.state_of_folder(folder)
    with os.scandir(folder) as entries:
        return state, [(entry.name, _leads_to(entry.is_dir)) for entry in entries if not _is_special(entry)]


def _is_special(entry: os.DirEntry) -> bool:
    """Whether it is a pipe, a socket or a device, or a link to one: to read it may take for ever."""
    return not (_leads_to(entry.is_file) or _leads_to(entry.is_dir)) and os.path.exists(entry.path)


def _leads_to(is_kind: Callable[[], bool]) -> bool:
    """What `is_file` or `is_dir` of an entry says. A link that leads back to itself leads to neither.

    Raises:
      OSError: where another link cannot be followed.
    """
    try:
        return is_kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _of_each(function: Callable[[int], Result], numbers: Sequence[int]) -> Iterator[Result]:
    """`function` of every number, in order, computed in several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(numbers), AT_ONCE):
            yield from pool.map(function, numbers[start : start + AT_ONCE])


def _tried(action: Callable[[], Result], path: str | bytes) -> Result:
    """What `action` returns. `action` reads `path`; where it fails, it is called again after each of `PAUSES`.

    Raises:
      UserError: where it fails every time. The message names the path.
    """
    for pause in PAUSES:
        try:
            return action()
        except (tf.errors.OpError, OSError):
            time.sleep(pause)
    try:
        return action()
    except (tf.errors.OpError, OSError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        named = printable(path)
        raise UserError(f"{named} cannot be read, tried {len(PAUSES) + 1} times: {_without(named, why)}") from error


def _without(path: str, message: str) -> str:
    """The message without the path it may begin with, as TensorFlow's do."""
    return message.removeprefix(f"{path}; ")
