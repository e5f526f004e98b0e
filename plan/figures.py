"""What a run takes, in figures: parameters, FLOPs, steps, memory and time."""

from __future__ import annotations

import time
from typing import Any

import tensorflow as tf

import console
import data
import lars_optimizer
import plan.fit as fit
import plan.footprint as footprint
import published
import resnet
import run_folder
import schedule as schedule_lib
import sources
import strategy as strategy_lib
import tasks
from architecture import BASIC, BLOCKS, BOTTLENECK
from config import Config, from_dict
from errors import UserError

# TensorFlow datasets that can be planned with before they are prepared: classes, and examples by split.
KNOWN: dict[str, tuple[int, dict[str, int]]] = {
    "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet2012_subset": (1000, {"train": 12_811, "validation": 50_000}),  # without a name: 1pct
    "imagenet2012_subset/1pct": (1000, {"train": 12_811, "validation": 50_000}),
    "imagenet2012_subset/10pct": (1000, {"train": 128_116, "validation": 50_000}),
    "cifar10": (10, {"train": 50_000, "test": 10_000}),
    "cifar100": (100, {"train": 50_000, "test": 10_000}),
}

# Timing trains the shallowest network of the kind, on ever more images in one call.
PROXY_DEPTHS = {BASIC: 10, BOTTLENECK: 14}
# Width of that network, at most.
PROXY_WIDTH = 1.0
# Memory that one call's activations may take.
PROXY_BYTES = 2**30
# FLOPs of the first call.
PROXY_FLOPS = 10**10
# A call that takes longer than this is measured well enough.
CALL_SECONDS = 0.25


