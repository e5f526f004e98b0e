"""The kNN accuracy of features: a bank of training features, in which the nearest neighbours of a feature vote."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

TEMPERATURE = 0.07  # As in arXiv 1805.01978.
MAX_FEATURES = 100_000
MAX_BYTES = 2**29  # A bank's features take at most so much.
QUERIES = 128  # So many are answered together, which limits the memory that their similarities take.


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
    """

    def __init__(self, size: int, dim: int) -> None:
        self._features = np.empty([size, dim], np.float32)
        self._labels = np.empty([size], np.int64)
        self.count = 0

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
        if not self.count:
            raise ValueError("no feature in the bank")
        parts = [queries[start : start + QUERIES] for start in range(0, len(queries), QUERIES)]
        labels = [self._vote(part, min(neighbors, self.count)) for part in parts]
        return np.concatenate([np.empty([0], np.int64), *labels])

    def _vote(self, queries: np.ndarray, neighbors: int) -> np.ndarray:
        features, labels = self._features[: self.count], self._labels[: self.count]
        similarity, nearest = tf.math.top_k(normalized(queries) @ features.T, neighbors)  # [b, k]
        weights = np.exp(similarity.numpy() / TEMPERATURE)
        votes = np.zeros([len(queries), labels.max() + 1])  # [b, classes]
        rows = np.arange(len(queries))[:, None]  # [b, 1]
        np.add.at(votes, (rows, labels[nearest.numpy()]), weights)
        return votes.argmax(1)


def normalized(features: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """The features [n, D] at length 1, in `dtype`; a zero feature stays zero."""
    features = features.astype(dtype)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
