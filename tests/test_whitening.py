"""Whitening: it is the textbook's, for many features and for few, and helps where strong directions say nothing."""

import numpy as np
import pytest

import whitening


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


def textbook(features, queries, degree):
    """Principal components of the covariance, divided by powers of their standard deviation, in float64."""
    variances, axes = np.linalg.eigh(np.cov(features.T, bias=True))
    rank = min(features.shape)
    floor = whitening.FLOOR * variances.sum() / rank
    scales = (np.maximum(variances, 0) + floor) ** (-degree / 2)
    components = [(x - features.mean(0)) @ axes * scales for x in (features, queries)]
    return components[1] / np.sqrt((components[0] ** 2).sum(axis=1).mean() / rank)


def half_white(features):
    return whitening.principal_components(features).whitened(features)


def angles(components):
    unit = components / np.linalg.norm(components, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("degree", [0.0, whitening.HALF, whitening.FULL])
def test_many_features_are_whitened_as_by_the_textbook(numbers, degree):
    features, queries = (numbers.normal(size=[n, 7]) @ numbers.normal(size=[7, 7]) + 3 for n in (200, 30))
    found = whitening.principal_components(features).whitened(queries, degree)
    expected = textbook(features, queries, degree)
    assert found.shape == (30, 7) and found.dtype == np.float32
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-4)  # an axis may point both ways
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)


@pytest.mark.parametrize("degree", [0.0, whitening.HALF, whitening.FULL])
def test_fewer_features_than_dimensions_keep_what_lies_in_their_span(numbers, degree):
    features = numbers.normal(size=[12, 40]) * np.linspace(0.1, 2, 40) + 1
    components = whitening.principal_components(features).whitened(features, degree)
    assert components.shape == (12, 12)
    expected = textbook(features, features, degree)  # [12, 40]: in other directions nothing varies
    np.testing.assert_allclose(components @ components.T, expected @ expected.T, atol=2e-3)
    assert np.mean(np.sum(components.astype(np.float64) ** 2, axis=1)) == pytest.approx(12, rel=1e-3)


def test_axes_are_orthonormal_but_for_the_direction_that_centring_empties(numbers):
    components = whitening.principal_components(numbers.normal(size=[12, 40]).astype(np.float32) + 1)
    lengths = np.ones(12)
    lengths[components.variances.argmin()] = 0
    np.testing.assert_allclose(components.axes.T @ components.axes, np.diag(lengths), atol=1e-4)
    assert components.variances.mean() == pytest.approx(1)


def test_strong_directions_no_longer_decide_who_is_near(numbers):
    labels = np.repeat([0, 1], 100)
    telling = 2.0 * labels[:, None] - 1 + 0.2 * numbers.normal(size=[200, 1])
    features = np.concatenate([telling, 10 * numbers.normal(size=[200, 3])], axis=1)

    def right(x):
        similarity = angles(x) - 3 * np.eye(200)
        return np.mean(labels[similarity.argmax(axis=1)] == labels)

    plain, half, full = (
        right(whitening.principal_components(features).whitened(features, degree)) for degree in (0.0, 0.5, 1.0)
    )
    assert plain < half < full
    assert full > 0.95


def test_the_scale_of_features_does_not_matter_and_equal_ones_become_zeros(numbers):
    features = numbers.normal(size=[50, 6])
    of_large = np.abs(half_white(1000 * features))  # an axis may point both ways
    np.testing.assert_allclose(of_large, np.abs(half_white(features)), atol=1e-3)
    np.testing.assert_array_equal(half_white(np.ones([9, 4])), np.zeros([9, 4]))
    np.testing.assert_array_equal(half_white(np.ones([3, 4])), np.zeros([3, 3]))
