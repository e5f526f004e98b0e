"""How much views change colours: tried twice before a new pretraining run, judged by labels, then fixed."""

import json
import re
from pathlib import Path

import pytest
import tensorflow as tf
import tiny
from test_run import command

import budget
import pilot
import recipe
import subject
import train
from pilot import Trials
from recipe import Facts

ONE_STAGE = True  # see conftest.py
FACTS = Facts(1000, 40, 10, 32, 32, True)
USUAL = {"color_jitter_strength": 0.5, "grayscale_probability": 0.2}
# A network that starts within seconds.
QUICK = [
    f"--{name}={value}"
    for name, value in {
        **tiny.NETWORK, **tiny.QUICK, "train_batch_size": 10, "train_steps": 3, "eval_every_epochs": -1,
        "dataset": "image_folder", "data_dir": "images",
    }.items()
]  # fmt: skip


@pytest.fixture
def images(tmp_path, monkeypatch):
    """30 coloured images of two classes, in the folder images/ of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    tiny.coloured_splits(tmp_path)


def possible(facts=FACTS, chosen=recipe.WEAK_COLOURS, **given):
    return pilot.is_possible(subject.resolve({"dataset": "mnist", **given}), facts, set(chosen))


def test_there_must_be_something_to_try_and_labels_to_judge_it():
    assert possible()
    assert not possible(facts=None)
    assert not possible(facts=FACTS._replace(colour=False))
    assert not possible(facts=FACTS._replace(labelled=19)) and possible(facts=FACTS._replace(labelled=20))
    assert not possible(facts=FACTS._replace(labelled=0, classes=0))
    assert not possible(chosen={"grayscale_probability"})
    assert not possible(color_pilot=False)
    assert not possible(train_mode="supervised")


def test_both_trials_see_a_share_of_the_runs_images_and_not_too_many():
    assert [pilot.trial_steps(1000, 10), pilot.trial_steps(5, 10), pilot.trial_steps(10**6, 250)] == [80, 1, 80]
    for affordable in (1_000.0, 116_000.0, 300_000.0, 1e7):
        run = pilot.images_of_run(affordable)
        assert run + 2 * min(pilot.SHARE * run, pilot.MOST_IMAGES) == pytest.approx(affordable)


def test_weak_colours_are_taken_where_they_are_better_beyond_the_noise():
    # 100 images: standard errors of 5.0 and 4.8 points, 6.9 for the difference.
    assert Trials(40, 100, 0.5, 0.65).weak_is_better
    assert not Trials(40, 100, 0.5, 0.63).weak_is_better
    assert not Trials(40, 100, 0.6, 0.4).weak_is_better
    assert Trials(40, 10_000, 0.5, 0.52).weak_is_better


def test_the_reason_says_what_was_found():
    weak, usual = pilot.choices(Trials(40, 100, 0.41, 0.7)), pilot.choices(Trials(40, 100, 0.7, 0.41))
    assert recipe.values(weak) == recipe.WEAK_COLOURS and recipe.values(usual) == USUAL
    reasons = {choice.reason for choice in weak.values()}
    assert reasons == {"tried for 40 steps: kNN 70.0%, with usual changes of colour 41.0%"}
    reasons = {choice.reason for choice in usual.values()}
    assert reasons == {"tried for 40 steps: kNN 70.0%, with weak changes of colour 41.0%"}
    said = Trials(40, 100, 0.41, 0.7).in_words()
    assert said.endswith("41.0% with the usual changes of colour and 70.0% with weak ones (100 labelled images): "
                         "weak ones are taken")  # fmt: skip


def test_the_usual_colours_are_those_of_the_recipe():
    chosen = recipe.values(recipe.choose(FACTS, {"train_mode": "pretrain"}))
    assert {name: chosen[name] for name in USUAL} == USUAL


def test_the_time_of_the_trials_is_no_time_of_the_run():
    pace = budget.Pace(examples=100, images_per_second=122.2, start_seconds=1.0)
    assert budget.epochs_that_fit(1000.0, pace) == 1160  # of 116,090 images
    assert budget.epochs_that_fit(1000.0, pace, tries_colours=True) == 1000


def trials_of(images, **given):
    """Both trials of a quick run on `images`, and the views that they had."""
    config = subject.resolve({
        **tiny.NETWORK, **tiny.QUICK, "dataset": "image_folder", "data_dir": images, "train_batch_size": 10,
        "train_steps": 50, **given,
    })  # fmt: skip
    return pilot.try_colours(config, tf.distribute.get_strategy())


def test_a_trial_trains_and_writes_nothing(images, monkeypatch):
    seen = []
    prepare = pilot.preparation.prepare

    def watched(config, strategy):
        run = prepare(config, strategy)
        seen.append((config.color_jitter_strength, config.grayscale_probability, run))
        return run

    monkeypatch.setattr(pilot.preparation, "prepare", watched)
    trials = trials_of("images", color_jitter_strength=0.5, grayscale_probability=0.2)
    assert (trials.steps, trials.images) == (4, 30)
    assert [values[:2] for values in seen] == [(0.5, 0.2), (0.1, 0.0)]
    assert [int(values[2].optimizer.iterations) for values in seen] == [4, 4]
    assert not Path("runs").exists()


def test_too_few_labels_of_a_class_are_not_tried(images):
    assert trials_of("images", labels_per_class=1) is None


def test_a_new_run_takes_what_was_found_and_keeps_it(images, monkeypatch, capfd):
    found = Trials(4, 30, 0.5, 0.9)
    monkeypatch.setattr(pilot, "try_colours", lambda *_: found)
    assert command(*QUICK, "--mode=train", "--model_dir=run") == 0
    said = capfd.readouterr().out
    assert found.in_words() in said and re.search(r"--color_jitter_strength +0\.1 +tried for 4 steps", said)
    config = json.loads(Path("run/config.json").read_text())
    assert (config["color_jitter_strength"], config["grayscale_probability"]) == (0.1, 0.0)
    assert config["recipe_reasons"]["color_jitter_strength"].startswith("tried for 4 steps: kNN 90.0%")
    monkeypatch.setattr(pilot, "try_colours", lambda *_: pytest.fail("it was tried again"))
    assert command(*QUICK, "--mode=train", "--model_dir=run") == 0
    monkeypatch.setattr(train, "train", lambda *_: 1)
    for flag in ("--color_pilot=False", "--color_jitter_strength=0.3", "--recipe=paper"):
        assert command(*QUICK, "--mode=train", "--train_steps=1", f"--model_dir=other{flag[:9]}", flag) == 0
