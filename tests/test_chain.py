"""The method end to end on a tiny network: pretrain, fine-tune, distil, evaluate; stopped, resumed and replicated."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

import checkpoint
import console
import preparation
import run_folder
import signals
import sources
import subject
import tasks
import timing
import train
from checkpoint import state_copy
from errors import UserError

ONE_STAGE = True  # see conftest.py
# A classifier that starts at random gives a finite loss on any network. tests/test_linear_start.py has the other.
FINETUNE = dict(tiny.QUICK, train_mode="finetune", linear_start=False) | dict(optimizer="momentum", learning_rate=0.5)
DISTILL = dict(tiny.QUICK, train_mode="distill")
SUPERVISED = tiny.SUPERVISED
ADAM = {**SUPERVISED, "optimizer": "adam", "learning_rate": 0.01}
ACCURACY = {"step", "examples", "top_1", "top_5", "loss", "seconds"}
CALIBRATION = {"calibration_error", "calibration_error_after", "calibration_temperature", "calibration_labels"}


def run(**given):
    """Trains and evaluates. Returns the result."""
    return tiny.evaluated(tiny.train_run(**given))


def read(model_dir, name):
    return json.loads((Path(model_dir) / name).read_text())


def scalars(model_dir, name):
    """The TensorBoard scalar `name` of a training run by step; empty where it was never written."""
    return dict(shown(model_dir).get(name, []))


def shown(model_dir):
    """All TensorBoard scalars of a training run, each as (step, value) in the order that TensorBoard shows."""
    events = (
        EventMultiplexer(tensor_size_guidance={"scalars": 0}).AddRun(str(Path(model_dir) / "train"), "run").Reload()
    )
    tags = events.Runs()["run"]["tensors"]
    found = {tag: events.Tensors("run", tag) for tag in tags}
    return {tag: [(e.step, float(tf.make_ndarray(e.tensor_proto))) for e in found[tag]] for tag in tags}


def network_values(path):
    """The network's weights in a checkpoint, by part/layer/name."""
    cut = "/.ATTRIBUTES/VARIABLE_VALUE"
    values = tiny.saved_values(path).items()
    return {key.removeprefix("weights/").removesuffix(cut): v for key, v in values if key.startswith("weights/")}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, pretrained):
    """The folder of a fine-tuned and a distilled run on the digits, with their results."""
    base = tmp_path_factory.mktemp("chain")
    finetune, distill = str(base / "finetune"), str(base / "distill")
    one_label = dict(labels_per_class=1, ft_proj_selector=1, train_batch_size=10)
    results = {
        "finetune": run(**{**FINETUNE, **one_label}, checkpoint=pretrained, train_steps=3, model_dir=finetune),
        "distill": run(**DISTILL, teacher=finetune, train_steps=3, model_dir=distill),
    }
    return base, results


# The chain on the digits


def test_each_step_of_the_chain_ends_with_a_result(chain):
    base, results = chain
    for name, more in (("finetune", set()), ("distill", {"teacher_agreement"})):
        assert set(results[name]) == ACCURACY | CALIBRATION | more
        assert (results[name]["step"], results[name]["examples"]) == (3, 360)
        shares = {"top_1", "top_5", "calibration_error", "calibration_error_after", *more}
        assert all(0 <= results[name][key] <= 1 for key in shares)
        assert 1 < results[name]["loss"] < 5
        assert read(base / name, "result.json") == read(base / name, "result_3.json") == results[name]


def test_the_config_of_a_run_says_all_that_made_it(chain, pretrained):
    base, _ = chain
    saved = read(base / "finetune", "config.json")
    wanted = dict(
        train_mode="finetune", checkpoint=pretrained, labels_per_class=1, ft_proj_selector=1, resnet_depth=10,
        width_multiplier=0.125, image_size=16, train_steps=3, train_examples=10, eval_split="test",
        classes=[str(digit) for digit in range(10)],
    )  # fmt: skip
    assert {name: saved[name] for name in wanted} == wanted
    assert set(saved["versions"]) == {"tensorflow", "keras", "numpy", "tensorflow-datasets"}
    assert "git_commit" in saved
    student = read(base / "distill", "config.json")
    assert (student["teacher"], student["train_examples"], student["resnet_depth"]) == (f"{base}/finetune", 1437, 10)


