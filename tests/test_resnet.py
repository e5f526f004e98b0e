"""The encoder has the shapes, sizes and layers of the paper's networks, and its batch norm is Keras's, synchronized."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from helpers import per_replica, randomize, run, split
from parity import error

import resnet
from architecture import BASIC, BLOCKS, BOTTLENECK
from resnet import BatchNorm

SMALL = (10, 14, 18, 26)
EPSILON = 1e-3  # not the layer's default, nor small enough to hide


def images(count=2, size=32):
    return np.random.default_rng(0).random([count, size, size, 3], np.float32)


def names(encoder):
    return {layer.name for layer in encoder.layers if layer.variables}


@pytest.mark.parametrize("cifar_stem", [True, False])
@pytest.mark.parametrize("sk_ratio", [0.0, 0.0625])
@pytest.mark.parametrize("depth", SMALL)
def test_endpoints(depth, sk_ratio, cifar_stem):
    encoder = resnet.resnet(depth, 0.125, sk_ratio, cifar_stem=cifar_stem)
    outputs = encoder(images())
    sides = [32, 32, 32, 16, 8, 4] if cifar_stem else [16, 8, 8, 4, 2, 1]
    widths = [8, 8] + [width * (1 if BLOCKS[depth][0] == BASIC else 4) for width in (8, 16, 32, 64)]
    expected = {e: (2, s, s, w) for e, s, w in zip(resnet.ENDPOINTS[:-1], sides, widths, strict=True)}
    assert {e: tuple(outputs[e].shape) for e in outputs} == {**expected, "final_avg_pool": (2, widths[-1])}
    np.testing.assert_allclose(outputs["final_avg_pool"], tf.reduce_mean(outputs["block_group4"], [1, 2]), rtol=1e-5)
    assert np.all(outputs["block_group4"] >= 0) and np.any(outputs["initial_conv"] < 0)


@pytest.mark.parametrize(("multiplier", "width"), [(0.0625, 4), (0.3, 19), (0.99, 63), (1.5, 96)])
def test_fractional_widths_round_down(multiplier, width):
    shapes = {name: tensor.shape for name, tensor in resnet.resnet(10, multiplier).output.items()}
    assert shapes["initial_conv"][-1] == width and shapes["final_avg_pool"] == (None, 8 * width)


@pytest.mark.parametrize(
    ("width", "sk_ratio", "millions"),
    [
        (1, 0.0, 24),
        (1, 0.0625, 35),
        # tests/test_plan.py counts these without making them.
        pytest.param(2, 0.0, 94, marks=pytest.mark.slow),
        pytest.param(2, 0.0625, 140, marks=pytest.mark.slow),
    ],
)
def test_parameter_counts_of_table_1(width, sk_ratio, millions, monkeypatch):
    monkeypatch.setattr(keras.initializers, "VarianceScaling", keras.initializers.Zeros)  # drawing 10^8 numbers is slow
    encoder = resnet.resnet(50, width, sk_ratio)
    count = sum(int(np.prod(variable.shape)) for variable in encoder.trainable_variables)
    assert round(count / 1e6) == millions
    if (width, sk_ratio) == (1, 0.0):
        assert count == 23_508_032  # every ResNet-50 without its classifier


def test_depths_count_their_layers():
    for depth, (kind, repeats) in BLOCKS.items():
        assert depth == sum(repeats) * (2 if kind == BASIC else 3) + 2


@pytest.mark.parametrize("sk_ratio", [0.0, 0.0625])
@pytest.mark.parametrize("depth", SMALL)
def test_last_scale_of_every_block_starts_at_zero(depth, sk_ratio):
    kind, repeats = BLOCKS[depth]
    encoder = resnet.resnet(depth, 0.125, sk_ratio)
    last = "bn2" if kind == BASIC else "bn3"
    expected = {f"group{g}_block{b}_{last}" for g, count in enumerate(repeats, 1) for b in range(1, count + 1)}
    scales = {layer.name: layer.gamma.numpy() for layer in encoder.layers if isinstance(layer, BatchNorm)}
    assert {name for name, gamma in scales.items() if not np.any(gamma)} == expected
    assert all(np.all(gamma == 1) for name, gamma in scales.items() if name not in expected)


def test_unknown_depth():
    with pytest.raises(ValueError, match=r"resnet_depth=42.*50"):
        resnet.resnet(42)


@pytest.mark.parametrize("depth", [10, 14])
def test_squeeze_and_excitation_adds_two_layers_to_a_block(depth):
    plain, excited = resnet.resnet(depth, 0.125), resnet.resnet(depth, 0.125, se_ratio=0.25)
    added = {f"group{g}_block1_se_{part}" for g in range(1, 5) for part in ("reduce", "expand")}
    assert names(excited) - names(plain) == added and names(plain) <= names(excited)
    out = 16 if depth == 10 else 64
    assert [tuple(v.shape) for v in excited.get_layer("group2_block1_se_reduce").variables] == [(1, 1, out, 4), (4,)]
    assert [tuple(v.shape) for v in excited.get_layer("group2_block1_se_expand").variables] == [(1, 1, 4, out), (out,)]


def test_selective_kernels_replace_the_3x3_convolution():
    plain, selective = resnet.resnet(14, 0.125), resnet.resnet(14, 0.125, 0.0625)
    blocks = [f"group{g}_block1" for g in range(1, 5)]
    parts = ("sk_conv", "sk_bn", "sk_squeeze", "sk_squeeze_bn", "sk_mix")
    stem = {"stem_conv1", "stem_bn1", "stem_conv2", "stem_bn2", "stem_conv3"}
    assert names(selective) - names(plain) == stem | {f"{block}_{part}" for block in blocks for part in parts}
    assert names(plain) - names(selective) == {"stem_conv"} | {
        f"{b}_{part}" for b in blocks for part in ("conv2", "bn2")
    }
    shapes = {part: tuple(selective.get_layer(f"group3_block1_{part}").kernel.shape) for part in parts[::2]}
    assert shapes == {"sk_conv": (3, 3, 32, 64), "sk_squeeze": (1, 1, 32, 32), "sk_mix": (1, 1, 32, 64)}


def test_basic_blocks_get_resnet_d_alone():
    plain, selective = resnet.resnet(10, 0.125), resnet.resnet(10, 0.125, 0.0625)
    stem = {"stem_conv1", "stem_bn1", "stem_conv2", "stem_bn2", "stem_conv3"}
    assert names(selective) - names(plain) == stem and names(plain) - names(selective) == {"stem_conv"}
    pools = {layer.name for layer in selective.layers if isinstance(layer, keras.layers.AveragePooling2D)}
    assert pools == {f"group{g}_block1_shortcut_pool" for g in range(1, 5)}


def test_streams_are_mixed_by_a_softmax():
    """The block's sigmoid of a difference is the softmax over the two streams that the paper of SK describes."""
    encoder = resnet.resnet(14, 0.125, 0.0625)
    randomize(encoder.variables)
    inner = {name: encoder.get_layer(f"group1_block1_{name}").output for name in ("sk_relu", "sk_mix", "bn3")}
    streams, logits, out = keras.Model(encoder.input, list(inner.values()))(images(size=64))
    first, second = tf.split(streams, 2, axis=-1)
    weights = tf.nn.softmax(tf.stack(tf.split(logits, 2, axis=-1)), axis=0)  # [2, N, 1, 1, width]
    conv3, bn3 = (encoder.get_layer(f"group1_block1_{name}") for name in ("conv3", "bn3"))
    assert error(out, bn3(conv3(first * weights[0] + second * weights[1]))) < 1e-5


