"""Label propagation: a few labels spread over all images, along the nearest neighbours in feature space.

After Zhou et al., "Learning with local and global consistency" (2003), and Iscen et al., arXiv 1904.04717.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

import knn

ALPHA = 0.9  # The share of an answer that comes from the neighbours.
SHARPENING = 2.0  # Answers that have spread are flatter than the teacher's; this power makes them about as sure.
TOLERANCE = 1e-12  # Of the conjugate gradients: far below LEAST, since what they leave is taken for an answer.
LEAST = 1e-9  # No division by less.


def neighbour_graph(features: np.ndarray, neighbors: int) -> sparse.csr_matrix:
    """The images as a graph in which each is tied to its nearest neighbours: S = D^-1/2 W D^-1/2.

    W is symmetric. The weight of two neighbours is that of the kNN vote, exp(cosine similarity / 0.07), up to a common
    factor.

    Args:
      features: [n, D], finite.
      neighbors: how many each image is tied to, fewer than n.

    Returns:
      [n, n] float32, with eigenvalues in [-1, 1].
    """
    from sklearn.neighbors import NearestNeighbors

    n = len(features)
    finder = NearestNeighbors(n_neighbors=neighbors, algorithm="brute").fit(knn.normalized(features))
    distances, nearest = finder.kneighbors()  # [n, neighbors]; an image is no neighbour of its own
    weights = np.exp(-(distances**2) / 2 / knn.TEMPERATURE)  # |a - b|^2 / 2 = 1 - cosine
    rows = np.repeat(np.arange(n), neighbors)
    one_way = sparse.csr_matrix((weights.ravel(), (rows, nearest.ravel())), shape=(n, n))
    both_ways = one_way.maximum(one_way.T)
    degrees = np.asarray(both_ways.sum(1)).ravel()
    scale = sparse.diags(1 / np.sqrt(np.maximum(degrees, 1e-12)))
    return (scale @ both_ways @ scale).tocsr()


def propagate(graph: sparse.csr_matrix, seeds: np.ndarray) -> np.ndarray:
    """Spreads `seeds` over the graph: (I - alpha S)^-1 seeds, by conjugate gradients.

    Args:
      graph: S, from `neighbour_graph`.
      seeds: [n, classes], at least 0.

    Returns:
      [n, classes] float32, at least 0; a row of zeros where no seed is within reach.
    """
    system = sparse.eye(graph.shape[0], format="csr") - ALPHA * graph
    spread = [linalg.cg(system, column, rtol=TOLERANCE)[0] for column in seeds.astype(np.float64).T]
    return np.maximum(np.stack(spread, axis=1), 0.0).astype(np.float32)  # [n, classes]


def spread_answers(graph: sparse.csr_matrix, labels: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The labels spread over the graph; then these answers and the teacher's own, together, once more.

    Where the images of a class lie together, the labels alone would do; where they do not, the teacher knows better.

    Args:
      graph: S, from `neighbour_graph`.
      labels: [n] int, -1 where unlabelled.
      own: [n, classes] the teacher's own probabilities.

    Returns:
      [n, classes] probabilities, float32.
    """
    labelled = np.flatnonzero(labels >= 0)
    seeds = np.zeros_like(own)
    seeds[labelled, labels[labelled]] = 1.0
    of_labels = _sharpened(propagate(graph, seeds))  # [n, classes]; zeros where no label reaches
    return _sharpened(propagate(graph, of_labels + own))


def _sharpened(spread: np.ndarray) -> np.ndarray:
    """What came of a propagation [n, classes], as probabilities; rows of zeros stay."""
    powers = (spread / np.maximum(spread.max(axis=1, keepdims=True), LEAST)) ** SHARPENING
    return powers / np.maximum(powers.sum(axis=1, keepdims=True), LEAST)
