"""Suggestions: one typical image of each cluster, the largest first; labelled images cover theirs."""

import numpy as np
import pytest

from answers import suggestion

CENTRES = 10 * np.eye(8)[:4]


def blobs(sizes, noise=0.5, seed=0):
    """Clusters of these sizes, one after the other, whose first member lies in the middle; and their numbers."""
    random = np.random.default_rng(seed)
    features, numbers = [], []
    for number, size in enumerate(sizes):
        members = CENTRES[number] + noise * random.standard_normal([size, 8])
        members[0] = CENTRES[number]
        features.append(members)
        numbers += [number] * size
    return np.concatenate(features).astype(np.float32), np.array(numbers)


def test_without_labels_each_cluster_gives_one_the_largest_first():
    features, numbers = blobs([20, 60, 40, 30])
    chosen = suggestion.suggest(features, np.zeros(150, bool), 4)
    assert numbers[chosen].tolist() == [1, 2, 3, 0]


def test_labelled_images_cover_their_clusters():
    features, numbers = blobs([20, 60, 40, 30])
    labelled = np.zeros(150, bool)
    labelled[[25, 90]] = True  # of clusters 1 and 2
    assert numbers[suggestion.suggest(features, labelled, 2)].tolist() == [3, 0]


def test_the_most_typical_image_is_the_one_with_the_nearest_neighbours():
    features, numbers = blobs([30, 30], noise=0.8)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen = suggestion.suggest(features, np.zeros(60, bool), 2)
    for index in chosen:
        mean_distance = {}
        members = np.flatnonzero(numbers == numbers[index])
        for member in members:
            distances = sorted(np.linalg.norm(unit[member] - unit[other]) for other in members if other != member)
            mean_distance[member] = np.mean(distances[: suggestion.NEIGHBORS])
        assert index == min(mean_distance, key=mean_distance.get)


def test_the_middle_is_more_typical_than_the_edge():
    features, _ = blobs([40])
    typical = suggestion.typicality(features)
    farthest = np.linalg.norm(features - CENTRES[0], axis=1).argmax()
    assert typical[0] > np.median(typical) > typical[farthest]
    assert suggestion.typicality(features[:1]).tolist() == [0]
    assert np.isinf(suggestion.typicality(np.ones([3, 2]))).all()


def test_more_than_there_are_clusters_are_spread_over_them(monkeypatch):
    monkeypatch.setattr(suggestion, "MAX_CLUSTERS", 4)
    features, numbers = blobs([20, 60, 40, 30])
    chosen = suggestion.suggest(features, np.zeros(150, bool), 10)
    assert len(set(chosen.tolist())) == 10
    assert np.bincount(numbers[chosen]).tolist() == [2, 3, 3, 2]


def test_what_lies_alone_comes_last(monkeypatch):
    monkeypatch.setattr(suggestion, "MAX_CLUSTERS", 4)
    features, numbers = blobs([20, 60, 40, 3])
    chosen = suggestion.suggest(features, np.zeros(123, bool), 123)
    assert numbers[chosen[:4]].tolist() == [1, 2, 0, 1] and numbers[chosen[-3:]].tolist() == [3, 3, 3]


@pytest.mark.parametrize("count", [1, 7, 97])
def test_no_labelled_image_and_none_twice(count):
    features, _ = blobs([40, 40, 20])
    labelled = np.zeros(100, bool)
    labelled[[0, 50, 99]] = True
    chosen = suggestion.suggest(features, labelled, count)
    assert len(set(chosen.tolist())) == count and not labelled[chosen].any()
    np.testing.assert_array_equal(chosen, suggestion.suggest(features, labelled, count))


def test_many_clusters_too_are_the_same_each_time(monkeypatch):
    monkeypatch.setattr(suggestion, "FEW_CLUSTERS", 3)
    features, numbers = blobs([20, 60, 40, 30])
    chosen = suggestion.suggest(features, np.zeros(150, bool), 8)
    assert set(numbers[chosen].tolist()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(chosen, suggestion.suggest(features, np.zeros(150, bool), 8))


def test_too_many_are_refused():
    with pytest.raises(ValueError, match="5 images are wanted, and 4 have no label"):
        suggestion.suggest(np.eye(6, dtype=np.float32), np.array([True, True, False, False, False, False]), 5)
