"""What may change when a run goes on: a test for each row of docs/continuation.md, and a run of an earlier version."""

import re
import shutil

import bits
import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import ROOT

import checkpoint
import continuation
import preparation
import subject
from config import FIELDS, Config
from errors import UserError

ROWS = [
    (words, verdict, re.findall(r"`--(\w+)`", flags))
    for words, verdict, flags in re.findall(
        r"^\| (.+?) \| (.+?) \| (`--.+) \|$", (ROOT / "docs" / "continuation.md").read_text(), re.MULTILINE
    )
]
FLAGS = [(flag, verdict) for _, verdict, flags in ROWS for flag in flags]

BEFORE = {
    **Config(train_mode="pretrain", model_dir="run").to_dict(),
    "recipe_reasons": {},
    "classes": ["ant", "bee"],
    "train_examples": 30,
    "data_fingerprint": "of 30 images",
    "versions": {"tensorflow": "2.21.0"},
    "git_commit": "1234",
    "replicas": 1,
    "device": "a CPU with 2 cores",
}


def other_value(name):
    """A value that the run does not have."""
    field, was = FIELDS[name], BEFORE[name]
    choices = [choice for choice in field.metadata["choices"] or () if choice != was]
    if choices:
        return choices[0]
    if isinstance(was, bool):
        return not was
    return f"{was}other" if isinstance(was, str) else was + 1


def refusal(given, saved=BEFORE, trains=True):
    """Why flags are refused; None where they are not."""
    try:
        continuation.check_flags(given, saved, "run", trains)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


# Flags


def test_the_page_has_every_flag_that_trains_once():
    in_page = [flag for flag, _ in FLAGS]
    assert len(in_page) == len(set(in_page)) and set(in_page) == set(continuation.KIN)
    assert set(in_page) >= {name for name, field in FIELDS.items() if field.metadata["trains"]}


def test_the_page_gives_the_words_of_the_table():
    kinds = [{continuation.KIN[flag] for flag in flags} for _, _, flags in ROWS]
    assert all(len(kind) == 1 for kind in kinds)
    for (words, _, _), kind in zip(ROWS, kinds, strict=True):
        assert kind.pop().value.startswith(words)


