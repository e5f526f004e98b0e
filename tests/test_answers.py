"""Answers about single images: right, in order, gone on with, and never stopped by an image that cannot be read."""

import csv
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import tiny
from scipy.special import softmax
from test_run import command, parse

import answers.images
import augment
import calibration
import config as config_lib
import data
import run
import sources
import tasks
from answers import every_image, spreadsheet, suggestion, tables
from answers.images import as_many_as_fit, find_images, labelled_source, names_of
from errors import UserError

ONE_STAGE = True  # see conftest.py

IMAGES = 9  # `folder` has so many that can be read.


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """The model_dir of a supervised run on three classes of images, evaluated with a made-up temperature of 2."""
    base = tmp_path_factory.mktemp("answers")
    tiny.digit_images(base / "DIR" / "train", 4)
    run = tiny.train_run(
        **tiny.NETWORK, **tiny.QUICK, train_mode="supervised", train_steps=2, model_dir=str(base / "run"),
        dataset="image_folder", data_dir=str(base / "DIR"), image_size=16,
    )  # fmt: skip
    model_dir = run.config.model_dir
    (base / "run" / "result_2.json").write_text(json.dumps({calibration.TEMPERATURE: 2.0}))
    return model_dir


@pytest.fixture
def folder(tmp_path, fine_tuned, monkeypatch):
    """The working directory: the run, and a folder of images at any depth, some of which cannot be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    os.symlink(fine_tuned, "run")
    names = [
        "1.png",
        "=1+1.png",
        'a, "b"/2.png',
        "cat/new/3.jpg",
        "cat/4.jpg",
        "'5.png",
        "ü.png",
        "x/y/z/6.png",
        "9.png",
    ]
    for seed, name in enumerate(names):
        tiny.write_image(f"IN/{name}", tiny.noise(seed, 12 + seed, 10))
    (tmp_path / "IN" / "broken.png").write_bytes(b"no image")
    (tmp_path / "IN" / "9 last.jpg").write_bytes(b"")
    return tmp_path


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [{**row, "path": os.path.normpath(row["path"])} for row in csv.DictReader(file)]


def network_of(run):
    return tasks.restore_network(tiny.checkpoint.Weights(run))


def outputs_of(run, path):
    """What the run's network makes of the image in the file at `path`."""
    image = augment.center_crop(tf.io.decode_image(tf.io.read_file(path), 3, expand_animations=False), 16)
    return network_of(run)(image[None], training=False)


def parsed(*arguments):
    """The fields of Config that a command line sets."""
    parse(*arguments)
    return run.given_flags()


def predict(*more, output="out.csv"):
    return command("--mode=predict", "--model_dir=run", "--data_dir=IN", f"--output={output}", *more)


def test_predictions_are_those_of_the_network_at_its_temperature(folder, capfd):
    assert predict("--eval_batch_size=4") == 0
    rows = rows_of("out.csv")
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows) and len(rows) == IMAGES
    assert list(rows[0]) == [
        "path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3",
    ]  # fmt: skip
    for row in rows:
        logits = outputs_of("run", f"IN/{row['path']}").logits.numpy()[0]
        probabilities = softmax(logits / 2.0)
        order = np.argsort(-probabilities)
        assert [row["class"], row["class_2"], row["class_3"]] == [f"digit {i}" for i in order]
        said = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert said == pytest.approx(probabilities[order].tolist(), abs=1e-5)
    text = (folder / "out.csv").read_text()
    assert "\n./=1+1.png," in text and "\n'5.png," in text and '\n"a, ""b""/2.png",' in text
    about = json.loads((folder / "out.csv.json").read_text())
    assert about[calibration.TEMPERATURE] == 2.0 and about["step"] == 2
    assert set(about["unreadable"]) == {"broken.png", "9 last.jpg"} and all(about["unreadable"].values())
    said = capfd.readouterr().out
    assert "out.csv: the classes of 9 images" in said and "2 of 11 images cannot be read" in said
    assert "broken.png: " in said and sorted(os.listdir()) == ["IN", "out.csv", "out.csv.json", "run"]


def test_parquet_says_what_it_was_made_of_and_without_calibration_the_temperature_is_1(folder):
    assert predict("--calibrate=False", output="out.parquet") == 0
    table = pq.read_table("out.parquet")
    row = table.slice(2, 1).to_pylist()[0]
    probabilities = softmax(outputs_of("run", f"IN/{row['path']}").logits.numpy()[0])
    order = np.argsort(-probabilities)
    assert [row["class"], row["class_2"], row["class_3"]] == [f"digit {i}" for i in order]
    said = [row[name] for name in ("probability", "probability_2", "probability_3")]
    assert len(table) == IMAGES and said == pytest.approx(probabilities[order].tolist(), abs=1e-5)
    about = json.loads(table.schema.metadata[b"simclr"])
    assert about["classes"] == ["digit 0", "digit 1", "digit 2"] and about[calibration.TEMPERATURE] is None


