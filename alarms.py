"""What is wrong with a pretraining, judged by the history of its probes, in words that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Features are collapsed below these. Those of an untrained network have a spread of 0.1 and an effective rank of 5.
COLLAPSED_SPREAD = 0.02
COLLAPSED_RANK = 1.5
WEAKER_VIEWS = "weaker views (--crop_min_area=0.3 --color_jitter_strength=0.5)"

AT_END = ("no_better_at_end", "still_rising", "flat")  # These judge the whole run.

Probe = Mapping[str, float]


class Run(NamedTuple):
    """What the alarms need to know about a run.

    Attributes:
      total_steps, warmup_steps: of the run.
      held_out: how many images the accuracies are measured on; 0: there are none.
      raw_pixels: the accuracy of kNN on raw pixels of these images; None where there is none.
      starts_from: what the network of step 0 is called.
    """

    total_steps: int
    warmup_steps: int
    held_out: int = 0
    raw_pixels: float | None = None
    starts_from: str = "the untrained network"


class Alarm(NamedTuple):
    """An alarm: its name, by which it is said once, and its text."""

    name: str
    text: str


def find(probes: Sequence[Probe], run: Run) -> list[Alarm]:
    """The alarms that the last of `probes` raises.

    Args:
      probes: what each probe found, by name, in the order of their steps. `probe.Probe.look` says which names there
        are. Those about labels may be missing from all of them.
      run: what the probes belong to.
    """
    if not probes:
        return []
    found = [_at_chance(probes, run), _collapsed(probes, run)]
    if run.held_out and "knn" in probes[-1]:
        found += [_no_better(probes, run), _still_rising(probes, run), _flat(probes, run)]
    return [alarm for alarm in found if alarm]


def outdated(name: str, step: int, run: Run) -> bool:
    """Whether an alarm that was said at `step` judged a length that the run no longer has, since it was prolonged."""
    if name == "no_better_at_half":
        return step < run.total_steps / 2
    return name in AT_END and step != run.total_steps


def noise(accuracy: float, examples: int) -> float:
    """The standard error of an accuracy that was measured on so many examples."""
    return (accuracy * (1.0 - accuracy) / examples) ** 0.5


def _at_chance(probes: Sequence[Probe], run: Run) -> Alarm | None:
    """The mean contrastive loss between two probes after the warmup is no lower than guessing gives."""
    last = probes[-1]
    if not _after_warmup(probes, run) or last["contrastive_loss"] < last["chance_loss"]:
        return None
    return Alarm(
        "at_chance",
        f"the contrastive loss of {last['contrastive_loss']:.2f} is not below that of guessing, "
        f"{last['chance_loss']:.2f}, after the warmup: nothing is learnt. Lower --learning_rate, use "
        f"{WEAKER_VIEWS} or, with a queue, --memory=none",
    )


def _collapsed(probes: Sequence[Probe], run: Run) -> Alarm | None:
    """Features or projections are nearly the same for all images."""
    if not _after_warmup(probes, run):
        return None
    last = probes[-1]
    for part, called in (("h", "features h"), ("z", "projections z")):
        spread, rank = last[f"spread_{part}"], last[f"rank_{part}"]
        if spread < COLLAPSED_SPREAD or rank < COLLAPSED_RANK:
            return Alarm(
                "collapsed",
                f"the {called} are nearly the same for all images (spread {spread:.3f}, effective rank {rank:.1f}): "
                f"they have collapsed. Start again with a lower --learning_rate, or a higher --temperature",
            )
    return None


def _no_better(probes: Sequence[Probe], run: Run) -> Alarm | None:
    """The features are not better than raw pixels, or than those of step 0: said at half of the run, and at its end."""
    last = probes[-1]
    half = run.total_steps / 2
    at_end = last["step"] == run.total_steps
    at_half = last["step"] >= half and (len(probes) < 2 or probes[-2]["step"] < half)
    if not (at_half or at_end) or last["step"] == 0:
        return None
    rivals = {} if run.raw_pixels is None else {"raw pixels": run.raw_pixels}
    if probes[0]["step"] == 0:
        rivals[run.starts_from] = probes[0]["knn"]
    if not rivals:
        return None
    rival = max(rivals, key=lambda name: rivals[name])
    error = noise(last["knn"], run.held_out)
    if last["knn"] > rivals[rival] + error:
        return None
    compared = (
        f"kNN on the features gives {last['knn']:.1%}, on {rival} {rivals[rival]:.1%} "
        f"({run.held_out:,} images, standard error {100 * error:.1f} points)"
    )
    if at_end:
        advice = f"Use {WEAKER_VIEWS}, more --train_epochs or more images, or do without it: --train_mode=supervised"
        return Alarm("no_better_at_end", f"pretraining has not paid: {compared}. {advice}")
    return Alarm(
        "no_better_at_half",
        f"at half of the run pretraining does not pay yet: {compared}. If that does not change, use {WEAKER_VIEWS} or "
        f"more --train_epochs",
    )


def _still_rising(probes: Sequence[Probe], run: Run) -> Alarm | None:
    """At the end, the accuracy has risen beyond the noise over the last quarter of the run."""
    last = probes[-1]
    earlier = [found for found in probes if 0 < found["step"] <= 0.75 * run.total_steps]
    if last["step"] != run.total_steps or not earlier:
        return None
    before = earlier[-1]
    if last["knn"] <= before["knn"] + noise(last["knn"], run.held_out):
        return None
    rise = 100 * (last["knn"] - before["knn"])
    return Alarm(
        "still_rising",
        f"kNN on the features rose by {rise:.1f} points since step {before['step']:,}, to {last['knn']:.1%}, and was "
        f"still rising at the end: more --train_epochs will help",
    )


def _flat(probes: Sequence[Probe], run: Run) -> Alarm | None:
    """At the end, the accuracy has not risen beyond the noise since the first half of the run."""
    last = probes[-1]
    if last["step"] != run.total_steps or _still_rising(probes, run):
        return None
    best = max(found["knn"] for found in probes)
    first = next(found for found in probes if found["knn"] >= best - noise(best, run.held_out))
    if not 0 < first["step"] <= run.total_steps / 2:
        return None
    return Alarm(
        "flat",
        f"kNN on the features has been flat since step {first['step']:,} of {run.total_steps:,} ({first['knn']:.1%} "
        f"then, {last['knn']:.1%} now): more --train_epochs of the same will not help; a larger --width_multiplier or "
        f"--resnet_depth, or more images, may",
    )


def _after_warmup(probes: Sequence[Probe], run: Run) -> bool:
    """Whether the steps since the probe before the last one all follow the warmup. False for the first probe."""
    return len(probes) > 1 and probes[-2]["step"] >= run.warmup_steps and "contrastive_loss" in probes[-1]
