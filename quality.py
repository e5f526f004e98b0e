"""How good features are, in numbers: their geometry, and how well a simple classifier of them does.

Everything takes and returns NumPy arrays. Nothing here depends on where the features came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import pdist
from scipy.special import entr, log_softmax
from threadpoolctl import threadpool_limits

import knn
import whitening

PIXEL_NEIGHBORS = (1, 5, 20)
# The inverse strength of the L2 penalty of `linear_classifier`. With 1 to 80 labels a class, on pixels of the digits,
# random features of them and pretrained features of five sets of images, the accuracy is within 2.5 points of the best
# of 0.0001 to 10.
INVERSE_PENALTY = 0.1
LINEAR_ITERATIONS = 200
# No label counts as less probable than this: one image of which a classifier is surely wrong shall not decide a mean.
LEAST_PROBABILITY = 1e-6
# On matrices this small the threads of a busy machine wait for each other a hundred times longer than they compute.
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


def alignment(z1: np.ndarray, z2: np.ndarray) -> float:
    """How far apart the two views of an image are: the mean squared distance (arXiv 2005.10242, alpha = 2).

    Args:
      z1, z2: [n, D], the projections of the first and of the second views. They are normalised to length 1 here.

    Returns:
      From 0, where the two views of each image agree, to 4.
    """
    return float(np.mean(np.sum((_unit(z1) - _unit(z2)) ** 2, axis=1)))


def uniformity(z: np.ndarray) -> float:
    """How evenly features cover the sphere: log of the mean of exp(-2 distance^2) over pairs (arXiv 2005.10242, t = 2).

    Args:
      z: [n, D], normalised to length 1 here.

    Returns:
      From 0, where all features are the same, down to about -4, where they are spread evenly.

    Raises:
      ValueError: where there are fewer than two features.
    """
    if len(z) < 2:
        raise ValueError(f"uniformity compares pairs of features, and there are {len(z)}")
    return float(np.log(np.mean(np.exp(-2.0 * pdist(_unit(z), "sqeuclidean")))))  # over [n (n - 1) / 2]


def spread(x: np.ndarray) -> float:
    """How much features differ: the mean over dimensions of the standard deviation of unit rows (arXiv 2011.10566).

    Args:
      x: [n, D], normalised to length 1 here.

    Returns:
      0 where all features are the same, which is collapse; 1 where they point into all directions alike.
    """
    unit = _unit(x)
    return float(unit.std(axis=0).mean() * np.sqrt(unit.shape[1]))


@one_thread
def effective_rank(x: np.ndarray) -> float:
    """How many dimensions features fill: exp of the entropy of their singular values (RankMe, arXiv 2210.02885).

    Args:
      x: [n, D], taken as they are, neither centred nor normalised.

    Returns:
      From 1, where all features lie on one line through the origin, to min(n, D).
    """
    singular = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)  # [min(n, D)]
    shares = singular / max(singular.sum(), np.finfo(np.float64).tiny)
    return float(np.exp(entr(shares).sum()))


def knn_predictions(bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, neighbors: int) -> np.ndarray:
    """The labels that the nearest neighbours in a bank give, by the weighted vote of `knn.Bank.vote`.

    Features are normalised to length 1 and half whitened by those of the bank.

    Args:
      bank: [m, D] features.
      bank_labels: [m] labels of them, 0 or more.
      queries, neighbors: as for `knn.Bank.vote`, which also says what it returns and raises.
    """
    components = whitening.principal_components(knn.normalized(bank))
    whitened_bank, whitened = (components.whitened(knn.normalized(features)) for features in (bank, queries))
    return _filled(whitened_bank, bank_labels).vote(whitened, neighbors)


def chosen_knn_predictions(bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """As `knn_predictions`, in the way that does best in the bank itself: see `knn.Bank.choose`."""
    filled = _filled(bank, bank_labels)
    return filled.vote(queries, filled.choose())


def best_pixel_knn(
    bank_pixels: np.ndarray,
    bank_labels: np.ndarray,
    query_pixels: np.ndarray,
    query_labels: np.ndarray,
    ks: Sequence[int] = PIXEL_NEIGHBORS,
) -> float:
    """The most that kNN on raw pixels gives: its best accuracy over `ks`, as they are, centred and whitened.

    The best is chosen by the accuracy itself, which favours the pixels. A comparison with it is a hard one.

    Args:
      bank_pixels: [m, ...] images, uint8 or float.
      bank_labels: [m] labels of them, 0 or more.
      query_pixels: [n, ...] images of the same shape.
      query_labels: [n] labels of them.
      ks: numbers of neighbours.

    Returns:
      The accuracy, from 0 to 1.

    Raises:
      ValueError: where the bank is empty.
    """
    return float(pixel_knn_hits(bank_pixels, bank_labels, query_pixels, query_labels, ks).mean(axis=1).max())


def pixel_knn_hits(
    bank_pixels: np.ndarray,
    bank_labels: np.ndarray,
    query_pixels: np.ndarray,
    query_labels: np.ndarray,
    ks: Sequence[int] = PIXEL_NEIGHBORS,
) -> np.ndarray:
    """Which images kNN on raw pixels gets right, for each way: every k; as they are, centred, half whitened, whitened.

    Takes the arguments of `best_pixel_knn`. The answers of several folds can be joined before the best way is chosen.

    Returns:
      [4 * len(ks), n] bool.
    """
    bank = np.reshape(bank_pixels, [len(bank_pixels), -1]).astype(np.float32)  # [m, H W C]
    queries = np.reshape(query_pixels, [len(query_pixels), -1]).astype(np.float32)  # [n, H W C]
    components = whitening.principal_components(bank)
    forms = [(bank, queries), (bank - components.mean, queries - components.mean)]
    for degree in (whitening.HALF, whitening.FULL):
        forms.append((components.whitened(bank, degree), components.whitened(queries, degree)))
    return np.concatenate([_filled(bank, bank_labels).votes(queries, ks) == query_labels for bank, queries in forms])


class LinearClassifier(NamedTuple):
    """Logits from features [n, D]: `features @ kernel + bias`.

    Attributes:
      kernel: [D, C] float32.
      bias: [C] float32.
      classes: [C] the labels that the logits stand for, in increasing order.
    """

    kernel: np.ndarray
    bias: np.ndarray
    classes: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """The logits [n, C] of `features` [n, D]."""
        return features.astype(np.float32) @ self.kernel + self.bias


def linear_classifier(features: np.ndarray, labels: np.ndarray) -> LinearClassifier:
    """Multinomial logistic regression on half-whitened features, with a fixed L2 penalty on their weights.

    The penalty is sound for one to a thousand labels a class.

    Args:
      features: [m, D], to learn from, and to whiten by.
      labels: [m] labels of them, of at least two classes.

    Raises:
      ValueError: where all labels are the same.
    """
    from sklearn.linear_model import LogisticRegression

    regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=LINEAR_ITERATIONS)
    with threadpool_limits(1, user_api="blas"):  # as `one_thread`, and for the libraries that have come by now
        components = whitening.principal_components(features)
        regression.fit(components.whitened(features), labels)
    weights, bias = regression.coef_, regression.intercept_  # [C, R], [C]
    if len(weights) == 1:  # Two classes: the logit of the second, to the logit 0 of the first.
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    kernel = components.whitening() @ weights.T.astype(np.float32)  # [D, C]
    return LinearClassifier(kernel, (bias - components.mean @ kernel).astype(np.float32), regression.classes_)


def linear_predictions(features: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The labels that `linear_classifier` gives on features at length 1.

    Args:
      features, labels: [m, D] and [m], to learn from.
      queries: [n, D] features.

    Returns:
      [n] labels.

    Raises:
      ValueError: where all labels are the same.
    """
    classifier = linear_classifier(knn.normalized(features), labels)
    return classifier.classes[classifier.logits(knn.normalized(queries)).argmax(axis=1)]


def linear_log_probabilities(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray
) -> np.ndarray:
    """The natural logarithm of the probability that the classifier of `linear_predictions` gives to each right label.

    Args:
      features, labels, queries: as for `linear_predictions`, which also says what it raises.
      query_labels: [n] labels of the queries, all of which are among `labels`.

    Returns:
      [n], from the logarithm of `LEAST_PROBABILITY` to 0.
    """
    classifier = linear_classifier(knn.normalized(features), labels)
    logs = log_softmax(classifier.logits(knn.normalized(queries)), axis=1)  # [n, C]
    columns = np.searchsorted(classifier.classes, query_labels)  # [n]
    return np.maximum(logs[np.arange(len(queries)), columns], np.log(LEAST_PROBABILITY))


def _filled(features: np.ndarray, labels: np.ndarray) -> knn.Bank:
    """A bank of all `features` [m, D]."""
    bank = knn.Bank(*features.shape)
    bank.add(features, labels)
    return bank


def _unit(x: np.ndarray) -> np.ndarray:
    """The rows of `x` [n, D] at length 1, float64; a zero row stays zero."""
    return knn.normalized(np.asarray(x), np.float64)