def test_a_path_is_no_formula():
    for name in ("=1", "+1", "-1", "@a", "\ta", "'", "'=", "", "a=1", "\uff1d1"):
        assert spreadsheet.plain(spreadsheet.guarded(name)) == name
        assert not spreadsheet.guarded(name).startswith(("=", "+", "-", "@", "\t", "\uff1d"))
        assert os.path.normpath(spreadsheet.guarded_path(f"{name}.png")) == f"{name}.png"
        assert not spreadsheet.guarded_path(f"{name}.png").startswith(("=", "+", "-", "@", "\t", "\uff1d"))
    assert spreadsheet.guarded("a=1") == spreadsheet.guarded_path("a=1") == "a=1"


@pytest.mark.parametrize("suffix", ["npz", pytest.param("parquet", marks=pytest.mark.slow)])
def test_features_are_those_of_the_network(folder, suffix):
    output = f"out.{suffix}"
    assert (
        command("--mode=embed", "--checkpoint=run", "--data_dir=IN", f"--output={output}", "--eval_batch_size=4") == 0
    )
    if suffix == "npz":
        with np.load(output, allow_pickle=False) as saved:
            paths, features = saved["paths"].tolist(), saved["features"]
    else:
        table = pq.read_table(output)
        paths, features = table["path"].to_pylist(), tables.features_of(table)
    assert features.dtype == np.float32 and len(features) == len(paths) == IMAGES and "ü.png" in paths
    for path, feature in zip(paths, features, strict=True):
        np.testing.assert_allclose(feature, outputs_of("run", f"IN/{path}").h.numpy()[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_layer_of_the_head(folder, tmp_path_factory):
    pretrained = tiny.pretrained(tmp_path_factory)
    flags = [f"--checkpoint={pretrained}", "--data_dir=IN", "--output=z.npz", "--embed_layer=-1"]
    assert command("--mode=embed", *flags) == 0
    with np.load("z.npz") as saved:
        path, feature = str(saved["paths"][0]), saved["features"][0]
    np.testing.assert_allclose(feature, outputs_of(pretrained, f"IN/{path}").z.numpy()[0], rtol=1e-4, atol=1e-5)


def test_a_split_and_the_images_without_a_label(folder):
    tiny.digit_images("DIR/test", 3)
    tiny.digit_images("DIR/train", 1)
    flags = ["--data_dir=DIR", "--predict_split=test", "--labels_per_class=1"]
    images = find_images(tiny.resolve(**parsed("--mode=predict", "--checkpoint=run", "--output=a.csv", *flags)))
    assert len(images.wanted) == 9 and sorted(images.names)[0] == "test/digit 0/0_0.png"
    assert predict(*flags, "--unlabelled_only") == 0
    paths = {row["path"] for row in rows_of("out.csv")}
    _, drawn = data.train_source(tiny.resolve(data_dir="DIR", train_split="test", labels_per_class=1), None)
    assert paths == set(images.names) - {f"test/{name}" for name in drawn} and len(paths) == 6


# Going on


def interrupted_after(batches, monkeypatch, *arguments):
    """A command that is stopped by Ctrl-C after so many batches. Returns its exit status."""
    whole = every_image.EveryImage.batches

    def some(self, *given):
        for number, batch in enumerate(whole(self, *given)):
            if number == batches:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(every_image.EveryImage, "batches", some)
        return predict("--eval_batch_size=2", *arguments)


def test_an_interrupted_command_goes_on(folder, monkeypatch, capfd):
    assert predict("--eval_batch_size=2", output="whole.csv") == 0
    assert interrupted_after(2, monkeypatch) == 75
    assert "the same command goes on from there" in capfd.readouterr().err
    assert not os.path.exists("out.csv")
    seen = []
    decode = every_image.EveryImage._view
    monkeypatch.setattr(every_image.EveryImage, "_view", lambda self, record: (seen.append(1), decode(self, record))[1])
    assert predict("--eval_batch_size=3") == 0
    assert "of 11 images were done before" in capfd.readouterr().out
    assert (folder / "out.csv").read_bytes() == (folder / "whole.csv").read_bytes()
    unreadable = [json.loads((folder / f"{name}.csv.json").read_text())["unreadable"] for name in ("out", "whole")]
    assert unreadable[0] == unreadable[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [pytest.param("calibrate", "calibration_temperature", marks=pytest.mark.slow), ("folder", "images")],
)
def test_what_was_begun_with_something_else_is_not_gone_on_with(folder, monkeypatch, capfd, change, said):
    assert interrupted_after(2, monkeypatch) == 75
    if change == "folder":
        os.remove("IN/9.png")
    assert predict(*(["--calibrate=False"] if change == "calibrate" else [])) == 2
    assert f"out.csv.partial holds the beginning of another table ({said} differ)" in capfd.readouterr().err


def test_a_damaged_part_and_what_follows_it_are_made_again(tmp_path):
    def table(first, count):
        return tables.pa.table({"path": [str(i) for i in range(first, first + count)], "unreadable": [""] * count})

    output = str(tmp_path / "out.csv")
    parts = tables.Parts(output, {"a": 1})
    for first in (0, 2, 4):
        parts.add(table(first, 2))
        parts.flush()
    (tmp_path / "out.csv.partial" / "rows-000000000002.parquet").write_bytes(b"PAR1")
    again = tables.Parts(output, {"a": 1})
    assert again.rows == 2
    again.add(table(2, 3))
    again.flush()
    tables.write(again, output, {})
    assert [row["path"] for row in rows_of(output)] == ["0", "1", "2", "3", "4"]
    with pytest.raises(UserError, match="another table"):
        tables.Parts(output, {"a": 2})


def test_a_full_disk_is_one_line_and_leaves_what_is_whole(folder, capfd):
    with tiny.full_disk(300):
        assert predict() == 2
    assert "error: --output=out.csv cannot be written" in capfd.readouterr().err
    assert not os.path.exists("out.csv")


# The pass over every image


def a_pass(source, batch, strategy=None, wanted=None, done=0):
    settings = config_lib.Config(image_size=8, eval_batch_size=batch)
    wanted = np.arange(source.examples) if wanted is None else np.array(wanted)
    outputs = lambda images: {"value": images[:, 0, 0]}  # noqa: E731
    every = every_image.EveryImage(outputs, source, settings, strategy or tf.distribute.get_strategy(), wanted)
    batches = list(every.batches(done, "test"))
    if not batches:
        return [], [], []
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return whole["position"].tolist(), (whole["value"][:, 0] * 255).round().astype(int).tolist(), whole["unreadable"]


@pytest.mark.parametrize(("batch", "replicas"), [(1, 1), (4, 1), (64, 1), (8, 2)])
def test_every_image_comes_once_and_in_order(mirrored, batch, replicas):
    positions, values, unreadable = a_pass(tiny.numbered(21), batch, mirrored(replicas))
    assert positions == values == list(range(21)) and not any(unreadable)


def test_only_the_wanted_images_come_from_any_place_on():
    wanted = [0, 3, 4, 11, 20]
    for done in range(6):
        positions, values, _ = a_pass(tiny.numbered(21), 2, wanted=wanted, done=done)
        assert positions == values == wanted[done:]


def refused(image, bad):
    """The image, whose values are all the same, unless it is one of `bad`."""
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(image[0, 0, 0] != np.array(bad, np.uint8)), [0])]):
        return tf.identity(image)


