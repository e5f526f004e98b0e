"""The steps of the method, each as a network and a loss: pretrain (Eq. 1), fine-tune or supervised, distil (Eq. 2, 3).

A task's `loss(batch)` runs in replica context and returns this replica's share of the loss and metrics of the global
batch: summed over the replicas, they are what one replica computes on the whole batch.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import keras
import tensorflow as tf

import augment
import checkpoint
import memory
import model as model_lib
import objective
import resnet
import schedule as schedule_lib
from augment import operators, policies
from config import DATA_FIELDS, Config, from_dict

Batch = Mapping[str, tf.Tensor]
Metrics = dict[str, tf.Tensor]

BROAD_COLOR_PROBABILITY = 0.5  # Our choice: appendix G does not say how many views get a broad operator.


class Totals(NamedTuple):
    """What the means over the global batch are divided by. Float32 scalars."""

    examples: tf.Tensor
    labelled: tf.Tensor


class Task(abc.ABC):
    """What the train loop needs of a step of the method: the networks, and the loss of a batch.

    The loss has three parts, so that a batch can go through the networks chunk by chunk (`accumulation.py`): `outputs`
    of the network that is trained, `targets` of the others, and `loss_of` both. The first two give tensors with a row
    for each image, and the rows of a chunk are those that the images have in the whole batch, but for batch norm.

    A task owns variables. `outputs` and `targets` update batch norm's moving averages. In pretraining, `loss_of` pushes
    the batch's keys into the queue. `after_step` moves the momentum encoder. The weights of `model` belong to the
    optimizer.

    Attributes:
      model: the network that is trained and evaluated.
      views: how a batch's images are made.
      state: the variables that a checkpoint keeps besides those of the model and the optimizer.
      is_joint: whether the loss of an image depends on the other images of the batch.
      output_shapes, target_shapes: the shape of an image's row in each of `outputs` and `targets`, all float32.
    """

    model: model_lib.Model
    views: Mapping[str, augment.View]
    is_joint = False
    output_shapes: Mapping[str, Sequence[int]]
    target_shapes: Mapping[str, Sequence[int]] = MappingProxyType({})

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state: dict[str, Any] = {}

    def loss(self, batch: Batch) -> tuple[tf.Tensor, Metrics]:
        """This replica's share of the loss to differentiate, and of the metrics."""
        loss, metrics = self.loss_of(self.outputs(batch), self.targets(batch), batch, totals(batch["label"]))
        return loss + self.weight_decay(), metrics

    @abc.abstractmethod
    def outputs(self, batch: Batch) -> dict[str, tf.Tensor]:
        """What the network that is trained makes of images, [m, ...] each, with gradient to its weights."""

    def targets(self, batch: Batch) -> dict[str, tf.Tensor]:
        """What other networks make of the same images, [m, ...] each, without gradient."""
        return {}

    @abc.abstractmethod
    def loss_of(
        self, outputs: Mapping[str, tf.Tensor], targets: Mapping[str, tf.Tensor], batch: Batch, totals: Totals
    ) -> tuple[tf.Tensor, Metrics]:
        """This replica's share of the loss without weight decay, and of the metrics.

        Args:
          outputs, targets: of the images in `batch`.
          batch: this replica's share of the global batch. Unless `is_joint`, it may be a part of the share: the losses
            of all parts add up to that of the share.
          totals: of the global batch.
        """

    def after_step(self, step: tf.Tensor) -> None:  # noqa: B027 - most tasks need nothing here
        """What follows the optimizer's update. `step` counts the updates, this one included: an integer scalar."""

    def weight_decay(self) -> tf.Tensor:
        """This replica's share of the L2 loss: of the supervised head under LARS, which decays the rest by itself."""
        decayed = self.model.trainable_variables
        if self.config.optimizer == "lars":
            head = self.model.supervised_head
            decayed = head.trainable_variables if head else []
        return objective.weight_decay_loss(decayed, self.config.weight_decay) / _replicas().num_replicas_in_sync


