"""The published checkpoints, in and out: TF1 checkpoints and TF2 SavedModels of the 2020 release.

Both name their weights by layer kind and creation order. A TF1 checkpoint does so in its keys
(`base_model/conv2d_3/kernel`, `head_contrastive/nl_0/dense/kernel`, `head_supervised/linear_layer/dense/bias`), a TF2
SavedModel in its object graph (`resnet/block_group1/.../conv2d_3/kernel`). `open_weights` reads either, or a
checkpoint of ours; `python published.py export` writes any of them as a TF1 checkpoint, for existing converters.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from console import quiet_import

with quiet_import():
    import keras
    import tensorflow as tf
    from absl import logging
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    import checkpoint
    import model as model_lib
    import resnet
    import run_folder
    import tasks
    from config import ENCODER_FIELDS, Config, from_dict
    from errors import UserError

Shapes = dict[str, list[int]]

# The optimizer's slots, moving averages and counters beside the weights.
IGNORED = re.compile(
    r"(.*/)?(Momentum|ExponentialMovingAverage|Adam(_1)?|beta[12]_power|global_step|save_counter|iter)(:0)?"
)
# scope / ... / kind of layer _ its number / weight
TF2_NAME = re.compile(
    r"(?P<scope>resnet|projection_head|head_supervised|supervised_head)/(?P<path>.*/)?"
    r"(?P<kind>conv2d|(?:sync_)?batch_normalization|dense)(?:_(?P<number>\d+))?/(?P<weight>\w+)(?::0)?"
)
# The head layer below the classifier, by the published folder: .../finetuned_1pct/r50_1x_sk0
ROUTES = {r"finetuned_(1|10)pct": 1, r"finetuned_100pct|pretrained|supervised|distill_.*": 0}
CONVOLUTION = r"base_model/conv2d(?:_(\d+))?/kernel"
HEAD_LAYER = r"head_contrastive/nl_(\d+)/dense/kernel"
CLASSIFIER = "head_supervised/linear_layer/dense/kernel"
# What the shapes may leave open: the ratio of a squeeze of the smallest width, the rest of a head that was cut.
LEFT_OPEN = ("sk_ratio", "se_ratio", "proj_out_dim", "num_proj_layers")
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
PAPER_SK_RATIO, USUAL_SE_RATIO = 0.0625, 0.25


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
      given: the flags the user gave about it: an architecture that the file leaves open, the `ft_proj_selector`.
      logits: whether the classifier will be asked, so that it matters which layer it stands on.

    Raises:
      UserError: where there is none; where a weight is missing, left over or of another shape; where `logits` are
        asked for and nothing tells which layer they stand on.
    """
    prefix = checkpoint.find(path, flag)
    if checkpoint.is_ours(prefix):
        return checkpoint.Weights(path, flag)
    return PublishedWeights(
        path,
        flag,
        {**(given or {}), **({} if classifier_layer is None else {"ft_proj_selector": classifier_layer})},
        logits,
    )


def open_teacher(config: Config) -> checkpoint.Weights:
    """The teacher of a distillation; the config says which head layer a published one's classifier stands on."""
    weights = open_weights(config.teacher, "teacher", {}, config.teacher_layer, logits=True)
    if not weights.has("supervised_head"):
        raise UserError(f"--teacher={config.teacher} has no supervised head: fine-tune it first")
    return weights