# Batch norm


def values(*shape, seed=0):
    """Far from centred and scaled, and another distribution for every example."""
    rng = np.random.default_rng(seed)
    ones = [1] * (len(shape) - 2)
    scale = np.linspace(0.5, 3, shape[0]).reshape([-1, *ones, 1])
    offset = 2 * rng.standard_normal([1, *ones, shape[-1]])
    return (rng.standard_normal(shape) * scale + offset).astype(np.float32)


def make_norm(kind, shape, **options):
    layer = kind(momentum=0.8, epsilon=EPSILON, **options)
    layer.build([None, *shape[1:]])
    randomize(layer.variables)
    return layer


def norm_results(layer, x, weights, training=True):
    """Output, and the gradients of a weighted sum of it; the moving statistics after that."""
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training)
        loss = tf.reduce_sum(y * weights)
    parameters = [layer.gamma, layer.beta] if layer.center else [layer.gamma]
    gradients = tape.gradient(loss, [x, *(parameter.value for parameter in parameters)])
    return [y, *gradients]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(8, 5), (6, 4, 3, 5), (6, 1, 1, 5)])
def test_batch_norm_is_that_of_keras(shape, training, center):
    x, weights = values(*shape), values(*shape, seed=1)
    results = []
    for kind in (keras.layers.BatchNormalization, BatchNorm):
        layer = make_norm(kind, shape, center=center)
        before = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
        computed = norm_results(layer, x, weights, training)
        moving = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
        assert all(np.array_equal(*pair) != training for pair in zip(before, moving, strict=True))
        results.append([*computed, *moving])
        assert len(layer.trainable_variables) == (2 if center else 1)
    for expected, got in zip(*results, strict=True):
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("shape", [(8, 5), (6, 4, 3, 5)])
def test_frozen_batch_norm_is_in_inference_mode(shape):
    layer = make_norm(BatchNorm, shape)
    x = values(*shape)
    expected = layer(x, training=False)
    layer.trainable = False
    before = [variable.numpy() for variable in layer.variables]
    np.testing.assert_array_equal(layer(x, training=True), expected)
    for variable, old in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, old)


