"""Steps whose numbers are not finite: they are named, left out on all replicas alike, or the run goes back."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import per_replica, split
from test_tasks import make_batch, make_optimizer, make_task, smooth  # noqa: F401 - a fixture that speeds them up

import finite
import train


def state(task, optimizer):
    """Every variable of a run by name, as each replica holds it."""
    named = {f"{i} {v.path}": v.value for i, v in enumerate([*task.model.variables, *optimizer.variables])}
    named |= {f"momentum {i} {v.path}": v.value for i, v in enumerate(task.momentum.variables)}
    named |= {"queue keys": task.queue.keys, "queue count": task.queue.count}
    return named


def values(strategy, variables):
    return {name: per_replica(strategy, variable) for name, variable in variables.items()}


def poisoned(batch, views):
    """The batch with one number in its first image that is not one."""
    batch = {name: np.array(value) for name, value in batch.items()}
    for view in views:
        batch[view][0, 0, 0, 0] = np.nan
    return batch


def run_steps(strategy, batches, skips, jit_compile=False):
    """Takes a step for each batch. Returns the metrics of each, and the state before the first and after each."""
    with strategy.scope():
        task = make_task("pretrain with memory", jit_compile=jit_compile)
        optimizer = make_optimizer(task)
        skipped = tf.Variable(0, dtype=tf.int64, trainable=False) if skips else None
    step = train.make_train_step(task, optimizer, strategy, skipped)
    states, metrics = [values(strategy, state(task, optimizer))], []
    for batch in batches:
        metrics.append({name: float(value) for name, value in step(split(strategy, batch)).items()})
        states.append(values(strategy, state(task, optimizer)))
    return metrics, states


GOOD, BAD, LAST = make_batch(0), poisoned(make_batch(1), ["view_1"]), make_batch(2)


@pytest.mark.parametrize(
    ("replicas", "jit_compile"), [*(pytest.param(1, jit, marks=pytest.mark.slow) for jit in (False, True)), (2, False)]
)
def test_a_step_is_left_out_without_a_trace(mirrored, replicas, jit_compile):
    strategy = mirrored(replicas)  # With two replicas, one of them alone sees the number that is none.
    metrics, (_, before, after, last) = run_steps(strategy, [GOOD, BAD, LAST], True, jit_compile)
    assert [each[finite.SKIPPED_STEPS] for each in metrics] == [0, 1, 1]
    assert [each[finite.COUNTS] for each in metrics] == [1, 0, 1]
    assert np.isfinite(metrics[0]["loss"]) and np.isnan(metrics[1]["loss"]) and np.isfinite(metrics[2]["loss"])
    for name, replicas_before in before.items():
        for was, now in zip(replicas_before, after[name], strict=True):
            np.testing.assert_array_equal(now, was + ("iteration" in name), err_msg=name)
    # The steps that are taken are those of a run without the bad one.
    expected, (_, _, without) = run_steps(mirrored(1), [GOOD, LAST], False)
    assert metrics[2]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-4)
    for name, (wanted,) in without.items():
        for now in last[name]:
            np.testing.assert_allclose(now, wanted + ("iteration" in name), rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_first_bad_step_is_named():
    last = finite.LastSteps()
    for step, loss in ((11, 1.0), (12, np.inf), (13, np.nan)):
        last.add(step, {"accuracy": tf.constant(0.5), "loss": tf.constant(loss)})
    with pytest.raises(FloatingPointError, match=r"^loss is inf at step 12$"):
        last.check({"accuracy": 0.5, "loss": np.nan})
    last.check({"loss": 1.0})
    last.add(14, {"loss": tf.constant(np.nan)})
    with pytest.raises(FloatingPointError, match=r"^loss is nan at step 14$"):
        last.check({"loss": np.nan})


def test_each_restore_has_an_order_of_its_own():
    seeds = [finite.order_seed(7, restores) for restores in range(5)]
    assert seeds[0] == 7 and len(set(seeds)) == 5
    assert all(0 <= finite.order_seed(2**32 - 1, restores) < 2**32 for restores in range(5))
