"""Sources: every example of a split once, its label right, whatever the data set, the folder or the file is like."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
import tiny
from sklearn.datasets import load_digits
from test_run import NETWORK, command

import checkpoint
import data
import preparation
import sources
from errors import UserError

ONE_STAGE = True  # see conftest.py


# Digits


def test_digits_are_all_of_scikit_learns_with_their_labels():
    bunch = load_digits()
    parts = [sources.load("digits", "train"), sources.load("digits", "test")]
    assert [part.examples for part in parts] == [1437, 360]
    names = parts[0].names + parts[1].names
    assert len(set(names)) == 1797
    for part in parts:
        indices = [int(name.removeprefix("digits/")) for name in part.names]
        np.testing.assert_array_equal(part.labels, bunch.target[indices])
        np.testing.assert_allclose(part.records[..., 1], bunch.images[indices] * 255 / 16, atol=1)
        assert sorted(set(part.labels.tolist())) == list(range(10))
    assert list(parts[0].classes) == [str(digit) for digit in range(10)]


def test_digits_are_the_same_each_time():
    assert sources.load("digits", "test").names == sources.load("digits", "test").names
    assert sources.load("digits", "test").names[:3] == ["digits/113", "digits/160", "digits/1436"]


def test_slices_of_the_digits_share_nothing_and_lose_nothing():
    first, rest, both = (sources.load("digits", split) for split in ("train[:80%]", "train[80%:]", "train"))
    assert (first.examples, rest.examples) == (1150, 287)
    assert first.names + rest.names == both.names
    assert sources.load("digits", "train+test").examples == 1797
    assert set(sources.load("digits", "train[:50%]+test").names) >= set(sources.load("digits", "test").names)


@pytest.mark.parametrize("split", ["validation", "train[", "train[:0%]", ""])
def test_a_split_of_the_digits_that_does_not_exist_is_named(split):
    with pytest.raises(UserError, match="train, test") as error:
        sources.load("digits", split)
    assert split in str(error.value)


# Hidden labels


def test_hidden_labels_are_gone_from_the_stream_and_their_images_stay():
    source = tiny.numbered(9)
    hidden = source.with_labels(["image 1", "image 5"], only=False)
    assert [label for _, label in tiny.in_order(hidden)] == [-1, 1, -1, -1, -1, 2, -1, -1, -1]
    assert hidden.has_labels and hidden.examples == 9
    assert [int(image[0, 0, 0]) for image, _ in tiny.in_order(hidden)] == list(range(9))
    assert not source.with_labels([], only=False).has_labels


def test_the_labelled_alone_keep_images_labels_and_names():
    only = tiny.numbered(9).with_labels(["image 5", "image 1"], only=True)
    assert [(int(image[0, 0, 0]), label) for image, label in tiny.in_order(only)] == [(1, 1), (5, 2)]
    assert only.names == ["image 1", "image 5"]


# Fingerprints


def test_a_fingerprint_tells_names_labels_and_their_order():
    source = tiny.numbered(9)
    assert len(source.fingerprint) == 64 and source.fingerprint == tiny.numbered(9).fingerprint
    others = [
        tiny.numbered(8),
        tiny.numbered(9, classes=2),
        source.take(np.arange(9)[::-1]),
        dataclasses.replace(source, names=[*source.names[:8], "another"]),
    ]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_hidden_labels_and_a_copy_in_memory_keep_the_fingerprint(tmp_path, tfds_dir):
    folder = tiny.folder_of(tmp_path, *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(8)))
    splits = [
        sources.load("digits", "train"),
        sources.load("image_folder", "train", folder),
        sources.load("tiny_labelled", "train", tfds_dir),
    ]
    for split in splits:
        chosen = data.choose_labelled(*split.index(), per_class=1)
        copies = [split.in_memory(), split.with_labels(chosen, only=False), split.with_labels(chosen, only=True)]
        copies += [copy.in_memory() for copy in copies]
        assert {copy.fingerprint for copy in copies} == {split.fingerprint}


def test_a_fingerprint_of_a_tensorflow_dataset_tells_version_and_split(tfds_dir):
    train, test, part = (
        sources.load("tiny_labelled", split, tfds_dir).fingerprint for split in ("train", "test", "train[:42]")
    )
    assert train == "tiny_labelled/1.0.0 train: 42 examples"
    assert len({train, test, part}) == 3


# Image folders


def test_a_folder_of_class_folders_is_labelled_by_them(tmp_path):
    root = tiny.folder_of(tmp_path, "train/dog/1.png", "train/cat/1.png", "train/cat/2.png", "test/dog/3.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    source = sources.load("image_folder", "train", root)
    assert source.names == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert list(source.classes) == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1]
    for (image, _), seed in zip(tiny.in_order(source), (1, 2, 0), strict=True):
        np.testing.assert_array_equal(image, tiny.noise(seed))


def test_hidden_files_and_folders_are_no_images(tmp_path):
    seen = ["train/cat/1.png", "train/dog/2.png"]
    root = tiny.folder_of(tmp_path, *seen, "train/cat/._1.png", "train/.cache/1.png", "train/dog/.copies/2.png")
    source = sources.load("image_folder", "train", root)
    assert source.names == ["cat/1.png", "dog/2.png"] and list(source.classes) == ["cat", "dog"]


def unlabelled(source):
    return (
        not source.has_labels and list(source.classes) == [] and {label for _, label in tiny.in_order(source)} == {-1}
    )


def test_a_folder_without_classes_is_unlabelled_at_any_depth(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, "train/1.png", "train/a/b/2.png", "train/a/c/d/3.png")
    source = sources.load("image_folder", "train", root)
    assert source.examples == 3 and unlabelled(source)
    assert f"{root}/train: no labels, since a is its only folder with images" in caplog.text


def test_images_beside_no_folder_are_unlabelled_and_the_log_says_so(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, "train/1.png", "train/2.png")
    assert unlabelled(sources.load("image_folder", "train", root))
    assert "no labels, since its images lie in no class folders" in caplog.text


def test_one_folder_is_no_class_and_the_log_says_so_once(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, "train/all/1.png", "train/all/2.png", "train/all/2024/3.png")
    for _ in range(2):
        source = sources.load("image_folder", "train", root)
        assert source.examples == 3 and unlabelled(source)
    assert caplog.text.count("all is its only folder with images, and one class tells nothing apart") == 1


def test_one_folder_keeps_its_labels_where_the_trained_network_knows_the_class(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/1.png", "test/b/2.png", "odd/d/1.png")
    test = sources.load("image_folder", "test", root, ["a", "b"])
    assert test.labels.tolist() == [1, 1] and list(test.classes) == ["a", "b"]
    assert not caplog.text
    assert unlabelled(sources.load("image_folder", "odd", root, ["a", "b"], known_by="--teacher=runs/x"))
    assert "d is its only folder with images" in caplog.text
    assert "--teacher=runs/x knows no class of this name" in caplog.text


def test_stray_images_beside_class_folders_are_left_out_and_named(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/stray.png")
    source = sources.load("image_folder", "train", root)
    assert source.names == ["cat/a.png", "dog/b.png"] and source.labels.tolist() == [0, 1]
    assert (
        f"{root}/train: left out 1 of 3 images, which lie beside the class folders cat, dog: stray.png" in caplog.text
    )


def test_more_images_beside_class_folders_than_in_them_are_an_error(tmp_path):
    root = tiny.folder_of(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/1.png", "train/2.png")
    with pytest.raises(UserError, match=r"2 of 4 images lie beside the class folders cat, dog: sort them into"):
        sources.load("image_folder", "train", root)


def test_images_in_folders_below_a_class_folder_are_of_its_class_and_the_log_says_so(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, "train/cat/2024/a.png", "train/cat/b.png", "train/dog/x/y/c.png")
    source = sources.load("image_folder", "train", root)
    assert source.names == ["cat/2024/a.png", "cat/b.png", "dog/x/y/c.png"]
    assert list(source.classes) == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1]
    assert "the classes are the folders cat, dog, also of the images in folders below them" in caplog.text


def test_file_and_folder_names_that_are_not_utf_8_are_read_and_stay_printable(tmp_path, capfd):
    tiny.folder_of(tmp_path, "train/cat/1.png", "train/cat/2.png", "train/dog/3.png")
    raw = os.fsencode(tmp_path / "train")
    os.rename(raw + b"/cat/1.png", raw + b"/cat/\xe4.png")
    os.rename(raw + b"/dog", raw + b"/\xfcber")
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"no image")
    os.rename(raw + b"/cat/bad.png", raw + b"/cat/bad\xff.png")
    source = sources.load("image_folder", "train", str(tmp_path), max_corrupt=0.5)
    assert source.names == ["cat/2.png", "cat/bad\\xff.png", "cat/\\xe4.png", "\\xfcber/3.png"]
    assert list(source.classes) == ["\\xfcber", "cat"]
    for number, seed in ((0, 1), (2, 0), (3, 2)):
        np.testing.assert_array_equal(source.decode(source.record(number)), tiny.noise(seed))
    run = ["--train_mode=supervised", "--train_steps=1", "--image_size=16", "--max_corrupt_fraction=0.5"]
    images = ["--dataset=image_folder", f"--data_dir={tmp_path}", f"--model_dir={tmp_path}/run", "--labels_per_class=1"]
    assert command(*NETWORK, *run, *images) == 0, capfd.readouterr().err
    chosen = json.loads((tmp_path / "run" / "labelled_subset.json").read_text())["examples"]
    assert "\\xfcber/3.png" in chosen


def test_suffixes_in_capitals_spaces_and_unicode_are_read(tmp_path):
    root = tiny.folder_of(tmp_path, "train/große Katze/bild ä 1.PNG", "train/犬/写真.JPG", "train/犬/b.Jpeg")
    source = sources.load("image_folder", "train", root)
    assert sorted(source.classes) == sorted(["große Katze", "犬"])
    assert source.examples == 3
    batch = next(data.eval_stream(source, tiny.as_is, 1).as_numpy_iterator())
    assert batch["image"].shape == (1, 12, 10, 3)


def test_a_link_back_to_a_folder_above_ends(tmp_path):
    root = tiny.folder_of(tmp_path, "train/cat/1.png", "train/dog/1.png")
    os.symlink(tmp_path / "train", tmp_path / "train" / "cat" / "loop")
    assert sources.load("image_folder", "train", root).names == ["cat/1.png", "dog/1.png"]


def test_linked_class_folders_are_followed(tmp_path):
    tiny.folder_of(tmp_path, "elsewhere/1.png", "root/train/dog/1.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "train" / "cat")
    assert sources.load("image_folder", "train", str(tmp_path / "root")).names == ["cat/1.png", "dog/1.png"]


def test_missing_folders_splits_and_images_are_named_with_what_exists(tmp_path):
    root = tiny.folder_of(tmp_path, "train/cat/1.png", "test/cat/1.png")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="nowhere: no such folder"):
        sources.load("image_folder", "train", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no split validation; it has bare, test, train"):
        sources.load("image_folder", "validation", root)
    with pytest.raises(UserError, match="bare holds no image"):
        sources.load("image_folder", "bare", root)
    with pytest.raises(UserError, match="no subfolder"):
        sources.load("image_folder", "train", str(tmp_path / "bare"))


def test_classes_are_numbered_as_in_training(tmp_path):
    root = tiny.folder_of(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png")
    classes = sources.load("image_folder", "train", root).classes
    test = sources.load("image_folder", "test", root, classes)
    assert test.labels.tolist() == [2] and list(test.classes) == ["a", "b", "c"]


def test_classes_that_training_did_not_know_are_named_with_who_knows_others(tmp_path):
    root = tiny.folder_of(tmp_path, "test/a/1.png", "test/d/1.png", "test/e/1.png")
    with pytest.raises(UserError) as error:
        sources.load("image_folder", "test", root, ["a", "b", "c"], known_by="the run in --model_dir=runs/mine")
    assert str(error.value).startswith(
        f"--data_dir={root}: split test has the classes d, e, which the run in --model_dir=runs/mine does not know; "
        "it knows a, b, c: "
    )


def test_a_teacher_that_does_not_know_the_classes_is_named_by_its_flag(tmp_path, capfd):
    root = tiny.folder_of(tmp_path, "train/a/1.png", "train/b/2.png", "other/a/1.png", "other/c/1.png")
    given = dict(dataset="image_folder", data_dir=root, image_size=16, train_steps=1)
    network = dict(tiny.NETWORK, **tiny.QUICK, train_mode="supervised")
    teacher = tiny.begun(**network, **given, model_dir=f"{tmp_path}/teacher")
    images = [f"--{name}={value}" for name, value in given.items()]
    distill = ["--train_mode=distill", f"--teacher={teacher}", "--train_split=other", f"--model_dir={tmp_path}/new"]
    capfd.readouterr()
    assert command(*NETWORK, *images, *distill) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"split other has the classes c, which --teacher={teacher} does not know; it knows a, b: " in message


def test_slices_of_a_folder_share_nothing_lose_nothing_and_mix_the_classes(tmp_path):
    root = tiny.folder_of(tmp_path, *(f"train/{'ab'[i // 20]}/{i}.png" for i in range(40)))
    parts = [sources.load("image_folder", split, root) for split in ("train[:80%]", "train[80%:]")]
    assert [part.examples for part in parts] == [32, 8]
    assert sorted(parts[0].names + parts[1].names) == sources.load("image_folder", "train", root).names
    assert [len(set(part.labels.tolist())) for part in parts] == [2, 2]
    with pytest.raises(UserError, match=r"train\[:0%\]"):
        sources.load("image_folder", "train[:0%]", root)


def test_a_sum_of_parts_of_folders_takes_all_parts_in_order(tmp_path):
    root = tiny.folder_of(
        tmp_path, *(f"train/{'ab'[i // 20]}/{i}.png" for i in range(40)), "test/a/1.png", "test/b/1.png", "test/c/1.png"
    )

    def names(split):
        return sources.load("image_folder", split, root).names

    assert names("train[:50%]+train[80%:]") == names("train[:50%]") + names("train[80%:]")
    assert len(names("train[:50%]+train[80%:]")) == 28
    both = sources.load("image_folder", "train+test", root)
    assert both.names == [f"train/{name}" for name in names("train")] + ["test/a/1.png", "test/b/1.png", "test/c/1.png"]
    assert list(both.classes) == ["a", "b", "c"] and both.labels.tolist() == [0] * 20 + [1] * 20 + [0, 1, 2]
    assert names("test+train[:50%]")[3:] == [f"train/{name}" for name in names("train[:50%]")]
    with pytest.raises(UserError, match="no split validation; it has test, train"):
        names("train+validation")


def test_a_split_without_labels_is_read_together_with_one_that_has_them(tmp_path):
    root = tiny.folder_of(tmp_path, "train/a/1.png", "train/b/1.png", "more/1.png", "more/2.png", "only_b/b/7.png")
    source = sources.load("image_folder", "train+more+only_b", root)
    assert list(source.classes) == ["a", "b"] and source.labels.tolist() == [0, 1, -1, -1, 1]


# Many hosts

TWO_HOSTS = """
import socket
import sys

