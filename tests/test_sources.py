"""Sources: every example of a split once, its label right, whatever the data set, the folder or the file is like."""

import io
import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
import tiny
from PIL import Image
from sklearn.datasets import load_digits

import checkpoint
import data
import sources
from errors import UserError

# Digits


def test_digits_are_all_of_scikit_learns_with_their_labels():
    bunch = load_digits()
    parts = [sources.digits("train"), sources.digits("test")]
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
    assert sources.digits("test").names == sources.digits("test").names
    assert sources.digits("test").names[:3] == ["digits/113", "digits/160", "digits/1436"]


def test_slices_of_the_digits_share_nothing_and_lose_nothing():
    first, rest, both = (sources.digits(split) for split in ("train[:80%]", "train[80%:]", "train"))
    assert (first.examples, rest.examples) == (1150, 287)
    assert first.names + rest.names == both.names
    assert sources.digits("train+test").examples == 1797
    assert set(sources.digits("train[:50%]+test").names) >= set(sources.digits("test").names)


@pytest.mark.parametrize("split", ["validation", "train[", "train[:0%]", ""])
def test_a_split_of_the_digits_that_does_not_exist_is_named(split):
    with pytest.raises(UserError, match="train, test") as error:
        sources.digits(split)
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


# Image folders


def folder_of(root, *paths):
    """A folder with an image of noise at each path."""
    for seed, path in enumerate(paths):
        tiny.write_image(root / path, tiny.noise(seed))
    return str(root)


def test_a_folder_of_class_folders_is_labelled_by_them(tmp_path):
    root = folder_of(tmp_path, "train/dog/1.png", "train/cat/1.png", "train/cat/2.png", "test/dog/3.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    source = sources.image_folder(root, "train")
    assert source.names == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert list(source.classes) == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1]
    for (image, _), seed in zip(tiny.in_order(source), (1, 2, 0), strict=True):
        np.testing.assert_array_equal(image, tiny.noise(seed))


def test_hidden_files_and_folders_are_no_images(tmp_path):
    seen = ["train/cat/1.png", "train/dog/2.png"]
    root = folder_of(tmp_path, *seen, "train/cat/._1.png", "train/.cache/1.png", "train/dog/.copies/2.png")
    source = sources.image_folder(root, "train")
    assert source.names == ["cat/1.png", "dog/2.png"] and list(source.classes) == ["cat", "dog"]


def test_a_folder_without_classes_is_unlabelled_at_any_depth(tmp_path):
    root = folder_of(tmp_path, "train/a.png", "train/2024/b.png", "train/2024/05/c.png")
    source = data.load("image_folder", "train", root)
    assert source.examples == 3 and not source.has_labels and list(source.classes) == []
    assert {label for _, label in tiny.in_order(source)} == {-1}


