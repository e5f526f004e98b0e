"""Checkpoints: writing them with the config that made them, resuming a run, starting from another's weights."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import model as model_lib
from config import Config
from errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS = "weights"  # the checkpoint's key for the model
_VALUE = ".ATTRIBUTES/VARIABLE_VALUE"
_CONFIG_KEY = "config/.ATTRIBUTES/py_state"
_UNREADABLE = (tf.errors.OpError, ValueError, RuntimeError, LookupError)  # what a damaged checkpoint raises
_PACKAGES = ("tensorflow", "keras", "numpy", "tensorflow-datasets")


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
      path: a model_dir (its newest checkpoint) or a checkpoint's prefix.
      flag: the flag it came by, for messages.

    Attributes:
      config: the config of the run that made it.
      classes: the names of the classes.
      step: the step it was saved at.

    Raises:
      UserError: where there is no such checkpoint, or it is not one of this program's.
    """

    def __init__(self, path: str, flag: str = "checkpoint") -> None:
        self.path, self.where = path, f"--{flag}={path}"
        self.prefix = find(path, flag)
        try:
            self._reader = tf.train.load_checkpoint(self.prefix)
            self.shapes: dict[str, list[int]] = self._reader.get_variable_to_shape_map()
        except _UNREADABLE as error:
            raise self._damaged(error) from error
        self._describe()

    def _describe(self) -> None:
        if _CONFIG_KEY not in self.shapes:
            raise UserError(f"{self.where}: {self.prefix} is a checkpoint of another program")
        saved = json.loads(self._read(_CONFIG_KEY))
        self.config: dict[str, Any] = saved
        self.classes: list[str] = saved["classes"]
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
        reason = " ".join(str(error).split())
        return UserError(f"{self.where}: {self.prefix} cannot be read, it may be damaged: {reason}")

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


def find(path: str, flag: str = "checkpoint") -> str:
    """The prefix of the checkpoint that `path` means: a prefix, a folder of checkpoints (its newest), a SavedModel.

    Raises:
      UserError: where there is none.
    """
    where, prefix = f"--{flag}={path}", path.removesuffix(".index")
    if not exists(path, flag):
        raise UserError(f"{where}: no such folder or checkpoint")
    if tf.io.gfile.isdir(path):
        saved_models = [os.path.join(path, *above, "variables", "variables") for above in ((), ("saved_model",))]
        prefix = tf.train.latest_checkpoint(path) or next(filter(_is_checkpoint, saved_models), "")
        # Copied without the folder's `checkpoint` file, which names the newest.
        alone = [index.removesuffix(".index") for index in tf.io.gfile.glob(os.path.join(path, "*.index"))]
        if not prefix and len(alone) > 1:
            names = ", ".join(sorted(map(os.path.basename, alone)))
            raise UserError(f"{where}: none of its checkpoints is marked as the newest: name one of {names}")
        prefix = prefix or "".join(alone)
    if not _is_checkpoint(prefix):
        raise UserError(f"{where}: no checkpoint in it")
    return prefix


def exists(path: str, flag: str = "checkpoint") -> bool:
    """Whether there is a folder or a checkpoint at `path`.

    Raises:
      UserError: where that cannot be told, a bucket without a network.
    """
    return _exists(path, f"--{flag}={path}") or _is_checkpoint(path.removesuffix(".index"))


def _exists(path: str, where: str) -> bool:
    try:
        return tf.io.gfile.exists(path)
    except tf.errors.OpError as error:
        raise UserError(f"{where} cannot be reached: {error.message.splitlines()[0]}") from error


