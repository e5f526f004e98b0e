"""Checkpoints: writing them with the config that made them, resuming a run, opening them to read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import model as model_lib
import run_folder
from config import from_dict
from errors import UserError, reason

WEIGHTS = "weights"  # The model stands under this key in a checkpoint.
_VALUE = ".ATTRIBUTES/VARIABLE_VALUE"
_CONFIG_KEY = "config/.ATTRIBUTES/py_state"
_UNREADABLE = (tf.errors.OpError, ValueError, RuntimeError, LookupError)  # A damaged checkpoint raises one of these.


class SavedConfig(tf.train.experimental.PythonState):
    """A run's config inside its checkpoints, so that a checkpoint needs nothing beside it."""

    def __init__(self, content: str) -> None:
        self.content = content

    def serialize(self) -> str:
        return self.content

    def deserialize(self, content: str) -> None:
        """The running config stays: it may have changed what a run may change, such as train_steps."""


class Weights:
    """A checkpoint of ours, opened to read: its config and the weights of its model.

    Args:
      path: a run's folder, of which the newest checkpoint that can be read is taken, or a checkpoint's prefix.
      flag: the flag it came by, for messages.

    Attributes:
      prefix: the checkpoint's.
      config: the config of the run that made it.
      classes: the names of the classes.
      step: the step it was saved at.

    Raises:
      UserError: where there is no such checkpoint, it is damaged, or it is not one of this program's.
    """

    def __init__(self, path: str, flag: str = "checkpoint") -> None:
        self.path, self.where = path, f"--{flag}={path}"
        self.prefix = find(path, flag)
        if len(run_folder.checkpoints(path)) > 1:
            self.prefix = newest_that_reads(path, self.where, f"{WEIGHTS}/") or self.prefix
        try:
            self._reader = tf.train.load_checkpoint(self.prefix)
            self.shapes: dict[str, list[int]] = self._reader.get_variable_to_shape_map()
        except _UNREADABLE as error:
            raise self._damaged(error) from error
        self._describe()

    def _describe(self) -> None:
        if _CONFIG_KEY not in self.shapes:
            raise UserError(f"{self.where}: {self.prefix} is a checkpoint of another program")
        content = self._read(_CONFIG_KEY)
        try:
            saved = json.loads(content)
            self.config: dict[str, Any] = dict(saved)
            self.classes: list[str] = [str(name) for name in saved["classes"]]
            from_dict(self.config)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.where}: {self.prefix} holds no config of this program: {error}") from error
        self.step = int(self._read(f"step/{_VALUE}"))

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
        except _UNREADABLE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.where}: {self.prefix} cannot be read, it may be damaged: {reason(error)}")

    def has(self, part: str) -> bool:
        """Whether the checkpoint holds this part of a model."""
        return any(key.startswith(f"{WEIGHTS}/{part}/") for key in self.shapes)

    def load(self, model: model_lib.Model, parts: Sequence[str]) -> None:
        """Assigns the weights of these parts (`encoder`, `head`, `supervised_head`) of `model`.

        Raises:
          UserError: naming the first weight that is missing or of another shape.
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
                    variable.assign(self._read(key))


def newest_that_reads(folder: str, where: str, only: str = "") -> str | None:
    """The prefix of the newest checkpoint of a run that can be read and holds finite numbers; None without any.

    Reads every tensor once, which compares it with its checksum. What is skipped is named in a warning.

    Args:
      folder: the run's.
      where: what to call it in a message.
      only: read the tensors alone whose key begins so.

    Raises:
      UserError: where there are checkpoints, or were, and none can be taken.
    """
    skipped = []
    for prefix in run_folder.checkpoints(folder):
        damage = _damage(prefix, only)
        if not damage:
            return prefix
        logging.warning("skipped the checkpoint %s: %s", prefix, damage)
        skipped.append(f"{os.path.basename(prefix)}: {damage}")
    if not skipped and not tf.io.gfile.exists(os.path.join(folder, run_folder.STATE_FILE)):
        return None
    reasons = "; ".join(skipped) or "they are listed but gone"
    raise UserError(
        f"{where}: none of its checkpoints can be taken ({reasons}): put one back, or choose another --model_dir to "
        f"start again"
    )


def _damage(prefix: str, only: str) -> str:
    """Why a checkpoint cannot be taken; an empty string where it can."""
    try:
        reader = tf.train.load_checkpoint(prefix)
        for key in reader.get_variable_to_shape_map():
            if not key.startswith(only):
                continue
            value = np.asarray(reader.get_tensor(key))
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                return f"{key.removesuffix('/' + _VALUE)} holds numbers that are not finite"
    except _UNREADABLE as error:
        return f"it cannot be read, it may be damaged: {reason(error)[:200]}"
    return ""


def find(path: str, flag: str = "checkpoint") -> str:
    """The prefix of the checkpoint that `path` means.

    Args:
      path: a prefix, a folder of checkpoints, of which the newest is meant, or a SavedModel.
      flag: the flag it came by, for messages.

    Raises:
      UserError: where there is none, or nothing tells which of several is the newest.
    """
    where = f"--{flag}={path}"
    if not run_folder.is_checkpoint(path, flag):
        raise UserError(f"{where}: no such folder or checkpoint")
    prefix = _find_in_folder(path, where) if tf.io.gfile.isdir(path) else path.removesuffix(".index")
    if not _has_index(prefix):
        raise UserError(f"{where}: no checkpoint in it")
    return prefix


def _find_in_folder(folder: str, where: str) -> str:
    """The prefix of the newest checkpoint in `folder`; that of a SavedModel's variables; or an empty string."""
    of_run = run_folder.checkpoints(folder)
    if of_run:
        return of_run[0]
    try:
        listed = tf.train.latest_checkpoint(folder)
    except _UNREADABLE:  # TensorFlow's list of the checkpoints is damaged
        listed = None
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
        return _CONFIG_KEY in tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
    except _UNREADABLE:
        return True


