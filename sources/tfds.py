"""TensorFlow Datasets by name: read as a stream from the files that they were prepared in."""

from __future__ import annotations

import copy
import dataclasses
import os
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import sources.manifest as manifest
from errors import UserError, did_you_mean, reason
from sources.base import UNLABELLED, MemorySource, NeverFails, Source, decode_image, names_of_splits, split_ranges
from sources.share import Share
from sources.stripes import Stripes
from sources.windows import Pieces, Windows

INDEX_BATCH = 1024  # examples that are read at a time where nothing is made of their images
SPARSE = 32  # Where at most one of so many examples is wanted, each is looked for by itself: no other image is read.
SKIP_BYTES = 4096  # how much is read of a record that is passed over
OWN_LABEL = -2  # in a table of labels: the example keeps its own label
CONNECT_SECONDS = 5  # how long to wait for a host to answer
HOSTS_ASKED = 3  # how many hosts of a download are tried
# What was read of splits for their names and labels, by folder and split. A command opens a split several times: for
# its recipe, to measure its speed, and to train. Each reading takes a pass over all of its files.
_indexes: dict[tuple[str, str], manifest.Index] = {}
# Each of several workers keeps splits of up to so many bytes in memory where it would else read the share of the others
# too. TensorFlow Datasets prepares more than that in eight files or more.
KEPT_BYTES = 8 * 64 * 2**20


def load(name: str, split: str, data_dir: str = "") -> TfdsSource:
    """A split of a TensorFlow dataset. The dataset is downloaded and prepared first where it is not on disk.

    Args:
      name: such as `cifar10`, `imagenet2012_subset/1pct` or `cifar10:3.0.2`.
      split: such as `train` or `train[:80%]+test`.
      data_dir: where prepared data sets are; empty: TensorFlow Datasets' own default.

    Raises:
      UserError: where the data set or the split does not exist, has no images, or cannot be downloaded.
    """
    return TfdsSource(name, split, data_dir)