def over_replicas(strategy, x, weights, synchronized):
    """`norm_results` and the moving statistics with `x` split over the replicas; results are lists by replica."""
    with strategy.scope():
        layer = make_norm(BatchNorm, x.shape, synchronized=synchronized)
    batch = split(strategy, {"x": x, "weights": weights})
    results = run(strategy, lambda part: norm_results(layer, part["x"], part["weights"]), batch)
    moving = [layer.moving_mean.value, layer.moving_variance.value]
    return [per_replica(strategy, result) for result in [*results, *moving]]


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 2, 5), (8, 1, 1, 5)])
def test_synchronized_batch_norm_on_replicas_is_one_replicas(mirrored, replicas, shape):
    x, weights = values(*shape), values(*shape, seed=1)
    one = over_replicas(mirrored(1), x, weights, True)
    several = over_replicas(mirrored(replicas), x, weights, True)
    for part, expected in zip(several[:2], one[:2], strict=True):  # y and the gradient of x
        assert error(np.concatenate(part), expected[0]) < 1e-5
    for part, expected in zip(several[2:4], one[2:4], strict=True):  # the gradients of gamma and beta
        assert error(np.sum(part, axis=0), expected[0]) < 1e-5
    for part, expected in zip(several[4:], one[4:], strict=True):  # the moving statistics
        for local in part:
            assert error(local, expected[0]) < 1e-5


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 2, 5)])
def test_unsynchronized_batch_norm_keeps_the_mean_of_the_replicas(mirrored, shape):
    x, weights = values(*shape), values(*shape, seed=1)
    two = over_replicas(mirrored(2), x, weights, False)
    halves = [
        over_replicas(mirrored(1), *half, False) for half in zip(np.split(x, 2), np.split(weights, 2), strict=True)
    ]
    for local, half in enumerate(halves):
        for i in range(4):  # y and the gradients are the replica's own
            assert error(two[i][local], half[i][0]) < 1e-5
    for i in (4, 5):
        expected = (halves[0][i][0] + halves[1][i][0]) / 2
        assert error(halves[0][i][0], expected) > 1e-2
        for local in two[i]:
            assert error(local, expected) < 1e-5


def test_compiles_with_xla(monkeypatch):
    monkeypatch.setitem(BLOCKS, 14, (BOTTLENECK, (1, 1)))  # every kind of layer, in half the time
    encoder = resnet.resnet(14, 0.125, 0.0625, 0.25, cifar_stem=True)
    randomize(encoder.variables)
    start = [variable.numpy() for variable in encoder.variables]
    x = images(4, 16)

    def forward_backward():
        with tf.GradientTape() as tape:
            h = encoder(x, training=True)["final_avg_pool"]
            loss = tf.reduce_mean(tf.square(h))
        return h, tape.gradient(loss, [variable.value for variable in encoder.trainable_variables])

    results = []
    for jit in (False, True):
        for variable, value in zip(encoder.variables, start, strict=True):
            variable.assign(value)
        h, gradients = tf.function(forward_backward, jit_compile=jit, autograph=False)()
        results.append([h, *gradients, *encoder.non_trainable_variables])
    for expected, got in zip(*[[np.array(part) for part in result] for result in results], strict=True):
        assert error(got, expected) < 1e-3


@pytest.mark.slow  # The two tests below notice the same fault.
def test_a_narrow_network_trains_on_large_images(tmp_path):
    """In a process of its own, because the fault ends the whole process."""
    command = [
        "run.py", "--train_mode=supervised", "--resnet_depth=10", "--width_multiplier=0.0625", "--image_size=224",
        "--train_batch_size=2", "--train_steps=1", f"--model_dir={tmp_path}",
    ]  # fmt: skip
    folder = resnet.__file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, *command], cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("channels", [3, 15, 16])
