"""Batch norm folded into the layers before it: the same function of the weights as they are, in every precision."""

import keras
import pytest
import tensorflow as tf
from helpers import randomize
from parity import error

import folding
import model as model_lib
import resnet


def network(precision="float32"):
    """A small network of every kind of block that has batch norm, no weight at a special value."""
    keras.utils.set_random_seed(0)
    encoder = resnet.resnet(14, 0.0625, sk_ratio=0.0625, se_ratio=0.1, precision=precision)
    head = model_lib.projection_head(encoder.output["final_avg_pool"].shape[-1], out_dim=8, precision=precision)
    model = model_lib.Model(encoder, head, 3, ft_proj_selector=1)
    randomize(model.variables)
    return model


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1), ("float16", 0.02)])
def test_the_folded_network_follows_the_weights(precision, tolerance):
    model, images = network(precision), tf.random.stateless_uniform([2, 33, 33, 3], [0, 0])
    inference = tf.function(model.inference(), autograph=False)
    for seed in (0, 1):  # The second time, the compiled function finds other weights.
        randomize(model.variables, seed)
        folded, whole = inference(images), model(images, training=False)
        for ours, expected in zip((*folded.hiddens, folded.logits), (*whole.hiddens, whole.logits), strict=True):
            assert ours.dtype == tf.float32
            assert error(ours, expected) < tolerance


def test_what_cannot_be_folded_is_refused():
    x = inputs = keras.Input((8,))
    x = keras.layers.ReLU()(keras.layers.Dense(8, use_bias=False)(x))
    odd = keras.Model(inputs, keras.layers.BatchNormalization(name="odd_bn")(x))
    with pytest.raises(ValueError, match="odd_bn does not stand behind"):
        folding.folded(odd)


def test_the_folded_network_owns_no_weights():
    model = network()
    before = [id(variable) for variable in model.variables]
    model.inference()
    assert [id(variable) for variable in model.variables] == before
    names = [layer.name for layer in folding.folded(model.head).layers]
    assert not [name for name in names if name.endswith("_bn")]
    assert len(model.named_weights()["head"]) == 6
