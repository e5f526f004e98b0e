"""Images in files: what cannot be read is replaced or left out, named and counted; a start opens nothing twice."""

import csv
import io
import json
import os
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
import tiny
from PIL import Image
from test_run import NETWORK, command

import augment
import data
import predict
import sources
from errors import UserError
from sources import files, kinds, manifest

ONE_STAGE = True  # see conftest.py

EIGHT = [f"train/{'ab'[i % 2]}/{i}.png" for i in range(8)]  # sorted: a/0 a/2 a/4 a/6 b/1 b/3 b/5 b/7


def encoded(kind):
    buffer = io.BytesIO()
    Image.fromarray(tiny.noise(5, 32, 40)).save(buffer, kind)
    return buffer.getvalue()


def damage(root, *names):
    """Makes these files unreadable, by turns in another way."""
    contents = (b"", np.random.default_rng(0).bytes(300), encoded("JPEG")[:-40], encoded("PNG")[:-40])
    for i, name in enumerate(names):
        (root / "train" / name).write_bytes(contents[i % 4])


def settle(root):
    """Makes all folders look as if nothing has changed in them for a minute."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (0, 0))


@pytest.fixture
def damaged_folder(tmp_path):
    """Eight images, two of which cannot be read: the first of each class."""
    root = tiny.folder_of(tmp_path, *EIGHT)
    damage(tmp_path, "a/0.png", "b/1.png")
    return root


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("sources.files.PAUSES", (0.0, 0.0))


def opened(root, max_corrupt=0.5, split="train"):
    return sources.load("image_folder", split, root, max_corrupt=max_corrupt)


def seen(source, steps, batch=4, start_step=0, context=None):
    """Which of the eight images a training stream shows, as (number of the noise, label)."""

    def stream(taken):
        return data.train_stream(
            source, {"image": augment.View(tiny.as_is_at(12, 10))}, batch, 0, start_step + taken, context
        )

    batches = data.patient_batches(source, stream)
    shown = []
    for _ in range(steps):
        taken = next(batches)
        for image, label in zip(taken["image"].numpy(), taken["label"].numpy(), strict=True):
            number = next(i for i in range(8) if np.array_equal(tiny.noise(i), image))
            shown.append((number, int(label)))
    return shown


# Images that cannot be read


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_with_its_label(tmp_path):
    root = tiny.folder_of(tmp_path, *EIGHT)
    whole = seen(opened(root), 4)
    damage(tmp_path, "a/6.png", "b/1.png", "b/7.png")
    replaced = {6: (3, 1), 1: (3, 1), 7: (0, 0)}  # a/6 and b/1 by b/3, and b/7, the last one, by a/0
    assert seen(opened(root), 4) == [replaced.get(number, (number, label)) for number, label in whole]
    assert opened(root).names == [name.removeprefix("train/") for name in sorted(EIGHT)]  # none is left out


def test_the_stream_with_replaced_images_is_the_same_for_two_workers_in_memory_and_when_it_goes_on(damaged_folder):
    whole = seen(opened(damaged_folder), 6)
    for start in (1, 5):
        assert seen(opened(damaged_folder), 6 - start, start_step=start) == whole[4 * start :]
    workers = [seen(opened(damaged_folder), 6, context=tf.distribute.InputContext(2, i, 2)) for i in range(2)]
    together = [pair for step in range(6) for worker in workers for pair in worker[2 * step : 2 * step + 2]]
    assert together == whole
    assert seen(opened(damaged_folder).in_memory(), 6) == whole


@pytest.mark.parametrize("marker", [b"\xff\xc4", b"\xff\xda"], ids=["before its tables", "before its pixels"])
def test_a_jpeg_that_is_cut_anywhere_is_replaced(tmp_path, marker):
    root = tiny.folder_of(tmp_path, *EIGHT)
    content = encoded("JPEG")
    (tmp_path / "train" / "a" / "0.png").write_bytes(content[: content.index(marker) + 10])
    assert {number for number, _ in seen(opened(root), 2)} == set(range(1, 8))


def test_unreadable_images_are_named_once_with_the_reason(damaged_folder, tmp_path, caplog):
    damage(tmp_path, "a/0.png", "a/2.png", "a/4.png", "a/6.png")
    reasons = ["Input is empty", "Unknown image file format", "Invalid JPEG data", "Invalid PNG data"]
    for _ in range(2):
        source = opened(damaged_folder, max_corrupt=1.0)
        seen(source, 3)
    assert sorted(source.unreadable()) == [0, 1, 2, 3, 4]
    for number, reason in zip((0, 2, 4, 6), reasons, strict=True):
        said = [record.getMessage() for record in caplog.records if f"a/{number}.png: " in record.getMessage()]
        assert len(said) == 1 and reason in said[0] and "{{" not in said[0] and "name:" not in said[0]
    assert caplog.text.count(f"class a: none of its 4 images in {damaged_folder}/train can be read") == 1
    assert "class b" not in caplog.text


def test_thousands_of_unreadable_images_of_thousands_of_classes_take_little_time(tmp_path, caplog):
    count = 100_000  # With a look at all labels for each class at each image, this would take minutes.
    labels = np.arange(count) % 3000
    source = files.file_source(str(tmp_path), map(str, range(count)), labels, [f"c{i}" for i in range(3000)])
    began = time.process_time()
    for number in range(3000 - 1, 3000 - 2001, -1):
        source._note(number, kinds.Unreadable("damaged"))
    for number in range(2999, count, 3000):
        source._note(number, kinds.Unreadable("damaged"))
    assert time.process_time() - began < 10
    assert len(source.unreadable()) == 2000 + count // 3000 - 1
    assert caplog.text.count("none of its") == 1 and "class c2999: none of its 33 images" in caplog.text


def test_too_many_unreadable_images_stop_a_stream_and_the_next_start(damaged_folder):
    message = r"2 of 8 images cannot be read, the first is .*png .*: repair or remove them, or raise --max_corrupt_fr"
    with pytest.raises(UserError, match=message) as error:
        seen(opened(damaged_folder, max_corrupt=0.24), 4)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        opened(damaged_folder, max_corrupt=0.24)
    assert len(seen(opened(damaged_folder, max_corrupt=0.25), 4)) == 16


def test_a_folder_of_which_nothing_can_be_read_stops_with_one_line(tmp_path):
    root = tiny.folder_of(tmp_path, *EIGHT)
    damage(tmp_path, *(name.removeprefix("train/") for name in EIGHT))
    with pytest.raises(UserError, match=r"none of the 8 images in .*/train can be read"):
        seen(opened(root, max_corrupt=1.0), 1)


def test_an_evaluation_leaves_out_what_cannot_be_read(damaged_folder):
    source = opened(damaged_folder)

    def stream(taken):
        return data.eval_stream(source, tiny.as_is_at(12, 10), 3, start_batch=taken)

    batches = list(data.patient_batches(source, stream))
    mask, labels = (np.concatenate([batch[key] for batch in batches]) for key in ("mask", "label"))
    assert mask.tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 0]
    assert labels[mask > 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(source.unreadable()) == [0, 4]


def test_what_a_network_makes_of_images_leaves_out_what_cannot_be_read(damaged_folder):
    predictor = predict.Predictor(
        lambda images: {"mean": tf.reduce_mean(images, [1, 2])}, opened(damaged_folder), tiny.as_is_at(12, 10), 4,
        tf.distribute.get_strategy(),
    )  # fmt: skip
    for _ in range(2):
        made = list(predictor.batches())
        assert np.concatenate([batch["label"] for batch in made]).tolist() == [0, 0, 0, 1, 1, 1]
        means = np.concatenate([batch["mean"] for batch in made])
        np.testing.assert_allclose(means, [tiny.noise(i).mean((0, 1)) for i in (2, 4, 6, 3, 5, 7)], rtol=1e-5)


def test_a_choice_of_few_labels_takes_images_that_can_be_read(damaged_folder):
    whole = opened(damaged_folder)
    for seed in range(4):
        chosen = data.draw_labelled(whole, 3, 0.0, seed)
        assert sorted(chosen) == ["a/2.png", "a/4.png", "a/6.png", "b/3.png", "b/5.png", "b/7.png"]
    with pytest.raises(UserError, match="class a has only 3 examples"):
        data.draw_labelled(whole, 4, 0.0, 0)


def test_a_run_on_a_damaged_folder_ends(tmp_path, capfd, caplog):
    root = tiny.folder_of(tmp_path, *EIGHT)
    damage(tmp_path, "a/0.png")
    images = [f"--data_dir={root}", f"--model_dir={tmp_path}/run", "--image_size=16", "--max_corrupt_fraction=0.2"]
    run = ["--train_mode=supervised", "--train_steps=3", "--recipe=paper", "--eval_split=train"]
    assert command(*NETWORK, *run, *images) == 0, capfd.readouterr().err
    assert caplog.text.count(f"an image cannot be read: {root}/train/a/0.png: Input is empty") == 1


def test_what_was_unreadable_is_known_at_the_next_start_until_the_file_changes(damaged_folder, tmp_path, caplog):
    seen(opened(damaged_folder), 4)
    source = opened(damaged_folder)
    assert sorted(source.unreadable()) == [0, 4] and not source.troubles.careful
    assert caplog.text.count("2 of 8 images are known to be unreadable: ") == 1
    assert seen(source, 4) == seen(opened(damaged_folder), 4)
    assert not source.troubles.careful  # nothing had to fail to find them again
    tiny.write_image(tmp_path / "train" / "a" / "0.png", tiny.noise(0))
    assert sorted(opened(damaged_folder).unreadable()) == [4]


# Files that cannot be read


def test_a_file_that_is_missing_stops_the_run_with_one_line(tmp_path, no_pauses, capfd):
    root = tiny.folder_of(tmp_path, *EIGHT)
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = ["--dataset=image_folder", f"--data_dir={root}", "--max_corrupt_fraction=0.5", "--image_size=16"]
    run = ["--train_mode=supervised", "--train_steps=1", f"--model_dir={tmp_path}/run"]
    assert command(*NETWORK, *run, *images) == 2
    written = capfd.readouterr().err.strip().splitlines()
    path = tmp_path / "train" / "a" / "gone.png"
    assert written[-1] == f"run.py: error: {path} cannot be read, tried 3 times: No such file or directory"
    assert not opened(root).unreadable()  # its content is not to blame


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file whose reading fails")
def test_an_image_on_a_disk_that_fails_stops_the_run(tmp_path, no_pauses):
    root = tiny.folder_of(tmp_path, *EIGHT)
    (tmp_path / "train" / "a" / "failing.png").symlink_to("/proc/self/mem")
    for read in (lambda: seen(opened(root), 3), lambda: opened(root).in_memory()):
        with pytest.raises(UserError, match=r"failing.png cannot be read, tried 3 times: .*Input/output error"):
            read()


ERRORS = [tf.errors.PermissionDeniedError, tf.errors.UnavailableError, tf.errors.InvalidArgumentError]


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_reading_raises_is_no_fault_of_the_image(tmp_path, no_pauses, monkeypatch, error):
    root = tiny.folder_of(tmp_path, *EIGHT)
    read = tf.io.read_file

    def refusing(path):
        if tf.get_static_value(tf.convert_to_tensor(path)).endswith(b"a/2.png"):
            raise error(None, None, f"{path}; refused")
        return read(path)

    monkeypatch.setattr(tf.io, "read_file", refusing)
    with pytest.raises(UserError, match=r"a/2.png cannot be read, tried 3 times: .*refused"):
        opened(root).in_memory()


def test_a_failure_that_passes_loses_no_image(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, *EIGHT)
    whole = seen(opened(root), 4)
    path = tmp_path / "train" / "a" / "2.png"
    path.rename(tmp_path / "away.png")
    path.symlink_to(tmp_path / "back.png")  # as a share of the network that is not there for a moment
    timer = threading.Timer(1.0, lambda: (tmp_path / "away.png").rename(tmp_path / "back.png"))
    timer.start()
    source = opened(root)
    assert seen(source, 4) == whole
    timer.join()
    assert not source.unreadable() and not caplog.text


def test_a_folder_that_cannot_be_listed_stops_the_run(tmp_path, no_pauses, monkeypatch):
    root = tiny.folder_of(tmp_path, "train/a/1.png", "train/b/1.png")
    listed = os.scandir

    def refusing(folder):
        if os.fsdecode(folder).endswith("train/b"):
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"train/b cannot be read, tried 3 times: Permission denied"):
        opened(root)


def test_images_that_vanish_while_a_run_trains_stop_it_with_one_line(tmp_path, no_pauses, monkeypatch, capfd):
    root = tiny.folder_of(tmp_path, *EIGHT)
    stream = data.train_stream

    def removing(*args, **options):
        (tmp_path / "train" / "a" / "2.png").unlink(missing_ok=True)
        return stream(*args, **options)

    monkeypatch.setattr(data, "train_stream", removing)
    images = ["--dataset=image_folder", f"--data_dir={root}", f"--model_dir={tmp_path}/run", "--image_size=16"]
    run = ["--train_mode=supervised", "--train_steps=2", "--eval_split=train"]
    assert command(*NETWORK, *run, *images) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("run.py: error: ") and "train/a/2.png cannot be read, tried 3 times: No such file" in last


def test_a_cached_folder_is_trained_on_without_its_files(tmp_path, monkeypatch, capfd):
    root = tiny.folder_of(tmp_path, *EIGHT)
    stream = data.train_stream

    def removing(*args, **options):
        for path in (tmp_path / "train").rglob("*.png"):
            path.unlink()
        return stream(*args, **options)

    monkeypatch.setattr(data, "train_stream", removing)
    images = ["--dataset=image_folder", f"--data_dir={root}", f"--model_dir={tmp_path}/run", "--image_size=16"]
    run = ["--train_mode=supervised", "--train_steps=2", "--cache_dataset"]
    assert command(*NETWORK, *run, *images) == 0, capfd.readouterr().err


def test_a_folder_in_memory_is_the_same(tmp_path):
    source = opened(tiny.folder_of(tmp_path, *EIGHT))
    memory = source.in_memory()
    assert memory.names == source.names and list(memory.classes) == ["a", "b"]
    for (image, label), (same_image, same_label) in zip(tiny.in_order(source), tiny.in_order(memory), strict=True):
        np.testing.assert_array_equal(image, same_image)
        assert label == same_label


# Names and links


def test_pipes_and_links_in_circles_are_passed_over(tmp_path, no_pauses):
    root = tiny.folder_of(tmp_path, *EIGHT)
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")  # To open it would take for ever.
    (tmp_path / "train" / "a" / "itself").symlink_to("itself")
    (tmp_path / "train" / "b" / "up").symlink_to(tmp_path / "train")
    assert opened(root).names == [name.removeprefix("train/") for name in sorted(EIGHT)]


def test_an_image_that_is_a_link_to_itself_stops_a_run_by_its_name(tmp_path, no_pauses):
    root = tiny.folder_of(tmp_path, *EIGHT)
    (tmp_path / "train" / "a" / "circle.png").symlink_to("circle.png")
    with pytest.raises(UserError, match=r"circle.png cannot be read, tried 3 times: Too many levels of symbolic links"):
        opened(root).in_memory()


NAMES = ["a b.png", "line\nbreak.png", "größe.png", "日本.png", "=1+1.png", "tab\t.PNG"]


def test_every_name_of_a_file_is_read_and_answered(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tiny.folder_of(tmp_path / "my\nphotos", *NAMES)
    odd = tmp_path / "my\nphotos" / os.fsdecode(b"\xe4.png")
    odd.write_bytes((tmp_path / "my\nphotos" / NAMES[0]).read_bytes())
    (tmp_path / "my\nphotos" / "no\nimage.png").write_bytes(b"no image")
    tiny.begun(**tiny.NETWORK, **tiny.QUICK, train_mode="supervised", model_dir="run")
    assert command("--mode=predict", "--checkpoint=run", "--data_dir=my\nphotos", "--output=made.csv") == 0
    with open("made.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"].removeprefix("./") for row in rows) == sorted([*NAMES, "\\xe4.png"])
    unreadable = json.loads((tmp_path / "made.csv.json").read_text())["unreadable"]
    assert list(unreadable) == ["no\nimage.png"] and "Unknown image file format" in unreadable["no\nimage.png"]
    assert "the classes of 7 images" in capfd.readouterr().out


def test_a_damaged_image_with_a_line_break_in_its_name_is_one_line_of_the_log(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, *EIGHT)
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "train" / "a" / "0\n.png")
    damage(tmp_path, "a/0\n.png")
    seen(opened(root), 4)
    (said,) = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert "a/0\\n.png: Input is empty" in said and "\n" not in said


# Starts


def test_nothing_is_opened_before_it_is_needed(tmp_path, monkeypatch):
    root = tiny.folder_of(tmp_path, *EIGHT)
    for name in ("read_file", "decode_content"):
        monkeypatch.setattr(files, name, lambda *_: pytest.fail("an image was opened"))
    monkeypatch.setattr(tf.io, "read_file", lambda *_: pytest.fail("an image was opened"))
    source = opened(root)
    assert source.examples == 8 and source.with_labels(["a/2.png"], only=True).examples == 1
    assert len(source.fingerprint) == 64


def test_a_second_start_lists_no_folder_until_one_has_changed(tmp_path, monkeypatch):
    root = tiny.folder_of(tmp_path, *EIGHT)
    settle(tmp_path)
    first = opened(root)
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    second = opened(root)
    assert not listed and second.names == first.names and second.fingerprint == first.fingerprint
    tiny.write_image(tmp_path / "train" / "b" / "9.png", tiny.noise(9))
    assert opened(root).names == [*first.names, "b/9.png"]
    (tmp_path / "train" / "a" / "0.png").unlink()
    assert opened(root).names == [*first.names[1:], "b/9.png"]


def test_a_folder_that_has_just_changed_is_listed_again(tmp_path):
    root = tiny.folder_of(tmp_path, *EIGHT)
    opened(root)
    assert manifest.read_listing(f"{root}/train", kinds.SUFFIXES) is None


@pytest.mark.parametrize("damage_it", [lambda content: content[:-20], lambda _: b"", lambda content: content[::-1]])
def test_a_damaged_manifest_is_made_anew(tmp_path, monkeypatch, damage_it):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tiny.folder_of(tmp_path / "images", *EIGHT)
    settle(tmp_path / "images")
    before = opened(root)
    (kept,) = (tmp_path / "cache" / "simclr").glob("*.npz")
    whole = kept.read_bytes()
    kept.write_bytes(damage_it(whole))
    assert opened(root).names == before.names
    assert kept.read_bytes() == whole


def test_a_manifest_with_the_wrong_content_or_a_cache_that_cannot_be_written_do_not_matter(tmp_path, monkeypatch):
    root = tiny.folder_of(tmp_path / "images", *EIGHT)
    settle(tmp_path / "images")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = opened(root)
    (kept,) = (tmp_path / "cache" / "simclr").glob("*.npz")
    np.savez(kept, about=np.array([object()], object), allow_pickle=True)  # it would run code where it were loaded
    kept.with_suffix(".jsonl").write_text('no json\n{"path": 1}\n{"path": "a/0.png", "reason": "x", "state": [1, 1]}\n')
    assert opened(root).names == before.names and not opened(root).unreadable()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert opened(root).names == before.names


def test_the_list_of_a_million_files_takes_little_memory():
    names = [f"class_{i % 10}/image_{i:07}.jpg" for i in range(1000)]
    source = files.file_source("nowhere", names, [0] * 1000, ["a"])
    assert source.names == names
    per_image = (source.files.content.nbytes + source.files.begins.nbytes + source.labels.nbytes) / 1000
    assert per_image < len(names[0]) + 13
    part = source.take(np.array([5, 999, 0]))
    assert part.names == [names[5], names[999], names[0]] and part.path(1) == f"nowhere/{names[999]}".encode()
