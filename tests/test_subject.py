"""Whose network a command means is decided once: the run's in model_dir, or the checkpoint's itself."""

import os
from pathlib import Path

import pytest
import tiny

import checkpoint
import config
import run_folder
import subject
from errors import UserError

ONE_STAGE = True  # see conftest.py


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


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Flags for a folder of images in the working directory; with the paper's values, for which none is opened."""
    monkeypatch.chdir(tmp_path)
    tiny.coloured_images("photos/train", 1)
    return dict(data_dir="photos", recipe="paper")


def leave_run(model_dir, **values):
    """Leaves in `model_dir` what says that a run with these values lives there."""
    os.makedirs(model_dir)
    saved = config.Config(**values, model_dir=model_dir).to_dict()
    run_folder.write_config(model_dir, run_folder.describe(saved, [], 1))
    Path(model_dir, "ckpt-1.index").touch()


def test_data_dir_alone_means_the_image_folder(images):
    made = subject.decide(images).config
    assert (made.dataset, made.model_dir) == ("image_folder", "runs/photos_pretrain")
    assert subject.decide({}).config.dataset == "digits"
    assert subject.resolve({"dataset": "cifar10", "data_dir": "photos"}).model_dir == "runs/cifar10_pretrain"
    with pytest.raises(UserError, match="--data_dir does not go with --dataset=digits"):
        subject.decide({**images, "dataset": "digits"})


@pytest.mark.parametrize(
    ("data_dir", "name"),
    [("a/photos/", "photos"), ("/data/my photos", "my photos"), ("gs://bucket/cats/", "cats"), ("/", "image_folder")],
)
def test_a_run_on_a_folder_is_named_after_it(data_dir, name):
    for dataset in ({}, {"dataset": "image_folder"}):
        given = {**dataset, "data_dir": data_dir, "train_mode": "supervised"}
        assert subject.default_model_dir(given) == f"runs/{name}_supervised"
    assert subject.default_model_dir({"data_dir": data_dir, "mode": "eval"}, of_checkpoint=True) == f"runs/{name}_eval"


def test_a_run_in_model_dir_says_what_the_data_set_is(images):
    leave_run("mine", dataset="cifar10")
    assert subject.decide({"model_dir": "mine", "data_dir": "photos"}).config.dataset == "cifar10"
    with pytest.raises(UserError, match="--dataset=image_folder contradicts the run in --model_dir=mine"):
        subject.decide({"model_dir": "mine", "data_dir": "photos", "dataset": "image_folder"})


@pytest.mark.parametrize(
    ("run", "on"),
    [
        (dict(dataset="digits"), "digits"),
        (dict(dataset="image_folder", data_dir="elsewhere/photos"), "elsewhere/photos"),
    ],
)
def test_a_run_on_other_data_in_the_default_place_is_not_gone_on_with(images, run, on):
    leave_run("runs/photos_pretrain", **run)
    with pytest.raises(UserError, match=f"runs/photos_pretrain, its default place, is on {on}: choose another"):
        subject.decide(images)


def test_a_run_on_the_same_folder_goes_on_whatever_the_folder_is_called(images, tmp_path):
    leave_run("runs/photos_pretrain", dataset="image_folder", data_dir="photos", recipe="paper")
    for data_dir in ("photos/", str(tmp_path / "photos"), "./photos"):
        assert not subject.decide({**images, "data_dir": data_dir}).is_new
    # The images have moved, and the user says that the run is meant.
    os.rename("photos", "moved")
    assert not subject.decide({"data_dir": "moved", "model_dir": "runs/photos_pretrain"}).is_new


def test_the_split_to_evaluate_on_is_the_first_that_is_there(images):
    nothing = subject.decide(images)
    assert nothing.config.eval_split == "auto"
    assert "photos has no folder validation, valid, val or test: a tenth of the" in nothing.eval_split_in_words
    Path("photos/test.txt").touch()  # a file is no split
    for split in ("test", "val", "valid", "validation"):
        os.mkdir(f"photos/{split}")
        decided = subject.decide(images)
        assert decided.config.eval_split == split
        assert decided.eval_split_in_words.startswith(f"--eval_split={split}: the first of ")
    given = subject.decide({**images, "eval_split": "train[80%:]"})
    assert (given.config.eval_split, given.eval_split_in_words) == ("train[80%:]", "")
    assert subject.resolve({"dataset": "cifar10"}).eval_split == "validation"


