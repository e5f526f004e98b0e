"""Several steps in one call of the host: they are those of single calls, and no call goes past what must be done."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import per_replica, split
from test_finite import poisoned, state
from test_tasks import make_batch, make_optimizer, make_task, smooth  # noqa: F401 - a fixture that speeds them up

import train


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([], [4, 4, 4]),
        ([4, 8, 12], [4, 4, 4]),
        ([6, 12], [4, 1, 1, 4, 1, 1]),
        ([1, 2, 9, 12], [1, 1, 4, 1, 1, 1, 1, 1, 1]),
        ([3, 10, 11, 12], [1, 1, 1, 4, 1, 1, 1, 1, 1]),
    ],
)
def test_a_call_is_one_step_where_the_host_must_look_before_all_of_them_are_done(looks, expected):
    lengths, step = [], 0
    while step < 12:
        lengths.append(train.steps_of_call(step, 4, lambda step: step in looks))
        step += lengths[-1]
    assert lengths == expected and step == 12
    assert train.steps_of_call(5, 1, lambda step: True) == 1


def taken(strategy, batches, lengths, skips, **changes):
    """Takes a step for each batch, in calls of these lengths. Returns the metrics of each, and the state in the end."""
    with strategy.scope():
        task = make_task("pretrain with memory", **changes)
        optimizer = make_optimizer(task)
        skipped = tf.Variable(0, dtype=tf.int64, trainable=False) if skips else None
    one = train.make_train_step(task, optimizer, strategy, skipped=skipped)
    several = train.several_steps(one, strategy)
    metrics, left = [], [split(strategy, batch) for batch in batches]
    for length in lengths:
        of_call, left = left[:length], left[length:]
        metrics += several(of_call) if length > 1 else [one(of_call[0])]
    assert one.experimental_get_tracing_count() == 1
    numbers = [{name: float(value) for name, value in each.items()} for each in metrics]
    return numbers, {name: per_replica(strategy, value) for name, value in state(task, optimizer).items()}


HALF, COMPILED = dict(mixed_precision="bfloat16"), dict(jit_compile=True)
SLOW = ((1, False, {}), (2, True, {}), (1, False, HALF), (1, True, COMPILED), (1, False, HALF | COMPILED))


@pytest.mark.parametrize(
    ("replicas", "skips", "changes"),
    [(1, True, {}), *(pytest.param(*given, marks=pytest.mark.slow) for given in SLOW)],
)
def test_steps_in_one_call_are_single_steps_to_the_last_bit(mirrored, replicas, skips, changes):
    """With `skips`, a step within a call is left out."""
    strategy, batches = mirrored(replicas), [make_batch(i) for i in range(7)]
    if skips:
        batches[1] = poisoned(batches[1], ["view_1"])
    expected, wanted = taken(strategy, batches, [1] * 7, skips, **changes)
    metrics, now = taken(strategy, batches, [3, 1, 3], skips, **changes)
    for ours, theirs in zip(metrics, expected, strict=True):
        np.testing.assert_equal(ours, theirs)
    for name, value in wanted.items():
        np.testing.assert_array_equal(now[name], value, err_msg=name)
