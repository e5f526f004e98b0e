"""Labels spread along neighbours in feature space, and a student learns what they say."""

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
import knn
import propagation
import sources
import tasks
import train
from propagation import neighbour_graph, propagate, spread_answers


def arcs(points=40):
    """Two arcs of directions in 3-D, class 0 and 1, whose ends lie nearer to the other arc's beginning."""
    angle = np.linspace(0.1, 3.0, points)
    of_arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    features = np.concatenate([np.c_[of_arc, np.full(points, 0.15)], np.c_[of_arc, np.full(points, -0.15)]])
    return features, np.repeat([0, 1], points)


def seeds_of(labels, labelled):
    seeds = np.zeros([len(labels), labels.max() + 1])
    seeds[labelled, labels[labelled]] = 1
    return seeds


def test_the_graph_ties_each_image_to_its_neighbours_both_ways():
    features = np.random.default_rng(0).normal(size=(40, 5))
    graph = neighbour_graph(features, 3).toarray()
    np.testing.assert_allclose(graph, graph.T, rtol=1e-6)
    assert not graph.diagonal().any()
    assert np.abs(np.linalg.eigvalsh(graph)).max() <= 1 + 1e-6
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T - 2 * np.eye(40)
    nearest = np.argsort(-similarity, axis=1)[:, :3]
    tied = np.zeros([40, 40], bool)
    tied[np.arange(40)[:, None], nearest] = True
    np.testing.assert_array_equal(graph > 0, tied | tied.T)
    weights = np.where(tied | tied.T, np.exp((similarity - 1) / knn.TEMPERATURE), 0)
    degrees = weights.sum(1)
    np.testing.assert_allclose(graph, weights / np.sqrt(np.outer(degrees, degrees)), rtol=1e-4)


def test_spreading_solves_the_linear_system():
    graph = neighbour_graph(np.random.default_rng(1).normal(size=(50, 4)), 4)
    seeds = seeds_of(np.arange(50) % 3, np.arange(6))
    expected = np.linalg.solve(np.eye(50) - propagation.ALPHA * graph.toarray(), seeds)
    np.testing.assert_allclose(propagate(graph, seeds), expected, rtol=1e-3, atol=1e-4)


def test_one_label_reaches_along_an_arc_where_the_nearest_label_is_the_wrong_one():
    features, labels = arcs()
    labelled = np.array([0, 79])  # The beginning of one arc, the end of the other.
    graph = neighbour_graph(features, 2)
    spread = propagate(graph, seeds_of(labels, labelled))
    nearest_label = labels[labelled][(features @ features[labelled].T).argmax(1)]
    assert (nearest_label == labels).mean() < 0.6
    assert (spread.argmax(1) == labels).all()
    # A teacher that leans to the nearest label is outvoted.
    seen = np.full(80, -1)
    seen[labelled] = labels[labelled]
    leaning = np.where(nearest_label[:, None] == [0, 1], 0.55, 0.45)
    assert (spread_answers(graph, seen, leaning).argmax(1) == labels).all()


def test_images_that_no_label_reaches_get_the_answers_of_their_teacher():
    apart = np.kron(np.eye(2), np.ones([10, 1])) + np.random.default_rng(2).normal(scale=0.05, size=[20, 2])
    graph = neighbour_graph(apart, 3)
    seen = np.full(20, -1)
    seen[0] = 2  # in the first group alone
    own = np.tile([0.3, 0.5, 0.2], [20, 1])
    own[15] = [0.6, 0.3, 0.1]  # An image that is told otherwise than its neighbours.
    answers = spread_answers(graph, seen, own)
    np.testing.assert_allclose(answers.sum(1), 1, rtol=1e-5)
    assert (answers.argmax(1) == np.repeat([2, 1], 10)).all()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run that begins to be fine-tuned on one label a class, drawn by seed 5."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    given = dict(train_mode="finetune", checkpoint=tiny.pretrained(tmp_path_factory), train_steps=1)
    return tiny.begun(**tiny.QUICK, **given, labels_per_class=1, label_seed=5, model_dir=str(folder))


DISTILL = dict(train_mode="distill", distill_neighbors=3, train_steps=2)


def test_a_student_sees_the_labels_that_its_teacher_has_learnt_and_no_others(teacher):
    config = tiny.resolve(**DISTILL, teacher=teacher, model_dir="none")
    assert (config.labels_per_class, config.label_seed) == (1, 5)
    config = tiny.resolve(**DISTILL, teacher=teacher, model_dir="none", labels_per_class=2)
    assert (config.labels_per_class, config.label_seed) == (2, 0)
    config = tiny.resolve(train_mode="distill", distill_neighbors=0, teacher=teacher, model_dir="none")
    assert config.labels_per_class == 0


