"""Labels spread along neighbours in feature space."""

import numpy as np

import knn
import propagation
from propagation import neighbour_graph, propagate, spread_answers


def arcs(points=40):
    """Two arcs of directions in 3-D, class 0 and 1, whose ends lie nearer to the other arc's beginning."""
    angle = np.linspace(0.1, 3.0, points)
    of_arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    features = np.concatenate([np.c_[of_arc, np.full(points, 0.15)], np.c_[of_arc, np.full(points, -0.15)]])
    return features, np.repeat([0, 1], points)


def seeds_of(labels, labelled):
    seeds = np.zeros([len(labels), labels.max() + 1])
    seeds[labelled, labels[labelled]] = 1
    return seeds


def test_the_graph_ties_each_image_to_its_neighbours_both_ways():
    features = np.random.default_rng(0).normal(size=(40, 5))
    graph = neighbour_graph(features, 3).toarray()
    np.testing.assert_allclose(graph, graph.T, rtol=1e-6)
    assert not graph.diagonal().any()
    assert np.abs(np.linalg.eigvalsh(graph)).max() <= 1 + 1e-6
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T - 2 * np.eye(40)
    nearest = np.argsort(-similarity, axis=1)[:, :3]
    tied = np.zeros([40, 40], bool)
    tied[np.arange(40)[:, None], nearest] = True
    np.testing.assert_array_equal(graph > 0, tied | tied.T)
    weights = np.where(tied | tied.T, np.exp((similarity - 1) / knn.TEMPERATURE), 0)
    degrees = weights.sum(1)
    np.testing.assert_allclose(graph, weights / np.sqrt(np.outer(degrees, degrees)), rtol=1e-4)


def test_spreading_solves_the_linear_system():
    graph = neighbour_graph(np.random.default_rng(1).normal(size=(50, 4)), 4)
    seeds = seeds_of(np.arange(50) % 3, np.arange(6))
    expected = np.linalg.solve(np.eye(50) - propagation.ALPHA * graph.toarray(), seeds)
    np.testing.assert_allclose(propagate(graph, seeds), expected, rtol=1e-3, atol=1e-4)


def test_one_label_reaches_along_an_arc_where_the_nearest_label_is_the_wrong_one():
    features, labels = arcs()
    labelled = np.array([0, 79])  # The beginning of one arc, the end of the other.
    graph = neighbour_graph(features, 2)
    spread = propagate(graph, seeds_of(labels, labelled))
    nearest_label = labels[labelled][(features @ features[labelled].T).argmax(1)]
    assert (nearest_label == labels).mean() < 0.6
    assert (spread.argmax(1) == labels).all()
    # A teacher that leans to the nearest label is outvoted.
    seen = np.full(80, -1)
    seen[labelled] = labels[labelled]
    leaning = np.where(nearest_label[:, None] == [0, 1], 0.55, 0.45)
    assert (spread_answers(graph, seen, leaning).argmax(1) == labels).all()


def test_images_that_no_label_reaches_get_the_answers_of_their_teacher():
    apart = np.kron(np.eye(2), np.ones([10, 1])) + np.random.default_rng(2).normal(scale=0.05, size=[20, 2])
    graph = neighbour_graph(apart, 3)
    seen = np.full(20, -1)
    seen[0] = 2  # in the first group alone
    own = np.tile([0.3, 0.5, 0.2], [20, 1])
    own[15] = [0.6, 0.3, 0.1]  # An image that is told otherwise than its neighbours.
    answers = spread_answers(graph, seen, own)
    np.testing.assert_allclose(answers.sum(1), 1, rtol=1e-5)
    assert (answers.argmax(1) == np.repeat([2, 1], 10)).all()
