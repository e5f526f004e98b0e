"""The probe: what it finds is true, and training does not notice it."""

import contextlib
import dataclasses
import io
import json
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import command

import augment
import checkpoint
import data
import evaluate
import preparation
import probe
import quality
import run_folder
import sources
import subject
import tasks
import train
from errors import UserError

ONE_STAGE = True  # see conftest.py
# Every other step of 90 in an epoch is probed.
PROBED = dict(tiny.PRETRAIN, image_size=8, eval_every_epochs=0.02, checkpoint_steps=2)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """The model_dir of four steps with probes at 0, 2 and 4, trained from the command line. Only to be read."""
    folder = tmp_path_factory.mktemp("probed") / "run"
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        flags = [f"--{name}={value}" for name, value in PROBED.items()]
        assert command("--mode=train", *flags, "--train_steps=4", f"--model_dir={folder}") == 0
    (folder / "said").write_text(said.getvalue())
    return folder


def history_in(folder):
    return json.loads((folder / "probe.json").read_text())


def test_training_does_not_notice_the_probes(probed, tmp_path):
    given = dict(PROBED, eval_every_epochs=-1.0)
    tiny.train_run(**given, model_dir=str(tmp_path), train_steps=4)
    assert not (tmp_path / "probe.json").exists()
    with_probes, without = tiny.saved_values(probed), tiny.saved_values(tmp_path)
    assert with_probes.keys() == without.keys()
    for name, value in without.items():
        np.testing.assert_array_equal(with_probes[name], value, err_msg=name)


def test_a_run_is_probed_before_its_first_step_at_the_interval_and_at_the_end(probed):
    assert [found["step"] for found in history_in(probed)["probes"]] == [0, 2, 4]


def test_what_a_probe_finds_is_what_a_look_at_the_checkpoint_finds(probed):
    model = tasks.restore_network(checkpoint.Weights(str(probed)))
    source = sources.load("digits", "train")
    history = history_in(probed)
    crops, labels = probe.labelled_crops(source, 8, 384)
    assert history["images"] == 512 and history["held_out"] == len(labels) == 384
    h = model(tf.constant(crops / np.float32(255)), training=False).h.numpy()
    last = history["probes"][-1]
    assert last["knn"] == pytest.approx(probe.accuracies(h, labels, probe.folds(labels))["knn"], abs=2 / 384)
    assert history["raw_pixels"] == probe.pixel_accuracy(crops, labels, probe.folds(labels)) > 0.8
    assert {"linear", "alignment", "uniformity", "spread_h", "spread_z", "rank_h", "rank_z"} < set(last)


def test_the_loss_and_its_chance_are_means_since_the_probe_before(probed):
    first, second, third = history_in(probed)["probes"]
    assert "contrastive_loss" not in first
    events = EventAccumulator(str(probed / "train")).Reload()

    def scalars(name):
        return [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(name)]

    losses, chances = scalars("train/contrastive_loss"), np.array(scalars("train/contrastive_chance"))
    assert second["contrastive_loss"] == pytest.approx(np.mean(losses[:2]), rel=1e-5)
    assert third["contrastive_loss"] == pytest.approx(np.mean(losses[2:]), rel=1e-5)
    assert third["chance_loss"] == pytest.approx(np.mean(-2 * np.log(chances[2:])), rel=1e-5)
    assert scalars("probe/knn") == pytest.approx([found["knn"] for found in history_in(probed)["probes"]])


def eye_on(source, model_dir, strategy=None, step=None, **more):
    """A probe of a small new network, without any training, and the network's encoder."""
    strategy = strategy or tf.distribute.get_strategy()
    config = tiny.resolve(**{**PROBED, "model_dir": str(model_dir), **more})
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = tasks.network(config, 0)
    view = augment.crop_and_flip(8)
    return probe.Probe(config, source, model, {"view_1": view, "view_2": view}, 4, 0, step, strategy), model.encoder


@pytest.mark.slow
def test_replicas_find_what_one_device_finds(mirrored, tmp_path):
    source = sources.load("digits", "train[:100]")
    one, _ = eye_on(source, tmp_path)
    several, _ = eye_on(source, tmp_path, mirrored(2))
    expected, found = one.look(0), several.look(0)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name