class PublishedWeights(checkpoint.Weights):
    """A published checkpoint as if it were one of ours, its config inferred from the shapes of its weights."""

    def __init__(self, path: str, flag: str, given: Mapping[str, Any], logits: bool) -> None:
        self._given, self._logits = given, logits
        super().__init__(path, flag)

    def _describe(self) -> None:
        keys = self._keys()
        shapes = {name: list(self.shapes[key]) for name, key in keys.items()}
        if not any(re.fullmatch(CONVOLUTION, name) and len(shape) == 4 for name, shape in shapes.items()):
            raise UserError(
                f"{self.where}: {self.prefix} holds no network of the 2020 release; of a run of this program give the "
                f"folder or a checkpoint, not a SavedModel"
            )
        inferred = infer(shapes)
        self.classes = [str(i) for i in range((*shapes.get(CLASSIFIER, []), 0, 0)[1])]
        open_fields = {name: self._given[name] for name in LEFT_OPEN if name in self._given}
        for architecture in ({**inferred.architecture, **open_fields}, inferred.architecture):
            self.config = {**architecture, **inferred.task, "checkpoint": self.path, "memory": "none"}
            try:
                names = release_names(_skeleton(self.config, len(self.classes)), self.config["proj_head_mode"])
            except UserError as impossible:
                wrong = str(impossible)
                continue
            wrong = differ(shapes, {name: list(variable.shape) for name, (_, variable) in names.items()})
            if not wrong:
                break
        if wrong:
            raise UserError(f"{self.where} looks like a {_title(self.config)}, but does not fit: {wrong}")
        self._places = {place: keys[name] for name, (place, _) in names.items()}
        self.step = int(self._read("global_step")) if self.shapes.get("global_step") == [] else 0
        fit = inferred.classifier_layers
        self.layer = published_layer(self.path) if len(fit) > 1 else next(iter(fit), 0)  # None: neither tells
        self.config["ft_proj_selector"] = self._route(asked=self._logits and len(fit) > 1)

    def _keys(self) -> dict[str, str]:
        """The checkpoint's key of each weight, by the weight's TF1 name."""
        if OBJECT_GRAPH not in self.shapes:
            return {name: name for name in self.shapes if not IGNORED.fullmatch(name)}
        try:
            return tf1_names(self._read(OBJECT_GRAPH))
        except UserError as mistake:
            raise UserError(f"{self.where}: {mistake}") from mistake

    def _route(self, asked: bool) -> int:
        """The head layer to take; where it is `asked` for, the path or a flag must say which, and not two of them."""
        known, given = self.layer, self._given.get("ft_proj_selector")
        given = from_dict(self.config).head_layers if given == -1 else given
        if asked and known is None and given is None:
            raise UserError(
                f"{self.where}: its classifier stands on the encoder or on a layer of the head, which neither the "
                f"shapes nor the path tell: give --ft_proj_selector=1 (fine-tuned on 1% or 10%) or 0 (the others)"
            )
        if asked and None not in (known, given) and known != given:
            raise UserError(
                f"--ft_proj_selector={given} contradicts {self.where}, whose path says that its classifier stands on "
                f"head layer {known}: leave the flag out, or rename that folder"
            )
        return known if known is not None else given or 0

    @property
    def named_classes(self) -> list[str] | None:
        return None

    def classes_as(self, classes: Sequence[str]) -> list[str]:
        """The network's classes are numbers; they go by the names of data with as many."""
        return list(classes) if len(classes) == len(self.classes) else self.classes

    def key(self, part: str, layer: str, name: str) -> str:
        return self._places.get((part, layer, name), "")

    def load(self, model: model_lib.Model, parts: Sequence[str]) -> None:
        layer = self.config["ft_proj_selector"]
        stands = f", its classifier on {f'head layer {layer}' if layer else 'h'}" * bool(self._logits and self.classes)
        told = self.where, _title(self.config), len(self.classes) or "no", stands
        logging.warning("%s: a published %s with %s classes%s", *told)
        super().load(model, parts)

    def has(self, part: str) -> bool:
        return any(place[0] == part for place in self._places)


def published_layer(path: str) -> int | None:
    """The head layer the classifier stands on, by the published folder: the last of `path` or the one above it."""
    folders = [name for name in (path if "://" in path else os.path.abspath(path)).split("/") if name]
    if not tf.io.gfile.isdir(path):  # a checkpoint in it
        folders.pop()
    while folders and folders[-1] in ("saved_model", "hub", "variables"):
        folders.pop()
    layers = [layer for name in folders[-2:] for kind, layer in ROUTES.items() if re.fullmatch(kind, name)]
    return layers[-1] if layers else None


class Inferred(NamedTuple):
    """What the shapes of a published network say.

    Attributes:
      architecture: the fields of `Config` about encoder and head.
      task: the fields that make `tasks.network` build it whole.
      classifier_layers: the head layers that are as wide as the classifier's input, mostly all but the last; 0 is h.
    """

    architecture: dict[str, Any]
    task: dict[str, Any]
    classifier_layers: list[int]


