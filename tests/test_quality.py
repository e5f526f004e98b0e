"""The quality of features: the formulas of the papers by plain loops, and what each number says at its extremes."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import knn
import quality
import whitening


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_alignment_is_the_mean_squared_distance_of_the_pairs(numbers):
    z1, z2 = numbers.normal(size=[7, 3]), numbers.normal(size=[7, 3])
    distances = []
    for one, two in zip(unit(z1), unit(z2), strict=True):
        distances.append(sum((a - b) ** 2 for a, b in zip(one, two, strict=True)))
    assert quality.alignment(z1, z2) == pytest.approx(np.mean(distances))
    assert quality.alignment(z1, 5 * z1) == pytest.approx(0)
    assert quality.alignment(z1, -z1) == pytest.approx(4)


def test_uniformity_is_the_log_of_the_mean_over_pairs(numbers):
    z = numbers.normal(size=[9, 4])
    rows = unit(z)
    pairs = [math.exp(-2 * np.sum((rows[i] - rows[j]) ** 2)) for i in range(9) for j in range(i)]
    assert quality.uniformity(z) == pytest.approx(math.log(np.mean(pairs)))
    assert quality.uniformity(np.ones([5, 4])) == pytest.approx(0)
    with pytest.raises(ValueError, match="pairs"):
        quality.uniformity(z[:1])


def test_spread_is_one_for_all_directions_and_zero_after_collapse(numbers):
    assert quality.spread(numbers.normal(size=[2000, 32])) == pytest.approx(1, abs=0.01)
    assert quality.spread(np.ones([50, 1]) * numbers.normal(size=[1, 32])) == pytest.approx(0, abs=1e-9)
    assert quality.spread(np.zeros([5, 8])) == 0


def test_the_effective_rank_counts_dimensions(numbers):
    assert quality.effective_rank(np.eye(6)) == pytest.approx(6)
    assert quality.effective_rank(np.ones([20, 8])) == pytest.approx(1, abs=1e-6)
    two = numbers.normal(size=[40, 2]) @ numbers.normal(size=[2, 8])
    assert 1 < quality.effective_rank(two) <= 2 + 1e-6
    assert np.isfinite(quality.effective_rank(np.zeros([4, 3])))
    shares = np.array([3.0, 1.0]) / 4
    assert quality.effective_rank(np.diag([3.0, 1.0])) == pytest.approx(math.exp(-np.sum(shares * np.log(shares))))


def test_knn_predictions_are_the_vote_of_a_bank_of_half_whitened_features(numbers):
    features, queries = numbers.normal(size=[60, 5]) * [1, 1, 1, 9, 9], numbers.normal(size=[20, 5])
    labels = numbers.integers(0, 3, 60)
    half_white = whitening.principal_components(unit(features)).whitened
    bank = knn.Bank(60, 5)
    bank.add(half_white(unit(features)), labels)
    guesses = bank.vote(half_white(unit(queries)), 7)
    np.testing.assert_array_equal(quality.knn_predictions(features, labels, queries, 7), guesses)


def test_the_best_of_raw_pixels_is_taken_over_neighbours_centring_and_whitening():
    # A bright and a dark image of each class: the angle between them tells them apart only after centring.
    bank = np.array([[200, 210], [210, 200], [201, 211], [212, 202]], np.uint8).reshape(4, 1, 2)
    labels = np.array([0, 1, 0, 1])
    assert quality.best_pixel_knn(bank, labels, bank + 1, labels, ks=(1,)) == 1
    digits = load_digits()
    pixels, classes = digits.images.astype(np.float32).reshape(-1, 64), digits.target
    bank, queries = pixels[:300], pixels[300:700]
    components = whitening.principal_components(bank)
    accuracies = []
    for change in (
        lambda x: x, lambda x: x - bank.mean(0), components.whitened, lambda x: components.whitened(x, 1.0)
    ):  # fmt: skip
        for neighbors in (1, 5, 20):
            filled = knn.Bank(300, 64)
            filled.add(change(bank), classes[:300])
            accuracies.append(np.mean(filled.vote(change(queries), neighbors) == classes[300:700]))
    found = quality.best_pixel_knn(bank.reshape(-1, 8, 8), classes[:300], queries.reshape(-1, 8, 8), classes[300:700])
    assert found == max(accuracies) > min(accuracies)
    plain = KNeighborsClassifier(1, metric="cosine").fit(bank, classes[:300])
    assert found >= plain.score(queries, classes[300:700])


def test_images_of_bytes_do_not_wrap_around():
    bank = np.array([[0, 250], [250, 0]], np.uint8)
    labels = np.array([0, 1])
    assert quality.best_pixel_knn(bank, labels, np.array([[10, 255]], np.uint8), labels[:1]) == 1


@pytest.mark.parametrize("per_class", [1, 100])
def test_the_linear_classifier_suits_one_label_a_class_as_well_as_many(numbers, per_class):
    classes = np.array([3, 8, 9])
    means = numbers.normal(size=[3, 64]) * 2
    labels, truth = np.repeat(classes, per_class), np.repeat(classes, 50)
    features = np.repeat(means, per_class, 0) + numbers.normal(size=[3 * per_class, 64])
    queries = np.repeat(means, 50, 0) + numbers.normal(size=[150, 64])
    guesses = quality.linear_predictions(features, labels, queries)
    assert guesses.shape == (150,)
    assert np.mean(guesses == truth) > 0.95


def test_the_linear_classifier_is_logistic_regression_on_half_whitened_features(numbers):
    features, queries = numbers.normal(size=[60, 8]) * np.arange(1, 9) + 2, numbers.normal(size=[30, 8]) + 2
    for labels in (numbers.integers(0, 2, 60), 3 * numbers.integers(0, 4, 60)):
        classifier = quality.linear_classifier(features, labels)
        assert classifier.kernel.shape == (8, len(classifier.classes)) and classifier.kernel.dtype == np.float32
        half_white = whitening.principal_components(features).whitened
        theirs = LogisticRegression(C=quality.INVERSE_PENALTY, max_iter=200).fit(half_white(features), labels)
        probabilities = softmax(classifier.logits(queries), axis=1)
        np.testing.assert_allclose(probabilities, theirs.predict_proba(half_white(queries)), atol=1e-4)
        np.testing.assert_array_equal(classifier.classes, theirs.classes_)


def test_the_linear_classifier_says_how_probable_it_takes_a_label_to_be(numbers):
    features, queries = numbers.normal(size=[40, 8]), numbers.normal(size=[10, 8])
    labels = np.repeat([3, 5, 9], [14, 13, 13])
    logs = [quality.linear_log_probabilities(features, labels, queries, np.full(10, label)) for label in (3, 5, 9)]
    np.testing.assert_allclose(np.exp(logs).sum(axis=0), 1.0, rtol=1e-5)
    guesses = np.array([3, 5, 9])[np.argmax(logs, axis=0)]
    np.testing.assert_array_equal(guesses, quality.linear_predictions(features, labels, queries))


def test_no_label_is_impossible(numbers):
    features = np.repeat([[1.0, 0.1], [1.0, -0.1]], 500, axis=0) + 0.001 * numbers.normal(size=[1000, 2])
    labels = np.repeat([0, 1], 500)
    far = np.array([[-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    logs = [quality.linear_log_probabilities(features, labels, far, np.full(3, label)) for label in (0, 1)]
    np.testing.assert_allclose(np.min(logs), math.log(1e-6), rtol=1e-5)


def test_the_linear_classifier_does_not_depend_on_the_scale_of_features(numbers):
    features, queries = numbers.normal(size=[40, 6]), numbers.normal(size=[30, 6])
    labels = numbers.integers(0, 2, 40)
    guesses = quality.linear_predictions(features, labels, queries)
    np.testing.assert_array_equal(guesses, quality.linear_predictions(1000 * features, labels, 1000 * queries))
    with pytest.raises(ValueError, match="class"):
        quality.linear_predictions(features, np.zeros(40), queries)
