"""Checkpoints: writing them with the config that made them, resuming a run, opening them to read."""

from __future__ import annotations

import json
import os
import tempfile
import time
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
_PROGRESS = "progress"
_CONFIG_KEY = "config/.ATTRIBUTES/py_state"
# A network or a permission that fails says nothing about the checkpoint.
_ELSEWHERE = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.PermissionDeniedError)
_UNREADABLE = (tf.errors.OpError, ValueError, RuntimeError, LookupError)  # A damaged checkpoint raises one of these.


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
            self.progress: dict[str, Any] = self.config.pop(_PROGRESS, {})
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

    Reads every tensor once; TensorFlow compares each with its checksum. A warning names every checkpoint that is
    skipped.

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
        reader = tf.train.load_checkpoint(prefix)
        for key in reader.get_variable_to_shape_map():
            if not key.startswith(only):
                continue
            value = np.asarray(reader.get_tensor(key))
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                return f"{key.removesuffix('/' + _VALUE)} holds numbers that are not finite"
    except _ELSEWHERE:
        raise
    except _UNREADABLE as error:
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
    prefix = _find_in_folder(path, where) if tf.io.gfile.isdir(path) else path.removesuffix(".index")
    if not _has_index(prefix):
        raise UserError(f"{where}: no checkpoint in it")
    return prefix