class Pretrain(Task):
    """Contrastive pretraining, with the memory and the linear evaluation beside it where asked for."""

    is_joint = True

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config)
        linear = config.lineareval_while_pretraining
        self.model = network(config, num_classes if linear else 0, detached=True, remat=config.remat)
        view = augment.pretrain_view(
            config.image_size, config.crop_min_area, config.crop_max_aspect, config.use_flip,
            config.color_jitter_strength, config.grayscale_probability, config.use_blur, _more_operators(config),
        )  # fmt: skip
        self.views = {"view_1": view, "view_2": view}
        self.momentum: model_lib.Model | None = None
        self.queue: memory.Queue | memory.ShardedQueue | None = None
        if config.memory == "queue":
            self.momentum = network(config, 0)
            sharded = config.shard_queue and tf.distribute.get_strategy().num_replicas_in_sync > 1
            kind = memory.ShardedQueue if sharded else memory.Queue
            self.queue = kind(config.memory_size, self.momentum.output_dim)
            queue = {"keys": self.queue.keys, "count": self.queue.count}
            self.state = {"momentum": self.momentum.named_weights(), "queue": queue}
            self.start_momentum()
            self.target_shapes = {"keys": [2, self.momentum.output_dim]}
        self.output_shapes = {"z": [2, self.model.output_dim]}
        if self.model.supervised_head:
            self.output_shapes["logits"] = [2, num_classes]

    def start_momentum(self) -> None:
        """Makes the momentum encoder a copy of the encoder."""
        if self.momentum:
            for k, q in zip(self.momentum.variables, _without_supervised(self.model), strict=True):
                k.assign(q)

    def outputs(self, batch: Batch) -> dict[str, tf.Tensor]:
        """`z` of both views [m, 2, D], and of the linear evaluation `logits` [m, 2, classes]."""
        outputs = self.model(_both_views(batch), training=True)
        found = {"z": _by_image(objective.normalize(outputs.z, self.config.hidden_norm))}
        if outputs.logits is not None:
            found["logits"] = _by_image(tf.cast(outputs.logits, tf.float32))
        return found

    def targets(self, batch: Batch) -> dict[str, tf.Tensor]:
        """With the memory, the `keys` of both views [m, 2, D]."""
        if self.momentum is None:
            return {}
        keys = objective.normalize(self.momentum(_both_views(batch), training=True).z, self.config.hidden_norm)
        return {"keys": tf.stop_gradient(_by_image(keys))}

    def loss_of(
        self, outputs: Mapping[str, tf.Tensor], targets: Mapping[str, tf.Tensor], batch: Batch, totals: Totals
    ) -> tuple[tf.Tensor, Metrics]:
        """NT-Xent, averaged over the images of the global batch and summed over their two views, as in the release."""
        z = _by_view(outputs["z"])  # [2n, D]
        n = tf.shape(outputs["z"])[0]
        candidates = objective.gather_views(_by_view(targets["keys"]) if targets else z)  # [2N, D]
        past: dict[str, Any] = {}
        if self.queue:
            past = {"queue": tf.convert_to_tensor(self.queue.here), "queue_valid": self.queue.valid}
            past["sharded"] = isinstance(self.queue, memory.ShardedQueue)
        chance = self._chance(tf.shape(candidates)[0])
        first = n * _replicas().replica_id_in_sync_group
        contrastive = objective.nt_xent(
            z, candidates, self.config.temperature, first, **past, block=self.config.loss_block
        )
        if self.queue:
            self.queue.push(candidates)
        anchors = 2.0 * totals.examples
        loss = 2.0 * mean_share(contrastive.loss, anchors)
        metrics = {
            "contrastive_loss": loss,
            "contrastive_accuracy": mean_share(contrastive.accuracy, anchors),
            "contrastive_chance": chance,
            "contrastive_entropy": mean_share(contrastive.entropy, anchors),
        }
        if "logits" in outputs:
            labels = tf.concat([batch["label"]] * 2, axis=0)  # [2n]
            linear, more = supervised_share(_by_view(outputs["logits"]), labels, 2.0 * totals.labelled)
            loss += linear
            metrics |= more
        return loss, metrics

    def _chance(self, candidates: tf.Tensor) -> tf.Tensor:
        """This replica's share of the contrastive accuracy that guessing has: all candidates count but one's own."""
        count = tf.cast(candidates - 1, tf.float32)
        if self.queue:
            count += tf.cast(tf.minimum(self.queue.count, self.queue.size), tf.float32)
        return 1.0 / (count * _replicas().num_replicas_in_sync)

    def after_step(self, step: tf.Tensor) -> None:
        if self.momentum:
            decay: float | tf.Tensor = self.config.ema_decay
            if self.config.ema_ramp:
                decay = schedule_lib.ramped_decay(self.config.ema_decay, step)
            model_lib.ema_update(self.momentum.encoder, self.model.encoder, decay)
            if self.model.head:
                model_lib.ema_update(self.momentum.head, self.model.head, decay)


