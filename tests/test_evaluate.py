"""Evaluation: accuracy, loss and kNN are those of plain loops, and each example counts once."""

import contextlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
import tiny
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import command

import augment
import checkpoint
import evaluate
import export
import knn
import predict
import sources
import subject
import tasks
from errors import UserError

ONE_STAGE = True  # see conftest.py


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


def looped_accuracy(logits, labels, k):
    """Share of examples with fewer than k classes ahead of their own."""
    hits = [sum(value > row[label] for value in row) < k for row, label in zip(logits, labels, strict=True)]
    return sum(hits) / len(hits)


def looped_loss(logits, labels):
    rows = zip(logits.astype(np.float64), labels, strict=True)
    return np.mean([math.log(sum(math.exp(value - row[label]) for value in row)) for row, label in rows])


def mean_accuracy(logits, labels):
    return {name: values.mean() for name, values in evaluate.accuracy(logits, labels).items()}


@pytest.mark.parametrize("classes", [3, 10, 40])
def test_accuracy_and_loss_are_those_of_a_loop(numbers, classes):
    logits = numbers.normal(size=[200, classes]).astype(np.float32) * 3
    labels = numbers.integers(0, classes, 200)
    result = mean_accuracy(logits, labels)
    assert result["top_1"] == looped_accuracy(logits, labels, 1)
    assert result["top_5"] == looped_accuracy(logits, labels, 5)
    assert result["loss"] == pytest.approx(looped_loss(logits, labels), rel=1e-6)
    assert list(result) == ["top_1", "top_5", "loss"]


def test_with_at_most_five_classes_the_label_is_always_among_the_first_five(numbers):
    assert mean_accuracy(numbers.normal(size=[50, 5]), numbers.integers(0, 5, 50))["top_5"] == 1.0


def test_tied_logits_score_as_if_drawn_by_lot():
    constant = mean_accuracy(np.zeros([10, 10], np.float32), np.arange(10))
    assert constant["top_1"] == pytest.approx(0.1)
    assert constant["top_5"] == pytest.approx(0.5)
    assert constant["loss"] == pytest.approx(math.log(10))
    pair_ahead = np.array([[2.0, 2.0, 1.0, 0.0]] * 3)
    assert mean_accuracy(pair_ahead, np.array([0, 1, 2]))["top_1"] == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    result = mean_accuracy(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32), np.array([0, 0]))
    assert result["loss"] == pytest.approx(5000.0)
    assert result["top_1"] == 0.5


NAN, INF = float("nan"), float("inf")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("row", [[NAN] * 3, [NAN, 0, 0], [0, NAN, 0], [INF, 0, 0], [0, 0, -INF], [INF, INF, 0]])
def test_logits_that_are_not_finite_are_wrong(row):
    scores = evaluate.accuracy(np.array([row, [1.0, 0, 0]], np.float32), np.array([0, 0]))
    assert scores["top_1"].tolist() == [0, 1] and scores["top_5"].tolist() == [0, 1]
    assert scores["loss"][1] == pytest.approx(math.log(1 + 2 / math.e))


# Runs