def test_the_labelled_examples_are_written_down(chain, pretrained):
    base, _ = chain
    subset = read(base / "finetune", "labelled_subset.json")
    source = sources.load("digits", "train")
    label = dict(zip(source.names, source.labels.tolist(), strict=True))
    assert subset["seed"] == 0
    assert sorted(label[name] for name in subset["examples"]) == list(range(10))
    assert read(base / "distill", "labelled_subset.json") == subset  # The student sees the labels of its teacher.
    assert not (Path(pretrained) / "labelled_subset.json").exists()


def test_fine_tuning_keeps_only_the_head_layers_it_stands_on(chain):
    base, _ = chain
    head_layers = {name.split("/")[1] for name in network_values(base / "finetune") if name.startswith("head/")}
    assert head_layers == {"head1_dense", "head1_bn"}
    assert not any(name.startswith("head/") for name in network_values(base / "distill"))


def test_fine_tuning_starts_from_the_pretrained_weights(pretrained, tmp_path):
    still = {**FINETUNE, "learning_rate": 0.0, "ft_proj_selector": 1}
    tiny.train_run(**still, checkpoint=pretrained, train_steps=1, model_dir=str(tmp_path))
    before, after = network_values(pretrained), network_values(tmp_path)
    kernels = [name for name in after if name.endswith("kernel") and not name.startswith("supervised_head")]
    assert len(kernels) == 5
    for name in kernels:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_training_teaches_the_network(tmp_path, whole_network):
    given = {**ADAM, "train_batch_size": 64, "learning_rate": 0.04}
    result = run(**given, train_steps=80, crop_min_area=0.5, use_flip=False, model_dir=str(tmp_path))
    assert result["top_1"] > 0.6
    losses = scalars(tmp_path, "train/supervised_loss")
    assert np.mean([losses[step] for step in range(71, 81)]) < 0.5 * losses[1]


def test_scalars_of_every_step_are_there_for_tensorboard(pretrained, chain):
    base, _ = chain
    names = {
        pretrained: ["contrastive_loss", "contrastive_accuracy", "contrastive_entropy", "supervised_accuracy"],
        base / "finetune": ["supervised_loss", "supervised_accuracy"],
        base / "distill": ["distillation_loss", "teacher_agreement"],
    }
    for model_dir, metrics in names.items():
        for metric in [*metrics, "loss", "learning_rate", "images_per_second"]:
            values = scalars(model_dir, f"train/{metric}")
            assert list(values) == [1, 2, 3] and np.isfinite(list(values.values())).all(), metric
    shares = [list(scalars(pretrained, f"time/{kind}").values()) for kind in timing.KINDS]
    assert np.sum(shares, axis=0) == pytest.approx([1, 1, 1])
    seconds = scalars(pretrained, "time/seconds_per_step")
    assert list(seconds) == [1, 2, 3] and seconds[1] > seconds[3] > 0  # The first step is traced.
    rates = scalars(pretrained, "train/learning_rate")
    assert rates[1] == pytest.approx(0.3 * 16 / 256) and rates[1] > rates[2] > rates[3] > 0


# Linear evaluation


# tests/test_model.py freezes up to every block.
@pytest.mark.parametrize(
    ("block", "selector"), [(4, 1), *(pytest.param(block, 0, marks=pytest.mark.slow) for block in (4, 2))]
)
def test_frozen_weights_and_statistics_stay_bit_for_bit(whole_network, tmp_path_factory, tmp_path, block, selector):
    pretrained = tiny.pretrained(tmp_path_factory)
    given = dict(FINETUNE, weight_decay=0.1, fine_tune_after_block=block, ft_proj_selector=selector, train_steps=2)
    tiny.train_run(**given, checkpoint=pretrained, model_dir=str(tmp_path))
    before, after = network_values(pretrained), network_values(tmp_path)
    frozen = tuple(["encoder/stem_", *(f"encoder/group{k}_" for k in range(1, block + 1))])
    frozen += ("head/",) if block == 4 else ()
    compared = [name for name in after if name.startswith(frozen)]
    assert any(name.endswith("moving_variance") for name in compared) and any("kernel" in name for name in compared)
    for name in compared:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    trained = [name for name in after if name not in compared]
    assert "supervised_head/supervised_head/kernel" in trained
    if block == 4:
        assert len(trained) == 2
    for name in trained:
        assert not np.array_equal(after[name], before[name]), name


# Image folders


