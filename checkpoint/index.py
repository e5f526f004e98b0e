"""The index of a checkpoint, looked through before TensorFlow reads it.

The index says where each tensor lies and how large it is. TensorFlow believes it: a shape with too many numbers ends
the whole process, and memory for a tensor is taken before its bytes are looked for. So what the index says is compared
with the sizes of the files first. The index is a table as LevelDB writes them: blocks of keys and values, a block that
says where these blocks are, and a footer.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import tensor_bundle_pb2

MAX_KEYS = 2**26  # bytes of all keys: a key may repeat the one before, so a small index can make them long
MAX_NUMBERS = 2**62  # in a tensor
_FOOTER = 48  # bytes: the places of two blocks, filled up to 40, and the magic number
_MAGIC = 0xDB4775248B80FB57
_VARINT_BYTES = 10  # of the longest whole number
_HEADER_KEY = b""


class _Place(NamedTuple):
    """Where a block lies in the index."""

    begin: int
    size: int


def check(prefix: str) -> None:
    """Compares what the index of the checkpoint `prefix` says with the files that hold its tensors.

    Raises:
      ValueError: where it is damaged, or promises more than these files hold.
      tf.errors.OpError: where a file is missing, or cannot be read.
    """
    with tf.io.gfile.GFile(f"{prefix}.index", "rb") as file:
        found = pairs(file.read())
    try:
        header = tensor_bundle_pb2.BundleHeaderProto.FromString(found.pop(_HEADER_KEY, b""))
        entries = {key: tensor_bundle_pb2.BundleEntryProto.FromString(value) for key, value in found.items()}
    except DecodeError as error:
        raise ValueError("its index is damaged") from error
    shards = {entry.shard_id for entry in entries.values() if not entry.slices}
    files = {shard: f"{prefix}.data-{shard:05d}-of-{header.num_shards:05d}" for shard in sorted(shards)}
    lengths = {shard: tf.io.gfile.stat(file).length for shard, file in files.items()}
    held = sum(lengths.values())
    promised = 0
    for key, entry in entries.items():
        name = key.decode("utf-8", "backslashreplace")
        kind, numbers, most = _kind_and_numbers(name, entry)
        size = 1 if kind in (tf.string, tf.variant, tf.resource) else kind.size  # bytes of one; of a text, at least
        promised += size * numbers
        if size * most > held or promised > held:
            raise ValueError(f"its index promises more than the {held:,} bytes of its files, {name} for one")
        if entry.slices:  # A tensor in pieces: each piece has an entry of its own.
            continue
        begin, end = entry.offset, entry.offset + entry.size
        fits = begin >= 0 and entry.size >= size * numbers and end <= lengths[entry.shard_id]
        if not fits or (kind == tf.string and not _texts_fit(files[entry.shard_id], begin, entry.size, numbers)):
            raise ValueError(f"its index promises more of {name} than is in its files")


def _kind_and_numbers(name: str, entry: tensor_bundle_pb2.BundleEntryProto) -> tuple[tf.DType, int, int]:
    """The kind of a tensor, how many numbers it has, and how many it would have if no side were 0.

    A side of 0 hides the others, which may be as large as one likes, and may be the number of classes.

    Raises:
      ValueError: where there is no such tensor.
    """
    sides = [dimension.size for dimension in entry.shape.dim]
    most = math.prod(max(side, 1) for side in sides)
    if min(sides, default=0) < 0 or most > MAX_NUMBERS or entry.shape.unknown_rank:
        raise ValueError(f"its index says that {name} has the shape {sides}")
    try:
        return tf.as_dtype(entry.dtype), math.prod(sides), most
    except TypeError as error:
        raise ValueError(f"its index says that {name} holds numbers of no kind") from error


def _texts_fit(file: str, begin: int, size: int, count: int) -> bool:
    """Whether the lengths of `count` texts, which stand before the texts themselves, do not exceed `size` bytes."""
    with tf.io.gfile.GFile(file, "rb") as opened:
        opened.seek(begin)
        content = opened.read(min(size, count * _VARINT_BYTES))
    at = total = 0
    for _ in range(count):
        length, at = _whole_number(content, at)
        total += length
    return total + at <= size


def pairs(index: bytes) -> dict[bytes, bytes]:
    """The keys and values of an index.

    Raises:
      ValueError: where it is damaged.
    """
    footer = index[-_FOOTER:]
    if len(footer) < _FOOTER or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError("its index is damaged: it does not end as an index does")
    _, at = _place(footer, 0)
    of_blocks, _ = _place(footer, at)
    found: dict[bytes, bytes] = {}
    end = keys = 0
    for _, value in _block(index, of_blocks):
        place, _ = _place(value, 0)
        if place.begin < end:  # Blocks that overlap would be read again and again.
            raise ValueError("its index is damaged: its blocks overlap")
        end = place.begin + place.size
        for key, content in _block(index, place):
            keys += len(key)
            if keys > MAX_KEYS:
                raise ValueError("its index is damaged: its keys are too long")
            found[key] = content
    return found


def _block(index: bytes, place: _Place) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block. A key is written without what it has in common with the one before.

    Behind the pairs stand the places at which a key is written whole, 4 bytes each, and their number.
    """
    block = index[place.begin : place.begin + place.size]
    if (
        len(block) < place.size
        or place.size < 4
        or index[place.begin + place.size : place.begin + place.size + 1] != b"\0"
    ):
        raise ValueError("its index is damaged: a block is cut off, or compressed")
    end = place.size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    at, key = 0, b""
    while at < end:
        shared, at = _whole_number(block, at)
        own, at = _whole_number(block, at)
        length, at = _whole_number(block, at)
        if shared > len(key) or at + own + length > end:
            raise ValueError("its index is damaged: a key or a value is cut off")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _place(content: bytes, at: int) -> tuple[_Place, int]:
    """The place of a block that is written at `at`, and what comes after it."""
    begin, at = _whole_number(content, at)
    size, at = _whole_number(content, at)
    return _Place(begin, size), at


def _whole_number(content: bytes, at: int) -> tuple[int, int]:
    """The whole number at `at`, seven bits in each byte, the lowest first, and what comes after it."""
    number = 0
    for i, byte in enumerate(content[at : at + _VARINT_BYTES]):
        number |= (byte & 127) << (7 * i)
        if byte < 128:
            return number, at + i + 1
    raise ValueError("its index is damaged: a number is cut off")
