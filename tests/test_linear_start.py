"""Fine-tuning that starts from a linear classifier: on the features of its layer, each class in its place."""

import numpy as np
import pytest
import tensorflow as tf
import tiny
from test_run import command

import augment
import checkpoint
import linear_start
import preparation
import quality
import sources
import subject
import tasks

ONE_STAGE = True  # see conftest.py
SPLIT = "train[:15%]"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory)


def finetuning(start, **more):
    given = dict(tiny.QUICK, train_mode="finetune", checkpoint=start, linear_start=True, train_split=SPLIT)
    return given | dict(model_dir="none") | more


def begun(start, strategy, **more):
    """The network, the training set and the image size of a run that is about to take its first step."""
    config = subject.decide(finetuning(start, **more)).config
    run = preparation.prepare(config, strategy)
    return run.task.model, run.source, config.image_size


@pytest.mark.parametrize("layer", [0, 1])
def test_the_classifier_is_the_linear_one_on_the_features_of_its_layer(start, mirrored, layer):
    model, source, size = begun(start, mirrored(1), ft_proj_selector=layer)
    made = model(tf.stack([augment.center_crop(image, size) for image, _ in tiny.in_order(source)]))
    features = made.hiddens[layer].numpy()
    found = quality.linear_classifier(features, source.labels)
    np.testing.assert_allclose(made.logits, found.logits(features), atol=2e-3)
    assert np.mean(np.argmax(made.logits, axis=1) == source.labels) > 0.5  # chance: a tenth
    on_two, _, _ = begun(start, mirrored(2), ft_proj_selector=layer)
    ours, theirs = model.supervised_head.kernel.numpy(), on_two.supervised_head.kernel.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(ours).max())


def test_a_class_without_a_label_starts_with_no_weight_and_the_least_bias(start):
    strategy = tf.distribute.get_strategy()
    config = subject.decide(finetuning(start)).config
    source = sources.load("digits", SPLIT)
    names = [name for name, label in zip(source.names, source.labels, strict=True) if label in (2, 7)]
    weights = checkpoint.Weights(start)
    task = tasks.make_task(config, weights.classes)
    tasks.start_from(weights, weights.classes, task)
    linear_start.start(task, source.with_labels(names, only=True), strategy, weights)
    head = task.model.supervised_head
    others = np.delete(np.arange(10), [2, 7])
    assert not head.kernel.numpy()[:, others].any() and head.kernel.numpy()[:, [2, 7]].any(axis=0).all()
    assert (head.bias.numpy()[others] == head.bias.numpy().min()).all()


def test_the_averages_of_a_pretraining_of_few_steps_are_not_settled(start, capsys):
    strategy = tf.distribute.get_strategy()
    config = subject.decide(finetuning(start)).config
    source = sources.load("digits", SPLIT)
    weights = checkpoint.Weights(start)
    task = tasks.make_task(config, weights.classes)
    tasks.start_from(weights, weights.classes, task)
    before = task.model.supervised_head.kernel.numpy()
    weights.config["batch_norm_decay"] = 0.9
    linear_start.start(task, source, strategy, weights)
    assert "after the 3 steps of" in (said := capsys.readouterr().out) and "still 73% what they began with" in said
    np.testing.assert_array_equal(task.model.supervised_head.kernel, before)
    weights.config["checkpoint"] = "runs/earlier"  # whose steps come on top
    linear_start.start(task, source, strategy, weights)
    assert np.abs(task.model.supervised_head.kernel.numpy() - before).max() > 0.1


def test_a_run_that_goes_on_keeps_what_its_classifier_has_learnt(start, tmp_path, monkeypatch):
    given = finetuning(start, model_dir=str(tmp_path / "run"), train_steps=2, checkpoint_steps=1)
    tiny.train_run(**given)
    monkeypatch.setattr(linear_start, "start", lambda *arguments: pytest.fail("it has started already"))
    run = preparation.prepare(subject.decide(given).config, tf.distribute.get_strategy())
    saved = tasks.restore_network(checkpoint.Weights(given["model_dir"])).supervised_head
    np.testing.assert_array_equal(run.task.model.supervised_head.kernel, saved.kernel)


def test_labels_of_one_class_are_refused_in_one_line(start, tmp_path, capsys):
    images = tiny.folder_of(tmp_path / "images", "1.png", "2.png", "3.png")
    table = tmp_path / "labels.csv"
    table.write_text("path,label,split\n1.png,cat,train\n2.png,cat,train\n3.png,dog,test\n")
    flags = [f"--{name}={value}" for name, value in tiny.QUICK.items() if name != "train_batch_size"]
    folder = [f"--data_dir={images}", f"--labels={table}", "--train_batch_size=2", f"--model_dir={tmp_path / 'run'}"]
    assert command(*flags, "--train_mode=finetune", f"--checkpoint={start}", "--linear_start", *folder) == 2
    said = capsys.readouterr().err
    assert "needs labels of at least two classes" in said and "--linear_start=False" in said
    assert not (tmp_path / "run").exists()
