"""The order of records in files: every record once an epoch, from any place on, without what comes before it."""

import numpy as np
import pytest
import tensorflow as tf

from sources import windows

SHARDS = (7, 12, 1, 5)  # records in each file


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(windows, "PIECE", 4)
    monkeypatch.setattr(windows, "PIECES", 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of records. Each record says its file and its number."""
    folder = tmp_path_factory.mktemp("records")
    paths = []
    for shard, size in enumerate(SHARDS):
        paths.append(str(folder / f"shard-{shard}"))
        with tf.io.TFRecordWriter(paths[-1]) as writer:
            for number in range(size):
                writer.write(f"{shard}:{number}".encode())
    return paths


def whole(files):
    """Windows over all records of the files."""
    return windows.Windows.of([(path, 0, size) for path, size in zip(files, SHARDS, strict=True)])


def visited(made, epoch=0, seed=0, first=0):
    dataset = made.epoch(tf.constant(epoch, tf.int64), seed, tf.constant(first, tf.int64))
    return [record.decode() for record, _, _ in dataset.as_numpy_iterator()]


def in_order(made):
    every = made.records(tf.range(len(made.files)))
    return [record.decode() for record, _, _ in every.as_numpy_iterator()]


def test_pieces_are_small_and_lose_no_record(files):
    made = whole(files)
    assert made.sizes.tolist() == [3, 4, 4, 4, 4, 1, 2, 3]
    assert in_order(made) == [f"{shard}:{number}" for shard, size in enumerate(SHARDS) for number in range(size)]


def test_parts_of_files_are_read_from_where_they_begin(files):
    made = windows.Windows.of([(files[1], 2, 9), (files[0], 5, 2)])
    assert in_order(made) == [f"1:{number}" for number in range(2, 11)] + ["0:5", "0:6"]
    numbers = [(int(number), made.files[piece]) for _, number, piece in made.records(tf.range(4)).as_numpy_iterator()]
    assert numbers == [(i, files[1]) for i in range(2, 11)] + [(5, files[0]), (6, files[0])]


def test_an_epoch_visits_every_record_once_in_an_order_of_its_own(files):
    made = whole(files)
    first, second, other = visited(made), visited(made, epoch=1), visited(made, seed=1)
    assert sorted(first) == sorted(second) == sorted(other) == sorted(in_order(made))
    assert first == visited(made) and len({tuple(order) for order in (first, second, other, in_order(made))}) == 4


def test_an_epoch_that_begins_later_equals_one_that_skipped(files):
    made = whole(files)
    order = visited(made, epoch=3)
    for first in (1, 9, 10, 17, 24):
        assert visited(made, epoch=3, first=first) == order[first:]


def test_an_epoch_that_begins_later_reads_nothing_of_the_windows_before(files, tmp_path):
    made = whole(files)
    order = visited(made)
    ends = np.cumsum(made.sizes[tf.random.experimental.stateless_shuffle(tf.range(8), [0, 0])])
    first = int(ends[2 * windows.PIECES - 1])  # The last window begins here.
    late = {int(piece) for _, _, piece in made.epoch(tf.constant(0, tf.int64), 0, first).as_numpy_iterator()}
    others_gone = [path if i in late else str(tmp_path / "gone") for i, path in enumerate(made.files)]
    assert visited(windows.Windows(others_gone, made.begins, made.sizes), first=first) == order[first:]


def test_the_order_is_known_without_reading(files):
    made = whole(files)
    every = in_order(made)
    numbers = made.numbers(tf.constant(2, tf.int64), 5).numpy()
    assert [every[i] for i in numbers] == visited(made, epoch=2, seed=5)


def test_the_order_is_the_same_on_every_machine(files):
    assert visited(whole(files))[:8] == ["3:1", "0:3", "0:6", "1:11", "1:10", "0:4", "1:8", "0:5"]