class FinetuneOrSupervised(Task):
    """Cross-entropy on labels: fine-tuning from a layer of the head, linear evaluation, training from scratch."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config)
        self.model = network(config, num_classes, remat=config.remat)
        self.model.freeze(config.fine_tune_after_block)
        self.output_shapes = {"logits": [num_classes]}
        self.views = {"image": crop_and_flip(config, _policy(config))}

    def outputs(self, batch: Batch) -> dict[str, tf.Tensor]:
        """The classifier's `logits` [m, classes]."""
        return {"logits": tf.cast(self.model(batch["image"], training=True).logits, tf.float32)}

    def loss_of(
        self, outputs: Mapping[str, tf.Tensor], targets: Mapping[str, tf.Tensor], batch: Batch, totals: Totals
    ) -> tuple[tf.Tensor, Metrics]:
        """Cross-entropy, averaged over the labelled images of the global batch."""
        return supervised_share(outputs["logits"], batch["label"], totals.labelled, self.config.label_smoothing)


class Distill(Task):
    """A student that learns the teacher's answers on all images, and the labels where alpha < 1.

    Without `teacher`, which gives the answers on a view as logits, they come as logits with the batch.
    """

    def __init__(
        self, config: Config, num_classes: int, teacher: Callable[[tf.Tensor], tf.Tensor] | None = None
    ) -> None:
        super().__init__(config)
        self.model = network(config, num_classes, remat=config.remat)
        self.teacher = teacher
        self.output_shapes, self.target_shapes = {"logits": [num_classes]}, {"teacher": [num_classes]}
        self.views = {"image": crop_and_flip(config)}

    def outputs(self, batch: Batch) -> dict[str, tf.Tensor]:
        """The student's `logits` [m, classes]."""
        return {"logits": tf.cast(self.model(batch["image"], training=True).logits, tf.float32)}

    def targets(self, batch: Batch) -> dict[str, tf.Tensor]:
        """The `teacher`'s answers as logits [m, classes]."""
        if self.teacher:
            return {"teacher": tf.cast(self.teacher(batch["image"]), tf.float32)}
        return {"teacher": batch["answer"]}

    def loss_of(
        self, outputs: Mapping[str, tf.Tensor], targets: Mapping[str, tf.Tensor], batch: Batch, totals: Totals
    ) -> tuple[tf.Tensor, Metrics]:
        """Eq. 3 with means in place of its sums: over all images, and over the labelled ones of the global batch."""
        alpha, tau = self.config.distill_alpha, self.config.distill_temperature
        student, teacher = outputs["logits"], targets["teacher"]  # [n, classes]
        distilled = mean_share(objective.distillation(student, teacher, tau), totals.examples)
        agreement = tf.cast(tf.argmax(student, axis=1) == tf.argmax(teacher, axis=1), tf.float32)
        labelled, metrics = supervised_share(student, batch["label"], totals.labelled, self.config.label_smoothing)
        metrics |= {"distillation_loss": distilled, "teacher_agreement": mean_share(agreement, totals.examples)}
        loss = alpha * distilled + ((1.0 - alpha) * labelled if alpha < 1 else 0.0)
        return loss, metrics


