"""Writes index files of checkpoints whose checksums hold, whatever is in them. `checkpoint/index.py` has the format."""

import struct
from pathlib import Path

from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorflow.core.protobuf import tensor_bundle_pb2

from checkpoint import index

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes: two places of blocks, filled up to 40, and the magic number


def _varint(number):
    parts = bytearray()
    while number > 127:
        parts.append(number % 128 + 128)
        number //= 128
    return bytes([*parts, number])


def _block(pairs):
    """A block of keys and values; every key is written whole."""
    content, restarts = b"", []
    for key, value in pairs:
        restarts.append(len(content))
        content += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
    restarts = restarts or [0]
    return content + b"".join(struct.pack("<I", at) for at in restarts) + struct.pack("<I", len(restarts))


def entries(prefix):
    """The entries of the index of a checkpoint, by key: the header under the empty key, and what each tensor is."""
    found = {}
    for key, value in index.pairs(Path(f"{prefix}.index").read_bytes()).items():
        kind = tensor_bundle_pb2.BundleEntryProto if key else tensor_bundle_pb2.BundleHeaderProto
        found[key] = kind.FromString(value)
    return found


def table(pairs, repeat=1):
    """The content of an index file with these keys and values, as bytes, sorted by key.

    It names their block `repeat` times.
    """
    content, places = b"", []
    for block in (_block(pairs), _block([])):
        places.append(_varint(len(content)) + _varint(len(block)))
        content += block + b"\0" + struct.pack("<I", masked_crc32c(block + b"\0"))
    last = pairs[-1][0] if pairs else b""
    block = _block([(last, places[0])] * repeat)
    places.append(_varint(len(content)) + _varint(len(block)))
    content += block + b"\0" + struct.pack("<I", masked_crc32c(block + b"\0"))
    return content + (places[1] + places[2]).ljust(FOOTER - 8, b"\0") + struct.pack("<Q", MAGIC)
