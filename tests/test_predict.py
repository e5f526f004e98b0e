"""Prediction: each example counts once; a draw depends neither on the batch size nor on replicas and workers."""

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf
import tiny

import augment
import config
import data
import predict
import sources


def answers_of(source, settings, strategy, *which, **more):
    """What `predict` makes of the images themselves, all batches end to end."""
    batches = list(predict.predict(lambda x: {"image": x}, source, settings, strategy, *which, **more))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("batch", [3, 100, 360, 1000])
def test_prediction_counts_each_example_once_for_any_batch_size(batch):
    source = sources.load("digits", "test")
    settings = config.Config(image_size=8, eval_batch_size=batch)
    answers = answers_of(source, settings, tf.distribute.get_strategy())
    np.testing.assert_allclose(answers["image"] * 255, source.records, atol=1e-3)
    np.testing.assert_array_equal(answers["label"], source.labels)
    assert set(answers) == {"image", "label"}


@pytest.mark.parametrize("replicas", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_prediction_over_several_replicas_counts_each_example_once(mirrored, replicas):
    source = sources.load("digits", "test[:50]")
    settings = config.Config(image_size=8, eval_batch_size=16)
    answers = answers_of(source, settings, mirrored(replicas))
    np.testing.assert_allclose(answers["image"] * 255, source.records, atol=1e-3)
    np.testing.assert_array_equal(answers["label"], source.labels)


# Draws: of --eval_steps and of the kNN bank


def sorted_by_class(sizes):
    """A source whose classes, of these sizes, come one after the other; image i is filled with the value i."""
    source = tiny.numbered(sum(sizes), len(sizes))
    return dataclasses.replace(source, labels=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32))


def drawn(source, limit, batch=8, strategy=None, labelled_only=False):
    """The numbers of the images drawn, and their labels."""
    settings = config.Config(image_size=8, eval_batch_size=batch)
    strategy = strategy or tf.distribute.get_strategy()
    answers = answers_of(source, settings, strategy, limit, labelled_only)
    return (answers["image"][:, 0, 0, 0] * 255).round().astype(int).tolist(), answers["label"].tolist()


def test_a_draw_takes_its_examples_from_every_part_of_the_split():
    images, labels = drawn(sorted_by_class([100, 100]), 40)
    assert len(set(images)) == 40 and images != sorted(images)
    assert 10 <= sum(labels) <= 30
    assert [image // 100 for image in images] == labels


@pytest.mark.parametrize("limit", [0, 200, 1000])
def test_without_a_draw_the_order_is_that_of_the_split(limit):
    assert drawn(sorted_by_class([100, 100]), limit)[0] == list(range(200))


@pytest.mark.parametrize(("limit", "counts"), [(30, [10, 10, 10]), (100, [34, 34, 5]), (130, [44, 44, 5])])
def test_a_balanced_draw_takes_as_many_of_each_class_as_it_has_up_to_its_share(limit, counts):
    images, labels = drawn(sorted_by_class([100, 50, 5] if limit > 30 else [100, 50, 20]), limit, labelled_only=True)
    assert np.bincount(labels).tolist() == counts and len(set(images)) == sum(counts)


def test_a_balanced_draw_is_never_more_than_its_limit():
    _, labels = drawn(sorted_by_class([50, 50, 50]), 31, labelled_only=True)
    assert len(labels) == 31 and max(np.bincount(labels)) == 11


def test_a_balanced_draw_leaves_out_what_has_no_label_and_nothing_else_where_all_fits():
    labels = np.repeat([0, 1], [30, 10]).astype(np.int32)
    labels[::2] = -1
    source = dataclasses.replace(sorted_by_class([30, 10]), labels=labels)
    assert drawn(source, 40, labelled_only=True)[0] == list(range(1, 40, 2))
    assert sorted(drawn(source, 39, labelled_only=True)[0]) == list(range(1, 40, 2))


def test_a_balanced_draw_from_examples_without_a_label_is_empty():
    source = dataclasses.replace(sorted_by_class([30, 10]), labels=np.full(40, -1, np.int32))
    for limit in (9, 40):
        assert not list(data.eval_stream(source, tiny.as_is, 8, limit=limit, labelled_only=True))


@pytest.mark.parametrize("labelled_only", [False, True])
def test_a_draw_depends_neither_on_the_batch_size_nor_on_replicas(mirrored, labelled_only):
    source = sorted_by_class([100, 60, 40])
    one = drawn(source, 50, batch=8, labelled_only=labelled_only)
    assert drawn(source, 50, batch=64, labelled_only=labelled_only) == one
    assert drawn(source, 50, batch=12, strategy=mirrored(2), labelled_only=labelled_only) == one


@pytest.mark.parametrize("labelled_only", [False, True])
def test_the_workers_of_a_draw_share_it_out(labelled_only):
    source = sorted_by_class([100, 60, 40])
    shares = []
    for worker in range(2):
        context = tf.distribute.InputContext(2, worker, 2)
        stream = data.eval_stream(source, tiny.as_is, 8, context, limit=50, labelled_only=labelled_only)
        shares.append(list(stream.as_numpy_iterator()))
    assert len(shares[0]) == len(shares[1])
    batches = [batch for pair in zip(*shares, strict=True) for batch in pair]
    images, mask = (np.concatenate([batch[key] for batch in batches]) for key in ("image", "mask"))
    assert images[mask > 0][:, 0, 0, 0].astype(int).tolist() == drawn(source, 50, labelled_only=labelled_only)[0]


# Outputs that are not finite


def test_the_examples_that_are_not_finite_are_counted_over_all_batches():
    labels = np.zeros(3, np.int32)
    good, bad = np.zeros([3, 2]), np.array([[0, 0], [math.nan, 0], [math.inf, math.inf]])
    batches = [{"logits": logits, "label": labels} for logits in (good, bad, good, bad)]
    passed = []
    with pytest.raises(FloatingPointError, match="the logits of 4 of 12 examples are not finite at step 7"):
        passed.extend(predict.only_finite(iter(batches), 7))
    assert list(predict.only_finite(iter(batches[:1]), 7)) == batches[:1]


def test_a_predictor_passes_over_its_examples_again_and_sees_the_weights_of_now():
    source, weight = tiny.numbered(20), tf.Variable(1.0)
    predictor = predict.Predictor(
        lambda images: {"h": images[:, 0, 0] * weight}, source, lambda image: augment.center_crop(image, 8), 8,
        tf.distribute.get_strategy(),
    )  # fmt: skip
    passes = []
    for value in (1.0, 2.0):
        weight.assign(value)
        passes.append(np.concatenate([batch["h"][:, 0] for batch in predictor.batches()]))
    np.testing.assert_allclose(passes[0] * 255, range(20), atol=1e-3)
    np.testing.assert_allclose(passes[1], 2 * passes[0])
