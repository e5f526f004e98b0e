"""What a network takes, from the shapes of its layers: parameters, FLOPs, memory. Refuses batches that cannot fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

import model as model_lib
import objective
import resnet
import tasks
from config import Config
from errors import UserError

FLOAT_BYTES = 4
# FLOPs of a backward pass, in forward passes.
BACKWARD = 2
# Variables that the optimizer keeps for each weight.
SLOTS = {"lars": 1, "momentum": 1, "adam": 2}
# Temporaries of an update, in copies of the weights; measured on a CPU.
UPDATE_COPIES = 2
# Copies of a block of contrastive logits at the peak: without and with mask, and two masks of a byte a value.
LOSS_COPIES = 2.5
# Copies of the keys that the loss makes: candidates and queue in one tensor, and the same transposed.
KEY_COPIES = 2
# The gradient to the candidates, which only a run without queue computes: copies of a block of logits, of the
# candidates and of the anchors at its peak; measured on a CPU.
GRADIENT_COPIES = (3, 6, 5)
# The kinds of layer whose input, or output, TensorFlow's gradients read again. The other kinds need only shapes.
INPUT_KEPT = {"Conv2D", "Dense", "BatchNorm", "MaxPooling2D", "Multiply"}
OUTPUT_KEPT = {"ReLU", "Sigmoid", "MaxPooling2D"}


class Block(NamedTuple):
    """A residual block: its input and its layers."""

    input: Any
    operations: Sequence[Any]


class Counts(NamedTuple):
    """Encoder and head in numbers. FLOPs and values are those of one image."""

    encoder: int  # parameters of the encoder
    head: int  # parameters of the head
    head_first_layer: int  # parameters of its first layer
    trained: int  # parameters that get a gradient
    classifier_input: int  # width of the classifier's input
    output_dim: int  # width of z
    flops: int  # of a forward pass
    frozen_flops: int  # the part of `flops` that frozen layers take
    kept: int  # values that the backward pass reads again
    kept_by_remat: int  # the same where blocks are recomputed: of them their inputs alone, and all of the largest
    block_flops: int  # the part of `flops` that trained blocks take
    largest: int  # values of the largest layer's input and output together

    def classifier(self, classes: int) -> int:
        """Parameters of a classifier with so many `classes`."""
        return (self.classifier_input + 1) * classes

    def weights(self, classes: int) -> int:
        """Parameters of the whole network with a classifier of `classes`."""
        return self.encoder + self.head + self.classifier(classes)

    def forward(self, classes: int) -> int:
        """FLOPs of a forward pass of one image through encoder, head and a classifier of `classes`."""
        return self.flops + 2 * self.classifier_input * classes


def count(config: Config, teacher: Config | None = None) -> tuple[Counts, Counts | None]:
    """The numbers of the network of `config`, and those of its teacher. Both see images of `config.image_size` pixels.

    No weight gets a value; this takes a second or two.
    """
    network = _count(config, config.image_size)
    of_teacher = _count(teacher, config.image_size) if teacher else None
    return network, of_teacher


def _count(config: Config, image_size: int) -> Counts:
    """The numbers of the network of `config` for images of `image_size` pixels."""
    network = tasks.skeleton(config, 0, image_size)
    network.freeze(config.fine_tune_after_block)
    encoder, head = network.encoder, network.head
    operations = list(encoder.operations)
    outputs = [encoder.output["final_avg_pool"]]  # [N, D] of h and of every layer of the head
    head_variables = []
    if head:
        operations += head.operations
        outputs += head.outputs
        head_variables = head.variables
    frozen = []
    if config.fine_tune_after_block == 4:  # the head freezes too
        frozen = operations
    elif config.fine_tune_after_block >= 0:
        last = encoder.output[model_lib.FREEZE_ENDPOINTS[config.fine_tune_after_block]]
        frozen = keras.Model(encoder.inputs, last).operations
    trained = [operation for operation in operations if operation not in frozen]
    ends = [encoder.get_layer(name) for names in encoder.block_ends for name in names]
    inputs = [encoder.output["initial_max_pool"], *(end.output for end in ends)]
    blocks = [
        Block(x, block.operations)
        for x, end, block in zip(inputs, ends, resnet.Recomputing(encoder).blocks, strict=False)
        if end in trained
    ]
    return Counts(
        encoder=_size(encoder.variables),
        head=_size(head_variables),
        head_first_layer=_size([variable for variable in head_variables if variable.path.startswith("head1_")]),
        trained=_size(network.trainable_variables),
        classifier_input=outputs[config.classifier_layer].shape[-1],
        output_dim=network.output_dim,
        flops=sum(map(flops_of, operations)),
        frozen_flops=sum(map(flops_of, frozen)),
        kept=kept_values(trained),
        kept_by_remat=_kept_by_remat(trained, blocks),
        block_flops=sum(map(flops_of, itertools.chain.from_iterable(block.operations for block in blocks))),
        largest=max(_size([operation.input, operation.output]) for operation in operations),
    )


def _size(tensors: Any) -> int:
    """The number of values in a structure of variables, or in a structure of tensors for one image."""
    return sum(math.prod(size for size in tensor.shape if size) for tensor in tf.nest.flatten(tensors))


def flops_of(op: Any) -> int:
    """FLOPs of a forward pass of one image through a layer."""
    if isinstance(op, keras.layers.Conv2D):
        return 2 * math.prod(op.kernel.shape) * math.prod(op.output.shape[1:3])
    if isinstance(op, keras.layers.Dense):
        return 2 * math.prod(op.kernel.shape)
    return 0


def kept_values(operations: Iterable[Any]) -> int:
    """The number of one image's values that the gradients of these layers read again. Each tensor counts once."""
    return _size(list(_kept_tensors(operations).values()))


