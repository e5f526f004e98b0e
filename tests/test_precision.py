"""Training in bfloat16 and float16: close to float32, weights and outputs in float32, a loss scale for float16."""

import bits
import numpy as np
import pytest
import tensorflow as tf
import tiny
from helpers import per_replica, run, split
from tensorflow.python.framework import config as tf_config
from test_finite import poisoned, state, values
from test_tasks import make_batch, make_optimizer, make_task, state_of

import checkpoint
import finite
import model as model_lib
import resnet
import strategy as strategy_lib
import train

ONE_STAGE = True
HALF = ("bfloat16", "float16")
PRETRAIN = dict(mixed_precision="float16", weight_decay=0.0)


@pytest.mark.parametrize("precision", HALF)
def test_weights_and_outputs_are_in_float32_and_what_lies_between_in_half(whole_network, precision):
    encoder = resnet.resnet(14, 0.0625, sk_ratio=0.0625, se_ratio=0.1, precision=precision)
    head = model_lib.projection_head(encoder.output["final_avg_pool"].shape[-1], precision=precision)
    model = model_lib.Model(encoder, head, 3)
    assert {variable.dtype for variable in model.variables} == {"float32"}
    outputs = model(tf.random.stateless_uniform([2, 40, 40, 3], [0, 0]), training=True)
    assert {x.dtype for x in (outputs.h, outputs.z, outputs.logits, *outputs.hiddens)} == {tf.float32}
    between = {x.dtype.name for name, x in outputs.endpoints.items() if name != "final_avg_pool"}
    assert between == {precision}
    computing = [layer for layer in (*encoder.layers, *head.layers) if type(layer).__name__ in ("Conv2D", "Dense")]
    assert {layer.compute_dtype for layer in computing} == {precision}


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("shape", [(6, 4, 4, 8), (6, 8)], ids=["maps", "vectors"])
def test_batch_norm_computes_in_float32_whatever_it_gets(mirrored, precision, shape):
    """In training, over two replicas and in inference it gives the float32 result, rounded once."""
    x = tf.cast(300.0 + tf.random.stateless_normal(shape, [0, 0]), precision).numpy()
    for strategy in (mirrored(1), mirrored(2)):
        found = []
        for dtype in ("float32", resnet.POLICIES[precision]):
            with strategy.scope():
                norm = resnet.BatchNorm(momentum=0.5, synchronized=True, dtype=dtype)
                norm.build(shape)
            y = run(strategy, lambda x, norm=norm: norm(x, training=True), split(strategy, x))
            inferred = norm(tf.constant(x), training=False)
            moments = [np.array(variable) for variable in (norm.moving_mean, norm.moving_variance)]
            found.append((np.concatenate(per_replica(strategy, y)), inferred.numpy(), moments))
        (expected, inferred, moments), (got, got_inferred, got_moments) = found
        assert got.dtype == got_inferred.dtype == tf.as_dtype(precision).as_numpy_dtype
        np.testing.assert_allclose(got_moments, moments, rtol=1e-5)
        for half, whole in ((got, expected), (got_inferred, inferred)):
            np.testing.assert_allclose(half.astype(np.float32), whole, rtol=2**-7, atol=1e-3)


def trained(precision, steps, strategy, jit_compile=False):
    """The loss of each step, the vector of all weights after the last, and the task."""
    with strategy.scope():
        task = make_task("pretrain with memory", mixed_precision=precision, temperature=0.5, jit_compile=jit_compile)
        optimizer = make_optimizer(task, rate=0.005)
        # A scale with which no step overflows: one that is left out would not be close to any.
        scaling = finite.LossScale({"scale": 256.0, "good_steps": 0}) if precision == "float16" else None
    step = train.make_train_step(task, optimizer, strategy, scaling=scaling)
    metrics = [step(split(strategy, make_batch(i % 8))) for i in range(steps)]
    weights = np.concatenate([np.ravel(variable) for variable in task.model.trainable_variables])
    return np.array([float(each["loss"]) for each in metrics]), weights, task


STEPS = 50


@pytest.fixture(scope="module")
def in_float32(networks_of_the_module):
    """The losses of 50 steps in float32, the weights after them, and the weights before them."""
    losses, weights, _ = trained("float32", STEPS, tf.distribute.get_strategy())
    start = make_task("pretrain with memory").model.trainable_variables
    return losses, weights, np.concatenate([np.ravel(variable) for variable in start])


