"""The kNN accuracy of features: a bank of training features, in which the nearest neighbours of a feature vote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

import whitening

TEMPERATURE = 0.07  # As in arXiv 1805.01978.
MAX_FEATURES = 100_000
MAX_BYTES = 2**29  # A bank's features take at most so much.
QUERIES = 128  # So many are answered together, which limits the memory that their similarities take.
# `Bank.choose` tries these numbers of neighbours and degrees of whitening, on so many of the bank's own features.
CHOICES = (1, 5, 20)
DEGREES = (0.0, whitening.HALF, whitening.FULL)
JUDGED = 2048


def capacity(dim: int) -> int:
    """How many features of `dim` numbers a bank may hold."""
    return max(1, min(MAX_FEATURES, MAX_BYTES // (4 * dim)))


class Bank:
    """Labelled features, normalised, in one array.

    Example:
      bank = Bank(size=2, dim=3)
      bank.add(np.array([[1.0, 0, 0], [0, 1.0, 0]]), np.array([5, 7]))
      bank.vote(np.array([[0.1, 0.9, 0.0]]), neighbors=1)  # [7]

    Args:
      size: how many features there will be at most.
      dim: the width D of a feature.

    Attributes:
      count: how many features there are.
      degree: how far the features are whitened for the votes, as `choose` decides.
    """

    def __init__(self, size: int, dim: int) -> None:
        self._features = np.empty([size, dim], np.float32)
        self._labels = np.empty([size], np.int64)
        self._components: whitening.PrincipalComponents | None = None
        self.count = 0
        self.degree = 0.0

    def add(self, features: np.ndarray, labels: np.ndarray) -> None:
        """Adds `features` [n, D] with their `labels` [n], 0 or more.

        Raises:
          ValueError: where they are more than fit.
        """
        end = self.count + len(features)
        if end > len(self._features):
            raise ValueError(f"{end} features do not fit into a bank of {len(self._features)}")
        self._features[self.count : end] = normalized(features)
        self._labels[self.count : end] = labels
        self.count = end

    def choose(self) -> int:
        """Chooses the number of neighbours, and how far to whiten the features, by leave-one-out in the bank.

        Each judged feature is answered by all the others. Whitened by the bank's own principal components, features are
        normalised once more; not whitened, they stay as they are, uncentred. The bank stays in the best form, and takes
        no further features. Of equally good choices the first is taken: less whitening, fewer neighbours.

        Returns:
          How many neighbours do best, of `CHOICES`; 1 where there is one feature alone.
        """
        if self.count < 2:
            return 1
        judged = np.linspace(0, self.count - 1, min(JUDGED, self.count)).astype(np.int64)  # evenly spread, each once
        plain = self._features[: self.count]
        hits: dict[tuple[float, int], int] = {}
        self._components = whitening.principal_components(plain)
        for degree in DEGREES:
            self._take(plain, degree)
            hits |= {(degree, neighbors): right for neighbors, right in self._hits_without_itself(judged).items()}
        best, neighbors = max(hits, key=hits.__getitem__)
        self._take(plain, best)
        return neighbors

    def _take(self, plain: np.ndarray, degree: float) -> None:
        """Makes the normalised features `plain` [n, D], whitened to `degree`, those of the bank."""
        self.degree = degree
        self._features = self._transformed(plain)

    def _hits_without_itself(self, judged: np.ndarray) -> dict[int, int]:
        """How many of the features at the indices `judged` the others get right, by the number of neighbours."""
        hits = dict.fromkeys(CHOICES, 0)
        for start in range(0, len(judged), QUERIES):
            part = judged[start : start + QUERIES]
            similarity = self._features[part] @ self._features[: self.count].T
            similarity[np.arange(len(part)), part] = -np.inf
            for neighbors in CHOICES:
                guesses = self._most_voted(similarity, min(neighbors, self.count - 1))
                hits[neighbors] += int((guesses == self._labels[part]).sum())
        return hits

    def vote(self, queries: np.ndarray, neighbors: int) -> np.ndarray:
        """The weighted kNN vote (arXiv 1805.01978): cosine similarity, weights exp(similarity / 0.07).

        Args:
          queries: [n, D] features.
          neighbors: how many vote; all, where the bank has fewer.

        Returns:
          [n] int64 labels.

        Raises:
          ValueError: where the bank is empty.
        """
        return self.votes(queries, [neighbors])[0]

    def votes(self, queries: np.ndarray, choices: Sequence[int]) -> np.ndarray:
        """As `vote` for each number of neighbours in `choices`, [choices, n] int64. Similarities are computed once.

        Raises:
          ValueError: where the bank is empty.
        """
        if not self.count:
            raise ValueError("no feature in the bank")
        labels = [np.empty([len(choices), 0], np.int64)]
        for start in range(0, len(queries), QUERIES):
            part = self._transformed(normalized(queries[start : start + QUERIES]))
            similarity = part @ self._features[: self.count].T
            labels.append(np.stack([self._most_voted(similarity, min(k, self.count)) for k in choices]))
        return np.concatenate(labels, axis=1)

    def _transformed(self, unit: np.ndarray) -> np.ndarray:
        """Normalised features `unit` [n, D], whitened like those of the bank."""
        if not self.degree:
            return unit
        assert self._components is not None
        return normalized(self._components.whitened(unit, self.degree))

    def _most_voted(self, similarity: np.ndarray, neighbors: int) -> np.ndarray:
        """The labels [n] that win the votes, from the `similarity` [n, m] to the bank's features."""
        largest, nearest = tf.math.top_k(similarity, neighbors)  # [n, k]
        weights = np.exp(largest.numpy() / TEMPERATURE)
        labels = self._labels[: self.count]
        votes = np.zeros([len(similarity), labels.max() + 1])  # [n, classes]
        rows = np.arange(len(similarity))[:, None]  # [n, 1]
        np.add.at(votes, (rows, labels[nearest.numpy()]), weights)
        return votes.argmax(1)


def half_whitened(features: np.ndarray) -> np.ndarray:
    """The features [n, D], half whitened by their own principal components, [n, min(n, D)] at length 1."""
    unit = normalized(features)
    return normalized(whitening.principal_components(unit).whitened(unit))


def normalized(features: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """The features [n, D] at length 1, in `dtype`; a zero feature stays zero."""
    features = features.astype(dtype)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
