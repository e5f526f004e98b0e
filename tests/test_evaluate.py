"""Evaluation: accuracy, loss and kNN are those of plain loops, and each example counts once."""

import json
import math

import numpy as np
import pytest
import tensorflow as tf
import tiny
from sklearn.neighbors import KNeighborsClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
import evaluate
import sources
from errors import UserError


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


def looped_accuracy(logits, labels, k):
    """Share of examples with fewer than k classes ahead of their own."""
    hits = [sum(value > row[label] for value in row) < k for row, label in zip(logits, labels, strict=True)]
    return sum(hits) / len(hits)


def looped_loss(logits, labels):
    rows = zip(logits.astype(np.float64), labels, strict=True)
    return np.mean([math.log(sum(math.exp(value - row[label]) for value in row)) for row, label in rows])


@pytest.mark.parametrize("classes", [3, 10, 40])
def test_accuracy_and_loss_are_those_of_a_loop(numbers, classes):
    logits = numbers.normal(size=[200, classes]).astype(np.float32) * 3
    labels = numbers.integers(0, classes, 200)
    result = evaluate.accuracy(logits, labels)
    assert result["top_1"] == looped_accuracy(logits, labels, 1)
    assert result["top_5"] == looped_accuracy(logits, labels, 5)
    assert result["loss"] == pytest.approx(looped_loss(logits, labels), rel=1e-6)
    assert list(result) == ["top_1", "top_5", "loss"]


def test_with_at_most_five_classes_the_label_is_always_among_the_first_five(numbers):
    assert evaluate.accuracy(numbers.normal(size=[50, 5]), numbers.integers(0, 5, 50))["top_5"] == 1.0


def test_tied_logits_score_as_if_drawn_by_lot():
    constant = evaluate.accuracy(np.zeros([10, 10], np.float32), np.arange(10))
    assert constant["top_1"] == pytest.approx(0.1)
    assert constant["top_5"] == pytest.approx(0.5)
    assert constant["loss"] == pytest.approx(math.log(10))
    pair_ahead = np.array([[2.0, 2.0, 1.0, 0.0]] * 3)
    assert evaluate.accuracy(pair_ahead, np.array([0, 1, 2]))["top_1"] == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    result = evaluate.accuracy(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32), np.array([0, 0]))
    assert result["loss"] == pytest.approx(5000.0)
    assert result["top_1"] == 0.5


def looped_knn(bank, labels, queries, neighbors):
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
def test_knn_is_that_of_a_loop(numbers, neighbors):
    bank, queries = numbers.normal(size=[150, 6]) + 0.5, numbers.normal(size=[80, 6]) + 0.5
    labels = numbers.integers(0, 4, 150)
    ours = evaluate.knn(bank.astype(np.float32), labels, queries.astype(np.float32), neighbors)
    np.testing.assert_array_equal(ours, looped_knn(bank, labels, queries, neighbors))


def test_knn_is_scikit_learns_with_the_same_weights(numbers):
    centres = numbers.normal(size=[5, 8])
    labels, query_labels = numbers.integers(0, 5, 400), numbers.integers(0, 5, 3000)
    bank = (centres[labels] + numbers.normal(size=[400, 8])).astype(np.float32)
    queries = (centres[query_labels] + numbers.normal(size=[3000, 8])).astype(np.float32)

    def weights(distances):
        return np.exp((1 - distances) / 0.07)

    theirs = KNeighborsClassifier(20, weights=weights, metric="cosine").fit(bank, labels).predict(queries)
    ours = evaluate.knn(bank, labels, queries, 20)
    assert (ours == theirs).mean() > 0.999  # but for ties within rounding
    assert 0.5 < (ours == query_labels).mean() < 1.0


def test_knn_of_a_zero_feature_is_a_number():
    guess = evaluate.knn(np.eye(3, dtype=np.float32), np.array([0, 1, 2]), np.zeros([1, 3], np.float32), 2)
    assert guess.shape == (1,)


@pytest.mark.parametrize("batch", [3, 100, 360, 1000])
def test_prediction_counts_each_example_once_for_any_batch_size(batch):
    source = sources.load("digits", "test")
    settings = config.Config(image_size=8, eval_batch_size=batch)
    strategy = tf.distribute.get_strategy()
    answers = evaluate.collect(evaluate.predict(lambda x: {"image": x}, source, settings, strategy, 360))
    np.testing.assert_allclose(answers["image"] * 255, source.records, atol=1e-3)
    np.testing.assert_array_equal(answers["label"], source.labels)
    assert set(answers) == {"image", "label"}


@pytest.mark.parametrize("replicas", [2, 4])
def test_prediction_over_several_replicas_counts_each_example_once(mirrored, replicas):
    source = sources.load("digits", "test[:50]")
    settings = config.Config(image_size=8, eval_batch_size=16)
    answers = evaluate.collect(evaluate.predict(lambda x: {"image": x}, source, settings, mirrored(replicas), 50))
    np.testing.assert_allclose(answers["image"] * 255, source.records, atol=1e-3)
    np.testing.assert_array_equal(answers["label"], source.labels)


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    """The config with which to evaluate the pretrained run, results elsewhere."""
    return tiny.borrow(tiny.pretrained(tmp_path_factory), tmp_path / "run")


def evaluated(run, **given):
    settings = tiny.resolve(model_dir=run, mode="eval", **given)
    return evaluate.evaluate(settings, tf.distribute.get_strategy())


def test_the_result_does_not_depend_on_the_batch_size(run):
    results = [evaluated(run, eval_batch_size=batch) for batch in (7, 360)]
    for name in ("top_1", "top_5", "loss", "knn_top_1", "examples", "step"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5), name
    assert results[0]["examples"] == 360 and results[0]["step"] == 3


def test_results_are_written_as_files_and_scalars(run):
    result = evaluated(run, eval_name="again")
    for name in ("result_again.json", "result_again_3.json"):
        with open(f"{run}/{name}") as file:
            assert json.load(file) == result
    assert set(result) == {"step", "examples", "top_1", "top_5", "loss", "knn_top_1", "seconds"}
    events = EventAccumulator(f"{run}/eval_again")
    events.Reload()
    (top_1,) = events.Tensors("eval/top_1")
    assert top_1.step == 3
    assert tf.make_ndarray(top_1.tensor_proto) == pytest.approx(result["top_1"])


def test_eval_steps_limit_the_examples(run):
    assert evaluated(run, eval_batch_size=50, eval_steps=3)["examples"] == 150
    assert evaluated(run, eval_batch_size=50, eval_steps=100)["examples"] == 360


def test_knn_can_be_left_out(run):
    assert "knn_top_1" not in evaluated(run, knn_neighbors=0)


def test_another_split_is_evaluated_where_asked_for(run):
    assert evaluated(run, eval_split="train[:10%]", knn_neighbors=0)["examples"] == 144


def test_data_of_other_classes_is_refused(run, tmp_path):
    tiny.digit_images(tmp_path / "images" / "test", 2)
    given = dict(dataset="image_folder", data_dir=str(tmp_path / "images"), eval_split="test")
    with pytest.raises(UserError, match="split test has the classes digit 0, digit 1, digit 2"):
        evaluated(run, **given)