def test_a_run_without_a_terminal_says_each_probe_and_each_alarm_once(probed):
    said = (probed / "said").read_text().splitlines()
    probes = [line for line in said if line.startswith("pretrain: probe at step ")]
    raw = history_in(probed)["raw_pixels"]
    assert len(probes) == 3 and all(f"(raw pixels {raw:.1%}), linear " in line for line in probes)
    last = history_in(probed)["probes"][-1]
    assert any(line.startswith("pretrain: step 4 of 4, loss ") and "kNN " in line for line in said)
    assert f"probe at step 4: kNN {last['knn']:.1%} " in probes[-1]
    named = [(alarm["name"], alarm["step"]) for alarm in history_in(probed)["alarms"]]
    assert {("no_better_at_half", 2), ("no_better_at_end", 4)} <= set(named)
    alarms = [line for line in said if line.startswith("pretrain: alarm: ")]
    assert len(alarms) == len(named) == len({name for name, _ in named})
    assert any("pretraining has not paid: " in line and " on the features gives " in line for line in alarms)


def test_a_run_that_goes_on_keeps_its_history_up_to_its_step(probed, tmp_path, capfd):
    run = tmp_path / "run"
    tiny.borrow(str(probed), run)
    history = history_in(run)
    history["probes"].append({**history["probes"][-1], "step": 6})  # A probe whose checkpoint was never written.
    history["alarms"].append({"step": 6, "name": "flat", "text": "flat"})
    (run / "probe.json").write_text(json.dumps(history))
    decided = tiny.train_run(**PROBED, model_dir=str(run), train_steps=5, knn_neighbors=0)
    after = history_in(run)
    assert [found["step"] for found in after["probes"]] == [0, 2, 4, 5]
    assert after["probes"][:3] == history["probes"][:3] and after["raw_pixels"] == history["raw_pixels"]
    said = capfd.readouterr().err
    assert "probe at step 5: kNN " in said and "probe at step 0" not in said
    # What was said at the end and at half of four steps is no longer true of five.
    assert "pretraining has not paid" in said
    steps = {alarm["name"]: alarm["step"] for alarm in after["alarms"]}
    assert steps["no_better_at_end"] == 5 and "no_better_at_half" not in steps
    assert tiny.evaluated(decided)["alarms"] == [alarm["text"] for alarm in after["alarms"]]
    assert json.loads((run / "result.json").read_text())["alarms"][-1] == after["alarms"][-1]["text"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", ""])
def test_a_damaged_history_is_one_line_and_costs_no_evaluation(content, tmp_path, caplog):
    (tmp_path / "probe.json").write_text(content)
    with pytest.raises(UserError, match=r"probe.json is damaged: remove it, and the run goes on with a new one$"):
        eye_on(sources.load("digits", "train[:50]"), tmp_path, step=1)
    assert evaluate.probe_history(str(tmp_path)) is None
    assert "the alarms of the run are left out: " in caplog.text


def test_a_run_whose_labels_have_changed_has_a_new_history(tmp_path):
    source = sources.load("digits", "train[:50]")
    unlabelled = dataclasses.replace(source, labels=np.full(50, -1, np.int32))
    without_labels, _ = eye_on(unlabelled, tmp_path)
    without_labels.look(0)
    eye, _ = eye_on(source, tmp_path, step=2)
    assert eye.history.probes == [] and eye.history.held_out == 49  # One digit is there once.
    eye.look(4)  # The last step, where the probes are compared.
    assert eye.in_short().startswith("kNN ")


def test_a_run_that_was_probed_in_another_way_has_a_new_history(tmp_path):
    source = sources.load("digits", "train[:50]")
    eye, _ = eye_on(source, tmp_path)
    eye.look(0)
    assert eye_on(source, tmp_path, step=2)[0].history.probes
    kept = json.loads((tmp_path / probe.FILE).read_text())
    kept["raw_pixels"] = 2.0
    (tmp_path / probe.FILE).write_text(json.dumps({name: value for name, value in kept.items() if name != "measure"}))
    again = eye_on(source, tmp_path, step=2)[0].history
    assert again.probes == [] and again.raw_pixels < 1


def test_a_checkpoint_follows_the_probe_of_its_step(probed, tmp_path, monkeypatch):
    """Where a probe is interrupted, the run goes on from before it, and the probe is not missing."""
    run = tmp_path / "run"
    tiny.borrow(str(probed), run)

    def interrupted(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe.Probe, "look", interrupted)
    with pytest.raises(KeyboardInterrupt, match="at step 5: the same command goes on from step 4"):
        tiny.train_run(**PROBED, model_dir=str(run), train_steps=5)


def test_a_single_image_is_not_probed(tmp_path):
    config = tiny.resolve(**PROBED, model_dir=str(tmp_path))
    run = types.SimpleNamespace(source=tiny.numbered(1))
    assert train.make_probe(config, run, tf.distribute.get_strategy()) is None


def test_without_labels_the_effective_rank_is_the_number_to_watch(tmp_path):
    source = sources.load("digits", "train[:50]")
    eye, _ = eye_on(dataclasses.replace(source, labels=np.full(50, -1, np.int32)), tmp_path)
    found = eye.look(0)
    assert "knn" not in found and eye.history.held_out == 0 and eye.history.raw_pixels is None
    assert eye.in_short() == f"effective rank {found['rank_z']:.1f} of 128"
    assert eye.in_words().startswith(f"probe at step 0: {eye.in_short()}, alignment ")


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [(0.0, 2000, 100), (0.0, 50, 10), (1.0, 2000, 8), (0.5, 2000, 4), (0.01, 2000, 1), (-1.0, 2000, 0)],
)
def test_the_interval_is_a_twentieth_of_the_run_or_what_the_flag_says(every, total, steps):
    assert probe.interval(every, examples=2000, batch=256, total_steps=total) == steps