class TfdsSource(NeverFails):
    """A split of a TensorFlow dataset that is prepared on disk (or can be downloaded), read as a stream.

    Its epochs have one of three orders. The oldest one shuffles the files, and their examples in a buffer: to begin at
    a later place of an epoch, it reads all that comes before. `in_order` gives the split in another order: that of
    `Windows` does not read what comes before, and in that of `Stripes` every worker reads its own part alone. The draws
    of evaluations keep to the oldest order, and a run keeps to the order that it began with.

    Attributes:
      file_order: the windows or stripes that give the order; None: the oldest order.
    """

    SHUFFLE_BUFFER = 16384  # encoded records; the files are shuffled too

    def __init__(self, name: str, split: str, data_dir: str) -> None:
        import tensorflow_datasets

        self._split = split
        self._builder = _prepared(name, data_dir)
        info = self._builder.info
        self._image = _feature(info.features, tensorflow_datasets.features.Image)
        self._label = _feature(info.features, tensorflow_datasets.features.ClassLabel)
        self._file_name = "file_name" if "file_name" in info.features else None
        if not self._image:
            raise UserError(f"--dataset={name} has no images: choose another")
        self.classes = list(info.features[self._label].names) if self._label else []
        self.has_labels = self._label is not None
        sizes = {key: split_info.num_examples for key, split_info in info.splits.items()}
        self.examples = sum(end - begin for _, begin, end in split_ranges(split, sizes))
        self.fingerprint = f"{info.full_name} {split}: {self.examples} examples"
        # Labels that replace the examples' own, by example name (OWN_LABEL: keep).
        self._known_labels: tuple[list[str], list[int]] | None = None
        self.file_order: Windows | Stripes | None = None

    def in_order(self, order: str, batch: int) -> TfdsSource:
        """The same split in an order by its name: "buffer", "windows" or "stripes", for batches of `batch` examples.

        Too few files or places for stripes have the order of windows. Files of another format than TFRecord keep to the
        oldest order.
        """
        if order == "buffer" or not self._is_in_records():
            return self
        parts = [(file.filename, file.skip, file.take) for file in self._files() if file.take]
        stripes = Stripes.of_files(parts, batch) if order == "stripes" else None
        return self._with(file_order=stripes or Windows.of(parts))

    def _is_in_records(self) -> bool:
        """Whether the files are TFRecords."""
        import tensorflow_datasets

        return self._builder.info.file_format in (None, tensorflow_datasets.core.FileFormat.TFRECORD)

    def _files(self) -> list[Any]:
        """The files of the split, each with its `filename` and how many records to `skip` and to `take`."""
        return self._builder.info.splits[self._split].file_instructions

    def _read(self, shuffle_seed: tf.Tensor | None = None, with_record: bool = True) -> tf.data.Dataset:
        """The examples as dicts of `record`, `label`, `name` and `place`. `shuffle_seed` shuffles the files.

        Without `with_record`, the images are not taken out of the files' records, which saves most of the time.
        """
        import tensorflow_datasets

        decode = tensorflow_datasets.decode
        wanted = [name for name in (self._label, self._file_name) if name]
        dataset = self._builder.as_dataset(
            split=self._split,
            shuffle_files=shuffle_seed is not None,
            decoders={self._image: decode.SkipDecoding()} if with_record else decode.PartialDecoding(wanted),
            read_config=tensorflow_datasets.ReadConfig(
                shuffle_seed=shuffle_seed,
                shuffle_reshuffle_each_iteration=False,
                add_tfds_id=True,
                try_autocache=False,
                skip_prefetch=True,
                enable_ordering_guard=False,
            ),
        )
        return dataset.map(self._as_example(with_record))

    def _as_example(self, with_record: bool = True) -> Callable[[dict], dict]:
        """Makes an example, as `_read` gives it, of the features that TensorFlow Datasets give and their `tfds_id`."""
        table = None
        if self._known_labels is not None:
            names, labels = self._known_labels
            entries = tf.lookup.KeyValueTensorInitializer(tf.constant(names), tf.constant(labels, tf.int32))
            table = tf.lookup.StaticHashTable(entries, default_value=UNLABELLED)

        def example(features: dict) -> dict:
            label = tf.cast(features[self._label], tf.int32) if self._label else tf.constant(UNLABELLED)
            place = features["tfds_id"]  # the name of a file, and the number of the record in it
            name = features[self._file_name] if self._file_name else place
            if table is not None:
                known = table.lookup(name)
                label = tf.where(known == OWN_LABEL, label, known)
            record = {"record": features[self._image]} if with_record else {}
            return {**record, "label": label, "name": name, "place": place}

        return example

    def _from_record(self, pieces: Pieces) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], dict]:
        """Makes an example, as `_read` gives it, of what `pieces` give of a record."""
        import tensorflow_datasets

        skipped = {self._image: tensorflow_datasets.decode.SkipDecoding()}
        files = tf.constant([os.path.basename(file) for file in pieces.files])
        as_example = self._as_example()

        def example(record: tf.Tensor, number: tf.Tensor, piece: tf.Tensor) -> dict:
            features = self._builder.info.features.deserialize_example(record, decoders=skipped)
            name = tf.strings.join([tf.gather(files, piece), tf.strings.as_string(number)], "__")
            return as_example({**features, "tfds_id": name})

        return example

    def stream(self, seed: int, first_step: int, share: Share) -> tf.data.Dataset:
        order, first = self.file_order, first_step * share.batch
        if isinstance(order, Stripes):
            stream = order.stream(seed, first_step, share).enumerate()
            stream = stream.map(lambda i, record: (first + share.position(i), record))
        else:
            first_epoch, seen = divmod(first, self.examples)

            def of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
                begin = tf.where(epoch == first_epoch, tf.constant(seen, tf.int64), 0)
                return (order or self).epoch(epoch, seed, begin)

            epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
            stream = epochs.flat_map(of_epoch).enumerate(start=first)
            if not share.is_all:
                stream = stream.filter(lambda position, record: share.has(position))
        if not order:
            return stream
        from_record = self._from_record(order)

        def example(position: tf.Tensor, record: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, dict]:
            return position, _without_name(from_record(*record))

        return stream.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def epoch(self, epoch: tf.Tensor, seed: int, first: tf.Tensor | int = 0) -> tf.data.Dataset:
        if self.file_order:
            records = self.file_order.windows.epoch(epoch, seed, first)
            from_record = self._from_record(self.file_order)
            examples = records.map(from_record, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            return examples.map(_without_name)
        epoch_seed = tf.cast(epoch, tf.int64) * 1_000_003 + seed + 1
        stream = self._read(shuffle_seed=epoch_seed).map(_without_name)
        buffer = min(self.SHUFFLE_BUFFER, self.examples)
        return stream.shuffle(buffer, seed=epoch_seed, reshuffle_each_iteration=False).skip(tf.cast(first, tf.int64))

    def ordered(self) -> tf.data.Dataset:
        return self._read().map(_without_name)

    def once(self, share: Share) -> tf.data.Dataset | None:
        """All examples once: those of a worker's share of as few batches as hold them, of which it reads no others.

        Together, the shares of all workers are the same examples in the same order, however many workers there are.

        Returns:
          The examples, as from `ordered`, each with 1.0, or with 0.0 where it only fills up a batch. None where there
          are too few files or places for stripes.
        """
        stripes = self.in_order("stripes", share.batch).file_order
        if not isinstance(stripes, Stripes):
            return None
        from_record = self._from_record(stripes)

        def example(content: tf.Tensor, number: tf.Tensor, piece: tf.Tensor, counts: tf.Tensor) -> tuple:
            return _without_name(from_record(content, number, piece)), counts

        return stripes.once(share).map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def decode(self, record: tf.Tensor) -> tf.Tensor:
        return decode_image(record)

    def index(self) -> tuple[list[str], np.ndarray]:
        index = self._index()
        if self._known_labels is None:
            return index.names, index.labels
        known = dict(zip(*self._known_labels, strict=True))
        labels = np.array([known.get(name, UNLABELLED) for name in index.names], np.int32)
        return index.names, np.where(labels == OWN_LABEL, index.labels, labels)

    def _index(self) -> manifest.Index:
        """The names, own labels and places of all examples. The pass that this takes is made once for all starts."""
        split = os.path.abspath(self._builder.data_path), self._split
        if split not in _indexes:
            files = [file.filename for file in self._files()]
            found = manifest.read_index(*split, files)
            if found is None or len(found.names) != self.examples:
                found = self._with(_known_labels=None)._read_index()
                manifest.keep_index(*split, files, found)
            _indexes[split] = found
        return _indexes[split]

    def _read_index(self) -> manifest.Index:
        """What `_index` gives, from the files."""
        index = manifest.Index([], np.empty([0], np.int32), [])
        labels = [index.labels]
        for examples in self._read(with_record=False).batch(INDEX_BATCH).as_numpy_iterator():
            index.names.extend(name.decode() for name in examples["name"])
            index.places.extend(place.decode() for place in examples["place"])
            labels.append(examples["label"])
        return index._replace(labels=np.concatenate(labels))

    def with_labels(self, names: Iterable[str], only: bool) -> Source:
        chosen = sorted(names)
        hidden = self._with(_known_labels=(chosen, [OWN_LABEL] * len(chosen)))
        if not only:
            return hidden
        index, labels = self._index(), hidden.index()[1]
        kept = np.flatnonzero(labels >= 0)
        is_local = "://" not in str(self._builder.data_path)
        if not (0 < SPARSE * len(kept) <= self.examples and is_local and self._is_in_records()):
            return hidden._collected(hidden._read().filter(_is_labelled))
        records = self._encoded_images([index.places[i] for i in kept])
        return MemorySource(
            records, labels[kept], [index.names[i] for i in kept], self.classes, decode_image, self.fingerprint
        )

    def _encoded_images(self, places: Sequence[str]) -> np.ndarray:
        """The encoded images at `places`, strings [n]. Of the records before them only the lengths are read."""
        import tensorflow_datasets

        skipped = {self._image: tensorflow_datasets.decode.SkipDecoding()}
        paths = {os.path.basename(file.filename): file.filename for file in self._files()}
        names, numbers = zip(*(place.rsplit("__", 1) for place in places), strict=True)

        def image(path: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
            record = tf.data.TFRecordDataset(path, buffer_size=SKIP_BYTES).skip(number).take(1).get_single_element()
            return self._builder.info.features.deserialize_example(record, decoders=skipped)[self._image]

        found = ([paths[name] for name in names], np.array(numbers, np.int64))
        images = tf.data.Dataset.from_tensor_slices(found).map(
            image, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        return np.array(list(images.as_numpy_iterator()), object)

    def _with(self, **changes: Any) -> TfdsSource:
        """A copy with these attributes."""
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    def labelled_by(self, other: Source) -> TfdsSource:
        """The same images, with labels only for those that `other` holds too. Images are matched by file name.

        Raises:
          UserError: where a data set has no file names, `other` has no labels, or no image is in both.
        """
        if not (isinstance(other, TfdsSource) and self._file_name and other._file_name and other.has_labels):
            raise UserError(
                "--labelled_dataset: both data sets must have file names, and --labelled_dataset labels: choose another"
            )
        names, labels = other.index()
        labelled = self._with(
            _known_labels=(names, labels.tolist()),
            classes=other.classes,
            has_labels=True,
            fingerprint=f"{self.fingerprint}, labelled by {other.fingerprint}",
        )
        if not list(labelled._read().filter(_is_labelled).take(1)):
            raise UserError("--labelled_dataset: none of its file names is in --dataset: choose another")
        return labelled

    def in_memory(self) -> MemorySource:
        """The same examples with their encoded images in memory. The order of its epochs stays, except the oldest."""
        order = self.file_order
        if not order:
            return self._collected(self._read())
        records = order.records(tf.range(len(order.files)))
        in_order_of_pieces = self._collected(records.map(self._from_record(order), num_parallel_calls=tf.data.AUTOTUNE))
        return dataclasses.replace(in_order_of_pieces, file_order=order)

    def for_several_workers(self) -> Source:
        """The same split for one of several workers, which should not read in every epoch what the others train on.

        In the order of stripes it reads its own share alone. In that of windows it cannot, so a small split is read
        into memory, once.
        """
        splits = self._builder.info.splits
        size = sum(splits[name].num_bytes for name in names_of_splits(self._split))
        if isinstance(self.file_order, Windows) and 0 < size <= KEPT_BYTES:
            return self.in_memory()
        return self

    def _collected(self, examples: tf.data.Dataset) -> MemorySource:
        """These `examples`, with their encoded images in memory."""
        records, labels = [np.empty([0], object)], [np.empty([0], np.int32)]
        names: list[str] = []
        for found in examples.batch(INDEX_BATCH).as_numpy_iterator():  # One by one they take several times as long.
            records.append(found["record"])
            labels.append(found["label"])
            names.extend(name.decode() for name in found["name"])
        return MemorySource(
            np.concatenate(records), np.concatenate(labels), names, self.classes, decode_image, self.fingerprint
        )


def _prepared(name: str, data_dir: str) -> Any:
    """The data set's builder, with its data on disk.

    Raises:
      UserError: where there is no such data set, or it is not on disk and cannot be downloaded.
    """
    import tensorflow_datasets

    where = data_dir or "TensorFlow Datasets' default folder"
    failed = f"--dataset={name}: not prepared under --data_dir ({where}) and cannot be downloaded"
    try:
        builder = tensorflow_datasets.builder(name, data_dir=data_dir or None)
        unreachable = "" if builder.is_prepared() else _unreachable_host(builder)
        if not unreachable:
            builder.download_and_prepare()
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        raise _unknown(name) from error
    except Exception as error:  # a download fails in as many ways as there are hosts
        if "Parsing builder name string" in str(error):  # it is no name at all
            raise _unknown(name) from error
        raise UserError(f"{failed}: {reason(error)}") from error
    if unreachable:
        raise UserError(f"{failed}: no connection to {unreachable}")
    return builder


def _unknown(name: str) -> UserError:
    """What to say where there is no data set of this name."""
    import tensorflow_datasets

    known = ["digits", "image_folder", *tensorflow_datasets.list_builders(with_community_datasets=False)]
    meant = did_you_mean(name, known, "--dataset=")
    if os.path.isdir(name):
        meant = f"; did you mean --data_dir={name}?"
    return UserError(f"--dataset={name}: neither digits, image_folder nor a TensorFlow dataset{meant}")


def _unreachable_host(builder: Any) -> str:
    """One host of the data set's download where none of the first few answers; empty where one does.

    TensorFlow Datasets retries an unreachable host for minutes, so this looks first whether one answers.
    """
    import requests

    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:  # the user downloads the files
        return ""
    by_host: dict[str, str] = {}
    for url in sorted(builder.url_infos or {}):
        if url.startswith(("http://", "https://")):
            by_host.setdefault(urllib.parse.urlsplit(url).netloc, url)
    asked = list(by_host.items())[:HOSTS_ASKED]
    for _, url in asked:
        try:
            requests.get(url, stream=True, timeout=CONNECT_SECONDS).close()
            return ""
        except requests.exceptions.ConnectionError:
            continue
        except requests.exceptions.RequestException:  # the host answers, but slowly or with an error
            return ""
    return asked[0][0] if asked else ""


def _feature(features: Mapping, kind: type) -> str | None:
    """The key of the first feature of this kind; None where there is none."""
    for key, feature in features.items():
        if isinstance(feature, kind):
            return key
    return None


def _is_labelled(example: dict) -> tf.Tensor:
    return example["label"] >= 0


def _without_name(example: dict) -> dict:
    return {"record": example["record"], "label": example["label"]}
