"""The checksums of a checkpoint's files, in a small file beside them: `ckpt-100.sha256`, as `sha256sum -c` reads it."""

from __future__ import annotations

import hashlib
import os
import re

import tensorflow as tf

import run_folder

SUFFIX = ".sha256"
CHUNK_BYTES = 2**22
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")


def write(prefix: str) -> None:
    """Writes the checksums of the files of the checkpoint `prefix`, which are all there, whole or not at all.

    Raises:
      OSError, tf.errors.OpError: where a file cannot be read or written.
    """
    files = [file for file in sorted(run_folder.files_of(prefix)) if not file.endswith(SUFFIX)]
    lines = [f"{_checksum(file)}  {os.path.basename(file)}\n" for file in files]
    run_folder.write_text(prefix + SUFFIX, "".join(lines))


def damage(prefix: str) -> str:
    """What the checksums of the checkpoint `prefix` say against its files; an empty string where they agree.

    Older versions of this program wrote no checksums: a checkpoint without them has nothing said against it here.

    Raises:
      OSError, tf.errors.OpError: where a file cannot be read.
    """
    path = prefix + SUFFIX
    if not tf.io.gfile.exists(path):
        return ""
    with tf.io.gfile.GFile(path, "rb") as file:
        *lines, rest = file.read().decode(errors="replace").split("\n")
    found = [_LINE.fullmatch(line) for line in lines]
    wanted = {match[2]: match[1] for match in found if match}
    if rest or None in found or f"{os.path.basename(prefix)}.index" not in wanted:
        return f"{path} is damaged; if the checkpoint was copied whole, remove that file"
    for name, checksum in wanted.items():
        file_path = os.path.join(os.path.dirname(prefix), name)
        if not tf.io.gfile.exists(file_path):
            return f"{name} is gone"
        if _checksum(file_path) != checksum:
            return f"{name} does not have the checksum that {os.path.basename(path)} says"
    return ""


def _checksum(path: str) -> str:
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