def test_the_answers_are_those_of_the_teachers_features(teacher, mirrored):
    config = tiny.resolve(**DISTILL, teacher=teacher, model_dir="none")
    weights = checkpoint.Weights(teacher, "teacher")
    source = sources.load("digits", "train[:20%]")
    seen = [name for name, label in zip(source.names, source.labels, strict=True) if label in (3, 4)][:9]
    source = source.with_labels(seen, only=False)
    found = propagation.answers(weights, source, config, mirrored(1))
    assert found.shape == (source.examples, 10)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-4)
    labelled = source.labels >= 0
    assert (found[labelled].argmax(1) == source.labels[labelled]).all()
    model = tasks.restore_network(weights)
    cropped = tf.data.Dataset.from_tensor_slices(source.records).map(lambda image: augment.center_crop(image, 16))
    images = np.stack(list(cropped.as_numpy_iterator()))
    of_model = model(images, training=False)
    own = tf.nn.softmax(of_model.logits).numpy()
    expected = spread_answers(neighbour_graph(of_model.h.numpy(), 3), source.labels, own)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_allclose(propagation.answers(weights, source, config, mirrored(2)), found, atol=1e-3)


def test_a_run_that_goes_on_learns_the_answers_that_it_has_kept(teacher, tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(propagation, "answers", lambda *_: computed.append(np.full([1437, 10], 0.1)) or computed[-1])
    config = tiny.resolve(**tiny.QUICK, **DISTILL, teacher=teacher, model_dir=str(tmp_path / "student"))
    first = train.prepare(config, tf.distribute.get_strategy())
    assert not (tmp_path / "student").exists()
    train.write_description(config, first)
    computed[0][:] = 0.2  # The file holds what was computed first.
    again = train.prepare(config, tf.distribute.get_strategy())
    assert len(computed) == 1 and again.answers.kept and (again.source.answers == np.float32(0.1)).all()


def test_answers_are_kept_for_what_they_were_made_from(teacher, tmp_path, tmp_path_factory, monkeypatch, capsys):
    config = tiny.resolve(**DISTILL, teacher=teacher, model_dir=str(tmp_path))
    monkeypatch.setattr(propagation, "answers", lambda *_: np.full([1437, 10], 0.1, np.float32))

    def found(teacher, **changes):
        changed = dataclasses.replace(config, **changes)
        source, _ = data.train_source(changed, None)
        weights = checkpoint.Weights(teacher, "teacher")
        return propagation.answers_of_run(weights, source, changed, tf.distribute.get_strategy())

    propagation.keep(str(tmp_path), found(teacher))
    assert found(teacher).kept and found(tiny.borrow(teacher, tmp_path / "moved")).kept
    assert found(teacher, train_batch_size=7, distill_temperature=2.0).kept
    assert not capsys.readouterr().out
    others = {
        "teacher, head layer of the teacher": found(tiny.pretrained(tmp_path_factory)),
        "labels": found(teacher, label_seed=6),
        "images, labels": found(teacher, train_split="train[:50%]"),
        "image_size": found(teacher, image_size=20),
        "distill_neighbors": found(teacher, distill_neighbors=4),
    }
    assert not any(other.kept for other in others.values())
    said = capsys.readouterr().out.splitlines()
    path = tmp_path / propagation.FILE
    assert said == [f"the answers in {path} are of other values ({name}): they are computed again" for name in others]
    path.write_bytes(path.read_bytes()[:-100])
    assert not found(teacher).kept and f"{path} is damaged" in capsys.readouterr().out


def test_answers_stay_with_their_images():
    source = tiny.numbered(12).with_answers(np.eye(12))
    batches = tiny.taken(tiny.random_stream(source, batch=4, view=tiny.as_is), 6)
    images = np.concatenate(batches["view_1"])[:, 0, 0, 0]
    np.testing.assert_array_equal(np.concatenate(batches["answer"]).argmax(1), images)
    part = source.take(np.array([7, 2]))
    assert part.answers.argmax(1).tolist() == [7, 2]


def test_distillation_along_neighbours_from_the_command_line(teacher, tmp_path, capsys, nothing_exported):
    student = ["--train_mode=distill", f"--teacher={teacher}", "--distill_neighbors=3", "--train_steps=2"]
    assert command("--mode=train_then_eval", *student, f"--model_dir={tmp_path / 'run'}") == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert {"top_1", "teacher_agreement"} <= set(result)
    assert json.loads((tmp_path / "run/config.json").read_text())["label_seed"] == 5
    assert len(json.loads((tmp_path / "run/labelled_subset.json").read_text())["examples"]) == 10
    tiny.digit_images(tmp_path / "images/train", 4, labelled=False)
    images = ["--dataset=image_folder", f"--data_dir={tmp_path / 'images'}", f"--model_dir={tmp_path / 'none'}"]
    assert command(*student, *images) == 2
    assert "--distill_neighbors=3 needs some labels to spread" in capsys.readouterr().err
