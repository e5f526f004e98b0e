"""The index files of checkpoints, taken apart and put together again, with checksums that hold whatever is in them.

The format is that of LevelDB's tables: blocks of keys and values, an index of the blocks, and a footer.
"""

import struct
from pathlib import Path

from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorflow.core.protobuf import tensor_bundle_pb2

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes: two places of blocks, filled up to 40, and the magic number
TRAILER = 5  # bytes behind a block: how it is compressed, and a checksum


def _varint(number):
    parts = bytearray()
    while number > 127:
        parts.append(number % 128 + 128)
        number //= 128
    return bytes([*parts, number])


def _read_varint(content, at):
    number = shift = 0
    while True:
        number |= (content[at] & 127) << shift
        shift += 7
        at += 1
        if content[at - 1] < 128:
            return number, at


def _block(pairs):
    """A block of keys and values; every key is written whole."""
    content, restarts = b"", []
    for key, value in pairs:
        restarts.append(len(content))
        content += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
    restarts = restarts or [0]
    return content + b"".join(struct.pack("<I", at) for at in restarts) + struct.pack("<I", len(restarts))


def _read_block(content, place):
    """The keys and values of the block at a place."""
    begin, at = _read_varint(place, 0)
    size, _ = _read_varint(place, at)
    block = content[begin : begin + size]
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    at, key, pairs = 0, b"", []
    while at < end:
        shared, at = _read_varint(block, at)
        own, at = _read_varint(block, at)
        length, at = _read_varint(block, at)
        key = key[:shared] + block[at : at + own]
        pairs.append((key, block[at + own : at + own + length]))
        at += own + length
    return pairs


def entries(index):
    """The entries of an index file, by key: the header under the empty key, and where and what each tensor is."""
    content = Path(index).read_bytes()
    footer = content[-FOOTER:]
    _, at = _read_varint(footer, 0)
    _, at = _read_varint(footer, at)
    pairs = [pair for _, place in _read_block(content, footer[at:]) for pair in _read_block(content, place)]
    found = {}
    for key, value in pairs:
        kind = tensor_bundle_pb2.BundleEntryProto if key else tensor_bundle_pb2.BundleHeaderProto
        found[key] = kind.FromString(value)
    return found


def table(pairs):
    """The content of an index file with these keys and values, as bytes, sorted by key."""
    content, places = b"", []
    for block in (_block(pairs), _block([])):
        places.append(_varint(len(content)) + _varint(len(block)))
        content += block + b"\0" + struct.pack("<I", masked_crc32c(block + b"\0"))
    last = pairs[-1][0] if pairs else b""
    block = _block([(last, places[0])])
    places.append(_varint(len(content)) + _varint(len(block)))
    content += block + b"\0" + struct.pack("<I", masked_crc32c(block + b"\0"))
    return content + (places[1] + places[2]).ljust(FOOTER - 8, b"\0") + struct.pack("<Q", MAGIC)
