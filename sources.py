"""Where images come from: embedded digits, TensorFlow Datasets and image folders, each split as a `Source`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from absl import logging

from errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
UNLABELLED = -1
OWN_LABEL = -2  # of an example that keeps the label it has


class Source(Protocol):
    """One split: examples are dicts of `record` (what `decode` takes) and `label` (int32, -1 where unlabelled).

    Attributes:
      examples: how many there are.
      classes: the classes' names; empty without labels.
      has_labels: whether any example has one.
    """

    @property
    def examples(self) -> int: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def has_labels(self) -> bool: ...

    def epoch(self, epoch: tf.Tensor, seed: int) -> tf.data.Dataset:
        """All examples once, in an order drawn from (seed, epoch)."""

    def ordered(self) -> tf.data.Dataset:
        """All examples once, in a fixed order."""

    def decode(self, record: tf.Tensor) -> tf.Tensor:
        """The image of a record, uint8 [H, W, 3]."""

    def index(self) -> tuple[list[str], np.ndarray]:
        """Every example's name, stable over machines, and label (int32), in the fixed order."""

    def with_labels(self, names: Iterable[str], only: bool) -> Source:
        """The same split with the labels of these examples alone; where `only`, without the others."""


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """A split whose records are at hand: images, encoded images, or paths.

    Attributes:
      records: [n] records, uint8 images or strings.
      labels: [n] int32, -1 where unlabelled.
      names: [n] stable names.
      classes: the classes' names.
      decode: from a record to a uint8 image [H, W, 3].
    """

    records: np.ndarray
    labels: np.ndarray
    names: list[str]
    classes: Sequence[str]
    decode: Callable[[tf.Tensor], tf.Tensor]

    @property
    def examples(self) -> int:
        return len(self.labels)

    @property
    def has_labels(self) -> bool:
        return bool((self.labels >= 0).any())

    @functools.cached_property
    def _tensors(self) -> tuple[tf.Variable, tf.Variable]:
        """Records and labels as variables: constants of more than 2 GB do not fit into a tf.data graph."""
        with tf.init_scope(), tf.device("CPU:0"):
            return tf.Variable(self.records, trainable=False), tf.Variable(self.labels, trainable=False)

    def _take(self, order: tf.Tensor) -> tf.data.Dataset:
        records, labels = self._tensors
        picked = tf.data.Dataset.from_tensor_slices(order)
        return picked.map(lambda i: {"record": tf.gather(records, i), "label": tf.gather(labels, i)})

    def epoch(self, epoch: tf.Tensor, seed: int) -> tf.data.Dataset:
        order_seed = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
        return self._take(tf.random.experimental.stateless_shuffle(tf.range(self.examples), order_seed))

    def ordered(self) -> tf.data.Dataset:
        return self._take(tf.range(self.examples))

    def index(self) -> tuple[list[str], np.ndarray]:
        return self.names, self.labels

    def with_labels(self, names: Iterable[str], only: bool) -> MemorySource:
        chosen = set(names)
        keep = np.array([name in chosen for name in self.names])
        labels = np.where(keep, self.labels, UNLABELLED).astype(np.int32)
        return self.take(np.flatnonzero(keep)) if only else dataclasses.replace(self, labels=labels)

    def take(self, indices: np.ndarray) -> MemorySource:
        """The examples at `indices` alone."""
        names = [self.names[i] for i in indices]
        return dataclasses.replace(self, records=self.records[indices], labels=self.labels[indices], names=names)


