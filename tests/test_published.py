"""Published checkpoints come in, with their architecture read off their shapes, and go out, bit for bit."""

import json
import shlex
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import ROOT
from helpers import error, randomize
from test_readme import commands_in
from test_run import command

import checkpoint
import config
import export as export_lib
import published
import resnet
import tasks
import train
from errors import UserError

SMALL = dict(width_multiplier=0.125, image_size=64, memory="none", proj_out_dim=16)
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


def names_of(model, given):
    return {
        name: v for name, (_, v) in published.release_names(model, given.get("proj_head_mode", "nonlinear")).items()
    }


def network(classes=5, **given):
    """A network with values of its own, and its variables by TF1 name."""
    model = tasks.network(config.Config(**{**SMALL, **given}), classes)
    randomize(model.variables, seed=3)
    return model, names_of(model, given)


def written(folder, classes=5, more=None, without=(), **given):
    """The folder of a TF1 checkpoint of a random network, and the network."""
    model, variables = network(classes, **given)
    tensors = {name: variable.value for name, variable in variables.items() if name not in without}
    published.write({**tensors, **(more or {})}, 7, str(folder))
    return str(folder), model


def images(size=32):
    return np.random.default_rng(0).random([2, size, size, 3], np.float32)


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A ResNet-10 with a whole head whose classifier stands on its first layer, in a folder that does not tell."""
    folder = tmp_path_factory.mktemp("some") / "model"
    return written(folder, classes=10, resnet_depth=10, image_size=32, ft_proj_selector=1)


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


@pytest.mark.parametrize("depth", resnet.BLOCKS)
@pytest.mark.parametrize("sk_ratio", [0.0, 0.0625])
def test_every_depth_is_told_from_its_shapes(depth, sk_ratio):
    with keras.StatelessScope(initialize_variables=False):
        model = tasks.network(config.Config(resnet_depth=depth, sk_ratio=sk_ratio, width_multiplier=2.0), 1000)
    shapes = {name: list(variable.shape) for name, variable in names_of(model, {}).items()}
    found = published.infer(shapes)["architecture"]
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
    assert published.differ(found, {"a0": [1]}) == "left over: a1, a2, a3 and 5 more"


def test_other_programs_files_are_refused(tmp_path):
    published.write({"weights": tf.zeros([2])}, 0, str(tmp_path / "other"))
    assert "no network of the 2020 release" in refused(str(tmp_path / "other"), "teacher")
    assert refused(str(tmp_path / "nothing")).endswith("no such folder or checkpoint")
    assert refused(str(tmp_path)).endswith("no checkpoint in it")


def test_a_checkpoint_is_found_by_folder_prefix_index_and_without_its_state_file(tmp_path):
    folder, _ = written(tmp_path / "a", resnet_depth=10)
    (tmp_path / "a" / "checkpoint").unlink()
    for path in (folder, f"{folder}/model.ckpt-7", f"{folder}/model.ckpt-7.index"):
        assert published.open_weights(path).step == 7


def saved_model(folder, offset=0, twin="", **given):
    """A TF2 SavedModel named as the release names its own, of a random network, with a weight more; and the network."""
    model, variables = network(**given)
    module = tf.Module()
    for i, (name, variable) in enumerate(variables.items()):
        scope, layer, *_, weight = name.split("/")
        kind, number = (
            (layer.rsplit("_", 1) if layer[-1].isdigit() else (layer, 0)) if scope == "base_model" else ("", 0)
        )
        number = int(number) + offset
        numbered = {"conv2d": "conv2d", "batch_normalization": "sync_batch_normalization"}.get(kind)
        full = f"resnet/block_group1/some_block/{numbered}" + (f"_{number}" if number else "") + f"/{weight}"
        if scope == "head_contrastive":
            full = f"projection_head/{name.split('/', 1)[1]}".replace("batch_norm", "x/sync_batch_norm")
            full = full.replace("/dense/", f"/linear_layer_{i}/dense_{i}/").replace(
                "_normalization/", f"_normalization_{i}/"
            )
        if scope == "head_supervised":
            full = f"head_supervised/linear_layer_9/dense_9/{weight}"
        setattr(module, f"v{i}", tf.Variable(variable.value, name=full))
    module.step = tf.Variable(0, name="global_step")
    if twin:
        module.twin = tf.Variable(0, name=twin)
    tf.saved_model.save(module, str(folder))
    return model


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


def test_our_own_saved_model_is_refused_by_name(tmp_path):
    tiny.train_run(**tiny.PRETRAIN, model_dir=str(tmp_path / "run"), train_steps=1)
    folder = export_lib.export(tiny.resolve(mode="export", model_dir=str(tmp_path / "run")))
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
    assert error(tasks.frozen_logits(weights)(x), model(x).logits) < 1e-6
    assert f"its classifier on {'head layer 1' if layer else 'h'}" in caplog.text
    assert "contradicts" in refused(path, "teacher", {"ft_proj_selector": 1 - layer}, logits=True)


@pytest.mark.parametrize(
    ("path", "layer"),
    [("gs://b/simclrv2/finetuned_1pct/r50_1x_sk0", 1), ("gs://b/finetuned_10pct/r50_1x_sk0/saved_model/", 1),
     ("a/finetuned_1pct/mine/hub", 1), ("pretrained/finetuned_1pct/r50_1x_sk0/model.ckpt-7", 1), ("finetuned_1pct", 1),
     ("supervised/projects/mine", None), ("finetuned_1pct/a/b/c", None), ("mine", None)],
)  # fmt: skip
def test_only_the_folder_of_the_network_or_the_one_above_tells(tmp_path, monkeypatch, path, layer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tf.io.gfile, "isdir", lambda path: "model.ckpt" not in path)
    assert published.published_layer(path) == layer
    (tmp_path / "finetuned_1pct").mkdir()
    monkeypatch.chdir(tmp_path / "finetuned_1pct")
    assert published.published_layer("r50_1x_sk0") == 1


def test_without_such_a_folder_the_layer_must_be_given_where_logits_are_asked(fine_tuned):
    path, model = fine_tuned
    assert "give --ft_proj_selector=1" in refused(path, "teacher", logits=True)
    assert published.open_weights(path).config["ft_proj_selector"] == 0  # to start from: the classifier does not matter
    x = images()
    for layer, same in ((1, True), (0, False), (2, False)):
        weights = published.open_weights(path, "teacher", {"ft_proj_selector": layer}, logits=True)
        assert (error(tasks.frozen_logits(weights)(x), model(x).logits) < 1e-6) == same


def test_heads_that_leave_no_choice_need_no_route(tmp_path):
    for given in (dict(proj_head_mode="none"), dict(proj_head_mode="linear"), dict(num_proj_layers=1)):
        path, _ = written(tmp_path / str(len(given)) / str(given), resnet_depth=10, **given)
        assert published.open_weights(path, logits=True).config["ft_proj_selector"] == 0


def test_our_runs_go_out_and_come_back(tmp_path, tmp_path_factory, capsys):
    run = tiny.pretrained(tmp_path_factory)
    finetuned = str(tmp_path / "ft")
    tiny.train_run(
        **tiny.QUICK, train_mode="finetune", checkpoint=run, ft_proj_selector=1, train_steps=2, model_dir=finetuned
    )
    last = str(tmp_path / "last")
    tiny.train_run(
        **tiny.QUICK, train_mode="finetune", checkpoint=run, ft_proj_selector=-1, train_steps=1, model_dir=last
    )
    for name, model_dir, layer in (("p", run, 0), ("f", finetuned, 1), ("l", last, 3)):
        output = str(tmp_path / name)
        assert published.main(["export", f"--checkpoint={model_dir}", f"--output={output}"]) == 0
        prefix, *told = capsys.readouterr().out.splitlines()
        assert Path(f"{prefix}.index").exists()
        # Up to 32 pixels the stem is one. A fine-tuned head tells where its classifier stands, a whole one does not.
        route = "" if layer else " --ft_proj_selector=0"
        assert told == [f"what the file does not tell: --image_size=16{route}"]
        ours = tasks.restore_network(checkpoint.Weights(model_dir))
        # A fine-tuned network ends at the layer its classifier stands on, and the last is of another width.
        given = {} if layer else {"ft_proj_selector": 0}
        theirs = tasks.restore_network(published.open_weights(output, given=given, logits=True))
        for a, b in zip(ours.variables, theirs.variables, strict=True):
            np.testing.assert_array_equal(a, b)
        x = images(16)
        np.testing.assert_array_equal(ours(x).logits, theirs(x).logits)
    assert published.main(["export", "--checkpoint=nowhere", "--output=x"]) == 2
    assert capsys.readouterr().err == "published.py: error: --checkpoint=nowhere: no such folder or checkpoint\n"
    before = tiny.files_in(last)
    (tmp_path / "a_file").write_text("")
    for output, message in ((last, "is a run's folder"), (str(tmp_path / "a_file"), "cannot be written")):
        assert published.main(["export", f"--checkpoint={run}", f"--output={output}"]) == 2
        error_line = capsys.readouterr().err
        assert message in error_line and error_line.count("\n") == 1
    assert tiny.files_in(last) == before


def test_an_export_says_what_its_file_does_not_tell(tmp_path, tmp_path_factory, capsys):
    run = tiny.pretrained(tmp_path_factory, "resnet_d", steps=1, sk_ratio=0.0625)
    assert published.main(["export", f"--checkpoint={run}", f"--output={tmp_path}"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "what the file does not tell: --sk_ratio=0.0625 --image_size=16 --ft_proj_selector=0"
    x = images(16)
    logits = tasks.restore_network(checkpoint.Weights(run))(x).logits
    for given, same in (({"sk_ratio": 0.0625}, True), ({}, False)):
        weights = published.open_weights(str(tmp_path), given={**given, "ft_proj_selector": 0}, logits=True)
        assert (error(tasks.restore_network(weights)(x).logits, logits) < 1e-6) == same


DIGITS = ["--dataset=digits", "--eval_split=test", "--image_size=32", "--eval_batch_size=360"]


def test_one_command_evaluates_a_published_model(fine_tuned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, _ = fine_tuned
    assert command("--mode=eval", f"--checkpoint={path}", *DIGITS) == 2
    assert "--ft_proj_selector=1" in capsys.readouterr().err
    assert command("--mode=eval", f"--checkpoint={path}", "--ft_proj_selector=1", *DIGITS) == 0
    result = json.loads((tmp_path / "runs/digits_eval/result.json").read_text())
    assert result["examples"] == 360 and 0 <= result["top_1"] <= result["top_5"] <= 1 and "knn_top_1" not in result
    assert not (tmp_path / "runs/digits_eval/saved_model").exists()


def test_one_command_exports_a_published_model(fine_tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, model = fine_tuned
    assert command("--mode=export", f"--checkpoint={path}", "--ft_proj_selector=1", *DIGITS) == 0
    saved = next((tmp_path / "runs/digits_export/saved_model").iterdir())
    x = images()
    logits = tf.saved_model.load(str(saved))(x, trainable=False)["logits_sup"]
    assert error(logits, model(x).logits) < 1e-5


def test_a_flag_that_contradicts_a_published_model_is_refused(fine_tuned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--resnet_depth=18", "--width_multiplier=1", "--num_proj_layers=2", "--image_size=64", "--se_ratio=0.5")
    for flag in (*flags, "--proj_head_mode=none", "--proj_out_dim=64"):
        assert command("--train_mode=finetune", f"--checkpoint={fine_tuned[0]}", flag) == 2
        assert flag.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_fine_tuning_starts_from_a_published_model(fine_tuned, tmp_path):
    path, model = fine_tuned
    given = tiny.resolve(
        **{**tiny.QUICK, "learning_rate": 0.0}, train_mode="finetune", checkpoint=path, ft_proj_selector=1,
        labels_per_class=2, train_steps=1, model_dir=str(tmp_path),
    )  # fmt: skip
    assert (given.resnet_depth, given.width_multiplier) == (10, 0.125)
    assert given.image_size == 16  # the preset's, since 16 and 32 pixels have the same stem
    train.train(given, tf.distribute.get_strategy())
    started = tasks.restore_network(checkpoint.Weights(str(tmp_path)))
    for name in ("stem_conv", "group4_block1_conv2"):
        np.testing.assert_array_equal(started.encoder.get_layer(name).kernel, model.encoder.get_layer(name).kernel)
    np.testing.assert_array_equal(
        started.head.get_layer("head1_dense").kernel, model.head.get_layer("head1_dense").kernel
    )


def test_a_published_teacher_is_distilled(fine_tuned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [
        *("--train_mode=distill", f"--teacher={fine_tuned[0]}", "--mode=train_then_eval", "--train_steps=1"),
        *("--train_batch_size=16", "--eval_batch_size=360", "--warmup_epochs=0"),
    ]
    assert command(*flags) == 2
    assert "--ft_proj_selector=1" in capsys.readouterr().err
    assert command(*flags, "--ft_proj_selector=1") == 0
    result = json.loads((tmp_path / "runs/digits_distill/result.json").read_text())
    assert 0 <= result["teacher_agreement"] <= 1
    student = checkpoint.Weights("runs/digits_distill")
    assert not student.has("head") and student.config["ft_proj_selector"] == 1
    assert tasks.restore_network(student).ft_proj_selector == 0


def test_a_published_teacher_needs_a_classifier_of_the_datas_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    without, _ = written(tmp_path / "without", classes=0, resnet_depth=10, image_size=32)
    three, _ = written(tmp_path / "distill_1pct" / "three", classes=3, resnet_depth=10, image_size=32)
    for mode in ("--mode=train", "--mode=plan"):
        for teacher, message in ((without, "has no supervised head"), (three, "knows 3 classes")):
            assert command("--train_mode=distill", f"--teacher={teacher}", mode) == 2
            assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_layer_of_a_cut_head_cannot_be_contradicted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tasks.network(
        config.Config(**SMALL, resnet_depth=10, train_mode="finetune", checkpoint="x", ft_proj_selector=1), 10
    )
    published.write({name: variable.value for name, variable in names_of(model, {}).items()}, 0, "cut")
    for selector, status in ((0, 2), (2, 2), (1, 0)):
        flags = (f"--ft_proj_selector={selector}", "--dataset=digits", "--image_size=64", "--eval_steps=1")
        assert command("--mode=eval", "--checkpoint=cut", *flags) == status
    assert "--ft_proj_selector=2 contradicts --checkpoint=cut" in capsys.readouterr().err


def test_the_commands_of_the_page_run(tmp_path, tmp_path_factory, monkeypatch):
    """With small published models, and the digits in ImageNet's place."""
    monkeypatch.chdir(tmp_path)
    tiny.digit_images("DIR/train", 4)
    tiny.digit_images("DIR/test", 2)
    page = (ROOT / "docs" / "published.md").read_text()
    page = page.replace("gs://simclr-checkpoints/simclrv2", "PUBLISHED")
    page = page.replace("--dataset=imagenet2012 --data_dir=DATA", "--dataset=digits").replace("=validation", "=test")
    for folder in ("finetuned_10pct/r50_1x_sk0", "pretrained/r50_1x_sk0", "finetuned_10pct/r152_3x_sk1"):
        written(tmp_path / "PUBLISHED" / folder, classes=10, resnet_depth=10, image_size=32, width_multiplier=0.125)
    commands = commands_in(page)
    assert len(commands) == 3
    student = ["--resnet_depth=10", "--width_multiplier=0.125", "--eval_batch_size=360"]
    for arguments in commands:
        assert command(*arguments, "--train_steps=1", "--train_batch_size=8", *student) == 0, arguments
    ended = {path.parent.name for path in tmp_path.glob("runs/*/result.json")}
    assert ended == {"digits_eval", "image_folder_finetune", "digits_distill"}
    exporting = shlex.split(next(line for line in page.splitlines() if line.startswith("python published.py")))
    shutil.copytree(tiny.pretrained(tmp_path_factory), "runs/digits_pretrain")
    assert published.main(exporting[2:]) == 0
    assert Path("exported/model.ckpt-3.index").exists()


def test_our_teachers_layer_cannot_be_contradicted(tmp_path, tmp_path_factory):
    run = tiny.pretrained(tmp_path_factory)
    with pytest.raises(UserError, match="ft_proj_selector=1 contradicts --teacher"):
        tiny.resolve(train_mode="distill", teacher=run, ft_proj_selector=1, model_dir=str(tmp_path))