@pytest.mark.parametrize(
    ("start", "given", "kept"),
    [
        ("pretrain", dict(train_mode="finetune", ft_proj_selector=0), True),
        ("pretrain", dict(train_mode="finetune", ft_proj_selector=0, zero_init_logits_layer=True), False),
        ("pretrain", dict(train_mode="finetune", ft_proj_selector=1), False),
        ("pretrain", dict(train_mode="finetune", ft_proj_selector=0, labels_per_class=1), False),
        ("pretrain", dict(train_mode="distill", teacher="finetune"), False),
        ("pretrain", dict(train_mode="distill", teacher="distill"), False),  # whose classifier stands on h too
        ("finetune", dict(train_mode="finetune", ft_proj_selector=1, labels_per_class=1), True),
        ("finetune", dict(train_mode="finetune", ft_proj_selector=1, labels_per_class=1, label_seed=1), False),
        ("finetune", dict(train_mode="distill", teacher="finetune", labels_per_class=1), False),
        ("distill", dict(train_mode="finetune", ft_proj_selector=0), False),
    ],
)
def test_a_classifier_comes_along_only_from_the_same_classes_labels_and_layer(chain, pretrained, start, given, kept):
    runs = {"pretrain": pretrained, "finetune": str(chain[0] / "finetune"), "distill": str(chain[0] / "distill")}
    given = dict(given, teacher=runs[given["teacher"]]) if "teacher" in given else given
    made = tiny.resolve(**tiny.QUICK, **given, checkpoint=runs[start], model_dir="new")
    weights = checkpoint.Weights(runs[start])
    task = tasks.make_task(made, weights.classes, teacher=lambda images: images)
    tasks.start_from(weights, weights.classes, task)
    theirs = tasks.restore_network(weights).supervised_head.kernel
    ours = task.model.supervised_head.kernel
    assert (ours.shape == theirs.shape and np.array_equal(ours, theirs)) == kept


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """JPEG and PNG files of three digits: sorted into classes, and without labels to train on."""
    base = tmp_path_factory.mktemp("images")
    for name in ("sorted", "unsorted"):
        tiny.digit_images(base / name / "train", 10, labelled=name == "sorted")
        tiny.digit_images(base / name / "test", 3)
    return base


def of_folder(folder):
    return dict(dataset="image_folder", data_dir=str(folder), image_size=24, eval_split="test")


CLASSES = ["digit 0", "digit 1", "digit 2"]


@pytest.fixture(scope="module")
def folder_chain(folders, tmp_path_factory):
    """The folder of the three runs on sorted images, with their results."""
    base, images = tmp_path_factory.mktemp("runs"), of_folder(folders / "sorted")
    pretrain, finetune, distill = (str(base / name) for name in ("pretrain", "finetune", "distill"))
    linear = dict(lineareval_while_pretraining=True)
    one_label = dict(labels_per_class=1, ft_proj_selector=1, train_steps=2)
    tiny.begun(**tiny.PRETRAIN, **images, **linear, train_steps=1, model_dir=pretrain)
    results = {
        "pretrain": tiny.evaluated(subject.decide(dict(mode="eval", model_dir=pretrain))),
        "finetune": run(**FINETUNE, **images, **one_label, checkpoint=pretrain, model_dir=finetune),
        "distill": run(**DISTILL, **images, teacher=finetune, train_steps=2, model_dir=distill),
    }
    return base, results


def test_the_chain_runs_on_a_folder_of_images(folder_chain):
    base, results = folder_chain
    knn_keys = {"knn_top_1", "knn_labels", "knn_bank", "knn_neighbors", "knn_whitening"}
    assert set(results["pretrain"]) == {*ACCURACY, *knn_keys}
    assert set(results["finetune"]) == ACCURACY
    assert set(results["distill"]) == {*ACCURACY, "teacher_agreement"}
    assert {result["examples"] for result in results.values()} == {9}
    for name, examples in (("pretrain", 30), ("finetune", 3), ("distill", 30)):
        saved = read(base / name, "config.json")
        assert saved["classes"] == CLASSES and saved["train_examples"] == examples
    chosen = read(base / "finetune", "labelled_subset.json")["examples"]
    assert sorted(name.split("/")[0] for name in chosen) == CLASSES


@pytest.fixture(scope="module")
def unlabelled(folders, tmp_path_factory):
    """The model_dir of pretraining on unsorted images, and its result."""
    model_dir = tmp_path_factory.mktemp("unlabelled")
    return model_dir, run(**tiny.PRETRAIN, **of_folder(folders / "unsorted"), train_steps=1, model_dir=str(model_dir))


