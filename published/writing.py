"""Writes a network as a checkpoint with the release's TF1 names, for programs that read the published checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping

import tensorflow as tf

import checkpoint
import run_folder
import tasks
from config import ENCODER_FIELDS, from_dict
from errors import UserError
from published.names import release_names
from published.reading import PublishedWeights


def export(weights: checkpoint.Weights, folder: str) -> str:
    """Writes a network as a TF1-named checkpoint `folder`/model.ckpt-<step>. Returns that prefix.

    The checkpoint holds the encoder, the layers of the projection head that were built, and the supervised head, bit
    for bit.

    Raises:
      UserError: where `folder` holds a run, or cannot be written.
    """
    if run_folder.exists(os.path.join(folder, run_folder.CONFIG_FILE), f"--output={folder}"):
        raise UserError(f"--output={folder} is a run's folder, which keeps its own checkpoints: choose another")
    names = release_names(tasks.restore_network(weights), weights.config["proj_head_mode"])
    return write({name: variable.value for name, (_, variable) in names.items()}, weights.step, folder)


def write(tensors: Mapping[str, tf.Tensor], step: int, folder: str) -> str:
    """Writes `tensors` by name, and `step`, as the checkpoint `folder`/model.ckpt-<step>. Returns that prefix.

    Raises:
      UserError: where `folder` cannot be written.
    """
    named = {**tensors, "global_step": tf.constant(step, tf.int64)}
    prefix = os.path.join(folder, f"model.ckpt-{step}")
    with run_folder.writing(f"--output={folder}"):
        tf.io.gfile.makedirs(folder)
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=list(named),
            shape_and_slices=[""] * len(named),  # empty: the whole tensor
            tensors=list(named.values()),
        )
        with tf.io.gfile.GFile(os.path.join(folder, "checkpoint"), "w") as file:
            file.write(f'model_checkpoint_path: "{os.path.basename(prefix)}"\n')
    return prefix


def flags_left_open(weights: checkpoint.Weights, prefix: str) -> list[str]:
    """The flags that a user of the TF1-named checkpoint at `prefix` has to give, because the file does not tell them.

    Args:
      weights: the network that was exported to `prefix`.

    Raises:
      UserError: where the file at `prefix` is not one that `export` wrote.
    """
    told = PublishedWeights(prefix, "output")
    flags = [
        f"--{name}={weights.config[name]}"
        for name in (*ENCODER_FIELDS, "image_size")
        if weights.config[name] != told.config[name]
    ]
    layer = from_dict(weights.config).classifier_layer
    if layer != told.layer:
        flags.append(f"--ft_proj_selector={layer}")
    return flags
