"""The one list of hyper-parameters: a frozen `Config`, its presets and its validation.

The command-line flags are generated from the fields below (`run.py`); nothing else reads flags. A field's
default is the 2020 release's unless its dataset has a preset (`PRESETS`), which holds where a flag is not given.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from architecture import BLOCKS, SMALL_IMAGE_PIXELS
from errors import UserError, did_you_mean

# The modes that give answers about single images, and the kinds of files that they write.
ANSWER_FILES = {"predict": (".csv", ".parquet"), "embed": (".npz", ".parquet"), "suggest": (".csv",)}
MODES = ("train", "eval", "train_then_eval", "export", "plan", *ANSWER_FILES)
# The modes that only use a network.
NETWORK_MODES = ("eval", "export", *ANSWER_FILES)
TRAIN_MODES = ("pretrain", "finetune", "distill", "supervised")
AUTO_SPLIT = "auto"  # the --eval_split that is a part of --train_split
PRECISIONS = ("float32", "bfloat16", "float16")
STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker", "tpu")
CLUSTERS = ("env", "slurm", "kubernetes")
# The largest size of a tensor's side, and the largest number of steps.
LARGEST = 2**31 - 1
# The texts that may name files by bytes that are not UTF-8: only folders of images are read so.
ANY_BYTES = ("data_dir", "labels", "images")


def option(
    default: Any,
    help: str,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
    trains: bool = True,
) -> Any:
    """A field of `Config`.

    Args:
      default: its default; the field is of this type.
      help: its text in --help.
      choices, low, high: the values it may take; `low` and `high` may be taken too. A whole number without `high` may
        be as large as TensorFlow can count.
      trains: whether it says how the network is trained. `continuation.KIN` then says what becomes of a run that goes
        on with another value.
    """
    if type(default) is int and high is None:
        high = LARGEST
    metadata = dict(help=help, choices=choices, low=low, high=high, trains=trains)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every hyper-parameter of a run. Making one validates all of it: `UserError` with one clause per mistake."""

    # What to do
    mode: str = option("train", "What to do.", MODES, trains=False)
    train_mode: str = option("pretrain", "Which step of the method.", TRAIN_MODES)
    model_dir: str = option("", "Where the run lives. Default: runs/<dataset or folder>_<train_mode>.", trains=False)
    seed: int = option(0, "Seed of initialisation, data order and augmentation.", low=0, high=2**32 - 1)
    deterministic: bool = option(
        False,
        "Add up all numbers in a fixed order, which may be slower: on one machine, a run that was stopped and goes on "
        "then ends as one that was not stopped, bit for bit.",
    )

    recipe: str = option(
        "paper",
        "Values for what is not given: auto fits them to the data and the devices; paper takes the 2020 release's, or "
        "the preset of the data set. Where the data set has no preset, auto holds.",
        ("paper", "auto"),
        trains=False,
    )

    # Data
    dataset: str = option(
        "digits", "digits, image_folder (also with --data_dir alone), or the name of a TensorFlow dataset."
    )
    data_dir: str = option("", "The image folder, or where TensorFlow Datasets keeps its data.", trains=False)
    train_split: str = option("train", "Split to train on; slices such as train[:80%] too.")
    eval_split: str = option(
        "validation",
        "Split to evaluate on. Of an image folder, if not given: the first of validation, valid, val and test; where "
        "there is none, auto: a tenth of the images of train_split, chosen by their names, and not trained on.",
        trains=False,
    )
    labels: str = option(
        "",
        "Table with the labels of an image folder: FILE.csv or FILE.parquet with the columns path, label and, if you "
        "like, split. Images without a row, or without a label in it, are unlabelled.",
        trains=False,
    )
    images: str = option(
        "",
        "List of the images of a folder to use: FILE.txt with a path in each line, or FILE.csv or FILE.parquet with "
        "a column path.",
        trains=False,
    )
    image_size: int = option(224, "Height and width of the network's input, in pixels.", low=8)
    cache_dataset: bool = option(False, "Keep the whole (encoded) training set in memory.", trains=False)
    labels_per_class: int = option(0, "Use the labels of this many examples of each class; 0: of all.", low=0)
    label_fraction: float = option(0.0, "Use the labels of this fraction of each class; 0: of all.", low=0.0, high=1.0)
    label_seed: int = option(0, "Seed of the choice of labelled examples.", low=0, high=2**62)
    labelled_dataset: str = option("", "TensorFlow dataset whose labels alone are used, matched by file name.")
    labelled_split: str = option("train", "Split of labelled_dataset.")
    max_corrupt_fraction: float = option(
        0.01, "Share of unreadable images above which to stop.", low=0.0, high=1.0, trains=False
    )
    max_image_pixels: int = option(
        100_000_000, "An image in a file with more pixels counts as unreadable.", low=1, high=2**62, trains=False
    )

    # Encoder f and projection head g
    resnet_depth: int = option(50, "Depth of the ResNet.", tuple(BLOCKS))
    width_multiplier: float = option(1.0, "Width of the ResNet; fractions too.", low=0.0625, high=16.0)
    sk_ratio: float = option(0.0, "Selective kernels and ResNet-D where > 0 (the paper: 0.0625).", low=0.0, high=1.0)
    se_ratio: float = option(0.0, "Squeeze-and-excitation where > 0.", low=0.0, high=1.0)
    proj_head_mode: str = option("nonlinear", "Kind of projection head.", ("none", "linear", "nonlinear"))
    proj_out_dim: int = option(128, "Output width of the projection head.", low=1)
    num_proj_layers: int = option(3, "Layers of a nonlinear projection head.", low=1, high=4)
    global_bn: bool = option(True, "Batch-norm statistics over the global batch.")
    batch_norm_decay: float = option(0.9, "Decay of the moving batch-norm statistics.", low=0.0, high=1.0)

    # Views
    crop_min_area: float = option(0.08, "Smallest share of the image a crop may cover.", low=0.01, high=1.0)
    crop_max_aspect: float = option(4 / 3, "Widest aspect of a crop; the narrowest is 1 / this.", low=1.0, high=8.0)
    use_flip: bool = option(True, "Mirror half of the views.")
    color_jitter_strength: float = option(1.0, "Strength s of the colour jitter; 0: none.", low=0.0, high=2.0)
    grayscale_probability: float = option(0.2, "Share of the views turned grey.", low=0.0, high=1.0)
    use_blur: bool = option(True, "Blur half of the views in pretraining.")
    color_operators: str = option("simclr", "Colour operators of pretraining (broad: appendix G).", ("simclr", "broad"))
    sobel_probability: float = option(0.0, "Share of the views of pretraining turned to edges.", low=0.0, high=1.0)
    augment_policy: str = option(
        "none", "What supervised training and fine-tuning add to crop and flip.", ("none", "autoaugment", "randaugment")
    )
    randaugment_layers: int = option(2, "Operators N that RandAugment applies to an image.", low=1, high=14)
    randaugment_magnitude: float = option(9.0, "Magnitude M of RandAugment's operators.", low=0.0, high=10.0)

    augment_on: str = option(
        "host",
        "Where the views are made: host, or device, which leaves the host only reading, decoding and drawing where to "
        "crop. For accelerators whose host has too few cores.",
        ("host", "device"),
        trains=False,
    )

    data_service: str = option(
        "",
        "Servers that read and augment the training images, as grpc://HOST:PORT with commas between them "
        "(tools/data_service.py starts one). Empty: this machine does.",
        trains=False,
    )

    # Contrastive loss and memory
    temperature: float = option(0.1, "Temperature tau of NT-Xent.", low=1e-4)
    hidden_norm: bool = option(True, "L2-normalise z before the loss.")
    memory: str = option("queue", "Negatives from a queue of momentum-encoder keys, or none.", ("queue", "none"))
    memory_size: int = option(65536, "Keys in the queue.", low=1)
    ema_decay: float = option(0.999, "Decay of the momentum encoder.", low=0.0, high=1.0)
    ema_ramp: bool = option(
        False,
        "Ramp the momentum encoder's decay up to ema_decay: min(ema_decay, (1 + t) / (10 + t)) at step t.",
    )
    loss_block: int = option(
        0,
        "Anchors whose logits are computed at a time: fewer take less memory, and the loss is the same; 0: as many as "
        "take 16 MB.",
        low=0,
    )
    shard_queue: bool = option(
        False, "Split the queue over the replicas, each of which then holds a part of its keys. The loss is the same."
    )
    lineareval_while_pretraining: bool = option(True, "Train a linear head on the frozen features beside pretraining.")

    # Fine-tuning
    checkpoint: str = option("", "Weights to start from: a model_dir, a checkpoint or a published model.")
    ft_proj_selector: int = option(
        0,
        "Head layer the classifier stands on (0: h, -1: the last). In distillation: the published teacher's.",
        low=-1,
        high=4,
    )
    fine_tune_after_block: int = option(-1, "Freeze the blocks up to this; 4: linear; -1: none.", low=-1, high=4)
    zero_init_logits_layer: bool = option(False, "Start the classifier from zero.")
    linear_start: bool = option(
        False, "Start the classifier as the linear one that fits the labelled images' features, instead of at random."
    )
    label_smoothing: float = option(0.0, "Share of each label spread over all classes.", low=0.0, high=0.99)

    # Distillation
    teacher: str = option("", "Fine-tuned model to distil: a model_dir, a checkpoint or a published model.")
    distill_alpha: float = option(1.0, "Weight alpha of the distillation term in Eq. 3; 1: Eq. 2.", low=0.0, high=1.0)
    distill_temperature: float = option(1.0, "Temperature of teacher and student.", low=1e-3)
    distill_neighbors: int = option(
        0,
        "Neighbours among the teacher's features along which the labels spread over all images; the student learns "
        "these answers. 0: it learns the teacher's own, as in the paper.",
        low=0,
    )
    distill_views: int = option(
        1,
        "With distill_neighbors, the teacher's features and answers are means over so many crops of an image, flipped "
        "and as large as the student sees them. 1: those of the central crop.",
        low=1,
        high=1024,
    )
    cache_teacher: bool = option(
        False,
        "The student learns what the teacher says about the centre crop of each image, instead of about the view that "
        "it sees itself. That is computed once, before the first step, and kept in answers.npz, so that a step needs "
        "no teacher. The encoded images stay in memory.",
    )

    # Optimization
    optimizer: str = option("lars", "Optimizer.", ("lars", "momentum", "adam"))
    learning_rate: float = option(0.3, "Learning rate, before scaling with the batch size.", low=0.0)
    learning_rate_scaling: str = option("linear", "x batch / 256, or x sqrt(batch).", ("linear", "sqrt"))
    warmup_epochs: float = option(10.0, "Epochs of linear warmup.", low=0.0, high=1e9)
    weight_decay: float = option(1e-6, "Weight decay.", low=0.0)
    momentum: float = option(0.9, "Momentum of LARS and SGD.", low=0.0, high=0.9999)
    train_batch_size: int = option(512, "Images per step, over all replicas.", low=1)
    train_epochs: int = option(100, "Epochs to train.", low=1)
    train_steps: int = option(0, "Steps to train; overrides train_epochs.", low=0)
    train_minutes: float = option(
        0.0,
        "Minutes that training may take, its start included: measures this machine and sets the length of a new run, "
        "in steps where few epochs fit; 0: as long as it takes.",
        low=0.0,
        high=1e9,
        trains=False,
    )
    view_pilot: bool = option(
        True,
        "With recipe=auto and some labels: before a new pretraining run, try for a few steps whether the views should "
        "change colours less than usual and show larger crops, or of grey images smaller ones. False: as usual.",
        trains=False,
    )
    max_minutes: float = option(
        0.0,
        "Minutes that this command may take, its start and the last checkpoint included: then training stops, with "
        "exit status 75, and the same command goes on; 0: as long as it takes.",
        low=0.0,
        trains=False,
    )
    on_nan: str = option(
        "stop",
        "Where the loss, the gradient or a weight is not finite: stop; skip, which leaves the step out; or restore, "
        "which goes back to the last good checkpoint and on with a new order of the data.",
        ("stop", "skip", "restore"),
    )
    max_nan_steps: int = option(10, "Steps that on_nan=skip leaves out before a run stops.", low=0, trains=False)
    max_nan_restores: int = option(3, "How often on_nan=restore goes back before a run stops.", low=0, trains=False)

    # Evaluation
    eval_batch_size: int = option(256, "Images per evaluation step, over all replicas.", low=1, trains=False)
    eval_steps: int = option(
        0, "Evaluation steps, of examples drawn at random; 0: the whole split.", low=0, trains=False
    )
    eval_every_epochs: float = option(
        0.0,
        "Epochs between two probes of pretraining's features; 0: about twenty times a run; negative: never.",
        high=1e9,
        trains=False,
    )
    eval_name: str = option("", "Suffix of this evaluation's results and TensorBoard run.", trains=False)
    knn_neighbors: int = option(
        20,
        "Neighbours of the kNN accuracy after pretraining; 0: skip it; -1: their number is chosen on the bank's own "
        "features, and with it how far to whiten them.",
        low=-1,
        trains=False,
    )
    knn_labels: str = option(
        "run", "Labels of the kNN bank: those the run may see, or all.", ("run", "all"), trains=False
    )

    # Answers about single images
    output: str = option("", "The file that --mode=predict, embed and suggest write.", trains=False)
    predict_split: str = option(
        "",
        "Split whose images --mode=predict and embed are about. Not given: every image in an image folder, at any "
        "depth; eval_split of other data.",
        trains=False,
    )
    unlabelled_only: bool = option(
        False,
        "With --mode=predict and embed: only the images of predict_split, or else of train_split, that have no label. "
        "Labels that the run may not see do not count.",
        trains=False,
    )
    calibrate: bool = option(
        True, "With --mode=predict: use the temperature that the evaluation of the run has found.", trains=False
    )
    embed_layer: int = option(
        0, "With --mode=embed and suggest: the head layer to take (0: h, -1: the last).", low=-1, high=4, trains=False
    )
    count: int = option(0, "With --mode=suggest: how many images.", low=0, trains=False)

    # Checkpoints, logs, exports
    checkpoint_epochs: int = option(1, "Epochs between checkpoints.", low=1, trains=False)
    checkpoint_steps: int = option(0, "Steps between checkpoints; overrides checkpoint_epochs.", low=0, trains=False)
    checkpoint_minutes: float = option(
        30.0,
        "Minutes after which a checkpoint is written, if none was; 0: the clock does not count.",
        low=0.0,
        trains=False,
    )
    keep_best: bool = option(
        True,
        "Keep the checkpoint of pretraining with the best kNN probe in model_dir/best. Without labels there is none.",
        trains=False,
    )
    checkpoint_choice: str = option(
        "newest",
        "Which checkpoint is meant: of the run or --checkpoint whose network the command uses; in training, of the "
        "runs that --checkpoint=DIR and --teacher=DIR name. best: the best of each run that keeps one (see "
        "keep_best), and the newest of the others.",
        ("newest", "best"),
        trains=False,
    )
    keep_checkpoint_max: int = option(5, "Checkpoints to keep.", low=1, trains=False)
    keep_checkpoint_every_n_hours: float = option(
        0.0,
        "Of the checkpoints before the newest keep_checkpoint_max, keep one for every so many hours; 0: none.",
        low=0.0,
        trains=False,
    )
    on_checkpoint_failure: str = option(
        "stop",
        "Where a checkpoint cannot be written, as on a full disk: stop; or warn, go on and try again at the next save, "
        "which must succeed at the end of a run.",
        ("stop", "warn"),
        trains=False,
    )
    keep_hub_module_max: int = option(1, "SavedModels to keep; 0: all.", low=0, trains=False)
    summary_steps: int = option(10, "Steps between TensorBoard scalars.", low=1, trains=False)
    profile_steps: str = option(
        "",
        "FIRST,LAST: write a TensorBoard profile of these steps and what is between them. To see it: pip install "
        "tensorboard-plugin-profile, then tensorboard --logdir=MODEL_DIR.",
        trains=False,
    )

    # Devices
    grad_accumulation: int = option(
        1,
        "Chunks in which each replica's share of a batch goes through the networks, one after the other, with the "
        "memory of one of them. The contrastive loss still sees the whole batch; batch norm sees a chunk.",
        low=1,
    )
    remat: bool = option(
        False,
        "Keep no activations of the encoder's blocks, and compute them again in the backward pass: less memory, more "
        "time, the same numbers.",
    )
    mixed_precision: str = option(
        "float32",
        "What convolutions and dense layers compute in during training. Weights, batch-norm statistics, losses, memory "
        "and optimizer stay in float32, and so do evaluation, answers and exports. bfloat16 and float16 need a GPU, a "
        "TPU or a CPU with instructions for them.",
        PRECISIONS,
    )
    jit_compile: bool = option(
        False,
        "Compile the training step with XLA, for one device. The first step then takes longer, the others may be "
        "faster. On a TPU XLA compiles everything anyway.",
    )
    steps_per_call: int = option(
        1,
        "Steps in one call of the host, as far as nothing must be written between them; more may be faster where an "
        "accelerator takes steps faster than the host can ask for them. The device holds their batches.",
        low=1,
        high=1000,
        trains=False,
    )
    memory_check: bool = option(True, "Refuse a run whose estimated memory exceeds the device's.", trains=False)
    strategy: str = option(
        "auto", "How to distribute; auto: all GPUs, or the cluster of TF_CONFIG.", STRATEGIES, trains=False
    )
    cluster: str = option(
        "env",
        "With many hosts, who knows them: env, the variable TF_CONFIG; slurm, srun; kubernetes, the Indexed Job.",
        CLUSTERS,
        trains=False,
    )
    worker_timeout: float = option(
        900.0,
        "Seconds that workers on many hosts wait for one of them that does not start, or takes no part in what all do "
        "together; then they stop with exit status 75. One that ends, or gives no sign of life for 30 seconds, stops "
        "them at once.",
        low=1.0,
        high=1e6,
        trains=False,
    )
    use_tpu: bool = option(False, "Same as --strategy=tpu.", trains=False)
    tpu_name: str = option("", "The Cloud TPU's name or grpc:// address.", trains=False)
    tpu_zone: str = option("", "GCE zone of the TPU.", trains=False)
    gcp_project: str = option("", "Project of the TPU.", trains=False)
    master: str = option("", "Address of the TPU's TensorFlow master, where it has no name.", trains=False)

    def __post_init__(self) -> None:
        problems = _value_problems(self.to_dict()) or [*_contradictions(self), *_head_problems(self)]
        if problems:
            raise UserError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def strategy_name(self) -> str:
        """The strategy, `--use_tpu` counted in."""
        return "tpu" if self.use_tpu else self.strategy

    @property
    def planned_strategy_name(self) -> str:
        """The strategy of a plan. It does not wait for a cluster or a TPU: it is made for one replica of it."""
        is_elsewhere = self.strategy_name in ("tpu", "multi_worker") or self.cluster != "env"
        return "one_device" if is_elsewhere else self.strategy_name

    @property
    def cifar_stem(self) -> bool:
        """Whether the encoder has the 3x3 stem without pooling, for small images."""
        return self.image_size <= SMALL_IMAGE_PIXELS

    @property
    def subset(self) -> bool:
        """Whether the labels of a drawn subset alone are used."""
        return bool(self.labels_per_class or self.label_fraction)

    @property
    def head_layers(self) -> int:
        """Layers of the whole projection head."""
        return {"none": 0, "linear": 1, "nonlinear": self.num_proj_layers}[self.proj_head_mode]

    @property
    def built_head_layers(self) -> int:
        """Layers of the projection head that this run's network has: fine-tuning builds no more than it stands on."""
        if self.train_mode == "pretrain":
            return self.head_layers
        return self.classifier_layer if self.train_mode == "finetune" else 0

    @property
    def classifier_layer(self) -> int:
        """The head layer on which this network's own classifier stands; 0 is h."""
        if self.train_mode not in ("pretrain", "finetune"):
            return 0
        return self.head_layers if self.ft_proj_selector == -1 else self.ft_proj_selector

    @property
    def profiled_steps(self) -> range:
        """The steps of which a profile is written."""
        return steps_from_first_to_last(self.profile_steps) or range(0)

    @property
    def teacher_layer(self) -> int | None:
        """In distillation, the head layer on which a published teacher's classifier stands, as the user said it."""
        return self.ft_proj_selector if self.train_mode == "distill" else None