def network(
    config: Config, num_classes: int, detached: bool = False, image_size: int | None = None, remat: bool = False
) -> model_lib.Model:
    """The network that `config` describes: what its train_mode needs of the projection head and no more.

    `image_size` fixes the images' height and width, so that every layer's shape is known; None: any. With `remat`, it
    computes the activations of its blocks again in the backward pass.
    """
    encoder = resnet.resnet(
        config.resnet_depth, config.width_multiplier, config.sk_ratio, config.se_ratio, config.cifar_stem,
        config.global_bn, config.batch_norm_decay, image_size, config.mixed_precision,
    )  # fmt: skip
    pretrain, selector = config.train_mode == "pretrain", config.classifier_layer
    with_head = pretrain or config.train_mode == "finetune"
    head = model_lib.projection_head(
        encoder.output["final_avg_pool"].shape[-1], config.proj_head_mode if with_head else "none",
        config.proj_out_dim, config.num_proj_layers, keep=None if pretrain else selector,
        global_bn=config.global_bn, batch_norm_decay=config.batch_norm_decay, precision=config.mixed_precision,
    )  # fmt: skip
    return model_lib.Model(encoder, head, num_classes, selector, detached, config.zero_init_logits_layer, remat)


def skeleton(config: Config, num_classes: int, image_size: int | None = None) -> model_lib.Model:
    """The network that `config` describes, without values: its weights have names and shapes only.

    No memory of the network's size is taken. The network cannot compute anything.

    Args:
      config, num_classes, image_size: as for `network`.
    """

    def build() -> model_lib.Model:
        with keras.StatelessScope(initialize_variables=False):
            return network(config, num_classes, image_size=image_size)

    # Keras remembers, for each thread, the weights that have no values yet, and fills them when that thread next leaves
    # such a scope. The thread here ends before that.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(build).result()


def make_schedule(config: Config, examples: int) -> schedule_lib.WarmupCosine:
    """The learning rate by step of a run on `examples` images; its `total_steps` is the number of steps to train."""
    batch = config.train_batch_size
    return schedule_lib.WarmupCosine(
        schedule_lib.peak_learning_rate(config.learning_rate, config.learning_rate_scaling, batch),
        schedule_lib.warmup_steps(examples, config.warmup_epochs, batch),
        schedule_lib.train_steps(examples, config.train_epochs, batch, config.train_steps),
    )


def make_task(config: Config, classes: Sequence[str], teacher: Callable[[tf.Tensor], tf.Tensor] | None = None) -> Task:
    """The task of `config.train_mode`. Make it under the strategy's scope. `teacher` is as for `Distill`."""
    if config.train_mode == "pretrain":
        return Pretrain(config, len(classes))
    if config.train_mode == "distill":
        return Distill(config, len(classes), teacher)
    return FinetuneOrSupervised(config, len(classes))


def restore_network(weights: checkpoint.Weights, precision: str = "float32") -> model_lib.Model:
    """The whole network of a checkpoint, with its weights. It computes in `precision`, whatever it was trained in."""
    config = dataclasses.replace(from_dict(weights.config), mixed_precision=precision)
    without_classifier = config.train_mode == "pretrain" and not config.lineareval_while_pretraining
    model = network(config, 0 if without_classifier else len(weights.classes))
    weights.load(model, ("encoder", "head", "supervised_head"))
    return model


def frozen_logits(weights: checkpoint.Weights, precision: str = "float32") -> Callable[[tf.Tensor], tf.Tensor]:
    """The logits of a checkpoint's network in inference mode, as a function of images: a teacher."""
    network_of_teacher = restore_network(weights, precision).inference()
    return lambda images: network_of_teacher(images).logits