def _kept_tensors(operations: Iterable[Any]) -> dict[int, Any]:
    """The tensors that the gradients of these layers read again, by id."""
    tensors: dict[int, Any] = {}
    for op in operations:
        found = []
        if type(op).__name__ in INPUT_KEPT:
            found.append(op.input)
        if type(op).__name__ in OUTPUT_KEPT:
            found.append(op.output)
        tensors |= {id(tensor): tensor for tensor in tf.nest.flatten(found)}
    return tensors


def _kept_by_remat(operations: Sequence[Any], blocks: Sequence[Block]) -> int:
    """As `kept_values`, where `blocks` keep their input alone, and one of them at a time computes the rest again."""
    within = [op for block in blocks for op in block.operations]
    kept = _kept_tensors(op for op in operations if op not in within)
    kept |= {id(block.input): block.input for block in blocks}
    largest = 0
    for block in blocks:
        again = _kept_tensors(block.operations)
        again.pop(id(block.input), None)
        largest = max(largest, _size(list(again.values())))
    return _size(list(kept.values())) + largest


def flops_per_view(config: Config, classes: int, network: Counts, teacher: Counts | None = None) -> int:
    """FLOPs of a training step for each view of an image, without the losses: `plan.plan` says what counts.

    Args:
      config: the run.
      classes: the number of the data's classes.
      network, teacher: as from `count`.
    """
    flops = network.forward(outputs_of(config, classes))
    forward_only = 0  # FLOPs of the network that no gradient goes through
    answers_before = config.distill_neighbors or config.cache_teacher  # All answers are there before the first step.
    if teacher and not answers_before:
        forward_only = teacher.forward(classes)
    elif has_queue(config):  # the momentum encoder, which has no classifier
        forward_only = network.flops
    in_two_passes = config.grad_accumulation > 1 and config.train_mode == "pretrain"
    again = flops * in_two_passes + network.block_flops * config.remat
    return flops + BACKWARD * (flops - network.frozen_flops) + forward_only + again