@pytest.fixture
def run(tmp_path_factory, tmp_path, monkeypatch):
    """The model_dir of a pretrained run, `run` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return tiny.borrow(tiny.pretrained(tmp_path_factory), tmp_path / "run")


def evaluated(run, **given):
    return tiny.evaluated(subject.decide(dict(model_dir=run, mode="eval", **given)))


def test_the_result_does_not_depend_on_the_batch_size(run):
    results = [evaluated(run, eval_batch_size=batch) for batch in (7, 360)]
    for name in ("top_1", "top_5", "loss", "knn_top_1", "examples", "step"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5), name
    assert results[0]["examples"] == 360 and results[0]["step"] == 3


def test_results_are_written_as_files_and_scalars(run):
    result = evaluated(run, eval_name="again")
    for name in ("result_again.json", "result_again_3.json"):
        with open(f"{run}/{name}") as file:
            assert json.load(file) == result
    knn_keys = {"knn_top_1", "knn_labels", "knn_bank", "knn_neighbors", "knn_whitening"}
    assert set(result) == {"step", "examples", "top_1", "top_5", "loss", "seconds", *knn_keys}
    events = EventAccumulator(f"{run}/eval_again")
    events.Reload()
    (top_1,) = events.Tensors("eval/top_1")
    assert top_1.step == 3
    assert tf.make_ndarray(top_1.tensor_proto) == pytest.approx(result["top_1"])
    assert "eval/knn_labels" not in events.Tags()["tensors"]


def test_a_result_is_printed_in_full(run, capfd, monkeypatch):
    evaluate_run = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *given: evaluate_run(*given) | {"examples": 50_000})
    assert command("--mode=eval", "--model_dir=run") == 0
    said = capfd.readouterr().out
    assert "step 3, examples 50000, top_1 0." in said and "knn_labels run, knn_bank 1437, knn_neighbors 20" in said


def test_an_evaluation_exports_nothing(run, capfd):
    assert command("--mode=eval", "--model_dir=run") == 0
    assert "SavedModel" not in capfd.readouterr().out
    assert not os.path.exists("run/saved_model")


def test_what_is_evaluated_is_what_is_exported_though_the_run_goes_on(tmp_path, monkeypatch):
    """A run that trains on, by another process, has a newer checkpoint when its export begins."""
    monkeypatch.chdir(tmp_path)
    evaluate_run = evaluate.evaluate

    def while_the_run_goes_on(*given):
        result = evaluate_run(*given)
        tiny.train_run(model_dir="new", train_steps=3)
        return result

    exported = []
    monkeypatch.setattr(evaluate, "evaluate", while_the_run_goes_on)
    monkeypatch.setattr(export, "export", lambda config, weights: exported.append(weights.step))
    assert command("--mode=train_then_eval", *flags_of(tiny.SUPERVISED), "--train_steps=1", "--model_dir=new") == 0
    assert result_in("new")["step"] == 1 and checkpoint.Weights("new").step == 3
    assert exported == [1]


def flags_of(given):
    """The command line's flags of these values."""
    return [f"--{name}={value}" for name, value in given.items()]


def result_in(folder):
    return json.loads(Path(folder, "result.json").read_text())


@pytest.mark.parametrize("name", ["result.json.tmp", "result_3.json.tmp"])
def test_a_result_that_cannot_be_written_is_printed_and_the_reason_is_one_line(run, capfd, name):
    Path(run, name).mkdir()  # as good as a folder without leave to write, which the superuser always has
    assert command("--mode=eval", "--model_dir=run") == 2
    said = capfd.readouterr()
    assert "top_1 0." in said.out and "knn_top_1 0." in said.out
    assert said.err.startswith("run.py: error: --model_dir=run: the result cannot be written: ")
    assert f"run/{name}" in said.err and said.err.count("\n") == 1


def test_a_disk_that_fills_up_while_the_result_is_written_ends_in_one_line(run):
    resolved = tiny.resolve(model_dir=run, mode="eval")
    for free in (10, 100):  # the first file, the TensorBoard events
        with (
            tiny.full_disk(free),
            pytest.raises(UserError, match=r"cannot be written: .*File too large") as error,
        ):
            evaluate.write_result(resolved, {"step": 3, "top_1": 0.5, "top_5": 0.5, "loss": 1.0})
        said = str(error.value)
        assert "File too large" in said and "\n" not in said and "Op:" not in said and "{{" not in said


def test_eval_steps_limit_the_examples(run):
    assert evaluated(run, eval_batch_size=50, eval_steps=3)["examples"] == 150
    assert evaluated(run, eval_batch_size=50, eval_steps=100)["examples"] == 360


def test_another_split_is_evaluated_where_asked_for(run):
    assert evaluated(run, eval_split="train[:10%]", knn_neighbors=0)["examples"] == 144


def test_data_of_other_classes_is_refused(run, tmp_path):
    tiny.digit_images(tmp_path / "images" / "test", 2)
    given = dict(dataset="image_folder", data_dir=str(tmp_path / "images"), eval_split="test")
    with pytest.raises(UserError, match="split test has the classes digit 0, digit 1, digit 2"):
        evaluated(run, **given)


# Networks that have diverged


