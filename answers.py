"""Answers about single images: their classes (predict), their features (embed), and which to label next (suggest).

All three pass over the images once, keep what the network makes of each as rows in parts, and end by making their file
of the rows. So none of them holds more than a part in memory, and each goes on where it was interrupted; only a
suggestion needs all features at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow as tf

import calibration
import checkpoint
import console
import data
import model as model_lib
import run_folder
import sources
import strategy as strategy_lib
import suggestion
import tables
import tasks
from config import AUTO_SPLIT, DATA_FIELDS, Config
from errors import UserError, one_line
from every_image import EveryImage, Outputs
from plan import footprint
from sources import lists
from spreadsheet import guarded_path, write_rows

MOST_LIKELY = 5  # The table of predictions has so many classes of an image.
MAX_BYTES = 2**30  # The features of a suggestion take at most so much. Of more images it sees a draw.
DRAW_SEED = 0
SHOWN = 5  # So many unreadable images are named in the terminal.

Columns = dict[str, pa.Array]


class Images(NamedTuple):
    """The images that a command is about.

    Attributes:
      source: they are among its examples.
      names: of all examples of the source, as `names_of` gives them.
      labelled: [n] bool, of all examples: whether they have a label.
      wanted: the positions of the images, ascending.
    """

    source: sources.Source
    names: Sequence[str]
    labelled: np.ndarray
    wanted: np.ndarray


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


def answer(config: Config, strategy: tf.distribute.Strategy, weights: checkpoint.Weights) -> None:
    """Does what `config.mode` says, `predict`, `embed` or `suggest`: writes `config.output`, and says what is in it.

    Beside it, `<output>.json` says what it was made of, and which images cannot be read and why.

    Args:
      config: what to do, with which images.
      strategy: where to compute: the devices of one machine.
      weights: the network.

    Raises:
      UserError: where the images or the network are not what is needed, or a file cannot be read or written.
      FloatingPointError: where the network's outputs are not finite.
      KeyboardInterrupt: on Ctrl-C, saying that the same command goes on.
    """
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise UserError(f"--mode={config.mode} runs on one machine: unset TF_CONFIG, or give --strategy=mirrored")
    replicas = strategy.num_replicas_in_sync
    strategy_lib.check_batch("eval_batch_size", config.eval_batch_size, replicas)
    if config.mode == "suggest" and os.path.exists(config.output):
        raise UserError(f"--output={config.output} is there, and labels may be filled in: choose another name")
    images = find_images(config)
    footprint.check_evaluation_memory(config, replicas, len(weights.classes), strategy_lib.device_memory(strategy))
    with strategy.scope():
        model = tasks.restore_network(weights)
    if config.mode == "predict":
        question = which_class(config, weights, model, images.source.classes)
    else:
        question = which_feature(config, weights, model)
    if config.mode == "suggest":
        images = as_many_as_fit(images, feature_width(model, layer_of(config, weights, model)))
    about = {
        "mode": config.mode,
        "weights": fingerprint_of_weights(weights),
        "images": fingerprint_of_images(images),
        "image_size": config.image_size,
        **question.depends_on,
    }
    parts = tables.Parts(config.output, about)
    every_image = EveryImage(question.outputs, images.source, config, strategy, images.wanted)
    fill(parts, every_image, images, question, config, weights.step)
    unreadable = parts.unreadable()
    check_some_are_read(unreadable, len(images.wanted))
    about |= {"network": weights.prefix, "step": weights.step}
    if config.mode == "suggest":
        write_suggested(config, images, parts)
    else:
        tables.write(parts, config.output, about)
    with run_folder.writing(f"--output={config.output}.json"):
        run_folder.write_json(f"{config.output}.json", {**about, "unreadable": unreadable})
    parts.remove()
    console.say(in_words(config, len(images.wanted), unreadable))


def find_images(config: Config) -> Images:
    """The images that the flags mean: see the help of `predict_split` and `unlabelled_only`.

    A suggestion is about the images of `train_split`, the labelled ones too.

    Raises:
      UserError: where there are none, or they cannot be listed.
    """
    suggests = config.mode == "suggest"
    split = "" if suggests else config.predict_split
    if suggests or config.unlabelled_only:
        split = split or config.train_split
        source = labelled_source(config, split)
    elif config.dataset == "image_folder" and not split:
        source = sources.load_folder(config.data_dir, config.max_image_pixels)
        if config.images:
            source = listed_alone(source, config)
    else:
        split = split or config.eval_split
        source = data.open_split(config, split, None)
    names, labels = names_of(source, config.data_dir), source.index()[1]
    labelled = labels >= 0
    free = int((~labelled).sum())
    if (suggests or config.unlabelled_only) and not free:
        raise UserError(
            f"all {len(names)} images of {split} have a label: if their folders are no classes, put all of them into "
            f"one folder {split}/all"
        )
    if suggests and config.count > free:
        raise UserError(f"--count={config.count}: of {len(names)} images of {split}, {free} have no label")
    wanted = np.flatnonzero(~labelled) if config.unlabelled_only and not suggests else np.arange(len(names))
    return Images(source, names, labelled, wanted)


def names_of(source: sources.Source, data_dir: str) -> Sequence[str]:
    """What the examples of a source are called: a file by its path from `data_dir`, also where it is in a split."""
    if not isinstance(source, sources.FileSource):
        return source.index()[0]
    folder = os.path.relpath(source.root, data_dir)
    return source.names if folder == "." else [os.path.join(folder, name) for name in source.names]


def listed_alone(source: sources.FileSource, config: Config) -> sources.FileSource:
    """Of every image in the folder those that are in the list `--images`.

    Raises:
      UserError: where the list cannot be read, or names none of them.
    """
    listed = lists.read_images(config.images, config.data_dir)
    found = np.array([name in listed for name in source.names], bool)
    if not found.any():
        raise UserError(f"--images={config.images}: none of its {len(listed)} images is in {config.data_dir}")
    return source.take(np.flatnonzero(found))


def labelled_source(config: Config, split: str) -> sources.Source:
    """All images of a split, with the labels that the run may see, those too that it holds out to evaluate on."""
    fields = ("data_dir", "labels", "images", "max_image_pixels", "max_corrupt_fraction", *DATA_FIELDS)
    whole = Config(**{**{name: getattr(config, name) for name in fields}, "train_split": split})
    holds_out = config.eval_split == AUTO_SPLIT and split == config.train_split
    if not (holds_out and config.subset):
        return data.train_source(whole, None)[0]
    # Its labels were drawn from the images that it does not hold out.
    kept = dataclasses.replace(whole, eval_split=AUTO_SPLIT)
    _, drawn = data.train_source(kept, None)
    return data.open_split(whole, split, None).with_labels(drawn or [], only=False)


def as_many_as_fit(images: Images, width: int) -> Images:
    """The images whose features, of `width` numbers each, fit into `MAX_BYTES`.

    Of more, it is a draw. At least half of it are images without a label, or all of these.
    """
    limit = MAX_BYTES // (4 * width)
    if len(images.wanted) <= limit:
        return images
    console.say(f"{limit:,} of {len(images.wanted):,} images are drawn: the features of more do not fit into memory")
    random = np.random.default_rng(DRAW_SEED)
    labelled = random.permutation(np.flatnonzero(images.labelled))
    free = random.permutation(np.flatnonzero(~images.labelled))
    labelled = labelled[: max(limit // 2, limit - len(free))]
    free = free[: limit - len(labelled)]
    return images._replace(wanted=np.sort(np.concatenate([labelled, free])))


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

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = tf.cast(model(images, training=False).logits, tf.float32)  # [n, classes]
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

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"feature": model(images, training=False).hiddens[layer]}

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


def fingerprint_of_weights(weights: checkpoint.Weights) -> str:
    """A text that no other weights have: of the checkpoint's index, which holds a checksum of each tensor."""
    with run_folder.reading(weights.prefix), tf.io.gfile.GFile(f"{weights.prefix}.index", "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def fingerprint_of_images(images: Images) -> str:
    """A text that no other choice of images has."""
    return hashlib.sha256(images.source.fingerprint.encode() + images.wanted.tobytes()).hexdigest()


def fill(
    parts: tables.Parts, every_image: EveryImage, images: Images, question: Question, config: Config, step: int
) -> None:
    """Adds a row to `parts` for each image that has none yet.

    Raises:
      FloatingPointError, KeyboardInterrupt, UserError: as `answer`.
    """
    count = len(images.wanted)
    if parts.rows:
        console.say(f"{parts.rows:,} of {count:,} images were done before")
    try:
        for batch in every_image.batches(parts.rows, config.mode):
            bad = sum(int((~np.isfinite(values)).any(1).sum()) for values in batch.values() if values.ndim == 2)
            if bad:
                raise FloatingPointError(
                    f"the outputs for {bad} of {len(batch['position'])} images are not finite at step {step}: "
                    f"the network has diverged; train again with a lower --learning_rate"
                )
            paths = [images.names[position] for position in batch["position"]]
            unreadable = pa.array(batch["unreadable"], pa.string())
            columns = {tables.PATH: pa.array(paths, pa.string()), **question.columns(batch)}
            parts.add(pa.table({**columns, tables.UNREADABLE: unreadable}))
    except KeyboardInterrupt:
        parts.flush()
        raise KeyboardInterrupt(f"at image {parts.rows:,} of {count:,}: the same command goes on from there") from None
    parts.flush()


def check_some_are_read(unreadable: Mapping[str, str], count: int) -> None:
    """Raises UserError where all of `count` images are unreadable."""
    if len(unreadable) == count:
        path, why = next(iter(unreadable.items()))
        raise UserError(f"none of {count} images can be read, the first is {path}: {why}")


def write_suggested(config: Config, images: Images, parts: tables.Parts) -> None:
    """Writes the paths of the images to label next, the most useful first, with an empty column for their labels.

    Raises:
      UserError: where the file cannot be written.
    """
    paths, features, labelled = [], [], []
    first = 0
    for table in parts.tables():
        read = np.array(table[tables.UNREADABLE].to_pylist(), object) == ""
        positions = images.wanted[first : first + len(table)][read]
        first += len(table)
        paths += [images.names[position] for position in positions]
        labelled.append(images.labelled[positions])
        features.append(tables.features_of(table)[read])
    is_labelled = np.concatenate(labelled)
    count = min(config.count, int((~is_labelled).sum()))
    chosen = suggestion.suggest(np.concatenate(features), is_labelled, count)
    with run_folder.writing(f"--output={config.output}"):
        unfinished = f"{config.output}.tmp"
        with open(unfinished, "w", encoding="utf-8", newline="") as file:
            write_rows(file, [["path", "label"], *([guarded_path(paths[i]), ""] for i in chosen)])
        os.replace(unfinished, config.output)


def in_words(config: Config, count: int, unreadable: Mapping[str, str]) -> str:
    """What was done, in a line or a few."""
    answered = count - len(unreadable)
    done = {
        "predict": f"{config.output}: the classes of {answered:,} images",
        "embed": f"{config.output}: the features of {answered:,} images",
        "suggest": f"{config.output}: the images to label next; fill in their labels",
    }
    lines = [done[config.mode]]
    if unreadable:
        lines.append(f"{len(unreadable):,} of {count:,} images cannot be read (all in {config.output}.json):")
        lines += [one_line(f"  {path}: {why}") for path, why in list(unreadable.items())[:SHOWN]]
    return "\n".join(lines)