def test_pretraining_without_labels_skips_the_linear_evaluation(unlabelled):
    model_dir, result = unlabelled
    assert set(result) == {"step", "examples", "seconds"} and result["examples"] == 9
    assert read(model_dir, "config.json")["classes"] == []
    assert not any(name.startswith("supervised_head") for name in network_values(model_dir))
    assert scalars(model_dir, "train/contrastive_loss") and not scalars(model_dir, "train/supervised_loss")


def test_fine_tuning_follows_pretraining_without_labels(folders, unlabelled, tmp_path):
    given = dict(FINETUNE, **of_folder(folders / "sorted"), checkpoint=str(unlabelled[0]), train_steps=1)
    assert run(**given, model_dir=str(tmp_path))["examples"] == 9


def test_a_teacher_of_labelled_images_is_distilled_on_unlabelled_ones(folders, folder_chain, tmp_path):
    teacher = str(folder_chain[0] / "finetune")
    given = dict(DISTILL, **of_folder(folders / "unsorted"), teacher=teacher, train_steps=2)
    result = run(**given, model_dir=str(tmp_path))
    assert set(result) == {*ACCURACY, "teacher_agreement"}
    assert read(tmp_path, "config.json")["classes"] == CLASSES
    assert set(scalars(tmp_path, "train/distillation_loss")) == {1, 2}
    assert not (tmp_path / "labelled_subset.json").exists()