@pytest.mark.parametrize(("part", "outputs"), [("supervised_head", "logits"), ("encoder", "features")])
def test_a_network_that_has_diverged_is_an_error(run, capfd, monkeypatch, part, outputs):
    restore = tasks.restore_network

    def diverged(weights):
        model = restore(weights)
        variable = getattr(model, part).trainable_variables[-1]
        variable.assign(np.full(variable.shape, np.nan))
        return model

    monkeypatch.setattr(tasks, "restore_network", diverged)
    assert command("--mode=eval", "--model_dir=run") == 1
    said = capfd.readouterr().err
    count = 360 if part == "supervised_head" else 1437
    assert f"run.py: stopped: the {outputs} of {count} of {count} examples are not finite at step 3: " in said
    assert said.count("\n") == 1 and not os.path.exists("run/result.json")


def test_a_network_without_a_classifier_that_has_diverged_is_an_error_without_knn_too(tmp_path_factory, monkeypatch):
    run = tiny.pretrained_without_classifier(tmp_path_factory)
    restore = tasks.restore_network

    def diverged(weights):
        model = restore(weights)
        model.encoder.trainable_variables[0].assign(np.full(model.encoder.trainable_variables[0].shape, np.nan))
        return model

    monkeypatch.setattr(tasks, "restore_network", diverged)
    with pytest.raises(FloatingPointError, match="the features of 360 of 360 examples"):
        evaluated(run, knn_neighbors=0)


def test_nothing_of_a_network_that_has_diverged_is_exported(run, monkeypatch):
    restore = tasks.restore_network

    def diverged(weights):
        model = restore(weights)
        model.supervised_head.bias.assign(np.full(10, np.inf))
        return model

    monkeypatch.setattr(tasks, "restore_network", diverged)
    assert command("--mode=train_then_eval", "--model_dir=run") == 1
    assert not os.path.exists("run/saved_model") and not os.path.exists("run/result.json")


# Runs on folders, and the kNN accuracy