@pytest.mark.parametrize("precision", HALF)
def test_fifty_steps_end_close_to_those_in_float32(in_float32, precision):
    """Every loss within 3 %, and the weights end within a fifth of the way that they have gone."""
    expected, weights, start = in_float32
    losses, found, task = trained(precision, STEPS, tf.distribute.get_strategy())
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    assert not np.array_equal(losses, expected)
    assert np.linalg.norm(found - weights) < 0.2 * np.linalg.norm(weights - start)
    kept = [*task.model.variables, *task.momentum.variables, task.queue.keys]
    assert {tf.as_dtype(variable.dtype) for variable in kept} == {tf.float32}


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize(("replicas", "jit_compile"), [(2, False), (1, True)])
def test_replicas_and_xla_train_as_one_in_half_precision(mirrored, precision, replicas, jit_compile):
    losses, weights, task = trained(precision, 8, mirrored(1))
    others, found, other = trained(precision, 8, mirrored(replicas), jit_compile)
    np.testing.assert_allclose(others, losses, rtol=0.02)
    assert np.linalg.norm(found - weights) < 0.01 * np.linalg.norm(weights)
    for name, value in state_of(other).items():
        first, *rest = per_replica(mirrored(replicas), value)
        assert all(np.array_equal(first, each) for each in rest), name
        assert first.shape == state_of(task)[name].shape


# The loss scale


def test_a_step_that_overflows_is_left_out_without_a_trace_and_the_scale_halves():
    strategy = tf.distribute.get_strategy()
    task = make_task("pretrain with memory", **PRETRAIN)
    optimizer = make_optimizer(task)
    scaling = finite.LossScale({"scale": 2.0**40, "good_steps": 7})
    step = train.make_train_step(task, optimizer, strategy, scaling=scaling)
    before = values(strategy, state(task, optimizer))
    for halvings in (1, 2):
        metrics = step(make_batch(halvings))
        assert np.isfinite(metrics["loss"]) and metrics[finite.COUNTS] == 0.0
        assert metrics[finite.LOSS_SCALE] == 2.0 ** (41 - halvings)
        assert scaling.state() == {"scale": 2.0 ** (40 - halvings), "good_steps": 0}
        for name, (value,) in values(strategy, state(task, optimizer)).items():
            np.testing.assert_array_equal(value, before[name][0] + halvings * ("iteration" in name), err_msg=name)
    scaling.back_to({"scale": 8.0, "good_steps": 3})
    assert step(make_batch(3))[finite.COUNTS] == 1.0
    assert scaling.state() == {"scale": 8.0, "good_steps": 4}
    after = values(strategy, state(task, optimizer))
    still = [name for name, (value,) in after.items() if np.array_equal(value, before[name][0])]
    assert [name for name in still if "learning_rate" not in name] == []
    # A loss that is none is no overflow: --on_nan decides what becomes of it.
    metrics = step(poisoned(make_batch(4), ["view_1"]))
    assert np.isnan(metrics["loss"]) and metrics[finite.COUNTS] == 1.0


def scaled_steps(strategy, steps, scale, on_nan_skip=False):
    """Takes steps that put the given numbers, one of each replica, into the metric and the weight.

    Returns what each step's metrics, the scale and the weight are after it.
    """
    with strategy.scope():
        weight = tf.Variable(0.0, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        skipped = tf.Variable(0, dtype=tf.int64, trainable=False) if on_nan_skip else None
        scaling = finite.LossScale({"scale": scale, "good_steps": 0})

    def step(batch):
        updates = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, batch["weight"])
        tf.distribute.get_replica_context().merge_call(
            lambda strategy, value: strategy.extended.update(weight, lambda w, v: w.assign(v), args=(value,)),
            args=(tf.reduce_sum(updates),),
        )
        return {"loss": tf.reduce_sum(batch["loss"])}

    guard = finite.Guard([weight], skipped, scaling)

    def careful(batch):
        before = guard.before()
        return guard.after(step(batch), before)

    found = []
    for loss, number in steps:
        batch = {"loss": np.float32(loss), "weight": np.float32(number)}
        metrics = run(strategy, careful, split(strategy, batch))
        counts = sum(per_replica(strategy, metrics[finite.COUNTS]))
        lost = int(tf.convert_to_tensor(skipped)) if on_nan_skip else 0
        found.append((counts, scaling.state()["scale"], float(tf.convert_to_tensor(weight)), lost))
    return found


FINE, TOO_LARGE = ([1, 1], [1, 2]), ([1, 1], [1, np.inf])  # the loss and the weight's parts of two replicas
NO_LOSS = ([1, np.nan], [1, np.nan])


