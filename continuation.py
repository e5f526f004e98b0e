"""What may have changed when a run goes on: what is exact, what is allowed and said, and what is refused.

A run that goes on with another seed or another teacher is neither the run that it was nor a new one, and nothing in its
folder would tell. So every field of `Config` has a kin, which says what a change of its value does to the run; the same
holds for what is no flag: the images, the teacher's weights, the machine. `docs/continuation.md` is the same in words.

Nothing here needs TensorFlow, so a flag that is refused is refused at once.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from absl import logging

import console
from config import AUTO_SPLIT, DATA_FIELDS, ENCODER_FIELDS, FIELDS, HEAD_FIELDS, from_dict
from errors import UserError


class Kin(enum.Enum):
    """What a change of a field does to a run that goes on."""

    NETWORK = "makes another network"
    DATA = "gives it other images or labels"
    ORDER = "changes which images a step sees"
    TASK = "changes what the network learns"
    START = "changes what the run has begun with"
    TEACHER = "gives it another teacher, unless the weights are the same"
    PLACE = "says where the same images lie"
    OPTIMIZATION = "changes how the weights follow the gradients, and for how long"
    READABLE = "changes which images count as unreadable"
    ROUNDING = "changes the last bits"
    NOTHING = "changes nothing in the result"


# A run that goes on with another value is refused. Its network cannot change when it is evaluated or exported either.
REFUSED = {Kin.NETWORK, Kin.DATA, Kin.ORDER, Kin.TASK, Kin.START}
# It goes on, and the change is said. What is in neither set is taken without a word.
SAID = {Kin.TEACHER, Kin.OPTIMIZATION, Kin.READABLE, Kin.ROUNDING}

_FIELDS_BY_KIN: dict[Kin, Sequence[str]] = {
    Kin.NETWORK: (
        "train_mode", "image_size", "optimizer", "memory", "memory_size", "ft_proj_selector", "fine_tune_after_block",
        "lineareval_while_pretraining", *ENCODER_FIELDS, *HEAD_FIELDS,
    ),
    Kin.DATA: DATA_FIELDS,
    # The data of step s begin at image s * train_batch_size of the run: another batch would leave images out, or see
    # them twice. The learning rate is scaled by it too.
    Kin.ORDER: ("train_batch_size", "seed"),
    Kin.TASK: (
        "global_bn", "batch_norm_decay",
        "crop_min_area", "crop_max_aspect", "use_flip", "color_jitter_strength", "grayscale_probability", "use_blur",
        "color_operators", "sobel_probability", "augment_policy", "randaugment_layers", "randaugment_magnitude",
        "temperature", "hidden_norm", "ema_decay", "ema_ramp", "label_smoothing",
        "distill_alpha", "distill_temperature", "distill_neighbors", "distill_views", "cache_teacher",
    ),
    Kin.START: ("checkpoint", "zero_init_logits_layer", "linear_start", "recipe", "train_minutes"),
    Kin.TEACHER: ("teacher",),
    Kin.PLACE: ("data_dir", "labels", "images"),
    # People lower the learning rate of a run that diverges, and train longer.
    Kin.OPTIMIZATION: (
        "learning_rate", "learning_rate_scaling", "warmup_epochs", "weight_decay", "momentum", "train_epochs",
        "train_steps", "on_nan", "grad_accumulation", "mixed_precision",
    ),
    Kin.READABLE: ("max_image_pixels",),
    Kin.ROUNDING: ("deterministic", "augment_on", "loss_block", "remat", "shard_queue", "data_service", "jit_compile"),
}  # fmt: skip
_SCHEDULE_FIELDS = ("learning_rate", "learning_rate_scaling", "warmup_epochs", "train_epochs", "train_steps")
KIN = {name: kin for kin, names in _FIELDS_BY_KIN.items() for name in names}
# What decides the last bits, besides the flags: words for each, by its name in config.json.
_CIRCUMSTANCES = {"replicas": "replicas", "device": "device", "versions": "versions", "git_commit": "program"}


def kin_of(name: str, saved: Mapping[str, Any] = MappingProxyType({})) -> Kin:
    """The kin of a field of `Config`, for the run whose config is `saved`."""
    if name == "eval_split" and saved.get(name) == AUTO_SPLIT:
        return Kin.DATA  # A part of the training images is held out for it.
    if name == "cache_dataset" and _is_tfds(saved) and saved.get("tfds_order", "buffer") == "buffer":
        return Kin.ORDER  # The oldest order is another one in memory.
    # A field that says how the network is trained must have its kin in the table.
    return KIN[name] if FIELDS[name].metadata["trains"] else KIN.get(name, Kin.NOTHING)


def _is_tfds(saved: Mapping[str, Any]) -> bool:
    return saved.get("dataset", "digits") not in ("digits", "image_folder")


def check_flags(given: Mapping[str, Any], saved: Mapping[str, Any], model_dir: str, trains: bool) -> None:
    """Refuses flags that would make another run of the one in `model_dir`.

    A field that the run's config lacks, since its version did not know it, counts with its default.

    Args:
      given: the values set by the user, by field name.
      saved: the run's config.json.
      model_dir: where it lives, for the message.
      trains: whether the command trains; otherwise it only uses the run's network.

    Raises:
      UserError: naming every such flag, its value and the run's.
    """
    was = {**from_dict(saved).to_dict(), **saved}
    clashes = [
        f"--{name}={value} contradicts the run in --model_dir={model_dir}, which has {name}={was[name]}"
        for name, value in given.items()
        if name in was and value != was[name] and _is_refused(name, value, was, trains)
    ]
    if clashes:
        flags = "the flag" if len(clashes) == 1 else "the flags"
        raise UserError("; ".join(clashes) + f": leave {flags} out to go on with it, or choose another --model_dir")


def _is_refused(name: str, value: Any, was: Mapping[str, Any], trains: bool) -> bool:
    """Whether a value that is not the run's is refused, as far as the flags tell."""
    kin = kin_of(name, was)
    if not trains:
        return kin is Kin.NETWORK
    if name in ("checkpoint", "teacher") and is_same_path(value, was[name]):
        return False
    if name == "eval_split" and value == AUTO_SPLIT:
        return True
    if kin is Kin.TEACHER:  # Where the weights of the run's teacher are known, `check_facts` compares them.
        return "teacher_weights" not in was
    return kin in REFUSED


