"""What a run takes: parameters, FLOPs, steps, memory and time, from its layers' shapes, before anything is built."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import tensorflow as tf

import checkpoint
import data
import lars_optimizer
import model as model_lib
import published
import resnet
import sources
import tasks
from architecture import BASIC, BLOCKS, BOTTLENECK
from config import Config, from_dict
from errors import UserError

# TensorFlow datasets that need not be prepared to be planned with: classes, and examples by split.
KNOWN: dict[str, tuple[int, dict[str, int]]] = {
    "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet2012_subset": (1000, {"train": 12_811, "validation": 50_000}),  # 1pct, where not named
    "imagenet2012_subset/1pct": (1000, {"train": 12_811, "validation": 50_000}),
    "imagenet2012_subset/10pct": (1000, {"train": 128_116, "validation": 50_000}),
    "cifar10": (10, {"train": 50_000, "test": 10_000}),
    "cifar100": (100, {"train": 50_000, "test": 10_000}),
}
SLOTS = {"lars": 1, "momentum": 1, "adam": 2}  # variables the optimizer keeps for each weight
UPDATE_COPIES, LOSS_COPIES = 2, 5  # temporaries of an update; logits, softmax, log-softmax, their product, gradient
FLOAT, BACKWARD = 4, 2  # bytes; FLOPs of the backward pass for one of the forward pass
# What TensorFlow's gradients read again, by kind of layer; the others' need shapes alone.
INPUT_KEPT = {"Conv2D", "Dense", "BatchNorm", "MaxPooling2D", "Multiply"}
OUTPUT_KEPT = {"ReLU", "Sigmoid", "MaxPooling2D"}
# The timing: a network as shallow as there is, and more images a call until one takes a quarter of a second.
PROXY_DEPTHS = {BASIC: 10, BOTTLENECK: 14}
PROXY_WIDTH, PROXY_BYTES, PROXY_FLOPS, CALL_SECONDS = 1.0, 2**30, 10**10, 0.25


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

    def forward(self, classes: int) -> int:
        """FLOPs of one image forward, through such a classifier too."""
        return self.flops + 2 * self.classifier_input * classes


def plan(config: Config, replicas: int = 1, timing: bool = True) -> dict[str, Any]:
    """What the training run of `config` takes, in plain numbers. Of known data nothing is read, nothing large is built.

    Args:
      config, replicas: the run, and the devices that share each of its batches.
      timing: also run a small network for some seconds on this process's default device (not a TPU).

    Returns:
      encoder_parameters: up to the pooling layer, with batch norm's moving averages, as Table 1 of arXiv 2006.10029
        counts: without them ResNet-152 (2x) has 232 M, not 233 M.
      head_parameters: what the projection head adds to the encoder of a fine-tuned network: up to `ft_proj_selector`
        in fine-tuning; in pretraining up to its first layer, the paper's choice (Table 1: 4 M at 1x, 17 M at 2x).
      built_head_parameters: of all the layers of the head that this run builds: 8.7 M in pretraining at 1x.
      supervised_head_parameters: of the classifier (0 where the run has none); absent where the classes are unknown.
      flops_per_image: one image forward through encoder, head and classifier, a multiplication and an addition
        counted as two. The convolutions, 2 x kernel size x output height x width, and the dense layers alone.
      flops_per_step: all replicas': forward and backward (twice the forward) on every view, forward alone of frozen
        layers, momentum encoder and teacher (of the student's size until it is there); without the losses.
      examples: that the run sees; labelled ones alone in fine-tuning and supervised training.
      epoch_steps, train_steps, warmup_steps, peak_learning_rate: its schedule.
      memory_bytes_per_replica, memory_parts: an estimate of a step's peak in float32, without the framework (0.7 GB of
        a CPU process), the convolutions' work space and fragmentation; the sum of `weights`, `gradients`, the
        optimizer's `slots` (one a weight, adam two), the `momentum_encoder`, its `queue`, the `teacher`; `updates`,
        temporaries of the optimizer and the momentum encoder (two copies, measured on a CPU); this replica's share of
        the batch's `images` and `activations`, what gradients read again and the largest layer's input and output, in
        pretraining of both views; `contrastive_logits`, five copies of [2n, 2N + memory_size].
      device_flops_per_second, step_seconds, total_seconds: with `timing`, measured on training steps of a ResNet-10 or
        ResNet-14 of the same kind, image size and width (at most 1x). Without the input pipeline, evaluation and
        checkpoints; each replica is taken to be as fast as this device, and to wait for no other.

    Raises:
      UserError: where the data is neither known nor there, or has too few labels; where replicas cannot share a batch;
        where a teacher knows other classes than the data.
    """
    if replicas < 1 or config.train_batch_size % replicas:
        raise UserError(f"--train_batch_size={config.train_batch_size}: must be a multiple of the {replicas} replicas")
    (examples, found), (teacher_config, of_teacher) = _examples_and_classes(config), _teacher(config)
    if of_teacher and found and of_teacher != found:
        raise UserError(
            f"--teacher={config.teacher} knows {of_teacher} classes, the data {found}: they must be the same"
        )
    classes = of_teacher or found
    pretrain = config.train_mode == "pretrain"
    outputs = 0 if pretrain and not config.lineareval_while_pretraining else classes
    with ThreadPoolExecutor(1) as aside:  # or Keras gives them values at the next StatelessScope
        network = aside.submit(_count, config, config.image_size).result()
        teacher = aside.submit(_count, teacher_config, config.image_size).result() if teacher_config else None
    memory = pretrain and config.memory == "queue"
    batch, share, views = config.train_batch_size, config.train_batch_size // replicas, 2 if pretrain else 1
    steps = lars_optimizer.train_steps(examples, config.train_epochs, batch, config.train_steps)
    peak = lars_optimizer.peak_learning_rate(config.learning_rate, config.learning_rate_scaling, batch)
    encoder_and_head = network.encoder + network.head
    trained = network.trained + network.classifier(outputs)
    flops, others = network.forward(outputs), teacher.forward(classes) if teacher else network.flops * memory
    values = {
        "weights": encoder_and_head + network.classifier(outputs),
        "gradients": trained,
        "slots": SLOTS[config.optimizer] * trained,
        "updates": UPDATE_COPIES * (trained + encoder_and_head * memory),
        "momentum_encoder": encoder_and_head * memory,
        "queue": config.memory_size * network.output_dim * memory,
        "teacher": teacher.encoder + teacher.head + teacher.classifier(classes) if teacher else 0,
        "activations": views * share * (network.kept + max(network.largest, teacher.largest if teacher else 0)),
        "images": views * share * 3 * config.image_size**2,
        "contrastive_logits": LOSS_COPIES * 2 * share * (2 * batch + config.memory_size * memory) * pretrain,
    }
    parts = {name: FLOAT * value for name, value in values.items()}
    planned: dict[str, Any] = {
        "replicas": replicas,
        "encoder_parameters": network.encoder,
        "head_parameters": network.head_first_layer if pretrain else network.head,
        "built_head_parameters": network.head,
        **({"supervised_head_parameters": network.classifier(outputs)} if classes or pretrain else {}),
        "flops_per_image": flops,
        "flops_per_step": batch * views * (flops + BACKWARD * (flops - network.frozen_flops) + others),
        "examples": examples,
        "epoch_steps": lars_optimizer.epoch_steps(examples, batch),
        "train_steps": steps,
        "warmup_steps": lars_optimizer.warmup_steps(examples, config.warmup_epochs, batch),
        "peak_learning_rate": peak,
        "memory_bytes_per_replica": sum(parts.values()),
        "memory_parts": parts,
    }
    if not timing:
        return planned
    speed = device_flops_per_second(config, views * share)
    seconds = planned["flops_per_step"] / replicas / speed
    return planned | {"device_flops_per_second": speed, "step_seconds": seconds, "total_seconds": seconds * steps}


def _count(config: Config, image_size: int) -> Counts:
    """The numbers of the network of `tasks.network`, made without values and for images of `image_size` pixels."""
    last, frozen = config.fine_tune_after_block, []
    with keras.StatelessScope(initialize_variables=False):
        head = tasks.network(config, 0).head
        encoder = _encoder(config, config.resnet_depth, config.width_multiplier, image_size)
        network, h = model_lib.Model(encoder, head), encoder.output["final_avg_pool"]
        operations = encoder.operations + (head.operations if head else [])
        head_config = (config.proj_head_mode, config.proj_out_dim, config.num_proj_layers)
        whole_head = model_lib.projection_head(h.shape[-1], *head_config)
        if last >= 0:
            frozen = keras.Model(encoder.inputs, encoder.output[model_lib.FREEZE_ENDPOINTS[last]]).operations
        frozen = operations if last == 4 else frozen
        network.freeze(last)
    return Counts(
        encoder=_size(encoder.variables),
        head=_size(head.variables) if head else 0,
        head_first_layer=_size([v for v in whole_head.variables if v.path.startswith("head1_")]) if whole_head else 0,
        trained=_size(network.trainable_variables),
        classifier_input=[h, *(head.outputs if head else [])][config.classifier_layer].shape[-1],
        output_dim=network.output_dim,
        flops=sum(map(_flops, operations)),
        frozen_flops=sum(map(_flops, frozen)),
        kept=_kept(op for op in operations if op not in frozen),
        largest=max(_size([op.input, op.output]) for op in operations),
    )


def _encoder(config: Config, depth: int, width: float, image_size: int) -> keras.Model:
    return resnet.resnet(depth, width, config.sk_ratio, config.se_ratio, config.cifar_stem, image_size=image_size)


def _size(tensors: Any) -> int:
    """Values in a structure of variables or, of one image, of tensors."""
    return sum(math.prod(size for size in tensor.shape if size) for tensor in tf.nest.flatten(tensors))


def _flops(op: Any) -> int:
    """FLOPs of one image forward through a layer."""
    if isinstance(op, keras.layers.Conv2D):
        return 2 * math.prod(op.kernel.shape) * math.prod(op.output.shape[1:3])
    return 2 * math.prod(op.kernel.shape) if isinstance(op, keras.layers.Dense) else 0


def _kept(operations: Iterable[Any]) -> int:
    """Values of one image that the gradients of these layers read again, each tensor once."""
    tensors: dict[int, Any] = {}
    for op in operations:
        kind = type(op).__name__
        found = [*([op.input] if kind in INPUT_KEPT else []), *([op.output] if kind in OUTPUT_KEPT else [])]
        tensors |= {id(tensor): tensor for tensor in tf.nest.flatten(found)}
    return _size(list(tensors.values()))


def _examples_and_classes(config: Config) -> tuple[int, int]:
    """The examples the run sees, and the data's classes; 0 where it has no labels."""
    examples, classes, source = _split(config.dataset, config.train_split, config.data_dir)
    if config.labelled_dataset:
        _, classes, _ = _split(config.labelled_dataset, config.labelled_split, config.data_dir)
    if not config.subset:
        return examples, classes
    per_class, fraction = config.labels_per_class, config.label_fraction
    labelled = per_class * classes or max(classes, round(fraction * examples))  # as if classes were of one size
    if isinstance(source, sources.MemorySource):
        labelled = len(data.choose_labelled(*source.index(), per_class, fraction, config.label_seed))
    if labelled > examples:
        raise UserError(f"--labels_per_class={per_class}: there are {examples} examples of {classes} classes")
    return (labelled if config.train_mode in ("finetune", "supervised") else examples), classes