FIELDS = {field.name: field for field in dataclasses.fields(Config)}

# Fields that the starting checkpoint decides. A flag may repeat them, not change them.
ENCODER_FIELDS = ("resnet_depth", "width_multiplier", "sk_ratio", "se_ratio")
HEAD_FIELDS = ("proj_head_mode", "proj_out_dim", "num_proj_layers")
LABEL_FIELDS = ("labels_per_class", "label_fraction", "label_seed", "labelled_dataset", "labelled_split")
DATA_FIELDS = ("dataset", "train_split", *LABEL_FIELDS)
# What only the command itself says. The folder of a run may come from a stranger: it names no file to write and no
# machine to connect to, and leaves out no check.
COMMAND_FIELDS = (
    "output", "memory_check", "cluster", "worker_timeout", "use_tpu", "tpu_name", "tpu_zone", "gcp_project", "master",
)  # fmt: skip
# Flags not given take these values, by dataset and train_mode ("*": every train_mode).
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Chosen on train[80%:], a validation split of the training digits. A mirrored or closely cropped digit is another
    # one. The memory cost accuracy (docs/own_images.md); with --memory=queue it is as large as one batch's views, since
    # more of it would be the same images again.
    "digits": {
        "*": dict(
            eval_split="test", image_size=16, resnet_depth=18, width_multiplier=0.25,
            crop_min_area=0.5, crop_max_aspect=2.0, use_flip=False, color_jitter_strength=0.8,
            optimizer="momentum", weight_decay=1e-4, train_batch_size=256, checkpoint_epochs=20,
            temperature=0.3, memory="none", memory_size=512, ema_decay=0.99,
        ),
        "pretrain": dict(learning_rate=0.5, train_epochs=150, warmup_epochs=3.0),
        "finetune": dict(
            learning_rate=0.05, train_batch_size=50, train_steps=60, warmup_epochs=0.0, weight_decay=0.0,
            linear_start=True,
        ),
        "supervised": dict(
            optimizer="adam", learning_rate=0.005, train_batch_size=50, train_steps=150, warmup_epochs=0.0
        ),
        "distill": dict(learning_rate=0.2, train_steps=300, warmup_epochs=3.0, distill_neighbors=10),
    },
    "cifar10": {"*": dict(memory="none")},  # Appendix G trains without the memory.
    "cifar100": {"*": dict(memory="none")},
}  # fmt: skip


