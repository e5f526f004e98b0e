"""The schedule and the number of steps are the release's."""

import json
import math

import numpy as np
import pytest
import tensorflow as tf

import schedule as schedule_lib


def test_schedule_and_steps_of_the_release(golden):
    for case in json.loads((golden / "schedule.json").read_text()):
        examples, batch = case["num_train_examples"], case["train_batch_size"]
        steps = schedule_lib.train_steps(examples, case["train_epochs"], batch)
        assert steps == case["train_steps"]
        peak = schedule_lib.peak_learning_rate(case["learning_rate"], case["learning_rate_scaling"], batch)
        warmup = schedule_lib.warmup_steps(examples, case["warmup_epochs"], batch)
        schedule = schedule_lib.WarmupCosine(peak, warmup, steps)
        for step, expected in case["values"].items():
            # At the very end float32 cannot tell the cosine from -1.
            np.testing.assert_allclose(float(schedule(int(step))), expected, rtol=1e-5, atol=1e-7 * peak, err_msg=step)


def test_an_epoch_is_rounded_to_whole_steps():
    assert schedule_lib.epoch_steps(1281167, 4096) == 313  # 312.8
    assert schedule_lib.epoch_steps(1437, 256) == 6 and schedule_lib.epoch_steps(10, 256) == 1


def test_schedule_by_hand():
    schedule = schedule_lib.WarmupCosine(2.0, 10, 30)
    by_hand = {0: 0.0, 1: 0.2, 5: 1.0, 9: 1.8, 10: 2.0, 15: 1.0 + math.sqrt(0.5), 20: 1.0, 30: 0.0, 31: 0.0, 99: 0.0}
    for step, rate in by_hand.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step
        assert float(schedule(tf.constant(step, tf.int64))) == pytest.approx(rate, abs=1e-6), step


def test_schedule_without_warmup_starts_at_the_peak():
    schedule = schedule_lib.WarmupCosine(2.0, 0, 8)
    for step in range(9):
        assert float(schedule(step)) == pytest.approx(1 + math.cos(math.pi * step / 8), abs=1e-6)


def test_schedule_of_nothing_but_warmup():
    rates = [float(schedule_lib.WarmupCosine(2.0, 4, 4)(step)) for step in range(5)]
    assert rates[:4] == pytest.approx([0.0, 0.5, 1.0, 1.5]) and np.isfinite(rates[4])


def test_train_steps():
    assert schedule_lib.train_steps(1000, 3, 256) == 3000 // 256 + 1
    assert schedule_lib.train_steps(1024, 1, 256) == 5  # the release's rounding adds one even where it divides
    assert schedule_lib.train_steps(1000, 3, 256, steps=7) == 7


def test_warmup_steps():
    assert schedule_lib.warmup_steps(1000, 10, 256) == 39
    assert schedule_lib.warmup_steps(1000, 0.5, 100) == 5
    assert schedule_lib.warmup_steps(1000, 0, 100) == 0


def test_learning_rate_scaling():
    assert schedule_lib.peak_learning_rate(0.3, "linear", 512) == pytest.approx(0.6)
    assert schedule_lib.peak_learning_rate(0.1, "sqrt", 4096) == pytest.approx(6.4)


def test_the_ramp_of_a_moving_average():
    by_hand = {1: 2 / 11, 8: 0.5, 80: 0.9, 89: 90 / 99, 8_990: 0.999, 10**7: 0.999}
    for step, decay in by_hand.items():
        assert float(schedule_lib.ramped_decay(0.999, tf.constant(step, tf.int64))) == pytest.approx(decay, rel=1e-6)
    assert float(schedule_lib.ramped_decay(0.0, tf.constant(5))) == 0