def test_one_image_outside_the_class_folders_makes_all_unlabelled_and_says_so(tmp_path, caplog):
    root = folder_of(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/stray.png")
    source = sources.image_folder(root, "train")
    assert not source.has_labels and source.examples == 3
    assert "unlabelled" in caplog.text


def test_suffixes_in_capitals_spaces_and_unicode_are_read(tmp_path):
    root = folder_of(tmp_path, "train/große Katze/bild ä 1.PNG", "train/犬/写真.JPG", "train/犬/b.Jpeg")
    source = data.load("image_folder", "train", root)
    assert sorted(source.classes) == sorted(["große Katze", "犬"])
    assert source.examples == 3
    batch = next(data.eval_stream(source, tiny.as_is, 1).as_numpy_iterator())
    assert batch["image"].shape == (1, 12, 10, 3)


PIXELS = np.kron(tiny.noise(5, 4, 5), np.ones([8, 8, 1], np.uint8))  # blocks that JPEG keeps
GREY = np.asarray(Image.fromarray(PIXELS).convert("L").convert("RGB"))


JPEG = b"\xff\xd8"  # how such a file begins


def encoded(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def sixteen_bits():
    buffer = io.BytesIO()
    Image.fromarray(GREY[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    return buffer.getvalue()


def quantized():
    return np.asarray(Image.fromarray(PIXELS).convert("P").convert("RGB"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jpg", encoded("JPEG", quality=95, subsampling=0), PIXELS),
        ("progressive.jpeg", encoded("JPEG", quality=95, subsampling=0, progressive=True), PIXELS),
        ("grey.jpg", encoded("JPEG", "L", quality=95), GREY),
        ("cmyk.jpg", encoded("JPEG", "CMYK", quality=95), PIXELS),
        ("a.png", encoded("PNG"), PIXELS),
        ("grey.png", encoded("PNG", "L"), GREY),
        ("alpha.png", encoded("PNG", "RGBA"), PIXELS),
        ("grey_alpha.png", encoded("PNG", "LA"), GREY),
        ("palette.png", encoded("PNG", "P"), quantized()),
        ("sixteen_bits.png", sixteen_bits(), GREY),
        ("a.gif", encoded("GIF", "P"), quantized()),
        ("animated.gif", encoded("GIF", "P", save_all=True, append_images=[Image.new("P", (40, 32))]), quantized()),
        ("a.bmp", encoded("BMP"), PIXELS),
        ("grey.bmp", encoded("BMP", "L"), GREY),
        ("a.webp", encoded("WEBP", lossless=True), PIXELS),
        ("alpha.webp", encoded("WEBP", "RGBA", lossless=True), PIXELS),
        ("wrong_suffix.png", encoded("JPEG", quality=95, subsampling=0), PIXELS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_image_becomes_the_pixels_it_shows(tmp_path, name, content, expected):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_bytes(content)
    source = data.load("image_folder", "train", str(tmp_path))
    ((image, _),) = tiny.in_order(source)
    assert image.dtype == np.uint8 and image.shape == expected.shape
    np.testing.assert_allclose(image.astype(int), expected, atol=1 if content[:2] != JPEG else 8)


@pytest.fixture
def damaged_folder(tmp_path):
    """Eight images and four that cannot be read."""
    folder_of(tmp_path, *(f"train/{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(8)))
    cats = tmp_path / "train" / "cat"
    (cats / "noise.png").write_bytes(np.random.default_rng(0).bytes(300))
    (cats / "empty.jpg").write_bytes(b"")
    (cats / "truncated.jpg").write_bytes(encoded("JPEG")[:-40])
    (cats / "truncated.png").write_bytes(encoded("PNG")[:-40])
    return str(tmp_path)


def test_unreadable_images_are_skipped_and_named(damaged_folder, caplog):
    source = data.load("image_folder", "train", damaged_folder, max_corrupt=0.5)
    assert source.names == sorted(f"{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(8))
    assert source.labels.tolist() == [0] * 4 + [1] * 4
    for name in ("noise.png", "empty.jpg", "truncated.jpg", "truncated.png"):
        assert os.path.join(damaged_folder, "train", "cat", name) in caplog.text
    assert "4 of 12" in caplog.text


def test_too_many_unreadable_images_are_an_error(damaged_folder):
    with pytest.raises(UserError, match=r"4 of 12 images .*--max_corrupt_fraction=0.3") as error:
        data.load("image_folder", "train", damaged_folder, max_corrupt=0.3)
    assert "empty.jpg" in str(error.value)


def test_a_link_back_to_a_folder_above_ends(tmp_path):
    root = folder_of(tmp_path, "train/cat/1.png", "train/dog/1.png")
    os.symlink(tmp_path / "train", tmp_path / "train" / "cat" / "loop")
    assert sources.image_folder(root, "train").names == ["cat/1.png", "dog/1.png"]


def test_linked_class_folders_are_followed(tmp_path):
    folder_of(tmp_path, "elsewhere/1.png", "root/train/dog/1.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "train" / "cat")
    assert sources.image_folder(str(tmp_path / "root"), "train").names == ["cat/1.png", "dog/1.png"]


def test_missing_folders_splits_and_images_are_named_with_what_exists(tmp_path):
    root = folder_of(tmp_path, "train/cat/1.png", "test/cat/1.png")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="nowhere: no such folder"):
        data.load("image_folder", "train", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no split validation; it has bare, test, train"):
        data.load("image_folder", "validation", root)
    with pytest.raises(UserError, match="bare holds no image"):
        data.load("image_folder", "bare", root)
    with pytest.raises(UserError, match="no subfolder"):
        data.load("image_folder", "train", str(tmp_path / "bare"))


def test_classes_are_numbered_as_in_training(tmp_path):
    root = folder_of(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png", "odd/d/1.png")
    classes = sources.image_folder(root, "train").classes
    test = sources.image_folder(root, "test", classes)
    assert test.labels.tolist() == [2] and list(test.classes) == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"the class d, which training did not: a, b, c"):
        sources.image_folder(root, "odd", classes)


def test_slices_of_a_folder_share_nothing_lose_nothing_and_mix_the_classes(tmp_path):
    root = folder_of(tmp_path, *(f"train/{'ab'[i // 20]}/{i}.png" for i in range(40)))
    parts = [sources.image_folder(root, split) for split in ("train[:80%]", "train[80%:]")]
    assert [part.examples for part in parts] == [32, 8]
    assert sorted(parts[0].names + parts[1].names) == sources.image_folder(root, "train").names
    assert [len(set(part.labels.tolist())) for part in parts] == [2, 2]
    with pytest.raises(UserError, match=r"train\[:0%\]"):
        sources.image_folder(root, "train[:0%]")


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
    source = data.load("tiny_labelled", "train", tfds_dir)
    assert source.examples == 42 and source.has_labels and list(source.classes) == ["ant", "bee", "cow"]
    examples = [(key_of(image), label) for image, label in tiny.in_order(source)]
    assert sorted(key for key, _ in examples) == list(range(42))
    assert all(key % 3 == label for key, label in examples)
    assert len(tiny.in_order(data.load("tiny_labelled", "test", tfds_dir))) == 7


def epoch_keys(source, epoch, seed=0):
    return [key_of(source.decode(e["record"]).numpy()) for e in source.epoch(tf.constant(epoch, tf.int64), seed)]


def test_epochs_of_a_tensorflow_dataset_are_reshuffled_and_repeatable(tfds_dir):
    source = data.load("tiny_labelled", "train", tfds_dir)
    first, second, other_seed = epoch_keys(source, 0), epoch_keys(source, 1), epoch_keys(source, 0, seed=1)
    assert sorted(first) == sorted(second) == sorted(other_seed) == list(range(42))
    assert first == epoch_keys(data.load("tiny_labelled", "train", tfds_dir), 0)
    assert first != second and first != other_seed and first != epoch_keys(source, 0, seed=1_000_003)


def test_a_stream_of_a_tensorflow_dataset_can_start_anywhere(tfds_dir):
    source = data.load("tiny_labelled", "train", tfds_dir)
    whole = tiny.taken(tiny.random_stream(source), 12)
    late = tiny.taken(tiny.random_stream(source, start_step=9), 3)  # in the second epoch
    np.testing.assert_array_equal(np.stack(whole["view_1"][9:]), np.stack(late["view_1"]))
    np.testing.assert_array_equal(np.stack(whole["label"][9:]), np.stack(late["label"]))


def test_a_run_trains_on_a_tensorflow_dataset(tfds_dir, tmp_path):
    given = dict(tiny.PRETRAIN, dataset="tiny_labelled", data_dir=tfds_dir, image_size=16, seed=0, train_steps=3)
    assert tiny.train_run(**given, model_dir=str(tmp_path / "run")) is not None
    assert checkpoint.Weights(str(tmp_path / "run")).step == 3


def test_labels_of_a_tensorflow_dataset_can_be_hidden_or_chosen(tfds_dir):
    source = data.load("tiny_labelled", "train", tfds_dir)
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
    source = data.load("tiny_labelled", "train", tfds_dir)
    memory = source.in_memory()
    assert memory.examples == 42 and list(memory.classes) == list(source.classes)
    for (image, label), (same_image, same_label) in zip(tiny.in_order(source), tiny.in_order(memory), strict=True):
        np.testing.assert_array_equal(image, same_image)
        assert label == same_label
    assert memory.names == source.index()[0]


def test_slices_of_a_tensorflow_dataset_share_nothing_and_lose_nothing(tfds_dir):
    parts = [data.load("tiny_labelled", split, tfds_dir) for split in ("train[:75%]", "train[75%:]")]
    keys = [[key_of(image) for image, _ in tiny.in_order(part)] for part in parts]
    assert [len(part) for part in keys] == [part.examples for part in parts] == [32, 10]
    assert sorted(keys[0] + keys[1]) == list(range(42))


def test_evaluation_of_a_tensorflow_dataset_gives_each_example_once(tfds_dir):
    stream = data.eval_stream(data.load("tiny_labelled", "test", tfds_dir), tiny.as_is, 4)
    images, labels, mask = (np.concatenate([b[key] for b in stream.as_numpy_iterator()]) for key in
                            ("image", "label", "mask"))  # fmt: skip
    assert sorted(key_of(image) for image in images[mask > 0]) == list(range(42, 49))
    assert all(key_of(image) % 3 == label for image, label in zip(images, labels, strict=True))


def test_a_tensorflow_dataset_without_labels_trains(tfds_dir):
    source = data.load("tiny_unlabelled", "train", tfds_dir)
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
        data.load(name, split, tfds_dir)
    assert "\n" not in str(error.value)