def test_labels_are_asked_for_only_where_they_are_needed(folders, folder_chain, tmp_path):
    images = of_folder(folders / "unsorted")
    teacher = str(folder_chain[0] / "finetune")
    for given in (
        dict(DISTILL, **images, teacher=teacher, distill_alpha=0.5),
        dict(SUPERVISED, **images),
    ):
        with pytest.raises(UserError, match="needs labels"):
            run(**given, model_dir=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_student_is_evaluated_beside_a_teacher_that_has_moved(folder_chain, tmp_path):
    base, results = folder_chain
    tiny.borrow(base / "finetune", tmp_path / "teacher")
    student = tiny.borrow(base / "distill", tmp_path / "student")
    (base / "finetune").rename(base / "away")
    try:
        given = dict(model_dir=student, mode="eval", teacher=str(tmp_path / "teacher"))
        result = tiny.evaluated(subject.decide(dict(**given)))
    finally:
        (base / "away").rename(base / "finetune")
    assert result["teacher_agreement"] == results["distill"]["teacher_agreement"]


# Stopping, going on, and replicas


class Interruption(Exception):
    """What stops a run in these tests."""


def interrupt_after(monkeypatch, steps):
    """Makes training fail when `steps` steps are done."""
    make_train_step = train.make_train_step

    def make(*args, **options):
        step, done = make_train_step(*args, **options), 0

        def failing(batch):
            nonlocal done
            if done == steps:
                raise Interruption
            done += 1
            return step(batch)

        return failing

    monkeypatch.setattr(train, "make_train_step", make)


def assert_same_state(ours, theirs, tolerance):
    """Everything in the newest checkpoints of two runs is the same, but for how many were saved before."""
    ours, theirs = tiny.saved_values(ours), tiny.saved_values(theirs)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if name.startswith("save_counter/"):
            continue
        np.testing.assert_allclose(ours[name], value, atol=tolerance, rtol=tolerance, err_msg=name)


def told_to_stop_after(monkeypatch, steps):
    """SIGTERM comes while the step is under way that is the so many-th of this process."""
    make_train_step = train.make_train_step

    def make(*args, **options):
        step, done = make_train_step(*args, **options), 0

        def told(batch):
            nonlocal done
            done += 1
            if done == steps:
                monkeypatch.setattr(signals.LISTENER, "first", "SIGTERM")
            return step(batch)

        return told

    monkeypatch.setattr(train, "make_train_step", make)


# A probe every third step, so that the run goes on between two of them.
PROBED = {**tiny.PRETRAIN, "eval_every_epochs": 3 * 16 / 1437}


# tests/test_exact_resume.py kills pretraining with probes.
@pytest.mark.parametrize("given", [pytest.param(PROBED, marks=pytest.mark.slow), ADAM], ids=["pretrain", "supervised"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch, given):
    """Stopped by SIGTERM after a step that is saved for no other reason, later killed after a step that is not."""
    given = {**given, "train_steps": 6, "checkpoint_steps": 4}
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    tiny.train_run(**given, model_dir=whole)
    with monkeypatch.context() as patched:
        told_to_stop_after(patched, 2)
        with pytest.raises(KeyboardInterrupt, match=r"^by SIGTERM at step 2: the same command goes on from step 2$"):
            tiny.train_run(**given, model_dir=broken)
    assert not signals.LISTENER.deferred
    with monkeypatch.context() as patched, pytest.raises(Interruption):
        interrupt_after(patched, 3)
        tiny.train_run(**given, model_dir=broken)
    assert checkpoint.Weights(broken).step == 4
    tiny.train_run(**given, model_dir=broken)
    assert checkpoint.Weights(broken).step == 6
    assert_same_state(broken, whole, 1e-5)
    ours, theirs = shown(broken), shown(whole)
    assert set(ours) == set(theirs)
    times = {"train/images_per_second", *(name for name in theirs if name.startswith("time/"))}
    for name in set(theirs) - times:
        assert [step for step, _ in ours[name]] == [step for step, _ in theirs[name]], name
        close = 0.02 if name.startswith("probe/") else 1e-4
        assert [v for _, v in ours[name]] == pytest.approx([v for _, v in theirs[name]], abs=close), name
    assert all([step for step, _ in ours[name]] == [1, 2, 3, 4, 5, 6] for name in times)
    if given["train_mode"] == "pretrain":
        ours, theirs = read(broken, "probe.json"), read(whole, "probe.json")
        assert [found["step"] for found in ours["probes"]] == [0, 3, 6]
        for found, wanted in zip(ours["probes"], theirs["probes"], strict=True):
            assert found == pytest.approx(wanted, abs=0.02)  # An image may change sides by rounding.
            for name in ("contrastive_loss", "contrastive_accuracy", "contrastive_chance"):
                assert found.get(name) == pytest.approx(wanted.get(name), abs=1e-4), name
        assert ours["alarms"] == theirs["alarms"]


def test_a_run_that_is_short_of_time_saves_and_does_not_go_on_to_evaluate(tmp_path, capfd):
    given = {**SUPERVISED, "mode": "train_then_eval", "model_dir": str(tmp_path), "train_steps": 2}
    config, now = tiny.resolve(**given, max_minutes=1), time.monotonic()
    one = tf.distribute.get_strategy()
    with pytest.raises(
        KeyboardInterrupt, match=r"^by --max_minutes=1 at step 1: the same command goes on from step 1$"
    ):
        train.train(config, one, started=now - 59)
    with pytest.raises(KeyboardInterrupt, match=r"^by --max_minutes=1 after the last step: .* goes on to evaluate$"):
        train.train(config, one, started=now - 59)
    assert checkpoint.Weights(str(tmp_path)).step == 2
    assert train.train(config, one, started=now - 59) == 2  # The limit is for training alone.
    assert tiny.resolve(mode="train", model_dir=str(tmp_path)).max_minutes == 0  # of that command, not of the run


# Numbers that are not finite


def spoil(monkeypatch, is_bad):
    """Makes the images of some batches no numbers: those for whose step and number of restores `is_bad` says so."""
    training_batches = train.training_batches

    def batches(config, run, strategy, step=0, restores=0):
        for number, batch in enumerate(training_batches(config, run, strategy, step, restores), start=step + 1):
            if is_bad(number, restores):
                batch = {**batch, "image": batch["image"] * np.nan}
            yield batch

    monkeypatch.setattr(train, "training_batches", batches)


def test_a_bad_batch_stops_a_run_and_its_step_is_named(tmp_path, monkeypatch):
    given = {**ADAM, "train_steps": 6, "checkpoint_steps": 2, "summary_steps": 100, "model_dir": str(tmp_path)}
    spoil(monkeypatch, lambda step, _: step == 4)
    with pytest.raises(
        FloatingPointError, match=r"^loss is nan at step 4: lower --learning_rate; .* goes on from step 2"
    ):
        tiny.train_run(**given)


def test_bad_batches_are_left_out_and_counted(tmp_path, monkeypatch, capfd):
    given = {**ADAM, "on_nan": "skip", "train_steps": 4, "checkpoint_steps": 2, "model_dir": str(tmp_path)}
    with monkeypatch.context() as patched:
        spoil(patched, lambda step, _: step in (2, 3))
        with pytest.raises(
            FloatingPointError, match=r"^2 steps gave .*, more than --max_nan_steps=1, at step 3: lower"
        ):
            tiny.train_run(**given, max_nan_steps=1)
        decided = tiny.train_run(**given, max_nan_steps=2)
    assert [value for _, value in shown(tmp_path)["train/skipped_steps"]] == [0, 1, 2, 2]
    assert list(scalars(tmp_path, "train/loss")) == [1, 4]
    assert tiny.evaluated(decided)["skipped_steps"] == 2
    assert all(np.isfinite(value).all() for value in tiny.saved_values(tmp_path).values())


def test_a_run_goes_back_and_on_with_another_order(tmp_path, monkeypatch, capfd):
    given = {**ADAM, "on_nan": "restore", "train_steps": 6, "checkpoint_steps": 2}
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    with monkeypatch.context() as patched:
        # In the first order step 1 is bad, in the second step 4 is, in the third none is.
        spoil(patched, lambda step, restores: (step, restores) in ((1, 0), (4, 1)))
        tiny.train_run(**given, model_dir=whole)
        assert (
            "loss is nan at step 4: back to step 2, and on with another order of the data (2 of"
            in capfd.readouterr().err
        )
        # Stopped on the way, a run ends where it would have ended.
        with pytest.raises(FloatingPointError, match=r"at step 4, and --max_nan_restores=1 is reached: lower"):
            tiny.train_run(**given, max_nan_restores=1, model_dir=broken)
        tiny.train_run(**given, max_nan_restores=2, model_dir=broken)
    assert checkpoint.Weights(broken).progress == checkpoint.Weights(whole).progress == {"nan_restores": 2}
    assert_same_state(broken, whole, 1e-5)
    ours, theirs = (shown(run)["train/loss"] for run in (broken, whole))
    assert [step for step, _ in ours] == [1, 2, 3, 4, 5, 6]
    assert ours == [(step, pytest.approx(value, abs=1e-4)) for step, value in theirs]


def test_more_steps_go_on_to_exactly_the_last(pretrained, tmp_path):
    model_dir = tiny.borrow(pretrained, tmp_path / "run")
    tiny.train_run(**tiny.PRETRAIN, model_dir=model_dir, train_steps=5)
    weights = checkpoint.Weights(model_dir)
    assert weights.step == 5 and weights.config["train_steps"] == 5
    assert list(scalars(model_dir, "train/loss")) == [1, 2, 3, 4, 5]
    before = tiny.saved_values(model_dir)
    settings = tiny.resolve(**tiny.PRETRAIN, model_dir=model_dir, train_steps=2)
    assert train.train(settings, tf.distribute.get_strategy()) == 5
    for name, value in tiny.saved_values(model_dir).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_another_seed_is_another_run(tmp_path, pretrained):
    tiny.begun(**tiny.PRETRAIN, model_dir=str(tmp_path), train_steps=1, seed=1)
    name = "encoder/stem_conv/kernel"
    assert np.abs(network_values(tmp_path)[name] - network_values(pretrained)[name]).max() > 0.01


@pytest.mark.parametrize("change", [dict(resnet_depth=18), dict(memory="none"), dict(train_mode="supervised")])
def test_another_network_in_the_same_folder_is_refused_and_changes_nothing(pretrained, tmp_path, change):
    model_dir = tiny.borrow(pretrained, tmp_path / "run")
    before = tiny.files_in(model_dir)
    with pytest.raises(UserError, match=f"--{next(iter(change))}=.* contradicts the run in --model_dir={model_dir}"):
        tiny.train_run(**{**tiny.PRETRAIN, **change}, model_dir=model_dir, train_steps=5)
    assert tiny.files_in(model_dir) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    given = {**ADAM, "optimizer": "momentum", "learning_rate": 1e30, "train_steps": 5}
    with pytest.raises(FloatingPointError, match="at step 2: lower --learning_rate; the same command then starts from"):
        tiny.train_run(**given, model_dir=str(tmp_path))
    assert not list(tmp_path.glob("ckpt-*"))


@pytest.mark.parametrize("summary_steps", [pytest.param(1, marks=pytest.mark.slow), 100])
def test_a_run_that_diverges_goes_on_from_its_last_good_checkpoint(tmp_path, capsys, summary_steps):
    given = {**ADAM, "optimizer": "momentum", "learning_rate": 0.01, "checkpoint_steps": 1}
    given |= {"summary_steps": summary_steps, "model_dir": str(tmp_path)}
    tiny.train_run(**given, train_steps=3)
    with pytest.raises(FloatingPointError, match=r"at step \d: lower --learning_rate; .* goes on from step 3"):
        tiny.train_run(**{**given, "learning_rate": 1e30}, train_steps=6)
    for prefix in run_folder.checkpoints(str(tmp_path)):
        for name, value in tiny.saved_values(prefix).items():
            assert np.isfinite(value).all(), name
    capsys.readouterr()
    tiny.train_run(**given, train_steps=6)
    said = capsys.readouterr().out
    assert "goes on from step 3 of 6, with --learning_rate=0.01 (before: 1e+30)" in said
    assert checkpoint.Weights(str(tmp_path)).step == 6


def test_a_good_checkpoint_stays_when_the_step_after_it_overflows(tmp_path, monkeypatch):
    given = {**ADAM, "checkpoint_steps": 1, "model_dir": str(tmp_path)}
    tiny.train_run(**given, train_steps=2)
    # The loss of step 3 is finite, the weights after it are not.
    monkeypatch.setattr(state_copy.StateCopy, "take", lambda _: "weights/encoder/stem_conv/kernel")
    with pytest.raises(FloatingPointError, match=r"kernel .* at step 3: lower --learning_rate; .* goes on from step 2"):
        tiny.train_run(**given, train_steps=3)
    assert checkpoint.Weights(str(tmp_path)).step == 2 and not list(tmp_path.glob("*.diverged"))


def test_a_copied_checkpoint_that_diverges_at_once_is_set_aside(tmp_path):
    given = {**ADAM, "optimizer": "momentum", "learning_rate": 0.01, "checkpoint_steps": 1, "model_dir": str(tmp_path)}
    tiny.train_run(**given, train_steps=1)
    with pytest.raises(FloatingPointError, match=r"starts from the beginning"):
        tiny.train_run(**{**given, "learning_rate": 1e30}, train_steps=4, keep_checkpoint_max=1)
    (tmp_path / "checkpoint").unlink(missing_ok=True)
    tiny.train_run(**given, train_steps=2)
    assert checkpoint.Weights(str(tmp_path)).step == 2


def test_a_run_that_has_ended_says_so_and_keeps_its_config(pretrained, tmp_path, capsys):
    model_dir = tiny.borrow(pretrained, tmp_path / "run")
    before = tiny.files_in(model_dir)
    tiny.train_run(**tiny.PRETRAIN, model_dir=model_dir, train_steps=2, weight_decay=0.5, momentum=0.0)
    said = capsys.readouterr().out
    assert "already at step 3 of 2, so these changed flags have no effect: " in said
    assert "--weight_decay=0.5" in said and "--momentum=0.0" in said
    assert tiny.files_in(model_dir) == before


@pytest.mark.parametrize(("name", "value"), [("train_batch_size", 8), ("seed", 5)])
def test_a_run_keeps_the_order_of_its_data(pretrained, tmp_path, name, value):
    model_dir = tiny.borrow(pretrained, tmp_path / "run")
    with pytest.raises(UserError, match=f"--{name}={value} contradicts the run in --model_dir"):
        tiny.train_run(**{**tiny.PRETRAIN, name: value}, model_dir=model_dir, train_steps=5)


def test_a_student_goes_on_with_the_same_teacher_elsewhere_and_with_no_other_one(chain, tmp_path, capsys):
    base, _ = chain
    student = tiny.borrow(base / "distill", tmp_path / "student")
    teacher = tiny.borrow(base / "finetune", tmp_path / "teacher")
    tiny.train_run(**DISTILL, teacher=teacher, train_steps=4, model_dir=student)
    assert f"goes on from step 3 of 4, with --teacher={teacher} (before: {base}/finetune)" in capsys.readouterr().out
    before = tiny.files_in(student)
    with pytest.raises(UserError, match=f"--teacher={base}/distill has other weights than the teacher"):
        tiny.train_run(**DISTILL, teacher=f"{base}/distill", train_steps=5, model_dir=student)
    assert tiny.files_in(student) == before


def test_a_run_goes_on_where_the_checkpoint_it_started_from_is_gone(chain, tmp_path):
    base, _ = chain
    start = tiny.borrow(base / "finetune", tmp_path / "start")
    given = {**FINETUNE, "ft_proj_selector": 1, "model_dir": str(tmp_path / "run"), "checkpoint": start}
    tiny.begun(**given, train_steps=1)
    shutil.rmtree(start)
    run = preparation.prepare(tiny.resolve(**given, train_steps=2), tf.distribute.get_strategy())
    assert run.checkpoints.newest == 0


def test_a_folder_that_changed_is_noticed_when_a_run_goes_on(folders, tmp_path, caplog):
    shutil.copytree(folders / "sorted", tmp_path / "images")
    given = dict(SUPERVISED, **of_folder(tmp_path / "images"), model_dir=str(tmp_path / "run"))
    tiny.begun(**given, train_steps=4)
    tiny.begun(**given, train_steps=4)
    assert "changed" not in caplog.text
    first = next((tmp_path / "images/train/digit 0").iterdir())
    first.rename(first.with_name("renamed" + first.suffix))
    tiny.begun(**given, train_steps=4)
    assert "the training data have changed since the run began (30 examples then, 30 now)" in caplog.text
    caplog.clear()
    shutil.copy(next((tmp_path / "images/train/digit 0").iterdir()), tmp_path / "images/train/digit 0/one more.png")
    tiny.begun(**given, train_steps=4)
    assert "(30 examples then, 31 now): it goes on as they are" in caplog.text


def test_a_run_without_a_checkpoint_may_be_started_with_other_flags(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Interruption):
        interrupt_after(patched, 0)
        tiny.train_run(**SUPERVISED, train_steps=3, model_dir=str(tmp_path))
    assert (tmp_path / "config.json").exists()
    tiny.begun(**{**SUPERVISED, "resnet_depth": 14}, train_steps=1, model_dir=str(tmp_path))
    assert checkpoint.Weights(str(tmp_path)).config["resnet_depth"] == 14


def test_a_pretraining_run_as_teacher_is_warned_of(pretrained, tmp_path, caplog):
    tiny.begun(**DISTILL, teacher=pretrained, train_steps=1, model_dir=str(tmp_path))
    assert f"--teacher={pretrained} is a pretraining run. Its classifier has learnt every label" in caplog.text


def test_fine_tuning_a_network_without_a_head_says_which_layer_to_take(chain, tmp_path):
    base, _ = chain
    given = {**FINETUNE, "train_steps": 1, "model_dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"has no projection head: use --ft_proj_selector=0"):
        tiny.train_run(**given, checkpoint=str(base / "distill"), ft_proj_selector=1)
    with pytest.raises(UserError, match=r"has 1 layers of the projection head: use --ft_proj_selector=1"):
        tiny.train_run(**given, checkpoint=str(base / "finetune"), ft_proj_selector=2)
    with pytest.raises(
        UserError, match=r"--train_mode=pretrain needs the whole projection head, and .* has no projection head"
    ):
        tiny.train_run(**tiny.PRETRAIN, train_steps=1, model_dir=str(tmp_path), checkpoint=str(base / "distill"))


def test_the_log_of_a_batch_job_says_how_far_training_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    tiny.train_run(**SUPERVISED, model_dir=str(tmp_path / "run"), train_steps=3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("supervised: ")]
    pattern = r"supervised: step \d of 3, loss [\d.]+, accuracy [\d.]+%, [\d,]+ images/s"
    assert len(lines) == 4 and all(re.match(pattern, line) for line in lines[:3])
    assert [" left" in line for line in lines[:3]] == [False, True, False]
    assert re.match(r"supervised: \d+ s: \d+% ", lines[3]) and "% steps" in lines[3]


def test_a_step_is_summed_up_in_a_few_words():
    values = {"loss": 1.5, "images_per_second": 1234.5}
    assert train.summary(values) == "loss 1.500, 1,234 images/s"
    assert train.summary({**values, "supervised_accuracy": 0.25}) == "loss 1.500, accuracy 25.0%, 1,234 images/s"
    contrastive = {"contrastive_accuracy": 0.031, "contrastive_chance": 1 / 70_000, "supervised_accuracy": 0.5}
    assert "contrastive accuracy 3.1% (chance 0.0014%)" in train.summary(values | contrastive)
    assert "agrees with the teacher on 90.0%" in train.summary({**values, "teacher_agreement": 0.9})
    left_out = {"images_per_second": 1234.5, "skipped_steps": 3.0}
    assert train.summary(left_out) == "this step is left out, 3 left out so far, 1,234 images/s"


@pytest.mark.slow  # tests/test_tasks.py compares the steps, and tests/test_multi_worker.py runs whole commands.
def test_two_replicas_train_what_one_does(pretrained, mirrored, tmp_path):
    tiny.train_run(mirrored(2), **tiny.PRETRAIN, model_dir=str(tmp_path), train_steps=3)
    assert_same_state(tmp_path, pretrained, 1e-3)
    for name in ("loss", "contrastive_accuracy", "contrastive_entropy", "supervised_loss"):
        ours, theirs = (list(scalars(run, f"train/{name}").values()) for run in (tmp_path, pretrained))
        assert ours == pytest.approx(theirs, abs=1e-3), name
