"""The values that nobody gave: a recipe that fits the data and the devices, each value with its reason.

`choose` goes through the rules of a train_mode in their order. A rule makes one kind of value from the facts and from
what is known by then, so that a rule sees what the rules before it chose and what the user gave. A value that is known
already is never chosen again. The time of `--train_minutes` is known as the length that fits into it: once that is
measured, what depends on the run's length is chosen again by it (`Subject.with_length`).

The numbers stand at the top, each with where it comes from. "First guess" means that it is not measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Images. (the largest median of the shorter side, the size to train at), in pixels. On a CPU, time is what is short: on
# CIFAR-10, 32 pixels, the same time gave more at 24 (docs/own_images.md). Up to 32 pixels the network keeps the
# resolution for long; above, its larger stem makes 64 pixels cheaper than 24.
SIZES_ON_CPU = ((20, 16), (40, 24), (112, 64))
SIZES_ON_ACCELERATOR = ((20, 16), (28, 24), (48, 32), (112, 64))
# Larger images are reduced to this size, with an accelerator to the 2020 release's.
LARGE_SIZE, LARGE_SIZE_ON_ACCELERATOR = 128, 224
SIZE_STEP = 16  # Sizes of large images are multiples of this, so that the stages of a ResNet halve them evenly.
SMALL_VIEWS = 64  # Views of at most so many pixels count as small.

# Network: (depth, width). A quarter of ResNet-18 is what two CPU cores train in minutes (the digits' preset).
NETWORK_ON_CPU = (18, 0.25)
NETWORK_OF_SMALL_VIEWS = (18, 1.0)
NETWORK_OF_LARGE_VIEWS = (50, 1.0)

# So many images are few: a smaller split has other crops and no memory.
FEW_IMAGES = 10_000

# Pretraining: batch. Few images get smaller batches, since these make more steps in the same time: 64 beat 256 on 2,000
# emoji, 128 and 256 were equal on CIFAR-10 (docs/own_images.md).
BATCH_ON_CPU = 256
BATCH_PER_REPLICA = 256  # small views
LARGE_BATCH_PER_REPLICA = 64  # large views: ResNet-50 at 224 pixels then fits into 16 GB
LARGEST_BATCH = 1024
BATCHES_PER_EPOCH = 16
FEW_IMAGES_BATCH = 64  # No batch is reduced below this for the sake of more steps ...
FEWEST_BATCHES = 3  # ... but where an epoch would have fewer batches than this: a batch shall not be all the data.
SMALLEST_BATCH = 16

# Pretraining: so many times through the images, as long as the images seen are between these. Two CPU cores see 500,000
# at 24 pixels in about ten minutes: enough to pass raw pixels on two folders of 2,000 images (docs/own_images.md).
PRETRAIN_EPOCHS = 500
SEEN_ON_CPU = (100_000, 500_000)
SEEN_ON_ACCELERATOR = (2_500_000, 100_000_000)
# More epochs than this show the same few images again. No run is given more, with --train_minutes neither.
MAX_EPOCHS = 2_000

# Pretraining: optimizer, loss, memory.
TEMPERATURE = 0.2  # appendix G of arXiv 2006.10029: on CIFAR-10
# No memory for few images or on a CPU: in the short runs that were measured it gained nothing (docs/own_images.md).
# Elsewhere the momentum encoder is behind by the paper's share of the run's steps (1,000 of 250,000), and the queue is
# much younger than that: on CIFAR-10, keys that were nearly as old as the momentum encoder cost 5 points. It holds the
# views of a part of the images alone: with all of them on the digits, each image was its own negative, and kNN lost a
# point.
EMA_TIME = 0.004
SHORTEST_EMA_TIME = 10  # steps
MEMORY_AGE = 1 / 8  # Of the steps by which the momentum encoder is behind.
MEMORY_BATCHES = 16
MEMORY_SHARE = 1 / 4
LARGEST_MEMORY = 65_536  # section 4.1 of arXiv 2006.10029
LARGEST_EMA_DECAY = 0.999  # arXiv 2006.10029, section 2

# Pretraining: views.
CROP_MIN_AREA = 0.2
CROP_MIN_AREA_OF_FEW = 0.3  # at full length on icons and emoji; 0.2 was as good on emoji
CROP_MIN_AREA_OF_GREY = 0.5  # better than 0.2 or 0.3 on digits, letters and clothes
CROP_MIN_AREA_OF_TINY = 0.3  # first guess: a smaller part of so few pixels shows nothing
CROP_MIN_AREA_OF_STUDENT = 0.5  # CIFAR-10, 25 labels a class: 49.4 % with 0.5, 48.6 % with 0.2
TINY_PIXELS = 20
CROP_MAX_ASPECT = 4 / 3  # the 2020 release's
COLOR_STRENGTH = 0.5  # the 2020 release's for CIFAR-10
GRAYSCALE_PROBABILITY = 0.2  # appendix B.1 of arXiv 2006.10029
# What is tried beside these where labels can tell (pilot.py). On drawings whose colours tell the classes apart, kNN was
# 41 % with the usual changes and 70 % with weak ones. Crops that suit most images in colour may be too small for some,
# those that suit most grey ones too large.
WEAK_COLOURS: dict[str, Any] = {"color_jitter_strength": 0.1, "grayscale_probability": 0.0}
LARGE_CROPS: dict[str, Any] = {"crop_min_area": 0.5}
SMALL_CROPS: dict[str, Any] = {"crop_min_area": CROP_MIN_AREA}
GREY_STRENGTH = 0.6  # of brightness and contrast: better than 0.4 on clothes and, with one seed, on letters

# The learning rate of fine-tuning at a batch of 256, by the number of labels: the low one was best with 36 and 40
# (emoji, CIFAR-10), the high one with 76 (drawings of game figures) and 250 (CIFAR-10). With 56 (clip art) they were
# equal within noise (docs/own_images.md). In between it lies on the straight line of the logarithms.
FINETUNE_RATES = ((40, 0.05), (76, 0.2))
# Up to so many labels, fine-tuning starts from a linear classifier, with so much of that learning rate. With 36 to 104
# labels it was better by 4 points on letters, by 0.4 to 1.7 on emoji and CIFAR-10, as good on two other sets; with 250
# on CIFAR-10 and 304 on one of these it was worse (docs/own_images.md).
LINEAR_START_LABELS = 150
LINEAR_START_RATE = 0.25
# Optimizers, by train_mode, with the learning rate at a batch of 256 (first guess).
OPTIMIZERS = {
    "pretrain": ("momentum", 0.4),
    "finetune": ("momentum", FINETUNE_RATES[-1][1]),
    "supervised": ("momentum", 0.4),
    "distill": ("momentum", 0.4),
}
OPTIMIZER_REASONS = {
    "momentum": "SGD; LARS is made for batches of thousands",
    "adam": "learns from scratch with little tuning",
}
# Where the user gives another optimizer. The 2020 release's for LARS; the others are common values, not tuned here.
LEARNING_RATES = {"lars": 0.3, "momentum": 0.2, "adam": 0.001}
# arXiv 2006.10029, section 3: 1e-4, and none in fine-tuning. Supervised training: the better of two on CIFAR-10.
WEIGHT_DECAYS = {"pretrain": 1e-4, "finetune": 0.0, "supervised": 5e-4, "distill": 1e-4}
WEIGHT_DECAY_REASONS = {"supervised": "chosen on CIFAR-10, against overfitting"}
WARMUP_STEPS = {"pretrain": 100, "finetune": 0, "supervised": 0, "distill": 100}
LARGEST_WARMUP = 0.1  # share of the run

# Training on labels: batch; the least and the most steps; the epochs between them (first guess).
LABELLED_BATCH = 64
FINETUNE_STEPS, FINETUNE_EPOCHS = (200, 10_000), 20
SUPERVISED_STEPS, SUPERVISED_EPOCHS = (400, 10_000), 50
# The paper's layer for few labels (Figure 5 of arXiv 2006.10029). A network of a fraction of its width did as well or
# better from h, by up to 2 points (docs/own_images.md).
FINETUNE_LAYER, FINETUNE_LAYER_OF_NARROW = 1, 0

# Distillation: batch; the least and the most steps, one for each image between them; temperature (first guess). A
# student that starts from a pretrained network learns fast: on CIFAR-10, 25 labels a class, 3,000 steps gave no more
# than 800.
DISTILL_BATCH = 128
DISTILL_STEPS = (500, 1_000)
DISTILL_STEPS_FROM_SCRATCH = (2_000, 5_000)
DISTILL_TEMPERATURE = 1.0
DISTILL_NEIGHBORS = 10
DISTILL_VIEWS = 8  # Answers over eight views were right 2 points more often on CIFAR-10 (docs/own_images.md).
LARGEST_GRAPH = 100_000  # images; the time for all neighbours grows with their square

# Checkpoints. Saving one takes about a second.
CHECKPOINTS = 10
FEWEST_STEPS_BETWEEN_CHECKPOINTS = 100


class Facts(NamedTuple):
    """What a recipe depends on.

    Attributes:
      images: how many images the run trains on.
      labelled: how many of them have a label that the run may see.
      classes: how many classes there are; 0 where there are no labels.
      height, width: the median height and width of an image, in pixels.
      colour: whether the images have colours; otherwise they are grey.
      replicas: how many devices share a batch.
      accelerator: whether these are GPUs or TPUs.
      mirrors: whether the mirror image of an image could be one of them.
    """

    images: int
    labelled: int
    classes: int
    height: int
    width: int
    colour: bool
    replicas: int = 1
    accelerator: bool = False
    mirrors: bool = True

    @property
    def side(self) -> int:
        """The shorter side of a median image, in pixels."""
        return min(self.height, self.width)

    @property
    def device(self) -> str:
        """Where the run computes, in words."""
        if not self.accelerator:
            return "a CPU"
        return "one accelerator" if self.replicas == 1 else f"{self.replicas} accelerators"


class Choice(NamedTuple):
    """A value, and why it was chosen."""

    value: Any
    reason: str


Known = Mapping[str, Any]
Rule = Callable[[Facts, Known], dict[str, Choice]]


def choose(facts: Facts, known: Known) -> dict[str, Choice]:
    """The values of `Config` that fit the facts, by field name.

    Args:
      facts: about data and devices.
      known: what is decided already, by field name: what the user gave and what a checkpoint or a teacher fixes. It
        has `train_mode`. None of these is chosen again, and the others are chosen to go with them.

    Example:
      choose(facts, {"train_mode": "pretrain", "train_batch_size": 64})["image_size"].value == 32
    """
    decided = dict(known)
    chosen: dict[str, Choice] = {}
    for rule in RULES[known["train_mode"]]:
        for name, choice in rule(facts, decided).items():
            if name not in known:
                chosen[name] = choice
                decided[name] = choice.value
    return chosen


def values(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """The values of `choices`, by field name."""
    return {name: choice.value for name, choice in choices.items()}


def table(facts: Facts, choices: Mapping[str, Choice]) -> str:
    """What was chosen, one value on a line, for people to read."""
    shown = {name: _shown(choice.value) for name, choice in choices.items()}
    names, widest = max(map(len, shown)), max(map(len, shown.values()))
    rows = [f"  --{name:{names}}  {value:{widest}}  {choices[name].reason}" for name, value in shown.items()]
    return "\n".join([f"--recipe=auto for {_in_words(facts)}; a flag that is given wins:", *rows])


def _in_words(facts: Facts) -> str:
    kind = "colour" if facts.colour else "grey"
    labels = f"{facts.labelled:,} of them labelled" if facts.labelled < facts.images else "all of them labelled"
    if not facts.labelled:
        labels = "none of them labelled"
    return f"{facts.images:,} {kind} images of {facts.height} x {facts.width} pixels, {labels}, on {facts.device}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# The rules: each makes one kind of value.


def image_size(facts: Facts, known: Known) -> dict[str, Choice]:
    """The size to train at."""
    reason = f"the images' shorter side is {facts.side} pixels (median)"
    for largest, size in SIZES_ON_ACCELERATOR if facts.accelerator else SIZES_ON_CPU:
        if facts.side <= largest:
            if size < facts.side:
                reason += f"; fewer pixels make more epochs in the same time on {facts.device}"
            return {"image_size": Choice(size, reason)}
    largest = LARGE_SIZE_ON_ACCELERATOR if facts.accelerator else LARGE_SIZE
    size = min(largest, facts.side // SIZE_STEP * SIZE_STEP)
    if size == largest:
        reason += "; the 2020 release's" if facts.accelerator else "; larger ones train too slowly on a CPU"
    return {"image_size": Choice(size, reason)}


def network(facts: Facts, known: Known) -> dict[str, Choice]:
    """The encoder's depth and width."""
    size = known["image_size"]
    if not facts.accelerator:
        depth, width = NETWORK_ON_CPU
    elif size <= SMALL_VIEWS:
        depth, width = NETWORK_OF_SMALL_VIEWS
    else:
        depth, width = NETWORK_OF_LARGE_VIEWS
    reason = f"fast enough on {facts.device} at {size} pixels"
    return {"resnet_depth": Choice(depth, reason), "width_multiplier": Choice(width, reason)}


