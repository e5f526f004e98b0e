"""Opens the weights of a network from a published checkpoint, a published SavedModel, or a checkpoint of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import checkpoint
import model as model_lib
import run_folder
import tasks
from config import Config, from_dict
from errors import UserError
from published.inference import Inferred, Shapes, count_classes, holds_encoder, infer
from published.names import Place, is_weight, release_names, tf1_names

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # the key under which a SavedModel keeps the names of its weights
# Fields that the shapes may not tell: the ratio of a squeeze that has the smallest width, ResNet-D where a network has
# the small stem and basic blocks, and the rest of a head that was cut.
LEFT_OPEN = ("sk_ratio", "se_ratio", "proj_out_dim", "num_proj_layers")
# The head layer that the classifier stands on, by the name of the published folder: .../finetuned_1pct/r50_1x_sk0
CLASSIFIER_LAYERS = {
    re.compile(r"finetuned_(1|10)pct"): 1,
    re.compile(r"finetuned_100pct|pretrained|supervised|distill_.*"): 0,
}
FOLDERS_BELOW_THE_NETWORK = ("saved_model", "hub", "variables")


def open_weights(
    path: str,
    flag: str = "checkpoint",
    given: Mapping[str, Any] | None = None,
    classifier_layer: int | None = None,
    logits: bool = False,
) -> checkpoint.Weights:
    """Opens a checkpoint for reading: one of ours or a published one.

    Args:
      path: a model_dir, a checkpoint's prefix, a folder with a TF1 checkpoint, a TF2 SavedModel; `gs://` too.
      flag: the flag that gave `path`, for messages.
      given: what the user says about the architecture, by the name of the flag. Only the fields in `LEFT_OPEN` are
        used, and only where a published file does not tell them.
      classifier_layer: the head layer that a published classifier stands on, as the user says: 0 is h, -1 the last
        layer of the head; None: the user does not say.
      logits: whether the classifier will be used. The layer that it stands on has to be known then.

    Raises:
      UserError: where there is no checkpoint; where a weight is missing, left over or of another shape; where `logits`
        is set and nothing tells which layer the classifier stands on.

    Example:
      weights = open_weights("model", "teacher", classifier_layer=1, logits=True)
    """
    prefix = checkpoint.find(path, flag)
    if checkpoint.is_ours(prefix):
        return checkpoint.Weights(path, flag, prefix)
    return PublishedWeights(path, flag, given, classifier_layer, logits)


def open_teacher(config: Config) -> checkpoint.Weights:
    """The teacher of a distillation. `config.teacher_layer` says which layer a published classifier stands on.

    Raises:
      UserError: as `open_weights`, and where the teacher has no classifier.
    """
    path = run_folder.chosen(config.teacher, config.checkpoint_choice)
    weights = open_weights(path, "teacher", classifier_layer=config.teacher_layer, logits=True)
    if not weights.has("supervised_head"):
        raise UserError(f"--teacher={config.teacher} has no supervised head: fine-tune it first")
    return weights


class PublishedWeights(checkpoint.Weights):
    """A published checkpoint as if it were one of ours. Its config is inferred from the shapes of its weights.

    Takes the arguments of `open_weights`.

    Attributes:
      layer: the head layer that the classifier stands on, by the shapes or by the path; None: neither tells.
    """

    def __init__(
        self,
        path: str,
        flag: str = "checkpoint",
        given: Mapping[str, Any] | None = None,
        classifier_layer: int | None = None,
        logits: bool = False,
    ) -> None:
        super().__init__(path, flag)  # opens the file
        self._logits = logits
        keys = self._keys()
        shapes = {name: list(self.shapes[key]) for name, key in keys.items()}
        if not holds_encoder(shapes):
            raise UserError(
                f"{self.where}: {self.prefix} holds no network of the 2020 release; of a run of this program give the "
                f"folder or a checkpoint, not a SavedModel"
            )
        inferred = infer(shapes)
        self.classes = [str(i) for i in range(count_classes(shapes))]
        answers = {name: value for name, value in (given or {}).items() if name in LEFT_OPEN}
        self.config, places = self._fit(inferred, answers, shapes)
        self._check_types(keys)
        self._places = {place: keys[name] for name, place in places.items()}
        self.step = self._read_step()
        possible = inferred.classifier_layers
        is_open = len(possible) > 1
        self.layer: int | None = 0
        if is_open:
            self.layer = published_layer(self.path)
        elif possible:
            self.layer = possible[0]
        self.config["ft_proj_selector"] = self._choose_layer(classifier_layer, must_be_known=logits and is_open)

    def _describe(self) -> None:
        """Reads nothing: a published file holds no config. `__init__` infers one from the shapes."""

    def _keys(self) -> dict[str, str]:
        """The checkpoint's key of each weight, by the weight's TF1 name."""
        if OBJECT_GRAPH not in self.shapes:
            return {name: name for name in self.shapes if is_weight(name)}
        try:
            keys = tf1_names(self._read(OBJECT_GRAPH))
        except UserError as mistake:
            raise UserError(f"{self.where}: {mistake}") from mistake
        absent = [key for key in keys.values() if key not in self.shapes]
        if absent:
            raise UserError(
                f"{self.where}: {self.prefix} may be damaged: its object graph names {absent[0]}, which is not in it"
            )
        return keys

    def _fit(
        self, inferred: Inferred, answers: Mapping[str, Any], shapes: Shapes
    ) -> tuple[dict[str, Any], dict[str, Place]]:
        """The config of the network that has these shapes, and the place of each weight in `Model.named_weights`.

        Args:
          inferred: what the shapes say.
          answers: what the user says about fields that the shapes may not tell. It is tried first.
          shapes: the shapes of the weights, by TF1 name.

        Returns:
          The config; and the places, by TF1 name.

        Raises:
          UserError: where the network that the shapes look like has other weights.
        """
        architectures = [inferred.architecture]
        if answers:
            architectures.insert(0, {**inferred.architecture, **answers})
        for architecture in architectures:
            config = {**architecture, **inferred.task, "checkpoint": self.path, "memory": "none"}
            try:
                skeleton = tasks.skeleton(from_dict(config), len(self.classes))
            except UserError as impossible:
                mismatch = str(impossible)
                continue
            names = release_names(skeleton, config["proj_head_mode"])
            mismatch = differ(shapes, {name: list(variable.shape) for name, (_, variable) in names.items()})
            if not mismatch:
                return config, {name: place for name, (place, _) in names.items()}
        raise UserError(f"{self.where} looks like a {_title(config)}, but does not fit: {mismatch}")

    def _check_types(self, keys: Mapping[str, str]) -> None:
        types = self._reader.get_variable_to_dtype_map()
        for name, key in keys.items():
            if not types[key].is_floating:
                raise UserError(f"{self.where}: {name} holds {types[key].name}, not floating-point numbers")

    def _read_step(self) -> int:
        """The step that a TF1 checkpoint was saved at; 0 where there is none."""
        if self.shapes.get("global_step") != []:
            return 0
        step = np.asarray(self._read("global_step"))
        return int(step) if np.issubdtype(step.dtype, np.integer) else 0

    def _choose_layer(self, said: int | None, must_be_known: bool) -> int:
        """The head layer that the classifier is taken to stand on.

        Args:
          said: what the user says: 0 is h, -1 the last layer of the head; None: nothing.
          must_be_known: whether the shapes, the path or the user must tell the layer without a contradiction.

        Raises:
          UserError: where the layer must be known, and is not told or is told in two ways.
        """
        if said == -1:
            said = from_dict(self.config).head_layers
        if must_be_known and self.layer is None and said is None:
            raise UserError(
                f"{self.where}: its classifier stands on the encoder or on a layer of the head, which neither the "
                f"shapes nor the path tell: give --ft_proj_selector=1 (fine-tuned on 1% or 10%) or 0 (the others)"
            )
        if must_be_known and self.layer is not None and said is not None and self.layer != said:
            raise UserError(
                f"--ft_proj_selector={said} contradicts {self.where}, whose path says that its classifier stands on "
                f"head layer {self.layer}: leave the flag out, or rename that folder"
            )
        if self.layer is not None:
            return self.layer
        return said or 0

    @property
    def named_classes(self) -> list[str] | None:
        """None: a published network has numbers for classes, not names."""
        return None

    def classes_as(self, classes: Sequence[str]) -> list[str]:
        """The data's names `classes` where the network has as many classes; otherwise the network's numbers."""
        return list(classes) if len(classes) == len(self.classes) else self.classes

    def key(self, part: str, layer: str, name: str) -> str:
        """The checkpoint's key of a weight of `Model.named_weights`; empty where the checkpoint has no such weight."""
        return self._places.get((part, layer, name), "")

    def load(self, model: model_lib.Model, parts: Sequence[str]) -> None:
        """Assigns the weights of these parts of `model` as `checkpoint.Weights` does. Logs where they come from."""
        text = f"a published {_title(self.config)} with {len(self.classes) or 'no'} classes"
        if self._logits and self.classes:
            layer = self.config["ft_proj_selector"]
            where = f"head layer {layer}" if layer else "h"
            text += f", its classifier on {where}"
        logging.warning("%s: %s", self.where, text)
        super().load(model, parts)

    def has(self, part: str) -> bool:
        """Whether the checkpoint holds this part of a model."""
        return any(place[0] == part for place in self._places)


