"""What the accuracies of several methods say: means, intervals, paired differences, verdicts; as text, JSON and a plot.

Everything here is computed from a list of `Accuracy`: one for each method, number of labels and draw of them. The draws
are named by their label seeds. All methods are measured on the same draws and the same test images, so two methods
are compared draw by draw. Intervals are 95 % intervals by Student's t over the draws.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy import stats

CONFIDENCE = 0.95
# Where the whole interval of a difference lies below this, more draws would not make it a gain worth its time.
WORTH = 0.01
# A method that gets so few images right that another gets wrong may do so by chance, however often it happens on the
# same test images: McNemar's test at 5 %, where there is no image the other way round.
CHANCE_IMAGES = 3.84
# The methods by name, in the order of the table, and how a reader knows them.
METHODS = {
    "pixels": "raw pixels, kNN",
    "untrained": "untrained network, kNN",
    "supervised": "supervised from scratch",
    "frozen_knn": "pretrained, frozen, kNN",
    "frozen_linear": "pretrained, frozen, linear",
    "finetune": "pretrained, fine-tuned",
    "distill": "pretrained, fine-tuned, distilled",
}
# The colours of Okabe and Ito, which colour-blind readers can tell apart, and a marker for each.
STYLES = {
    "pixels": ("#000000", "x"),
    "untrained": ("#999999", "+"),
    "supervised": ("#D55E00", "s"),
    "frozen_knn": ("#56B4E9", "v"),
    "frozen_linear": ("#0072B2", "^"),
    "finetune": ("#009E73", "o"),
    "distill": ("#CC79A7", "D"),
}
CURVE_SHIFT = 1.03  # The curves of two methods are this factor apart along the axis of labels.


class Accuracy(NamedTuple):
    """How well a method did on the test images.

    Attributes:
      method: one of METHODS.
      labels_per_class: how many labels of each class it had.
      label_seed: which draw of them.
      top_1: the share of the test images that it got right, from 0 to 1; None where it failed.
    """

    method: str
    labels_per_class: int
    label_seed: int
    top_1: float | None


class Estimate(NamedTuple):
    """A mean over draws of labels.

    Attributes:
      mean: of the draws.
      half_width: of the 95 % interval around the mean; None with one draw, which has no interval.
      draws: how many there were.
    """

    mean: float
    half_width: float | None
    draws: int

    @property
    def low(self) -> float:
        """The lower end of the interval; minus infinity without one."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval; infinity without one."""
        return math.inf if self.half_width is None else self.mean + self.half_width


class Comparison(NamedTuple):
    """A question that the table answers: what does `method` gain over `against`?

    Attributes:
      method, against: two of METHODS.
      gain: what makes the difference between them.
      over: what it is a gain over.
      decides: whether it is among those that say if the whole effort pays.
    """

    method: str
    against: str
    gain: str
    over: str
    decides: bool = False


