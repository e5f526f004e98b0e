"""What a source of images is, and what all kinds of sources share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, Self

import numpy as np
import tensorflow as tf
from absl import logging

from errors import UserError

UNLABELLED = -1  # the label of an example that has none


class Source(Protocol):
    """One split: examples are dicts of `record` (what `decode` takes) and `label` (int32, -1 where unlabelled).

    Attributes:
      examples: how many there are.
      classes: the classes' names; empty without labels.
      has_labels: whether any example has one.
      fingerprint: a text that no other split has. It stays the same when labels are hidden, and when the split is
        read into memory.
    """

    @property
    def examples(self) -> int: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def has_labels(self) -> bool: ...

    @property
    def fingerprint(self) -> str: ...

    def epoch(self, epoch: tf.Tensor, seed: int) -> tf.data.Dataset:
        """All examples once, in an order drawn from (seed, epoch)."""

    def ordered(self) -> tf.data.Dataset:
        """All examples once, in a fixed order."""

    def decode(self, record: tf.Tensor) -> tf.Tensor:
        """The image of a record, uint8 [H, W, 3]."""

    def index(self) -> tuple[list[str], np.ndarray]:
        """Every example's name, stable over machines, and label (int32), in the fixed order."""

    def with_labels(self, names: Iterable[str], only: bool) -> Source:
        """The same split with labels for these examples only. Where `only`, the other examples are left out."""

    def in_memory(self) -> MemorySource:
        """The same examples with their records in memory; no file is read again."""


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """A split whose records are in memory: images, encoded images, or paths.

    Attributes:
      records: [n] records, uint8 images or strings.
      labels: [n] int32, -1 where unlabelled.
      names: [n] stable names.
      classes: the classes' names.
      decode: from a record to a uint8 image [H, W, 3].
      made_from: the fingerprint of the split that this one was made from by hiding labels or reading its files;
        empty where this is a split as it was found.
      answers: [n, classes] float32, the probabilities that a student learns from each example; None where there are
        none.
    """

    records: np.ndarray
    labels: np.ndarray
    names: list[str]
    classes: Sequence[str]
    decode: Callable[[tf.Tensor], tf.Tensor]
    made_from: str = ""
    answers: np.ndarray | None = None
    _variables: dict[str, dict[str, tf.Variable]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def examples(self) -> int:
        return len(self.labels)

    @property
    def has_labels(self) -> bool:
        return bool((self.labels >= 0).any())

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all names and labels, in their order."""
        if self.made_from:
            return self.made_from
        digest = hashlib.sha256()
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            digest.update(f"{name}\0{label}\0".encode())
        return digest.hexdigest()

    def _on_this_host(self) -> dict[str, tf.Variable]:
        """What an example consists of, as variables in the memory of the host whose pipeline is being made.

        They are variables because constants of more than 2 GB do not fit into a tf.data graph. A strategy over many
        hosts makes the pipeline of each host under that host's device. Each host gets its own variables, because its
        pipeline would otherwise fetch every record from another host.
        """
        columns = {"record": self.records, "label": self.labels}
        if self.answers is not None:
            columns["answer"] = self.answers
        with tf.init_scope(), tf.device("CPU:0"):
            host = tf.zeros([]).device
            if host not in self._variables:
                self._variables[host] = {name: tf.Variable(values, trainable=False) for name, values in columns.items()}
        return self._variables[host]

    def _in_order(self, indices: tf.Tensor) -> tf.data.Dataset:
        """The examples at `indices` [m]."""
        columns = self._on_this_host()
        picked = tf.data.Dataset.from_tensor_slices(indices)
        return picked.map(lambda i: {name: tf.gather(values, i) for name, values in columns.items()})

    def epoch(self, epoch: tf.Tensor, seed: int) -> tf.data.Dataset:
        order_seed = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
        return self._in_order(tf.random.experimental.stateless_shuffle(tf.range(self.examples), order_seed))

    def ordered(self) -> tf.data.Dataset:
        return self._in_order(tf.range(self.examples))

    def index(self) -> tuple[list[str], np.ndarray]:
        return self.names, self.labels

    def with_labels(self, names: Iterable[str], only: bool) -> Self:
        chosen = set(names)
        keep = np.array([name in chosen for name in self.names])
        if only:
            return dataclasses.replace(self.take(np.flatnonzero(keep)), made_from=self.fingerprint)
        labels = np.where(keep, self.labels, UNLABELLED).astype(np.int32)
        return dataclasses.replace(self, labels=labels, made_from=self.fingerprint)

    def in_memory(self) -> MemorySource:
        return self

    def with_answers(self, answers: np.ndarray) -> Self:
        """The same split with `answers` [n, classes] for a student to learn."""
        return dataclasses.replace(self, answers=answers.astype(np.float32), made_from=self.fingerprint)

    def take(self, indices: np.ndarray) -> Self:
        """Only the examples at `indices`, as a split of its own."""
        names = [self.names[i] for i in indices]
        answers = None if self.answers is None else self.answers[indices]
        return dataclasses.replace(
            self, records=self.records[indices], labels=self.labels[indices], names=names, answers=answers, made_from=""
        )


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """An encoded JPEG, PNG, GIF (its first frame), BMP or WebP image as uint8 [H, W, 3]."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def split_ranges(split: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The parts (name, begin, end) of a split such as `train[:80%]` or `train+test`.

    Args:
      split: what to take, in the language of TensorFlow Datasets.
      sizes: the examples in each split that exists.

    Raises:
      UserError: where a split does not exist, is malformed or selects nothing.
    """
    if sizes.get(split):
        return [(split, 0, sizes[split])]  # A whole split needs no parsing, nor the seconds of the import below.
    import tensorflow_datasets

    core = tensorflow_datasets.core
    try:
        infos = {name: core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0) for name, size in sizes.items()}
        parts = core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"split {split}: no such split; there is {', '.join(sizes) or 'none'}") from error
    ranges = []
    for part in parts:
        begin = part.from_ or 0
        end = sizes[part.splitname] if part.to is None else part.to
        ranges.append((part.splitname, begin, end))
    if not any(end > begin for _, begin, end in ranges):
        raise UserError(f"split {split} selects no example; there is {', '.join(sizes)}")
    return ranges


def hash_order(names: Sequence[str], seed: int) -> list[int]:
    """The indices of `names` in an order drawn from `seed`, the same on every machine and for any listing order."""
    return sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}:{names[i]}".encode()).digest())


def some_of(names: Sequence[str], limit: int = 5) -> str:
    """The first of `names`, for a message. Where some are left out, the text says how many there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning. A run opens a split more than once, so the same warning is logged once in a process."""
    logging.warning("%s", message)