# What holds of a preset with --recipe=auto too: it says something about the data set, not about how to train.
PRESET_OF_THE_DATA = ("eval_split",)


def from_dict(saved: Mapping[str, Any]) -> Config:
    """The config that was saved in `saved`; what else is in there, and fields of other versions, do not matter."""
    return Config(**{name: value for name, value in saved.items() if name in FIELDS})


def check_flags(given: Mapping[str, Any]) -> None:
    """Refuses flags that are wrong whatever the run in `model_dir`, the checkpoint and the teacher are.

    Raises:
      UserError: with one clause per mistake.
    """
    problems = _value_problems(given)
    if problems:
        raise UserError("; ".join(problems))


def check_combination(values: Mapping[str, Any]) -> None:
    """Refuses values that contradict each other whatever the architecture of the checkpoint and the teacher is.

    Args:
      values: the fields that are known so far; the others count with their defaults.

    Raises:
      UserError: with one clause per mistake.
    """
    defaults = {name: field.default for name, field in FIELDS.items()}
    problems = _contradictions(SimpleNamespace(**{**defaults, **values}))
    if problems:
        raise UserError("; ".join(problems))


def _value_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with single values, by field name."""
    problems = []
    for name, value in values.items():
        field = FIELDS[name]
        rule, kind = field.metadata, type(field.default)
        if not (type(value) is kind or (kind is float and type(value) is int)):
            problems.append(f"--{name}={value!r}: must be of type {kind.__name__}")
            continue
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{name}={value}: must be a finite number")
        if rule["choices"] and value not in rule["choices"]:
            meant = did_you_mean(value, rule["choices"], f"--{name}=") if kind is str else ""
            problems.append(f"--{name}={value}: choose one of {', '.join(map(str, rule['choices']))}{meant}")
        if kind is str and not _is_name(value, any_bytes=name in ANY_BYTES):
            problems.append(f"--{name}={value}: must be text in UTF-8, without the character 0")
        if rule["low"] is not None and not value >= rule["low"]:
            problems.append(f"--{name}={value}: must be at least {rule['low']}")
        if rule["high"] is not None and not value <= rule["high"]:
            problems.append(f"--{name}={value}: must be at most {rule['high']}")
    return problems


def _is_name(text: str, any_bytes: bool) -> bool:
    """Whether a text can name a file in TensorFlow; with `any_bytes`, one that is read without it."""
    try:
        return b"\0" not in text.encode(errors="surrogateescape" if any_bytes else "strict")
    except UnicodeEncodeError:
        return False


def _head_problems(config: Config) -> list[str]:
    """What is wrong with the layer of the projection head on which the classifier is to stand."""
    layers, selector = config.head_layers, config.ft_proj_selector
    if config.train_mode in ("pretrain", "finetune") and selector > layers:
        return [f"--ft_proj_selector={selector}: the projection head has {layers} layers; choose -1 to {layers}"]
    return []


def steps_from_first_to_last(text: str) -> range | None:
    """The steps that `FIRST,LAST` means; None where it means none.

    Example:
      steps_from_first_to_last("3,5") == range(3, 6)
    """
    numbers = re.fullmatch(r"([0-9]{1,10}),([0-9]{1,10})", text)
    if not numbers:
        return None
    first, last = map(int, numbers.groups())
    return range(first, last + 1) if 1 <= first <= last else None


def _output_rules(c: Config | SimpleNamespace) -> list[tuple[Any, str]]:
    """What may be wrong with the flags of the modes that give answers: whether it is, and a clause that says so."""
    kinds = ANSWER_FILES.get(c.mode, ())
    named = " or ".join(f"FILE{kind}" for kind in kinds)
    return [
        (kinds and not c.output, f"--mode={c.mode} needs --output={named}"),
        (kinds and c.output and not c.output.endswith(kinds), f"--output={c.output}: --mode={c.mode} writes {named}"),
        (kinds and "://" in c.output, f"--output={c.output}: give a local file"),
        (not kinds and c.output, f"--output goes with --mode={', '.join(ANSWER_FILES)}, not {c.mode}"),
        (c.mode == "suggest" and not c.count, "--mode=suggest needs --count, the number of images"),
    ]


def _contradictions(config: Config | SimpleNamespace) -> list[str]:
    """What is wrong with values taken together, whatever the projection head is like."""
    c = config
    mode, selector = c.train_mode, c.ft_proj_selector
    subset = c.labels_per_class or c.label_fraction
    rules = [
        (mode == "finetune" and not c.checkpoint, "--train_mode=finetune needs --checkpoint, a pretraining run"),
        (mode == "distill" and not c.teacher, "--train_mode=distill needs --teacher, a fine-tuned run"),
        (mode != "distill" and c.teacher, f"--teacher goes with --train_mode=distill, not {mode}"),
        (
            mode == "supervised" and c.checkpoint,
            "--train_mode=supervised starts from scratch: leave out --checkpoint, or use --train_mode=finetune",
        ),
        (c.cache_teacher and mode != "distill", f"--cache_teacher goes with --train_mode=distill, not {mode}"),
        (
            c.cache_teacher and c.distill_neighbors,
            f"--cache_teacher keeps the teacher's own answers and --distill_neighbors={c.distill_neighbors} spreads "
            f"them: leave --cache_teacher out, or give --distill_neighbors=0",
        ),
        (
            c.cache_teacher and c.distill_views > 1,
            f"--cache_teacher is about the centre crop, --distill_views={c.distill_views} about random ones: give one",
        ),
        (
            mode != "finetune" and c.fine_tune_after_block > -1,
            f"--fine_tune_after_block={c.fine_tune_after_block} freezes blocks, which only --train_mode=finetune does",
        ),
        (c.linear_start and mode != "finetune", f"--linear_start goes with --train_mode=finetune, not {mode}"),
        (
            c.linear_start and c.zero_init_logits_layer,
            "--linear_start and --zero_init_logits_layer exclude each other: give one",
        ),
        (
            mode == "supervised" and selector != 0,
            f"--ft_proj_selector={selector}: --train_mode=supervised has no projection head; leave the flag out",
        ),
        (
            c.augment_policy != "none" and mode not in ("finetune", "supervised"),
            f"--augment_policy={c.augment_policy} goes with --train_mode=supervised or finetune, not {mode}",
        ),
        *[
            (
                c.augment_on == "device" and getattr(c, name) not in ("none", "simclr", 0),
                f"--augment_on=device knows crop, flip, colour jitter, grey and blur only: leave out --{name}, or use "
                "--augment_on=host",
            )
            for name in ("augment_policy", "color_operators", "sobel_probability")
        ],
        (
            c.data_service and not all(re.fullmatch(r"grpc://[^/:]+:\d+", one) for one in c.data_service.split(",")),
            f"--data_service={c.data_service}: give grpc://HOST:PORT, several with commas between them",
        ),
        (
            c.label_smoothing and mode == "pretrain",
            f"--label_smoothing={c.label_smoothing} does not go with --train_mode=pretrain: leave the flag out",
        ),
        (
            c.labelled_dataset and mode in ("finetune", "supervised"),
            f"--labelled_dataset goes with --train_mode=distill or pretrain; {mode} sees labelled images alone: "
            f"use --dataset={c.labelled_dataset}",
        ),
        (
            c.labelled_dataset and subset,
            "--labelled_dataset excludes --labels_per_class and --label_fraction: give one",
        ),
        (
            c.labelled_dataset and c.dataset in ("digits", "image_folder"),
            f"--labelled_dataset matches file names of TensorFlow datasets, not of --dataset={c.dataset}",
        ),
        (
            c.labels_per_class and c.label_fraction,
            "--labels_per_class and --label_fraction exclude each other: give one",
        ),
        (
            c.dataset == "image_folder" and not c.data_dir,
            "--dataset=image_folder needs --data_dir, the folder with the images",
        ),
        *[
            (getattr(c, name) and c.dataset != "image_folder", f"--{name} goes with --dataset=image_folder alone")
            for name in ("labels", "images")
        ],
        (
            c.eval_split == AUTO_SPLIT and c.dataset != "image_folder",
            f"--eval_split={AUTO_SPLIT} goes with --dataset=image_folder; hold back a part of {c.dataset}, by "
            f"--train_split=train[:90%] --eval_split=train[90%:]",
        ),
        (
            c.train_split == AUTO_SPLIT,
            f"--train_split={AUTO_SPLIT} is a part that is held out: name it by --eval_split",
        ),
        (
            c.dataset == "digits" and c.data_dir,
            "--data_dir does not go with --dataset=digits, built in: leave it out, or use --dataset=image_folder",
        ),
        (
            os.path.basename(c.eval_name) != c.eval_name,
            f"--eval_name={c.eval_name}: must be a part of a file's name: leave out what looks like a folder",
        ),
        *_output_rules(c),
        (
            c.profile_steps and not steps_from_first_to_last(c.profile_steps),
            f"--profile_steps={c.profile_steps}: give the first and the last step, such as --profile_steps=101,110",
        ),
        (
            c.cluster != "env" and (c.use_tpu or c.strategy not in ("auto", "multi_worker")),
            f"--cluster={c.cluster} goes with --strategy=multi_worker, not {'tpu' if c.use_tpu else c.strategy}",
        ),
        (c.use_tpu and c.strategy not in ("auto", "tpu"), f"--use_tpu contradicts --strategy={c.strategy}: give one"),
    ]
    return [message for wrong, message in rules if wrong]
