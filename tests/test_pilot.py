"""Which views suit the images: tried before a new pretraining run, judged by labels, then fixed."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from test_run import command

import budget
import pilot
import recipe
import subject
import train
from pilot import LARGE_CROPS, SMALL_CROPS, WEAK_COLOURS, Trial, Trials
from recipe import Facts

ONE_STAGE = True  # see conftest.py
FACTS = Facts(1000, 40, 10, 32, 32, True)
USUAL = {"color_jitter_strength": 0.5, "grayscale_probability": 0.2, "crop_min_area": 0.3}
LOG_40, LOG_62, LOG_70 = (math.log(probability) for probability in (0.4, 0.62, 0.7))
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


def tried(facts=FACTS, chosen=USUAL, **given):
    return pilot.variants(subject.resolve({"dataset": "mnist", **given}), facts, chosen)


def test_there_must_be_something_to_try_and_labels_to_judge_it():
    assert tried() == [WEAK_COLOURS, LARGE_CROPS]
    assert tried(facts=FACTS._replace(colour=False)) == [SMALL_CROPS]
    assert tried(chosen={"grayscale_probability", "crop_min_area"}) == [LARGE_CROPS]
    assert tried(chosen={"grayscale_probability", "color_jitter_strength"}) == [WEAK_COLOURS]
    assert not tried(chosen={"grayscale_probability"})
    assert not tried(facts=None)
    assert not tried(facts=FACTS._replace(labelled=19)) and tried(facts=FACTS._replace(labelled=20))
    assert not tried(facts=FACTS._replace(labelled=0, classes=0))
    assert not tried(view_pilot=False)
    assert not tried(train_mode="supervised")


def test_what_is_tried_differs_from_what_the_recipe_chooses():
    for facts in (FACTS, FACTS._replace(images=50_000), FACTS._replace(height=16), FACTS._replace(colour=False)):
        chosen = recipe.values(recipe.choose(facts, {"train_mode": "pretrain"}))
        variants = tried(facts, chosen)
        assert variants
        for variant in variants:
            assert all(chosen[name] != value for name, value in variant.values.items())


def test_each_training_sees_a_share_of_the_runs_images_and_not_too_many():
    assert [pilot.trial_steps(1000, 10), pilot.trial_steps(5, 10), pilot.trial_steps(10**6, 250)] == [80, 1, 80]
    assert [pilot.trainings(what) for what in ([], [LARGE_CROPS], [WEAK_COLOURS, LARGE_CROPS])] == [0, 2, 3]
    for trained in (0, 2, 3):
        for affordable in (1_000.0, 116_000.0, 300_000.0, 1e7):
            run = pilot.images_of_run(affordable, trained)
            assert run + trained * min(pilot.SHARE * run, pilot.MOST_IMAGES) == pytest.approx(affordable)


def test_a_trial_is_a_whole_run():
    def trial_of(**given):
        config = subject.resolve({"dataset": "mnist", "train_batch_size": 10, **given})
        made = pilot.shortened(config, images=100)
        return made.train_steps, made.warmup_epochs

    assert trial_of(train_epochs=100, warmup_epochs=20.0) == (80, 0.8)  # 8 steps of 80
    assert trial_of(train_steps=500, warmup_epochs=0.2) == (40, 0.2)


def test_a_variant_is_taken_where_it_is_better_beyond_the_noise():
    assert Trial(LARGE_CROPS, -1.0, -0.8, 0.01).is_better
    assert not Trial(LARGE_CROPS, -1.0, -0.8, 0.03).is_better  # labels may have made that
    assert not Trial(LARGE_CROPS, -1.0, -0.95, 0.0).is_better  # another seed may have made that
    assert not Trial(LARGE_CROPS, -0.8, -1.0, 1.0).is_better


def test_the_reason_says_what_was_found():
    better, worse = Trial(WEAK_COLOURS, LOG_40, LOG_70, 0.0), Trial(LARGE_CROPS, LOG_70, LOG_62, 1.0)
    config = subject.resolve({"dataset": "mnist", **USUAL})
    choices = pilot.choices(Trials(40, 100, (better, worse)), config)
    assert recipe.values(choices) == {**WEAK_COLOURS.values, "crop_min_area": 0.3}
    assert {name: choice.reason for name, choice in choices.items()} == {
        "color_jitter_strength": "tried for 40 steps: the right class gets 70.0%, with usual changes of colour 40.0%",
        "grayscale_probability": "tried for 40 steps: the right class gets 70.0%, with usual changes of colour 40.0%",
        "crop_min_area": "tried for 40 steps: the right class gets 70.0%, with large crops 62.0%",
    }
    assert Trials(40, 100, (better, worse)).in_words() == (
        "probability of the right class of 100 images after 40 steps: 40.0% with usual changes of colour, 70.0% with "
        "weak ones, which are taken; 70.0% with usual crops, which are kept, 62.0% with large ones"
    )


def test_the_time_of_the_trials_is_no_time_of_the_run():
    pace = budget.Pace(examples=100, images_per_second=122.2, start_seconds=1.0)
    assert budget.images_that_fit(1000.0, pace) == 116_090
    assert budget.images_that_fit(1000.0, pace, trainings=2) == pytest.approx(100_078, abs=1)


@pytest.fixture
def seen(monkeypatch):
    """The views and the run of each trial, in their order."""
    made = []
    prepare = pilot.preparation.prepare

    def watched(config, strategy):
        run = prepare(config, strategy)
        made.append(({name: getattr(config, name) for name in USUAL}, run))
        return run

    monkeypatch.setattr(pilot.preparation, "prepare", watched)
    return made


def trials_of(images, **given):
    """All trials of a quick run on `images`."""
    config = subject.resolve({
        **tiny.NETWORK, **tiny.QUICK, "dataset": "image_folder", "data_dir": images, "train_batch_size": 10,
        "train_steps": 125, **USUAL, **given,
    })  # fmt: skip
    facts = FACTS._replace(images=30)
    return pilot.try_views(config, facts, [WEAK_COLOURS, LARGE_CROPS], tf.distribute.get_strategy())


def test_a_trial_trains_and_writes_nothing(images, seen):
    trials = trials_of("images")
    assert (trials.steps, trials.images) == (10, 30)
    assert [trial.variant for trial in trials.trials] == [WEAK_COLOURS, LARGE_CROPS]
    assert len(seen) == 3
    for _, run in seen:
        assert int(run.optimizer.iterations) == run.schedule.total_steps == 10
        assert float(run.schedule(10)) == 0.0
    assert not Path("runs").exists()


@pytest.mark.parametrize("colours_win", [True, False])
def test_a_variant_that_wins_is_part_of_the_next(images, seen, monkeypatch, colours_win):
    usual = -np.linspace(1.0, 3.0, 30)  # the logarithms of the images' probabilities
    weak = usual + (0.5 if colours_win else 0.05)
    large = usual + np.where(np.arange(30) < 16, 2.0, -1.0)
    found = iter([usual, weak, large])
    monkeypatch.setattr(pilot.probe, "log_probabilities", lambda *_: next(found))
    colours, crops = trials_of("images").trials
    best = {**USUAL, **(WEAK_COLOURS.values if colours_win else {})}
    assert [views for views, _ in seen] == [USUAL, {**USUAL, **WEAK_COLOURS.values}, {**best, "crop_min_area": 0.5}]
    assert (colours.before, colours.after) == pytest.approx((-2.0, -1.5 if colours_win else -1.95))
    assert colours.p_value < 1e-6
    assert (crops.before, crops.after) == pytest.approx((colours.after if colours_win else -2.0, -2.0 + 0.6))


def test_views_that_make_no_difference_are_no_better(images, monkeypatch):
    monkeypatch.setattr(pilot.probe, "log_probabilities", lambda *_: np.full(30, -1.0))
    assert [(trial.p_value, trial.is_better) for trial in trials_of("images").trials] == [(1.0, False), (1.0, False)]


def test_too_few_labels_of_a_class_are_not_tried(images):
    assert trials_of("images", labels_per_class=1) is None


def test_a_trial_of_few_steps_tells_nothing_and_is_left_out(images, seen):
    assert trials_of("images", train_steps=118) is None and not seen  # 9.44 steps


def test_a_new_run_takes_what_was_found_and_keeps_it(images, monkeypatch, capfd):
    found = Trials(4, 30, (Trial(WEAK_COLOURS, LOG_40, LOG_70, 0.0), Trial(LARGE_CROPS, LOG_70, LOG_62, 1.0)))
    monkeypatch.setattr(pilot, "try_views", lambda *_: found)
    assert command(*QUICK, "--mode=train", "--model_dir=run") == 0
    said = capfd.readouterr().out
    assert found.in_words() in said and re.search(r"--color_jitter_strength +0\.1 +tried for 4 steps", said)
    config = json.loads(Path("run/config.json").read_text())
    assert {name: config[name] for name in USUAL} == {**WEAK_COLOURS.values, "crop_min_area": 0.3}
    assert config["recipe_reasons"]["color_jitter_strength"].startswith("tried for 4 steps: the right class gets 70.0%")
    monkeypatch.setattr(pilot, "try_views", lambda *_: pytest.fail("it was tried again"))
    assert command(*QUICK, "--mode=train", "--model_dir=run") == 0
    monkeypatch.setattr(train, "train", lambda *_: 1)
    for flag in ("--view_pilot=False", "--recipe=paper"):
        assert command(*QUICK, "--mode=train", "--train_steps=1", f"--model_dir=other{flag[:9]}", flag) == 0


def test_a_flag_that_is_given_is_not_tried(images, monkeypatch):
    asked = []
    monkeypatch.setattr(pilot, "try_views", lambda config, facts, variants, strategy: asked.append(variants))
    monkeypatch.setattr(train, "train", lambda *_: 1)
    for flag in ("--color_jitter_strength=0.3", "--crop_min_area=0.4"):
        assert command(*QUICK, "--mode=train", f"--model_dir=other{flag[:9]}", flag) == 0
    assert asked == [[LARGE_CROPS], [WEAK_COLOURS]]
