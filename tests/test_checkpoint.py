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
import run_folder
import subject
import tasks
from checkpoint import checksums
from errors import UserError

ONE_STAGE = True  # see conftest.py


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory)


@pytest.fixture
def copied(pretrained, tmp_path):
    """A copy of the pretrained run, to be damaged."""
    return shutil.copytree(pretrained, tmp_path / "copied")


def test_a_run_without_a_checkpoint_starts_at_step_0(tmp_path):
    assert checkpoint.newest_that_reads(str(tmp_path / "empty"), "", "") is None


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
    made = subject.resolve({**tiny.PRETRAIN, "model_dir": "unused", **changes})
    return tasks.network(made, num_classes=10)


@pytest.mark.parametrize(
    ("changes", "parts", "message"),
    [
        (dict(width_multiplier=0.25), ["encoder"], r"encoder/stem_conv/kernel is \[3, 3, 3, 8\] there and \["),
        (dict(resnet_depth=18), ["encoder"], "encoder/group1_block2_conv1/kernel is not in it"),
        (dict(proj_out_dim=64), ["head"], r"head/head3_dense/kernel is \[8, 128\] there and \[8, 64\] here"),
        (dict(num_proj_layers=4), ["encoder", "head"], "head/"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(pretrained, changes, parts, message):
    with pytest.raises(UserError, match=f"--checkpoint={pretrained} does not fit this network: {message}"):
        checkpoint.Weights(pretrained).load(network(**changes), parts)


def test_another_number_of_classes_does_not_fit(pretrained):
    made = subject.resolve({**tiny.PRETRAIN, "model_dir": "unused"})
    with pytest.raises(UserError, match=r"supervised_head/supervised_head/kernel is \[8, 10\] there and \[8, 7\]"):
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
    with pytest.raises(UserError, match=f"--model_dir={tmp_path} holds checkpoints and no config.json"):
        run_folder.read_config(str(tmp_path))


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
    (copied / "ckpt-3.sha256").unlink()  # as a version of this program wrote it that knew no checksums
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
    assert checkpoint.Weights(str(copied)).prefix == str(copied / "ckpt-3")  # the newer by its name
    for file in (INDEX, CONTENT):
        (copied / file.replace("ckpt-3.", "model-a.")).write_bytes((copied / file).read_bytes())
        (copied / file).rename(copied / file.replace("ckpt-3.", "model-b."))
        (copied / file.replace("-3.", "-2.")).unlink()
    with pytest.raises(UserError, match="name one of model-a, model-b"):  # which of them is not known
        checkpoint.Weights(str(copied))


def test_a_bucket_that_cannot_be_reached_is_a_users_mistake(monkeypatch):
    def unreachable(path):
        raise tf.errors.FailedPreconditionError(None, None, "Could not resolve host\n\t when reading metadata")

    monkeypatch.setattr(tf.io.gfile, "exists", unreachable)
    for opened in (
        lambda: checkpoint.Weights("gs://b/run"),
        lambda: run_folder.is_checkpoint("gs://b/run", "checkpoint"),
    ):
        with pytest.raises(UserError, match=r"^--checkpoint=gs://b/run cannot be reached: Could not resolve host when"):
            opened()
    with pytest.raises(UserError, match=r"^--model_dir=gs://b/run cannot be reached: Could not resolve host when"):
        run_folder.read_config("gs://b/run")


def test_a_run_whose_only_checkpoint_is_damaged_is_not_started_again(copied):
    os.truncate(copied / CONTENT, 5000)
    before = tiny.files_in(copied)
    with pytest.raises(UserError, match=f"{copied}: none of its checkpoints can be taken .ckpt-3: it is damaged"):
        tiny.train_run(model_dir=str(copied), train_steps=4)
    assert tiny.files_in(copied) == before


def test_a_run_whose_checkpoints_are_gone_is_not_started_again(copied):
    for file in (INDEX, CONTENT):
        (copied / file).unlink()
    with pytest.raises(UserError, match=r"none of its checkpoints .* whose files are gone\): put one back"):
        tiny.train_run(model_dir=str(copied), train_steps=4)


def test_a_checkpoint_of_a_version_without_checksums_loads(copied):
    (copied / "ckpt-3.sha256").unlink()
    assert checkpoint.Weights(str(copied)).step == checkpoint.Weights(str(copied / "ckpt-3")).step == 3


def test_the_best_checkpoint_is_verified_too(copied):
    (copied / "best").mkdir()
    for file in copied.glob("ckpt-3.*"):
        shutil.copy(file, copied / "best")
    assert checkpoint.Weights(run_folder.chosen(str(copied), "best")).prefix == str(copied / "best" / "ckpt-3")
    flip_a_bit(copied / "best" / CONTENT, 0)
    with pytest.raises(UserError, match=r"best: none of its checkpoints can be taken .ckpt-3: it is damaged"):
        checkpoint.Weights(run_folder.chosen(str(copied), "best"))


# Which checkpoint is the newest


@pytest.fixture(scope="module")
def three_checkpoints(pretrained, tmp_path_factory):
    """The model_dir of a run with checkpoints of steps 3, 4 and 5. Only to be read."""
    model_dir = tiny.borrow(pretrained, tmp_path_factory.mktemp("three") / "run")
    tiny.train_run(model_dir=model_dir, train_steps=5, checkpoint_steps=1)
    assert names_of_checkpoints(model_dir) == ["ckpt-5", "ckpt-4", "ckpt-3"]
    return model_dir


@pytest.fixture
def several(three_checkpoints, tmp_path):
    """A copy of the run with checkpoints of steps 3, 4 and 5, to be damaged."""
    return shutil.copytree(three_checkpoints, tmp_path / "several")


def names_of_checkpoints(model_dir):
    """The checkpoints of a run, the newest first."""
    return [os.path.basename(prefix) for prefix in run_folder.checkpoints(str(model_dir))]


def poison(model_dir, step):
    """Puts a number that is not finite into the checkpoint of a step, as a run that diverged would have written it."""
    prefix = str(model_dir / f"ckpt-{step}")
    reader = tf.train.load_checkpoint(prefix)
    tensors = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    key = next(key for key in tensors if key.startswith("weights/encoder/stem_conv/kernel"))
    tensors[key] = np.full_like(tensors[key], np.nan)
    names = list(tensors)
    values = [tf.constant(tensors[name]) for name in names]
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=values)
    checksums.write(prefix)


def delete_newest(model_dir):
    for file in model_dir.glob("ckpt-5.*"):
        file.unlink()


def cut_off_without_checksums(model_dir):
    (model_dir / "ckpt-5.sha256").unlink()
    os.truncate(model_dir / "ckpt-5.data-00000-of-00001", 5000)


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


BEFORE_THE_NEWEST = {
    "deleted": delete_newest,
    "cut off, without checksums": lambda model_dir: cut_off_without_checksums(model_dir),
    "cut off": lambda model_dir: os.truncate(model_dir / "ckpt-5.data-00000-of-00001", 5000),
    "one bit of the data": lambda model_dir: flip_a_bit(model_dir / "ckpt-5.data-00000-of-00001", -1),
    "one bit of the index": lambda model_dir: flip_a_bit(model_dir / "ckpt-5.index", -1),
    "one bit of the checksums": lambda model_dir: flip_a_bit(model_dir / "ckpt-5.sha256", 0),
    "empty": lambda model_dir: [file.write_bytes(b"") for file in model_dir.glob("ckpt-5.*")],
    "half deleted": lambda model_dir: (model_dir / "ckpt-5.data-00000-of-00001").unlink(),
    "without an index": lambda model_dir: (model_dir / "ckpt-5.index").unlink(),
    "not finite": lambda model_dir: poison(model_dir, 5),
    "listed by an empty file": lambda model_dir: (delete_newest(model_dir), (model_dir / "checkpoint").write_text("")),
}


@pytest.mark.parametrize("fault", BEFORE_THE_NEWEST)
def test_the_newest_checkpoint_that_can_be_restored_is_taken(several, fault, caplog):
    BEFORE_THE_NEWEST[fault](several)
    assert checkpoint.newest_that_reads(str(several), "", "") == str(several / "ckpt-4")
    if (several / "ckpt-5.index").exists():
        assert f"skipped the checkpoint {several}/ckpt-5: " in caplog.text


@pytest.mark.parametrize("fault", ["not finite", pytest.param("deleted", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_there_and_ends_where_it_would_have(several, fault, capsys):
    wanted = tiny.saved_values(several / "ckpt-5")
    BEFORE_THE_NEWEST[fault](several)
    tiny.train_run(model_dir=str(several), train_steps=5, checkpoint_steps=1)
    assert "goes on from step 4 of 5" in capsys.readouterr().out
    for name, value in tiny.saved_values(several / "ckpt-5").items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_network_that_fails_is_no_damage(several, monkeypatch):
    def unavailable(_):
        raise tf.errors.UnavailableError(None, None, "the network is down")

    monkeypatch.setattr(tf.train, "load_checkpoint", unavailable)
    with pytest.raises(UserError, match=r"ckpt-5 cannot be reached: the network is down: try again"):
        checkpoint.newest_that_reads(str(several), "--model_dir=run", "")


def test_an_evaluation_takes_the_newest_checkpoint_that_reads(several, caplog):
    os.truncate(several / "ckpt-5.data-00000-of-00001", 5000)
    assert checkpoint.Weights(str(several)).step == 4
    assert f"skipped the checkpoint {several}/ckpt-5: it is damaged: ckpt-5.data-00000-of-00001 does not" in caplog.text
    with pytest.raises(
        UserError, match="ckpt-5 cannot be read, it is damaged"
    ):  # where it is asked for by name, no other is taken
        tasks.restore_network(checkpoint.Weights(str(several / "ckpt-5")))


def test_a_checkpoint_that_was_skipped_is_never_the_newest_again_and_the_good_ones_stay(several):
    index = (several / "ckpt-5.index").read_bytes()
    (several / "ckpt-5.index").write_bytes(b"")
    tiny.train_run(model_dir=str(several), train_steps=7, checkpoint_steps=3, keep_checkpoint_max=3)
    assert names_of_checkpoints(several) == ["ckpt-7", "ckpt-6", "ckpt-4"]
    assert tf.train.latest_checkpoint(str(several)) == str(several / "ckpt-7")
    assert (several / "ckpt-5.index.skipped").exists()
    (several / "ckpt-5.index.skipped").write_bytes(index)  # It can be read again.
    assert checkpoint.Weights(str(several)).step == 7


def test_weights_that_are_not_finite_are_not_taken_over(copied):
    poison(copied, 3)
    for path in (copied, copied / "ckpt-3"):
        with pytest.raises(UserError, match="not finite"):
            tasks.restore_network(checkpoint.Weights(str(path)))


def test_what_a_stopped_save_left_is_removed(copied):
    (copied / "ckpt-4_temp").mkdir()
    (copied / "ckpt-4_temp" / "part-00000-of-00001.data-00000-of-00001").write_bytes(b"half")
    tiny.train_run(model_dir=str(copied), train_steps=4)
    assert not list(copied.glob("*_temp"))


# Checkpoints of strangers


@pytest.mark.parametrize("content", ["{", "[1]", '{"classes": 3}', '{"classes": ["a"], "train_mode": 1}'])
def test_a_checkpoint_with_another_config_inside_is_a_users_mistake(tmp_path, content):
    class OfAStranger(checkpoint.layout.SavedConfig):
        def serialize(self):
            return content

    step = tf.Variable(1, dtype=tf.int64)
    tf.train.Checkpoint(config=OfAStranger({}), step=step).write(str(tmp_path / "ckpt-1"))
    with pytest.raises(UserError, match=f"--checkpoint={tmp_path}") as error:
        tasks.restore_network(checkpoint.Weights(str(tmp_path)))
    assert "\n" not in str(error.value)
