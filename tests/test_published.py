"""Published checkpoints come in, with their architecture read off their shapes, and go out, bit for bit."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from parity import error
from release_files import SMALL, images, names_of, network, object_graph, saved_model, written, written_raw
from test_run import command

import checkpoint
import config
import published
import subject
import tasks
from architecture import BLOCKS
from errors import UserError
from published import inference, reading, writing
from published.__main__ import main as published_main

NETWORKS = {
    "bottleneck": dict(resnet_depth=14),
    "selective kernels": dict(resnet_depth=14, sk_ratio=0.0625),
    "selective kernels of another ratio": dict(resnet_depth=14, sk_ratio=0.5, width_multiplier=0.5),
    "squeeze and excitation": dict(resnet_depth=26, se_ratio=0.25),
    "another squeeze": dict(resnet_depth=10, se_ratio=0.5),
    "both": dict(resnet_depth=14, sk_ratio=0.0625, se_ratio=0.25),
    "basic": dict(resnet_depth=18),
    "basic, ResNet-D": dict(resnet_depth=18, sk_ratio=0.0625),
    "CIFAR stem": dict(resnet_depth=10, image_size=32),
    "CIFAR stem, selective kernels": dict(resnet_depth=14, image_size=32, sk_ratio=0.0625),
    "two head layers": dict(resnet_depth=10, num_proj_layers=2),
    "one head layer": dict(resnet_depth=10, num_proj_layers=1),
    "linear head": dict(resnet_depth=10, proj_head_mode="linear"),
    "no head": dict(resnet_depth=10, proj_head_mode="none"),
    "no classes": dict(resnet_depth=10, lineareval_while_pretraining=False),
}


@pytest.mark.parametrize("given", NETWORKS.values(), ids=NETWORKS)
def test_a_network_comes_back_from_a_tf1_checkpoint_with_its_architecture_and_every_bit(tmp_path, given):
    classes = 0 if given.get("lineareval_while_pretraining") is False else 5
    folder, model = written(tmp_path / "out", classes, **given)
    weights = published.open_weights(folder)
    assert weights.step == 7 and len(weights.classes) == classes
    architecture = {**SMALL, "proj_head_mode": "nonlinear", "sk_ratio": 0.0, "se_ratio": 0.0, **given}
    for name in ("resnet_depth", "width_multiplier", "sk_ratio", "se_ratio", "proj_head_mode"):
        assert weights.config[name] == architecture[name], name
    assert (weights.config["image_size"] <= 32) == (architecture["image_size"] <= 32)
    back = tasks.restore_network(weights)
    for ours, theirs in zip(model.variables, back.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again = tf.train.load_checkpoint(published.export(weights, str(tmp_path / "again")))
    first = tf.train.load_checkpoint(folder)
    assert again.get_variable_to_shape_map() == first.get_variable_to_shape_map()
    for key in first.get_variable_to_shape_map():
        np.testing.assert_array_equal(first.get_tensor(key), again.get_tensor(key), err_msg=key)


@pytest.mark.parametrize("depth", BLOCKS)
@pytest.mark.parametrize("sk_ratio", [0.0, 0.0625])
def test_every_depth_is_told_from_its_shapes(depth, sk_ratio):
    with keras.StatelessScope(initialize_variables=False):
        model = tasks.network(config.Config(resnet_depth=depth, sk_ratio=sk_ratio, width_multiplier=2.0), 1000)
    shapes = {name: list(variable.shape) for name, variable in names_of(model, {}).items()}
    found = inference.infer(shapes).architecture
    assert found == dict(
        resnet_depth=depth, width_multiplier=2.0, sk_ratio=sk_ratio, se_ratio=0.0, proj_head_mode="nonlinear",
        proj_out_dim=128, num_proj_layers=3,
    )  # fmt: skip


def test_slots_averages_and_counters_do_not_matter(tmp_path):
    kernel = "base_model/conv2d/kernel"
    more = {f"{kernel}/{slot}": tf.zeros([3]) for slot in ("Momentum", "ExponentialMovingAverage", "Adam", "Adam_1")}
    folder, model = written(tmp_path, more={**more, "beta1_power": tf.constant(0.9)}, resnet_depth=10)
    back = tasks.restore_network(published.open_weights(folder))
    np.testing.assert_array_equal(
        back.encoder.get_layer("stem_conv").kernel, model.encoder.get_layer("stem_conv").kernel
    )


def refused(*args, **options):
    with pytest.raises(UserError) as raised:
        published.open_weights(*args, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "missing",
    ["base_model/conv2d/kernel", "base_model/conv2d_5/kernel", "base_model/batch_normalization_2/moving_mean",
     "head_contrastive/nl_1/dense/kernel", "head_supervised/linear_layer/dense/bias"],
)  # fmt: skip
def test_a_missing_variable_is_named(tmp_path, missing):
    folder, _ = written(tmp_path, without=[missing], resnet_depth=14)
    assert f"missing: {missing}" in refused(folder)


def test_a_variable_left_over_or_of_another_shape_is_named(tmp_path):
    more = {"base_model/conv2d_99/bias": tf.zeros([3]), "base_model/batch_normalization_1/gamma": tf.zeros([3])}
    folder, _ = written(tmp_path, more=more, resnet_depth=14)
    message = refused(folder)
    assert "left over: base_model/conv2d_99/bias" in message
    assert "of another shape: base_model/batch_normalization_1/gamma [3] not [32]" in message


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("base_model/conv2d/kernel", [7], "of another shape: base_model/conv2d/kernel [7]"),
        ("base_model/conv2d_3/kernel", [3, 3], "of another shape: base_model/conv2d_3/kernel [3, 3]"),
        ("head_contrastive/nl_0/dense/kernel", [], "of another shape: head_contrastive/nl_0/dense/kernel []"),
        ("head_contrastive/nl_2/dense/kernel", [9], "of another shape: head_contrastive/nl_2/dense/kernel [9]"),
        ("head_supervised/linear_layer/dense/kernel", [], "head_supervised/linear_layer/dense/bias"),
        ("head_supervised/linear_layer/dense/kernel", [9], "head_supervised/linear_layer/dense/bias"),
    ],
)
def test_a_shape_of_another_rank_is_named(tmp_path, name, shape, said):
    folder, _ = written(tmp_path, more={name: tf.zeros(shape)}, resnet_depth=14)
    assert said in refused(folder)


def test_many_differences_are_counted():
    found = {f"a{i}": [1] for i in range(9)}
    assert reading.differ(found, {"a0": [1]}) == "left over: a1, a2, a3 and 5 more"


def test_other_programs_files_are_refused(tmp_path):
    writing.write({"weights": tf.zeros([2])}, 0, str(tmp_path / "other"))
    assert "no network of the 2020 release" in refused(str(tmp_path / "other"), "teacher")
    assert refused(str(tmp_path / "nothing")).endswith("no such folder or checkpoint")
    assert refused(str(tmp_path)).endswith("no checkpoint in it")


def test_a_checkpoint_is_found_by_folder_prefix_index_and_without_its_state_file(tmp_path):
    folder, _ = written(tmp_path / "a", resnet_depth=10)
    (tmp_path / "a" / "checkpoint").unlink()
    for path in (folder, f"{folder}/model.ckpt-7", f"{folder}/model.ckpt-7.index"):
        assert published.open_weights(path).step == 7


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("below", ["", "saved_model"])
def test_a_network_comes_back_from_a_tf2_saved_model(tmp_path, offset, below):
    model = saved_model(tmp_path / "m" / below, offset, resnet_depth=14, sk_ratio=0.0625)
    weights = published.open_weights(str(tmp_path / "m"))
    assert weights.config["resnet_depth"] == 14 and weights.config["num_proj_layers"] == 3
    for ours, theirs in zip(model.variables, tasks.restore_network(weights).variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "twin",
    ["projection_head/nl_0/dense_77/kernel", "supervised_head/linear_layer/dense_3/kernel",
     "head_supervised/linear_layer_9/dense_9/kernel", "resnet/b/batch_normalization_1/gamma"],
)  # fmt: skip
def test_two_weights_of_a_saved_model_that_stand_for_one_are_named(tmp_path, twin):
    saved_model(tmp_path, twin=twin, resnet_depth=10)
    message = refused(str(tmp_path))
    assert "two weights stand for" in message and twin in message


GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
ONE_WEIGHT = object_graph({"resnet/conv2d/kernel": "its key"})
UNREADABLE = "the object graph in it cannot be read"
DAMAGED = {
    "a graph that does not parse": ({GRAPH: tf.constant(b"\xff\xff no graph")}, UNREADABLE),
    "a graph cut short": ({GRAPH: tf.constant(ONE_WEIGHT[:-3])}, UNREADABLE),
    "a graph whose names are not UTF-8": (
        {GRAPH: tf.constant(ONE_WEIGHT.replace(b"resnet", b"\xff\xfe\xfd\xfc\xfb\xfa"))},
        UNREADABLE,
    ),
    "a graph of numbers": ({GRAPH: tf.constant([1.0, 2.0])}, UNREADABLE),
    "a graph that names what is not there": ({GRAPH: tf.constant(ONE_WEIGHT)}, "names its key, which is not in it"),
    "a name that is not UTF-8": ({b"base_model/\xff\xfe": tf.zeros([2])}, "cannot be read, it may be damaged"),
    "a weight of text": (
        {"base_model/conv2d/kernel": tf.fill([7, 7, 3, 8], b"text")},
        "base_model/conv2d/kernel holds string, not floating-point numbers",
    ),
    "a number of 5,000 digits": ({f"base_model/conv2d_{'9' * 5000}/kernel": tf.zeros([1, 1, 1, 1])}, "left over"),
    "a width of 0": (
        {
            "base_model/conv2d/kernel": tf.zeros([7, 7, 3, 0]),
            "base_model/conv2d_1/kernel": tf.zeros([1, 1, 0, 0]),
            "base_model/conv2d/bias": tf.zeros([0]),
        },
        "does not fit",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, capsys, tensors, message):
    _, variables = network(resnet_depth=10)
    weights = {name: variable.value for name, variable in variables.items()}
    folder = written_raw(tmp_path / "damaged", {**weights, **tensors})
    assert command("--train_mode=finetune", f"--checkpoint={folder}", f"--model_dir={tmp_path}/run") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("step", [b"text", float("nan")])
def test_a_step_that_is_no_number_does_not_matter(tmp_path, step):
    _, variables = network(resnet_depth=10)
    weights = {name: variable.value for name, variable in variables.items()}
    folder = written_raw(tmp_path, {**weights, "global_step": tf.constant(step)})
    assert published.open_weights(folder).step == 0


def test_our_own_saved_model_is_refused_by_name(tmp_path, one_stage):
    tiny.begun(**tiny.PRETRAIN, model_dir=str(tmp_path / "run"), train_steps=1)
    folder = tiny.exported(subject.decide(dict(mode="export", model_dir=str(tmp_path / "run"))))
    assert "of a run of this program give the folder or a checkpoint, not a SavedModel" in refused(folder)


@pytest.mark.parametrize(
    ("folder", "layer"),
    [("finetuned_1pct", 1), ("finetuned_10pct", 1), ("finetuned_100pct", 0), ("pretrained", 0), ("supervised", 0),
     ("distill_1pct", 0), ("distill_10pct", 0)],
)  # fmt: skip
def test_the_published_folder_tells_which_layer_the_classifier_stands_on(tmp_path, caplog, folder, layer):
    path, model = written(tmp_path / "v2" / folder / "r10", resnet_depth=10, image_size=32, ft_proj_selector=layer)
    weights = published.open_weights(path, "teacher", logits=True)
    assert weights.config["ft_proj_selector"] == layer
    x = images()
    assert error(tasks.frozen_logits(weights)(x), model(x).logits) < 1e-5
    assert f"its classifier on {'head layer 1' if layer else 'h'}" in caplog.text
    assert "contradicts" in refused(path, "teacher", classifier_layer=1 - layer, logits=True)


@pytest.mark.parametrize(
    ("path", "layer"),
    [("gs://b/simclrv2/finetuned_1pct/r50_1x_sk0", 1), ("gs://b/finetuned_10pct/r50_1x_sk0/saved_model/", 1),
     ("a/finetuned_1pct/mine/hub", 1), ("pretrained/finetuned_1pct/r50_1x_sk0/model.ckpt-7", 1), ("finetuned_1pct", 1),
     ("supervised/projects/mine", None), ("finetuned_1pct/a/b/c", None), ("mine", None)],
)  # fmt: skip
def test_only_the_folder_of_the_network_or_the_one_above_tells(tmp_path, monkeypatch, path, layer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tf.io.gfile, "isdir", lambda path: "model.ckpt" not in path)
    assert reading.published_layer(path) == layer
    (tmp_path / "finetuned_1pct").mkdir()
    monkeypatch.chdir(tmp_path / "finetuned_1pct")
    assert reading.published_layer("r50_1x_sk0") == 1


def test_without_such_a_folder_the_layer_must_be_given_where_logits_are_asked(fine_tuned):
    path, model = fine_tuned
    assert "give --ft_proj_selector=1" in refused(path, "teacher", logits=True)
    assert published.open_weights(path).config["ft_proj_selector"] == 0  # to start from: the classifier does not matter
    x = images()
    for layer, same in ((1, True), (0, False), (2, False)):
        weights = published.open_weights(path, "teacher", classifier_layer=layer, logits=True)
        assert (error(tasks.frozen_logits(weights)(x), model(x).logits) < 1e-5) == same


def test_heads_that_leave_no_choice_need_no_route(tmp_path):
    for given in (dict(proj_head_mode="none"), dict(proj_head_mode="linear"), dict(num_proj_layers=1)):
        path, _ = written(tmp_path / str(len(given)) / str(given), resnet_depth=10, **given)
        assert published.open_weights(path, logits=True).config["ft_proj_selector"] == 0


def test_an_error_without_a_message_is_named_by_its_kind(tmp_path, monkeypatch):
    def fail(folder):
        raise tf.errors.UnknownError(None, None, "")

    monkeypatch.setattr(tf.io.gfile, "makedirs", fail)
    with pytest.raises(UserError, match=r"^--output=.* cannot be written: UnknownError$"):
        writing.write({}, 0, str(tmp_path))


def test_our_runs_go_out_and_come_back(tmp_path, tmp_path_factory, capsys):
    run = tiny.pretrained(tmp_path_factory)
    finetuned = str(tmp_path / "ft")
    tiny.begun(
        **tiny.QUICK, train_mode="finetune", checkpoint=run, ft_proj_selector=1, train_steps=2, model_dir=finetuned
    )
    last = str(tmp_path / "last")
    tiny.begun(**tiny.QUICK, train_mode="finetune", checkpoint=run, ft_proj_selector=-1, train_steps=1, model_dir=last)
    capsys.readouterr()  # what the training said
    for name, model_dir, layer in (("p", run, 0), ("f", finetuned, 1), ("l", last, 3)):
        output = str(tmp_path / name)
        assert published_main(["export", f"--checkpoint={model_dir}", f"--output={output}"]) == 0
        prefix, *told = capsys.readouterr().out.splitlines()
        assert Path(f"{prefix}.index").exists()
        # Up to 32 pixels the stem is one. A fine-tuned head tells where its classifier stands, a whole one does not.
        route = "" if layer else " --ft_proj_selector=0"
        assert told == [f"what the file does not tell: --image_size=16{route}"]
        ours = tasks.restore_network(checkpoint.Weights(model_dir))
        # A fine-tuned network ends at the layer its classifier stands on, and the last is of another width.
        weights = published.open_weights(output, classifier_layer=None if layer else 0, logits=True)
        theirs = tasks.restore_network(weights)
        for a, b in zip(ours.variables, theirs.variables, strict=True):
            np.testing.assert_array_equal(a, b)
        x = images(16)
        np.testing.assert_array_equal(ours(x).logits, theirs(x).logits)
    assert published_main(["export", "--checkpoint=nowhere", "--output=x"]) == 2
    assert capsys.readouterr().err == "published: error: --checkpoint=nowhere: no such folder or checkpoint\n"
    before = tiny.files_in(last)
    (tmp_path / "a_file").write_text("")
    for output, message in ((last, "is a run's folder"), (str(tmp_path / "a_file"), "cannot be written")):
        assert published_main(["export", f"--checkpoint={run}", f"--output={output}"]) == 2
        error_line = capsys.readouterr().err
        assert message in error_line and error_line.count("\n") == 1
    assert tiny.files_in(last) == before


def test_an_export_says_what_its_file_does_not_tell(tmp_path, capsys):
    run = tiny.begun(**tiny.PRETRAIN, sk_ratio=0.0625, train_steps=1, model_dir=str(tmp_path / "resnet_d"))
    assert published_main(["export", f"--checkpoint={run}", f"--output={tmp_path}/out"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "what the file does not tell: --sk_ratio=0.0625 --image_size=16 --ft_proj_selector=0"
    x = images(16)
    logits = tasks.restore_network(checkpoint.Weights(run))(x).logits
    for given, same in (({"sk_ratio": 0.0625}, True), ({}, False)):
        weights = published.open_weights(f"{tmp_path}/out", given=given, classifier_layer=0, logits=True)
        assert (error(tasks.restore_network(weights)(x).logits, logits) < 1e-6) == same