COLOURED = dict(
    dataset="image_folder", data_dir="images", eval_split="test", image_size=16, lineareval_while_pretraining=True
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained_on_colours(tmp_path_factory):
    """A folder with red and blue `images` and the run `new` on them."""
    folder = tmp_path_factory.mktemp("colours")
    with contextlib.chdir(folder):
        tiny.coloured_images("images/train", 20)
        tiny.coloured_images("images/test", 8)
        tiny.begun(**tiny.PRETRAIN, **COLOURED, train_steps=1, model_dir="new")
    return folder


@pytest.fixture
def coloured(pretrained_on_colours, tmp_path, monkeypatch):
    """The model_dir of pretraining on red and blue images, `new` in the working directory, and `images` beside it."""
    shutil.copytree(pretrained_on_colours, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return "new"


def test_a_few_eval_steps_see_every_class(coloured, monkeypatch):
    """A folder's images come sorted by class. A network that always says one class gets about half of them right."""
    restore = tasks.restore_network

    def always_blue(weights):
        model = restore(weights)
        model.supervised_head.bias.assign([-100.0, 100.0])
        return model

    monkeypatch.setattr(tasks, "restore_network", always_blue)
    flags = ("--eval_split=train", "--eval_steps=1", "--eval_batch_size=16", "--knn_neighbors=0")
    assert command("--mode=eval", f"--model_dir={coloured}", *flags) == 0
    assert result_in(coloured)["examples"] == 16 and 0.2 < result_in(coloured)["top_1"] < 0.8


def test_data_of_other_classes_says_what_to_do(coloured, capfd):
    assert command("--mode=eval", f"--model_dir={coloured}", "--dataset=digits", "--eval_split=test") == 2
    said = capfd.readouterr().err
    assert "--dataset=digits has 10 classes (0, 1, 2, 3, 4, ...), the network of --model_dir=new 2 (a red, b" in said
    assert "fine-tune the network on this one first, by --train_mode=finetune --checkpoint=new" in said


def test_knn_can_be_left_out(run):
    assert not [name for name in evaluated(run, knn_neighbors=0) if name.startswith("knn")]


def test_a_small_bank_holds_every_class_of_a_sorted_folder(coloured, monkeypatch, caplog):
    monkeypatch.setattr(knn, "MAX_FEATURES", 10)
    assert command("--mode=eval", f"--model_dir={coloured}") == 0
    assert not [record for record in caplog.records if record.name == "absl"]
    result = result_in(coloured)
    assert (result["knn_top_1"], result["knn_bank"]) == (1.0, 10)


def test_a_bank_that_holds_all_gives_what_it_gave_before(run):
    """The kNN accuracy over the 1,437 training digits, by a plain loop over the network's features."""
    model = tasks.restore_network(checkpoint.Weights(run))
    features = {}
    for split in ("train", "test"):
        source = sources.load("digits", split)
        cropped = tf.data.Dataset.from_tensor_slices(source.records).map(lambda image: augment.center_crop(image, 16))
        images = np.stack(list(cropped.as_numpy_iterator()))
        h = model(images, training=False).h.numpy().astype(np.float64)
        features[split] = h / np.linalg.norm(h, axis=1, keepdims=True), source.labels
    (bank, labels), (queries, truth) = features["train"], features["test"]
    guesses = []
    for query in queries:
        similarity = bank @ query
        nearest = np.argsort(-similarity)[:20]
        guesses.append(np.bincount(labels[nearest], np.exp(similarity[nearest] / 0.07)).argmax())
    assert evaluated(run)["knn_top_1"] == pytest.approx((np.array(guesses) == truth).mean(), abs=1 / 360)

    chosen = evaluated(run, knn_neighbors=-1)
    filled = knn.Bank(*bank.shape)
    filled.add(bank, labels)
    assert chosen["knn_neighbors"] == filled.choose() and chosen["knn_whitening"] == filled.degree
    hits = filled.vote(queries, chosen["knn_neighbors"]) == truth
    assert chosen["knn_top_1"] == pytest.approx(hits.mean(), abs=1 / 360)


def test_the_bank_sees_the_labels_of_the_run_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.begun(**tiny.PRETRAIN, train_steps=1, labels_per_class=1, model_dir="new")
    assert command("--mode=eval", "--model_dir=new") == 0
    of_run = result_in("new")
    assert (of_run["knn_labels"], of_run["knn_bank"]) == ("run", 10)
    assert command("--mode=eval", "--model_dir=new", "--knn_labels=all") == 0
    of_all = result_in("new")
    assert (of_all["knn_labels"], of_all["knn_bank"]) == ("all", 1437)
    assert of_all["knn_top_1"] > of_run["knn_top_1"] and of_all["top_1"] == of_run["top_1"]


def test_data_that_has_moved_is_found_by_the_bank_too(coloured):
    Path("images").rename("moved")
    assert command("--mode=eval", f"--model_dir={coloured}", "--data_dir=moved") == 0
    assert result_in(coloured)["knn_bank"] == 40


def test_without_the_training_data_the_accuracy_is_there_and_a_warning(coloured, caplog):
    shutil.rmtree("images/train")
    caplog.set_level(logging.WARNING)
    assert command("--mode=eval", f"--model_dir={coloured}") == 0
    assert "top_1" in result_in(coloured) and "knn_top_1" not in result_in(coloured)
    (warning,) = [record.getMessage() for record in caplog.records if "kNN" in record.getMessage()]
    assert "the kNN accuracy is left out" in warning and "no split train" in warning


def test_both_splits_are_opened_before_the_first_batch(coloured, monkeypatch):
    shutil.rmtree("images/test")
    monkeypatch.setattr(evaluate, "predict", lambda *_: pytest.fail("a batch was predicted"))
    assert command("--mode=eval", f"--model_dir={coloured}") == 2


def test_an_evaluation_elsewhere_takes_the_bank_from_the_runs_own_data(coloured):
    store_dataset("other_images", "tfds", 12)
    flags = ("--dataset=other_images", "--data_dir=tfds", "--eval_split=test")
    assert command("--mode=eval", f"--model_dir={coloured}", *flags) == 0
    assert (result_in(coloured)["examples"], result_in(coloured)["knn_bank"]) == (12, 40)


def store_dataset(name, folder, count):
    """Prepares a TensorFlow dataset of `count` noise images in its splits train and test, sorted by class."""

    def generate():
        for i in range(count):
            yield {"image": tiny.noise(i, 16, 16), "label": int(i >= count // 2)}

    signature = {"image": tf.TensorSpec([16, 16, 3], tf.uint8), "label": tf.TensorSpec([], tf.int64)}
    examples = tf.data.Dataset.from_generator(generate, output_signature=signature)
    features = {"image": tfds.features.Image(shape=(16, 16, 3)), "label": tfds.features.ClassLabel(names=CLASSES)}
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version="1.0.0", data_dir=folder, features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples, "test": examples}, disable_shuffling=True,
    )  # fmt: skip


CLASSES = ["a red", "b blue"]


def test_a_draw_from_a_tensorflow_dataset_does_not_depend_on_what_ran_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(knn, "MAX_FEATURES", 8)
    store_dataset("sorted_noise", "tfds", 40)
    given = dict(tiny.PRETRAIN, dataset="sorted_noise", data_dir="tfds", eval_split="test", image_size=16)
    tiny.begun(**given, train_steps=1, model_dir="new")
    results = []
    for seed in (1, 2):
        tf.random.set_seed(seed)
        result = evaluated("new", eval_steps=1, eval_batch_size=16)
        results.append({name: value for name, value in result.items() if name != "seconds"})
    assert results[0] == results[1]
    assert (results[0]["examples"], results[0]["knn_bank"]) == (16, 8)


# Memory

PEAK = """
import os, resource, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
import evaluate, knn, predict
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def batches(count, **widths):
    numbers = np.random.default_rng(0)
    for start in range(0, count, 256):
        n = min(256, count - start)
        made = {name: numbers.random([n, width], np.float32) for name, width in widths.items()}
        yield {**made, "label": numbers.integers(0, 1000, n)}
queries = int(sys.argv[1])
tf.math.top_k(np.zeros([2, 5], np.float32), 2)
before = peak()
bank, means = knn.Bank(65_536, 2048), evaluate.Means()
for batch in predict.only_finite(batches(65_536, h=2048), 0):
    bank.add(batch["h"], batch["label"])
for batch in predict.only_finite(batches(50_000, logits=1000), 0):
    means.add(evaluate.accuracy(batch["logits"], batch["label"]))
for batch in predict.only_finite(batches(queries, h=2048), 0):
    means.add({"knn_top_1": bank.vote(batch["h"], 20) == batch["label"]})
assert set(means.result()) == {"top_1", "top_5", "loss", "knn_top_1"}
print(peak() - before)
"""


def peak_of_an_evaluation(examples):
    """How many bytes of arrays are there at most, while so many examples are scored."""
    numbers = np.random.default_rng(0)

    def batches(count, **widths):
        for _ in range(count // 50):
            made = {name: numbers.random([50, width], np.float32) for name, width in widths.items()}
            yield {**made, "label": numbers.integers(0, 100, 50)}

    tracemalloc.start()
    bank, means = knn.Bank(500, 64), evaluate.Means()
    for batch in predict.only_finite(batches(500, h=64), 0):
        bank.add(batch["h"], batch["label"])
    for batch in predict.only_finite(batches(examples, h=64, logits=100), 0):
        means.add(evaluate.accuracy(batch["logits"], batch["label"]))
        means.add({"knn_top_1": bank.vote(batch["h"], 20) == batch["label"]})
    assert set(means.result()) == {"top_1", "top_5", "loss", "knn_top_1"}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_the_memory_of_an_evaluation_does_not_grow_with_its_examples():
    few, many = peak_of_an_evaluation(500), peak_of_an_evaluation(5000)
    assert many < 1.2 * few and many < 4 * 5000 * (64 + 100) / 2  # All features and logits would take twice as much.


@pytest.mark.slow
def test_an_evaluation_of_imagenets_size_stays_below_one_gigabyte():
    """50,000 x 1000 logits, and a bank of 65,536 x 2048 features; of the queries to it none is kept, so few will do."""
    done = subprocess.run([sys.executable, "-c", PEAK, "512"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1e9
