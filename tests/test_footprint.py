"""The memory of a run: what cannot fit is refused before it is built, with a batch that would."""

import argparse
import platform
import re
import time

import bigger
import pytest
from test_run import command

import plan
import preparation
import strategy
from config import PRESETS
from errors import UserError
from plan import footprint
from subject import resolve

FINETUNE = dict(train_mode="finetune", checkpoint="not/there/yet")
DISTILL = dict(train_mode="distill", teacher="not/there/yet")
GB = 10**9


@pytest.fixture
def stops_at_the_network(monkeypatch):
    """On a host of 24 GB, training ends with a message where it would make the network."""

    def stop(*arguments):
        raise UserError("on the way to the network")

    monkeypatch.setattr(preparation.tasks, "make_task", stop)
    monkeypatch.setattr(strategy, "_host_memory", lambda: 24 * GB)


def test_a_batch_that_cannot_fit_is_refused_before_anything_is_built(
    tmp_path, monkeypatch, capsys, stops_at_the_network
):
    monkeypatch.chdir(tmp_path)

    def said(*flags):
        assert command(*flags) == 2
        return capsys.readouterr().err

    started = time.monotonic()
    refused = said("--train_batch_size=100000")
    assert time.monotonic() - started < 30
    assert refused.count("\n") == 1 and "--train_batch_size=100000 takes about 83.3 GB of memory" in refused
    assert "there are 23.3 GB" in refused and "--memory_check=False skips this check" in refused
    fitting = int(re.search(r"use --train_batch_size=(\d+) or less", refused)[1])
    assert "on the way" in said(f"--train_batch_size={fitting}")
    assert "takes about" in said(f"--train_batch_size={fitting + 1}")
    chunks = int(re.search(r"or --grad_accumulation=(\d+);", refused)[1])
    assert "on the way" in said("--train_batch_size=100000", f"--grad_accumulation={chunks}")
    assert "on the way" in said("--train_batch_size=100000", "--memory_check=False")
    assert "on the way" in said()
    assert "--eval_batch_size=1000000 takes" in said("--mode=train_then_eval", "--eval_batch_size=1000000")
    assert "on the way" in said("--mode=train", "--eval_batch_size=1000000")
    assert not list(tmp_path.iterdir())


def test_a_number_is_divided_by_its_divisors_and_a_large_prime_is_known_at_once():
    for number in range(1, 50):
        assert footprint.divisors(number) == [i for i in range(1, number + 1) if number % i == 0]
    started = time.monotonic()
    assert footprint.divisors(2**31 - 1) == [1, 2**31 - 1]
    assert time.monotonic() - started < 5


def refused_batch(check=footprint.check_training_memory, replicas=1, device_bytes=1 * GB, **given):
    with pytest.raises(UserError) as raised:
        check(resolve({"mode": "train", "dataset": "digits", **given}), replicas, 10, device_bytes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_batch_that_is_proposed_is_the_largest_the_replicas_can_share():
    message = refused_batch(replicas=4, train_batch_size=100_000)
    proposed = int(re.search(r"use --train_batch_size=(\d+) ", message)[1])
    assert proposed % 4 == 0
    for batch, fits in ((proposed, True), (proposed + 4, False)):
        planned = plan.plan(resolve(dict(dataset="digits", train_batch_size=batch)), replicas=4, timing=False)
        assert (planned["memory_bytes_per_replica"] <= 1 * GB) == fits


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        (
            dict(memory="queue", memory_size=10**7),
            "--image_size or --width_multiplier or --resnet_depth or --memory_size;",
        ),
        (dict(train_mode="supervised", width_multiplier=8.0), "--image_size or --width_multiplier or --resnet_depth;"),
        (dict(**FINETUNE, width_multiplier=8.0), "--image_size;"),
    ],
)
def test_where_no_batch_fits_the_flags_of_the_networks_size_are_named(given, flags):
    message = refused_batch(replicas=2, train_batch_size=64, **given)
    assert "even --train_batch_size=2 takes" in message and f": lower {flags}" in message


@pytest.mark.parametrize("mode", ["train", "eval", "train_then_eval"])
def test_each_check_looks_at_its_own_batch_whatever_the_mode_is(mode):
    given = dict(mode=mode, dataset="digits")
    message = refused_batch(check=footprint.check_evaluation_memory, **given, eval_batch_size=10**6)
    assert "--eval_batch_size=1000000 takes" in message and "use --eval_batch_size=" in message
    footprint.check_evaluation_memory(resolve(dict(**given, train_batch_size=10**6)), 1, 10, 1 * GB)
    assert "--train_batch_size=1000000 takes" in refused_batch(**given, train_batch_size=10**6)
    footprint.check_training_memory(resolve(dict(**given, eval_batch_size=10**6)), 1, 10, 1 * GB)


def test_the_teachers_memory_counts():
    config, teacher = resolve(dict(**DISTILL, mode="train")), resolve(dict(width_multiplier=8.0))
    footprint.check_training_memory(config, 1, 10, 1 * GB)
    with pytest.raises(UserError, match="even --train_batch_size=1 takes"):
        footprint.check_training_memory(config, 1, 10, 1 * GB, teacher)


def test_half_precision_halves_the_activations_and_float16_keeps_the_state_before_a_step():
    parts = {}
    for precision in ("float32", "bfloat16", "float16"):
        config = resolve(dict(mode="train", dataset="digits", mixed_precision=precision))
        network, _ = footprint.count(config)
        parts[precision] = footprint.memory_parts(config, 1, 10, network)
    whole, brain, half = parts.values()
    assert brain["activations"] == half["activations"] == pytest.approx(whole["activations"] / 2)
    assert brain["weights"] == half["weights"] == pytest.approx(1.5 * whole["weights"], rel=1e-4)
    assert brain["updates"] == whole["updates"]
    assert half["updates"] == whole["updates"] + whole["weights"] + whole["slots"]


def test_no_memory_is_checked_where_none_is_known():
    large = resolve(dict(mode="train", train_batch_size=10**6, eval_batch_size=10**6))
    footprint.check_training_memory(large, 1, 10, None)
    footprint.check_evaluation_memory(large, 1, 10, None)


@pytest.mark.parametrize("train_mode", [name for name in PRESETS["digits"] if name != "*"])
def test_the_presets_fit_a_small_machine(train_mode):
    needs = {"finetune": FINETUNE, "distill": DISTILL}.get(train_mode, {"train_mode": train_mode})
    config = resolve(dict(mode="train_then_eval", **needs))
    footprint.check_training_memory(config, 1, 10, 1 * GB)
    footprint.check_evaluation_memory(config, 1, 10, 1 * GB)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the allocator that counts is oneDNN's")
def test_the_tensors_of_a_step_in_chunks_take_what_the_plan_says():
    given = argparse.Namespace(measure="256:4:0", depth=10, width=0.25, memory="none", steps=1)
    found = bigger.measure(given)
    assert found["tensors"] == pytest.approx(found["estimate"], rel=0.15)
