"""What a run takes, before anything is built: parameters, FLOPs, steps, memory and time."""

from __future__ import annotations

import math
import time
from typing import Any

import tensorflow as tf

import data
import lars_optimizer
import published
import resnet
import run_folder
import schedule as schedule_lib
import sources
import tasks
from architecture import BASIC, BLOCKS, BOTTLENECK
from config import Config, from_dict
from errors import UserError
from plan import footprint

# TensorFlow datasets that need not be prepared to be planned with: classes, and examples by split.
KNOWN: dict[str, tuple[int, dict[str, int]]] = {
    "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet2012_subset": (1000, {"train": 12_811, "validation": 50_000}),  # 1pct, where not named
    "imagenet2012_subset/1pct": (1000, {"train": 12_811, "validation": 50_000}),
    "imagenet2012_subset/10pct": (1000, {"train": 128_116, "validation": 50_000}),
    "cifar10": (10, {"train": 50_000, "test": 10_000}),
    "cifar100": (100, {"train": 50_000, "test": 10_000}),
}

BACKWARD = 2  # FLOPs of the backward pass for one of the forward pass

# The timing trains a network as shallow as there is on more and more images a call.
PROXY_DEPTHS = {BASIC: 10, BOTTLENECK: 14}
PROXY_WIDTH = 1.0  # at most
PROXY_BYTES = 2**30  # that the activations of a call may take
PROXY_FLOPS = 10**10  # of the first call
CALL_SECONDS = 0.25  # a call that takes longer is long enough to be measured


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
      memory_bytes_per_replica, memory_parts: an estimate of a step's peak, and its parts as in
        `plan.footprint.memory_parts`.
      device_flops_per_second, step_seconds, total_seconds: with `timing`, measured on training steps of a ResNet-10 or
        ResNet-14 of the same kind, image size and width (at most 1x). Without the input pipeline, evaluation and
        checkpoints; each replica is taken to be as fast as this device, and to wait for no other.

    Raises:
      UserError: where the data is neither known nor there, or has too few labels; where replicas cannot share a batch;
        where a teacher knows other classes than the data.
    """
    if replicas < 1:
        raise UserError(f"--plan_replicas={replicas}: must be at least 1 (0: as many as there are)")
    if config.train_batch_size % replicas:
        raise UserError(f"--train_batch_size={config.train_batch_size}: must be a multiple of the {replicas} replicas")
    examples, found = _examples_and_classes(config)
    teacher_config, of_teacher = _teacher(config)
    if of_teacher and found and of_teacher != found:
        raise UserError(
            f"--teacher={config.teacher} knows {of_teacher} classes, the data {found}: they must be the same"
        )
    classes = of_teacher or found
    network, teacher = footprint.count(config, teacher_config)
    pretrain = config.train_mode == "pretrain"
    batch, views = config.train_batch_size, footprint.views(config)
    outputs = footprint.outputs_of(config, classes)
    flops = network.forward(outputs)
    # What else goes forward: the teacher, or else the momentum encoder, which has no classifier.
    beside = network.flops if footprint.has_queue(config) else 0
    if teacher:
        beside = teacher.forward(classes)
    parts = footprint.memory_parts(config, replicas, classes, network, teacher)
    schedule = tasks.make_schedule(config, examples)
    planned: dict[str, Any] = {
        "replicas": replicas,
        "encoder_parameters": network.encoder,
        "head_parameters": network.head_first_layer if pretrain else network.head,
        "built_head_parameters": network.head,
    }
    if classes or pretrain:
        planned["supervised_head_parameters"] = network.classifier(outputs)
    planned |= {
        "flops_per_image": flops,
        "flops_per_step": batch * views * (flops + BACKWARD * (flops - network.frozen_flops) + beside),
        "examples": examples,
        "epoch_steps": schedule_lib.epoch_steps(examples, batch),
        "train_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "peak_learning_rate": schedule.peak,
        "memory_bytes_per_replica": sum(parts.values()),
        "memory_parts": parts,
    }
    if timing:
        speed = device_flops_per_second(config, views * batch // replicas)
        seconds = planned["flops_per_step"] / replicas / speed
        planned["device_flops_per_second"] = speed
        planned["step_seconds"] = seconds
        planned["total_seconds"] = seconds * planned["train_steps"]
    return planned


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
        labelled = len(data.choose_labelled(*source.index(), per_class, fraction, config.label_seed, source.classes))
    if labelled > examples:
        raise UserError(f"--labels_per_class={per_class}: there are {examples} examples of {classes} classes")
    return (labelled if config.train_mode in ("finetune", "supervised") else examples), classes


def _split(dataset: str, split: str, data_dir: str) -> tuple[int, int, sources.Source | None]:
    """Examples and classes of a split; and the split itself where the dataset is not in the table."""
    classes, sizes = KNOWN.get(dataset.split(":")[0], (0, {}))
    if sizes:
        return sum(end - begin for _, begin, end in sources.split_ranges(split, sizes)), classes, None
    source = sources.load(dataset, split, data_dir)
    return source.examples, len(source.classes), source


def _teacher(config: Config) -> tuple[Config | None, int]:
    """The config of the teacher and its classes; the student's and 0 where it is not there."""
    if not (config.teacher and run_folder.is_checkpoint(config.teacher, "teacher")):
        return (config if config.teacher else None), 0
    weights = published.open_teacher(config)
    return from_dict(weights.config), len(weights.classes)