import tensorflow as tf

import augment
import data
import sources

print({"tensorflow_datasets", "sklearn.datasets"} & set(sys.modules))
ports = []
held = []
for _ in range(2):
    held.append(socket.socket())
    held[-1].bind(("127.0.0.1", 0))
    ports.append(held[-1].getsockname()[1])
for each in held:
    each.close()
cluster = tf.train.ClusterSpec({"worker": [f"127.0.0.1:{port}" for port in ports]})
servers = [tf.distribute.Server(cluster, job_name="worker", task_index=task) for task in range(2)]
tf.config.experimental_connect_to_cluster(cluster)

made = []
variable = tf.Variable


def watched(*args, **options):
    made.append(variable(*args, **options))
    return made[-1]


tf.Variable = watched
for source in (sources.load("digits", "test"), sources.load("image_folder", "train", sys.argv[1])):
    for task in (0, 1, 1):
        made.clear()
        with tf.device(f"/job:worker/task:{task}"):
            view = {"image": augment.View(lambda image, seed: tf.cast(image, tf.float32))}
            batch = next(iter(data.train_stream(source, view, 4, seed=0)))
        print(task, sorted({each.device for each in made}), batch["label"].numpy().tolist())
"""


def test_each_host_reads_a_source_from_its_own_memory(tmp_path):
    """In a fresh process, where the libraries of other data sets are not loaded before they are needed."""
    root = tiny.folder_of(tmp_path, *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(8)))
    environment = dict(os.environ, PYTHONPATH=str(Path(data.__file__).parent), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [sys.executable, "-c", TWO_HOSTS, root], env=environment, capture_output=True, text=True, timeout=300
    )
    loaded, *lines = done.stdout.splitlines()
    assert loaded == "set()" and len(lines) == 6, done.stderr
    for digits_or_folder in (lines[:3], lines[3:]):
        for task in (0, 1):
            assert digits_or_folder[task].startswith(f"{task} ['/job:worker/replica:0/task:{task}/device:CPU:0'] [")
        assert digits_or_folder[2].startswith("1 [] [")  # a second pipeline of a host takes what is there
        assert len({line.split("] [")[1] for line in digits_or_folder}) == 1  # the labels of the same batch


# TensorFlow Datasets


def image_of(key):
    return tiny.noise(key, 9, 7)


class TinyLabelled(tfds.core.GeneratorBasedBuilder):
    """Noise in three classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image, label = tfds.features.Image(shape=(9, 7, 3)), tfds.features.ClassLabel(names=["ant", "bee", "cow"])
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples(range(42)), "test": self._generate_examples(range(42, 49))}

    def _generate_examples(self, keys):
        for key in keys:
            yield str(key), {"image": image_of(key), "label": key % 3}