def _find_in_folder(folder: str, where: str) -> str:
    """The prefix of the newest checkpoint in `folder`; that of a SavedModel's variables; or an empty string."""
    if run_folder.checkpoints(folder):
        return newest_that_reads(folder, where, "name another checkpoint", f"{WEIGHTS}/") or ""
    try:
        listed = tf.train.latest_checkpoint(folder)
    except _UNREADABLE:  # TensorFlow's list of the checkpoints is damaged.
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
      chief: whether this process writes into model_dir. Every worker must call `save`; the others write into a
        temporary folder.

    Attributes:
      newest: the step of the newest checkpoint that was restored or saved; None where there is none.
      best: the step of the checkpoint in the folder `best`; None where there is none. A checkpoint there that is newer
        than the one that the run goes on from does not count: the run does its step again.
      save_seconds: from the call of `save` to the end of its writing, of the slowest so far.
    """

    def __init__(
        self, model_dir: str, config: Mapping[str, Any], keep: int, model: model_lib.Model, optimizer: Any,
        state: Mapping[str, Any], chief: bool = True,
    ) -> None:  # fmt: skip
        slots = {v.path.replace("/", "."): v for v in optimizer.variables if v is not optimizer.iterations}
        remembered = {WEIGHTS: model.named_weights(), "optimizer": slots, **state}
        self._names, self._all_finite = _finite_check(_variables_by_name(remembered))
        self._saved_config = SavedConfig(config)
        self._checkpoint = tf.train.Checkpoint(**remembered, step=optimizer.iterations, config=self._saved_config)
        self._step = optimizer.iterations
        self._folder, self._chief, self._keep = model_dir, chief, keep
        self._scratch = None if chief else tempfile.TemporaryDirectory()
        self._manager: tf.train.CheckpointManager | None = None
        self.newest: int | None = None
        self.best: int | None = None
        self.save_seconds = 0.0

    @property
    def progress(self) -> dict[str, Any]:
        """What the run remembers besides variables, by name, as JSON can say it: restored, and saved as it is then."""
        return self._saved_config.progress

    @progress.setter
    def progress(self, progress: Mapping[str, Any]) -> None:
        self._saved_config.progress = dict(progress)

    def resume(self, prefix: str) -> None:
        """Restores the checkpoint `prefix`, as from `newest_that_reads`.

        Raises:
          UserError: where it is of another network.
        """
        try:
            self._checkpoint.restore(prefix).assert_existing_objects_matched()
        except (*_UNREADABLE, AssertionError) as error:
            why = reason(error)[:200]
            raise UserError(f"--model_dir={self._folder}: cannot go on from {prefix}: {why}") from error
        self._manager = None  # The next save makes the folder hold what the run goes on from.
        self.newest = int(np.asarray(self._step))
        kept = run_folder.checkpoints(os.path.join(self._folder, run_folder.BEST_FOLDER))
        self.best = max((step_of(best) for best in kept if step_of(best) <= self.newest), default=None)

    def _tidy(self) -> None:
        """Makes the folder hold what this run goes on from, before it saves for the first time.

        Checkpoints that were skipped as damaged would count as the newest if they could be read again one day, so
        their names get `.skipped`. What a stopped save left is removed, and what is in the folder `best` and does not
        count. TensorFlow's list of the checkpoints, from which its manager learns which ones to delete later, says what
        is there.
        """
        _remove_unfinished(self._folder)
        _remove_all_but(self.best, os.path.join(self._folder, run_folder.BEST_FOLDER))
        there = run_folder.checkpoints(self._folder)
        for prefix in there:
            if self.newest is None or step_of(prefix) > self.newest:
                _rename(prefix, "skipped")
        self._list([prefix for prefix in there if self.newest is not None and step_of(prefix) <= self.newest])

    def _list(self, prefixes: Sequence[str]) -> None:
        """Writes TensorFlow's list of the checkpoints: `prefixes`, the newest first. Without any there is no list."""
        path = os.path.join(self._folder, run_folder.STATE_FILE)
        if not prefixes:
            if tf.io.gfile.exists(path):
                tf.io.gfile.remove(path)
            return
        lines = [f'model_checkpoint_path: "{os.path.basename(prefixes[0])}"']
        for prefix in reversed(prefixes):
            lines.append(f'all_model_checkpoint_paths: "{os.path.basename(prefix)}"')
            # The manager keeps for ever what is not newer than the last one preserved: these are newer than 0.
            lines.append(f"all_model_checkpoint_timestamps: {tf.io.gfile.stat(f'{prefix}.index').mtime_nsec / 1e9}")
        lines.append("last_preserved_timestamp: 0.0")
        run_folder.write_text(path, "\n".join(lines) + "\n")

    def save(self) -> str:
        """Writes a checkpoint of the current step. Returns its prefix.

        Raises:
          FloatingPointError: where a number of the state is not finite; nothing is written then.
          UserError: where the folder cannot be written; the checkpoints before stay.
        """
        step, began = self._finite_step(), time.monotonic()
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
        self.save_seconds = max(self.save_seconds, time.monotonic() - began)
        return prefix

    def save_best(self) -> str:
        """Writes a checkpoint of the current step into the folder `best`, in place of the one there.

        `resume` never reads it, and it does not count as the newest.

        Raises:
          FloatingPointError, UserError: as `save`.

        Returns:
          Its prefix.
        """
        step = self._finite_step()
        folder = os.path.join(self._scratch.name if self._scratch else self._folder, run_folder.BEST_FOLDER)
        prefix = os.path.join(folder, f"ckpt-{step}")
        with run_folder.writing(f"the best checkpoint, of step {step}, in --model_dir={self._folder}"):
            tf.io.gfile.makedirs(folder)
            _remove_unfinished(folder)
            self._checkpoint.write(prefix)  # Unlike a manager's `save`, it does not count the checkpoints.
            _remove_all_but(step, folder)
        self.best = step
        return prefix

    def _finite_step(self) -> int:
        """The current step. Raises FloatingPointError where a number of the state is not finite."""
        bad = self.not_finite()
        if bad:
            raise FloatingPointError(f"{bad} holds numbers that are not finite")
        return int(np.asarray(self._step))

    def set_aside_newest(self) -> None:
        """Takes the newest checkpoint out of the run, since its weights do not give a finite loss.

        Its files stay, with `.diverged` behind their names. `newest` is then the one before, or None.

        Raises:
          UserError: where the folder cannot be written.
        """
        there = run_folder.checkpoints(self._folder)
        bad = [prefix for prefix in there if step_of(prefix) == self.newest]
        good = [prefix for prefix in there if self.newest is not None and step_of(prefix) < self.newest]
        self.newest = step_of(good[0]) if good else None
        if not self._chief:
            return
        with run_folder.writing(f"--model_dir={self._folder}"):
            for prefix in bad:
                logging.warning("%s gives a loss that is not finite: it is now called %s.*.diverged", prefix, prefix)
                _rename(prefix, "diverged")
            self._list(good)

    def not_finite(self) -> str:
        """The name of the first variable with a number that is not finite; an empty string where all are."""
        finite = self._all_finite().numpy()  # [variables] bool
        return "" if finite.all() else self._names[int(np.argmin(finite))]


def _remove_unfinished(folder: str) -> None:
    """Removes what a stopped save left in `folder`."""
    for unfinished in tf.io.gfile.glob(os.path.join(folder, "ckpt-*_temp")):
        tf.io.gfile.rmtree(unfinished)


def _remove_all_but(step: int | None, folder: str) -> None:
    """Removes the checkpoints in `folder` of other steps than `step`."""
    for prefix in run_folder.checkpoints(folder):
        if step_of(prefix) != step:
            for file in tf.io.gfile.glob(f"{prefix}.*"):
                tf.io.gfile.remove(file)


def _rename(prefix: str, suffix: str) -> None:
    """Puts a suffix behind the names of a checkpoint's files, so that they count no longer."""
    for file in tf.io.gfile.glob(f"{prefix}.*"):
        if not file.endswith((".skipped", ".diverged")):
            tf.io.gfile.rename(file, f"{file}.{suffix}", overwrite=True)


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