COMPARISONS = (
    Comparison("frozen_knn", "pixels", "pretraining (kNN on frozen features)", "raw pixels"),
    Comparison("frozen_knn", "untrained", "pretraining (kNN on frozen features)", "the untrained network"),
    Comparison("frozen_linear", "supervised", "a linear classifier on frozen features", "supervised training"),
    Comparison("finetune", "supervised", "fine-tuning", "supervised training", decides=True),
    Comparison("finetune", "pixels", "fine-tuning", "raw pixels", decides=True),
    Comparison("finetune", "frozen_linear", "fine-tuning", "a linear classifier on frozen features"),
    Comparison("distill", "finetune", "distillation", "fine-tuning", decides=True),
    Comparison("distill", "supervised", "distillation", "supervised training"),
)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of `values` and its 95 % interval by Student's t.

    Raises:
      ValueError: where there is no value.

    Example:
      estimate([0.5, 0.6, 0.7]) == Estimate(mean=0.6, half_width=0.248..., draws=3)
    """
    if not values:
        raise ValueError("no value to estimate from")
    draws = len(values)
    mean = statistics.fmean(values)
    if draws == 1:
        return Estimate(mean, None, 1)
    standard_error = statistics.stdev(values) / math.sqrt(draws)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, df=draws - 1))
    return Estimate(mean, quantile * standard_error, draws)


def by_seed(accuracies: Sequence[Accuracy], method: str, labels_per_class: int) -> dict[int, float]:
    """The accuracies of a method with so many labels, by label seed; without the draws on which it failed."""
    return {
        accuracy.label_seed: accuracy.top_1
        for accuracy in accuracies
        if (accuracy.method, accuracy.labels_per_class) == (method, labels_per_class) and accuracy.top_1 is not None
    }


def mean_accuracy(accuracies: Sequence[Accuracy], method: str, labels_per_class: int) -> Estimate | None:
    """The mean accuracy of a method with so many labels; None where it failed on every draw."""
    values = list(by_seed(accuracies, method, labels_per_class).values())
    return estimate(values) if values else None


def mean_difference(accuracies: Sequence[Accuracy], comparison: Comparison, labels_per_class: int) -> Estimate | None:
    """The mean gain of `comparison`, paired: from the differences on the draws on which both methods have a result.

    Returns:
      The gain in accuracy, from -1 to 1; None where there is no such draw.
    """
    ours = by_seed(accuracies, comparison.method, labels_per_class)
    theirs = by_seed(accuracies, comparison.against, labels_per_class)
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return estimate(differences) if differences else None


def verdict(difference: Estimate, test_images: int) -> str:
    """Whether a step pays, by the interval of its gain.

    Args:
      difference: the gain.
      test_images: how many images it was measured on.

    Returns:
      `pays` where the whole interval is above 0, and the gain is more images than chance may give; `does not pay`
      where the whole interval is below a gain of 1 point; otherwise `cannot tell`, as always with one draw.
    """
    if difference.low > 0 and difference.mean * test_images > CHANCE_IMAGES:
        return "pays"
    if difference.high < WORTH:
        return "does not pay"
    return "cannot tell"


def in_points(value: Estimate, signed: bool = False) -> str:
    """An estimate in percentage points.

    Example:
      in_points(Estimate(0.123, 0.031, 3), signed=True) == "+12.3 ± 3.1"
    """
    mean = f"{100 * value.mean:+.1f}" if signed else f"{100 * value.mean:.1f}"
    return mean if value.half_width is None else f"{mean} ± {100 * value.half_width:.1f}"


def labels_in_words(labels_per_class: int) -> str:
    """Example: labels_in_words(4) == "4 labels a class"."""
    return f"{labels_per_class} label{'s' if labels_per_class > 1 else ''} a class"


def sentence(comparison: Comparison, difference: Estimate, test_images: int) -> str:
    """What a comparison says, in words.

    Example:
      "fine-tuning pays: +12.3 ± 3.1 points over supervised training"
    """
    points = f"{in_points(difference, signed=True)} points over {comparison.over}"
    judged = verdict(difference, test_images)
    if judged != "cannot tell":
        return f"{comparison.gain} {judged}: {points}"
    seeds = "one label seed" if difference.draws == 1 else f"{difference.draws} label seeds"
    return f"{seeds} and {test_images:,} test images cannot tell whether {comparison.gain} pays: {points}"


def verdicts(accuracies: Sequence[Accuracy], test_images: int) -> list[str]:
    """Whether the effort pays: for each number of labels, a sentence for each comparison that decides it."""
    lines = []
    for labels_per_class in label_counts(accuracies):
        for comparison in COMPARISONS:
            difference = mean_difference(accuracies, comparison, labels_per_class)
            if difference and comparison.decides:
                said = sentence(comparison, difference, test_images)
                lines.append(f"With {labels_in_words(labels_per_class)}, {said}.")
    return lines


def label_counts(accuracies: Sequence[Accuracy]) -> list[int]:
    """The numbers of labels a class, ascending."""
    return sorted({accuracy.labels_per_class for accuracy in accuracies})


def draws(accuracies: Sequence[Accuracy]) -> list[int]:
    """The label seeds, ascending."""
    return sorted({accuracy.label_seed for accuracy in accuracies})


def markdown(accuracies: Sequence[Accuracy], test_images: int) -> str:
    """The whole comparison as Markdown: accuracies, paired differences, verdicts, and what the intervals cover.

    Args:
      accuracies: all that were measured.
      test_images: how many images they were measured on.
    """
    counts = label_counts(accuracies)
    head = [labels_in_words(labels_per_class) for labels_per_class in counts]
    rows = []
    for method, called in METHODS.items():
        rows.append([called, *(_accuracy_cell(accuracies, method, count) for count in counts)])
    compared = []
    for comparison in COMPARISONS:
        title = f"{comparison.gain} over {comparison.over}"
        cells = [_difference_cell(accuracies, comparison, count, test_images) for count in counts]
        compared.append([title, *cells])
    seeds = draws(accuracies)
    named = ", ".join(map(str, seeds))
    if len(seeds) == 1:
        covers = f"One draw of the labels (label seed {named}), so no interval."
    else:
        covers = f"Mean and 95 % interval (Student's t) over {len(seeds)} draws of the labels (label seeds {named})."
    return "\n".join(
        [
            "Accuracy on the test images, in percent:",
            "",
            *_table(["method", *head], rows),
            "",
            "Gain on the same draws of labels, in percentage points:",
            "",
            *_table(["gain of", *head], compared),
            "",
            *(f"- {line}" for line in verdicts(accuracies, test_images)),
            "",
            covers,
            "The interval covers the choice of the labels, not that of the test images, nor that of the training seed.",
            "Raw pixels, as they are, centred or whitened, have the best of several numbers of neighbours, chosen on",
            "the test images, so that a comparison with them is a hard one.",
            "",
        ]
    )


def _accuracy_cell(accuracies: Sequence[Accuracy], method: str, labels_per_class: int) -> str:
    value = mean_accuracy(accuracies, method, labels_per_class)
    return _with_gaps(in_points(value), value, accuracies) if value else "failed"


def _difference_cell(
    accuracies: Sequence[Accuracy], comparison: Comparison, labels_per_class: int, test_images: int
) -> str:
    value = mean_difference(accuracies, comparison, labels_per_class)
    if not value:
        return "failed"
    return _with_gaps(f"{in_points(value, signed=True)}, {verdict(value, test_images)}", value, accuracies)


def _with_gaps(text: str, value: Estimate, accuracies: Sequence[Accuracy]) -> str:
    """The text of a cell; where some draws failed, it says how many there are."""
    wanted = len(draws(accuracies))
    return text if value.draws == wanted else f"{text} ({value.draws} of {wanted} draws)"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first column is aligned to the left and whose others are aligned to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *others])} |"

    rule = ["".ljust(widths[0], "-")]
    for width in widths[1:]:
        rule.append(":".rjust(width, "-"))
    return [line(head), line(rule), *map(line, rows)]


def as_json(accuracies: Sequence[Accuracy], test_images: int) -> dict[str, Any]:
    """Every figure, for programs.

    Args:
      accuracies: all that were measured.
      test_images: how many images they were measured on.

    Returns:
      `accuracies`: every single one; `means` and `differences`: the estimates, with `half_width` of the 95 % interval
      (None with one draw) and, for the differences, the `verdict`. Accuracies are from 0 to 1.
    """
    means = []
    differences = []
    for labels_per_class in label_counts(accuracies):
        for method in METHODS:
            value = mean_accuracy(accuracies, method, labels_per_class)
            if value:
                means.append({"method": method, "labels_per_class": labels_per_class, **value._asdict()})
        for comparison in COMPARISONS:
            value = mean_difference(accuracies, comparison, labels_per_class)
            if value:
                pair = {"method": comparison.method, "against": comparison.against}
                gain = {"labels_per_class": labels_per_class, **value._asdict()}
                differences.append({**pair, **gain, "verdict": verdict(value, test_images)})
    return {
        "accuracies": [accuracy._asdict() for accuracy in accuracies],
        "means": means,
        "differences": differences,
        "verdicts": verdicts(accuracies, test_images),
    }


def plot(accuracies: Sequence[Accuracy], path: str | Path, title: str) -> None:
    """Writes a picture of the accuracies: bars for one number of labels, curves for several.

    Args:
      accuracies: what to show.
      path: of the PNG.
      title: what was measured.
    """
    counts = label_counts(accuracies)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if len(counts) == 1:
        _bars(axes, accuracies, counts[0])
    else:
        _curves(axes, accuracies, counts)
    axes.set_title(title)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, accuracies: Sequence[Accuracy], labels_per_class: int) -> None:
    """A horizontal bar for each method, the first at the top, with its interval and, at the right, its figure."""
    beside = axes.get_yaxis_transform()  # x as a share of the width, y as the place of a bar
    for place, method in enumerate(METHODS):
        value = mean_accuracy(accuracies, method, labels_per_class)
        if not value:
            axes.text(1.02, place, "failed", va="center", transform=beside)
            continue
        interval = 100 * value.half_width if value.half_width is not None else None
        axes.barh(place, 100 * value.mean, xerr=interval, color=STYLES[method][0], alpha=0.75, capsize=4)
        axes.text(1.02, place, in_points(value), va="center", transform=beside)
    axes.set_yticks(range(len(METHODS)), list(METHODS.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"accuracy on the test images with {labels_in_words(labels_per_class)}, %")


def _curves(axes: Any, accuracies: Sequence[Accuracy], counts: Sequence[int]) -> None:
    """Accuracy against the number of labels, one curve for each method, with its intervals."""
    shown = []
    for place, (method, called) in enumerate(METHODS.items()):
        found = [(count, mean_accuracy(accuracies, method, count)) for count in counts]
        points = [(count, value) for count, value in found if value]
        colour, marker = STYLES[method]
        aside = CURVE_SHIFT ** (place - len(METHODS) // 2)  # The intervals stand side by side.
        axes.errorbar(
            [count * aside for count, _ in points],
            [100 * value.mean for _, value in points],
            yerr=[100 * (value.half_width or 0.0) for _, value in points],
            label=called, color=colour, marker=marker, capsize=3,
        )  # fmt: skip
        shown += [100 * value.mean for _, value in points]
    if shown:  # A wide interval must not press the curves together.
        axes.set_ylim(max(0.0, min(shown) - 10), min(100.0, max(shown) + 10))
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("labels a class")
    axes.set_ylabel("accuracy on the test images, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