def test_one_replica_that_overflows_stops_all_and_the_scale_grows_again(mirrored, monkeypatch):
    monkeypatch.setattr(finite, "GROWTH_STEPS", 2)
    found = scaled_steps(mirrored(2), [FINE, TOO_LARGE, FINE, FINE, FINE], 4.0)
    assert found == [(1, 4, 3, 0), (0, 2, 3, 0), (1, 2, 3, 0), (1, 4, 3, 0), (1, 4, 3, 0)]


def test_what_no_smaller_scale_helps_is_left_to_on_nan(mirrored):
    assert scaled_steps(mirrored(2), [TOO_LARGE, TOO_LARGE], 2.0) == [(0, 1, 0, 0), (1, 1, np.inf, 0)]
    found = scaled_steps(mirrored(2), [TOO_LARGE, TOO_LARGE, NO_LOSS, FINE], 2.0, on_nan_skip=True)
    assert found == [(0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 0, 2), (1, 1, 3, 2)]
    ((counts, scale, weight, _),) = scaled_steps(mirrored(2), [NO_LOSS], 8.0)
    assert (counts, scale) == (1, 8) and np.isnan(weight)


def test_the_scale_stays_within_its_bounds(monkeypatch):
    monkeypatch.setattr(finite, "GROWTH_STEPS", 1)
    scaling = finite.LossScale({"scale": finite.LARGEST_SCALE, "good_steps": 0})
    scaling.after_step(tf.constant(False))
    assert scaling.state()["scale"] == finite.LARGEST_SCALE


# Runs


RUN = dict(
    tiny.PRETRAIN, mixed_precision="float16", train_split="train[:60]", image_size=8, train_batch_size=24,
    memory_size=80, deterministic=True, train_steps=6, checkpoint_steps=2,
)  # fmt: skip


@pytest.fixture
def nondeterministic_again():
    yield
    tf_config.disable_op_determinism()


@pytest.fixture
def of_old(monkeypatch):
    """A processor without instructions for float16; and the first steps overflow."""
    monkeypatch.setattr(finite, "FIRST_SCALE", 2.0**40)
    monkeypatch.setattr(strategy_lib, "_of_processor", lambda name: "avx2 fma" if name == "flags" else "")


def scale_of(model_dir):
    """The loss scale that the newest checkpoint remembers."""
    return checkpoint.Weights(model_dir).progress[finite.LOSS_SCALE]["scale"]


def test_a_run_that_goes_on_keeps_its_scale(tmp_path, capsys, of_old, nondeterministic_again):
    run = str(tmp_path / "run")
    tiny.killed_run(3, **RUN, model_dir=run)
    said = capsys.readouterr().out
    assert said.count("--mixed_precision=float16: this processor has no instructions for it") == 1
    assert scale_of(run) == 2.0**38
    tiny.train_run(**{**RUN, "train_steps": 4}, model_dir=run)
    assert scale_of(run) == 2.0**36


@pytest.mark.slow
def test_a_killed_run_in_float16_ends_with_the_same_bits(tmp_path, capsys, of_old, nondeterministic_again):
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    tiny.train_run(**RUN, model_dir=whole)
    tiny.killed_run(3, **RUN, model_dir=killed)
    tiny.train_run(**RUN, model_dir=killed)
    assert bits.different(whole, killed) == {}
    assert scale_of(whole) == scale_of(killed) == 2.0**34
    # It may go on in another precision, and back; the change is said.
    for precision, steps in (("float32", 7), ("float16", 8)):
        capsys.readouterr()
        tiny.train_run(**{**RUN, "mixed_precision": precision, "train_steps": steps}, model_dir=killed)
        assert f"--mixed_precision={precision} (before: " in capsys.readouterr().out
    assert scale_of(killed) == 2.0**39


@pytest.mark.parametrize(
    ("flags", "lacking"),
    [
        ("fpu avx2 fma", {"bfloat16", "float16"}),
        ("avx512f avx512_bf16", {"float16"}),
        ("amx_bf16 amx_fp16", set()),
        ("asimd fphp asimdhp bf16", set()),
        ("", set()),  # Nothing is known.
    ],
)
def test_a_processor_without_the_instructions_is_known(monkeypatch, flags, lacking):
    monkeypatch.setattr(strategy_lib, "_of_processor", lambda name: flags if name == "flags" else "")
    strategy = tf.distribute.get_strategy()
    found = {name for name in ("float32", *HALF) if strategy_lib.lacks_instructions(strategy, name)}
    assert found == lacking