class TfdsSource:
    """A split of a TensorFlow dataset that is prepared on disk (or can be downloaded), read as a stream."""

    SHUFFLE_BUFFER = 16384  # encoded records; the files are shuffled too

    def __init__(self, name: str, split: str, data_dir: str) -> None:
        import tensorflow_datasets as tfds

        self._tfds, self._split = tfds, split
        try:
            self._builder = tfds.builder(name, data_dir=data_dir or None)
            self._builder.download_and_prepare()
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(f"--dataset={name}: neither digits, image_folder nor a TensorFlow dataset") from error
        except Exception as error:  # a download fails in as many ways as there are hosts
            where = data_dir or "TensorFlow Datasets' default folder"
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--dataset={name}: not prepared under --data_dir ({where}) and cannot be downloaded: {first_line}"
            ) from error
        features = self._builder.info.features
        self._image = _feature(features, tfds.features.Image)
        self._label = _feature(features, tfds.features.ClassLabel)
        self._file_name = "file_name" if "file_name" in features else None
        if not self._image:
            raise UserError(f"--dataset={name} has no images: choose another")
        self.classes = list(features[self._label].names) if self._label else []
        self.has_labels = self._label is not None
        sizes = {key: info.num_examples for key, info in self._builder.info.splits.items()}
        self.examples = sum(end - begin for _, begin, end in split_ranges(split, sizes))
        self._known_labels: tuple[list[str], list[int]] | None = None

    def _read(self, shuffle_seed: tf.Tensor | None = None) -> tf.data.Dataset:
        tfds = self._tfds
        dataset = self._builder.as_dataset(
            split=self._split, shuffle_files=shuffle_seed is not None,
            decoders={self._image: tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(
                shuffle_seed=shuffle_seed, shuffle_reshuffle_each_iteration=False, add_tfds_id=True,
                try_autocache=False, skip_prefetch=True, enable_ordering_guard=False,
            ),
        )  # fmt: skip
        table = None
        if self._known_labels is not None:
            names, labels = self._known_labels
            entries = tf.lookup.KeyValueTensorInitializer(tf.constant(names), tf.constant(labels, tf.int32))
            table = tf.lookup.StaticHashTable(entries, default_value=UNLABELLED)

        def example(features: dict) -> dict:
            label = tf.cast(features[self._label], tf.int32) if self._label else tf.constant(UNLABELLED)
            name = features[self._file_name or "tfds_id"]
            if table is not None:
                known = table.lookup(name)
                label = tf.where(known == OWN_LABEL, label, known)
            return {"record": features[self._image], "label": label, "name": name}

        return dataset.map(example)

    def epoch(self, epoch: tf.Tensor, seed: int) -> tf.data.Dataset:
        epoch_seed = tf.cast(epoch, tf.int64) * 1_000_003 + seed + 1
        stream = self._read(shuffle_seed=epoch_seed).map(_without_name)
        buffer = min(self.SHUFFLE_BUFFER, self.examples)
        return stream.shuffle(buffer, seed=epoch_seed, reshuffle_each_iteration=False)

    def ordered(self) -> tf.data.Dataset:
        return self._read().map(_without_name)

    def decode(self, record: tf.Tensor) -> tf.Tensor:
        return decode_image(record)

    def index(self) -> tuple[list[str], np.ndarray]:
        pairs = [(e["name"].decode(), e["label"]) for e in self._read().as_numpy_iterator()]
        return [name for name, _ in pairs], np.array([label for _, label in pairs], np.int32)

    def with_labels(self, names: Iterable[str], only: bool) -> Source:
        chosen = sorted(names)
        hidden = self._with(_known_labels=(chosen, [OWN_LABEL] * len(chosen)))
        return hidden.in_memory(only_labelled=True) if only else hidden

    def _with(self, **changes: Any) -> TfdsSource:
        """A copy with these attributes."""
        changed = copy.copy(self)
        changed.__dict__.update(changes)
        return changed

    def labelled_by(self, other: Source) -> TfdsSource:
        """The same images with the labels of those alone that are in `other` too, by file name.

        Raises:
          UserError: where the files of either have no names, or none is in both.
        """
        if not (isinstance(other, TfdsSource) and self._file_name and other._file_name and other.has_labels):
            raise UserError(
                "--labelled_dataset: it and --dataset must both name their images' files, and it its labels"
            )
        names, labels = other.index()
        labelled = self._with(_known_labels=(names, labels.tolist()), classes=other.classes, has_labels=True)
        if not list(labelled._read().filter(lambda example: example["label"] >= 0).take(1)):
            raise UserError("--labelled_dataset: none of its images is in --dataset, by file name")
        return labelled

    def in_memory(self, only_labelled: bool = False) -> MemorySource:
        """The same examples with their encoded images in memory; where `only_labelled`, without the unlabelled."""
        kept = self._read()
        if only_labelled:
            kept = kept.filter(lambda example: example["label"] >= 0)
        examples = list(kept.as_numpy_iterator())
        records = np.array([e["record"] for e in examples], object)
        labels = np.array([e["label"] for e in examples], np.int32)
        return MemorySource(records, labels, [e["name"].decode() for e in examples], self.classes, decode_image)


def _feature(features: Mapping, kind: type) -> str | None:
    """The key of the first feature of this kind."""
    return next((key for key, feature in features.items() if isinstance(feature, kind)), None)


def _without_name(example: dict) -> dict:
    return {"record": example["record"], "label": example["label"]}


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """An encoded JPEG, PNG, GIF (its first frame), BMP or WebP image as uint8 [H, W, 3]."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def _decode_file(path: tf.Tensor) -> tf.Tensor:
    return decode_image(tf.io.read_file(path))


def split_ranges(split: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The parts (name, begin, end) that a split such as `train[:80%]` or `train+test` means.

    Raises:
      UserError: where a split does not exist, is malformed or selects nothing.
    """
    import tensorflow_datasets as tfds

    try:
        infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0) for name, n in sizes.items()}
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"split {split}: no such split; there is {', '.join(sizes) or 'none'}") from error
    ranges = [(p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to) for p in parts]
    if not sum(end - begin for _, begin, end in ranges):
        raise UserError(f"split {split} selects no example; there is {', '.join(sizes)}")
    return ranges


