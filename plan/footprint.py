"""What a network takes, from the shapes of its layers: parameters, FLOPs, memory; and refusing what cannot fit."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import tensorflow as tf

import model as model_lib
import tasks
from config import Config
from errors import UserError

FLOAT_BYTES = 4
SLOTS = {"lars": 1, "momentum": 1, "adam": 2}  # variables that the optimizer keeps for each weight
UPDATE_COPIES = 2  # temporaries of an update, in copies of the weights; measured on a CPU
LOSS_COPIES = 5  # of the contrastive logits: they, their softmax, log-softmax, the product of both, their gradient
# The kinds of layer whose input, or output, TensorFlow's gradients read again; the others' need shapes alone.
INPUT_KEPT = {"Conv2D", "Dense", "BatchNorm", "MaxPooling2D", "Multiply"}
OUTPUT_KEPT = {"ReLU", "Sigmoid", "MaxPooling2D"}


class Counts(NamedTuple):
    """Encoder and head in numbers; FLOPs and values are those of one image."""

    encoder: int
    head: int
    head_first_layer: int
    trained: int  # parameters that get a gradient
    classifier_input: int  # width of what the classifier stands on
    output_dim: int  # of z
    flops: int  # forward
    frozen_flops: int  # the share of them below the trained layers
    kept: int  # values the backward pass reads again
    largest: int  # values into and out of the largest layer

    def classifier(self, classes: int) -> int:
        """Parameters of a classifier of so many classes."""
        return (self.classifier_input + 1) * classes

    def weights(self, classes: int) -> int:
        """Parameters of the whole network with such a classifier."""
        return self.encoder + self.head + self.classifier(classes)

    def forward(self, classes: int) -> int:
        """FLOPs of one image forward, through such a classifier too."""
        return self.flops + 2 * self.classifier_input * classes


def count(config: Config, teacher: Config | None = None) -> tuple[Counts, Counts | None]:
    """The numbers of the network of `config` and of its teacher's; both see images of `config.image_size` pixels.

    Nothing of their size is built: the networks are made without values, in a second or two.
    """
    # In another thread: Keras would give the weights values when this thread next enters a StatelessScope.
    with ThreadPoolExecutor(1) as thread:
        network = thread.submit(_count, config, config.image_size).result()
        of_teacher = thread.submit(_count, teacher, config.image_size).result() if teacher else None
    return network, of_teacher


def _count(config: Config, image_size: int) -> Counts:
    """The numbers of the network of `tasks.network`, made without values and for images of `image_size` pixels."""
    with keras.StatelessScope(initialize_variables=False):
        network = tasks.network(config, 0, image_size=image_size)
        encoder, head = network.encoder, network.head
        network.freeze(config.fine_tune_after_block)
        operations = encoder.operations + (head.operations if head else [])
        frozen = []
        if config.fine_tune_after_block == 4:  # the head freezes too
            frozen = operations
        elif config.fine_tune_after_block >= 0:
            last = encoder.output[model_lib.FREEZE_ENDPOINTS[config.fine_tune_after_block]]
            frozen = keras.Model(encoder.inputs, last).operations
    outputs = [encoder.output["final_avg_pool"]]  # [N, D] of h and of every layer of the head
    head_variables = []
    if head:
        outputs += head.outputs
        head_variables = head.variables
    return Counts(
        encoder=_size(encoder.variables),
        head=_size(head_variables),
        head_first_layer=_size([variable for variable in head_variables if variable.path.startswith("head1_")]),
        trained=_size(network.trainable_variables),
        classifier_input=outputs[config.classifier_layer].shape[-1],
        output_dim=network.output_dim,
        flops=sum(map(flops_of, operations)),
        frozen_flops=sum(map(flops_of, frozen)),
        kept=kept_values(operation for operation in operations if operation not in frozen),
        largest=max(_size([operation.input, operation.output]) for operation in operations),
    )


def _size(tensors: Any) -> int:
    """Values in a structure of variables or, of one image, of tensors."""
    return sum(math.prod(size for size in tensor.shape if size) for tensor in tf.nest.flatten(tensors))


def flops_of(op: Any) -> int:
    """FLOPs of one image forward through a layer."""
    if isinstance(op, keras.layers.Conv2D):
        return 2 * math.prod(op.kernel.shape) * math.prod(op.output.shape[1:3])
    if isinstance(op, keras.layers.Dense):
        return 2 * math.prod(op.kernel.shape)
    return 0


def kept_values(operations: Iterable[Any]) -> int:
    """Values of one image that the gradients of these layers read again, each tensor once."""
    tensors: dict[int, Any] = {}
    for op in operations:
        found = []
        if type(op).__name__ in INPUT_KEPT:
            found.append(op.input)
        if type(op).__name__ in OUTPUT_KEPT:
            found.append(op.output)
        tensors |= {id(tensor): tensor for tensor in tf.nest.flatten(found)}
    return _size(list(tensors.values()))


def memory_parts(
    config: Config, replicas: int, classes: int, network: Counts, teacher: Counts | None = None
) -> dict[str, int]:
    """An estimate of the memory that a replica needs at the peak of a training step, by part.

    Args:
      config, replicas: the run, and the devices that share each of its batches.
      classes: how many the data has.
      network, teacher: what `count` returned for this run; the size of the batch does not matter to it.

    Returns:
      Bytes by part, in float32. The framework (0.7 GB of a CPU process), the work space of the convolutions and
      fragmentation are not in it.

      weights, gradients: of the network.
      slots: of the optimizer: one for each weight, of Adam two.
      updates: temporaries of the optimizer and of the momentum encoder: two copies of the weights.
      momentum_encoder, queue: the memory.
      teacher: its weights.
      activations: of this replica's share of the batch, in pretraining of both views: what gradients read again, and
        the largest layer's input and output.
      images: of that share.
      contrastive_logits: five copies of [2n, 2N + memory_size].
    """
    pretrain = config.train_mode == "pretrain"
    batch = config.train_batch_size
    images = views(config) * batch // replicas  # of this replica, n or 2n
    outputs = outputs_of(config, classes)
    encoder_and_head = network.encoder + network.head
    momentum_encoder = encoder_and_head if has_queue(config) else 0
    queued = config.memory_size if has_queue(config) else 0
    trained = network.trained + network.classifier(outputs)
    largest = max(network.largest, teacher.largest if teacher else 0)
    values = {
        "weights": network.weights(outputs),
        "gradients": trained,
        "slots": SLOTS[config.optimizer] * trained,
        "updates": UPDATE_COPIES * (trained + momentum_encoder),
        "momentum_encoder": momentum_encoder,
        "queue": queued * network.output_dim,
        "teacher": teacher.weights(classes) if teacher else 0,
        "activations": images * (network.kept + largest),
        "images": images * 3 * config.image_size**2,
        "contrastive_logits": LOSS_COPIES * images * (2 * batch + queued) if pretrain else 0,
    }
    return {name: FLOAT_BYTES * value for name, value in values.items()}


def evaluation_memory_parts(
    config: Config, replicas: int, classes: int, network: Counts, teacher: Counts | None = None
) -> dict[str, int]:
    """An estimate of the memory that a replica needs in evaluation, by part; arguments as for `memory_parts`.

    Nothing is kept for a backward pass: of the activations the largest layer's input and output count alone.
    """
    images = config.eval_batch_size // replicas
    largest = max(network.largest, teacher.largest if teacher else 0)
    values = {
        "weights": network.weights(outputs_of(config, classes)),
        "teacher": teacher.weights(classes) if teacher else 0,
        "activations": images * largest,
        "images": images * 3 * config.image_size**2,
    }
    return {name: FLOAT_BYTES * value for name, value in values.items()}


def check_memory(
    config: Config, replicas: int, classes: int, device_bytes: int | None, teacher: Config | None = None
) -> None:
    """Refuses what `config.mode` asks for where it cannot fit in memory, before anything is built.

    TensorFlow does not refuse it: the process ends in a segmentation fault, or the operating system kills it.

    Args:
      config, replicas: the run, and the devices that share each of its batches.
      classes: how many the data has.
      device_bytes: the memory of one replica's device, as from `strategy.device_memory`; None: not known, no check.
      teacher: the config of the teacher's network, in distillation.

    Raises:
      UserError: where the estimate for training, or for evaluation, exceeds `device_bytes`; it names the largest batch
        that fits, or else the flags that make the network smaller. Not with `memory_check=False`.
    """
    if not config.memory_check or device_bytes is None:
        return
    network, teacher_network = count(config, teacher)
    run: dict[str, Any] = dict(replicas=replicas, classes=classes, network=network, teacher=teacher_network)
    if config.mode in ("train", "train_then_eval"):
        _check_batch(config, "train_batch_size", functools.partial(memory_parts, **run), replicas, device_bytes)
    if config.mode in ("eval", "train_then_eval"):
        estimate = functools.partial(evaluation_memory_parts, **run)
        _check_batch(config, "eval_batch_size", estimate, replicas, device_bytes)


def _check_batch(
    config: Config, flag: str, estimate: Callable[[Config], dict[str, int]], replicas: int, device_bytes: int
) -> None:
    """Raises UserError where the batch of `flag` does not fit into `device_bytes`, by the parts of `estimate`."""

    def needed(batch: int) -> int:
        changes: dict[str, Any] = {flag: batch}
        return sum(estimate(dataclasses.replace(config, **changes)).values())

    batch = getattr(config, flag)
    if needed(batch) <= device_bytes:
        return
    fitting = _largest_batch(lambda smaller: needed(smaller) <= device_bytes, batch, replicas)
    if fitting:
        advice = f"use --{flag}={fitting} or less"
    else:
        advice = f"even --{flag}={replicas} takes {in_short(needed(replicas), 'B')}: lower {_flags_of_size(config)}"
    raise UserError(
        f"--{flag}={batch} takes about {in_short(needed(batch), 'B')} of memory per replica, and there are "
        f"{in_short(device_bytes, 'B')}: {advice}; --memory_check=False goes on all the same"
    )


def _largest_batch(fits: Callable[[int], bool], too_large: int, replicas: int) -> int:
    """The largest batch below `too_large` that `fits` and that the replicas can share; 0 where there is none."""
    low, high = 0, too_large // replicas  # shares of one replica: `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * replicas):
            low = middle
        else:
            high = middle
    return low * replicas


def _flags_of_size(config: Config) -> str:
    """The flags that make a smaller network of this run; a checkpoint to start from decides the architecture."""
    flags = ["--image_size"]
    if not config.checkpoint:
        flags += ["--width_multiplier", "--resnet_depth"]
    if has_queue(config):
        flags.append("--memory_size")
    return " or ".join(flags)


def views(config: Config) -> int:
    """Views of an image in a batch."""
    return 2 if config.train_mode == "pretrain" else 1


def has_queue(config: Config) -> bool:
    """Whether the run has the memory: a momentum encoder and the queue of its keys."""
    return config.train_mode == "pretrain" and config.memory == "queue"


def outputs_of(config: Config, classes: int) -> int:
    """The outputs of the network's classifier; 0 where it has none."""
    has_classifier = config.train_mode != "pretrain" or config.lineareval_while_pretraining
    return classes if has_classifier else 0


def in_short(value: float, unit: str = "") -> str:
    """Three digits with their power of 1,000: 23.5 M."""
    powers = ("", "k", "M", "G", "T", "P", "E")
    power = int(math.log10(max(value, 1) * 1.0005) // 3)  # 999.5 and more round up to 1,000
    power = min(power, len(powers) - 1)
    return f"{value / 1000**power:.3g} {powers[power]}{unit}".rstrip()