def pretrain_batch(facts: Facts, known: Known) -> dict[str, Choice]:
    """The batch of pretraining."""
    if not facts.accelerator:
        device_batch = BATCH_ON_CPU
    elif known["image_size"] <= SMALL_VIEWS:
        device_batch = min(LARGEST_BATCH, BATCH_PER_REPLICA * facts.replicas)
    else:
        device_batch = min(LARGEST_BATCH, LARGE_BATCH_PER_REPLICA * facts.replicas)
    for_many_steps = max(FEW_IMAGES_BATCH, _power_of_two(facts.images // BATCHES_PER_EPOCH))
    for_several_batches = max(SMALLEST_BATCH, _power_of_two(facts.images // FEWEST_BATCHES))
    of_data = min(for_many_steps, for_several_batches)
    if device_batch <= of_data:
        reason = f"a good size for {facts.device}"
    else:
        reason = f"small, so that {facts.images:,} images make more steps"
    batch = min(device_batch, of_data, facts.images)
    if batch == facts.images:
        reason = "all images"
    return {"train_batch_size": Choice(_divisible(batch, facts.replicas), reason)}


def labelled_batch(facts: Facts, known: Known) -> dict[str, Choice]:
    """The batch of fine-tuning and supervised training."""
    batch = min(LABELLED_BATCH, max(1, facts.labelled))
    reason = "enough for few labels" if batch == LABELLED_BATCH else "all labelled images"
    return {"train_batch_size": Choice(_divisible(batch, facts.replicas), reason)}


def distill_batch(facts: Facts, known: Known) -> dict[str, Choice]:
    """The batch of distillation."""
    batch = min(DISTILL_BATCH, facts.images)
    reason = "a good size for learning from a teacher" if batch == DISTILL_BATCH else "all images"
    return {"train_batch_size": Choice(_divisible(batch, facts.replicas), reason)}


def pretrain_epochs(facts: Facts, known: Known) -> dict[str, Choice]:
    """The length of pretraining."""
    if _has_length(known):
        return {}
    least, most = SEEN_ON_ACCELERATOR if facts.accelerator else SEEN_ON_CPU
    seen = _between(least, PRETRAIN_EPOCHS * facts.images, most)
    epochs = min(MAX_EPOCHS, math.ceil(seen / facts.images))
    steps = epochs * facts.images // known["train_batch_size"]
    return {"train_epochs": Choice(epochs, f"{steps:,} steps for {facts.images:,} images on {facts.device}")}


def finetune_steps(facts: Facts, known: Known) -> dict[str, Choice]:
    """The length of fine-tuning."""
    return _steps_on_labels(facts, known, FINETUNE_EPOCHS, FINETUNE_STEPS)


def supervised_steps(facts: Facts, known: Known) -> dict[str, Choice]:
    """The length of supervised training."""
    return _steps_on_labels(facts, known, SUPERVISED_EPOCHS, SUPERVISED_STEPS)


def _length(facts: Facts, known: Known, steps: int, reason: str) -> dict[str, Choice]:
    """A length of so many steps; in epochs where `--train_steps=0` or `--train_minutes` asks for epochs."""
    if "train_steps" not in known and not known.get("train_minutes"):
        return {"train_steps": Choice(steps, reason)}
    epochs = math.ceil(steps * known["train_batch_size"] / facts.images)
    return {"train_epochs": Choice(min(epochs, MAX_EPOCHS), reason)}


def _steps_on_labels(facts: Facts, known: Known, epochs: int, steps: tuple[int, int]) -> dict[str, Choice]:
    if _has_length(known):
        return {}
    least, most = steps
    reasons = {least: "enough for few labels", most: "enough for many labels"}
    made = _between(least, epochs * facts.labelled // known["train_batch_size"], most)
    return _length(facts, known, made, reasons.get(made, f"{epochs} times through the labelled images"))


def distill_steps(facts: Facts, known: Known) -> dict[str, Choice]:
    """The length of distillation."""
    if _has_length(known):
        return {}
    pretrained = bool(known.get("checkpoint"))
    least, most = DISTILL_STEPS if pretrained else DISTILL_STEPS_FROM_SCRATCH
    start = "the student starts from a pretrained network" if pretrained else "the student starts from scratch"
    return _length(facts, known, _between(least, facts.images, most), f"for {facts.images:,} images; {start}")


def optimizer(facts: Facts, known: Known) -> dict[str, Choice]:
    """The optimizer, its learning rate and its weight decay."""
    mode, batch = known["train_mode"], known["train_batch_size"]
    name, rate = OPTIMIZERS[mode]
    used = known.get("optimizer", name)
    why = f"for {used}"
    if used != name:
        rate = LEARNING_RATES[used]
    elif mode == "finetune":
        rate, why = _finetune_rate(facts.labelled), f"for {facts.labelled:,} labels"
        if known.get("linear_start"):
            rate, why = LINEAR_START_RATE * rate, f"{why}, which a linear classifier fits already"
    peak = rate * batch / 256
    reason = f"{_rounded(peak):g} when scaled to the batch of {batch}, {why}"
    scaling = math.sqrt(batch) if known.get("learning_rate_scaling") == "sqrt" else batch / 256
    return {
        "optimizer": Choice(name, OPTIMIZER_REASONS[name]),
        "learning_rate": Choice(_rounded(peak / scaling), reason),
        "weight_decay": Choice(WEIGHT_DECAYS[mode], WEIGHT_DECAY_REASONS.get(mode, "the paper's")),
    }


def _finetune_rate(labels: int) -> float:
    """The learning rate for so many labels, at a batch of 256."""
    (few, lowest), (many, highest) = FINETUNE_RATES
    share = math.log(max(labels, few) / few) / math.log(many / few)  # 0 where there are few, 1 where there are many
    return lowest * (highest / lowest) ** min(share, 1.0)


def warmup(facts: Facts, known: Known) -> dict[str, Choice]:
    """The warmup, which is measured in epochs."""
    steps = WARMUP_STEPS[known["train_mode"]]
    if not steps:
        return {"warmup_epochs": Choice(0.0, "the run is short, and its learning rate low")}
    of_run = LARGEST_WARMUP * _steps(facts, known)
    epochs = min(steps, of_run) * known["train_batch_size"] / facts.images
    reason = f"{steps} steps" if steps < of_run else "a tenth of the run"
    return {"warmup_epochs": Choice(_rounded(epochs), reason)}


def crops(facts: Facts, known: Known) -> dict[str, Choice]:
    """Which parts of an image its views show, and whether some are mirrored."""
    if known["train_mode"] == "distill":
        area, reason = CROP_MIN_AREA_OF_STUDENT, "what the student learns was said of the whole image"
    elif known["train_mode"] == "pretrain" and not facts.colour:
        area, reason = CROP_MIN_AREA_OF_GREY, "the images are grey: what tells them apart is their whole shape"
    elif facts.side <= TINY_PIXELS:
        area, reason = CROP_MIN_AREA_OF_TINY, f"a smaller part of {facts.side} pixels shows too little"
    elif known["train_mode"] == "pretrain" and facts.images < FEW_IMAGES:
        area, reason = CROP_MIN_AREA_OF_FEW, f"{facts.images:,} images are few"
    else:
        area, reason = CROP_MIN_AREA, "smaller parts often miss the object"
    flip = "mirrored images look like the others" if facts.mirrors else "mirrored images are unlike the others"
    return {
        "crop_min_area": Choice(area, reason),
        "crop_max_aspect": Choice(CROP_MAX_ASPECT, "the 2020 release's"),
        "use_flip": Choice(facts.mirrors, flip),
    }


def colours(facts: Facts, known: Known) -> dict[str, Choice]:
    """How far the views of pretraining change an image's colours."""
    if not facts.colour:
        grey = "the images are grey"
        return {
            "color_jitter_strength": Choice(GREY_STRENGTH, f"{grey}: brightness and contrast alone change"),
            "grayscale_probability": Choice(0.0, grey),
        }
    reason = "colour images: half the strength that ImageNet takes"
    return {
        "color_jitter_strength": Choice(COLOR_STRENGTH, reason),
        "grayscale_probability": Choice(GRAYSCALE_PROBABILITY, "colour images: the paper's"),
    }


def blur(facts: Facts, known: Known) -> dict[str, Choice]:
    """Whether the views of pretraining are blurred."""
    size = known["image_size"]
    few = size <= SMALL_VIEWS
    return {"use_blur": Choice(not few, f"{size} pixels have {'few details' if few else 'details'} to blur")}


def contrast(facts: Facts, known: Known) -> dict[str, Choice]:
    """The temperature, and the memory with its momentum encoder."""
    if known.keys() & {"memory_size", "ema_decay", "ema_ramp"}:
        kind, why = "queue", "a value of the memory is given"
    elif facts.images < FEW_IMAGES:
        kind, why = "none", f"{facts.images:,} images have few new negatives to offer"
    elif facts.accelerator:
        kind, why = "queue", "more negatives than a batch has"
    else:
        kind, why = "none", "a memory takes a third more time on a CPU"
    made = {
        "temperature": Choice(TEMPERATURE, "the paper's for CIFAR-10"),
        "memory": Choice(kind, why),
    }
    if known.get("memory", kind) == "none":
        return made
    behind = max(SHORTEST_EMA_TIME, EMA_TIME * _steps(facts, known))  # steps
    batches = _between(1, round(MEMORY_AGE * behind), MEMORY_BATCHES)
    of_images = max(1, round(MEMORY_SHARE * facts.images))
    size = min(LARGEST_MEMORY, of_images, batches * 2 * known["train_batch_size"])
    decay = min(LARGEST_EMA_DECAY, 1 - 1 / behind)
    reason = "the paper's" if decay == LARGEST_EMA_DECAY else f"{behind:,.0f} steps behind, a small share of the run"
    return made | {
        "memory_size": Choice(size, f"the views of {batches} batches, and of a quarter of the images, at most"),
        "ema_decay": Choice(_rounded(decay), reason),
        "ema_ramp": Choice(True, "the momentum encoder follows fast at first, so that short runs have one too"),
    }


def evaluation(facts: Facts, known: Known) -> dict[str, Choice]:
    """How the features of pretraining are judged."""
    return {
        "lineareval_while_pretraining": Choice(False, "kNN tells as much and needs no training"),
        "knn_neighbors": Choice(-1, "their number is chosen on the training images' features"),
    }


def layer(facts: Facts, known: Known) -> dict[str, Choice]:
    """The layer of the projection head that fine-tuning starts from."""
    if known.get("proj_head_mode") == "none":
        return {"ft_proj_selector": Choice(0, "there is no projection head")}
    if known["width_multiplier"] < 1:
        return {"ft_proj_selector": Choice(FINETUNE_LAYER_OF_NARROW, "h itself: the network is narrow")}
    return {"ft_proj_selector": Choice(FINETUNE_LAYER, "the paper's for few labels")}


def classifier_start(facts: Facts, known: Known) -> dict[str, Choice]:
    """What the classifier of fine-tuning starts from."""
    if facts.classes < 2 or known.get("zero_init_logits_layer"):
        return {}
    few = facts.labelled <= LINEAR_START_LABELS
    reason = "would move the features before it has learnt anything" if few else "learns from so many labels as well"
    return {"linear_start": Choice(few, f"a classifier that starts at random {reason}")}


def distillation(facts: Facts, known: Known) -> dict[str, Choice]:
    """What the student learns: labels that spread along the teacher's features, or the teacher's own answers."""
    temperature = Choice(DISTILL_TEMPERATURE, "the answers as they are")
    if not facts.labelled:
        neighbors = Choice(0, "no label that could spread: the teacher's own answers")
    elif facts.images > LARGEST_GRAPH:
        neighbors = Choice(0, f"neighbours among {facts.images:,} images take too long: the teacher's own answers")
    else:
        neighbors = Choice(
            min(DISTILL_NEIGHBORS, facts.images - 1), "the labels spread to similar images: better than the teacher"
        )
    made = {"distill_neighbors": neighbors, "distill_temperature": temperature}
    if known.get("distill_neighbors", neighbors.value):
        views = "the teacher is right more often over several views"
        made["distill_views"] = Choice(DISTILL_VIEWS, views)
    return made


def checkpoints(facts: Facts, known: Known) -> dict[str, Choice]:
    """How often the run is saved."""
    if "checkpoint_epochs" in known or known.get("checkpoint_steps"):
        return {}
    reason = f"about {CHECKPOINTS} checkpoints in the run"
    if known.get("train_steps"):
        between = known["train_steps"] // CHECKPOINTS
        if between < FEWEST_STEPS_BETWEEN_CHECKPOINTS:
            between, reason = FEWEST_STEPS_BETWEEN_CHECKPOINTS, "the run is short; its end is saved too"
        return {"checkpoint_steps": Choice(between, reason)}
    epochs = known["train_epochs"]
    if epochs < CHECKPOINTS:
        reason = "after every epoch, since there are few"
    return {"checkpoint_epochs": Choice(max(1, epochs // CHECKPOINTS), reason)}


RULES: dict[str, tuple[Rule, ...]] = {
    "pretrain": (
        image_size, network, pretrain_batch, pretrain_epochs, optimizer, warmup,
        crops, colours, blur, contrast, evaluation, checkpoints,
    ),
    "finetune": (
        image_size, network, layer, labelled_batch, finetune_steps, classifier_start,
        optimizer, warmup, crops, checkpoints,
    ),
    "supervised": (image_size, network, labelled_batch, supervised_steps, optimizer, warmup, crops, checkpoints),
    "distill": (
        image_size, network, distill_batch, distill_steps, optimizer, warmup,
        distillation, crops, checkpoints,
    ),
}  # fmt: skip


def _has_length(known: Known) -> bool:
    """Whether the run's length is decided. `train_steps` 0 leaves it to the epochs."""
    return bool(known.get("train_steps")) or "train_epochs" in known


def _steps(facts: Facts, known: Known) -> float:
    """About how many steps the run takes."""
    return known.get("train_steps") or known["train_epochs"] * facts.images / known["train_batch_size"]


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`; 1 where that is less."""
    return 2 ** (max(1, number).bit_length() - 1)


def _divisible(batch: int, replicas: int) -> int:
    """The largest batch of at most `batch` images that the replicas can share, at least one image each."""
    return max(replicas, batch // replicas * replicas)


def _between(least: int, number: int, most: int) -> int:
    return max(least, min(number, most))


def _rounded(number: float) -> float:
    """The number with four significant digits."""
    return float(f"{number:.4g}")