class TinyUnlabelled(tfds.core.GeneratorBasedBuilder):
    """Noise."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"picture": tfds.features.Image(shape=(9, 7, 3))})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for key in range(10):
            yield str(key), {"picture": image_of(key)}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A folder with both data sets prepared, in two files a split."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (TinyLabelled, TinyUnlabelled):
        builder(data_dir=folder).download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return folder


def key_of(image):
    """Which of the noise images this is."""
    return next(key for key in range(49) if np.array_equal(image_of(key), image))


def test_a_tensorflow_dataset_gives_its_examples_by_name(tfds_dir):
    source = sources.load("tiny_labelled", "train", tfds_dir)
    assert source.examples == 42 and source.has_labels and list(source.classes) == ["ant", "bee", "cow"]
    examples = [(key_of(image), label) for image, label in tiny.in_order(source)]
    assert sorted(key for key, _ in examples) == list(range(42))
    assert all(key % 3 == label for key, label in examples)
    assert len(tiny.in_order(sources.load("tiny_labelled", "test", tfds_dir))) == 7


def epoch_keys(source, epoch, seed=0):
    return [key_of(source.decode(e["record"]).numpy()) for e in source.epoch(tf.constant(epoch, tf.int64), seed)]


def test_epochs_of_a_tensorflow_dataset_are_reshuffled_and_repeatable(tfds_dir):
    source = sources.load("tiny_labelled", "train", tfds_dir)
    first, second, other_seed = epoch_keys(source, 0), epoch_keys(source, 1), epoch_keys(source, 0, seed=1)
    assert sorted(first) == sorted(second) == sorted(other_seed) == list(range(42))
    assert first == epoch_keys(sources.load("tiny_labelled", "train", tfds_dir), 0)
    assert first != second and first != other_seed and first != epoch_keys(source, 0, seed=1_000_003)


def test_a_stream_of_a_tensorflow_dataset_can_start_anywhere(tfds_dir):
    source = sources.load("tiny_labelled", "train", tfds_dir)
    whole = tiny.taken(tiny.random_stream(source), 12)
    late = tiny.taken(tiny.random_stream(source, start_step=9), 3)  # in the second epoch
    np.testing.assert_array_equal(np.stack(whole["view_1"][9:]), np.stack(late["view_1"]))
    np.testing.assert_array_equal(np.stack(whole["label"][9:]), np.stack(late["label"]))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources.windows, "PIECE", 5)
    monkeypatch.setattr(sources.windows, "PIECES", 2)
    monkeypatch.setattr(sources.stripes, "STRIPES", (2,))
    monkeypatch.setattr(sources.stripes, "SHUFFLED", 12)


@pytest.mark.parametrize("split", ["train", "train[10:30]+test"])
def test_the_windows_of_a_tensorflow_dataset_hold_its_examples(tfds_dir, small_pieces, split):
    source = sources.load("tiny_labelled", split, tfds_dir)
    first, second = (epoch_keys(source.in_order("windows", 8), epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(key_of(image) for image, _ in tiny.in_order(source))
    assert first != second and first != epoch_keys(source, 0)


@pytest.mark.parametrize("order", ["windows", "stripes"])
def test_a_stream_of_a_tensorflow_dataset_in_files_can_start_anywhere(tfds_dir, small_pieces, order):
    source = sources.load("tiny_labelled", "train", tfds_dir).in_order(order, batch=8)
    assert data.tfds_order(source) == order
    whole = tiny.taken(tiny.random_stream(source), 12)
    for step in (1, 9):
        late = tiny.taken(tiny.random_stream(source, start_step=step), 3)
        np.testing.assert_array_equal(np.stack(whole["view_1"][step : step + 3]), np.stack(late["view_1"]))
        np.testing.assert_array_equal(np.stack(whole["label"][step : step + 3]), np.stack(late["label"]))


def same_examples(streamed, in_memory):
    """Whether two datasets give the same examples in the same order."""
    pairs = zip(streamed, in_memory, strict=True)
    return all(one["record"] == other["record"] and one["label"] == other["label"] for one, other in pairs)


@pytest.mark.parametrize("order", ["windows", "stripes"])
def test_files_in_memory_have_the_same_order_and_the_same_labels(tfds_dir, small_pieces, order):
    source = sources.load("tiny_labelled", "train", tfds_dir)
    chosen = source.index()[0][:9]
    streamed = source.with_labels(chosen, only=False).in_order(order, batch=8)
    in_memory = streamed.in_memory()
    assert same_examples(streamed.epoch(tf.constant(3), 1), in_memory.epoch(tf.constant(3), 1))
    share = sources.Share(8, 2, 8)
    positions, examples = zip(*streamed.stream(1, 4, share).take(30), strict=True)
    same_positions, same = zip(*in_memory.stream(1, 4, share).take(30), strict=True)
    assert (
        [int(p) for p in positions]
        == [int(p) for p in same_positions]
        == [step * 8 + place for step in range(4, 9) for place in range(2, 8)]
    )
    assert same_examples(examples, same)
    assert sorted(in_memory.index()[0]) == sorted(source.index()[0]) and (in_memory.labels >= 0).sum() == 9


def test_one_of_several_workers_reads_few_files_once_and_keeps_their_order(tfds_dir, small_pieces, monkeypatch):
    streamed = sources.load("tiny_labelled", "train[:90%]", tfds_dir).in_order("windows", batch=8)
    kept, share = streamed.for_several_workers(), sources.Share(8, 4, 8)
    expected = list(streamed.stream(1, 4, share).take(30))
    monkeypatch.setattr(tf.data, "TFRecordDataset", None)  # From here on nothing is read.
    positions, examples = zip(*kept.stream(1, 4, share).take(30), strict=True)
    assert same_examples([example for _, example in expected], examples)
    assert [int(position) for position, _ in expected] == [int(position) for position in positions]
    assert data.tfds_order(kept) == "windows" and kept.fingerprint == streamed.fingerprint


def test_one_of_several_workers_keeps_no_large_files_and_none_of_which_it_reads_its_share(
    tfds_dir, small_pieces, monkeypatch
):
    source = sources.load("tiny_labelled", "train", tfds_dir)
    stripes = source.in_order("stripes", batch=8)
    assert stripes.for_several_workers() is stripes
    monkeypatch.setattr(sources.tfds, "KEPT_BYTES", 1000)
    windows = source.in_order("windows", batch=8)
    assert windows.for_several_workers() is windows


def test_a_run_of_several_workers_reads_few_files_once(tfds_dir, tmp_path, monkeypatch):
    given = dict(tiny.PRETRAIN, dataset="tiny_labelled", data_dir=tfds_dir, image_size=16, model_dir=str(tmp_path))

    def trained_on():
        return preparation.prepare(tiny.resolve(**given, train_steps=4), tf.distribute.get_strategy())

    assert isinstance(trained_on().source, sources.TfdsSource)
    monkeypatch.setattr(preparation.strategy_lib, "has_several_workers", lambda _: True)
    of_several = trained_on()
    assert isinstance(of_several.source, sources.MemorySource)
    assert of_several.description["tfds_order"] == "windows"


def test_a_run_trains_on_a_tensorflow_dataset_in_the_order_that_it_has_begun_with(tfds_dir, small_pieces, tmp_path):
    given = dict(tiny.PRETRAIN, dataset="tiny_labelled", data_dir=tfds_dir, image_size=16, seed=0)
    given["model_dir"] = str(tmp_path / "run")
    tiny.train_run(**given, train_steps=3)
    assert checkpoint.Weights(given["model_dir"]).step == 3

    def going_on():
        return preparation.prepare(tiny.resolve(**given, train_steps=4), tf.distribute.get_strategy())

    assert data.tfds_order(going_on().source) == "stripes"
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["tfds_order"] == "stripes"
    before = {"windows": "windows", "buffer": None}  # A version without windows has written no order.
    for order, written in before.items():
        saved["tfds_order"] = written
        as_written = {name: value for name, value in saved.items() if value is not None or name != "tfds_order"}
        (tmp_path / "run" / "config.json").write_text(json.dumps(as_written))
        run = going_on()
        assert data.tfds_order(run.source) == run.description["tfds_order"] == order


def test_a_tensorflow_dataset_is_read_once_for_the_choice_of_its_labels(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read, passes = sources.TfdsSource._read, []
    monkeypatch.setattr(sources.tfds, "_indexes", {})
    monkeypatch.setattr(sources.TfdsSource, "_read", lambda *given, **more: passes.append(1) or read(*given, **more))
    config = tiny.resolve(
        train_mode="pretrain", dataset="tiny_labelled", data_dir=tfds_dir, labels_per_class=2, model_dir=str(tmp_path)
    )
    assert config.recipe == "auto" and len(passes) == 2  # for the names and labels; to look at some images
    source, chosen = data.train_source(config, None)
    assert len(passes) == 2 and len(chosen) == 6
    hidden_names, hidden_labels = source.index()
    assert len(passes) == 2 and np.count_nonzero(hidden_labels >= 0) == 6
    assert sorted(name for name, label in zip(hidden_names, hidden_labels, strict=True) if label >= 0) == sorted(chosen)
    assert sources.load("tiny_labelled", "test", tfds_dir).index()[0] != hidden_names


def test_the_names_of_a_tensorflow_dataset_are_read_once_for_all_starts(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.tfds, "SPARSE", 8)  # Four of 32 examples are few.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(tfds_dir, tmp_path / "tfds")
    read, passes = sources.TfdsSource._read, []
    monkeypatch.setattr(sources.TfdsSource, "_read", lambda *given, **more: passes.append(1) or read(*given, **more))

    def start():
        """What a start finds: names, labels, and the images of some of them."""
        monkeypatch.setattr(sources.tfds, "_indexes", {})
        source = sources.load("tiny_labelled", "train[10:]", str(folder))
        names, labels = source.index()
        only = source.with_labels(names[3::9], only=True)
        return names, labels.tolist(), only.names, only.labels.tolist(), only.records.tolist()

    first = start()
    assert len(passes) == 1 and len(first[0]) == 32
    assert first[2] == first[0][3::9]
    for record, label in zip(first[4], first[3], strict=True):
        assert key_of(sources.decode_image(record).numpy()) % 3 == label
    assert start() == first and len(passes) == 1
    monkeypatch.setattr(sources.tfds, "SPARSE", 9)
    assert start() == first and len(passes) == 2  # Many are picked out of a pass over all.
    for kept in (tmp_path / "cache").rglob("*.index.npz"):
        kept.write_bytes(kept.read_bytes()[:-50])
    assert start() == first and len(passes) == 4
    for file in folder.rglob("*.tfrecord-*"):
        os.utime(file, (1, 1))
    assert start() == first and len(passes) == 6


def test_labels_of_a_tensorflow_dataset_can_be_hidden_or_chosen(tfds_dir):
    source = sources.load("tiny_labelled", "train", tfds_dir)
    names, labels = source.index()
    assert len(set(names)) == 42 and np.bincount(labels).tolist() == [14, 14, 14]
    chosen = data.choose_labelled(names, labels, per_class=2)
    hidden, only = source.with_labels(chosen, only=False), source.with_labels(chosen, only=True)
    assert sorted(label for _, label in tiny.in_order(hidden)) == [-1] * 36 + [0, 0, 1, 1, 2, 2]
    assert all(label in (-1, key_of(image) % 3) for image, label in tiny.in_order(hidden))
    assert hidden.examples == 42 and only.examples == 6
    assert sorted(only.names) == sorted(chosen)
    assert sorted(label for _, label in tiny.in_order(only)) == [0, 0, 1, 1, 2, 2]
    assert all(label == key_of(image) % 3 for image, label in tiny.in_order(only))
    assert source.index()[1].min() == 0  # the source itself keeps all its labels


def test_a_tensorflow_dataset_in_memory_is_the_same(tfds_dir):
    source = sources.load("tiny_labelled", "train", tfds_dir)
    memory = source.in_memory()
    assert memory.examples == 42 and list(memory.classes) == list(source.classes)
    for (image, label), (same_image, same_label) in zip(tiny.in_order(source), tiny.in_order(memory), strict=True):
        np.testing.assert_array_equal(image, same_image)
        assert label == same_label
    assert memory.names == source.index()[0]


def test_slices_of_a_tensorflow_dataset_share_nothing_and_lose_nothing(tfds_dir):
    parts = [sources.load("tiny_labelled", split, tfds_dir) for split in ("train[:75%]", "train[75%:]")]
    keys = [[key_of(image) for image, _ in tiny.in_order(part)] for part in parts]
    assert [len(part) for part in keys] == [part.examples for part in parts] == [32, 10]
    assert sorted(keys[0] + keys[1]) == list(range(42))


def test_evaluation_of_a_tensorflow_dataset_gives_each_example_once(tfds_dir):
    stream = data.eval_stream(sources.load("tiny_labelled", "test", tfds_dir), tiny.as_is, 4)
    images, labels, mask = (np.concatenate([b[key] for b in stream.as_numpy_iterator()]) for key in
                            ("image", "label", "mask"))  # fmt: skip
    assert sorted(key_of(image) for image in images[mask > 0]) == list(range(42, 49))
    assert all(key_of(image) % 3 == label for image, label in zip(images, labels, strict=True))


def test_workers_that_evaluate_a_tensorflow_dataset_read_their_shares_alone(tfds_dir, small_pieces, monkeypatch):
    source = sources.load("tiny_labelled", "train", tfds_dir)
    source = source.with_labels(source.index()[0][:9], only=False)
    read_all = sources.TfdsSource.ordered
    monkeypatch.setattr(sources.TfdsSource, "ordered", lambda self: pytest.fail("everything was read"))
    found = []
    for worker in range(2):
        context = tf.distribute.InputContext(2, worker, 2)
        stream = data.eval_stream(source, tiny.as_is, 8, context, any_order=True)
        found += [(key_of(image), label) for b in stream.as_numpy_iterator()
                  for image, label, mask in zip(b["image"], b["label"], b["mask"], strict=True) if mask]  # fmt: skip
        later = data.eval_stream(source, tiny.as_is, 8, context, start_batch=5, any_order=True)
        assert len(list(later)) == 1
    monkeypatch.setattr(sources.TfdsSource, "ordered", read_all)
    assert sorted(found) == sorted((key_of(image), label) for image, label in tiny.in_order(source))


def test_a_tensorflow_dataset_without_labels_trains(tfds_dir):
    source = sources.load("tiny_unlabelled", "train", tfds_dir)
    assert source.examples == 10 and not source.has_labels and list(source.classes) == []
    batch = next(tiny.random_stream(source).as_numpy_iterator())
    assert batch["label"].tolist() == [-1] * 8 and batch["view_1"].shape == (8, 16, 16, 3)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("no_such_dataset", "train", "--dataset=no_such_dataset"),
        ("tiny_labelled/no_such_config", "train", "--dataset=tiny_labelled/no_such_config"),
        ("tiny_labelled", "validation", "split validation: no such split; there is train, test"),
    ],
)
def test_what_tensorflow_datasets_lack_is_a_users_mistake(tfds_dir, name, split, message):
    with pytest.raises(UserError, match=message) as error:
        sources.load(name, split, tfds_dir)
    assert "\n" not in str(error.value)


def test_a_download_without_a_network_fails_in_seconds(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        sources.load("cifar10", "train", str(tmp_path))
    assert time.monotonic() - started < 10
    assert str(error.value) == (
        f"--dataset=cifar10: not prepared under --data_dir ({tmp_path}) and cannot be downloaded: "
        "no connection to www.cs.toronto.edu"
    )


def test_a_prepared_data_set_asks_nothing_of_the_network(tfds_dir, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    assert sources.load("tiny_labelled", "train", tfds_dir).examples == 42
