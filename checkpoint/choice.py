"""Which checkpoint of a folder is meant, and whether it can be taken: it is whole, and its numbers are finite."""

from __future__ import annotations

import os

import numpy as np
import tensorflow as tf
from absl import logging

import checkpoint.checksums as checksums
import run_folder
from checkpoint.layout import CONFIG_KEY, VALUE, WEIGHTS
from checkpoint.reader import UNREADABLE, newest_listed, open_reader
from errors import UserError, reason

# A network or a permission that fails says nothing about the checkpoint.
_ELSEWHERE = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.PermissionDeniedError)


def newest_that_reads(folder: str, where: str, advice: str, only: str = "") -> str | None:
    """The prefix of the newest checkpoint of a run that can be read and holds finite numbers; None without any.

    Compares each file with its checksum, and reads each tensor once. A warning names each checkpoint that is skipped.

    Args:
      folder: the run's.
      where: what to call it in a message.
      advice: what to do where none can be taken.
      only: read only the tensors whose key begins with this.

    Raises:
      UserError: where there are checkpoints, or were, and none can be taken; where the network or a permission fails.
    """
    skipped = []
    for prefix in run_folder.checkpoints(folder):
        try:
            damage = _damage(prefix, only)
        except _ELSEWHERE as error:
            raise UserError(f"{where}: {prefix} cannot be reached: {reason(error)}: try again") from error
        if not damage:
            return prefix
        logging.warning("skipped the checkpoint %s: %s", prefix, damage)
        skipped.append(f"{os.path.basename(prefix)}: {damage}")
    if not skipped and not tf.io.gfile.exists(os.path.join(folder, run_folder.STATE_FILE)):
        return None
    reasons = "; ".join(skipped) or "the list names checkpoints whose files are gone"
    raise UserError(f"{where}: none of its checkpoints can be taken ({reasons}): {advice}")


def _damage(prefix: str, only: str) -> str:
    """Why a checkpoint cannot be taken; an empty string where it can."""
    try:
        damage = checksums.damage(prefix)
        if damage:
            return f"it is damaged: {damage}"
        reader = open_reader(prefix)
        for key in reader.get_variable_to_shape_map():
            if not key.startswith(only):
                continue
            value = np.asarray(reader.get_tensor(key))
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                return f"{key.removesuffix('/' + VALUE)} holds numbers that are not finite"
    except _ELSEWHERE:
        raise
    except UNREADABLE as error:
        return f"it cannot be read, it may be damaged: {reason(error)[:200]}"
    return ""


def find(path: str, flag: str = "checkpoint") -> str:
    """The prefix of the checkpoint that `path` means.

    Args:
      path: a prefix; the folder of a run, of which the newest checkpoint is taken that can be read; another program's
        folder of checkpoints, of which the newest is taken; or a SavedModel.
      flag: the flag it came by, for messages.

    Raises:
      UserError: where there is none, none can be read, or nothing tells which of several is the newest.
    """
    where = f"--{flag}={path}"
    if not run_folder.is_checkpoint(path, flag):
        raise UserError(f"{where}: no such folder or checkpoint")
    is_folder = tf.io.gfile.isdir(path)
    prefix = _find_in_folder(path, where) if is_folder else path.removesuffix(".index")
    if not _has_index(prefix):
        raise UserError(f"{where}: no checkpoint in it")
    if not is_folder:  # Otherwise it was chosen because it reads.
        with run_folder.reading(f"{where}: {prefix}"):
            damage = checksums.damage(prefix)
        if damage:
            raise UserError(f"{where}: {prefix} cannot be read, it is damaged: {damage}")
    return prefix


def _find_in_folder(folder: str, where: str) -> str:
    """The prefix of the newest checkpoint in `folder`; that of a SavedModel's variables; or an empty string."""
    if run_folder.checkpoints(folder):
        return newest_that_reads(folder, where, "name another checkpoint", f"{WEIGHTS}/") or ""
    listed = newest_listed(folder)
    if listed:
        return listed
    for variables in (("variables", "variables"), ("saved_model", "variables", "variables")):
        if _has_index(os.path.join(folder, *variables)):
            return os.path.join(folder, *variables)
    # The checkpoints may have been copied without TensorFlow's list of them.
    prefixes = [index.removesuffix(".index") for index in tf.io.gfile.glob(os.path.join(folder, "*.index"))]
    if len(prefixes) > 1:
        names = ", ".join(sorted(os.path.basename(prefix) for prefix in prefixes))
        raise UserError(f"{where}: none of its checkpoints is marked as the newest: name one of {names}")
    return prefixes[0] if prefixes else ""


def _has_index(prefix: str) -> bool:
    return tf.io.gfile.exists(f"{prefix}.index")


def is_ours(prefix: str) -> bool:
    """Whether a checkpoint was written by this program; a damaged one may have been."""
    try:
        return CONFIG_KEY in open_reader(prefix).get_variable_to_shape_map()
    except UNREADABLE:
        return True


def step_of(prefix: str) -> int:
    """The step in the name of a run's checkpoint."""
    return int(prefix.rsplit("-", 1)[1])
