"""Calibration: the error is that of a loop, and a known temperature is found again."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tiny
from scipy.special import softmax

import calibration
import evaluate
import predict
import subject
import tasks

ONE_STAGE = True  # see conftest.py


def made_up(count, temperature, classes=5, seed=0):
    """Logits that are `temperature` times those by whose probabilities the labels were drawn."""
    random = np.random.default_rng(seed)
    logits = 2.0 * random.standard_normal([count, classes])
    cumulative = softmax(logits, axis=1).cumsum(axis=1)
    labels = (random.random([count, 1]) > cumulative).sum(axis=1)
    return (temperature * logits).astype(np.float32), np.minimum(labels, classes - 1)


def error_by_loop(probabilities, labels, bins):
    total = 0.0
    for m in range(bins):
        confidences, hits = [], []
        for row, label in zip(probabilities, labels, strict=True):
            confidence = max(row)
            if m / bins < confidence <= (m + 1) / bins:
                confidences.append(confidence)
                hits.append(int(np.argmax(row)) == label)
        if hits:
            total += len(hits) / len(labels) * abs(np.mean(hits) - np.mean(confidences))
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_error_is_that_of_a_loop(bins):
    logits, labels = made_up(200, 2.5)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    expected = error_by_loop(probabilities, labels, bins)
    assert expected > 0.02 and calibration.expected_error(probabilities, labels, bins) == pytest.approx(expected)


def test_the_error_at_the_edges_of_the_bins():
    probabilities, labels = np.array([[0.8, 0.2]] * 10), np.array([0] * 6 + [1] * 4)
    assert calibration.expected_error(probabilities, labels) == pytest.approx(0.2)
    assert calibration.expected_error(np.eye(3), np.arange(3)) == 0
    assert calibration.expected_error(np.eye(3), np.array([1, 2, 0])) == 1


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found_again(temperature):
    logits, labels = made_up(20_000, temperature)
    found = calibration.calibrate(logits, labels)
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    assert found.error_after < 0.015 and found.labels == 20_000
    if temperature != 1.0:
        assert found.error > 0.05


def test_the_temperature_has_the_least_cross_entropy_of_all():
    logits, labels = made_up(150, 2.0)
    grid = np.exp(np.linspace(-2, 2, 4001))
    losses = [-np.log(softmax(logits / t, axis=1)[np.arange(150), labels]).mean() for t in grid]
    assert calibration.fit_temperature(logits, labels) == pytest.approx(grid[np.argmin(losses)], rel=2e-3)


def test_a_classifier_that_is_never_wrong_gets_a_finite_temperature():
    logits = 10.0 * np.eye(4, dtype=np.float32)[np.arange(200) % 4]
    found = calibration.calibrate(logits, np.arange(200) % 4)
    assert 0 < found.temperature < 1 and found.error_after < 1e-3


def test_the_error_after_is_measured_on_labels_that_the_temperature_has_not_seen():
    """The two halves have temperatures of their own: fitted on the other half, each gets the wrong one."""
    logits, labels = made_up(4000, 1.0)
    logits[::2] *= 4.0
    found = calibration.calibrate(logits, labels)
    swapped = logits.copy()
    swapped[::2] /= calibration.fit_temperature(logits[1::2], labels[1::2])
    swapped[1::2] /= calibration.fit_temperature(logits[::2], labels[::2])
    expected = calibration.expected_error(softmax(swapped.astype(np.float64), axis=1), labels)
    assert found.error_after == pytest.approx(expected, abs=1e-6) and expected > 0.15


def test_too_few_labels_give_nothing():
    logits, labels = made_up(calibration.LEAST_LABELS, 2.0)
    assert calibration.calibrate(logits, labels)
    assert calibration.calibrate(logits[1:], labels[1:]) is None


def test_a_sample_is_a_draw_that_does_not_depend_on_the_batches(monkeypatch):
    monkeypatch.setattr(calibration, "MAX_NUMBERS", 200)
    logits = np.arange(2000, dtype=np.float32).reshape(1000, 2)
    drawn = []
    for batch in (7, 1000):
        sample = calibration.Sample(classes=2)
        for start in range(0, 1000, batch):
            sample.add(logits[start : start + batch], np.arange(start, min(start + batch, 1000)))
        drawn.append(sample.drawn())
    (logits_7, labels_7), (logits_1000, labels_1000) = drawn
    np.testing.assert_array_equal(labels_7, labels_1000)
    np.testing.assert_array_equal(logits_7[:, 0], 2 * labels_7)
    np.testing.assert_array_equal(logits_7, logits_1000)
    assert len(set(labels_7)) == 100 and 350 < labels_7.mean() < 650 and sorted(labels_7) != labels_7.tolist()


# In the evaluation of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was trained on half of the training digits."""
    model_dir = str(tmp_path_factory.mktemp("calibration") / "run")
    return tiny.train_run(
        **tiny.NETWORK, **tiny.QUICK, train_mode="supervised", train_steps=8, model_dir=model_dir,
        train_split="train[:50%]",
    ).config.model_dir  # fmt: skip


def opened(run, **given):
    """The config of an evaluation of the run, its source and its weights."""
    decided = subject.decide(dict(model_dir=run, mode="eval", **given))
    weights = decided.open()
    return decided.config, evaluate.load_eval_source(decided.config, weights), weights


def test_the_result_has_the_temperature_of_the_logits(run):
    config, source, weights = opened(run, eval_batch_size=50)
    strategy = tf.distribute.get_strategy()
    result = evaluate.evaluate(config, strategy, weights, of_run=True)
    model = tasks.restore_network(weights)
    sample = calibration.Sample(10)
    for batch in predict.predict(lambda x: {"logits": model(x).logits}, source, config, strategy):
        sample.add(batch["logits"], batch["label"])
    expected = calibration.as_result(calibration.calibrate(*sample.drawn()))
    assert expected == pytest.approx({name: result[name] for name in expected}, rel=1e-3)
    assert result["calibration_labels"] == 360


def test_a_network_is_not_calibrated_on_images_that_it_was_trained_on(run, monkeypatch):
    def is_held_out(**given):
        config, source, weights = opened(run, **given)
        return evaluate.is_held_out(source, config, weights)

    assert is_held_out() and is_held_out(eval_split="train[50%:]")
    for split in ("train", "train[40%:]", "train[90%:]+test"):
        assert not is_held_out(eval_split=split), split
    config, _, weights = opened(run)
    same_split_of_others = dataclasses.replace(config, dataset="cifar10", eval_split="train")
    assert not evaluate.is_held_out(tiny.numbered(4), same_split_of_others, weights)
    monkeypatch.setattr(evaluate, "is_held_out", lambda *given: False)
    result = evaluate.evaluate(config, tf.distribute.get_strategy(), weights, of_run=True)
    assert "top_1" in result and calibration.TEMPERATURE not in result
