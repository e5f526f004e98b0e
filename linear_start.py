"""Fine-tuning that starts from a linear classifier on the pretrained features (LP-FT, arXiv 2202.10054).

Where few images have labels, a classifier that starts at random moves the features before it has learnt anything, and
they do not come back. One that fits them already leaves them nearly as they are.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

import checkpoint
import console
import predict
import quality
import sources
import strategy as strategy_lib
import tasks
from errors import UserError

MOST_IMAGES = 10_000  # Of more labelled images, a draw of as many of each class as there may be.
# Of batch norm's averages, the share that may still be what they began with. With more of it the features that the
# classifier fits are not those of training, which normalises by the batch: after 3 steps of pretraining the first loss
# was 344, after 23 it was 2.3.
UNSETTLED = 0.1


def start(
    task: tasks.Task, source: sources.Source, strategy: tf.distribute.Strategy, weights: checkpoint.Weights
) -> None:
    """Gives the supervised head of `task` the weights of `quality.linear_classifier`, on the layer that it stands on.

    The classifier learns from the central crops of the labelled images. After a pretraining of so few steps that batch
    norm's averages are not settled, the head stays as it is, and one line says so.

    Args:
      task: its network has the weights to start from.
      source: the training set, with the labels that the run may see.
      strategy: where to compute. Every worker gets the weights that the chief has found. Call this outside its scope,
        where the data's own variables would be shared among the workers.
      weights: those that `task` started from.

    Raises:
      UserError: where all labels are of one class.
      FloatingPointError: where a feature is not finite.
    """
    began_with = _share_of_beginning(weights)
    if began_with > UNSETTLED:
        console.say(
            f"--linear_start is left out: after the {weights.step} steps of {weights.prefix}, batch norm's averages "
            f"are still {began_with:.0%} what they began with"
        )
        return
    head = task.model.supervised_head
    assert head is not None
    with strategy.scope():
        network = task.model.inference()

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"h": network(images).hiddens[task.model.ft_proj_selector]}

    settings = dataclasses.replace(task.config, eval_batch_size=task.config.train_batch_size)
    passes = predict.predict(outputs, source, settings, strategy, MOST_IMAGES, labelled_only=True, what="linear start")
    batches = list(predict.only_finite(passes, weights.step))
    features = np.concatenate([batch["h"] for batch in batches])  # [m, D]
    labels = np.concatenate([batch["label"] for batch in batches])  # [m]
    if len(set(labels)) < 2:
        raise UserError(
            "a linear start needs labels of at least two classes, and all are of one: label images of the others, or "
            "give --linear_start=False"
        )
    found = quality.linear_classifier(features, labels)
    kernel = np.zeros(head.kernel.shape, np.float32)  # [D, C]
    bias = np.full(head.bias.shape, found.bias.min(), np.float32)  # [C]; a class without a label has the least
    kernel[:, found.classes], bias[found.classes] = found.kernel, found.bias
    kernel, bias = _of_chief(strategy, kernel), _of_chief(strategy, bias)
    with strategy.scope():
        head.kernel.assign(kernel)
        head.bias.assign(bias)


def _share_of_beginning(weights: checkpoint.Weights) -> float:
    """How much of batch norm's moving averages is still what a pretraining from scratch began with; 0 for others.

    The weights of another run or of the release come with averages of steps that are not counted here.
    """
    config = weights.config
    is_from_scratch = config.get("train_mode") == "pretrain" and not config.get("checkpoint")
    if not is_from_scratch or "dataset" not in config:  # The release's have none.
        return 0.0
    return config["batch_norm_decay"] ** weights.step


def _of_chief(strategy: tf.distribute.Strategy, mine: np.ndarray) -> np.ndarray:
    """The chief's float32 array: other processors may round otherwise, and replicas must be equal bit for bit."""
    bits = strategy_lib.as_chief_says(strategy, mine.view(np.int32).ravel().tolist())
    return np.array(bits, np.int32).view(np.float32).reshape(mine.shape)
