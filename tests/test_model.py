"""The network's heads stand where they should, freezing freezes exactly what it says, and the EMA is its formula."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import randomize
from parity import error

import model as model_lib
import resnet
from model import Model, ema_update, projection_head

DIM = 64  # of h, at depth 10 and an eighth of the width
IMAGES = np.random.default_rng(0).random([4, 16, 16, 3], np.float32)


def make_model(num_classes=3, num_layers=2, keep=None, **options):
    encoder = resnet.resnet(10, 0.125, cifar_stem=True)
    head = projection_head(DIM, num_layers=num_layers, out_dim=8, keep=keep)
    made = Model(encoder, head, num_classes, **options)
    if not options.get("zero_init"):
        randomize(made.variables)
    return made


def gradients(model, output, variables):
    """Of the sum of squares of what `output` picks from the model's outputs."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(output(model(IMAGES, training=True))))
    return tape.gradient(loss, [variable.value for variable in variables])


@pytest.mark.parametrize(
    ("mode", "layers", "keep", "widths"),
    [
        ("nonlinear", 3, None, [DIM, DIM, 8]),
        ("nonlinear", 1, None, [8]),
        ("nonlinear", 3, 1, [DIM]),
        ("nonlinear", 3, 2, [DIM, DIM]),
        ("nonlinear", 3, 3, [DIM, DIM, 8]),
        ("linear", 3, None, [8]),
        ("linear", 3, 1, [8]),
    ],
)
def test_projection_head_widths(mode, layers, keep, widths):
    head = projection_head(DIM, mode, out_dim=8, num_layers=layers, keep=keep)
    outputs = head(np.ones([2, DIM], np.float32))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        f"proj_head_{k}": (2, width) for k, width in enumerate(widths, 1)
    }
    dense = [layer for layer in head.layers if isinstance(layer, keras.layers.Dense)]
    norms = [layer for layer in head.layers if isinstance(layer, resnet.BatchNorm)]
    assert [layer.kernel.shape[-1] for layer in dense] == widths and not any(layer.use_bias for layer in dense)
    whole = len(widths) == (1 if mode == "linear" else layers)
    assert [layer.center for layer in norms] == [True] * (len(widths) - whole) + [False] * whole


@pytest.mark.parametrize(("mode", "keep"), [("none", None), ("nonlinear", 0), ("linear", 0), ("none", 0)])
def test_no_projection_head(mode, keep):
    assert projection_head(DIM, mode, keep=keep) is None


def test_all_but_the_last_layer_end_in_a_relu():
    head = projection_head(DIM, num_layers=3, out_dim=8)
    randomize(head.variables)
    first, second, z = head(np.random.default_rng(0).standard_normal([16, DIM]).astype(np.float32)).values()
    for hidden in (first, second):
        assert np.min(hidden) == 0 and np.max(hidden) > 0
    assert np.min(z) < 0
    dense, norm = head.get_layer("head2_dense"), head.get_layer("head2_bn")
    np.testing.assert_allclose(second, tf.nn.relu(norm(dense(first))), atol=1e-5)


@pytest.mark.parametrize("selector", [0, 1, 2, -1])
def test_outputs(selector):
    model = make_model(ft_proj_selector=selector)
    outputs = model(IMAGES)
    endpoints = model.encoder(IMAGES)
    np.testing.assert_array_equal(outputs.h, endpoints["final_avg_pool"])
    assert list(outputs.endpoints) == list(resnet.ENDPOINTS)
    assert [tuple(hidden.shape) for hidden in outputs.hiddens] == [(4, DIM), (4, DIM), (4, 8)]
    assert outputs.hiddens[0] is outputs.h and outputs.z is outputs.hiddens[-1] and model.output_dim == 8
    for hidden, expected in zip(outputs.hiddens[1:], model.head(outputs.h).values(), strict=True):
        np.testing.assert_array_equal(hidden, expected)
    np.testing.assert_array_equal(outputs.logits, model.supervised_head(outputs.hiddens[selector]))


