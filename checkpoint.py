"""Checkpoints, opened to read: which of a folder is meant, whether it is whole, and the weights in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import checkpoint_reader
import checksums
import model as model_lib
import run_folder
from config import ENCODER_FIELDS, HEAD_FIELDS, from_dict
from errors import UserError, reason

WEIGHTS = "weights"  # The model stands under this key in a checkpoint.
_VALUE = ".ATTRIBUTES/VARIABLE_VALUE"
_PROGRESS = "progress"
_CONFIG_KEY = "config/.ATTRIBUTES/py_state"
# What every config that was ever saved has, and what is asked of it by name.
_ALWAYS_SAVED = (*ENCODER_FIELDS, *HEAD_FIELDS, "train_mode", "image_size", "dataset", "ft_proj_selector")
# A network or a permission that fails says nothing about the checkpoint.
_ELSEWHERE = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.PermissionDeniedError)
UNREADABLE = (tf.errors.OpError, ValueError, RuntimeError, LookupError)  # A damaged checkpoint raises one of these.


class SavedConfig(tf.train.experimental.PythonState):
    """A run's config inside its checkpoints, so that a checkpoint needs nothing beside it.

    Attributes:
      config: what `run_folder.describe` returned.
      progress: what else the run remembers of its way to the checkpoint's step, by name, as JSON can say it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.progress: dict[str, Any] = {}

    def serialize(self) -> str:
        return json.dumps({**self.config, _PROGRESS: self.progress} if self.progress else self.config)

    def deserialize(self, content: str) -> None:
        """Takes the progress. The running command's config holds: flags such as --train_steps may have changed."""
        self.progress = json.loads(content).get(_PROGRESS, {})


class Weights:
    """A checkpoint of ours, opened to read: its config and the weights of its model.

    Args:
      path: a run's folder or a checkpoint's prefix, as for `find`.
      flag: the flag it came by, for messages.
      prefix: what `find` returned for `path`, where that is known already.

    Attributes:
      prefix: the checkpoint's.
      config: the config of the run that made it.
      progress: what else that run remembered of its way to this step, by name.
      classes: the names of the classes.
      step: the step it was saved at.

    Raises:
      UserError: where there is no such checkpoint, it is damaged, or it is not one of this program's.
    """

    def __init__(self, path: str, flag: str = "checkpoint", prefix: str = "") -> None:
        self.path, self.where = path, f"--{flag}={path}"
        self.prefix = prefix or find(path, flag)
        try:
            self._reader = checkpoint_reader.open_reader(self.prefix)
            self.shapes: dict[str, list[int]] = self._reader.get_variable_to_shape_map()
        except UNREADABLE as error:
            raise self._damaged(error) from error
        self._describe()

    def _describe(self) -> None:
        if _CONFIG_KEY not in self.shapes:
            raise UserError(f"{self.where}: {self.prefix} is a checkpoint of another program")
        content = self._read(_CONFIG_KEY)
        try:
            saved = json.loads(content)
            self.config: dict[str, Any] = dict(saved)
            self.progress: dict[str, Any] = self.config.pop(_PROGRESS, {})
            self.classes: list[str] = [str(name) for name in saved["classes"]]
            "".join(self.classes).encode()  # A name that is no text cannot be written into any file.
            from_dict(self.config)
            lacking = [name for name in _ALWAYS_SAVED if name not in self.config]
            if lacking:
                raise KeyError(f"no {lacking[0]}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{self.where}: {self.prefix} holds no config of this program: {error}") from error
        step = np.asarray(self._read(f"step/{_VALUE}"))
        if step.shape or not np.issubdtype(step.dtype, np.integer) or step < 0:
            raise UserError(f"{self.where}: {self.prefix} does not say at which step it was saved: it may be damaged")
        self.step = int(step)

    def fingerprint(self) -> str:
        """The SHA-256 of the checkpoint's index. The index has a checksum of every weight, so this stands for them.

        It stays the same where the checkpoint is moved or copied.

        Raises:
          UserError: where it cannot be read.
        """
        with run_folder.reading(self.where), tf.io.gfile.GFile(f"{self.prefix}.index", "rb") as index:
            return hashlib.sha256(index.read()).hexdigest()

    @property
    def named_classes(self) -> list[str] | None:
        """The names of the classes, by which a folder's can be numbered; None where only their number is known."""
        return self.classes

    def classes_as(self, classes: Sequence[str]) -> list[str]:
        """The network's classes, for data that calls its own `classes`."""
        return self.classes

    def key(self, part: str, layer: str, name: str) -> str:
        """Where the checkpoint keeps a weight of `Model.named_weights`."""
        return f"{WEIGHTS}/{part}/{layer}/{name}/{_VALUE}"

    def _read(self, key: str) -> Any:
        try:
            return self._reader.get_tensor(key)
        except UNREADABLE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.where}: {self.prefix} cannot be read, it may be damaged: {reason(error)}")

    def has(self, part: str) -> bool:
        """Whether the checkpoint holds this part of a model."""
        return any(key.startswith(f"{WEIGHTS}/{part}/") for key in self.shapes)

    def load(self, model: model_lib.Model, parts: Sequence[str]) -> None:
        """Assigns the weights of these parts (`encoder`, `head`, `supervised_head`) of `model`.

        Raises:
          UserError: naming the first weight that is missing, of another shape or not finite.
        """
        named = model.named_weights()
        for part in parts:
            for layer, variables in named[part].items():
                for name, variable in variables.items():
                    key = self.key(part, layer, name)
                    have, want = self.shapes.get(key), list(variable.shape)
                    if have != want:
                        found = f"is {have} there and {want} here" if have else "is not in it"
                        raise UserError(f"{self.where} does not fit this network: {part}/{layer}/{name} {found}")
                    value = self._read(key)
                    if not np.isfinite(value).all():
                        raise UserError(
                            f"{self.where}: {part}/{layer}/{name} holds numbers that are not finite, its run has "
                            f"diverged: name an older checkpoint"
                        )
                    variable.assign(value)


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
        reader = checkpoint_reader.open_reader(prefix)
        for key in reader.get_variable_to_shape_map():
            if not key.startswith(only):
                continue
            value = np.asarray(reader.get_tensor(key))
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                return f"{key.removesuffix('/' + _VALUE)} holds numbers that are not finite"
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
    listed = checkpoint_reader.newest_listed(folder)
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
        return _CONFIG_KEY in checkpoint_reader.open_reader(prefix).get_variable_to_shape_map()
    except UNREADABLE:
        return True


def step_of(prefix: str) -> int:
    """The step in the name of a run's checkpoint."""
    return int(prefix.rsplit("-", 1)[1])