def infer(shapes: Shapes) -> Inferred:
    """Reads a network off the shapes of its weights by TF1 name, of which one is a convolution's at least."""
    numbers = {name: re.fullmatch(CONVOLUTION, name) for name in shapes}
    kernels = {int(match[1] or 0): shapes[name] for name, match in numbers.items() if match and len(shapes[name]) == 4}

    def kernel(number: int) -> list[int]:
        """[height, width, in, out] of a convolution; one that is missing will be named when all are compared."""
        return kernels.get(number, [0, 0, 0, 0])

    resnet_d = kernel(1)[0] == 3  # its stem is three 3x3 convolutions
    stem, total = 3 if resnet_d else 1, max(kernels) + 1
    cifar_stem = not resnet_d and kernel(0)[0] == 3
    width = kernel(stem - 1)[3] or kernel(stem)[2]
    bottleneck = kernel(stem)[3] == 4 * width  # the first shortcut
    selective = bottleneck and kernel(stem + 2) == [3, 3, width, 2 * width]
    squeezes = any(name.startswith("base_model/conv2d") and name.endswith("/bias") for name in shapes)
    in_block = (5 if selective else 3 if bottleneck else 2) + 2 * squeezes
    kind, blocks = resnet.BOTTLENECK if bottleneck else resnet.BASIC, (total - stem - 4) / in_block
    depths = [depth for depth, (of_kind, _) in resnet.BLOCKS.items() if of_kind == kind]
    last_width = 8 * width
    sk_squeeze, se_squeeze = kernel(total - 3 - 2 * squeezes)[3], kernel(total - 2)[3]
    usual_sk = max(int(last_width * PAPER_SK_RATIO), 32) == sk_squeeze or not selective
    usual_se = int(last_width * USUAL_SE_RATIO) == se_squeeze
    head = [int(match[1]) for name in shapes if (match := re.fullmatch(HEAD_LAYER, name))]
    linear = "head_contrastive/l_0/dense/kernel" in shapes
    last = max(head, default=0)
    # The last layer of a whole head has no offset: one that has is a middle layer, from which a model was fine-tuned.
    cut = f"head_contrastive/nl_{last}/batch_normalization/beta" in shapes
    out = (*shapes.get(f"head_contrastive/{'l' if linear else 'nl'}_{last}/dense/kernel", []), 0, 0)[1] or 128
    h, layers = last_width * (4 if bottleneck else 1), last + 1 if head or linear else 0
    widths = [h] * (layers + 1) if cut or not layers else [h] * layers + [out]
    # A network of ours that was fine-tuned from a middle layer ends where its classifier begins.
    fit = [layer for layer in range(layers + 1) if [widths[layer]] == shapes.get(CLASSIFIER, [])[:1]]
    fit = [layers] if cut else fit
    architecture = dict(
        resnet_depth=min(depths, key=lambda depth: abs(sum(resnet.BLOCKS[depth][1]) - blocks)),
        width_multiplier=width / 64,
        sk_ratio=0.0 if not (selective or resnet_d) else PAPER_SK_RATIO if usual_sk else sk_squeeze / last_width,
        se_ratio=0.0 if not squeezes else USUAL_SE_RATIO if usual_se else se_squeeze / last_width,
        proj_head_mode="linear" if linear else "nonlinear" if head else "none",
        proj_out_dim=128 if cut else out,
        num_proj_layers=last + 1 + cut if head else 3,
    )
    task = dict(
        image_size=32 if cifar_stem else 224,
        train_mode="finetune" if cut else "pretrain",
        ft_proj_selector=min(fit, default=0),
        lineareval_while_pretraining=CLASSIFIER in shapes,
    )
    return Inferred(architecture, task, fit)


def tf1_names(object_graph: bytes) -> dict[str, str]:
    """The checkpoint's key of each weight of a TF2 SavedModel, by the TF1 name its name in the object graph stands for.

    Numbers count from the first layer of a kind, wherever the process that wrote the file had begun to count.

    Raises:
      UserError: where two weights stand for one.
    """
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(object_graph)
    values = [value for node in graph.nodes for value in node.attributes if value.name == "VARIABLE_VALUE"]
    keys = [(value.full_name, value.checkpoint_key) for value in values if not IGNORED.fullmatch(value.full_name)]
    parsed = [TF2_NAME.fullmatch(name) for name, _ in keys]
    first: dict[str, int] = {}
    for match in parsed:
        if match and match["scope"] == "resnet":
            kind = match["kind"].removeprefix("sync_")
            first[kind] = min(first.get(kind, sys.maxsize), int(match["number"] or 0))
    named: dict[str, tuple[str, str]] = {}
    for (full_name, key), match in zip(keys, parsed, strict=True):
        name = full_name
        if match:
            kind, layer = match["kind"].removeprefix("sync_"), re.search(r"n?l_\d+", match["path"] or "")
            number = int(match["number"] or 0) - first.get(kind, 0)
            scope = {
                "resnet": f"base_model/{kind}" + (f"_{number}" if number else ""),
                "projection_head": f"head_contrastive/{layer[0] if layer else '?'}/{kind}",
            }.get(match["scope"], "head_supervised/linear_layer/dense")
            name = f"{scope}/{match['weight']}"
        if name in named and (match or named[name][0] != full_name):
            raise UserError(f"two weights stand for {name}: {named[name][0]} and {full_name}")
        named[name] = full_name, key
    return {name: key for name, (_, key) in named.items()}


