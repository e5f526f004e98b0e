"""Checkpoints: everything comes back, they stand alone, and what does not fit is refused by name."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tiny

import checkpoint
import config
import lars_optimizer
import tasks
import train
from errors import UserError

CLASSES = ["zero", "one", "two"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory)


@pytest.fixture
def copied(pretrained, tmp_path):
    """A copy of the pretrained run, to be damaged."""
    return shutil.copytree(pretrained, tmp_path / "copied")


def live_run(model_dir, seed, keep=5):
    """A tiny pretraining task with everything a run remembers, and its checkpoints."""
    tf.keras.utils.set_random_seed(seed)
    made = config.resolve({**tiny.PRETRAIN, "model_dir": str(model_dir), "num_proj_layers": 2})
    task = tasks.make_task(made, CLASSES)
    optimizer = lars_optimizer.make_optimizer("lars", 0.1, head=task.model.supervised_head.trainable_variables)
    optimizer.build(task.model.trainable_variables)
    description = checkpoint.describe(made.to_dict(), CLASSES, 99)
    saved = checkpoint.RunCheckpoints(str(model_dir), description, keep, task.model, optimizer, task.state)
    return task, optimizer, saved


def remembered(task, optimizer):
    """Every number a run must not forget."""
    values = {"queue keys": task.queue.keys, "queue count": task.queue.count}
    values |= {f"optimizer {variable.path}": variable for variable in optimizer.variables}
    for network, model in (("model", task.model), ("momentum", task.momentum)):
        for part, layers in model.named_weights().items():
            for layer, variables in layers.items():
                values |= {f"{network} {part} {layer} {name}": value for name, value in variables.items()}
    return {name: np.array(value) for name, value in values.items()}


def random_batch():
    numbers = np.random.default_rng(0)
    views = {key: numbers.random([8, 16, 16, 3], np.float32) for key in ("view_1", "view_2")}
    return {**views, "label": np.arange(8, dtype=np.int32) % 3}


def test_everything_a_run_remembers_comes_back(tmp_path):
    task, optimizer, saved = live_run(tmp_path, seed=0)
    step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
    for _ in range(2):
        step(random_batch())
    assert os.path.basename(saved.save()) == "ckpt-2"
    other_task, other_optimizer, other_saved = live_run(tmp_path, seed=1)
    wanted, before = remembered(task, optimizer), remembered(other_task, other_optimizer)
    changed = [name for name in wanted if not np.array_equal(wanted[name], before[name])]
    for part in ("model encoder", "model supervised_head", "momentum head", "optimizer", "queue keys", "queue count"):
        assert any(name.startswith(part) for name in changed), part
    assert other_saved.resume() == 2
    after = remembered(other_task, other_optimizer)
    for name, value in wanted.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_a_run_without_a_checkpoint_starts_at_step_0(tmp_path):
    assert live_run(tmp_path / "empty", seed=0)[2].resume() == 0


def test_only_the_newest_checkpoints_stay(tmp_path):
    _, optimizer, saved = live_run(tmp_path, seed=0, keep=2)
    for step in (1, 5, 7, 20):
        optimizer.iterations.assign(step)
        saved.save()
    assert sorted(path.name for path in tmp_path.glob("*.index")) == ["ckpt-20.index", "ckpt-7.index"]
    assert live_run(tmp_path, seed=0)[2].resume() == 20


def test_the_config_is_inside_the_checkpoint(pretrained):
    weights = checkpoint.Weights(pretrained)
    with open(os.path.join(pretrained, "config.json")) as file:
        assert weights.config == json.load(file)
    assert weights.step == 3
    assert weights.classes == [str(digit) for digit in range(10)]
    restored = config.from_dict(weights.config)
    assert (restored.resnet_depth, restored.model_dir, restored.memory_size) == (10, pretrained, 48)
    assert weights.config["versions"]["tensorflow"] == tf.__version__
    assert weights.config["train_examples"] == 1437


def test_a_checkpoint_goes_by_its_folder_its_prefix_or_its_index_file(pretrained):
    prefix = os.path.join(pretrained, "ckpt-3")
    assert {checkpoint.Weights(path).prefix for path in (pretrained, prefix, f"{prefix}.index")} == {prefix}


def test_a_checkpoint_says_which_parts_it_has(pretrained):
    weights = checkpoint.Weights(pretrained)
    assert all(weights.has(part) for part in ("encoder", "head", "supervised_head"))
    assert not weights.has("enc")


@pytest.mark.parametrize("files", ["ckpt-3.*", "*"], ids=["the checkpoint alone", "the whole folder"])
def test_a_checkpoint_copied_elsewhere_needs_nothing_of_where_it_was(pretrained, copied, tmp_path, files):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in copied.glob(files):
        if file.is_file():
            shutil.move(file, moved)
    shutil.rmtree(copied)
    path = moved if files == "*" else moved / "ckpt-3"
    model = tasks.restore_network(checkpoint.Weights(str(path)))
    original = tasks.restore_network(checkpoint.Weights(pretrained))
    for ours, theirs in zip(model.variables, original.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_loaded_weights_are_the_saved_ones(pretrained):
    model = tasks.restore_network(checkpoint.Weights(pretrained))
    reader = tf.train.load_checkpoint(pretrained)
    compared = 0
    for part, layers in model.named_weights().items():
        for layer, variables in layers.items():
            for name, variable in variables.items():
                key = f"weights/{part}/{layer}/{name}/.ATTRIBUTES/VARIABLE_VALUE"
                np.testing.assert_array_equal(variable, reader.get_tensor(key))
                compared += 1
    assert compared == len(model.variables)


def network(**changes):
    made = config.resolve({**tiny.PRETRAIN, "model_dir": "unused", **changes})
    return tasks.network(made, num_classes=10)


@pytest.mark.parametrize(
    ("changes", "parts", "message"),
    [
        (dict(width_multiplier=0.25), ["encoder"], r"encoder/stem_conv/kernel is \[3, 3, 3, 8\] there and \["),
        (dict(resnet_depth=18), ["encoder"], "encoder/group1_block2_conv1/kernel is not in it"),
        (dict(proj_out_dim=64), ["head"], r"head/head3_dense/kernel is \[64, 128\] there and \[64, 64\] here"),
        (dict(num_proj_layers=4), ["encoder", "head"], "head/"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(pretrained, changes, parts, message):
    with pytest.raises(UserError, match=f"--checkpoint={pretrained} does not fit this network: {message}"):
        checkpoint.Weights(pretrained).load(network(**changes), parts)


def test_another_number_of_classes_does_not_fit(pretrained):
    made = config.resolve({**tiny.PRETRAIN, "model_dir": "unused"})
    with pytest.raises(UserError, match=r"supervised_head/supervised_head/kernel is \[64, 10\] there and \[64, 7\]"):
        checkpoint.Weights(pretrained).load(tasks.network(made, num_classes=7), ["supervised_head"])


def test_what_is_no_checkpoint_is_refused_with_the_flag_that_named_it(tmp_path):
    with pytest.raises(UserError, match=r"--teacher=.*nowhere: no such folder or checkpoint"):
        checkpoint.Weights(str(tmp_path / "nowhere"), "teacher")
    with pytest.raises(UserError, match=f"--checkpoint={tmp_path}: no checkpoint in it"):
        checkpoint.Weights(str(tmp_path))
    (tmp_path / "file").write_text("no checkpoint")
    with pytest.raises(UserError, match="no checkpoint in it"):
        checkpoint.Weights(str(tmp_path / "file"))


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    tf.train.Checkpoint(v=tf.Variable(1.0)).save(str(tmp_path / "ckpt"))
    with pytest.raises(UserError, match="checkpoint of another program"):
        checkpoint.Weights(str(tmp_path))
    with pytest.raises(UserError, match=f"--model_dir={tmp_path} holds checkpoints of another program"):
        checkpoint.read_config(str(tmp_path))


INDEX, CONTENT = "ckpt-3.index", "ckpt-3.data-00000-of-00001"
DAMAGES = {
    "half an index": (INDEX, lambda content: content[: len(content) // 2]),
    "noise as index": (INDEX, lambda content: np.random.default_rng(0).bytes(len(content))),
    "empty index": (INDEX, lambda _: b""),
    "no index": (INDEX, None),
    "empty data": (CONTENT, lambda _: b""),
    "half the data": (CONTENT, lambda content: content[: len(content) // 2]),
    "no data": (CONTENT, None),
    "flipped bits": (CONTENT, lambda content: bytes(byte ^ (i % 256 == 0) for i, byte in enumerate(content))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_users_mistake(copied, damage):
    name, change = DAMAGES[damage]
    content = (copied / name).read_bytes()
    (copied / name).unlink()
    if change:
        (copied / name).write_bytes(change(content))
    with pytest.raises(UserError, match=f"--checkpoint={copied}") as error:
        tasks.restore_network(checkpoint.Weights(str(copied)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("listed", [b"nonsense", None])
def test_a_lone_checkpoint_is_found_without_a_list_of_checkpoints(copied, listed):
    (copied / "checkpoint").unlink()
    if listed:
        (copied / "checkpoint").write_bytes(listed)
    assert checkpoint.Weights(str(copied)).step == 3
    for file in (INDEX, CONTENT):
        (copied / file.replace("-3.", "-2.")).write_bytes((copied / file).read_bytes())
    with pytest.raises(UserError, match="name one of ckpt-2, ckpt-3"):  # which of them is not known
        checkpoint.Weights(str(copied))


def test_a_bucket_that_cannot_be_reached_is_a_users_mistake(monkeypatch):
    def unreachable(path):
        raise tf.errors.FailedPreconditionError(None, None, "Could not resolve host\n\t when reading metadata")

    monkeypatch.setattr(tf.io.gfile, "exists", unreachable)
    for opened in (lambda: checkpoint.Weights("gs://b/run"), lambda: checkpoint.exists("gs://b/run")):
        with pytest.raises(UserError, match=r"^--checkpoint=gs://b/run cannot be reached: Could not resolve host$"):
            opened()
    with pytest.raises(UserError, match=r"^--model_dir=gs://b/run cannot be reached: Could not resolve host$"):
        checkpoint.read_config("gs://b/run")


def test_a_run_whose_newest_checkpoint_is_damaged_is_not_gone_on_with(copied):
    os.truncate(copied / CONTENT, 5000)
    before = tiny.files_in(copied)
    with pytest.raises(UserError, match=f"{copied}.*damaged"):
        tiny.train_run(model_dir=str(copied), train_steps=4)
    assert tiny.files_in(copied) == before


def test_the_config_of_a_run_is_read_from_its_folder(pretrained, tmp_path):
    assert checkpoint.read_config(pretrained)["resnet_depth"] == 10
    assert checkpoint.read_config(str(tmp_path)) is None
    assert checkpoint.read_config(str(tmp_path / "nowhere")) is None


def test_a_model_dir_that_is_a_file_or_holds_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        checkpoint.read_config(str(tmp_path / "file"))
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config.json cannot be read") as error:
        checkpoint.read_config(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[1, 2]", '{"name": "of another program"}'])
def test_a_config_of_another_program_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"--model_dir={tmp_path}"):
        checkpoint.read_config(str(tmp_path))


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    checkpoint.write_json(str(path), {"top_1": 0.5})
    with pytest.raises(TypeError):
        checkpoint.write_json(str(path), {"top_1": object()})
    assert json.loads(path.read_text()) == {"top_1": 0.5}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tf.io.gfile, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_json(str(path), {"top_1": 0.9})
    assert json.loads(path.read_text()) == {"top_1": 0.5}
    monkeypatch.undo()
    checkpoint.write_json(str(path), {"top_1": 0.9})
    assert json.loads(path.read_text()) == {"top_1": 0.9}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written"):
        checkpoint.write_config(str(tmp_path / "file" / "run"), {})