def device_flops_per_second(config: Config, batch: int) -> float:
    """FLOPs per second of training a shallow network like the encoder of `config`, on at most `batch` images."""
    size = config.image_size
    kind, _ = BLOCKS[config.resnet_depth]
    depth, width = PROXY_DEPTHS[kind], min(config.width_multiplier, PROXY_WIDTH)
    encoder = resnet.resnet(depth, width, config.sk_ratio, config.se_ratio, config.cifar_stem, image_size=size)
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

    flops = (1 + BACKWARD) * sum(map(footprint.flops_of, encoder.operations))
    limit = max(1, min(batch, PROXY_BYTES // (footprint.FLOAT_BYTES * footprint.kept_values(encoder.operations))))
    images = min(limit, max(1, PROXY_FLOPS // flops))
    seconds(tf.zeros([images, size, size, 3]))  # traces it
    while True:
        x = tf.random.stateless_uniform([images, size, size, 3], seed=[0, 0])
        best = min(seconds(x) for _ in range(3))
        if images == limit or best > CALL_SECONDS:
            return images * flops / best
        images = min(limit, images * 4)


def table(planned: dict[str, Any]) -> str:
    """What `plan` returned, for people to read: a line for each of its figures."""
    parts = sorted(planned["memory_parts"].items(), key=lambda part: -part[1])
    memory = ", ".join(f"{name.replace('_', ' ')} {footprint.in_short(value, 'B')}" for name, value in parts if value)
    head = "none"
    if planned["built_head_parameters"]:
        for_fine_tuning = footprint.in_short(planned["head_parameters"])
        head = f"{footprint.in_short(planned['built_head_parameters'])} ({for_fine_tuning} for fine-tuning)"
    classifier = "unknown"
    if "supervised_head_parameters" in planned:
        classifier = footprint.in_short(planned["supervised_head_parameters"])
    learning_rate = f"{planned['peak_learning_rate']:.4g}"
    if planned["warmup_steps"]:
        learning_rate += f" after {planned['warmup_steps']:,} steps of warmup"
    rows = {
        "encoder parameters": footprint.in_short(planned["encoder_parameters"]),
        "projection head": head,
        "supervised head": classifier,
        "FLOPs per image": f"{footprint.in_short(planned['flops_per_image'])} (forward)",
        "FLOPs per step": footprint.in_short(planned["flops_per_step"]),
        "examples": f"{planned['examples']:,}",
        "replicas": f"{planned['replicas']:,}",
        "steps": f"{planned['train_steps']:,} ({planned['epoch_steps']:,} an epoch)",
        "learning rate": learning_rate,
        "memory per replica": f"{footprint.in_short(planned['memory_bytes_per_replica'], 'B')} (estimate: {memory})",
    }
    if "step_seconds" in planned:
        minutes = math.ceil(planned["total_seconds"] / 60)
        duration = f"{minutes // 60} h {minutes % 60} m" if minutes < 7200 else f"{minutes / 1440:,.0f} days"
        rows["time"] = f"{duration} (estimate: {planned['step_seconds']:,.3f} s a step)"
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())