def test_outputs_without_heads():
    model = Model(resnet.resnet(10, 0.125), None)
    outputs = model(IMAGES)
    assert outputs.logits is None and outputs.z is outputs.h and outputs.hiddens == [outputs.h]
    assert model.supervised_head is None and model.output_dim == DIM


def test_detached_head_sends_no_gradient_into_the_encoder():
    for detached in (False, True):
        model = make_model(detached=detached)
        inner = gradients(model, lambda out: out.logits, model.encoder.trainable_variables)
        assert all((gradient is None) == detached for gradient in inner)
        own = gradients(model, lambda out: out.logits, model.supervised_head.trainable_variables)
        assert all(np.any(gradient) for gradient in own)
        through_z = gradients(model, lambda out: out.z, model.encoder.trainable_variables)
        assert all(gradient is not None for gradient in through_z)


def test_zero_init():
    for zero_init in (True, False):
        head = Model(resnet.resnet(10, 0.125), None, 50, zero_init=zero_init).supervised_head
        assert not np.any(head.bias)
        assert np.std(head.kernel) == (0 if zero_init else pytest.approx(0.01, rel=0.1))


def is_frozen(path, after_block):
    """Whether the weight at (part, layer, name) stands still when frozen up to `after_block`."""
    part, layer, _ = path
    if part == "encoder":
        return (0 if layer.startswith("stem") else int(layer[len("group")])) <= after_block
    return part == "head" and after_block == 4


def weights_by_path(model):
    return {
        (part, layer, name): variable
        for part, layers in model.named_weights().items()
        for layer, variables in layers.items()
        for name, variable in variables.items()
    }


@pytest.mark.parametrize("after_block", range(-1, 5))
def test_frozen_weights_stay_bit_for_bit_and_the_others_move(after_block):
    model = make_model(keep=1, ft_proj_selector=1)
    paths = weights_by_path(model)
    model.freeze(after_block)
    frozen = {path for path in paths if is_frozen(path, after_block)}
    statistics = {path for path in paths if path[-1].startswith("moving")}
    assert bool(frozen) == (after_block >= 0)
    trainable = {id(variable) for variable in model.trainable_variables}
    assert {path for path, variable in paths.items() if id(variable) in trainable} == set(paths) - frozen - statistics
    if after_block == 4:
        assert {path[0] for path in set(paths) - frozen} == {"supervised_head"}

    before = {path: variable.numpy() for path, variable in paths.items()}
    endpoint = model_lib.FREEZE_ENDPOINTS[max(after_block, 0)]
    same = np.array_equal(
        *[model.encoder(IMAGES, training=training)["block_group4"] for training in (False, True)]
    )  # training mode has moved the statistics, as a step would
    assert same == (after_block == 4)
    frozen_part = [model.encoder(IMAGES, training=training)[endpoint] for training in (False, True)]
    assert np.array_equal(*frozen_part) == (after_block >= 0)

    variables = model.trainable_variables
    keras.optimizers.SGD(0.1, momentum=0.9).apply(gradients(model, lambda out: out.logits, variables), variables)
    assert {path for path, old in before.items() if np.array_equal(paths[path], old)} == frozen


def test_named_weights_are_every_variable_once():
    for options in (dict(), dict(num_classes=0), dict(num_layers=3), dict(keep=0)):
        model = make_model(**options)
        listed = [id(variable) for variable in weights_by_path(model).values()]
        assert sorted(listed) == sorted(id(variable) for variable in model.variables)
        assert len(set(listed)) == len(listed)


def test_ema_update_is_its_formula():
    target, source = projection_head(6), projection_head(6)
    randomize(target.variables, seed=1)
    randomize(source.variables, seed=2)
    before, other = ([variable.numpy() for variable in head.variables] for head in (target, source))
    ema_update(target, source, 0.9)
    trainable = {id(variable) for variable in target.trainable_variables}
    for variable, k, q in zip(target.variables, before, other, strict=True):
        moves = id(variable) in trainable
        assert moves != variable.name.startswith("moving")
        assert error(variable, 0.9 * k + 0.1 * q if moves else k) < 1e-6
    for variable, q in zip(source.variables, other, strict=True):
        np.testing.assert_array_equal(variable, q)
