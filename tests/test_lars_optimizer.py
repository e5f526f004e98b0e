"""LARS is its formula, step by step, alone and over replicas."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import per_replica, split
from parity import error

import lars_optimizer
from lars_optimizer import LARS
from schedule import WarmupCosine

SHAPES = {"dense": (4, 3), "conv": (3, 3, 2, 4), "head": (4, 2), "bias": (3,), "scalar": ()}
PLAIN = {"head", "bias", "scalar"}  # neither scaled nor decayed
SETTINGS = dict(momentum=0.8, weight_decay=0.05, eeta=0.02)


def draw(seed, scale=1.0):
    """An array of each of `SHAPES`."""
    rng = np.random.default_rng(seed)
    return {name: scale * np.asarray(rng.standard_normal(shape)) for name, shape in SHAPES.items()}


def make_variables(values):
    return {name: keras.Variable(value, name=name, dtype="float32") for name, value in values.items()}


def apply(optimizer, variables, gradients):
    optimizer.apply([tf.constant(gradients[name], tf.float32) for name in variables], list(variables.values()))


def lars_loop(values, gradients, rates, momentum, weight_decay, eeta, plain=PLAIN):
    """The published update, in float64: the weights after each step."""
    w, v = dict(values), {name: np.zeros_like(value) for name, value in values.items()}
    after = []
    for gradient, rate in zip(gradients, rates, strict=True):
        for name in w:
            step, ratio = gradient[name], 1.0
            if name not in plain:
                step = step + weight_decay * w[name]
                w_norm, g_norm = np.sqrt(np.sum(w[name] ** 2)), np.sqrt(np.sum(step**2))
                ratio = eeta * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            v[name] = momentum * v[name] + rate * ratio * step
            w[name] = w[name] - v[name]
        after.append(dict(w))
    return after


def test_trajectory_equals_the_formula():
    values, gradients = draw(0), [draw(seed) for seed in range(1, 7)]
    schedule = WarmupCosine(2.0, 2, 6)
    rates = [float(schedule(step)) for step in range(6)]
    variables = make_variables(values)
    optimizer = LARS(schedule, **SETTINGS)
    optimizer.exclude([variables["head"]])
    for gradient, expected in zip(gradients, lars_loop(values, gradients, rates, **SETTINGS), strict=True):
        apply(optimizer, variables, gradient)
        for name, variable in variables.items():
            assert error(variable, expected[name]) < 1e-5, name
    assert int(optimizer.iterations) == 6


def test_plain_variables_take_plain_momentum_steps():
    values = draw(0)
    variables = make_variables(values)
    optimizer = LARS(0.5, momentum=0.0, weight_decay=10.0)
    optimizer.exclude([variables["head"]])
    gradient = draw(1)
    apply(optimizer, variables, gradient)
    for name in SHAPES:
        plain = values[name] - 0.5 * gradient[name]
        assert (error(variables[name], plain) < 1e-6) == (name in PLAIN), name


@pytest.mark.parametrize(
    ("weights", "gradient", "decay", "expected"),
    [
        (0.0, 1.0, 0.1, -0.5),  # no weights: a plain step
        (2.0, 0.0, 0.0, 2.0),  # no gradient: stays
        (0.0, 0.0, 0.1, 0.0),
        (2.0, 0.0, 0.1, 2.0 - 0.5 * 0.02 * 2.0),  # no gradient, but decay: a step of eeta |w| along w
        (2.0, -0.2, 0.1, 2.0),  # gradient and decay cancel
    ],
)
def test_zero_norms(weights, gradient, decay, expected):
    variable = keras.Variable(np.full([2, 3], weights, np.float32))
    LARS(0.5, momentum=0.0, weight_decay=decay, eeta=0.02).apply([tf.fill([2, 3], gradient)], [variable])
    np.testing.assert_allclose(variable, np.full([2, 3], expected), atol=1e-6)


@pytest.mark.parametrize("rate", [0.3, WarmupCosine(2.0, 3, 10)], ids=["constant", "schedule"])
def test_serialization_keeps_every_setting(rate):
    original = LARS(rate, **SETTINGS, name="mine")
    dense = {"dense": np.ones([4, 3])}
    for copy in (
        keras.optimizers.deserialize(keras.optimizers.serialize(original)),
        LARS.from_config(json.loads(json.dumps(original.get_config()))),
    ):
        assert copy.get_config() == original.get_config()
        assert (copy.momentum, copy.lars_weight_decay, copy.eeta, copy.name) == (0.8, 0.05, 0.02, "mine")
        results = []
        for optimizer in (LARS(rate, **SETTINGS), copy):
            variables = make_variables(dense)
            for seed in range(3):
                apply(optimizer, variables, draw(seed))
            results.append(variables["dense"].numpy())
        np.testing.assert_array_equal(*results)
        assert np.any(results[0] != 1)


@pytest.mark.parametrize("replicas", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_replicas_add_up_to_one(mirrored, replicas):
    """Each replica has its share of the gradient; the weights are those of one replica with the sum."""
    values = draw(0)
    shares = {name: np.random.default_rng(1).standard_normal((4, *shape)) for name, shape in SHAPES.items()}
    shares = {name: share.astype(np.float32) for name, share in shares.items()}
    results = {}
    for count in (1, replicas):
        strategy = mirrored(count)
        with strategy.scope():
            variables = make_variables(values)
            optimizer = LARS(0.5, **SETTINGS)
            optimizer.exclude([variables["head"]])
            optimizer.build(list(variables.values()))

        def step(batch, optimizer=optimizer, variables=variables):
            gradients = [tf.reduce_sum(batch[name], axis=0) for name in variables]
            optimizer.apply(gradients, list(variables.values()))

        on_replicas = tf.function(lambda batch, on=strategy.run, step=step: on(step, (batch,)), autograph=False)
        for _ in range(3):
            on_replicas(split(strategy, shares))
        results[count] = {name: per_replica(strategy, variable.value) for name, variable in variables.items()}
    for name in SHAPES:
        assert error(results[1][name][0], values[name]) > 1e-3
        for local in results[replicas][name]:
            assert error(local, results[1][name][0]) < 1e-5, name


def test_trains_a_compiled_keras_model():
    rng = np.random.default_rng(0)
    x = rng.standard_normal([64, 5]).astype(np.float32)
    y = np.argmax(x[:, :3], axis=1)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(LARS(0.5, eeta=0.05, weight_decay=1e-4), loss=loss, metrics=["accuracy"])
    before, _ = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=40, batch_size=32, verbose=0)
    after, accuracy = model.evaluate(x, y, verbose=0)
    assert after < 0.5 * before and accuracy > 0.85


def test_make_optimizer_leaves_the_head_alone():
    values, gradient = draw(0), draw(1)
    variables = make_variables(values)
    optimizer = lars_optimizer.make_optimizer("lars", 0.5, 0.8, 0.05, head=[variables["head"], variables["bias"]])
    apply(optimizer, variables, gradient)
    expected = lars_loop(values, [gradient], [0.5], momentum=0.8, weight_decay=0.05, eeta=1e-3)[0]
    for name, variable in variables.items():
        assert error(variable, expected[name]) < 1e-6, name


def test_make_optimizer_momentum_and_adam():
    momentum = lars_optimizer.make_optimizer("momentum", 0.5, 0.8, 0.05)
    assert isinstance(momentum, keras.optimizers.SGD)
    assert momentum.momentum == 0.8 and momentum.nesterov and momentum.weight_decay is None
    adam = lars_optimizer.make_optimizer("adam", 0.5, 0.8, 0.05)
    assert isinstance(adam, keras.optimizers.Adam) and adam.weight_decay is None
