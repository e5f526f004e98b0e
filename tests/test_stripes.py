"""The order of stripes: every record once an epoch, alike for any number of workers, each of which reads its part."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from sources import stripes, windows
from sources.share import Share

SHARDS = (7, 12, 1, 5, 9, 3, 14, 6, 2, 8)  # records in each file
EXAMPLES = sum(SHARDS)
BATCH = 24


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(windows, "PIECE", 4)
    monkeypatch.setattr(stripes, "SHUFFLED", 8 * 5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Files of records. Each record says its file and its number."""
    folder = tmp_path_factory.mktemp("records")
    for shard, size in enumerate(SHARDS):
        with tf.io.TFRecordWriter(str(folder / f"shard-{shard}")) as writer:
            for number in range(size):
                writer.write(f"{shard}:{number}".encode())
    return [(str(folder / f"shard-{shard}"), 0, size) for shard, size in enumerate(SHARDS)]


def joined(lists):
    """The items of all lists."""
    return list(itertools.chain.from_iterable(lists))


def shares(workers):
    return [Share(BATCH, BATCH * i // workers, BATCH * (i + 1) // workers) for i in range(workers)]


@tf.autograph.experimental.do_not_convert  # as for `data.train_stream`
def stream(made, share, step, steps, seed):
    return made.stream(seed, step, share).take(steps * share.size).as_numpy_iterator()


def taken(made, share, step, steps, seed=5):
    """Of each batch from `step` on, the records of a share."""
    records = stream(made, share, step, steps, seed)
    found = [(record.decode(), made.files[piece]) for record, _, piece in records]
    assert all(path.endswith(f"shard-{record.split(':')[0]}") for record, path in found)
    return [[record for record, _ in found[i : i + share.size]] for i in range(0, len(found), share.size)]


@pytest.fixture(scope="module")
def alone(parts):
    """The first batches, as one worker reads them: two epochs and more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(windows, "PIECE", 4)
        patched.setattr(stripes, "SHUFFLED", 8 * 5)
        return taken(stripes.Stripes.of_files(parts, BATCH), Share(BATCH, 0, BATCH), 0, 9)


def test_an_epoch_has_every_record_once_in_an_order_of_its_own(parts, alone):
    order = joined(alone)
    first, second = order[:EXAMPLES], order[EXAMPLES : 2 * EXAMPLES]
    assert sorted(first) == sorted(second) == sorted(f"{i}:{k}" for i, size in enumerate(SHARDS) for k in range(size))
    other = joined(taken(stripes.Stripes.of_files(parts, BATCH), Share(BATCH, 0, BATCH), 0, 2, seed=6))
    assert len({tuple(some[: len(other)]) for some in (first, second, other, sorted(first))}) == 4


@pytest.mark.parametrize(
    ("workers", "step"),
    [(1, 4), (3, 5), pytest.param(2, 3, marks=pytest.mark.slow), pytest.param(4, 0, marks=pytest.mark.slow)],
)
def test_any_number_of_workers_give_the_batches_of_one_from_any_step_on(parts, alone, workers, step):
    made = stripes.Stripes.of_files(parts, BATCH)
    found = [taken(made, share, step, 4) for share in shares(workers)]
    for number, batch in enumerate(alone[step : step + 4]):
        assert joined(of_worker[number] for of_worker in found) == batch


@pytest.mark.parametrize("workers", [2, 3])
def test_a_worker_opens_no_file_in_which_its_stripes_have_no_record(parts, alone, tmp_path, workers):
    made = stripes.Stripes.of_files(parts, BATCH)
    shards_opened, stripes_read = [], []
    for share in shares(workers):
        read = [i for i in range(8) if made.edges[i] < share.end and made.edges[i + 1] > share.begin]
        places = range(made.edges[read[0]], made.edges[read[-1] + 1])  # Two workers may share a stripe.
        needed = {alone[step][place].split(":")[0] for step in range(2) for place in places}
        gone = [path if path.split("-")[-1] in needed else str(tmp_path / "gone") for path in made.files]
        limited = stripes.Stripes(gone, made.begins, made.sizes, BATCH, 8)
        found = [record.decode() for record, _, _ in stream(limited, share, 0, 1, seed=5)]
        assert found == alone[0][share.begin : share.end]
        shards_opened.append(len(needed))
        stripes_read.append(len(read))
    assert sum(stripes_read) <= 8 + workers - 1
    assert min(shards_opened) < len(SHARDS)


def once(made, share):
    """What a worker reads of one pass: of each place of its share, the record and whether it counts."""
    read = made.once(share).as_numpy_iterator()
    return [(record.decode(), counts) for record, _, _, counts in read]


@pytest.mark.parametrize("most", [100, 1])  # 67 records, and one of each file: of those, two stripes have none
def test_one_pass_has_every_record_once_and_is_the_same_for_any_number_of_workers(parts, most):
    some = [(path, 0, min(size, most)) for path, _, size in parts if most > 1 or size < 9]
    made = stripes.Stripes.of(some, batch=BATCH, count=8)
    alone = once(made, Share(BATCH, 0, BATCH))
    assert len(alone) == -(-made.examples // BATCH) * BATCH
    expected = [f"{path.split('-')[-1]}:{k}" for path, _, size in some for k in range(size)]
    assert sorted(record for record, counts in alone if counts) == sorted(expected)
    for workers in (2, 3):
        found = [once(made, share) for share in shares(workers)]
        size = BATCH // workers
        batches = [joined(of_worker[i : i + size] for of_worker in found) for i in range(0, len(found[0]), size)]
        assert joined(batches) == alone


def test_the_order_is_known_without_reading(parts, alone):
    made = stripes.Stripes.of_files(parts, BATCH)
    every = [record.decode() for record, _, _ in made.records(tf.range(len(made.files))).as_numpy_iterator()]
    for epoch in (0, 1):
        numbers = made.numbers(tf.constant(epoch, tf.int64), 5).numpy()
        assert [every[i] for i in numbers] == joined(alone)[epoch * EXAMPLES : (epoch + 1) * EXAMPLES]


def test_the_order_is_the_same_on_every_machine(alone):
    assert alone[0][:8] == ["5:0", "5:1", "6:8", "7:2", "9:0", "7:1", "6:11", "6:12"]


def test_few_files_or_places_have_no_stripes(parts):
    assert stripes.Stripes.of_files(parts[:7], BATCH) is None
    assert stripes.Stripes.of_files(parts, 7) is None
    assert stripes.Stripes.of_files(parts, 8).count == 8
    assert stripes.Stripes.of_files(parts * 5, 4096).count == 8  # The same ten files, named again.


@pytest.mark.parametrize("workers", [2, 3, 4, 6, 8, 16])
def test_the_workers_of_a_large_data_set_read_equal_parts_of_it(workers):
    files = [(f"shard-{i}", 0, 1251) for i in range(1024)]
    made = stripes.Stripes.of_files(files, 4096 if workers not in (3, 6) else 4032)
    assert made.count == 48
    for i in range(workers):
        share = Share(made.batch, made.batch * i // workers, made.batch * (i + 1) // workers)
        assert np.isin([share.begin, share.end], made.edges).all()
