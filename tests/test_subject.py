"""Whose network a command means is decided once: the run's in model_dir, or the checkpoint's itself."""

import os

import pytest
import tiny

import checkpoint
import subject
from errors import UserError


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory)


def test_training_is_of_the_run_even_where_it_starts_from_a_checkpoint(pretrained):
    given = dict(mode="train", train_mode="finetune", checkpoint=pretrained, model_dir="new")
    config, of_run = subject.decide(given)[:2]
    assert of_run and (config.model_dir, config.checkpoint) == ("new", pretrained)


@pytest.mark.parametrize("mode", ["eval", "export"])
def test_where_a_run_lives_it_is_meant(pretrained, mode):
    decided = subject.decide(dict(mode=mode, model_dir=pretrained))
    assert decided.of_run and decided.config.train_mode == "pretrain"
    opened = decided.open()
    assert (opened.step, opened.where) == (3, f"--model_dir={pretrained}")


@pytest.mark.parametrize("mode", ["eval", "export"])
def test_where_no_run_lives_the_checkpoint_is_meant(pretrained, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decided = subject.decide(dict(mode=mode, checkpoint=pretrained))
    assert not decided.of_run
    assert decided.config.model_dir == f"runs/digits_{mode}" and decided.config.checkpoint == pretrained
    assert decided.open().where == f"--checkpoint={pretrained}"


def test_a_checkpoint_beside_another_run_is_refused(pretrained):
    with pytest.raises(UserError, match="leave one of the flags out"):
        subject.decide(dict(mode="eval", model_dir=pretrained, checkpoint="elsewhere"))


def test_the_fine_tuned_run_is_meant_where_train_mode_says_so(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run in --model_dir=runs/digits_finetune: train one first"):
        subject.decide(dict(mode="eval", train_mode="finetune", checkpoint=pretrained))


def test_what_is_opened_stays_the_same_checkpoint_while_the_run_goes_on(pretrained, tmp_path):
    model_dir = tiny.borrow(pretrained, tmp_path / "run")
    opened = subject.decide(dict(mode="eval", model_dir=model_dir)).open()
    tiny.train_run(model_dir=model_dir, train_steps=4)
    assert os.path.basename(opened.prefix) == "ckpt-3" and checkpoint.Weights(model_dir).step == 4


def test_a_network_that_an_earlier_step_is_going_to_make_can_be_planned_with():
    config = subject.decide(dict(mode="plan", train_mode="finetune", checkpoint="runs/not/yet")).config
    assert config.checkpoint == "runs/not/yet"
