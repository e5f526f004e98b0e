"""What is asked about each image: its class, or its features."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow as tf

import answers.tables as tables
import calibration
import checkpoint
import console
import model as model_lib
import run_folder
from answers.every_image import Outputs
from config import Config
from errors import UserError

MOST_LIKELY = 5  # The table of predictions has so many classes of an image.

Columns = dict[str, pa.Array]


class Question(NamedTuple):
    """What is asked about each image.

    Attributes:
      outputs: what the network is to compute.
      columns: from the outputs of n images, as arrays, to the columns of n rows.
      depends_on: what the columns depend on besides the network and the images.
    """

    outputs: Outputs
    columns: Callable[[Mapping[str, np.ndarray]], Columns]
    depends_on: Mapping[str, Any]


def which_class(
    config: Config, weights: checkpoint.Weights, model: model_lib.Model, classes_of_data: Sequence[str]
) -> Question:
    """Asks for the most likely classes of an image, the first of them first, and their probabilities.

    Raises:
      UserError: where the network has no classifier.
    """
    if not model.supervised_head:
        raise UserError(
            f"{weights.where} has no classifier: fine-tune it first, by --train_mode=finetune "
            f"--checkpoint={weights.path}, or write its features, by --mode=embed"
        )
    classes = np.array(weights.named_classes or weights.classes_as(classes_of_data), object)
    count = min(MOST_LIKELY, len(classes))
    temperature = kept_temperature(weights) if config.calibrate else None

    network = model.inference()

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = tf.cast(network(images).logits, tf.float32)  # [n, classes]
        probabilities, numbers = tf.math.top_k(tf.nn.softmax(logits / (temperature or 1.0)), count)
        return {"probability": probabilities, "number": numbers}  # [n, count], [n, count]

    def columns(answers: Mapping[str, np.ndarray]) -> Columns:
        made: Columns = {}
        for place in range(count):
            suffix = f"_{place + 1}" if place else ""
            numbers = answers["number"][:, place].astype(np.int64)
            made[f"class{suffix}"] = pa.array(classes[numbers], pa.string())
            made[f"probability{suffix}"] = pa.array(answers["probability"][:, place])
        return made

    return Question(outputs, columns, {"classes": classes.tolist(), calibration.TEMPERATURE: temperature})


def kept_temperature(weights: checkpoint.Weights) -> float | None:
    """The temperature that the evaluation of these very weights has found; None, and a word about it, without one.

    Raises:
      UserError: where the result of the evaluation cannot be read.
    """
    path = os.path.join(os.path.dirname(weights.prefix), f"result_{weights.step}.json")
    temperature = None
    if run_folder.exists(path, path):
        where = f"{path}, which --calibrate=False leaves out,"
        with run_folder.reading(where), tf.io.gfile.GFile(path) as file:
            result = json.loads(file.read())
        if not isinstance(result, dict):
            raise UserError(f"{where} is damaged: it is not the result of an evaluation")
        temperature = result.get(calibration.TEMPERATURE)
        if temperature is not None and not calibration.is_temperature(temperature):
            raise UserError(f"{where} is damaged: its {calibration.TEMPERATURE} is {temperature!r}")
    if temperature is None:
        console.say(
            f"the probabilities are the network's own, and often too high: --mode=eval of the run finds a temperature "
            f"for them, where it has {calibration.LEAST_LABELS} labelled images that the run was not trained on"
        )
    return temperature


def which_feature(config: Config, weights: checkpoint.Weights, model: model_lib.Model) -> Question:
    """Asks for the output of a layer of the network.

    Raises:
      UserError: where the network has no such layer.
    """
    layer = layer_of(config, weights, model)

    network = model.inference()

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"feature": network(images).hiddens[layer]}

    def columns(answers: Mapping[str, np.ndarray]) -> Columns:
        return {tables.FEATURE: tables.feature_column(answers["feature"])}

    return Question(outputs, columns, {"layer": layer})


def layer_of(config: Config, weights: checkpoint.Weights, model: model_lib.Model) -> int:
    """The layer of the projection head that `embed_layer` means; 0: h.

    Raises:
      UserError: where the network has no such layer.
    """
    layers = len(model.head.outputs) if model.head else 0
    if config.embed_layer > layers:
        has = f"{layers} layers of the projection head" if layers else "no projection head"
        raise UserError(f"--embed_layer={config.embed_layer}: {weights.where} has {has}: choose -1 to {layers}")
    return layers if config.embed_layer == -1 else config.embed_layer


def feature_width(model: model_lib.Model, layer: int) -> int:
    """How many numbers a feature of this layer has."""
    outputs = [model.encoder.output["final_avg_pool"], *(model.head.outputs if model.head else [])]
    return outputs[layer].shape[-1]