@pytest.mark.parametrize(("total", "last"), [(1001, [900, 1001]), (1050, [1000, 1050]), (1000, [900, 1000])])
def test_the_last_probe_has_none_right_before_it(total, last):
    assert [step for step in range(total + 1) if probe.is_due(step, 100, total)][-2:] == last


@pytest.mark.parametrize(
    ("steps", "batch", "size", "images"),
    [(10, 16, 32, 512), (1000, 256, 32, 768), (10**6, 256, 32, 4000), (10**6, 256, 224, 1783)],
)
def test_a_longer_run_affords_larger_probes_within_the_memory(steps, batch, size, images):
    assert probe.images_to_probe(steps, batch, size) == images


@pytest.mark.parametrize(("per_class", "count"), [(2, 2), (3, 3), (40, 3)])
def test_each_labelled_image_is_held_out_once(per_class, count):
    labels = np.repeat([0, 2, 5], per_class)
    folds = probe.folds(labels)
    assert len(folds) == count
    assert sorted(np.concatenate([held_out for _, held_out in folds])) == list(range(len(labels)))
    for bank, held_out in folds:
        assert not set(bank) & set(held_out)
        assert set(labels[bank]) == {0, 2, 5}


def test_a_single_class_or_no_label_gives_no_accuracy():
    assert not probe.folds(np.array([1, 1, 1]))
    assert not probe.folds(np.array([], np.int32))
    assert probe.pixel_accuracy(np.zeros([0, 8, 8, 3], np.uint8), np.array([], np.int32), []) is None


def test_classes_with_one_labelled_image_are_left_out():
    source = tiny.numbered(6)
    labels = np.array([0, 0, 1, 2, 2, -1], np.int32)
    crops, kept = probe.labelled_crops(dataclasses.replace(source, labels=labels), 8, 100)
    assert kept.tolist() == [0, 0, 2, 2] and crops[:, 0, 0, 0].tolist() == [0, 1, 3, 4]


def test_labels_that_the_run_may_not_see_are_not_used():
    source, chosen = data.train_source(tiny.resolve(**PROBED, labels_per_class=2), None)
    crops, labels = probe.labelled_crops(source, 8, 1000)
    assert len(crops) == len(chosen) == 20 and np.bincount(labels).tolist() == [2] * 10


def test_the_pairs_are_two_views_of_one_image_and_always_the_same():
    source, view = sources.load("digits", "train[:50]"), augment.crop_and_flip(8)
    views = {"view_1": view, "view_2": view}
    first = probe.pairs_of_views(source, views, 20)
    again = probe.pairs_of_views(source, views, 20)
    np.testing.assert_array_equal(first, again)
    assert first[0].dtype == np.uint8 and (first[0] != first[1]).any()


