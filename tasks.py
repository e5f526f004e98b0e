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
from typing import Any

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

Metrics = dict[str, tf.Tensor]

BROAD_COLOR_PROBABILITY = 0.5  # Our choice: appendix G does not say how many views get a broad operator.


class Task(abc.ABC):
    """What the train loop needs of a step of the method: the networks, and the loss of a batch.

    A task owns variables. `loss` updates batch norm's moving averages and, in pretraining, pushes the batch's keys
    into the queue; `after_step` moves the momentum encoder. The weights of `model` belong to the optimizer.

    Attributes:
      model: the network that is trained and evaluated.
      views: how a batch's images are made.
      state: the variables that a checkpoint keeps besides those of the model and the optimizer.
    """

    model: model_lib.Model
    views: Mapping[str, augment.View]

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state: dict[str, Any] = {}

    @abc.abstractmethod
    def loss(self, batch: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Metrics]:
        """This replica's share of the loss to differentiate, and of the metrics."""

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

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config)
        linear = config.lineareval_while_pretraining
        self.model = network(config, num_classes if linear else 0, detached=True)
        view = augment.pretrain_view(
            config.image_size, config.crop_min_area, config.crop_max_aspect, config.use_flip,
            config.color_jitter_strength, config.grayscale_probability, config.use_blur, _more_operators(config),
            for_canvas=config.augment_on == "device",
        )  # fmt: skip
        self.views = {"view_1": view, "view_2": view}
        self.momentum: model_lib.Model | None = None
        self.queue: memory.Queue | None = None
        if config.memory == "queue":
            self.momentum = network(config, 0)
            self.queue = memory.Queue(config.memory_size, self.momentum.output_dim)
            self.state = {"momentum": self.momentum.named_weights(), "queue": self.queue}
            self.start_momentum()

    def start_momentum(self) -> None:
        """Makes the momentum encoder a copy of the encoder."""
        if self.momentum:
            for k, q in zip(self.momentum.variables, _without_supervised(self.model), strict=True):
                k.assign(q)

    def loss(self, batch: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Metrics]:
        """NT-Xent, averaged over the images of the global batch and summed over their two views, as in the release."""
        images = tf.concat([batch["view_1"], batch["view_2"]], axis=0)  # [2n, H, W, 3]
        n = tf.shape(batch["view_1"])[0]
        outputs = self.model(images, training=True)
        z = objective.normalize(outputs.z, self.config.hidden_norm)  # [2n, D]
        past: dict[str, tf.Tensor] = {}
        if self.momentum and self.queue:
            keys = objective.normalize(self.momentum(images, training=True).z, self.config.hidden_norm)  # [2n, D]
            candidates = tf.stop_gradient(objective.gather_views(keys))  # [2N, D]
            past = {"queue": tf.convert_to_tensor(self.queue.keys), "queue_valid": self.queue.valid}
        else:
            candidates = objective.gather_views(z)  # [2N, D]
        first = n * _replicas().replica_id_in_sync_group
        contrastive = objective.nt_xent(
            z, candidates, self.config.temperature, first, **past, block=self.config.loss_block
        )
        if self.queue:
            self.queue.push(candidates)
        loss = 2.0 * mean_share(contrastive.loss)
        metrics = {
            "contrastive_loss": loss,
            "contrastive_accuracy": mean_share(contrastive.accuracy),
            "contrastive_chance": self._chance(tf.shape(candidates)[0], past.get("queue_valid")),
            "contrastive_entropy": mean_share(contrastive.entropy),
        }
        if outputs.logits is not None:
            linear, more = supervised_share(outputs.logits, tf.concat([batch["label"]] * 2, axis=0))
            loss += linear
            metrics |= more
        return loss + self.weight_decay(), metrics

    def _chance(self, candidates: tf.Tensor, queue_valid: tf.Tensor | None) -> tf.Tensor:
        """This replica's share of the contrastive accuracy that guessing has: all candidates count but one's own."""
        count = tf.cast(candidates - 1, tf.float32)
        if queue_valid is not None:
            count += tf.reduce_sum(tf.cast(queue_valid, tf.float32))
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
        self.model = network(config, num_classes)
        self.model.freeze(config.fine_tune_after_block)
        self.views = {"image": crop_and_flip(config, _policy(config))}

    def loss(self, batch: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Metrics]:
        logits = self.model(batch["image"], training=True).logits  # [n, classes]
        loss, metrics = supervised_share(logits, batch["label"], self.config.label_smoothing)
        return loss + self.weight_decay(), metrics


class Distill(Task):
    """A student that learns the teacher's answers on all images, and the labels where alpha < 1.

    Without `teacher`, which gives the answers on a view as logits, they come as logits with the batch.
    """

    def __init__(
        self, config: Config, num_classes: int, teacher: Callable[[tf.Tensor], tf.Tensor] | None = None
    ) -> None:
        super().__init__(config)
        self.model = network(config, num_classes)
        self.teacher = teacher
        self.views = {"image": crop_and_flip(config)}

    def loss(self, batch: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, Metrics]:
        """Eq. 3 with means in place of its sums: over all images, and over the labelled ones of the global batch."""
        alpha, tau = self.config.distill_alpha, self.config.distill_temperature
        student = self.model(batch["image"], training=True).logits  # [n, classes]
        teacher = self.teacher(batch["image"]) if self.teacher else batch["answer"]  # [n, classes]
        distilled = mean_share(objective.distillation(student, teacher, tau))
        agreement = tf.cast(tf.argmax(student, axis=1) == tf.argmax(teacher, axis=1), tf.float32)
        labelled, metrics = supervised_share(student, batch["label"], self.config.label_smoothing)
        metrics |= {"distillation_loss": distilled, "teacher_agreement": mean_share(agreement)}
        loss = alpha * distilled + ((1.0 - alpha) * labelled if alpha < 1 else 0.0)
        return loss + self.weight_decay(), metrics


def network(config: Config, num_classes: int, detached: bool = False, image_size: int | None = None) -> model_lib.Model:
    """The network that `config` describes: what its train_mode needs of the projection head and no more.

    `image_size` fixes the images' height and width, so that every layer's shape is known; None: any.
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
    return model_lib.Model(encoder, head, num_classes, selector, detached, config.zero_init_logits_layer)


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


def mean_share(values: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
    """This replica's share of the mean of `values` [n] (weighted by `weights` [n]) over the global batch."""
    replicas = _replicas()
    total = tf.cast(tf.size(values), tf.float32) if weights is None else tf.reduce_sum(weights)
    total = replicas.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(total))
    return tf.reduce_sum(values if weights is None else values * weights) / tf.maximum(total, 1.0)


def supervised_share(logits: tf.Tensor, labels: tf.Tensor, label_smoothing: float = 0.0) -> tuple[tf.Tensor, Metrics]:
    """This replica's share of the supervised loss and accuracy over the labelled examples of the global batch."""
    loss, correct = objective.supervised(logits, labels, label_smoothing)  # [n], [n]
    labelled = tf.cast(labels >= 0, tf.float32)
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


def _without_supervised(model: model_lib.Model) -> list[keras.Variable]:
    return model.encoder.variables + (model.head.variables if model.head else [])


def _replicas() -> tf.distribute.ReplicaContext:
    return tf.distribute.get_replica_context()