def memory_parts(
    config: Config, replicas: int, classes: int, network: Counts, teacher: Counts | None = None
) -> dict[str, int]:
    """An estimate of the memory that a replica needs at the peak of a training step, by part.

    Args:
      config: the run.
      replicas: the number of devices that share each of its batches.
      classes: the number of the data's classes.
      network, teacher: what `count` returned for this run. It is the same for every batch size.

    Returns:
      Bytes by part, as TensorFlow's allocator has them in use at the peak: without the framework (0.7 GB in a CPU
      process), the work space of the convolutions, and what the allocator keeps beyond that.

      weights, gradients: those of the network; with a mixed precision, a copy of the weights in it too; with chunks,
        the gradients so far and those of one chunk.
      slots: the optimizer's, one for each weight; Adam has two.
      updates: temporaries of the optimizer and of the momentum encoder: two copies of the weights; and one of all that
        a step changes where it may be taken back (on_nan=skip, float16).
      momentum_encoder, queue: the memory.
      teacher: its weights.
      activations: what gradients read again, and the largest layer's input and output, for this replica's share of the
        batch or for a chunk of it; in pretraining for both views; in the precision of the run. With `remat`, of the
        blocks their inputs, and what is kept of one block.
      images: those of that share; where a call of the host takes several steps, those of all its batches, twice.
      contrastive_loss: two and a half copies of a block of the logits [2n, 2N + memory_size], as large as
        `objective.blocks_of` makes it, and two copies of their keys; without queue three copies of it, six of the
        candidates and five of the anchors.
    """
    pretrain = config.train_mode == "pretrain"
    batch = config.train_batch_size
    images = views(config) * batch // replicas  # of this replica, n or 2n
    chunks = config.grad_accumulation
    held = 1 if config.steps_per_call == 1 else 2 * config.steps_per_call  # batches on the device
    outputs = outputs_of(config, classes)
    momentum_encoder = 0
    queued = 0  # keys on this replica
    if has_queue(config):
        momentum_encoder = network.encoder + network.head
        queued = config.memory_size // replicas if config.shard_queue else config.memory_size
    share = 1.0 if config.mixed_precision == "float32" else 0.5  # of a float32 value
    trained = network.trained + network.classifier(outputs)
    largest = network.largest
    if teacher:
        largest = max(largest, teacher.largest)
    contrastive_loss = 0
    if pretrain:
        keys, anchors = 2 * batch + queued, max(images, 1)
        matrices = [(anchors, keys)]
        if queued and config.shard_queue:  # The anchors of all replicas meet the keys that are here.
            matrices = [(anchors, 2 * batch), (2 * batch, queued)]
        block = max(objective.blocks_of(rows, columns, config.loss_block)[1] * columns for rows, columns in matrices)
        contrastive_loss = int(LOSS_COPIES * block) + KEY_COPIES * keys * network.output_dim
        if not queued:
            of_block, of_candidates, of_anchors = GRADIENT_COPIES
            contrastive_loss = of_block * block + (of_candidates * keys + of_anchors * anchors) * network.output_dim
    weights = network.weights(outputs)
    slots = SLOTS[config.optimizer] * trained
    spare = 0
    if config.on_nan == "skip" or config.mixed_precision == "float16":  # A step may be taken back.
        spare = weights + slots + momentum_encoder + queued * network.output_dim
    kept = network.kept_by_remat if config.remat else network.kept
    values = {
        "weights": weights + (int(share * weights) if share < 1.0 else 0),
        "gradients": trained if chunks == 1 else 2 * trained,
        "slots": slots,
        "updates": UPDATE_COPIES * (trained + momentum_encoder) + spare,
        "momentum_encoder": momentum_encoder,
        "queue": queued * network.output_dim,
        "teacher": teacher.weights(classes) if teacher else 0,
        "activations": int(share * (images // chunks) * (kept + largest)),
        "images": held * images * 3 * config.image_size**2,
        "contrastive_loss": contrastive_loss,
    }
    return {name: FLOAT_BYTES * value for name, value in values.items()}


def evaluation_memory_parts(
    config: Config, replicas: int, classes: int, network: Counts, teacher: Counts | None = None
) -> dict[str, int]:
    """An estimate of the memory that a replica needs in evaluation, by part. The arguments are those of `memory_parts`.

    No activations are kept for a backward pass: only the largest layer's input and output count.
    """
    images = config.eval_batch_size // replicas
    largest = network.largest
    if teacher:
        largest = max(largest, teacher.largest)
    values = {
        "weights": network.weights(outputs_of(config, classes)),
        "teacher": teacher.weights(classes) if teacher else 0,
        "activations": images * largest,
        "images": images * 3 * config.image_size**2,
    }
    return {name: FLOAT_BYTES * value for name, value in values.items()}


def check_training_memory(
    config: Config, replicas: int, classes: int, device_bytes: int | None, teacher: Config | None = None
) -> None:
    """Refuses a training batch that cannot fit in memory, before anything is built.

    TensorFlow does not refuse it: the process ends in a segmentation fault, or the operating system kills it.

    Args:
      config: the run, whatever its `mode`. With `memory_check=False` nothing is checked.
      replicas: the number of devices that share each batch.
      classes: the number of the data's classes.
      device_bytes: the memory of one replica's device, as from `strategy.device_memory`. None: it is not known, and
        nothing is checked.
      teacher: the config of the teacher's network, in distillation.

    Raises:
      UserError: where the estimate exceeds `device_bytes`. The message names the largest batch that fits, and the
        fewest chunks in which this one does; where none fits, the flags that make the network smaller.
    """
    if not config.memory_check or device_bytes is None:
        return
    network, teacher_network = count(config, teacher)

    def needed(batch: int, chunks: int = config.grad_accumulation) -> int:
        changed = dataclasses.replace(config, train_batch_size=batch, grad_accumulation=chunks)
        return sum(memory_parts(changed, replicas, classes, network, teacher_network).values())

    def or_chunks() -> str:
        batch = config.train_batch_size
        fitting = (chunks for chunks in divisors(batch // replicas) if needed(batch, chunks) <= device_bytes)
        chunks = next(fitting, 0)
        return f", or --grad_accumulation={chunks}" if chunks else ""

    multiple = replicas * config.grad_accumulation
    _check_batch(config, "train_batch_size", config.train_batch_size, needed, multiple, device_bytes, or_chunks)


def check_evaluation_memory(
    config: Config, replicas: int, classes: int, device_bytes: int | None, teacher: Config | None = None
) -> None:
    """Refuses an evaluation batch that cannot fit in memory, before anything is built.

    Arguments and errors are those of `check_training_memory`.
    """
    if not config.memory_check or device_bytes is None:
        return
    network, teacher_network = count(config, teacher)

    def needed(batch: int) -> int:
        changed = dataclasses.replace(config, eval_batch_size=batch)
        return sum(evaluation_memory_parts(changed, replicas, classes, network, teacher_network).values())

    _check_batch(config, "eval_batch_size", config.eval_batch_size, needed, replicas, device_bytes)


def _check_batch(
    config: Config, flag: str, batch: int, needed: Callable[[int], int], multiple: int, device_bytes: int,
    alternative: Callable[[], str] = str,
) -> None:  # fmt: skip
    """Raises UserError where `batch`, the value of `flag`, does not fit into `device_bytes`.

    Args:
      config: the run.
      flag, batch: the flag that says the batch, and its value.
      needed: from a batch to the bytes that it takes in each replica.
      multiple: a number that divides each batch.
      device_bytes: the memory of one replica's device.
      alternative: what may be done besides, as the end of a sentence.
    """
    if needed(batch) <= device_bytes:
        return
    fitting = _largest_batch(lambda smaller: needed(smaller) <= device_bytes, batch, multiple)
    if fitting:
        advice = f"use --{flag}={fitting} or less{alternative()}"
    else:
        advice = f"even --{flag}={multiple} takes {in_short(needed(multiple), 'B')}: lower {_flags_of_size(config)}"
    raise UserError(
        f"--{flag}={batch} takes about {in_short(needed(batch), 'B')} of memory per replica, and there are "
        f"{in_short(device_bytes, 'B')}: {advice}; --memory_check=False skips this check"
    )


def _largest_batch(fits: Callable[[int], bool], too_large: int, multiple: int) -> int:
    """The largest batch below `too_large` that fits and that `multiple` divides; 0 where there is none."""
    # In multiples: `low` fits, `high` does not.
    low = 0
    high = too_large // multiple
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * multiple):
            low = middle
        else:
            high = middle
    return low * multiple


def divisors(number: int) -> list[int]:
    """The whole numbers that divide a number, from 1 on. Each small one comes with a large one."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _flags_of_size(config: Config) -> str:
    """The flags that make the network of this run smaller. A checkpoint to start from decides the architecture."""
    flags = ["--image_size"]
    if not config.checkpoint:
        flags += ["--width_multiplier", "--resnet_depth"]
    if has_queue(config):
        flags.append("--memory_size")
    return " or ".join(flags)


def views(config: Config) -> int:
    """The number of views of an image in a batch."""
    return 2 if config.train_mode == "pretrain" else 1


def has_queue(config: Config) -> bool:
    """Whether the run has the memory: a momentum encoder and the queue of its keys."""
    return config.train_mode == "pretrain" and config.memory == "queue"


def outputs_of(config: Config, classes: int) -> int:
    """The number of outputs of the network's classifier; 0 where the network has none."""
    has_classifier = config.train_mode != "pretrain" or config.lineareval_while_pretraining
    return classes if has_classifier else 0


def in_short(value: float, unit: str = "") -> str:
    """Three digits with their power of 1,000: 23.5 M."""
    powers = ("", "k", "M", "G", "T", "P", "E")
    power = int(math.log10(max(value, 1) * 1.0005) // 3)  # 999.5 and more round up to 1,000
    power = min(power, len(powers) - 1)
    return f"{value / 1000**power:.3g} {powers[power]}{unit}".rstrip()