def test_a_strided_1x1_convolution_reads_every_second_pixel(channels, size):
    """It reads every second pixel, whether its input has fewer channels than a block of oneDNN or not."""
    inputs = keras.Input([size, size, channels])
    builder = resnet._Builder(sk_ratio=0.0, se_ratio=0.0, global_bn=True, batch_norm_decay=0.9, dtype="float32")
    model = keras.Model(inputs, builder.conv(inputs, filters=5, kernel=1, strides=2, name="conv"))
    kernel = model.get_layer("conv").kernel.value
    rng = np.random.default_rng(0)
    x = tf.constant(rng.standard_normal([2, size, size, channels]), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = model(x)
        expected = tf.einsum("nhwi,io->nhwo", x[:, ::2, ::2], kernel[0, 0])
        weights = rng.standard_normal(expected.shape).astype(np.float32)
        loss, expected_loss = tf.reduce_sum(y * weights), tf.reduce_sum(expected * weights)
    assert error(y, expected) < 1e-6
    gradients = zip(tape.gradient(loss, [x, kernel]), tape.gradient(expected_loss, [x, kernel]), strict=True)
    assert all(error(gradient, reference) < 1e-6 for gradient, reference in gradients)
    assert builder.made == ["conv"] and [tuple(v.shape) for v in model.variables] == [(1, 1, channels, 5)]


@pytest.mark.parametrize(
    ("depth", "width"), [*((depth, 0.0625) for depth in SMALL), (10, 0.125), (14, 0.1875), (10, 0.25)]
)
def test_no_strided_1x1_convolution_has_a_narrow_input(depth, width):
    """The filter gradient of such a convolution can end the process, on CPUs with AVX-512 or AVX2."""
    for layer in resnet.resnet(depth, width).layers:
        if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (1, 1) and layer.strides == (2, 2):
            assert layer.input.shape[-1] >= 16, layer.name


# Recomputed blocks


def step_results(encoder, variables, call, jit_compile=False):
    """h, the gradients of a function of it, and every variable after the step."""

    @tf.function(autograph=False, jit_compile=jit_compile)
    def step(x):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in variables])
            endpoints = call(x)
            loss = tf.reduce_mean(endpoints["final_avg_pool"] ** 2) + tf.reduce_mean(endpoints["block_group1"])
        return endpoints, tape.gradient(loss, variables)

    endpoints, gradients = step(images(4, 16))
    return [*(endpoints[name] for name in encoder.output), *gradients, *encoder.variables]


# In a process that has run hundreds of other tests, it takes a minute and 12 GB; alone, seconds and 1 GB.
@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_recomputed_blocks_have_the_same_numbers_and_move_the_averages_once(monkeypatch, jit_compile):
    monkeypatch.setitem(BLOCKS, 14, (BOTTLENECK, (1, 2)))
    results, counts = [], []
    for recompute in (False, True):
        encoder = resnet.resnet(14, 0.125, 0.0625, cifar_stem=True)
        randomize(encoder.variables)
        before = [variable.numpy() for variable in encoder.variables]
        frozen = encoder.get_layer("group1_block1_bn1")
        frozen.trainable = False
        watched = encoder.get_layer("group2_block2_conv3")
        call, calls = watched.call, []
        monkeypatch.setattr(watched, "call", lambda x, call=call, calls=calls: (calls.append(1), call(x))[1])
        through = resnet.Recomputing(encoder) if recompute else lambda x, encoder=encoder: encoder(x, training=True)
        results.append(step_results(encoder, encoder.trainable_variables, through, jit_compile))
        moved = [not np.array_equal(*pair) for pair in zip(before, encoder.variables, strict=True)]
        statistics = ["moving" in v.path and v.path.split("/")[0] != frozen.name for v in encoder.variables]
        assert moved == statistics
        counts.append(len(calls))
    assert counts[1] > counts[0] >= 1  # It is called again in the backward pass.
    for expected, got in zip(*[[np.array(part) for part in result] for result in results], strict=True):
        assert error(got, expected) < 1e-4


def test_recomputed_blocks_in_a_process_of_their_own():
    name = test_recomputed_blocks_have_the_same_numbers_and_move_the_averages_once.__name__
    test = f"{__file__}::{name}[False]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow", test]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    said = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout[-2000:]


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 2, 5)])
def test_synchronized_batch_norm_is_exact_far_from_zero(mirrored, shape):
    """Means of squares less squared means would lose the variance, 1, beside a mean of 1,000."""
    x, weights = values(*shape) + 1000, values(*shape, seed=1)
    several = over_replicas(mirrored(2), x, weights, True)
    exact = np.float64(x)
    axes = tuple(range(len(shape) - 1))
    normalized = (exact - exact.mean(axes)) / np.sqrt(exact.var(axes) + EPSILON)
    layer = make_norm(BatchNorm, shape)
    expected = layer.gamma.numpy() * normalized + layer.beta.numpy()
    assert error(np.concatenate(several[0]), expected) < 1e-3


def test_synchronized_batch_norm_exchanges_four_numbers_a_channel(mirrored, monkeypatch):
    asked, all_reduce = [], tf.distribute.ReplicaContext.all_reduce

    def counted(self, reduce_op, value, options=None):
        asked.append(int(np.prod(value.shape)))
        return all_reduce(self, reduce_op, value, options)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", counted)
    monkeypatch.delattr(tf.distribute.ReplicaContext, "all_gather")
    over_replicas(mirrored(2), values(8, 5), values(8, 5), True)
    assert asked == [5, 5, 5, 5, 10, 10]  # by both replicas: mean, variance, gradient