def test_large_images_are_shrunk_before_their_pixels_are_compared(monkeypatch):
    shapes, compare = [], quality.pixel_knn_hits
    monkeypatch.setattr(quality, "pixel_knn_hits", lambda *parts: shapes.append(parts[0].shape) or compare(*parts))
    labels = np.repeat([0, 1], 3)
    for size in (32, 128):
        crops = np.zeros([6, size, size, 3], np.uint8)
        crops[:3, :, : size // 2] = crops[3:, :, size // 2 :] = 200
        assert probe.pixel_accuracy(crops, labels, probe.folds(labels)) == 1
    assert set(shapes) == {(4, 32, 32, 3), (4, 64, 64, 3)}


def test_features_that_are_not_finite_are_left_out(tmp_path):
    eye, encoder = eye_on(sources.load("digits", "train[:50]"), tmp_path)
    assert eye.look(0)["step"] == 0 and eye.in_short().startswith("kNN ")
    kernel = encoder.trainable_variables[0]
    kernel.assign(np.full(kernel.shape, np.nan))
    assert eye.look(1) is None
    assert [found["step"] for found in eye.history.probes] == [0]


# The best checkpoint


def best_in(run):
    """The step of the checkpoint in `best`, and its accuracy."""
    probes = [found for found in history_in(run)["probes"] if found["step"]]
    best = max(probes, key=lambda found: found["knn"])
    return best["step"], best["knn"]


def test_the_checkpoint_of_the_best_probe_is_kept_alone_beside_the_newest(probed):
    step, accuracy = best_in(probed)
    assert {path.name.split(".")[0] for path in (probed / "best").iterdir()} == {f"ckpt-{step}"}
    weights = subject.decide(dict(mode="eval", model_dir=str(probed), checkpoint_choice="best")).open()
    assert weights.step == step and weights.prefix == str(probed / "best" / f"ckpt-{step}")
    assert subject.decide(dict(mode="export", model_dir=str(probed))).open().step == 4
    crops, labels = probe.labelled_crops(sources.load("digits", "train"), 8, 384)
    h = tasks.restore_network(weights)(tf.constant(crops / np.float32(255)), training=False).h.numpy()
    assert probe.accuracies(h, labels, probe.folds(labels))["knn"] == pytest.approx(accuracy, abs=2 / 384)


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([0.9], None, False),
        ([0.9, 0.5], None, True),
        ([0.1, 0.5, 0.5], 1, False),
        ([0.1, 0.5, 0.6], 1, True),
        ([0.1, 0.6, 0.5], 1, False),
        ([0.1, 0.6, 0.5], None, True),  # The checkpoint of the better probe is gone.
    ],
)
def test_the_best_probe_is_better_than_that_of_the_checkpoint_kept_and_never_that_of_step_0(scores, kept, best):
    eye = object.__new__(probe.Probe)
    eye._strategy = tf.distribute.get_strategy()
    probes = [{"step": step, "knn": score} for step, score in enumerate(scores)]
    eye.history = probe.History(512, probes=probes)
    assert eye.last_is_best(kept) == best
    eye.history = probe.History(512, probes=[{"step": 3, "rank_z": 20.0}])
    assert not eye.last_is_best(None)  # Without labels nothing tells.


def test_a_better_checkpoint_takes_the_place_of_the_one_before(tmp_path):
    run = preparation.prepare(tiny.resolve(**PROBED, model_dir=str(tmp_path / "run")), tf.distribute.get_strategy())
    for step in (3, 1):
        run.optimizer.iterations.assign(step)
        run.checkpoints.save_best()
        run.checkpoints.finish()
        assert run_folder.checkpoints(str(tmp_path / "run" / "best")) == [
            str(tmp_path / "run" / "best" / f"ckpt-{step}")
        ]
    assert run.checkpoints.newest is None and run_folder.read_config(str(tmp_path / "run")) is None
    run.optimizer.iterations.assign(4)
    run.task.model.encoder.trainable_variables[0].assign_add(run.task.model.encoder.trainable_variables[0] * np.nan)
    with pytest.raises(FloatingPointError, match="encoder"):
        run.checkpoints.save_best()


