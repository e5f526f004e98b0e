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


def test_the_epochs_that_fit():
    pace = Pace(examples=950, images_per_second=30.0, start_seconds=5.0)
    assert budget.epochs_that_fit(100.0, pace) == 3  # 95 seconds of 30 images
    assert budget.epochs_that_fit(99.0, pace) == 2
    assert budget.epochs_that_fit(10.0, pace) == 0
    assert budget.epochs_that_fit(-5.0, pace) == 0


def fitted(monkeypatch, pace, minutes, gone=0.0):
    monkeypatch.setattr(budget, "measure", lambda config, strategy, seconds: pace)
    monkeypatch.setattr(budget.time, "monotonic", lambda: 1_000.0 + gone)
    return budget.fit(Config(train_minutes=minutes), tf.distribute.get_strategy(), 1_000.0)


def test_the_time_that_is_gone_and_the_second_start_count(monkeypatch):
    pace = Pace(examples=950, images_per_second=510.0, start_seconds=40.0)
    assert fitted(monkeypatch, pace, 10.0, gone=60.0) == (255, "255 epochs fit into 10 minutes (510 images/s)")
    assert fitted(monkeypatch, pace, 1.0, gone=18.0)[1] == "1 epoch fits into 1 minute (510 images/s)"


def test_there_is_a_least_and_a_most(monkeypatch):
    slow, fast = Pace(10_000, 3.2, 10.0), Pace(100, 5_000.0, 10.0)
    said = "no whole epoch fits into 10 minutes (3 images/s) beside the start: 1 epoch is trained, which takes longer"
    assert fitted(monkeypatch, slow, 10.0) == (1, said)
    said = "28,025 epochs fit into 10 minutes (5,000 images/s): 2,000 are trained, the most for any run"
    assert fitted(monkeypatch, fast, 10.0) == (recipe.MAX_EPOCHS, said)


def test_what_the_recipe_chose_by_the_length_is_chosen_again(tmp_path):
    tiny.coloured_images(tmp_path / "images" / "train", 40)
    given = dict(dataset="image_folder", data_dir="images", train_minutes=10.0, temperature=0.5)
    decided = subject.decide(given)
    made = decided.with_epochs(2, "2 epochs fit")
    assert (made.config.train_epochs, made.config.train_steps, made.config.train_minutes) == (2, 0, 10.0)
    assert (made.config.warmup_epochs, made.config.checkpoint_epochs) == (0.2, 1)
    assert made.recipe_reasons["train_epochs"] == "2 epochs fit"
    kept = set(decided.choices) - {"train_epochs", "warmup_epochs", "checkpoint_epochs"}
    assert {name: made.choices[name] for name in kept} == {name: decided.choices[name] for name in kept}
    assert made.config.temperature == 0.5 and list(made.choices) == list(decided.choices)
    supervised = subject.decide({**given, "train_mode": "supervised"}).with_epochs(50, "")
    assert (supervised.config.train_steps, supervised.config.checkpoint_epochs) == (0, 5)


def test_a_preset_keeps_all_but_its_length():
    decided = subject.decide(dict(train_mode="supervised", train_minutes=1.0))
    before, after = decided.config.to_dict(), decided.with_epochs(7, "").config.to_dict()
    assert after == {**before, "train_epochs": 7, "train_steps": 0}


@pytest.mark.parametrize(("epochs", "warns"), [(3, True), (4, False)])
def test_a_warmup_as_long_as_the_run_is_a_warning(epochs, warns, caplog):
    budget.warn_of_warmup(Config(warmup_epochs=3.0, train_epochs=epochs))
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
    steps = 1437 * saved["train_epochs"] // 16 + 1
    assert saved["train_minutes"] == 0.05 and saved["train_steps"] == 0 and f"trained to step {steps};" in said
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
    monkeypatch.setattr(budget, "epochs_that_fit", lambda seconds, pace: 1)
    assert command(*QUICK, "--train_minutes=0.05", "--model_dir=measured") == 0
    assert command(*QUICK, "--train_epochs=1", "--model_dir=given") == 0
    measured, given = tiny.saved_values("measured"), tiny.saved_values("given")
    assert measured.keys() == given.keys()
    for key, value in given.items():
        np.testing.assert_array_equal(measured[key], value, err_msg=key)