@pytest.mark.parametrize(("name", "verdict"), FLAGS)
def test_a_flag_with_another_value_does_what_the_page_says(name, verdict):
    value = other_value(name)
    now = {**BEFORE, name: value}
    message = refusal({name: value})
    if verdict.startswith("refused"):
        assert f"--{name}={value} contradicts the run in --model_dir=run, which has {name}={BEFORE[name]}" in message
        assert message.endswith("leave the flag out to go on with it, or choose another --model_dir")
    else:
        assert message is None
        assert (name in continuation.changed_flags(BEFORE, now)) == verdict.startswith("said")


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {flag for flag, _ in FLAGS}))
def test_every_other_flag_is_taken_without_a_word(name):
    value = other_value(name)
    assert refusal({name: value}) is None
    assert not continuation.changed_flags(BEFORE, {**BEFORE, name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_with_the_value_of_the_run_is_taken_without_a_word(name):
    assert refusal({name: BEFORE[name]}) is None


def test_a_command_that_does_not_train_keeps_the_network_alone():
    refused = {name for name in FIELDS if refusal({name: other_value(name)}, trains=False)}
    assert refused == {name for name, kin in continuation.KIN.items() if kin is continuation.Kin.NETWORK}


def test_several_refused_flags_are_named_together():
    message = refusal({"seed": 5, "temperature": 0.5, "learning_rate": 1.0})
    assert "--seed=5" in message and "--temperature=0.5" in message and "learning_rate" not in message
    assert message.endswith("leave the flags out to go on with it, or choose another --model_dir")


def test_a_part_of_the_training_images_that_is_held_out_stays():
    of_folder = {**BEFORE, "dataset": "image_folder", "data_dir": "images"}
    held_out = {**of_folder, "eval_split": "auto"}
    assert "--eval_split=test contradicts" in refusal({"eval_split": "test"}, held_out)
    assert "--eval_split=auto contradicts" in refusal({"eval_split": "auto"}, of_folder)
    assert refusal({"eval_split": "auto"}, held_out) is None and refusal({"eval_split": "test"}, of_folder) is None


def test_the_same_folder_by_another_path_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal({"checkpoint": str(tmp_path / "start")}, {**BEFORE, "checkpoint": "start"}) is None
    assert refusal({"teacher": "./start"}, {**BEFORE, "train_mode": "distill", "teacher": "start"}) is None
    assert "--checkpoint=" in refusal({"checkpoint": str(tmp_path)}, {**BEFORE, "checkpoint": ""})


# What is no flag


def of_student(**more):
    distills = dict(train_mode="distill", teacher="finetuned")
    return {**BEFORE, **distills, "teacher_weights": "abc", "teacher_step": 60, **more}


def refused_facts(before, now):
    with pytest.raises(UserError) as error:
        continuation.check_facts(before, now)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_teacher_is_known_by_its_weights():
    moved = of_student(teacher="elsewhere")
    assert refusal({"teacher": "elsewhere"}, of_student()) is None
    continuation.check_facts(of_student(), moved)
    assert "teacher" in continuation.changed_flags(of_student(), moved)
    assert not continuation.in_words(of_student(), moved)


@pytest.mark.parametrize("path", ["finetuned", "another"])
def test_another_teacher_or_one_that_was_trained_on_is_refused(path):
    now = of_student(teacher=path, teacher_weights="def", teacher_step=100)
    message = refused_facts(of_student(), now)
    assert f"--teacher={path} has other weights" in message and "--teacher=finetuned at step 60" in message


@pytest.mark.parametrize("name", ["data_dir", "labels", "images"])
def test_other_images_in_another_place_are_refused_and_the_same_are_not(name):
    before, now = {**BEFORE, name: "here"}, {**BEFORE, name: "there"}
    continuation.check_facts(before, now)
    assert not continuation.in_words(before, now)
    message = refused_facts(before, {**now, "data_fingerprint": "of others", "train_examples": 40})
    assert f"--{name}=there holds other images or labels" in message and f"give --{name}=here as before" in message


def test_a_folder_that_grew_is_said():
    now = {**BEFORE, "data_fingerprint": "of 31 images", "train_examples": 31}
    continuation.check_facts(BEFORE, now)
    (sentence,) = continuation.in_words(BEFORE, now)
    assert "(30 examples then, 31 now): it goes on as they are" in sentence and "some images come twice" in sentence


def test_other_classes_are_refused():
    continuation.check_classes(BEFORE, ["ant", "bee"], "run")
    with pytest.raises(UserError, match="--model_dir=run was trained on other classes"):
        continuation.check_classes(BEFORE, ["ant", "cow"], "run")


def test_another_number_of_replicas_is_said_where_batch_norm_depends_on_it():
    now = {**BEFORE, "replicas": 4}
    assert not continuation.in_words(BEFORE, now)
    (sentence,) = continuation.in_words({**BEFORE, "global_bn": False}, {**now, "global_bn": False})
    assert "there were 1 replicas and are 4 now" in sentence


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(replicas=2), "replicas"),
        (dict(device="a GPU"), "device"),
        (dict(versions={"tensorflow": "2.22.0"}), "versions"),
        (dict(git_commit="5678"), "program"),
    ],
)
def test_another_machine_is_said_where_every_bit_counts(change, word):
    assert not continuation.in_words(BEFORE, {**BEFORE, **change})
    before = {**BEFORE, "deterministic": True}
    (sentence,) = continuation.in_words(before, {**before, **change})
    assert sentence.startswith("--deterministic: ") and sentence.endswith(f"has begun with other {word}")


def test_a_run_that_was_not_deterministic_from_its_beginning_is_said():
    (sentence,) = continuation.in_words(BEFORE, {**BEFORE, "deterministic": True})
    assert "not bit for bit" in sentence


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_what_it_lacks():
    added = ("deterministic", "ema_ramp", "replicas", "device")
    older = {name: value for name, value in BEFORE.items() if name not in added}
    assert refusal({"ema_ramp": False}, older) is None
    assert "--ema_ramp=True contradicts the run in --model_dir=run, which has ema_ramp=False" in refusal(
        {"ema_ramp": True}, older
    )
    continuation.check_facts(older, BEFORE)
    assert not continuation.in_words(older, BEFORE) and not continuation.changed_flags(older, BEFORE)