def plan(config: Config, replicas: int = 1, timing: bool = True, fit_into: int | None = None) -> dict[str, Any]:
    """What the training run of `config` takes, in plain numbers.

    Known data sets are not read, and nothing large is built.

    Args:
      config: the run.
      replicas: the number of devices that share each of its batches.
      fit_into: bytes of a device's memory, to find what fits into it.
      timing: also train a small network for some seconds on this process's default device (not on a TPU).

    Returns:
      encoder_parameters: of the encoder, with batch norm's moving averages, which Table 1 of arXiv 2006.10029 counts
        too: without them ResNet-152 (2x) has 232 M, not 233 M.
      head_parameters: of the layers of the projection head that a fine-tuned network keeps. In fine-tuning these are
        the layers up to `ft_proj_selector`; in pretraining it is the first layer, the paper's choice (Table 1: 4 M at
        1x, 17 M at 2x).
      built_head_parameters: of all layers of the head that this run builds: 8.7 M in pretraining at 1x.
      supervised_head_parameters: of the classifier; 0 where the run has none; absent where the classes are unknown.
      flops_per_image: of one image forward through encoder, head and classifier. A multiplication with an addition
        counts as two FLOPs. Only convolutions (2 x kernel size x output height x width) and dense layers count.
      flops_per_step: of all replicas together, without the losses: every view forward and backward (twice the forward),
        and only forward through frozen layers, momentum encoder and teacher (a teacher that does not exist yet counts
        as one of the student's size), and what chunks and recomputed blocks compute again.
      examples: the number of examples that the run sees; in fine-tuning and supervised training, of labelled examples.
      epoch_steps, train_steps, warmup_steps, peak_learning_rate: its schedule.
      memory_bytes_per_replica, memory_parts: an estimate of a step's peak, and its parts as in
        `plan.footprint.memory_parts`.
      fits: only with `fit_into`: what fits, as from `plan.fit.fits`.
      device_flops_per_second, step_seconds, total_seconds: only with `timing`. They are measured on training steps of a
        ResNet-10 or ResNet-14 of the same kind, image size and width (at most 1x), without the input pipeline,
        evaluation and checkpoints. Every replica is taken to be as fast as this device and to wait for no other one.

    Raises:
      UserError: where the data is neither known nor on disk, or has too few labels; where the replicas cannot share a
        batch; where a teacher knows other classes than the data.
    """
    if replicas < 1:
        raise UserError(f"--plan_replicas={replicas}: must be at least 1 (0: as many as there are)")
    strategy_lib.check_batch("train_batch_size", config.train_batch_size, replicas)
    strategy_lib.check_chunks(config.grad_accumulation, config.train_batch_size, replicas)
    examples, found = _examples_and_classes(config)
    teacher_config, of_teacher = _teacher(config)
    if of_teacher and found and of_teacher != found:
        raise UserError(
            f"--teacher={config.teacher} knows {of_teacher} classes, the data {found}: they must be the same"
        )
    classes = of_teacher or found
    network, teacher = footprint.count(config, teacher_config)
    pretrain = config.train_mode == "pretrain"
    batch = config.train_batch_size
    views = footprint.views(config)
    outputs = footprint.outputs_of(config, classes)
    flops = network.forward(outputs)
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
        "flops_per_step": batch * views * footprint.flops_per_view(config, classes, network, teacher),
        "examples": examples,
        "epoch_steps": schedule_lib.epoch_steps(examples, batch),
        "train_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "peak_learning_rate": schedule.peak,
        "memory_bytes_per_replica": sum(parts.values()),
        "memory_parts": parts,
    }
    if fit_into:
        planned["fits"] = fit.fits(config, replicas, fit_into, classes, network, teacher)
    if timing:
        speed = device_flops_per_second(config, views * batch // replicas)
        seconds = planned["flops_per_step"] / replicas / speed
        planned["device_flops_per_second"] = speed
        planned["step_seconds"] = seconds
        planned["total_seconds"] = seconds * planned["train_steps"]
    return planned


def _examples_and_classes(config: Config) -> tuple[int, int]:
    """The numbers of examples that the run sees and of the data's classes, 0 where the data has no labels."""
    examples, classes, source = _split(config.dataset, config.train_split, config)
    if config.labelled_dataset:
        _, classes, _ = _split(config.labelled_dataset, config.labelled_split, config)
    if not config.subset:
        return examples, classes
    per_class = config.labels_per_class
    fraction = config.label_fraction
    if isinstance(source, sources.ListedSource):
        names, labels = source.index()
        chosen = data.choose_labelled(names, labels, per_class, fraction, config.label_seed, source.classes)
        labelled = len(chosen)
    elif per_class:
        labelled = per_class * classes
    else:
        labelled = max(classes, round(fraction * examples))  # as many as where all classes have one size
    if labelled > examples:
        raise UserError(f"--labels_per_class={per_class}: there are {examples} examples of {classes} classes")
    sees_labelled_only = config.train_mode in ("finetune", "supervised")
    return (labelled if sees_labelled_only else examples), classes


def _split(dataset: str, split: str, config: Config) -> tuple[int, int, sources.Source | None]:
    """The numbers of examples and classes of a split, and the split itself where the data set is not in `KNOWN`."""
    is_own = dataset == config.dataset
    classes, sizes = KNOWN.get(dataset.split(":")[0], (0, {}))
    if sizes:
        with data.named_split(f"--train_split={split}" if is_own else f"--labelled_split={split}"):
            examples = sum(end - begin for _, begin, end in sources.split_ranges(split, sizes))
        return examples, classes, None
    source = data.open_split(config, split, None) if is_own else sources.load(dataset, split, config.data_dir)
    return source.examples, len(source.classes), source


def _teacher(config: Config) -> tuple[Config | None, int]:
    """The config of the teacher, and the number of its classes.

    Returns:
      None and 0 where the run has no teacher; the student's config and 0 where the teacher does not exist yet.
    """
    if not config.teacher:
        return None, 0
    if not run_folder.is_checkpoint(config.teacher, "teacher"):
        return config, 0
    weights = published.open_teacher(config)
    return from_dict(weights.config), len(weights.classes)


def device_flops_per_second(config: Config, batch: int) -> float:
    """FLOPs per second of training a shallow network like the encoder of `config`, on at most `batch` images."""
    size = config.image_size
    kind, _ = BLOCKS[config.resnet_depth]
    depth = PROXY_DEPTHS[kind]
    width = min(config.width_multiplier, PROXY_WIDTH)
    encoder = resnet.resnet(
        depth, width, config.sk_ratio, config.se_ratio, config.cifar_stem, image_size=size,
        precision=config.mixed_precision,
    )  # fmt: skip
    variables = encoder.trainable_variables
    optimizer = lars_optimizer.make_optimizer(config.optimizer, 0.0)
    optimizer.build(variables)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, size, size, 3])])
    def step(images: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(encoder(images, training=True)["final_avg_pool"]))
        optimizer.apply(tape.gradient(loss, variables), variables)
        return tf.reduce_sum(tf.convert_to_tensor(variables[0]))  # the stem's, whose gradient comes last

    def seconds(images: tf.Tensor) -> float:
        started = time.perf_counter()
        float(step(images))
        return time.perf_counter() - started

    flops = (1 + footprint.BACKWARD) * sum(map(footprint.flops_of, encoder.operations))  # of one image
    bytes_per_image = footprint.FLOAT_BYTES * footprint.kept_values(encoder.operations)
    limit = max(1, min(batch, PROXY_BYTES // bytes_per_image))
    images = min(limit, max(1, PROXY_FLOPS // flops))
    seconds(tf.zeros([images, size, size, 3]))  # the first call traces the step
    while True:
        x = tf.random.stateless_uniform([images, size, size, 3], seed=[0, 0])
        best = min(seconds(x) for _ in range(3))
        if images == limit or best > CALL_SECONDS:
            return images * flops / best
        images = min(limit, images * 4)


def table(planned: dict[str, Any]) -> str:
    """The figures that `plan` returned, one on each line, for people to read."""
    parts = sorted(planned["memory_parts"].items(), key=lambda part: -part[1])
    shown = [f"{name.replace('_', ' ')} {footprint.in_short(value, 'B')}" for name, value in parts if value]
    memory = ", ".join(shown)
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
        duration = console.duration(planned["total_seconds"])
        rows["time"] = f"{duration} (estimate: {planned['step_seconds']:,.3f} s a step)"
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())
