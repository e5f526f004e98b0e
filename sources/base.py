"""What a source of images is, and what all kinds of sources share."""

from __future__ import annotations

import abc
import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.python.eager import context

from errors import UserError, did_you_mean, one_line
from sources.share import Share
from sources.stripes import Stripes
from sources.windows import Windows

UNLABELLED = -1  # the label of an example that has none
AT_ONCE = 4096  # names that are made into one text at a time
SENT_BYTES = 1_000_000_000  # A graph must stay below 2 GB.
_sent_away = contextvars.ContextVar("sent_away", default=False)


class NoSuchSplit(UserError):
    """A split that does not exist.

    Args:
      split: its name, or its expression such as `train[:80%]`.
      why: what is wrong with it, and what there is.
    """

    def __init__(self, split: str, why: str) -> None:
        super().__init__(f"split {split}: {why}")
        self.split, self.why = split, why


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

    def epoch(self, epoch: tf.Tensor, seed: int, first: tf.Tensor | int = 0) -> tf.data.Dataset:
        """All examples once, in an order drawn from (seed, epoch), from place `first` of that order on."""

    def stream(self, seed: int, first_step: int, share: Share) -> tf.data.Dataset:
        """What a worker trains on, without an end: the examples of its share of every batch from a step on.

        Each comes with its position in the stream of all examples, in which epoch follows epoch. Together, the shares
        of all workers are the same examples in the same order, however many workers there are.
        """

    def ordered(self) -> tf.data.Dataset:
        """All examples once, in a fixed order."""

    def decode(self, record: tf.Tensor) -> tf.Tensor:
        """The image of a record, uint8 [H, W, 3]."""

    def with_image(self, example: dict, replace: bool) -> dict:
        """An example with its `image`, uint8 [H, W, 3], and `readable`, a bool. `record` may be missing in it.

        Where an image cannot be read and `replace`, the example is another one, always the same. Without `replace` it
        has a black image, and `readable` is False.
        """

    def read_carefully(self) -> bool:
        """Makes `with_image` ready for images that cannot be read, which takes time; call it where one has failed.

        It holds for the datasets that are made from then on. Returns whether anything has changed.
        """

    def index(self) -> tuple[list[str], np.ndarray]:
        """Every example's name, stable over machines, and label (int32), in the fixed order."""

    def with_labels(self, names: Iterable[str], only: bool) -> Source:
        """The same split with labels for these examples only. Where `only`, the other examples are left out."""

    def in_memory(self) -> MemorySource:
        """The same examples with their records in memory; no file is read again."""