def release_names(
    model: model_lib.Model, proj_head_mode: str
) -> dict[str, tuple[tuple[str, str, str], keras.Variable]]:
    """Each weight of `model` and its place in `Model.named_weights`, by TF1 name, in creation order."""
    scopes, count = {}, {"conv2d": 0, "batch_normalization": 0}
    for layer in model.encoder.weighted_layers:
        kind = "conv2d" if isinstance(model.encoder.get_layer(layer), keras.layers.Conv2D) else "batch_normalization"
        scopes["encoder", layer] = f"base_model/{kind}" + (f"_{count[kind]}" if count[kind] else "")
        count[kind] += 1
    named = model.named_weights()
    for layer in named["head"]:  # head<k>_dense or head<k>_bn, k from 1
        k, kind = layer.removeprefix("head").split("_")
        scope = f"head_contrastive/{'l' if proj_head_mode == 'linear' else 'nl'}_{int(k) - 1}"
        scopes["head", layer] = f"{scope}/{'dense' if kind == 'dense' else 'batch_normalization'}"
    for layer in named["supervised_head"]:
        scopes["supervised_head", layer] = "head_supervised/linear_layer/dense"
    return {
        f"{scope}/{name}": ((part, layer, name), variable)
        for (part, layer), scope in scopes.items()
        for name, variable in named[part][layer].items()
    }


def export(weights: checkpoint.Weights, folder: str) -> str:
    """Writes a network as a TF1-named checkpoint `folder`/model.ckpt-<step>. Returns that prefix.

    Encoder, projection head as far as it was built, and supervised head; bit for bit.

    Raises:
      UserError: where a run lives in `folder`, or it cannot be written.
    """
    if run_folder.exists(os.path.join(folder, run_folder.CONFIG_FILE), f"--output={folder}"):
        raise UserError(f"--output={folder} is a run's folder, whose checkpoints would be mixed up: choose another")
    names = release_names(tasks.restore_network(weights), weights.config["proj_head_mode"])
    return write({name: variable.value for name, (_, variable) in names.items()}, weights.step, folder)


def write(tensors: Mapping[str, tf.Tensor], step: int, folder: str) -> str:
    """Writes `tensors` by name, and the step, as the checkpoint `folder`/model.ckpt-<step>. Returns that prefix."""
    tensors = {**tensors, "global_step": tf.constant(step, tf.int64)}
    prefix = os.path.join(folder, f"model.ckpt-{step}")
    names, values = list(tensors), list(tensors.values())
    try:
        tf.io.gfile.makedirs(folder)
        tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=values)
        with tf.io.gfile.GFile(os.path.join(folder, "checkpoint"), "w") as file:
            file.write(f'model_checkpoint_path: "{os.path.basename(prefix)}"\n')
    except tf.errors.OpError as error:
        raise UserError(f"--output={folder} cannot be written: {error.message.splitlines()[0]}") from error
    return prefix


def differ(found: Shapes, expected: Shapes, most: int = 3) -> str:
    """Where two tables of shapes differ, in words; `most` names of each kind."""
    wrong = [
        ("missing", [name for name in expected if name not in found]),
        ("left over", [name for name in found if name not in expected]),
        (
            "of another shape",
            [f"{n} {found[n]} not {shape}" for n, shape in expected.items() if n in found and found[n] != shape],
        ),
    ]
    return "; ".join(
        f"{what}: {', '.join(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")
        for what, names in wrong
        if names
    )


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
    """The network in a few words: ResNet-50 (1x+SK)."""
    kinds = "".join(f"+{kind}" for kind in ("SK", "SE") if config[f"{kind.lower()}_ratio"] > 0)
    head = {"none": "no", "linear": "a linear"}.get(config["proj_head_mode"], f"a {config['num_proj_layers']}-layer")
    return f"ResNet-{config['resnet_depth']} ({config['width_multiplier']:g}x{kinds}) with {head} projection head"


def main(argv: Sequence[str] | None = None) -> int:
    """`python published.py export --checkpoint=... --output=...`. Returns the exit status."""
    parser = argparse.ArgumentParser(description="The published checkpoints, in and out.")
    command = parser.add_subparsers(dest="command", required=True).add_parser("export", help=export.__doc__)
    command.add_argument("--checkpoint", required=True, help="a model_dir, a checkpoint or a published model")
    command.add_argument("--output", required=True, help="the folder for the TF1-named checkpoint")
    arguments = parser.parse_args(argv)
    try:
        weights = open_weights(arguments.checkpoint)
        prefix = export(weights, arguments.output)
        read = PublishedWeights(prefix, "output", {}, logits=False)
    except UserError as mistake:
        print(f"published.py: error: {mistake}", file=sys.stderr)
        return 2
    print(prefix)
    fields = {name: (weights.config[name], read.config[name]) for name in (*ENCODER_FIELDS, "image_size")}
    fields["ft_proj_selector"] = from_dict(weights.config).classifier_layer, read.layer
    untold = [f"--{name}={ours}" for name, (ours, told) in fields.items() if ours != told]
    if untold:
        print(f"what the file does not tell: {' '.join(untold)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
