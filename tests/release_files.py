"""Files as the 2020 release writes them, of small random networks: TF1 checkpoints and TF2 SavedModels."""

import numpy as np
import tensorflow as tf
from helpers import randomize
from tensorflow.core.protobuf import trackable_object_graph_pb2

import config
import published
import tasks
from published import writing

SMALL = dict(width_multiplier=0.125, image_size=64, memory="none", proj_out_dim=16)


def names_of(model, given):
    return {
        name: v for name, (_, v) in published.release_names(model, given.get("proj_head_mode", "nonlinear")).items()
    }


def network(classes=5, **given):
    """A network with values of its own, and its variables by TF1 name."""
    model = tasks.network(config.Config(**{**SMALL, **given}), classes)
    randomize(model.variables, seed=3)
    return model, names_of(model, given)


def written(folder, classes=5, more=None, without=(), **given):
    """The folder of a TF1 checkpoint of a random network, and the network."""
    model, variables = network(classes, **given)
    tensors = {name: variable.value for name, variable in variables.items() if name not in without}
    writing.write({**tensors, **(more or {})}, 7, str(folder))
    return str(folder), model


def written_raw(folder, tensors):
    """The folder of a checkpoint that holds these tensors and nothing else; names may be bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tf.raw_ops.SaveV2(
        prefix=f"{folder}/model.ckpt-1", tensor_names=list(tensors), shape_and_slices=[""] * len(tensors),
        tensors=list(tensors.values()),
    )  # fmt: skip
    return str(folder)


def object_graph(names):
    """The serialized object graph of variables, from name to the checkpoint's key."""
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    for full_name, key in names.items():
        graph.nodes.add().attributes.add(name="VARIABLE_VALUE", full_name=full_name, checkpoint_key=key)
    return graph.SerializeToString()


def images(size=32):
    return np.random.default_rng(0).random([2, size, size, 3], np.float32)


def saved_model(folder, offset=0, twin="", **given):
    """A TF2 SavedModel named as the release names its own, of a random network, with a weight more; and the network."""
    model, variables = network(**given)
    module = tf.Module()
    for i, (name, variable) in enumerate(variables.items()):
        scope, layer, *_, weight = name.split("/")
        kind, number = (
            (layer.rsplit("_", 1) if layer[-1].isdigit() else (layer, 0)) if scope == "base_model" else ("", 0)
        )
        number = int(number) + offset
        numbered = {"conv2d": "conv2d", "batch_normalization": "sync_batch_normalization"}.get(kind)
        full = f"resnet/block_group1/some_block/{numbered}" + (f"_{number}" if number else "") + f"/{weight}"
        if scope == "head_contrastive":
            full = f"projection_head/{name.split('/', 1)[1]}".replace("batch_norm", "x/sync_batch_norm")
            full = full.replace("/dense/", f"/linear_layer_{i}/dense_{i}/").replace(
                "_normalization/", f"_normalization_{i}/"
            )
        if scope == "head_supervised":
            full = f"head_supervised/linear_layer_9/dense_9/{weight}"
        setattr(module, f"v{i}", tf.Variable(variable.value, name=full))
    module.step = tf.Variable(0, name="global_step")
    if twin:
        module.twin = tf.Variable(0, name=twin)
    tf.saved_model.save(module, str(folder))
    return model