def is_same_path(one: str, other: str) -> bool:
    """Whether two paths name the same file or folder; an empty path names none."""
    return one == other or bool(one and other and os.path.realpath(one) == os.path.realpath(other))


def check_classes(before: Mapping[str, Any], classes: Sequence[str], model_dir: str) -> None:
    """Refuses other classes than those of the run whose config.json is `before`.

    Raises:
      UserError: where they are others.
    """
    if before["classes"] != list(classes):
        raise UserError(f"--model_dir={model_dir} was trained on other classes: choose another folder")


def check_facts(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses what no flag tells: other images in another place, and a teacher with other weights.

    Images that have changed in their own place are a folder that grew, which `in_words` says.

    Args:
      before: config.json as the run has it.
      now: what it is going to be (`run_folder.describe`).

    Raises:
      UserError: naming what is not as it was.
    """
    for name in _FIELDS_BY_KIN[Kin.PLACE]:
        was, value = before.get(name, ""), now[name]
        if not is_same_path(was, value) and _differs("data_fingerprint", before, now):
            raise UserError(
                f"--{name}={value} holds other images or labels than those that the run in "
                f"--model_dir={now['model_dir']} was trained on ({_examples(before, now)}): give --{name}={was} as "
                f"before, or choose another --model_dir"
            )
    if _differs("teacher_weights", before, now):
        raise UserError(
            f"--teacher={now['teacher']} has other weights than the teacher from which the run in "
            f"--model_dir={now['model_dir']} has learnt (--teacher={before['teacher']} at step "
            f"{before['teacher_step']}): name that checkpoint, or choose another --model_dir"
        )


def say(before: Mapping[str, Any], now: Mapping[str, Any], step: int, steps: int) -> None:
    """Says where a run stands, and what is no longer as it was when it was last trained.

    Args:
      before, now: as for `check_facts`.
      step: the step that the run has reached.
      steps: those that it is to train.
    """
    changed = changed_flags(before, now)
    named = ", ".join(f"--{name}={value} (before: {was})" for name, (was, value) in changed.items())
    if step >= steps:
        unused = f", so these changed flags have no effect: {named}" if changed else ""
        console.say(f"already at step {step} of {steps}{unused}")
        return
    console.say(f"goes on from step {step} of {steps}" + (f", with {named}" if changed else ""))
    if any(name in _SCHEDULE_FIELDS for name in changed):
        console.say(f"from here on, the learning rate follows the new schedule of {steps} steps")
    for sentence in in_words(before, now):
        logging.warning("%s", sentence)


def changed_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which a run that goes on differs from what it was, and that are said: (before, now) by name."""
    changed = {name: (before[name], now[name]) for name in FIELDS if name in before and before[name] != now[name]}
    if "teacher" in changed and is_same_path(*changed["teacher"]):
        del changed["teacher"]
    return {name: values for name, values in changed.items() if kin_of(name, before) in SAID}


def in_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for each circumstance that changes the result of a run that goes on.

    Args:
      before, now: as for `check_facts`.
    """
    sentences = []
    if _differs("train_examples", before, now) or _differs("data_fingerprint", before, now):
        sentences.append(
            f"the training data have changed since the run began ({_examples(before, now)}): it goes on as they are. "
            f"Their order is drawn anew: in the epoch that is under way, some images come twice and some not at all"
        )
    if _differs("replicas", before, now) and not now["global_bn"]:
        sentences.append(
            f"--global_bn={now['global_bn']}: batch norm has its statistics from each replica's share of a batch, and "
            f"there were {before['replicas']} replicas and are {now['replicas']} now"
        )
    rounded = [words for name, words in _CIRCUMSTANCES.items() if _differs(name, before, now)]
    if now["deterministic"] and not before.get("deterministic", False):
        rounded.append("sums, without this flag")
    if now["deterministic"] and rounded:
        sentences.append(
            f"--deterministic: the run ends as an uninterrupted one up to rounding, not bit for bit: it has begun with "
            f"other {' and '.join(rounded)}"
        )
    unknown = sorted(set(before) - set(now))
    if unknown:
        sentences.append(
            f"config.json of the run has values that this version does not know ({', '.join(unknown)}): it goes on "
            f"without them; to go on exactly, use the version that wrote it"
        )
    return sentences


def _differs(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a value is known to have changed. An older version may not have written it."""
    return name in before and name in now and before[name] != now[name]


def _examples(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{before['train_examples']:,} examples then, {now['train_examples']:,} now"
