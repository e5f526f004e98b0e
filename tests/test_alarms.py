"""Alarms: each is raised by the history that calls for it, and by no healthy one."""

import pytest

import alarms

RUN = alarms.Run(total_steps=1000, warmup_steps=100, held_out=1000, raw_pixels=0.5)
HEALTHY = [0.35, 0.45, 0.52, 0.56, 0.60, 0.63, 0.66, 0.68, 0.69, 0.69, 0.69]  # at steps 0, 100, ..., 1000


def history(accuracies=HEALTHY, **more):
    """Probes at even distances over the run, healthy where `more` says nothing else."""
    made = []
    for i, accuracy in enumerate(accuracies):
        step = i * RUN.total_steps // (len(accuracies) - 1)
        found = dict(step=step, spread_h=0.4, spread_z=0.8, rank_h=25.0, rank_z=30.0, knn=accuracy, linear=accuracy)
        if step:
            found |= dict(contrastive_loss=11.0, chance_loss=12.5)
        made.append(found | more)
    return made


def raised(probes, run=RUN):
    """The names of the alarms in the order in which they are first raised, each with the step of that."""
    said = {}
    for count in range(1, len(probes) + 1):
        for alarm in alarms.find(probes[:count], run):
            said.setdefault(alarm.name, probes[count - 1]["step"])
    return said


def text(probes, name, run=RUN):
    return next(alarm.text for alarm in alarms.find(probes, run) if alarm.name == name)


def test_a_healthy_run_says_nothing():
    assert raised(history()) == {}
    assert alarms.find([], RUN) == []


def test_a_loss_at_chance_is_said_after_the_warmup():
    probes = history(contrastive_loss=12.5)
    assert raised(probes) == {"at_chance": 300}  # The steps before 100 belong to the warmup.
    assert "12.50" in text(probes, "at_chance") and "--learning_rate" in text(probes, "at_chance")
    assert raised(history(contrastive_loss=12.49)) == {}


@pytest.mark.parametrize("sign", [dict(spread_z=0.001), dict(spread_h=0.01), dict(rank_z=1.2), dict(rank_h=1.0)])
def test_collapsed_features_are_said_after_the_warmup(sign):
    probes = history(**sign)
    assert raised(probes) == {"collapsed": 300}
    called = "features h" if "_h" in next(iter(sign)) else "projections z"
    assert called in text(probes, "collapsed") and "lower --learning_rate" in text(probes, "collapsed")


def test_one_bad_probe_that_the_run_recovers_from_is_no_alarm():
    probes = history()
    probes[4] |= dict(contrastive_loss=13.0, spread_z=0.001)
    assert raised(probes) == {}
    probes[5] |= dict(contrastive_loss=13.0, spread_z=0.001)
    assert raised(probes) == {"at_chance": 500, "collapsed": 500}


def test_the_weaker_views_of_the_advice_are_weaker_than_those_of_the_run():
    recipes = RUN._replace(crop_min_area=0.25, color_jitter_strength=0.4)
    assert recipes.weaker_views == "weaker views (--color_jitter_strength=0.1 --grayscale_probability=0)"
    without_colours = recipes._replace(color_jitter_strength=0.1)
    of_grey_images = recipes._replace(colour=False)
    assert without_colours.weaker_views == of_grey_images.weaker_views == "weaker views (--crop_min_area=0.5)"
    said = text(history(contrastive_loss=13.0), "at_chance", without_colours)
    assert without_colours.weaker_views in said and recipes.weaker_views not in said


def test_features_no_better_than_raw_pixels_are_said_at_half_and_at_the_end():
    probes = history([0.1, 0.3, 0.5, 0.49, 0.50, 0.50, 0.51, 0.50, 0.51, 0.50, 0.51])
    assert raised(probes) == {"no_better_at_half": 500, "no_better_at_end": 1000}
    assert "on the features gives 51.0%, on raw pixels 50.0% (1,000 images" in text(probes, "no_better_at_end")
    assert "--train_mode=supervised" in text(probes, "no_better_at_end")
    assert "raw pixels" in text(probes[:6], "no_better_at_half")
    # It is flat too. More epochs would not help, so nobody is told to train longer.
    assert "epochs" not in text(probes, "no_better_at_end")
    rising = history([0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.44, 0.47, 0.5])
    assert "more --train_epochs or more images" in text(rising, "no_better_at_end")


def test_a_run_with_few_probes_is_not_called_flat_nor_warned_of_right_before_its_end():
    assert raised(history([0.3, 0.7, 0.7, 0.7])) == {}
    assert "no_better_at_half" not in raised(history([0.3, 0.3])[:1] + history([0.3] * 6)[-2:])


