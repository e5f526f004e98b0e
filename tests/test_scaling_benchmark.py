"""The benchmark of scaling counts bytes and differences as it says."""

import keras
import numpy as np
import pytest
import scaling
import tensorflow as tf

import architecture
import resnet
import tasks


def test_differences_are_relative_to_the_largest_value_of_their_kind():
    reference = {"loss": np.array([1.0, -4.0]), "weights": np.array([0.5])}
    state = {"loss": np.array([1.1, -4.0]), "weights": np.array([0.5])}
    assert scaling.differences(state, reference) == {"loss": pytest.approx(0.025), "weights": 0.0}


def test_what_a_process_says_is_found_among_other_lines():
    assert scaling.said_as_json('W0000 a warning\n{"clock": 1.5}\n\nE0000 closed\n') == {"clock": 1.5}


def test_every_replica_can_have_its_share_of_the_batch():
    assert all(scaling.BATCH % replicas == 0 for replicas in (2, 3, 4))
    np.testing.assert_array_equal(scaling.batch_of(3)["view_1"], scaling.batch_of(3)["view_1"])
    assert (scaling.batch_of(0)["label"] == -1).sum() == scaling.BATCH // 3


def test_each_kind_of_data_is_given_to_one_process_first_and_to_several():
    seen = set()
    for data, workers, servers in scaling.COMMANDS:
        assert (workers, servers) == (1, 0) or data in seen
        seen.add(data)
    assert max(workers for _, workers, _ in scaling.COMMANDS) == 3 and len(seen) == 3


def test_the_networks_that_are_compared_have_no_edge(monkeypatch):
    monkeypatch.setattr(keras.layers, "ReLU", keras.layers.ReLU)
    monkeypatch.setitem(architecture.BLOCKS, 10, architecture.BLOCKS[10])
    scaling.make_networks_smooth_and_short()
    layers = tasks.network(scaling.config_of("supervised"), 3).encoder.layers
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds.count("Activation") == 3 and "ReLU" not in kinds


def test_every_part_stands_in_the_help_and_in_the_page():
    page = (scaling.ROOT / "docs" / "scaling.md").read_text()
    for part in scaling.PARTS:
        assert f"--only={part}" in scaling.__doc__ and f"--only={part}" in page


@pytest.mark.parametrize(("layer", "numbers"), [(resnet.BatchNorm, 4), (keras.layers.BatchNormalization, 5)])
def test_the_numbers_that_batch_norm_adds_up_over_the_replicas_are_counted(mirrored, monkeypatch, layer, numbers):
    """Those of Keras are sum, sum of squares and count of each channel, and a gradient to the first two of them."""
    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", tf.distribute.ReplicaContext.all_reduce)
    added = scaling.numbers_added_up()
    strategy = mirrored(2)
    with strategy.scope():
        norm = layer(synchronized=True)
        norm.build([None, 2, 2, 5])

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.square(norm(x, training=True)))
        return tape.gradient(loss, x)

    x = tf.random.normal([3, 2, 2, 5])
    tf.function(lambda: strategy.run(gradient, (x,)), autograph=False).get_concrete_function()
    assert sum(added) == 2 * numbers * 5  # by both replicas
