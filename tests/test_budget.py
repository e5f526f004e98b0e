"""--train_minutes: measured once, before a new run begins, and then fixed in its config."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from test_run import command

import budget
import recipe
import subject
import train
from budget import Pace
from config import Config

ONE_STAGE = True  # see conftest.py
# A network that starts within seconds.
QUICK = [f"--{name}={value}" for name, value in {**tiny.NETWORK, **tiny.QUICK, "train_mode": "supervised"}.items()]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)


def read(path):
    return json.loads(Path(path).read_text())


def test_the_images_that_fit():
    pace = Pace(examples=950, images_per_second=30.0, start_seconds=5.0)
    assert budget.images_that_fit(100.0, pace) == 2850  # 95 seconds of 30 images
    assert budget.images_that_fit(-5.0, pace) == 0


def test_a_length_is_in_epochs_where_there_are_many_and_else_in_steps():
    def length_of(images, examples=1000, batch=64):
        found = budget.length(images, examples, batch, "1 minute")
        assert found.in_words.endswith(("into 1 minute", "takes longer", "the most for any run"))
        return found

    assert length_of(20_999) == ("train_epochs", 20, 20, "20 epochs fit into 1 minute")
    few = length_of(19_999)
    assert few == ("train_steps", 312, pytest.approx(19.97, abs=0.01), "312 steps (20 epochs) fit into 1 minute")
    assert length_of(1280).in_words == "20 steps (1.3 epochs) fit into 1 minute"
    # A part of an epoch, where there is time for no more.
    assert length_of(20_000, 10**6, 64).in_words == "312 steps (0.02 epochs) fit into 1 minute"
    assert length_of(100, 64, 100)[:3] == ("train_steps", 1, 100 / 64)


def test_there_is_a_least_and_a_most():
    nothing = "next to nothing fits into 1 minute beside the start: {}, which takes longer".format
    assert budget.length(63, 10**6, 64, "1 minute")[1:] == (20, 0.00128, nothing("20 steps (0.0013 epochs)"))
    assert budget.length(0, 100, 64, "1 minute")[:2] == ("train_steps", 2)  # an epoch
    assert budget.length(0, 50, 64, "1 minute")[:2] == ("train_steps", 1)
    said = "28,025 epochs fit into 1 minute: 2,000 are trained, the most for any run"
    assert budget.length(2_802_500, 100, 64, "1 minute") == ("train_epochs", recipe.MAX_EPOCHS, recipe.MAX_EPOCHS, said)


def fitted(monkeypatch, pace, minutes, gone=0.0):
    monkeypatch.setattr(budget, "measure", lambda config, strategy, seconds: pace)
    monkeypatch.setattr(budget.time, "monotonic", lambda: 1_000.0 + gone)
    return budget.fit(Config(train_minutes=minutes), tf.distribute.get_strategy(), 1_000.0)


def test_the_time_that_is_gone_and_the_second_start_count(monkeypatch):
    pace = Pace(examples=950, images_per_second=510.0, start_seconds=40.0)
    assert fitted(monkeypatch, pace, 10.0, gone=60.0)[1:] == (255, 255, "255 epochs fit into 10 minutes (510 images/s)")
    in_a_minute = "next to nothing fits into 1 minute (510 images/s) beside the start: 2 steps (1.1 epochs), "
    assert fitted(monkeypatch, pace, 1.0, gone=18.0).in_words.startswith(in_a_minute)


def test_what_the_recipe_chose_by_the_length_is_chosen_again(tmp_path):
    tiny.coloured_images(tmp_path / "images" / "train", 40)
    given = dict(dataset="image_folder", data_dir="images", train_minutes=10.0, temperature=0.5)
    decided = subject.decide(given)
    made = decided.with_length("train_epochs", 25, "25 epochs fit")
    assert (made.config.train_epochs, made.config.train_steps, made.config.train_minutes) == (25, 0, 10.0)
    assert (made.config.warmup_epochs, made.config.checkpoint_epochs) == (2.5, 2)
    assert made.recipe_reasons["train_epochs"] == "25 epochs fit"
    kept = set(decided.choices) - {"train_epochs", "warmup_epochs", "checkpoint_epochs"}
    assert {name: made.choices[name] for name in kept} == {name: decided.choices[name] for name in kept}
    assert made.config.temperature == 0.5 and set(made.choices) == set(decided.choices)
    supervised = subject.decide({**given, "train_mode": "supervised"}).with_length("train_epochs", 50, "")
    assert (supervised.config.train_steps, supervised.config.checkpoint_epochs) == (0, 5)


def test_a_length_in_steps_leaves_nothing_that_was_chosen_by_epochs(tmp_path):
    tiny.coloured_images(tmp_path / "images" / "train", 40)
    decided = subject.decide(dict(dataset="image_folder", data_dir="images", train_minutes=10.0))
    epochs_of_warmup = 3 * decided.config.train_batch_size / decided.facts.images  # a tenth of the steps
    made = decided.with_length("train_steps", 30, "30 steps fit")
    assert made.config.train_steps == 30 and made.config.warmup_epochs == pytest.approx(epochs_of_warmup, abs=1e-4)
    assert not {"train_epochs", "checkpoint_epochs"} & set(made.choices)
    defaults = Config()
    for name in ("train_epochs", "checkpoint_epochs"):
        assert getattr(made.config, name) == getattr(defaults, name)
    assert made.config.checkpoint_steps > 0 and made.recipe_reasons["train_steps"] == "30 steps fit"


def test_a_preset_keeps_all_but_its_length():
    decided = subject.decide(dict(train_mode="supervised", train_minutes=1.0))
    before, after = decided.config.to_dict(), decided.with_length("train_epochs", 27, "").config.to_dict()
    assert after == {**before, "train_epochs": 27, "train_steps": 0}
    assert decided.with_length("train_steps", 9, "").config.to_dict() == {**before, "train_steps": 9}


@pytest.mark.parametrize(("epochs", "warns"), [(3, True), (4, False)])
def test_a_warmup_as_long_as_the_run_is_a_warning(epochs, warns, caplog):
    budget.warn_of_warmup(Config(warmup_epochs=3.0), float(epochs))
    assert ("--warmup_epochs=3 leaves none of the 3 epochs" in caplog.text) == warns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_steps=5"], "--train_minutes=1.0 contradicts --train_steps=5: give one"),
        (["--train_epochs=5"], "--train_minutes=1.0 contradicts --train_epochs=5: give one"),
        (["--mode=plan"], "--train_minutes=1.0 is measured when training begins"),
    ],
)
def test_other_lengths_are_refused(arguments, message, capfd):
    assert command("--train_minutes=1", *arguments) == 2
    assert message in capfd.readouterr().err


def test_a_run_ends_in_time_and_is_never_measured_again(monkeypatch, capfd):
    started = time.monotonic()
    assert command(*QUICK, "--train_minutes=0.05", "--model_dir=run") == 0
    assert time.monotonic() - started < 30  # 3 seconds on a machine that does nothing else
    said = capfd.readouterr().out
    assert re.search(r"fits? into 0.05 minutes \(", said)
    saved = read("run/config.json")
    steps = saved["train_steps"]
    assert saved["train_minutes"] == 0.05 and steps >= 20 and f"trained to step {steps};" in said
    monkeypatch.setattr(budget, "measure", lambda *_: pytest.fail("it was measured again"))
    assert command(*QUICK, "--train_minutes=0.05", "--model_dir=run") == 0
    assert f"already at step {steps} of {steps}" in capfd.readouterr().out
    assert command("--train_minutes=5", "--model_dir=run") == 2
    assert "--train_minutes=5.0 contradicts the run in --model_dir=run" in capfd.readouterr().err


def test_several_steps_of_a_call_are_measured_as_they_are_taken(monkeypatch):
    config = subject.resolve({**tiny.NETWORK, **tiny.QUICK, "train_mode": "supervised", "steps_per_call": 3})
    taken = []

    def several_steps(step, strategy):
        return lambda batches: taken.append(len(batches)) or [step(batch) for batch in batches]

    monkeypatch.setattr(train, "several_steps", several_steps)
    pace = budget.measure(config, tf.distribute.get_strategy(), 0.0)
    assert taken == [3, 3] and pace.examples == 1437 and pace.images_per_second > 0


def test_a_full_memory_while_measuring_is_one_line(monkeypatch, capfd):
    def full(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")

    monkeypatch.setattr(train, "make_train_step", lambda *_, **__: full)
    assert command(*QUICK, "--train_minutes=1", "--model_dir=run") == 2
    assert "no memory is left while the speed was measured: lower --train_batch_size" in capfd.readouterr().err
    assert not Path("run").exists()


@pytest.mark.slow
def test_measuring_leaves_no_trace_in_the_run(monkeypatch):
    monkeypatch.setattr(budget, "images_that_fit", lambda *_: 1437)
    assert command(*QUICK, "--train_minutes=0.05", "--model_dir=measured") == 0
    assert command(*QUICK, "--train_steps=89", "--model_dir=given") == 0
    measured, given = tiny.saved_values("measured"), tiny.saved_values("given")
    assert measured.keys() == given.keys()
    for key, value in given.items():
        np.testing.assert_array_equal(measured[key], value, err_msg=key)