def test_features_no_better_than_the_untrained_network_are_said():
    probes = history([0.64, 0.56, 0.57, 0.58, 0.59, 0.61, 0.62, 0.64, 0.64, 0.64, 0.65])
    assert set(raised(probes)) == {"no_better_at_half", "no_better_at_end"}
    assert "on the untrained network 64.0%" in text(probes, "no_better_at_end")
    started = RUN._replace(starts_from="the network of --checkpoint")
    assert "on the network of --checkpoint 64.0%" in text(probes, "no_better_at_end", started)


def test_features_count_by_the_better_of_knn_and_a_linear_classifier():
    flat = [0.1, 0.3, 0.5, 0.49, 0.50, 0.50, 0.51, 0.50, 0.51, 0.50, 0.51]
    assert set(raised(history(flat, linear=0.6)[1:])) == {"flat"}  # kNN is no better than raw pixels, but linear is.
    said = text(history(flat, linear=0.515)[1:], "no_better_at_end")
    assert "a linear classifier on the features gives 51.5%, kNN on raw pixels 50.0% (1,000" in said
    # The untrained network is given the better way too.
    untrained = "kNN on the features gives 66.0%, a linear classifier on the untrained network 65.0%"
    probes = history([0.4, 0.6, 0.66])
    probes[0] |= dict(linear=0.65)
    assert untrained in text(probes, "no_better_at_end")


def test_the_noise_of_few_images_counts():
    few = RUN._replace(held_out=100)  # The standard error is 5 points.
    assert "no_better_at_end" in raised(history([0.1, 0.3, 0.54]), few)
    assert "no_better_at_end" not in raised(history([0.1, 0.3, 0.54]), RUN)
    assert alarms.noise(0.5, 100) == pytest.approx(0.05)


def test_too_few_images_are_not_compared():
    probes = history([0.1, 0.2, 0.2])
    assert "no_better_at_end" in raised(probes, RUN._replace(held_out=100))
    assert not {"no_better_at_half", "no_better_at_end"} & set(raised(probes, RUN._replace(held_out=99)))


def test_on_too_few_images_nothing_is_called_flat():
    probes = history([0.2, 0.5, 0.55, 0.6, 0.58, 0.62, 0.6, 0.63, 0.61, 0.62, 0.63])
    assert "flat" in raised(probes, RUN._replace(held_out=100))
    assert raised(probes, RUN._replace(held_out=99)) == {}


def test_a_run_that_recovers_after_half_is_not_condemned_at_the_end():
    probes = history([0.3, 0.35, 0.4, 0.42, 0.44, 0.48, 0.55, 0.62, 0.66, 0.66, 0.66])
    assert set(raised(probes)) == {"no_better_at_half", "still_rising"}


def test_an_accuracy_that_still_rises_at_the_end_wants_more_epochs():
    probes = history([0.3, 0.4, 0.45, 0.5, 0.55, 0.58, 0.6, 0.62, 0.65, 0.68, 0.71])
    assert raised(probes) == {"still_rising": 1000}
    assert "rose by 9.0 points since step 700, to 71.0%" in text(probes, "still_rising")
    assert "more --train_epochs will help" in text(probes, "still_rising")


def test_an_accuracy_that_is_flat_names_the_step_since_which():
    probes = history([0.3, 0.5, 0.6, 0.695, 0.70, 0.70, 0.69, 0.70, 0.70, 0.70, 0.70])
    assert raised(probes) == {"flat": 1000}
    assert "flat since step 300 of 1,000 (69.5% then, 70.0% now)" in text(probes, "flat")


def test_without_labels_the_loss_and_the_collapse_are_judged_alone():
    probes = history(contrastive_loss=13.0, rank_z=1.0)
    for found in probes:
        del found["knn"], found["linear"]
    unlabelled = RUN._replace(held_out=0, raw_pixels=None)
    assert set(raised(probes, unlabelled)) == {"at_chance", "collapsed"}


def test_a_run_that_was_not_probed_from_its_beginning_is_compared_with_raw_pixels():
    probes = history([0.3, 0.4, 0.45, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])[3:]
    assert "raw pixels" in text(probes, "no_better_at_end")


@pytest.mark.parametrize(
    ("name", "step", "outdated"),
    [
        ("no_better_at_end", 100, False),
        ("still_rising", 50, True),
        ("flat", 50, True),
        ("no_better_at_half", 50, False),
        ("no_better_at_half", 25, True),
        ("collapsed", 25, False),
    ],
)
def test_a_longer_run_is_judged_anew(name, step, outdated):
    assert alarms.outdated(name, step, alarms.Run(total_steps=100, warmup_steps=10)) == outdated
