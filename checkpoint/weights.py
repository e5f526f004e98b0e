"""A checkpoint, opened to read: its config, and the weights in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import model as model_lib
import run_folder
from checkpoint.choice import find
from checkpoint.layout import CONFIG_KEY, PROGRESS, VALUE, WEIGHTS
from checkpoint.reader import UNREADABLE, open_reader
from config import ENCODER_FIELDS, HEAD_FIELDS, from_dict
from errors import UserError, reason

# What every config that was ever saved has, and what is asked of it by name.
_ALWAYS_SAVED = (*ENCODER_FIELDS, *HEAD_FIELDS, "train_mode", "image_size", "dataset", "ft_proj_selector")


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
            self._reader = open_reader(self.prefix)
            self.shapes: dict[str, list[int]] = self._reader.get_variable_to_shape_map()
        except UNREADABLE as error:
            raise self._damaged(error) from error
        self._describe()

    def _describe(self) -> None:
        if CONFIG_KEY not in self.shapes:
            raise UserError(f"{self.where}: {self.prefix} is a checkpoint of another program")
        content = self._read(CONFIG_KEY)
        try:
            saved = json.loads(content)
            self.config: dict[str, Any] = dict(saved)
            self.progress: dict[str, Any] = self.config.pop(PROGRESS, {})
            self.classes: list[str] = [str(name) for name in saved["classes"]]
            "".join(self.classes).encode()  # A name that is no text cannot be written into any file.
            from_dict(self.config)
            lacking = [name for name in _ALWAYS_SAVED if name not in self.config]
            if lacking:
                raise KeyError(f"no {lacking[0]}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{self.where}: {self.prefix} holds no config of this program: {error}") from error
        step = np.asarray(self._read(f"step/{VALUE}"))
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
        return f"{WEIGHTS}/{part}/{layer}/{name}/{VALUE}"

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