def test_a_run_that_was_trained_on_all_images_of_a_folder_holds_none_out_later(images):
    leave_run("all", dataset="image_folder", data_dir="photos", eval_split="")
    went_on = subject.decide(dict(model_dir="all", mode="train"))
    assert went_on.config.eval_split == "" and "nothing to evaluate on" in went_on.eval_split_in_words
    with pytest.raises(UserError) as mistake:
        subject.decide(dict(model_dir="all", mode="eval"))
    assert str(mistake.value) == (
        "--data_dir=photos has no folder validation, valid, val or test to evaluate on, and the run was trained on all "
        "of --train_split=train: name another split by --eval_split"
    )


def test_what_a_run_holds_out_cannot_change(images):
    leave_run("part", dataset="image_folder", data_dir="photos", eval_split="auto")
    leave_run("whole", dataset="image_folder", data_dir="photos", eval_split="test")
    os.mkdir("photos/test")
    assert subject.decide(dict(model_dir="part", mode="train")).config.eval_split == "auto"
    assert subject.decide(dict(model_dir="part", mode="eval", eval_split="test")).config.eval_split == "test"
    for model_dir, split in (("part", "test"), ("whole", "auto")):
        with pytest.raises(UserError, match=f"--eval_split={split} contradicts the run in --model_dir={model_dir}"):
            subject.decide(dict(model_dir=model_dir, mode="train", eval_split=split))


def test_a_run_keeps_its_split_to_evaluate_on_and_looks_for_one_where_it_has_none(images):
    os.mkdir("photos/test")
    folder = dict(dataset="image_folder", data_dir="photos")
    leave_run("with", **folder, eval_split="train[80%:]")
    leave_run("without", **folder, eval_split="")
    leave_run("other", dataset="digits", eval_split="train")
    for mode in ("train", "eval"):
        assert subject.decide(dict(mode=mode, model_dir="with")).config.eval_split == "train[80%:]"
        assert subject.decide(dict(mode=mode, model_dir="without")).config.eval_split == "test"
    assert subject.decide(dict(mode="eval", model_dir="other", **folder)).config.eval_split == "test"


def test_the_time_there_is_changes_nothing_but_the_length_of_a_run_and_what_depends_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.coloured_images("photos/train", 20)
    decided = subject.decide(dict(data_dir="photos", train_minutes=1.0))
    made = decided.with_length("train_epochs", decided.config.train_epochs, "as many as without a limit")
    assert made.config == decided.config
    assert made.config.memory == "none" and "memory_size" not in made.choices


def test_a_teacher_lends_its_labels_to_students_on_its_own_images_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = dict(dataset="image_folder", train_split="train", recipe="paper")
    drawn = dict(labels_per_class=4, label_fraction=0.0, label_seed=3, labelled_dataset="", labelled_split="train")
    learnt = config.Config(train_mode="supervised", **folder, **drawn, data_dir="photos").to_dict()

    def labels_of_student(teacher=learnt, **given):
        student = dict(folder, train_mode="distill", teacher="runs/t", distill_neighbors=10, **given)
        made = subject.resolve(student, teacher=teacher)
        return made.labels_per_class, made.label_seed

    for same in ("photos/", str(tmp_path / "photos"), "./photos"):
        assert labels_of_student(data_dir=same) == (4, 3)
    tiny.write_image("pile/train/1.png", tiny.noise(1))
    assert labels_of_student(data_dir="pile") == (0, 0)  # It has no labels to see.
    tiny.coloured_images("elsewhere/train", 4)
    with pytest.raises(UserError) as mistake:
        labels_of_student(data_dir="elsewhere")
    assert str(mistake.value) == (
        "--teacher=runs/t has learnt a draw of the labels in photos, and --data_dir=elsewhere is another folder: give "
        "--labels_per_class=4 --label_seed=3 if its images are the same, or else say which of its labels the student "
        "may see: --labels_per_class=0 means all"
    )
    assert labels_of_student(data_dir="elsewhere", labels_per_class=0) == (0, 0)
    assert labels_of_student(data_dir="elsewhere", labels_per_class=4, label_seed=3) == (4, 3)
    assert labels_of_student(teacher=learnt | {"labels_per_class": 0}, data_dir="elsewhere") == (0, 0)