class RunCheckpoints:
    """The checkpoints of one run.

    Args:
      model_dir: where they live.
      config: what `run_folder.describe` returned; saved inside each.
      keep: how many to keep.
      model: the network.
      optimizer: with its step, `optimizer.iterations`.
      state: what else the run must remember.
      chief: whether this process writes into model_dir; every worker must call `save`, the others' files go.

    Attributes:
      newest: the step of the newest checkpoint that was restored or saved; None where there is none.
    """

    def __init__(
        self, model_dir: str, config: Mapping[str, Any], keep: int, model: model_lib.Model, optimizer: Any,
        state: Mapping[str, Any], chief: bool = True,
    ) -> None:  # fmt: skip
        slots = {v.path.replace("/", "."): v for v in optimizer.variables if v is not optimizer.iterations}
        remembered = {WEIGHTS: model.named_weights(), "optimizer": slots, **state}
        self._names, self._all_finite = _finite_check(_variables_by_name(remembered))
        self._checkpoint = tf.train.Checkpoint(
            **remembered, step=optimizer.iterations, config=SavedConfig(json.dumps(config))
        )
        self._step = optimizer.iterations
        self._folder, self._chief, self._keep = model_dir, chief, keep
        self._scratch = None if chief else tempfile.TemporaryDirectory()
        self._manager: tf.train.CheckpointManager | None = None
        self.newest: int | None = None

    def resume(self, prefix: str | None) -> int:
        """Restores the checkpoint `prefix`, as from `newest_that_reads`. Returns its step; 0 where it is None.

        Newer ones that were skipped are overwritten when the run comes to their steps again.

        Raises:
          UserError: where it is of another network.
        """
        if prefix is None:
            return 0
        try:
            self._checkpoint.restore(prefix).assert_existing_objects_matched()
        except (*_UNREADABLE, AssertionError) as error:
            why = reason(error)[:200]
            raise UserError(f"--model_dir={self._folder}: cannot go on from {prefix}: {why}") from error
        self.newest = int(np.asarray(self._step))
        return self.newest

    def _tidy(self) -> None:
        """Makes TensorFlow's list of the checkpoints say what is here, and removes what a stopped save left."""
        for unfinished in tf.io.gfile.glob(os.path.join(self._folder, "ckpt-*_temp")):
            tf.io.gfile.rmtree(unfinished)
        if self.newest is None:
            return
        good = [prefix for prefix in run_folder.checkpoints(self._folder) if step_of(prefix) <= (self.newest or 0)]
        lines = [f'model_checkpoint_path: "{os.path.basename(good[0])}"']
        for prefix in reversed(good):  # from the oldest to the newest
            written = tf.io.gfile.stat(f"{prefix}.index").mtime_nsec / 1e9
            lines.append(f'all_model_checkpoint_paths: "{os.path.basename(prefix)}"')
            lines.append(f"all_model_checkpoint_timestamps: {written}")
        lines.append("last_preserved_timestamp: 0.0")  # No checkpoint is kept for ever.
        run_folder.write_text(os.path.join(self._folder, run_folder.STATE_FILE), "\n".join(lines) + "\n")

    def save(self) -> str:
        """Writes a checkpoint of the current step. Returns its prefix.

        Raises:
          FloatingPointError: where a number of the state is not finite; nothing is written then.
          UserError: where the folder cannot be written; the checkpoints before stay.
        """
        bad = self.not_finite()
        if bad:
            raise FloatingPointError(f"{bad} holds numbers that are not finite")
        step = int(np.asarray(self._step))
        folder = self._scratch.name if self._scratch else self._folder
        with run_folder.writing(f"the checkpoint of step {step} in --model_dir={self._folder}"):
            if self._manager is None:
                if self._chief:
                    self._tidy()
                self._manager = tf.train.CheckpointManager(
                    self._checkpoint, folder, max_to_keep=self._keep, checkpoint_name="ckpt"
                )
            prefix = self._manager.save(checkpoint_number=step)
        self.newest = step
        return prefix

    def set_aside_newest(self) -> None:
        """Takes the newest checkpoint out of the run, since its weights do not give a finite loss.

        Its files stay, with `.diverged` behind their names. `newest` is then the one before, or None.
        """
        bad = os.path.join(self._folder, f"ckpt-{self.newest}")
        good = [prefix for prefix in run_folder.checkpoints(self._folder) if step_of(prefix) < (self.newest or 0)]
        self.newest = step_of(good[0]) if good else None
        if not self._chief:
            return
        for file in tf.io.gfile.glob(f"{bad}.*"):
            tf.io.gfile.rename(file, f"{file}.diverged", overwrite=True)
        if good:
            self._tidy()
        else:
            tf.io.gfile.remove(os.path.join(self._folder, run_folder.STATE_FILE))

    def not_finite(self) -> str:
        """The name of the first variable with a number that is not finite; an empty string where all are."""
        finite = self._all_finite().numpy()  # [variables] bool
        return "" if finite.all() else self._names[int(np.argmin(finite))]


def step_of(prefix: str) -> int:
    """The step in the name of a run's checkpoint."""
    return int(prefix.rsplit("-", 1)[1])


def _variables_by_name(structure: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every variable of floating-point numbers in nested dicts and modules, with the path to it."""
    if isinstance(structure, Mapping):
        pairs = list(structure.items())
    elif isinstance(structure, tf.Module):
        pairs = [(variable.name.split(":")[0], variable) for variable in structure.variables]
    else:
        is_float = tf.as_dtype(structure.dtype).is_floating
        return [(name, structure)] if is_float else []
    found = []
    for key, value in pairs:
        found += _variables_by_name(value, f"{name}/{key}" if name else key)
    return found


def _finite_check(named: Sequence[tuple[str, Any]]) -> tuple[list[str], Callable[[], tf.Tensor]]:
    """The names of variables, and a compiled function that says of each whether all its numbers are finite."""

    @tf.function(autograph=False)
    def check() -> tf.Tensor:
        finite = [tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(variable))) for _, variable in named]
        return tf.stack(finite)  # [variables] bool

    return [name for name, _ in named], check
