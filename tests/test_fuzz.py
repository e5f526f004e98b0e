"""Strange inputs by the thousand: each is taken, or refused by name. None crashes, hangs, or takes memory or disk.

The default run has some of each, always the same ones. `make fuzz` has as many as `LONG` says.
"""

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import release_files
import tables_of_checkpoints
import tensorflow as tf
import tiny
from google.protobuf.message import EncodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import checkpoint
import published
import sources
import subject
import tasks
from errors import UserError
from sources import files, kinds, lists, manifest

LONG = {"images": 10_000, "checkpoints": 3_000, "lists": 5_000, "caches": 3_000, "configs": 3_000}
SHORT = 12
SECONDS = 20  # Each input must be done by then, on a machine with other work.
MEMORY = 2**29  # All inputs of a test together raise the peak of this process's memory by no more.


def counts(what):
    """How many inputs: a few, and, marked slow, many."""
    return pytest.mark.parametrize("count", [SHORT, pytest.param(LONG[what], marks=pytest.mark.slow)])


def fuzz(count, inputs, check):
    """Calls `check` with `count` inputs, always the same, and watches time and memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def each(made):
        started = time.monotonic()
        check(made)
        assert time.monotonic() - started < SECONDS

    each()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@contextlib.contextmanager
def only_user_errors():
    """Within it, nothing but a `UserError` of one line may be raised."""
    try:
        yield
    except UserError as error:
        assert str(error) and str(error).isprintable()


# Changes to bytes

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)
PLACES = st.one_of(st.integers(0, 64), st.integers(0, 2**16))


def flipped(content, at, number):
    content[at] ^= 1 << number % 8


def lying(content, at, number):
    """A number of 1, 2 or 4 bytes becomes one of the extremes."""
    value = EXTREMES[number % len(EXTREMES)]
    length = (1, 2, 4)[number // 16 % 3]
    order = ("<", ">")[number // 64 % 2]
    packed = struct.pack(f"{order}{' BH I'[length]}", value % 256**length)
    content[at : at + length] = packed


def cut(content, at, number):
    del content[at:]


def without(content, at, number):
    del content[at : at + number]


def doubled(content, at, number):
    content[at:at] = content[at : at + number]


def moved(content, at, number):
    content += content[at : at + number]
    del content[at : at + number]


CHANGES = st.lists(
    st.tuples(st.sampled_from([flipped, lying, lying, cut, without, doubled, moved]), PLACES, st.integers(0, 511)),
    max_size=4,
)


def changed(content, changes):
    """The content after these changes."""
    made = bytearray(content)
    for change, at, number in changes:
        if made:
            change(made, at % len(made), number)
    return bytes(made)


# Images


def encoded(kind, mode="RGB", **options):
    content = io.BytesIO()
    Image.fromarray(tiny.noise(3, 40, 48)).convert(mode).save(content, kind, **options)
    return content.getvalue()


def turned():
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = 6, "a description"
    return tags


@functools.cache
def images():
    """Real files of every kind."""
    other = [Image.fromarray(tiny.noise(4, 40, 48))]
    return [
        encoded("JPEG"),
        encoded("JPEG", progressive=True),
        encoded("JPEG", "L"),
        encoded("JPEG", "CMYK"),
        encoded("JPEG", exif=turned()),
        encoded("PNG"),
        encoded("PNG", "P", transparency=3),
        encoded("PNG", "RGBA", exif=turned()),
        encoded("PNG", "LA"),
        encoded("PNG", save_all=True, append_images=other),
        encoded("GIF", "P", save_all=True, append_images=[image.convert("P") for image in other], transparency=1),
        encoded("BMP"),
        encoded("BMP", "P"),
        encoded("TIFF"),
        encoded("TIFF", compression="tiff_lzw"),
        encoded("TIFF", "CMYK", compression="tiff_adobe_deflate"),
        encoded("TIFF", compression="jpeg"),
        encoded("TIFF", "1", compression="group4"),
        encoded("TIFF", "RGBA", compression="packbits", exif=turned()),
        encoded("WEBP", exif=turned()),
        encoded("WEBP", "RGBA", lossless=True),
        encoded("WEBP", save_all=True, append_images=other),
    ]


def with_checksums(content):
    """A PNG whose parts have the checksums that they should, so that a change in them is not seen by these alone."""
    made, at = bytearray(content), 8
    while content.startswith(kinds._PNG) and at + 12 <= len(made):
        length = struct.unpack(">I", made[at : at + 4])[0]
        end = at + 8 + length
        if end + 4 > len(made):
            break
        made[end : end + 4] = struct.pack(">I", zlib.crc32(made[at + 4 : end]))
        at = end + 4
    return bytes(made)


@counts("images")
def test_an_image_becomes_pixels_or_is_refused_with_a_reason(count):
    limit = 10**6

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def in_graph(content):
        return files.decode_content(content, limit)

    def check(made):
        which, changes = made
        content = with_checksums(changed(images()[which], changes))
        try:
            pixels = kinds.decode_by_hand(content, limit)
        except kinds.Unreadable as error:
            assert str(error)
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            assert pixels.shape[0] * pixels.shape[1] <= limit
        try:
            pixels = in_graph(content).numpy()
        except tf.errors.OpError:
            return
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[0] * pixels.shape[1] <= limit

    fuzz(count, st.tuples(st.integers(0, len(images()) - 1), CHANGES), check)


# Checkpoints


def read_all(weights):
    """Reads every tensor of a checkpoint that the program might."""
    for key in weights.shapes:
        weights._read(key)


class Copy:
    """A checkpoint that is changed, and put into a folder of its own, again and again."""

    def __init__(self, prefix, folder):
        self.folder, self.prefix = folder, folder / os.path.basename(prefix)
        folder.mkdir()
        self.index = Path(f"{prefix}.index").read_bytes()
        self.entries = tables_of_checkpoints.entries(prefix)
        (self.shard,) = Path(prefix).parent.glob(f"{os.path.basename(prefix)}.data-*")
        self.data = self.shard.read_bytes()

    def write(self, index, data):
        """Writes a checkpoint of this content. Returns its prefix."""
        Path(f"{self.prefix}.index").write_bytes(index)
        (self.folder / self.shard.name).write_bytes(data)
        return str(self.prefix)


SIDES = st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**40, 2**62, 2**63 - 1]))
FIELDS = {
    "dtype": st.integers(0, 130),
    "shape": st.lists(SIDES, max_size=5),
    "shard_id": st.integers(-1, 3),
    "offset": st.one_of(st.integers(0, 5000), st.sampled_from([-1, 2**40, 2**63 - 1])),
    "size": st.one_of(st.integers(0, 5000), st.sampled_from([-1, 2**40, 2**63 - 1])),
    "crc32c": st.integers(0, 2**32 - 1),
}
ONE_LIE = st.sampled_from(list(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name]))
LIES = st.lists(st.tuples(st.integers(0, 10**6), ONE_LIE), max_size=3)
REARRANGED = st.lists(st.tuples(st.sampled_from(["drop", "swap", "rename"]), st.integers(0, 10**6)), max_size=3)


def lied(entries, lies, rearranged):
    """An index file whose checksums hold, and whose entries do not: their numbers are changed, some are rearranged."""
    made = {key: type(entry).FromString(entry.SerializeToString()) for key, entry in entries.items()}
    keys = sorted(key for key in made if key)
    for which, (name, value) in lies:
        entry = made[keys[which % len(keys)]]
        if name == "shape":
            del entry.shape.dim[:]
            for side in value:
                entry.shape.dim.add(size=side)
        else:
            with contextlib.suppress(ValueError, EncodeError):
                setattr(entry, name, value)
    for how, which in rearranged:
        key, other = keys[which % len(keys)], keys[which // 7 % len(keys)]
        if how == "swap" and {key, other} <= set(made):
            made[key], made[other] = made[other], made[key]
        elif how == "rename" and key in made:
            made[key + b"_1"] = made.pop(key)
        else:
            made.pop(key, None)
    return tables_of_checkpoints.table(sorted((key, entry.SerializeToString()) for key, entry in made.items()))


STRANGE_CHECKPOINTS = st.one_of(
    st.tuples(st.just("lie"), LIES, REARRANGED), st.tuples(st.just("bytes"), CHANGES, CHANGES)
)


def check_checkpoint(copy, open_it):
    """A check that writes a strange checkpoint, opens it, and reads it whole."""

    def check(made):
        how, first, second = made
        if how == "lie":
            prefix = copy.write(lied(copy.entries, first, second), copy.data)
        else:
            prefix = copy.write(changed(copy.index, first), changed(copy.data, second))
        with only_user_errors():
            read_all(open_it(prefix))

    return check


@counts("checkpoints")
def test_a_strange_checkpoint_of_ours_is_read_or_refused(count, tmp_path, tmp_path_factory):
    prefix = checkpoint.find(tiny.pretrained(tmp_path_factory))
    fuzz(count, STRANGE_CHECKPOINTS, check_checkpoint(Copy(prefix, tmp_path / "copy"), checkpoint.Weights))


@counts("checkpoints")
@pytest.mark.parametrize("kind", ["TF1", "TF2"])
def test_a_strange_published_checkpoint_is_read_or_refused(count, kind, tmp_path, monkeypatch):
    if kind == "TF1":
        release_files.written(tmp_path / "model", resnet_depth=10)
        prefix = f"{tmp_path}/model/model.ckpt-7"
    else:
        release_files.saved_model(tmp_path / "model", resnet_depth=10)
        prefix = f"{tmp_path}/model/variables/variables"
    built = functools.cache(tasks.skeleton)  # Most inputs look like the same network, and building one takes long.
    monkeypatch.setattr(tasks, "skeleton", built)
    fuzz(count, STRANGE_CHECKPOINTS, check_checkpoint(Copy(prefix, tmp_path / "copy"), published.open_weights))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@counts("configs")
def test_a_strange_config_is_read_or_refused(count, tmp_path, tmp_path_factory):
    """In a checkpoint, where it is JSON too, and beside it."""
    model_dir = tiny.pretrained(tmp_path_factory)
    saved = json.loads((Path(model_dir) / "config.json").read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt-3.index").write_bytes(b"")
    names = sorted(saved)

    def check(made):
        changes, byte_changes = made
        strange = {**saved, **{names[which % len(names)]: value for which, value in changes}}
        content = changed(json.dumps(strange).encode(), byte_changes)
        (tmp_path / "run" / "config.json").write_bytes(content)
        with only_user_errors():
            subject.decide({"mode": "eval", "model_dir": str(tmp_path / "run")})
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        step = tf.constant(3, tf.int64)
        keys = {checkpoint.layout.CONFIG_KEY: tf.constant(content), "step/.ATTRIBUTES/VARIABLE_VALUE": step}
        with only_user_errors():
            read_all(checkpoint.Weights(release_files.written_raw(tmp_path / "checkpoint", keys)))

    fuzz(count, st.tuples(st.lists(st.tuples(st.integers(0, 10**6), JSON), max_size=3), CHANGES), check)


# Lists and tables

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["1.png", "a/2.png", "../1.png", "/etc/passwd", "", "=1", "train", "9" * 5000]
)
CELLS = TEXTS | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.none() | st.binary(max_size=8)


@counts("lists")
@pytest.mark.parametrize("suffix", ["csv", "parquet", "txt"])
def test_a_strange_list_is_read_or_refused(count, suffix, tmp_path):
    root = tiny.folder_of(tmp_path / "images", "1.png", "a/2.png", "b/3.png")
    file = tmp_path / f"list.{suffix}"
    usual = {"path": ["1.png", "a/2.png", "b/3.png"], "label": ["cat", "dog", ""], "split": ["train", "train", "test"]}

    def text(rows):
        lines = [",".join(usual), *(",".join(map(str, row)) for row in rows)]
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    def check(made):
        rows, changes = made
        if suffix == "parquet":
            columns = {name: [row[i] for row in rows] or cells for i, (name, cells) in enumerate(usual.items())}
            try:
                table = pa.table(columns)
            except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
                table = pa.table(usual)
            pq.write_table(table, file)
            file.write_bytes(changed(file.read_bytes(), changes))
        else:
            file.write_bytes(changed(text(rows or zip(*usual.values(), strict=True)), changes))
        option = "images" if suffix == "txt" else "labels"
        with only_user_errors():
            source = sources.load("image_folder", "train", root, **{option: str(file)})
            assert {path.decode() for path in source.files.paths()} <= set(usual["path"])
        if suffix != "txt":
            with only_user_errors():
                lists.splits_in(str(file))

    fuzz(count, st.tuples(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=3), CHANGES), check)


# What is kept for the next start


@counts("caches")
def test_a_strange_cache_counts_as_none(count, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tiny.folder_of(tmp_path / "images", "1.png", "a/2.png")
    for folder in (root, f"{root}/a"):
        os.utime(folder, (0, 0))
    files.find_images(root)
    manifest.keep_unreadable(root, "1.png", "because")
    kept = {path: path.read_bytes() for path in (tmp_path / "cache" / "simclr").iterdir()}
    assert len(kept) == 2

    def check(changes):
        for path, content in kept.items():
            path.write_bytes(changed(content, changes))
        listing = manifest.read_listing(root, kinds.SUFFIXES)
        if listing:
            assert all(not os.path.isabs(path) and ".." not in path.split("/") for path in listing.files)
            assert all(isinstance(number, int) for number in listing.others.values())
        manifest.read_unreadable(root)

    fuzz(count, CHANGES, check)