def start_from(weights: checkpoint.Weights, classes: Sequence[str], task: Task) -> None:
    """Starts `task` from another run's weights.

    The supervised head comes along only if it answers the same question: it has the same classes, stands on the same
    layer and has learnt from the same labels. A classifier that has seen more labels than this run may see would
    carry them over. Nothing tells which labels a distilled network has seen through its teacher, so its head never
    comes along.
    """
    parts = ["encoder"] + (["head"] if task.model.head else [])
    ours, theirs = task.config, from_dict(weights.config)
    same_question = (
        weights.classes == list(classes)
        and theirs.classifier_layer == ours.classifier_layer
        and all(weights.config.get(name) == getattr(ours, name) for name in DATA_FIELDS)
        and "distill" not in (ours.train_mode, theirs.train_mode)
    )
    wanted = task.model.supervised_head and not ours.zero_init_logits_layer
    if wanted and same_question and weights.has("supervised_head"):
        parts.append("supervised_head")
    weights.load(task.model, parts)
    if isinstance(task, Pretrain):
        task.start_momentum()


def totals(labels: tf.Tensor) -> Totals:
    """How many examples the global batch has, and how many labelled ones, from this replica's `labels` [n]."""
    counts = tf.stack([tf.size(labels), tf.math.count_nonzero(labels >= 0, dtype=tf.int32)])  # [2]
    counts = _replicas().all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(counts, tf.float32))
    return Totals(counts[0], counts[1])


def mean_share(values: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
    """This replica's share of the mean of `values` [n] over the global batch, which has `total` of them."""
    return tf.reduce_sum(values) / tf.maximum(total, 1.0)


def supervised_share(
    logits: tf.Tensor, labels: tf.Tensor, labelled: tf.Tensor, label_smoothing: float = 0.0
) -> tuple[tf.Tensor, Metrics]:
    """This replica's share of the supervised loss and accuracy over the `labelled` examples of the global batch."""
    loss, correct = objective.supervised(logits, labels, label_smoothing)  # [n], [n], 0 without label
    loss = mean_share(loss, labelled)
    return loss, {"supervised_loss": loss, "supervised_accuracy": mean_share(correct, labelled)}


def crop_and_flip(config: Config, more: Sequence[augment.Operator] = ()) -> augment.View:
    """The view of fine-tuning, distillation and supervised training, with `more` operators at its end."""
    return augment.crop_and_flip(config.image_size, config.crop_min_area, config.crop_max_aspect, config.use_flip, more)


def _policy(config: Config) -> list[augment.Operator]:
    """What supervised training adds to crop and flip."""
    if config.augment_policy == "autoaugment":
        return [operators.each(policies.autoaugment, "autoaugment")]
    if config.augment_policy == "randaugment":
        layers, magnitude = config.randaugment_layers, config.randaugment_magnitude
        policy = functools.partial(policies.randaugment, layers=layers, magnitude=magnitude)
        return [operators.each(policy, f"randaugment(layers={layers}, magnitude={magnitude:.3g})")]
    return []


def _more_operators(config: Config) -> list[augment.Operator]:
    """What appendix G adds to the views of pretraining."""
    more: list[augment.Operator] = []
    if config.color_operators == "broad":
        strength = config.color_jitter_strength
        broad = functools.partial(policies.broad_color, strength=strength)
        more.append(operators.each(broad, f"broad_color(strength={strength:.3g})", BROAD_COLOR_PROBABILITY))
    if config.sobel_probability:
        more.append(operators.each(policies.sobel, "sobel", config.sobel_probability))
    return more


def _both_views(batch: Batch) -> tf.Tensor:
    """The views of m images in block order, [2m, H, W, 3]."""
    return tf.concat([batch["view_1"], batch["view_2"]], axis=0)


def _by_image(x: tf.Tensor) -> tf.Tensor:
    """What is in block order, [2m, D], as [m, 2, D]."""
    return tf.stack(tf.split(x, 2), axis=1)


def _by_view(x: tf.Tensor) -> tf.Tensor:
    """What has a row for each image, [m, 2, D], in block order, [2m, D]."""
    return tf.concat(tf.unstack(x, axis=1), axis=0)


def _without_supervised(model: model_lib.Model) -> list[keras.Variable]:
    return model.encoder.variables + (model.head.variables if model.head else [])


def _replicas() -> tf.distribute.ReplicaContext:
    return tf.distribute.get_replica_context()