def hash_order(names: Sequence[str], seed: int) -> list[int]:
    """The indices of `names` in an order drawn from `seed`, the same on every machine and for any listing order."""
    return sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}:{names[i]}".encode()).digest())


def digits(split: str) -> MemorySource:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels: `train` (1,437) and `test` (360)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.repeat((bunch.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)  # [1797, 8, 8, 3]
    names = [f"digits/{i}" for i in range(len(images))]
    order = hash_order(names, 0)
    parts = {"train": order[:1437], "test": order[1437:]}
    ranges = split_ranges(split, {key: len(part) for key, part in parts.items()})
    chosen = np.concatenate([parts[key][begin:end] for key, begin, end in ranges])
    classes = [str(name) for name in bunch.target_names]
    every = MemorySource(images, bunch.target.astype(np.int32), names, classes, lambda image: image)
    return every.take(chosen)


def image_folder(folder: str, split: str, classes: Sequence[str] | None = None) -> MemorySource:
    """A folder of images: `folder/<split>/<class>/*`, or without labels `folder/<split>/` at any depth.

    Args:
      folder: the folder with one subfolder a split.
      split: its name, or a slice of it such as `train[:80%]` (of the sorted files, shuffled by their names' hash).
      classes: the classes to number labels by; None: the subfolders, sorted.

    Raises:
      UserError: where the folder, the split or its images are missing, or a class is not among `classes`.
    """
    if not tf.io.gfile.isdir(folder):
        raise UserError(f"--data_dir={folder}: no such folder")
    splits = sorted(name.rstrip("/") for name in tf.io.gfile.listdir(folder))
    splits = [name for name in splits if tf.io.gfile.isdir(os.path.join(folder, name))]
    base = split.split("[")[0]
    if base not in splits:
        raise UserError(f"--data_dir={folder} has no split {base}; it has {', '.join(splits) or 'no subfolder'}")
    root = os.path.join(folder, base)
    names = sorted(_image_files(root))
    if not names:
        raise UserError(f"{root} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    labelled = all(name.count("/") == 1 for name in names)
    if not labelled and any(name.count("/") == 1 for name in names):
        logging.warning("%s: some images lie outside class folders, so all count as unlabelled", root)
    found = sorted({name.split("/")[0] for name in names}) if labelled else []
    classes = list(classes or found)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise UserError(f"{root} has the class {unknown[0]}, which training did not: {', '.join(classes)}")
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[name.split("/")[0]] if labelled else UNLABELLED for name in names]
    paths = np.array([os.path.join(root, name) for name in names], object)
    known = classes if labelled else []
    every = MemorySource(paths, np.array(labels, np.int32), names, known, _decode_file)
    if split == base:
        return every
    order = np.array(hash_order(names, 0))
    (_, begin, end), *_ = split_ranges(split, {base: len(names)})
    return every.take(order[begin:end])


def _image_files(root: str, below: str = "", seen: frozenset = frozenset()) -> list[str]:
    """The images under `root`, as paths relative to it; a link back to a folder above is not followed."""
    folder = os.path.join(root, below)
    real = os.path.realpath(folder)
    if real in seen:
        return []
    files = []
    for name in tf.io.gfile.listdir(folder):
        path = os.path.join(below, name.rstrip("/"))
        if name.startswith("."):
            continue
        if tf.io.gfile.isdir(os.path.join(root, path)):
            files += _image_files(root, path, seen | {real})
        elif name.lower().endswith(IMAGE_SUFFIXES):
            files.append(path)
    return files


def readable(source: MemorySource, max_corrupt_fraction: float) -> MemorySource:
    """The examples of `source` whose images decode; each of the others is named in the log.

    Raises:
      UserError: if more than `max_corrupt_fraction` of them do not decode.
    """

    def decoded(i: tf.Tensor, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return i, tf.reduce_max(source.decode(record))  # a value of the image, or the graph need not decode it

    tried = tf.data.Dataset.from_tensor_slices(tf.constant(source.records)).enumerate()
    tried = tried.map(decoded, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
    good = np.array(sorted(i for i, _ in tried.as_numpy_iterator()), np.int64)
    bad = sorted(set(range(source.examples)) - set(good.tolist()))
    for i in bad:
        logging.warning("skipped an image that cannot be read: %s", source.records[i])
    if len(bad) > max_corrupt_fraction * source.examples:
        raise UserError(
            f"{len(bad)} of {source.examples} images cannot be read, the first is {source.records[bad[0]]}: "
            f"mend them or raise --max_corrupt_fraction={max_corrupt_fraction}"
        )
    if bad:
        logging.warning("%d of %d images were skipped", len(bad), source.examples)
    return source.take(good) if bad else source