def test_a_run_of_a_newer_version_goes_on_and_what_is_not_known_is_said():
    (sentence,) = continuation.in_words({**BEFORE, "new_loss": True}, BEFORE)
    assert "values that this version does not know (new_loss)" in sentence


def test_data_in_memory_keep_their_order_but_for_a_run_that_began_without_windows():
    for saved in (BEFORE, {**BEFORE, "dataset": "cifar10", "tfds_order": "windows"}):
        assert refusal({"cache_dataset": True}, saved) is None
    assert "--cache_dataset=True contradicts" in refusal({"cache_dataset": True}, {**BEFORE, "dataset": "cifar10"})


def test_a_longer_schedule_is_said(capsys):
    now = {**BEFORE, "train_steps": 20, "weight_decay": 0.1}
    continuation.say({**BEFORE, "train_steps": 10}, now, 4, 20)
    said = capsys.readouterr().out
    assert "goes on from step 4 of 20, with --weight_decay=0.1 (before: 1e-06), --train_steps=20 (before: 10)" in said
    assert "from here on, the learning rate follows the new schedule of 20 steps" in said


# Real runs


@pytest.fixture
def earlier(tmp_path):
    """A copy of the folder of a run that commit 595702f wrote. See tests/data/README.md."""
    shutil.unpack_archive(ROOT / "tests" / "data" / "pretraining_595702f.tar.xz", tmp_path, filter="data")
    return tmp_path / "pretraining_595702f"


def test_a_run_of_an_earlier_version_goes_on_and_is_evaluated(earlier, capsys):
    reader = tf.train.load_checkpoint(str(earlier / "ckpt-4"))
    kept = {key: reader.get_tensor(key) for key, shape in reader.get_variable_to_shape_map().items() if shape}
    decided = subject.decide(dict(model_dir=str(earlier), train_steps=5))
    run = preparation.prepare(decided.config, tf.distribute.get_strategy())
    assert "goes on from step 4 of 5" in capsys.readouterr().out
    again = str(earlier.parent / "again" / "ckpt-4")
    run.checkpoints._live.write(again)  # What it has restored is what the earlier version had saved.
    restored = tf.train.load_checkpoint(again)
    assert kept and all(np.array_equal(restored.get_tensor(key), value) for key, value in kept.items())
    assert {key.split("/")[0] for key in kept} >= {"weights", "optimizer", "momentum", "queue"}

    tiny.train_run(model_dir=str(earlier), train_steps=5)
    assert checkpoint.Weights(str(earlier)).step == 5
    changed = bits.different(again, str(earlier / "ckpt-5"))
    assert {key.split("/")[0] for key in changed} >= {"weights", "optimizer", "momentum", "queue", "step"}

    result = tiny.evaluated(subject.decide(dict(mode="eval", model_dir=str(earlier), eval_steps=1, knn_neighbors=0)))
    assert result["step"] == 5 and np.isfinite(result["loss"])


def test_a_refused_command_leaves_the_folder_as_it_was(earlier):
    before = tiny.files_in(earlier)
    with pytest.raises(UserError, match=r"--temperature=0.5 contradicts the run"):
        tiny.train_run(model_dir=str(earlier), train_steps=5, temperature=0.5)
    assert tiny.files_in(earlier) == before


def test_other_images_are_refused_and_leave_the_folder_as_it_was(tmp_path):
    for folder, count in (("images", 3), ("others", 4)):
        tiny.digit_images(tmp_path / folder / "train", count)
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    given = dict(tiny.PRETRAIN, image_size=8, train_batch_size=6, memory="none", model_dir=str(tmp_path / "run"))
    tiny.begun(**given, data_dir=str(tmp_path / "images"), train_steps=1)
    before = tiny.files_in(tmp_path / "run")
    with pytest.raises(UserError, match=r"others holds other images or labels .*\(6 examples then, 9 now\)"):
        tiny.train_run(**given, data_dir=str(tmp_path / "others"), train_steps=2)
    assert tiny.files_in(tmp_path / "run") == before
    moved = tiny.resolve(**given, data_dir=str(tmp_path / "moved"), train_steps=2)
    assert preparation.prepare(moved, tf.distribute.get_strategy()).checkpoints.newest == 0
