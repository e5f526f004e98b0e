"""kNN: the votes are those of a plain loop and of scikit-learn, and a bank keeps within its memory."""

import math

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

import knn
import whitening


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


def vote(features, labels, queries, neighbors, batch=64):
    """The votes of a bank that was filled batch by batch."""
    bank = knn.Bank(len(features), features.shape[1])
    for start in range(0, len(features), batch):
        bank.add(features[start : start + batch], labels[start : start + batch])
    return bank.vote(queries, neighbors)


def looped(bank, labels, queries, neighbors):
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    guesses = []
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        similarity = unit @ query
        votes = np.zeros(labels.max() + 1)
        for i in np.argsort(-similarity)[:neighbors]:
            votes[labels[i]] += math.exp(similarity[i] / 0.07)
        guesses.append(votes.argmax())
    return np.array(guesses)


@pytest.mark.parametrize("neighbors", [1, 7, 20, 10_000])
def test_the_vote_is_that_of_a_loop(numbers, neighbors):
    bank, queries = numbers.normal(size=[150, 6]) + 0.5, numbers.normal(size=[300, 6]) + 0.5
    labels = numbers.integers(0, 4, 150)
    ours = vote(bank.astype(np.float32), labels, queries.astype(np.float32), neighbors)
    np.testing.assert_array_equal(ours, looped(bank, labels, queries, neighbors))


def test_the_vote_is_scikit_learns_with_the_same_weights(numbers):
    centres = numbers.normal(size=[5, 8])
    labels, query_labels = numbers.integers(0, 5, 400), numbers.integers(0, 5, 3000)
    bank = (centres[labels] + numbers.normal(size=[400, 8])).astype(np.float32)
    queries = (centres[query_labels] + numbers.normal(size=[3000, 8])).astype(np.float32)

    def weights(distances):
        return np.exp((1 - distances) / 0.07)

    theirs = KNeighborsClassifier(20, weights=weights, metric="cosine").fit(bank, labels).predict(queries)
    ours = vote(bank, labels, queries, 20)
    assert (ours == theirs).mean() > 0.999  # but for ties within rounding
    assert 0.5 < (ours == query_labels).mean() < 1.0


def test_a_feature_of_zeros_gets_a_label():
    guess = vote(np.eye(3, dtype=np.float32), np.array([0, 1, 2]), np.zeros([1, 3], np.float32), 2)
    assert guess.shape == (1,)


def test_no_queries_get_no_labels():
    assert vote(np.eye(3), np.arange(3), np.zeros([0, 3]), 2).shape == (0,)


def test_a_bank_that_is_empty_or_too_small_says_so():
    bank = knn.Bank(size=2, dim=3)
    with pytest.raises(ValueError, match="no feature in the bank"):
        bank.vote(np.eye(3), 1)
    with pytest.raises(ValueError, match="3 features do not fit into a bank of 2"):
        bank.add(np.eye(3), np.arange(3))


@pytest.mark.parametrize(("dim", "features"), [(64, 100_000), (2048, 65_536), (10_240, 13_107), (10**9, 1)])
def test_the_capacity_is_bounded_in_features_and_in_bytes(dim, features):
    assert knn.capacity(dim) == features


def left_out(features, labels, neighbors):
    """How many labels the loop gets right when each feature is answered by all the others."""
    right = 0
    for i in range(len(features)):
        others = np.arange(len(features)) != i
        right += looped(features[others], labels[others], features[i : i + 1], neighbors)[0] == labels[i]
    return right


def forms_of(features):
    """The features in the form of each degree, at length 1, and what makes another feature one of them."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    components = whitening.principal_components(unit)
    changes = {0.0: lambda x: x, 0.5: components.whitened, 1.0: lambda x: components.whitened(x, 1.0)}
    return {degree: change(unit) for degree, change in changes.items()}, changes


def test_the_chosen_vote_is_the_best_of_a_loop_that_leaves_one_out(numbers):
    labels = numbers.integers(0, 3, 90)
    features = numbers.normal(size=[90, 8]) + 2 * np.eye(8)[labels]
    bank = knn.Bank(90, 8)
    bank.add(features, labels)
    chosen = bank.choose()
    forms, changes = forms_of(features)
    hits = {(degree, k): left_out(forms[degree], labels, k) for degree in forms for k in knn.CHOICES}
    assert hits[bank.degree, chosen] == max(hits.values()) > max(hits[degree, 1] for degree in forms)
    queries = numbers.normal(size=[50, 8]) + 0.5
    asked = changes[bank.degree](queries / np.linalg.norm(queries, axis=1, keepdims=True))
    np.testing.assert_array_equal(bank.vote(queries, chosen), looped(forms[bank.degree], labels, asked, chosen))


def test_a_bank_whitens_features_whose_strong_directions_say_nothing(numbers):
    labels = numbers.integers(0, 2, 200)
    telling = 2.0 * labels[:, None] - 1 + 0.2 * numbers.normal(size=[200, 1])
    features = np.concatenate([telling, 10 * numbers.normal(size=[200, 3])], axis=1)
    bank = knn.Bank(200, 4)
    bank.add(features[:150], labels[:150])
    plain = (bank.vote(features[150:], 5) == labels[150:]).mean()
    neighbors = bank.choose()
    assert bank.degree > 0
    assert (bank.vote(features[150:], neighbors) == labels[150:]).mean() > plain + 0.1


def test_a_bank_leaves_features_as_they_are_where_whitening_them_adds_noise(numbers):
    labels = numbers.integers(0, 2, 200)
    noise = 0.1 * numbers.normal(size=[200, 40])
    features = np.concatenate([np.stack([labels, 1 - labels], 1) + 0.3 * numbers.normal(size=[200, 2]), noise], 1)
    bank = knn.Bank(200, 42)
    bank.add(features, labels)
    chosen = bank.choose()
    assert bank.degree == 0
    np.testing.assert_array_equal(bank.vote(features, chosen), vote(features, labels, features, chosen))


def test_one_feature_alone_votes_alone():
    bank = knn.Bank(1, 2)
    bank.add(np.ones([1, 2]), np.array([3]))
    assert bank.vote(np.ones([1, 2]), bank.choose()) == [3]