@pytest.mark.parametrize(
    ("bad", "replicas"),
    [([0], 1), ([4, 5, 6, 7, 8], 1), ([4, 5, 6, 7, 8], 2), (list(range(16, 21)), 1), (list(range(21)), 1)],
)
def test_an_image_that_cannot_be_read_is_named_and_stops_no_other(mirrored, bad, replicas):
    source = tiny.numbered(21)

    def decode(image):
        return refused(image, bad)

    source = sources.MemorySource(source.records, source.labels, source.names, source.classes, decode)
    positions, values, unreadable = a_pass(source, 4, mirrored(replicas))
    assert positions == list(range(21))
    assert [i for i in positions if unreadable[i]] == bad
    assert [values[i] for i in positions if i not in bad] == [i for i in positions if i not in bad]


def test_an_image_that_can_be_read_the_second_time_gets_its_answer():
    source = tiny.numbered(9)

    def decode(image):
        return image if tf.executing_eagerly() else refused(image, [5])

    source = sources.MemorySource(source.records, source.labels, source.names, source.classes, decode)
    positions, values, unreadable = a_pass(source, 4)
    assert positions == values == list(range(9)) and not any(unreadable)


# Suggestions


def test_suggested_images_have_no_label_and_are_those_of_the_features(folder, capfd):
    tiny.digit_images("DIR/train", 12)
    flags = ["--checkpoint=run", "--data_dir=DIR", "--labels_per_class=2"]
    assert command("--mode=suggest", *flags, "--count=5", "--output=next.csv") == 0
    rows = rows_of("next.csv")
    assert [list(row) for row in rows] == [["path", "label"]] * 5 and not any(row["label"] for row in rows)
    source = labelled_source(tiny.resolve(data_dir="DIR", labels_per_class=2), "train")
    _, labels = source.index()
    assert command("--mode=embed", *flags, "--predict_split=train", "--output=all.npz") == 0
    with np.load("all.npz") as saved:
        names = names_of(source, "DIR")
        assert saved["paths"].tolist() == names and names[0] == "train/digit 0/0_0.png"
        chosen = suggestion.suggest(saved["features"], labels >= 0, 5)
    assert [row["path"] for row in rows] == [names[i] for i in chosen] and (labels[chosen] < 0).all()
    assert command("--mode=suggest", *flags, "--count=5", "--output=next.csv") == 2
    assert "--output=next.csv is there, and labels may be filled in" in capfd.readouterr().err