@pytest.mark.parametrize(("best", "trusted"), [(1, True), (2, True), (3, False)])
def test_a_best_checkpoint_of_steps_that_are_done_again_is_not_trusted(tmp_path, best, trusted):
    """The run was killed after step 3, goes on from step 2, and its probes are no better than that of step 1."""
    config, strategy = tiny.resolve(**PROBED, model_dir=str(tmp_path / "run")), tf.distribute.get_strategy()
    before = preparation.prepare(config, strategy)
    preparation.write_description(config, before)
    for step in (1, 2, 3):
        before.optimizer.iterations.assign(step)
        if step == 2:
            before.checkpoints.save()
        if step == best:
            before.checkpoints.save_best()
    before.checkpoints.finish()
    run = preparation.prepare(config, strategy)
    assert run.checkpoints.newest == 2 and run.checkpoints.best == (best if trusted else None)
    eye = object.__new__(probe.Probe)
    eye._strategy = strategy
    scores = {step: 0.9 if step == best else 0.5 for step in (1, 2, 3)}
    eye.history = probe.History(512, probes=[{"step": step, "knn": score} for step, score in scores.items()])
    eye.history.back_to(2)
    eye.history.probes.append({"step": 4, "knn": 0.5})
    assert eye.last_is_best(run.checkpoints.best) != trusted
    run.optimizer.iterations.assign(4)
    run.checkpoints.save()
    run.checkpoints.finish()
    kept = [str(tmp_path / "run" / "best" / f"ckpt-{best}")] if trusted else []
    assert run_folder.checkpoints(str(tmp_path / "run" / "best")) == kept
    run.checkpoints.save_best()
    run.checkpoints.save()
    run.checkpoints.finish()
    assert run_folder.checkpoints(str(tmp_path / "run" / "best")) == [str(tmp_path / "run" / "best" / "ckpt-4")]


def test_fine_tuning_starts_from_the_checkpoint_that_was_chosen(probed, tmp_path):
    run = tmp_path / "run"
    tiny.borrow(str(probed), run)
    given = dict(
        tiny.NETWORK, train_mode="finetune", checkpoint=str(run), checkpoint_choice="best", train_batch_size=16
    )
    decided = subject.decide(dict(given, model_dir=str(tmp_path / "new")))
    started = preparation.prepare(decided.config, tf.distribute.get_strategy()).task.model
    best = tasks.restore_network(checkpoint.Weights(str(run / "best")))
    for ours, theirs in zip(started.encoder.variables, best.encoder.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "given",
    [
        dict(mode="eval", model_dir="run"),
        dict(mode="eval", checkpoint="run", dataset="digits", model_dir="new"),
        dict(train_mode="finetune", checkpoint="run"),
        dict(train_mode="distill", teacher="run"),
        dict(train_mode="finetune", checkpoint="run/ckpt-3"),
    ],
)
def test_the_best_checkpoint_of_a_run_without_one_is_one_line(given, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.borrow(tiny.pretrained(tmp_path_factory), tmp_path / "run")
    with pytest.raises(UserError, match=r"=run.* holds no best checkpoint, .*: use --checkpoint_choice=newest$"):
        subject.decide(dict(given, checkpoint_choice="best")).open()


def test_the_best_checkpoint_is_meant_of_each_network_that_keeps_one(probed, tmp_path, capsys):
    """A student starts from the best checkpoint of pretraining; its teacher, which was fine-tuned, keeps none."""
    start, teacher = tiny.borrow(str(probed), tmp_path / "run"), str(tmp_path / "teacher")
    tiny.begun(**tiny.QUICK, train_mode="finetune", checkpoint=start, train_steps=1, model_dir=teacher)
    given = dict(tiny.QUICK, train_mode="distill", teacher=teacher, checkpoint_choice="best", distill_neighbors=0)
    capsys.readouterr()
    student = tiny.train_run(**given, checkpoint=start, train_steps=1, model_dir=str(tmp_path / "student"))
    best = run_folder.checkpoints(f"{start}/best")[0]
    assert f"--checkpoint_choice=best: opened {best} and {teacher}/ckpt-0\n" in capsys.readouterr().out
    assert "teacher_agreement" in tiny.evaluated(student)
    with pytest.raises(UserError, match=f"--teacher={teacher} holds no best checkpoint"):
        subject.decide(dict(given, model_dir=str(tmp_path / "none")))
    with pytest.raises(UserError, match=f"--checkpoint={teacher} and --teacher={teacher} hold no best checkpoint"):
        subject.decide(dict(given, checkpoint=teacher, model_dir=str(tmp_path / "none")))
    with pytest.raises(UserError, match="--teacher=nowhere: no such folder"):
        subject.decide(dict(given, checkpoint=start, teacher="nowhere"))


def test_the_choice_of_a_checkpoint_without_a_network_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--checkpoint_choice=best is about the networks of --checkpoint and --teacher"):
        subject.decide(dict(mode="train_then_eval", checkpoint_choice="best"))


def test_a_run_that_started_from_a_best_checkpoint_is_evaluated_by_its_own_newest():
    saved = dict(dataset="digits", train_mode="finetune", checkpoint="run", checkpoint_choice="best")
    assert "checkpoint_choice" not in subject.known_values(dict(mode="eval"), saved)
    assert subject.known_values(dict(mode="train"), saved)["checkpoint_choice"] == "best"
