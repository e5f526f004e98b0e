"""How far the probabilities of a classifier can be believed, and the temperature that corrects them.

After Guo et al., "On calibration of modern neural networks", arXiv 1706.04599. Everything takes and returns NumPy
arrays; logits are [n, classes], labels [n] whole numbers from 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

BINS = 15  # As in the paper.
LEAST_LABELS = 100  # With fewer, neither the temperature nor the error means much.
TEMPERATURES = (0.05, 20.0)  # The least and the largest. A classifier that is never wrong would be given 0.
MAX_NUMBERS = 2**22  # A sample holds at most so many logits in all: 16 MB.
SEED = 0
TEMPERATURE = "calibration_temperature"  # What result.json calls it.


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What is known about the probabilities of a classifier.

    Attributes:
      temperature: the logits are to be divided by it; fitted on all labels.
      error: the expected calibration error of the probabilities as they are.
      error_after: the same with a temperature, each half of the labels with the one that was fitted on the other.
      labels: how many labels this rests on.
    """

    temperature: float
    error: float
    error_after: float
    labels: int


def expected_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error (section 2): how far the confidence is from the accuracy, in the mean.

    The images are sorted into bins of equal width by their confidence, the largest of their probabilities. Bin m holds
    ((m - 1) / bins, m / bins]. Each bin counts as much as it holds images.

    Args:
      probabilities: [n, classes], n at least 1.
      labels: [n].
      bins: how many.

    Returns:
      From 0, where the confidence is right in every bin, to 1.

    Example:
      expected_error(np.array([[0.8, 0.2]] * 10), np.array([0] * 6 + [1] * 4)) == 0.2
    """
    confidence = probabilities.max(axis=1).astype(np.float64)  # [n]
    right = probabilities.argmax(axis=1) == labels  # [n]
    bin_of_each = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of_each, weights=confidence - right, minlength=bins)  # [bins], sums
    return float(np.abs(gaps).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T with which softmax(logits / T) has the least cross-entropy (section 4.2)."""
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels]  # [n]

    def cross_entropy(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.mean(logsumexp(logits / temperature, axis=1) - own / temperature))

    # It has one minimum: it is convex in 1 / T.
    found = minimize_scalar(cross_entropy, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def is_temperature(value: object) -> bool:
    """Whether `value`, from a file, can be a temperature."""
    return isinstance(value, int | float) and TEMPERATURES[0] / 2 < value < TEMPERATURES[1] * 2


def calibrate(logits: np.ndarray, labels: np.ndarray) -> Calibration | None:
    """The temperature of a classifier, and what it does to the calibration error of labels that it was not fitted on.

    Args:
      logits, labels: of images that the classifier was not trained on, in random order.

    Returns:
      None where there are fewer than `LEAST_LABELS` labels.
    """
    count = len(labels)
    if count < LEAST_LABELS:
        return None
    halves = np.arange(count) % 2
    scaled = np.empty(logits.shape, np.float64)
    for half in (0, 1):
        fitted_on, measured = halves != half, halves == half
        scaled[measured] = logits[measured] / fit_temperature(logits[fitted_on], labels[fitted_on])
    return Calibration(
        temperature=fit_temperature(logits, labels),
        error=expected_error(softmax(logits.astype(np.float64), axis=1), labels),
        error_after=expected_error(softmax(scaled, axis=1), labels),
        labels=count,
    )


def as_result(found: Calibration) -> dict[str, float]:
    """What an evaluation's result says about the probabilities, by name."""
    return {
        "calibration_error": found.error,
        "calibration_error_after": found.error_after,
        TEMPERATURE: found.temperature,
        "calibration_labels": found.labels,
    }


class Sample:
    """Logits and labels that come batch by batch: all of them or, where these are too many, a random draw.

    The draw depends on the order of the examples, and not on how they are cut into batches.

    Args:
      classes: of the logits.
    """

    def __init__(self, classes: int) -> None:
        self._limit = max(1, MAX_NUMBERS // classes)
        self._random = np.random.default_rng(SEED)
        self._batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # keys, logits, labels
        self._count = 0

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Adds `logits` [n, classes] and their `labels` [n]."""
        self._batches.append((self._random.random(len(labels)), logits, labels))
        self._count += len(labels)
        if self._count > 2 * self._limit:
            self._keep_the_smallest()

    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """The logits and labels that were kept, in random order. There must be some."""
        self._keep_the_smallest()
        _, logits, labels = self._batches[0]
        return logits, labels

    def _keep_the_smallest(self) -> None:
        """Keeps the examples with the smallest keys, in the order of these."""
        keys, logits, labels = (np.concatenate(parts) for parts in zip(*self._batches, strict=True))
        kept = np.argsort(keys, kind="stable")[: self._limit]
        self._batches = [(keys[kept], logits[kept], labels[kept])]
        self._count = len(kept)
