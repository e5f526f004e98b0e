"""Which images to label next: typical ones, each from another part of feature space.

After Hacohen, Dekel and Weinshall, "Active learning on a budget: opposite strategies suit high and low budgets", arXiv
2202.02794 (TypiClust). With few labels the images to label are those that stand for many others; images that a
classifier is unsure of pay only where there are many labels.
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

import knn

MAX_CLUSTERS = 500  # This and the next three as in the paper's appendix.
FEW_CLUSTERS = 50  # Up to here k-means sees all images in each iteration, beyond it a batch of them.
LEAST_IMAGES = 5  # Smaller clusters come last: what lies alone stands for nothing else.
NEIGHBORS = 20
BATCH = 5000
SEED = 0


def suggest(features: np.ndarray, labelled: np.ndarray, count: int) -> np.ndarray:
    """The images to label next, the most useful first. The same features give the same images.

    The features, at length 1, are cut into as many clusters as there are labelled images and images wanted, at most
    `MAX_CLUSTERS`. A labelled image covers its cluster. Each choice takes the cluster with the fewest labelled and
    chosen images, of several the largest, and from it the most typical image that is still free.

    Args:
      features: [n, D], finite.
      labelled: [n] bool, the images that have a label.
      count: how many to choose, at most as many as have no label.

    Returns:
      [count] indices into `features`.

    Raises:
      ValueError: where fewer than `count` images have no label.
    """
    if count > np.count_nonzero(~labelled):
        raise ValueError(f"{count} images are wanted, and {np.count_nonzero(~labelled)} have no label")
    unit = knn.normalized(features)
    wanted = min(int(labelled.sum()) + count, MAX_CLUSTERS, len(unit))
    cluster_of_each = clusters(unit, wanted)  # [n]
    sizes = np.bincount(cluster_of_each, minlength=wanted)
    covered = np.bincount(cluster_of_each[labelled], minlength=wanted)
    candidates: dict[int, list[int]] = {}  # The free images of a cluster, the most typical last.
    chosen: list[int] = []
    for full in np.flatnonzero(sizes == covered).tolist():  # They hold nothing to choose.
        candidates[full] = []
    while len(chosen) < count:
        used_up = np.array([not candidates.get(cluster, [True]) for cluster in range(wanted)])
        # By the last of these keys first.
        cluster = int(np.lexsort((-sizes, covered, sizes < LEAST_IMAGES, used_up))[0])
        if cluster not in candidates:
            members = np.flatnonzero(cluster_of_each == cluster)
            by_typicality = members[np.argsort(typicality(unit[members]), kind="stable")]
            candidates[cluster] = [int(member) for member in by_typicality if not labelled[member]]
        chosen.append(candidates[cluster].pop())
        covered[cluster] += 1
    return np.array(chosen, np.int64)


def clusters(features: np.ndarray, count: int) -> np.ndarray:
    """The cluster of each of `features` [n, D] by k-means, [n] from 0 to `count` - 1. Some may be empty."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if count <= FEW_CLUSTERS:
        k_means = KMeans(count, n_init=1, max_iter=100, random_state=SEED)
    else:
        k_means = MiniBatchKMeans(count, batch_size=BATCH, n_init=1, random_state=SEED)
    with threadpool_limits(1):  # The last bits of a sum depend on the number of threads, and clusters on the last bits.
        return k_means.fit_predict(features)


def typicality(features: np.ndarray) -> np.ndarray:
    """How typical each member of a cluster is (Eq. 1): 1 / the mean distance to its nearest neighbours in the cluster.

    Args:
      features: [m, D], of all members.

    Returns:
      [m]; infinite where the neighbours are the same, and 0 for a member that is alone.
    """
    from sklearn.neighbors import NearestNeighbors

    neighbors = min(NEIGHBORS, len(features) - 1)
    if neighbors < 1:
        return np.zeros(len(features))
    finder = NearestNeighbors(n_neighbors=neighbors, algorithm="brute").fit(features)
    with threadpool_limits(1), np.errstate(divide="ignore"):
        distances, _ = finder.kneighbors()  # [m, neighbors]; an image is no neighbour of its own
        return 1.0 / distances.mean(axis=1)
