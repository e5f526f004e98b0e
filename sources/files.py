"""Images in files: find them, read them, try again where a disk fails, and leave out the images that do not decode.

A path is text here. Where the bytes of a file's name are not UTF-8, the text holds each such byte as a surrogate
(Python's `surrogateescape`): `path_bytes` gives the bytes to open, `printable` the text for people and for JSON.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import tensorflow as tf

from errors import UserError, reason
from sources.base import MemorySource, decode_image, warn_once

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
PAUSES = (0.5, 1.0, 2.0)  # seconds before each further try to read
# Threads that read. They are more than the cores, because a thread mostly waits.
THREADS = 16
# Files handed to the threads at a time.
AT_ONCE = 4096

Result = TypeVar("Result")


class FileSource(MemorySource):
    """A split whose records are the paths of image files, as bytes."""

    def in_memory(self) -> MemorySource:
        """The same examples with the files' content in memory."""
        encoded = list(_of_each(lambda path: read_file(path).numpy(), self.records))
        return MemorySource(
            np.array(encoded, object), self.labels, self.names, self.classes, decode_image, self.fingerprint
        )


def file_source(paths: Sequence[str], labels: Sequence[int], names: list[str], classes: Sequence[str]) -> FileSource:
    """The images in the files at `paths` [n], with their `labels` [n], -1 where unlabelled, and `names` [n]."""
    records = np.array([path_bytes(path) for path in paths], object)
    return FileSource(records, np.array(labels, np.int32), names, classes, decode_file)


def path_bytes(path: str) -> bytes:
    """The bytes of a path."""
    return path.encode("utf-8", "surrogateescape")


def printable(path: str | bytes) -> str:
    """A path as text that can be printed: a byte that is not UTF-8 becomes an escape such as `\\xe4`."""
    if isinstance(path, str):
        path = path_bytes(path)
    return path.decode("utf-8", "backslashreplace")


def decode_file(path: tf.Tensor) -> tf.Tensor:
    """The image in the file at `path`, uint8 [H, W, 3].

    The file is read once. This runs inside tf.data, which has no way to wait and try again, so one failed read ends a
    training run; the same command then goes on from the newest checkpoint.
    """
    return decode_image(tf.io.read_file(path))


def read_file(path: bytes) -> tf.Tensor:
    """The content of a file. Where reading fails, it is tried again.

    Raises:
      UserError: where reading keeps failing: no such file, no permission, a disk or a network that fails.
    """
    return _tried(lambda: tf.io.read_file(path), path)


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

    Raises:
      UserError: where a folder cannot be read.
    """
    return sorted(_images_below(root, "", frozenset()))


def _images_below(root: str, below: str, above: frozenset[str]) -> list[str]:
    """The images in the folder `below`. A link back to one of the folders `above` is not followed."""
    folder = os.path.join(root, below)
    real = os.path.realpath(folder)
    if real in above:
        return []
    files = []
    for name in names_in(folder):
        path = os.path.join(below, name)
        if name.startswith("."):
            continue
        if is_folder(os.path.join(root, path)):
            files += _images_below(root, path, above | {real})
        elif name.lower().endswith(IMAGE_SUFFIXES):
            files.append(path)
    return files


def without_undecodable(source: FileSource, max_corrupt_fraction: float) -> FileSource:
    """The examples of `source` whose images decode. Each of the others is named in the log, with the reason.

    An image is left out only where its content is bad. A file that cannot be read stops the run instead, so that all
    workers that see the same files keep the same examples.

    Raises:
      UserError: where a file cannot be read, or more than `max_corrupt_fraction` of the images do not decode.
    """
    faults = list(_of_each(_fault_of, source.records))
    bad = [i for i, fault in enumerate(faults) if fault]
    for i in bad:
        warn_once(f"skipped an image that cannot be read: {printable(source.records[i])}: {faults[i]}")
    if len(bad) > max_corrupt_fraction * source.examples:
        raise UserError(
            f"{len(bad)} of {source.examples} images cannot be read, the first is {printable(source.records[bad[0]])} "
            f"({faults[bad[0]]}): repair or remove them, or raise --max_corrupt_fraction={max_corrupt_fraction}"
        )
    if not bad:
        return source
    warn_once(f"{len(bad)} of {source.examples} images were skipped, the first is {printable(source.records[bad[0]])}")
    return source.take(np.array([i for i, fault in enumerate(faults) if not fault], np.int64))


def _fault_of(path: bytes) -> str:
    """Why the content of a file is not an image; empty where it is one."""
    encoded = read_file(path)
    try:
        decode_image(encoded)
    except tf.errors.InvalidArgumentError as error:
        return reason(error)
    except tf.errors.OpError as error:
        raise UserError(f"{printable(path)} cannot be decoded: {reason(error)}") from error
    return ""


def _of_each(function: Callable[[bytes], Result], paths: np.ndarray) -> Iterator[Result]:
    """`function` of every path, in order, computed in several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(paths), AT_ONCE):
            yield from pool.map(function, paths[start : start + AT_ONCE])


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
        why = reason(error)
        named = printable(path)
        raise UserError(f"{named} cannot be read, tried {len(PAUSES) + 1} times: {_without(named, why)}") from error


def _without(path: str, message: str) -> str:
    """The message without the path it may begin with, as TensorFlow's do."""
    return message.removeprefix(f"{path}; ")
