"""Opening the weights of a network: a published checkpoint, a published SavedModel, or a checkpoint of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import checkpoint
import model as model_lib
import tasks
from config import Config, from_dict
from errors import UserError
from published.inference import Inferred, Shapes, count_classes, holds_encoder, infer
from published.names import Place, is_weight, release_names, tf1_names

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # where the checkpoint in a SavedModel keeps the names of its weights
# The fields that the shapes may leave open: the ratio of a squeeze that has the smallest width, ResNet-D where a
# network has the small stem and basic blocks, and the rest of a head that was cut.
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
    """Opens a checkpoint of ours or a published one to read.

    Args:
      path: a model_dir, a checkpoint's prefix, a folder with a TF1 checkpoint, a TF2 SavedModel; `gs://` too.
      flag: the flag it came by, for messages.
      given: what the user says of the architecture, by the name of the flag. It counts where a published file leaves
        it open (`LEFT_OPEN`); what the file tells, it tells itself.
      classifier_layer: what the user says of the head layer that a published classifier stands on: 0 is h, -1 the last
        layer of the head; None: nothing.
      logits: whether the classifier will be asked, so that it matters which layer it stands on.

    Raises:
      UserError: where there is none; where a weight is missing, left over or of another shape; where `logits` are
        asked for and nothing tells which layer they stand on.

    Example:
      weights = open_weights("model", "teacher", classifier_layer=1, logits=True)
    """
    prefix = checkpoint.find(path, flag)
    if checkpoint.is_ours(prefix):
        return checkpoint.Weights(path, flag, prefix)
    return PublishedWeights(path, flag, given, classifier_layer, logits)


def open_teacher(config: Config) -> checkpoint.Weights:
    """The teacher of a distillation; `ft_proj_selector` says which layer a published one's classifier stands on.

    Raises:
      UserError: as `open_weights`; where the teacher has no classifier.
    """
    weights = open_weights(config.teacher, "teacher", classifier_layer=config.teacher_layer, logits=True)
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
        self._given = {name: value for name, value in (given or {}).items() if name in LEFT_OPEN}
        self._said_layer = classifier_layer
        self._logits = logits
        super().__init__(path, flag)

    def _describe(self) -> None:
        keys = self._keys()
        shapes = {name: list(self.shapes[key]) for name, key in keys.items()}
        if not holds_encoder(shapes):
            raise UserError(
                f"{self.where}: {self.prefix} holds no network of the 2020 release; of a run of this program give the "
                f"folder or a checkpoint, not a SavedModel"
            )
        inferred = infer(shapes)
        self.classes = [str(i) for i in range(count_classes(shapes))]
        places = self._fit(inferred, shapes)
        self._check_types(keys)
        self._places = {place: keys[name] for name, place in places.items()}
        self.step = self._read_step()
        possible = inferred.classifier_layers
        is_open = len(possible) > 1
        if is_open:
            self.layer = published_layer(self.path)
        else:
            self.layer = possible[0] if possible else 0
        self.config["ft_proj_selector"] = self._choose_layer(must_be_known=self._logits and is_open)

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

    def _fit(self, inferred: Inferred, shapes: Shapes) -> dict[str, Place]:
        """Sets `config`. Returns the place of each weight in `Model.named_weights`, by TF1 name.

        What the user says of the fields that the shapes may leave open is tried first.
        """
        candidates = [inferred.architecture]
        if self._given:
            candidates.insert(0, {**inferred.architecture, **self._given})
        for architecture in candidates:
            self.config = {**architecture, **inferred.task, "checkpoint": self.path, "memory": "none"}
            try:
                skeleton = _skeleton(self.config, len(self.classes))
            except UserError as impossible:
                wrong = str(impossible)
                continue
            names = release_names(skeleton, self.config["proj_head_mode"])
            wrong = differ(shapes, {name: list(variable.shape) for name, (_, variable) in names.items()})
            if not wrong:
                return {name: place for name, (place, _) in names.items()}
        raise UserError(f"{self.where} looks like a {_title(self.config)}, but does not fit: {wrong}")

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

    def _choose_layer(self, must_be_known: bool) -> int:
        """The head layer that the classifier is taken to stand on.

        Where it `must_be_known`, the shapes, the path or the user must tell it, and they may not contradict each other.
        """
        said = self._said_layer
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
        """None: a published network numbers its classes."""
        return None

    def classes_as(self, classes: Sequence[str]) -> list[str]:
        """The names of the data's `classes`, where the data has as many as the network; else the network's numbers."""
        return list(classes) if len(classes) == len(self.classes) else self.classes

    def key(self, part: str, layer: str, name: str) -> str:
        """Where the checkpoint keeps a weight of `Model.named_weights`; empty where it does not."""
        return self._places.get((part, layer, name), "")

    def load(self, model: model_lib.Model, parts: Sequence[str]) -> None:
        """Assigns the weights of these parts of `model`, as `checkpoint.Weights` does, and logs what they are of."""
        text = f"a published {_title(self.config)} with {len(self.classes) or 'no'} classes"
        if self._logits and self.classes:
            layer = self.config["ft_proj_selector"]
            text += f", its classifier on {f'head layer {layer}' if layer else 'h'}"
        logging.warning("%s: %s", self.where, text)
        super().load(model, parts)

    def has(self, part: str) -> bool:
        """Whether the checkpoint holds this part of a model."""
        return any(place[0] == part for place in self._places)


def published_layer(path: str) -> int | None:
    """The head layer that the classifier stands on, by the name of the published folder; None where that is not told.

    Only two folders can tell: the last of `path`, and the one above it.

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
    """Where two tables of shapes differ, in words; empty where they do not.

    Args:
      found, expected: the tables.
      most: how many names of each kind of difference to list; the others are counted.
    """
    differences = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]} not {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    clauses = []
    for kind, names in differences.items():
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            clauses.append(f"{kind}: {', '.join(names[:most])}{more}")
    return "; ".join(clauses)


def _skeleton(config: Mapping[str, Any], num_classes: int) -> model_lib.Model:
    """The network of `config` without values: only names and shapes.

    Keras would give it values when this thread next builds a layer; so another thread makes it.
    """

    def build() -> model_lib.Model:
        with keras.StatelessScope(initialize_variables=False):
            return tasks.network(from_dict(config), num_classes)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(build).result()


def _title(config: Mapping[str, Any]) -> str:
    """The network in a few words: ResNet-50 (1x+SK) with a 3-layer projection head."""
    kind = f"{config['width_multiplier']:g}x"
    if config["sk_ratio"] > 0:
        kind += "+SK"
    if config["se_ratio"] > 0:
        kind += "+SE"
    heads = {"none": "no", "linear": "a linear", "nonlinear": f"a {config['num_proj_layers']}-layer"}
    return f"ResNet-{config['resnet_depth']} ({kind}) with {heads[config['proj_head_mode']]} projection head"
