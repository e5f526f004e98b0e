"""Published models at work: evaluated, exported, fine-tuned and distilled, from the command line."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import ROOT
from parity import error
from release_files import SMALL, images, names_of, written
from test_readme import commands_in
from test_run import command

import checkpoint
import config
import tasks
import train
from errors import UserError
from published import writing
from published.__main__ import main as published_main

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


@pytest.mark.slow  # It is evaluated above, and tests/test_export.py exports a network.
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


def test_a_published_teacher_is_distilled(fine_tuned, tmp_path, monkeypatch, capsys, nothing_exported):
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
    writing.write({name: variable.value for name, variable in names_of(model, {}).items()}, 0, "cut")
    for selector, status in ((0, 2), (2, 2), (1, 0)):
        flags = (f"--ft_proj_selector={selector}", "--dataset=digits", "--image_size=64", "--eval_steps=1")
        assert command("--mode=eval", "--checkpoint=cut", *flags) == status
    assert "--ft_proj_selector=2 contradicts --checkpoint=cut" in capsys.readouterr().err


def test_the_commands_of_the_page_run(tmp_path, tmp_path_factory, monkeypatch, nothing_exported):
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
    assert ended == {"digits_eval", "DIR_finetune", "digits_distill"}
    exporting = shlex.split(next(line for line in page.splitlines() if line.startswith("python -m published")))
    shutil.copytree(tiny.pretrained(tmp_path_factory), "runs/digits_pretrain")
    assert published_main(exporting[3:]) == 0
    assert Path("exported/model.ckpt-3.index").exists()


def test_our_teachers_layer_cannot_be_contradicted(tmp_path, tmp_path_factory):
    run = tiny.pretrained(tmp_path_factory)
    with pytest.raises(UserError, match="ft_proj_selector=1 contradicts --teacher"):
        tiny.resolve(train_mode="distill", teacher=run, ft_proj_selector=1, model_dir=str(tmp_path))