def test_of_too_many_images_a_draw_is_seen(monkeypatch):
    monkeypatch.setattr(answers.images, "MAX_BYTES", 4 * 10 * 20)
    for labelled_count, of_labelled in ((4, 4), (60, 10), (98, 18)):
        labelled = np.arange(100) < labelled_count
        images = answers.images.Images(None, [""] * 100, labelled, np.arange(100))
        drawn = as_many_as_fit(images, width=10).wanted
        assert len(drawn) == len(set(drawn)) == 20 and labelled[drawn].sum() == of_labelled
    assert as_many_as_fit(images, width=2) is images


# Mistakes

FLAGS = ["--model_dir=run", "--data_dir=IN"]
ELSEWHERE = ["--model_dir=run", "--output=a.csv"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode=predict", *FLAGS], "--mode=predict needs --output=FILE.csv or FILE.parquet"),
        (["--mode=embed", *FLAGS, "--output=a.csv"], "--output=a.csv: --mode=embed writes FILE.npz or FILE.parquet"),
        (["--mode=suggest", *FLAGS, "--output=a.csv"], "--mode=suggest needs --count"),
        (["--mode=eval", "--model_dir=run", "--output=a.csv"], "--output goes with --mode=predict, embed, suggest"),
        (["--mode=predict", *FLAGS, "--output=gs://a/b.csv"], "--output=gs://a/b.csv: give a local file"),
        (["--mode=predict", "--data_dir=IN", "--output=a.csv"], "give --checkpoint alone"),
        (["--mode=predict", *ELSEWHERE, "--data_dir=no"], "--data_dir=no: no such folder"),
        (["--mode=predict", *ELSEWHERE, "--data_dir=EMPTY"], "--data_dir=EMPTY holds no image"),
        (["--mode=predict", *ELSEWHERE, "--data_dir=BAD"], "none of 1 images can be read"),
        (["--mode=predict", *FLAGS, "--output=IN/1.png/a.csv"], "--output=IN/1.png/a.csv cannot be written"),
        (["--mode=embed", *FLAGS, "--output=a.npz", "--embed_layer=1"], "has no projection head: choose -1 to 0"),
        (["--mode=suggest", *ELSEWHERE, "--count=1"], "all 12 images of train have a label: if"),
        (["--mode=suggest", *ELSEWHERE, "--count=10", "--labels_per_class=1"], "--count=10: of 12 images of train, 9"),
        (["--mode=predict", *ELSEWHERE, "--unlabelled_only"], "all 12 images of train have a label"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(folder, capfd, arguments, said):
    os.mkdir("EMPTY")
    os.mkdir("BAD")
    (folder / "BAD" / "1.png").write_bytes(b"")
    assert command(*arguments) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("run.py: error: ") and said in error


def test_a_network_without_a_classifier_says_what_to_do(folder, tmp_path_factory, capfd):
    pretrained = tiny.pretrained_without_classifier(tmp_path_factory)
    assert command("--mode=predict", f"--checkpoint={pretrained}", "--data_dir=IN", "--output=a.csv") == 2
    assert "has no classifier: fine-tune it first, by --train_mode=finetune" in capfd.readouterr().err


def test_a_network_that_has_diverged_is_an_error(folder, monkeypatch, capfd):
    restore = tasks.restore_network

    def diverged(weights):
        model = restore(weights)
        model.supervised_head.bias.assign(np.full(3, np.nan))
        return model

    monkeypatch.setattr(tasks, "restore_network", diverged)
    assert predict() == 1
    assert "images are not finite at step 2: the network has diverged" in capfd.readouterr().err