def _split(dataset: str, split: str, data_dir: str) -> tuple[int, int, sources.Source | None]:
    """Examples and classes of a split; and the split itself where the dataset is not in the table."""
    classes, sizes = KNOWN.get(dataset.split(":")[0], (0, {}))
    if sizes:
        return sum(end - begin for _, begin, end in sources.split_ranges(split, sizes)), classes, None
    source = data.load(dataset, split, data_dir)
    return source.examples, len(source.classes), source


def _teacher(config: Config) -> tuple[Config | None, int]:
    """The config of the teacher and its classes; the student's and 0 where it is not there."""
    if not (config.teacher and checkpoint.exists(config.teacher)):
        return (config if config.teacher else None), 0
    weights = published.open_teacher(config)
    return from_dict(weights.config), len(weights.classes)


def device_flops_per_second(config: Config, batch: int) -> float:
    """FLOPs per second of training a shallow network like the encoder of `config`, on at most `batch` images."""
    size, (kind, _) = config.image_size, BLOCKS[config.resnet_depth]
    encoder = _encoder(config, PROXY_DEPTHS[kind], min(config.width_multiplier, PROXY_WIDTH), size)
    variables = encoder.trainable_variables
    optimizer = lars_optimizer.make_optimizer(config.optimizer, 0.0)
    optimizer.build(variables)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, size, size, 3])])
    def step(images: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(encoder(images, training=True)["final_avg_pool"]))
        optimizer.apply(tape.gradient(loss, variables), variables)
        return tf.reduce_sum(tf.convert_to_tensor(variables[0]))  # of the stem: the last to get its gradient

    def seconds(images: tf.Tensor) -> float:
        started = time.perf_counter()
        float(step(images))
        return time.perf_counter() - started

    flops = (1 + BACKWARD) * sum(map(_flops, encoder.operations))
    limit = max(1, min(batch, PROXY_BYTES // (FLOAT * _kept(encoder.operations))))
    images = min(limit, max(1, PROXY_FLOPS // flops))
    seconds(tf.zeros([images, size, size, 3]))  # traces it
    while True:
        x = tf.random.stateless_uniform([images, size, size, 3], seed=[0, 0])
        best = min(seconds(x) for _ in range(3))
        if images == limit or best > CALL_SECONDS:
            return images * flops / best
        images = min(limit, images * 4)


def table(plan: dict[str, Any]) -> str:
    """A `plan` for people to read: a line for each of its figures."""
    parts = sorted(plan["memory_parts"].items(), key=lambda part: -part[1])
    memory = ", ".join(f"{name.replace('_', ' ')} {_short(value, 'B')}" for name, value in parts if value)
    head, built = plan["head_parameters"], plan["built_head_parameters"]
    warmup, peak, known = plan["warmup_steps"], plan["peak_learning_rate"], "supervised_head_parameters" in plan
    rows = {
        "encoder parameters": _short(plan["encoder_parameters"]),
        "projection head": f"{_short(built)} ({_short(head)} for fine-tuning)" if built else "none",
        "supervised head": _short(plan["supervised_head_parameters"]) if known else "unknown",
        "FLOPs per image": f"{_short(plan['flops_per_image'])} (forward)",
        "FLOPs per step": _short(plan["flops_per_step"]),
        "examples": f"{plan['examples']:,}",
        "replicas": f"{plan['replicas']:,}",
        "steps": f"{plan['train_steps']:,} ({plan['epoch_steps']:,} an epoch)",
        "learning rate": f"{peak:.4g}" + (f" after {warmup:,} steps of warmup" if warmup else ""),
        "memory per replica": f"{_short(plan['memory_bytes_per_replica'], 'B')} (estimate: {memory})",
    }
    if "step_seconds" in plan:
        minutes = math.ceil(plan["total_seconds"] / 60)
        duration = f"{minutes // 60} h {minutes % 60} m" if minutes < 7200 else f"{minutes / 1440:,.0f} days"
        rows["time"] = f"{duration} (estimate: {plan['step_seconds']:,.3f} s a step)"
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _short(value: float, unit: str = "") -> str:
    """Three digits with their power of 1,000: 23.5 M."""
    power = min(6, max(0, int(math.log10(max(value, 1) * 1.0005) // 3)))
    return f"{value / 1000**power:.3g} {'kMGTPE'[power - 1] if power else ''}{unit}".rstrip()