class ListedSource(abc.ABC):
    """A split whose names and labels are all known at once. Each kind says what its records are.

    Attributes:
      labels: [n] int32, -1 where unlabelled.
      classes: the classes' names.
      made_from: the fingerprint of the split that this one was made from by hiding labels or reading its files;
        empty where this is a split as it was found.
      answers: [n, classes] float32, the probabilities that a student learns from each example; None where there are
        none.
    """

    labels: np.ndarray
    classes: Sequence[str]
    made_from: str
    answers: np.ndarray | None
    _variables: dict[str, dict[str, tf.Variable]]

    @abc.abstractmethod
    def index(self) -> tuple[list[str], np.ndarray]:
        """Every example's name and label, in the fixed order."""

    @abc.abstractmethod
    def take(self, indices: np.ndarray) -> Self:
        """Only the examples at `indices`, as a split of its own."""

    @abc.abstractmethod
    def record(self, i: int) -> tf.Tensor:
        """The record of example `i`."""

    @abc.abstractmethod
    def _columns(self) -> dict[str, np.ndarray | bytes]:
        """What an example is made of, as arrays over all examples."""

    @abc.abstractmethod
    def _record(self, columns: Mapping[str, tf.Tensor], i: tf.Tensor) -> tf.Tensor:
        """The record of example `i`, in a graph."""

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
        names, labels = self.index()
        for start in range(0, len(names), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            pairs = zip(names[part], labels[part].tolist(), strict=True)
            digest.update("".join(f"{name}\0{label}\0" for name, label in pairs).encode())
        return digest.hexdigest()

    def _on_this_host(self) -> dict[str, tf.Variable]:
        """What an example consists of, as variables in the memory of the host whose pipeline is being made.

        They are variables because constants of more than 2 GB do not fit into a tf.data graph. A strategy over many
        hosts makes the pipeline of each host under that host's device. Each host gets its own variables, because its
        pipeline would otherwise fetch every record from another host.
        """
        if is_sent_away():
            return self._sent_columns
        host = host_of_pipeline()
        with tf.init_scope(), tf.device("CPU:0"):
            if host not in self._variables:
                columns = self._all_columns()
                self._variables[host] = {name: tf.Variable(values, trainable=False) for name, values in columns.items()}
        return self._variables[host]

    def _all_columns(self) -> dict[str, np.ndarray | bytes]:
        """What an example consists of, its label and answer included."""
        answers = {} if self.answers is None else {"answer": self.answers}
        return {"label": self.labels, **self._columns(), **answers}

    @functools.cached_property
    def _sent_columns(self) -> dict[str, tf.Tensor]:
        """What an example consists of, as constants: another process has no variable of this one.

        Raises:
          UserError: where that is too much to send.
        """
        columns = self._all_columns()
        size = sum(_bytes_of(values) for values in columns.values())
        if size > SENT_BYTES:
            raise UserError(
                f"--data_service takes no images in memory beyond {SENT_BYTES:,} bytes, and these have {size:,}: leave "
                f"out --cache_dataset, or --data_service"
            )
        with tf.init_scope(), tf.device("CPU:0"):
            return {name: tf.constant(values) for name, values in columns.items()}

    def _labels_of(self, i: tf.Tensor) -> dict[str, tf.Tensor]:
        """The `label` of example `i` and, where there are answers, its `answer`."""
        columns = self._on_this_host()
        return {name: tf.gather(columns[name], i) for name in ("label", "answer") if name in columns}

    def _example(self, columns: Mapping[str, tf.Tensor], i: tf.Tensor) -> dict:
        """Example `i`, in a graph."""
        return {"record": self._record(columns, i), **self._labels_of(i)}

    def _in_order(self, indices: tf.Tensor) -> tf.data.Dataset:
        """The examples at `indices` [m]."""
        columns = self._on_this_host()
        return tf.data.Dataset.from_tensor_slices(indices).map(lambda i: self._example(columns, i))

    def epoch(self, epoch: tf.Tensor, seed: int, first: tf.Tensor | int = 0) -> tf.data.Dataset:
        """All examples once, in an order drawn from (seed, epoch), from place `first` of that order on."""
        return self._in_order(self._drawn_order(epoch, seed)[first:])

    def stream(self, seed: int, first_step: int, share: Share) -> tf.data.Dataset:
        """What a worker trains on, as every `Source` says. The examples of other workers are left out as numbers."""
        columns = self._on_this_host()
        first = first_step * share.batch

        def of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            begin = epoch * self.examples
            positions = tf.range(tf.maximum(begin, first), begin + self.examples)
            order = self._trained_order(epoch, seed)[tf.maximum(first - begin, 0) :]
            if not share.is_all:
                mine = share.has(positions)
                positions, order = tf.boolean_mask(positions, mine), tf.boolean_mask(order, mine)
            return tf.data.Dataset.from_tensor_slices((positions, order))

        epochs = tf.data.Dataset.range(first // self.examples, np.iinfo(np.int64).max)
        return epochs.flat_map(of_epoch).map(lambda position, i: (position, self._example(columns, i)))

    def _drawn_order(self, epoch: tf.Tensor, seed: int) -> tf.Tensor:
        """The numbers of all examples [n], in an order drawn from (seed, epoch)."""
        order_seed = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
        return tf.random.experimental.stateless_shuffle(tf.range(self.examples), order_seed)

    def _trained_order(self, epoch: tf.Tensor, seed: int) -> tf.Tensor:
        """The same in the order in which a run trains on them."""
        return self._drawn_order(epoch, seed)

    def ordered(self) -> tf.data.Dataset:
        """All examples once, in the fixed order."""
        return self._in_order(tf.range(self.examples))

    def with_labels(self, names: Iterable[str], only: bool) -> Self:
        """The same split with labels for these examples only. Where `only`, the other examples are left out."""
        chosen = set(names)
        keep = np.array([name in chosen for name in self.index()[0]], bool)
        if only:
            return self.take(np.flatnonzero(keep))._with(made_from=self.fingerprint)
        labels = np.where(keep, self.labels, UNLABELLED).astype(np.int32)
        return self._with(labels=labels, made_from=self.fingerprint)

    def with_answers(self, answers: np.ndarray) -> Self:
        """The same split with `answers` for a student to learn: logits [n, classes]."""
        return self._with(answers=answers.astype(np.float32), made_from=self.fingerprint)

    def _with(self, **changes: Any) -> Self:
        """A copy with these attributes."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _bytes_of(values: np.ndarray | bytes) -> int:
    """How many bytes some values have."""
    if isinstance(values, bytes):
        return len(values)
    return sum(map(len, values)) if values.dtype == object else values.nbytes


@contextlib.contextmanager
def sent_away() -> Iterator[None]:
    """Datasets that are made within it can be sent to another process: they hold no variable of this one."""
    before = _sent_away.set(True)
    try:
        yield
    finally:
        _sent_away.reset(before)


def is_sent_away() -> bool:
    """Whether a dataset that is made now is sent to another process."""
    return _sent_away.get()


def host_of_pipeline() -> str:
    """The device of the host on which a pipeline that is made now will run."""
    with tf.init_scope(), tf.device("CPU:0"):
        return tf.zeros([]).device


def runs_python_there() -> bool:
    """Whether a pipeline that is made now can call Python: it runs in this process, not on the host of a remote TPU."""
    return host_of_pipeline().startswith(context.context().host_address_space())


class NeverFails:
    """How images are read where reading cannot fail: they are in memory, or another library has made sure of them."""

    decode: Callable[[tf.Tensor], tf.Tensor]

    def with_image(self, example: dict, replace: bool) -> dict:
        """The example with its image, in place of its record."""
        rest = {name: value for name, value in example.items() if name != "record"}
        return {**rest, "image": self.decode(example["record"]), "readable": tf.constant(True)}

    def read_carefully(self) -> bool:
        """Nothing can be read more carefully."""
        return False


@dataclasses.dataclass(frozen=True)
class MemorySource(NeverFails, ListedSource):
    """A split whose records are in memory: images, or encoded images.

    Attributes:
      records: [n] records, uint8 images or strings.
      labels: [n] int32, -1 where unlabelled.
      names: [n] stable names.
      classes: the classes' names.
      decode: from a record to a uint8 image [H, W, 3].
      made_from, answers: as for every `ListedSource`.
      file_order: how the files that the records were read from are visited, where an epoch keeps to that order; the
        records then stand in the order of its pieces.
    """

    records: np.ndarray
    labels: np.ndarray
    names: list[str]
    classes: Sequence[str]
    decode: Callable[[tf.Tensor], tf.Tensor]
    made_from: str = ""
    answers: np.ndarray | None = None
    file_order: Windows | Stripes | None = None
    _variables: dict[str, dict[str, tf.Variable]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def record(self, i: int) -> tf.Tensor:
        """The record of example `i`."""
        return tf.constant(self.records[i])

    def _drawn_order(self, epoch: tf.Tensor, seed: int) -> tf.Tensor:
        return self.file_order.windows.numbers(epoch, seed) if self.file_order else super()._drawn_order(epoch, seed)

    def _trained_order(self, epoch: tf.Tensor, seed: int) -> tf.Tensor:
        return self.file_order.numbers(epoch, seed) if self.file_order else super()._trained_order(epoch, seed)

    def _columns(self) -> dict[str, np.ndarray | bytes]:
        return {"record": self.records}

    def _record(self, columns: Mapping[str, tf.Tensor], i: tf.Tensor) -> tf.Tensor:
        return tf.gather(columns["record"], i)

    def index(self) -> tuple[list[str], np.ndarray]:
        """Every example's name and label, in the fixed order."""
        return self.names, self.labels

    def in_memory(self) -> MemorySource:
        """This split."""
        return self

    def take(self, indices: np.ndarray) -> Self:
        """Only the examples at `indices`, as a split of its own."""
        names = [self.names[i] for i in indices]
        answers = None if self.answers is None else self.answers[indices]
        return self._with(
            records=self.records[indices], labels=self.labels[indices], names=names, answers=answers, made_from="",
            file_order=None,
        )  # fmt: skip


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
      NoSuchSplit: where a split does not exist, is malformed or selects nothing.
    """
    if sizes.get(split):
        return [(split, 0, sizes[split])]  # A whole split needs no parsing, nor the seconds of the import below.
    import tensorflow_datasets

    core = tensorflow_datasets.core
    there = f"there is {', '.join(sizes) or 'none'}"
    for name in names_of_splits(split):
        if name not in sizes:
            raise NoSuchSplit(split, f"no such split; {there}{did_you_mean(name, sizes)}")
    try:
        infos = {name: core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0) for name, size in sizes.items()}
        parts = core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, KeyError) as error:
        raise NoSuchSplit(split, f"not understood: write it like train, train[:80%] or train+test; {there}") from error
    ranges = []
    for part in parts:
        begin = part.from_ or 0
        end = sizes[part.splitname] if part.to is None else part.to
        ranges.append((part.splitname, begin, end))
    if not any(end > begin for _, begin, end in ranges):
        raise NoSuchSplit(split, f"selects no example; {there}")
    return ranges


def names_of_splits(split: str) -> list[str]:
    """The names of the splits of which `split` takes all or a part, each once."""
    return list(dict.fromkeys(part.split("[")[0].strip() for part in split.split("+")))


def hash_order(names: Sequence[str], seed: int, limit: int | None = None) -> list[int]:
    """The indices of `names` in an order drawn from `seed`, the same on every machine and for any listing order.

    Only the first `limit` of them where it is given.
    """

    def draw(i: int) -> bytes:
        return hashlib.sha256(f"{seed}:{names[i]}".encode()).digest()

    indices = range(len(names))
    return sorted(indices, key=draw) if limit is None else heapq.nsmallest(limit, indices, key=draw)


def some_of(names: Sequence[str], limit: int = 5) -> str:
    """The first of `names`, for a message. Where some are left out, the text says how many there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning. A run opens a split more than once, so the same warning is logged once in a process."""
    logging.warning("%s", one_line(message))
