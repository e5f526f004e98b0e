"""What a command about single images does: `predict`, `embed` or `suggest`, from the images to its file.

All three pass over the images once, keep what the network makes of each as rows in parts, and end by making their file
of the rows. So none of them holds more than a part in memory, and each goes on where it was interrupted; only a
suggestion needs all features at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import tensorflow as tf

import answers.tables as tables
import checkpoint
import console
import run_folder
import strategy as strategy_lib
import tasks
from answers.every_image import EveryImage
from answers.images import Images, as_many_as_fit, find_images, fingerprint_of_images
from answers.questions import Question, feature_width, layer_of, which_class, which_feature
from answers.spreadsheet import guarded_path, write_rows
from answers.suggestion import suggest
from config import Config
from errors import UserError, one_line
from plan import footprint

SHOWN = 5  # So many unreadable images are named in the terminal.


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
        "weights": weights.fingerprint(),
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
    chosen = suggest(np.concatenate(features), is_labelled, count)
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