def _is_checkpoint(prefix: str) -> bool:
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
      config: what `describe` returned; saved inside each.
      keep: how many to keep.
      model: the network.
      optimizer: with its step, `optimizer.iterations`.
      state: what else the run must remember.
      chief: whether this process writes into model_dir; every worker must call `save`, the others' files go.
    """

    def __init__(
        self, model_dir: str, config: Mapping[str, Any], keep: int, model: model_lib.Model, optimizer: Any,
        state: Mapping[str, Any], chief: bool = True,
    ) -> None:  # fmt: skip
        slots = {v.path.replace("/", "."): v for v in optimizer.variables if v is not optimizer.iterations}
        self._checkpoint = tf.train.Checkpoint(**{
            WEIGHTS: model.named_weights(), "optimizer": slots, "step": optimizer.iterations,
            "config": SavedConfig(json.dumps(config)), **state,
        })  # fmt: skip
        self._folder = model_dir
        self._latest = tf.train.latest_checkpoint(model_dir)
        self._scratch = None if chief else tempfile.TemporaryDirectory()
        folder = self._scratch.name if self._scratch else model_dir
        self._manager = tf.train.CheckpointManager(self._checkpoint, folder, max_to_keep=keep, checkpoint_name="ckpt")
        self._step = optimizer.iterations

    def resume(self) -> int:
        """Restores the newest checkpoint, if there is one. Returns the step."""
        if self._latest:
            try:
                self._checkpoint.restore(self._latest).assert_existing_objects_matched()
            except (*_UNREADABLE, AssertionError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"--model_dir={self._folder}: cannot resume from {self._latest}, damaged? Delete it to go "
                    f"on from the one before: {reason}"
                ) from error
        return int(np.asarray(self._step))

    def save(self) -> str:
        """Writes a checkpoint of the current step. Returns its prefix."""
        return self._manager.save(checkpoint_number=int(np.asarray(self._step)))


def describe(config: Mapping[str, Any], classes: Sequence[str], examples: int) -> dict[str, Any]:
    """What config.json holds: the hyper-parameters, the data's classes, versions and the git commit."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        **config, "classes": list(classes), "train_examples": examples, "versions": versions,
        "git_commit": _git_commit(),
    }  # fmt: skip


def _git_commit() -> str | None:
    """The commit of this program, with `+` where its files have changed since; None outside a git checkout."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
        done = [subprocess.run(c, cwd=folder, capture_output=True, text=True, timeout=10, check=True) for c in commands]
    except (OSError, subprocess.SubprocessError):
        return None
    return done[0].stdout.strip() + ("+" if done[1].stdout.strip() else "")


def write_config(model_dir: str, description: Mapping[str, Any]) -> None:
    """Writes config.json into `model_dir`, which it makes where needed.

    Raises:
      UserError: where it cannot be written.
    """
    try:
        tf.io.gfile.makedirs(model_dir)
        write_json(os.path.join(model_dir, CONFIG_FILE), description)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"--model_dir={model_dir} cannot be written: {error}") from error


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    with tf.io.gfile.GFile(f"{path}.tmp", "w") as file:
        file.write(text)
    tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)


def is_of_run(config: Config) -> bool:
    """Whether `config` is about the run in `model_dir`; else none lives there, and `checkpoint` itself is asked."""
    return config.mode not in ("eval", "export") or read_config(config.model_dir) is not None


def read_config(model_dir: str) -> dict[str, Any] | None:
    """The config of the run that lives in `model_dir`; None where none does.

    Raises:
      UserError: where `model_dir` is not a folder, or holds checkpoints of another program.
    """
    where = f"--model_dir={model_dir}"
    if _exists(model_dir, where) and not tf.io.gfile.isdir(model_dir):
        raise UserError(f"{where} is a file: give a folder")
    path = os.path.join(model_dir, CONFIG_FILE)
    if not tf.io.gfile.exists(path):
        if tf.io.gfile.isdir(model_dir) and tf.train.latest_checkpoint(model_dir):
            raise UserError(f"{where} holds checkpoints of another program: choose another folder")
        return None
    try:
        with tf.io.gfile.GFile(path) as file:
            saved = json.loads(file.read())
    except ValueError as error:
        raise UserError(f"{where}: {CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(saved, dict) or not {"train_mode", "resnet_depth", "classes"} <= set(saved):
        raise UserError(f"{where}: {CONFIG_FILE} is of another program: choose another folder")
    return saved
