"""What the 2020 release calls its weights.

Both kinds of file name a weight by the kind of its layer and by the order in which the layers of that kind were made.
A TF1 checkpoint has these names as its keys: `base_model/conv2d_3/kernel`, `head_contrastive/nl_0/dense/kernel`,
`head_supervised/linear_layer/dense/bias`. A TF2 SavedModel has them in its object graph:
`resnet/block_group1/.../conv2d_3/kernel`. This package uses the TF1 names for both.
"""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

import keras
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import trackable_object_graph_pb2

import model as model_lib
from errors import UserError, reason

CLASSIFIER_SCOPE = "head_supervised/linear_layer/dense"

# What a checkpoint holds besides the weights: the optimizer's slots, moving averages of the weights, and counters.
_NOT_A_WEIGHT = re.compile(
    r"(.*/)?(Momentum|ExponentialMovingAverage|Adam(_1)?|beta[12]_power|global_step|save_counter|iter)(:0)?"
)
# <scope>/.../<kind of layer>_<its number>/<weight>
_TF2_NAME = re.compile(
    r"(?P<scope>resnet|projection_head|head_supervised|supervised_head)/(?P<path>.*/)?"
    r"(?P<kind>conv2d|(?:sync_)?batch_normalization|dense)(?:_(?P<number>[0-9]{1,9}))?/(?P<weight>\w+)(?::0)?"
)
_HEAD_LAYER = re.compile(r"n?l_\d+")  # a layer of a nonlinear head (nl_0) or of a linear one (l_0)

# The place of a weight in `Model.named_weights`: part, layer, name.
Place = tuple[str, str, str]


def is_weight(name: str) -> bool:
    """Whether `name` names a weight, and not a slot, a moving average or a counter."""
    return not _NOT_A_WEIGHT.fullmatch(name)


def release_names(model: model_lib.Model, proj_head_mode: str) -> dict[str, tuple[Place, keras.Variable]]:
    """The weights of a network, by the TF1 names that the release gives them.

    Args:
      model: the network. Only names and shapes are read.
      proj_head_mode: `linear` or `nonlinear`; the release calls their layers `l_<k>` and `nl_<k>`.

    Returns:
      For each TF1 name, in creation order, the weight's place in `Model.named_weights` and the weight.
    """
    scopes: dict[tuple[str, str], str] = {}  # by (part, layer): the TF1 name without the weight's own name
    made = {"conv2d": 0, "batch_normalization": 0}
    for layer in model.encoder.weighted_layers:
        is_convolution = isinstance(model.encoder.get_layer(layer), keras.layers.Conv2D)
        kind = "conv2d" if is_convolution else "batch_normalization"
        scopes["encoder", layer] = _encoder_scope(kind, made[kind])
        made[kind] += 1
    named = model.named_weights()
    prefix = "l" if proj_head_mode == "linear" else "nl"
    for layer in named["head"]:  # head<k>_dense or head<k>_bn, k from 1
        number, kind = layer.removeprefix("head").split("_")
        release_kind = "dense" if kind == "dense" else "batch_normalization"
        scopes["head", layer] = f"head_contrastive/{prefix}_{int(number) - 1}/{release_kind}"
    for layer in named["supervised_head"]:
        scopes["supervised_head", layer] = CLASSIFIER_SCOPE
    weights: dict[str, tuple[Place, keras.Variable]] = {}
    for (part, layer), scope in scopes.items():
        for name, variable in named[part][layer].items():
            weights[f"{scope}/{name}"] = ((part, layer, name), variable)
    return weights


def tf1_names(object_graph: bytes) -> dict[str, str]:
    """The checkpoint's key of each weight of a TF2 SavedModel, by the TF1 name of that weight.

    Layer numbers are counted from the first of their kind, since the writing process may have begun at any number. A
    weight whose name is not one of the release's keeps its name; the comparison of all shapes then reports it as left
    over.

    Args:
      object_graph: a serialized `TrackableObjectGraph`, the checkpoint's entry `_CHECKPOINTABLE_OBJECT_GRAPH`.

    Raises:
      UserError: where `object_graph` cannot be parsed, or two weights have the same TF1 name.
    """
    try:
        graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(object_graph)
    except (DecodeError, TypeError) as error:
        why = reason(error)
        raise UserError(f"the object graph in it cannot be read, it may be damaged: {why}") from error
    values = []
    for node in graph.nodes:
        for value in node.attributes:
            if value.name == "VARIABLE_VALUE" and is_weight(value.full_name):
                match = _TF2_NAME.fullmatch(value.full_name)
                values.append(_Value(value.full_name, value.checkpoint_key, match))
    first = _first_numbers(values)
    found: dict[str, _Value] = {}
    for weight in values:
        name = _tf1_name(weight.match, first) if weight.match else weight.full_name
        other = found.get(name)
        # A variable with a name that is not one of the release's may occur twice. This does not matter.
        if other and (weight.match or other.full_name != weight.full_name):
            raise UserError(f"two weights stand for {name}: {other.full_name} and {weight.full_name}")
        found[name] = weight
    return {name: weight.key for name, weight in found.items()}


class _Value(NamedTuple):
    """A variable in an object graph.

    Attributes:
      full_name: its name.
      key: its key in the checkpoint.
      match: the parts of its name; None where the name is not one of the release's.
    """

    full_name: str
    key: str
    match: re.Match | None


def _first_numbers(values: list[_Value]) -> dict[str, int]:
    """The lowest layer number in the encoder, by kind of layer."""
    first: dict[str, int] = {}
    for value in values:
        if value.match and value.match["scope"] == "resnet":
            kind = _kind(value.match)
            first[kind] = min(first.get(kind, sys.maxsize), _number(value.match))
    return first


def _tf1_name(match: re.Match, first: dict[str, int]) -> str:
    """The TF1 name that a TF2 name stands for."""
    kind = _kind(match)
    if match["scope"] == "resnet":
        scope = _encoder_scope(kind, _number(match) - first[kind])
    elif match["scope"] == "projection_head":
        layer = _HEAD_LAYER.search(match["path"] or "")
        scope = f"head_contrastive/{layer[0] if layer else '?'}/{kind}"
    else:
        scope = CLASSIFIER_SCOPE
    return f"{scope}/{match['weight']}"


def _kind(match: re.Match) -> str:
    return match["kind"].removeprefix("sync_")


def _number(match: re.Match) -> int:
    return int(match["number"] or 0)


def _encoder_scope(kind: str, number: int) -> str:
    """The TF1 scope of an encoder layer. The first layer of a kind has no number in its name."""
    return f"base_model/{kind}_{number}" if number else f"base_model/{kind}"