def published_layer(path: str) -> int | None:
    """The head layer that the classifier stands on, by the name of the published folder; None where no name tells it.

    Only the last folder of `path` and the one above it are looked at.

    Args:
      path: a folder or a checkpoint in it; `gs://` too.

    Example:
      published_layer("gs://simclr-checkpoints/simclrv2/finetuned_10pct/r50_1x_sk0") == 1
    """
    absolute = path if "://" in path else os.path.abspath(path)
    folders = [name for name in absolute.split("/") if name]
    if not tf.io.gfile.isdir(path):
        folders.pop()  # the checkpoint's own name
    while folders and folders[-1] in FOLDERS_BELOW_THE_NETWORK:
        folders.pop()
    layer = None
    for name in folders[-2:]:
        for kind, layer_of_kind in CLASSIFIER_LAYERS.items():
            if kind.fullmatch(name):
                layer = layer_of_kind
    return layer


def differ(found: Shapes, expected: Shapes, most: int = 3) -> str:
    """The differences between two tables of shapes, in words; empty where there are none.

    Args:
      found, expected: the tables.
      most: how many names of each kind of difference to list; the others are counted.
    """
    reshaped = []
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            reshaped.append(f"{name} {found[name]} not {shape}")
    differences = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "of another shape": reshaped,
    }
    clauses = []
    for kind, names in differences.items():
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            clauses.append(f"{kind}: {', '.join(names[:most])}{more}")
    return "; ".join(clauses)


def _title(config: Mapping[str, Any]) -> str:
    """The network in a few words: ResNet-50 (1x+SK) with a 3-layer projection head."""
    kind = f"{config['width_multiplier']:g}x"
    if config["sk_ratio"] > 0:
        kind += "+SK"
    if config["se_ratio"] > 0:
        kind += "+SE"
    heads = {"none": "no", "linear": "a linear", "nonlinear": f"a {config['num_proj_layers']}-layer"}
    return f"ResNet-{config['resnet_depth']} ({kind}) with {heads[config['proj_head_mode']]} projection head"
