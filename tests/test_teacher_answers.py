"""A student learns what the labels and its teacher's answers say once they have spread; a run keeps these answers."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
import tiny
from test_run import command

import augment
import checkpoint
import data
import preparation
import sources
import tasks
import teacher_answers
import whitening
from config import Config
from errors import UserError
from propagation import neighbour_graph, spread_answers

ONE_STAGE = True  # see conftest.py


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run that begins to be fine-tuned on one label a class, drawn by seed 5."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    given = dict(train_mode="finetune", checkpoint=tiny.pretrained(tmp_path_factory), ft_proj_selector=1, train_steps=1)
    return tiny.begun(**tiny.QUICK, **given, labels_per_class=1, label_seed=5, model_dir=str(folder))


DISTILL = dict(train_mode="distill", distill_neighbors=3, train_steps=2)


def test_a_student_sees_the_labels_that_its_teacher_has_learnt_and_no_others(teacher):
    config = tiny.resolve(**DISTILL, teacher=teacher, model_dir="none")
    assert (config.labels_per_class, config.label_seed) == (1, 5)
    config = tiny.resolve(**DISTILL, teacher=teacher, model_dir="none", labels_per_class=2)
    assert (config.labels_per_class, config.label_seed) == (2, 0)
    config = tiny.resolve(train_mode="distill", distill_neighbors=0, teacher=teacher, model_dir="none")
    assert config.labels_per_class == 0


@pytest.mark.parametrize("views", [1, 3])
def test_the_answers_are_those_of_the_teachers_features_over_its_views(teacher, mirrored, views):
    config = tiny.resolve(**DISTILL, distill_views=views, teacher=teacher, model_dir="none")
    weights = checkpoint.Weights(teacher, "teacher")
    source = sources.load("digits", "train[:20%]")
    seen = [name for name, label in zip(source.names, source.labels, strict=True) if label in (3, 4)][:9]
    source = source.with_labels(seen, only=False)
    found = teacher_answers.spread(weights, source, config, mirrored(1))
    assert found.shape == (source.examples, 10)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-4)
    labelled = source.labels >= 0
    assert (found[labelled].argmax(1) == source.labels[labelled]).all()
    model = tasks.restore_network(weights)
    shown = tf.data.Dataset.from_tensor_slices(source.records).map(teacher_answers.views(config))
    views_of_all = np.stack(list(shown.as_numpy_iterator()), axis=1)  # [views, n, 16, 16, 3]
    assert len(views_of_all) == views
    of_views = [model(images, training=False) for images in views_of_all]
    own = np.mean([tf.nn.softmax(of_view.logits) for of_view in of_views], axis=0)
    features = np.mean([of_view.h for of_view in of_views], axis=0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    half_white = whitening.principal_components(unit).whitened(unit)
    expected = spread_answers(neighbour_graph(half_white, 3), source.labels, own)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_allclose(teacher_answers.spread(weights, source, config, mirrored(2)), found, atol=1e-3)


def test_the_teacher_sees_different_views_of_the_kind_that_the_student_sees():
    whole_or_mirrored = dict(crop_min_area=1.0, crop_max_aspect=1.0, use_flip=True)
    config = Config(train_mode="distill", teacher="-", image_size=16, distill_views=8, **whole_or_mirrored)
    image = tf.cast(tf.reshape(tf.range(16 * 16 * 3) % 251, [16, 16, 3]), tf.uint8)
    whole = augment.center_crop(image, config.image_size)

    def seen(**changes):
        return teacher_answers.views(dataclasses.replace(config, **changes))(image).numpy()

    np.testing.assert_array_equal(seen(distill_views=1), whole[tf.newaxis])
    mirrored = [np.abs(view - whole[:, ::-1]).max() < 1e-5 for view in seen()]
    as_it_is = [np.abs(view - whole).max() < 1e-5 for view in seen()]
    assert sum(mirrored) + sum(as_it_is) == 8 and any(mirrored) and any(as_it_is)
    # Two crops of so small an image may be the same.
    assert len({view.tobytes() for view in seen(crop_min_area=0.2, use_flip=False)}) >= 6


def test_a_run_that_goes_on_learns_the_answers_that_it_has_kept(teacher, tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(teacher_answers, "spread", lambda *_: computed.append(np.full([1437, 10], 0.1)) or computed[-1])
    config = tiny.resolve(**tiny.QUICK, **DISTILL, teacher=teacher, model_dir=str(tmp_path / "student"))
    first = preparation.prepare(config, tf.distribute.get_strategy())
    assert not (tmp_path / "student").exists()
    preparation.write_description(config, first)
    computed[0][:] = 0.2  # The file holds what was computed first.
    again = preparation.prepare(config, tf.distribute.get_strategy())
    assert len(computed) == 1 and again.answers.kept
    np.testing.assert_allclose(again.source.answers, np.log(0.1), rtol=1e-6)
    # Versions before wrote probabilities.
    path = str(tmp_path / "student" / teacher_answers.FILE)
    made_from = json.dumps(again.answers.made_from)
    np.savez(path, probabilities=np.full([1437, 10], 0.3, np.float32), made_from=made_from)
    before = preparation.prepare(config, tf.distribute.get_strategy())
    assert len(computed) == 1 and before.answers.kept
    np.testing.assert_allclose(before.source.answers, np.log(0.3), rtol=1e-6)


def test_with_a_cached_teacher_the_student_learns_its_logits_of_the_centre_crop(teacher, tmp_path, monkeypatch):
    cached = dict(train_mode="distill", cache_teacher=True, distill_neighbors=0, train_split="train[:10%]")
    config = tiny.resolve(**tiny.QUICK, **cached, teacher=teacher, model_dir=str(tmp_path / "student"))
    first = preparation.prepare(config, tf.distribute.get_strategy())
    assert first.task.teacher is None
    images = np.stack([augment.center_crop(first.source.decode(record), 16) for record in first.source.records])
    expected = tasks.restore_network(checkpoint.Weights(teacher, "teacher"))(images, training=False).logits
    np.testing.assert_allclose(first.source.answers, expected, rtol=1e-4, atol=1e-5)
    preparation.write_description(config, first)
    monkeypatch.setattr(teacher_answers, "of_centre_crops", lambda *_: pytest.fail("the answers are computed again"))
    again = preparation.prepare(config, tf.distribute.get_strategy())
    assert again.answers.kept
    np.testing.assert_array_equal(again.source.answers, first.source.answers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(train_mode="pretrain"), "--cache_teacher goes with --train_mode=distill, not pretrain"),
        (dict(DISTILL, teacher="-"), "or give --distill_neighbors=0"),
        (dict(train_mode="distill", teacher="-", distill_views=4), "--distill_views=4 about random ones: give one"),
    ],
)
def test_flags_that_a_cached_teacher_contradicts_are_refused(given, message):
    with pytest.raises(UserError, match=message) as refused:
        Config(**given, cache_teacher=True)
    assert "\n" not in str(refused.value)


def test_answers_are_kept_for_what_they_were_made_from(teacher, tmp_path, tmp_path_factory, monkeypatch, capsys):
    config = tiny.resolve(**DISTILL, teacher=teacher, model_dir=str(tmp_path))
    monkeypatch.setattr(teacher_answers, "spread", lambda *_: np.full([1437, 10], 0.1, np.float32))

    def found(teacher, **changes):
        changed = dataclasses.replace(config, **changes)
        source, _ = data.train_source(changed, None)
        weights = checkpoint.Weights(teacher, "teacher")
        return teacher_answers.answers_of_run(weights, source, changed, tf.distribute.get_strategy())

    teacher_answers.keep(str(tmp_path), found(teacher))
    assert found(teacher).kept and found(tiny.borrow(teacher, tmp_path / "moved")).kept
    assert found(teacher, train_batch_size=7, distill_temperature=2.0).kept
    assert not capsys.readouterr().out
    others = {
        "teacher, head layer of the teacher": found(tiny.pretrained(tmp_path_factory)),
        "labels": found(teacher, label_seed=6),
        "images, labels": found(teacher, train_split="train[:50%]"),
        "image_size": found(teacher, image_size=20),
        "views": found(teacher, distill_views=2),
        "distill_neighbors": found(teacher, distill_neighbors=4),
    }
    assert not any(other.kept for other in others.values())
    said = capsys.readouterr().out.splitlines()
    path = tmp_path / teacher_answers.FILE
    assert said == [f"the answers in {path} are of other values ({name}): they are computed again" for name in others]
    path.write_bytes(path.read_bytes()[:-100])
    assert not found(teacher).kept and f"{path} is damaged" in capsys.readouterr().out


def test_answers_stay_with_their_images():
    source = tiny.numbered(12).with_answers(np.eye(12))
    batches = tiny.taken(tiny.random_stream(source, batch=4, view=augment.View(tiny.as_is)), 6)
    images = np.concatenate(batches["view_1"])[:, 0, 0, 0]
    np.testing.assert_array_equal(np.concatenate(batches["answer"]).argmax(1), images)
    part = source.take(np.array([7, 2]))
    assert part.answers.argmax(1).tolist() == [7, 2]


def test_distillation_along_neighbours_from_the_command_line(teacher, tmp_path, capsys, nothing_exported):
    student = ["--train_mode=distill", f"--teacher={teacher}", "--distill_neighbors=3", "--train_steps=2"]
    student += [f"--{name}={value}" for name, value in tiny.NETWORK.items()]
    assert command("--mode=train_then_eval", *student, f"--model_dir={tmp_path / 'run'}") == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert {"top_1", "teacher_agreement"} <= set(result)
    assert json.loads((tmp_path / "run/config.json").read_text())["label_seed"] == 5
    assert len(json.loads((tmp_path / "run/labelled_subset.json").read_text())["examples"]) == 10
    tiny.digit_images(tmp_path / "images/train", 4, labelled=False)
    images = ["--dataset=image_folder", f"--data_dir={tmp_path / 'images'}", f"--model_dir={tmp_path / 'none'}"]
    assert command(*student, *images) == 2
    assert "--distill_neighbors=3 needs some labels to spread" in capsys.readouterr().err
