"""What is wrong with a pretraining, judged by the history of its probes, in words that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# Features are collapsed below these. Those of an untrained network have a spread of 0.1 and an effective rank of 5.
COLLAPSED_SPREAD = 0.02
COLLAPSED_RANK = 1.5
FEWEST_PROBES = 10  # A run with fewer probes than this after its first step is too short to be called flat.
# On fewer images raw pixels, whose best way is taken in hindsight, win by chance, and a rise is lost in noise: 36
# images have a standard error of 8 points.
FEWEST_TO_COMPARE = 100

WAYS = {"knn": "kNN", "linear": "a linear classifier"}  # of judging features, as the probe names them and as text does
WEAK_COLORS = 0.1  # The strength of colour changes that is advised; weaker ones change nothing that the eye sees.

AT_END = ("no_better_at_end", "still_rising", "flat")  # These judge the whole run.

Probe = Mapping[str, float]


class Run(NamedTuple):
    """What the alarms need to know about a run.

    Attributes:
      total_steps, warmup_steps: of the run.
      held_out: how many images the accuracies are measured on; 0: there are none.
      raw_pixels: the accuracy of kNN on raw pixels of these images; None where there is none.
      starts_from: what the network of step 0 is called.
      crop_min_area, color_jitter_strength: of the run's views, as the flags of these names.
      colour: whether the images have colours.
    """

    total_steps: int
    warmup_steps: int
    held_out: int = 0
    raw_pixels: float | None = None
    starts_from: str = "the untrained network"
    crop_min_area: float = 0.08
    color_jitter_strength: float = 1.0
    colour: bool = True

    @property
    def weaker_views(self) -> str:
        """The advice to make the views of an image less different from each other than they are in this run."""
        if self.colour and self.color_jitter_strength > WEAK_COLORS:
            return f"weaker views (--color_jitter_strength={WEAK_COLORS} --grayscale_probability=0)"
        return f"weaker views (--crop_min_area={self.crop_min_area**0.5:.2g})"


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
    found = [_twice(_at_chance, probes, run), _twice(_collapsed, probes, run)]
    if run.held_out and "knn" in probes[-1]:
        no_better = _no_better_at_half(probes, run) or _no_better_at_end(probes, run)
        found += [no_better, _still_rising(probes, run)]
        if not no_better:  # Otherwise it has said what to do.
            found.append(_flat(probes, run))
    return [alarm for alarm in found if alarm]


def outdated(name: str, step: int, run: Run) -> bool:
    """Whether an alarm that was said at `step` judged a length that the run no longer has, since it was prolonged."""
    if name == "no_better_at_half":
        return step < run.total_steps / 2
    return name in AT_END and step != run.total_steps


def noise(accuracy: float, examples: int) -> float:
    """The standard error of an accuracy that was measured on so many examples."""
    return (accuracy * (1.0 - accuracy) / examples) ** 0.5


def _twice(sign: Callable[[Sequence[Probe], Run], Alarm | None], probes: Sequence[Probe], run: Run) -> Alarm | None:
    """The alarm of `sign`, where the probe before raised it too: a run often recovers from a bad moment."""
    alarm = sign(probes, run)
    return alarm if alarm and sign(probes[:-1], run) else None


def _at_chance(probes: Sequence[Probe], run: Run) -> Alarm | None:
    """The mean contrastive loss between two probes after the warmup is no lower than guessing gives."""
    last = probes[-1]
    if not _after_warmup(probes, run) or last["contrastive_loss"] < last["chance_loss"]:
        return None
    return Alarm(
        "at_chance",
        f"the contrastive loss of {last['contrastive_loss']:.2f} is not below that of guessing, "
        f"{last['chance_loss']:.2f}, after the warmup: nothing is learnt. Lower --learning_rate, use "
        f"{run.weaker_views} or, with a queue, --memory=none",
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


def _no_better_at_half(probes: Sequence[Probe], run: Run) -> Alarm | None:
    """At the first probe in the third quarter of the run, the features are not better than their rivals."""
    first, last = 0.5 * run.total_steps, 0.75 * run.total_steps
    is_first = len(probes) < 2 or probes[-2]["step"] < first
    if not (is_first and first <= probes[-1]["step"] <= last):
        return None
    compared = _compared_unless_better(probes, run)
    if not compared:
        return None
    return Alarm(
        "no_better_at_half",
        f"at half of the run pretraining does not pay yet: {compared}. If that does not change, use "
        f"{run.weaker_views} or more --train_epochs",
    )


def _no_better_at_end(probes: Sequence[Probe], run: Run) -> Alarm | None:
    """At the end, the features are not better than their rivals."""
    if probes[-1]["step"] != run.total_steps:
        return None
    compared = _compared_unless_better(probes, run)
    if not compared:
        return None
    longer = "" if _flat(probes, run) else ", more --train_epochs"
    return Alarm(
        "no_better_at_end",
        f"pretraining has not paid: {compared}. Use {run.weaker_views}{longer} or more images, or do without it: "
        f"--train_mode=supervised",
    )


def _compared_unless_better(probes: Sequence[Probe], run: Run) -> str:
    """The last accuracy beside that on raw pixels or on the features of step 0, whichever is higher, in words.

    Features are judged by kNN or a linear classifier, whichever is higher. Empty where the last accuracy is better
    beyond the noise, and where there is nothing, or too few images, to compare.
    """
    if run.held_out < FEWEST_TO_COMPARE:
        return ""
    rivals = {} if run.raw_pixels is None else {"raw pixels": (run.raw_pixels, "kNN")}
    if probes[0]["step"] == 0:
        rivals[run.starts_from] = _best_way(probes[0])
    if not rivals or probes[-1]["step"] == 0:
        return ""
    rival = max(rivals, key=lambda name: rivals[name])
    ours, way = _best_way(probes[-1])
    theirs, their_way = rivals[rival]
    error = noise(ours, run.held_out)
    if ours > theirs + error:
        return ""
    return (
        f"{way} on the features gives {ours:.1%}, {'' if way == their_way else their_way + ' '}on {rival} {theirs:.1%} "
        f"({run.held_out:,} images, standard error {100 * error:.1f} points)"
    )


def _best_way(probe: Probe) -> tuple[float, str]:
    """The higher of the accuracies of `WAYS` in `probe`, and what that way is called."""
    name = max(WAYS, key=lambda name: probe[name])
    return probe[name], WAYS[name]


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
    if last["step"] != run.total_steps or run.held_out < FEWEST_TO_COMPARE or _still_rising(probes, run):
        return None
    if sum(found["step"] > 0 for found in probes) < FEWEST_PROBES:
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
