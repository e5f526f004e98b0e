"""Exports: plain TensorFlow loads them anywhere, and what they compute is what the live network computes."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2
from test_run import command

import augment
import checkpoint
import export
import subject
import tasks
from errors import UserError

KEYS = {
    *("initial_conv", "initial_max_pool", "block_group1", "block_group2", "block_group3", "block_group4"),
    *("final_avg_pool", "proj_head_input", "proj_head_output", "proj_head_1", "proj_head_2", "proj_head_3"),
    "logits_sup",
}
# What a server does, with TensorFlow, the folder and images.
SERVER = """
import json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
folder, inputs, outputs = sys.argv[1:]
given = np.load(inputs, allow_pickle=False)
module = tf.saved_model.load(folder)
answers = {f"module/{k}": v.numpy() for k, v in module(given["images"], trainable=False).items()}
served = module.signatures["serving_default"](images=tf.constant(given["images"]))
encoded = [given[name].tobytes() for name in sorted(given.files) if name.startswith("file")]
from_bytes = module.signatures["serve_bytes"](image_bytes=tf.constant(encoded))
answers |= {f"served/{k}": v.numpy() for k, v in served.items() if v.dtype != tf.string}
answers |= {f"bytes/{k}": v.numpy() for k, v in from_bytes.items() if v.dtype != tf.string}
np.savez(outputs, **answers)
classes = {"served": served["classes"].numpy().tolist(), "bytes": from_bytes["classes"].numpy().tolist()}
print(json.dumps({k: [name.decode() for name in v] for k, v in classes.items()} | {
    "foreign": sorted(m for m in ("model", "resnet", "augment", "data", "export") if m in sys.modules)
}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.borrow(tiny.pretrained(tmp_path_factory), tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def folder(run):
    return tiny.exported(subject.decide(dict(model_dir=run, mode="export")))


@pytest.fixture(scope="module")
def live(run):
    return tasks.restore_network(checkpoint.Weights(run))


@pytest.fixture
def module(folder):
    return tf.saved_model.load(folder)


def images(count, size=16):
    return np.random.default_rng(count).random([count, size, size, 3], np.float32)


def expected(outputs):
    """The live network's outputs by their exported names."""
    hiddens = {f"proj_head_{k}": outputs.hiddens[k] for k in (1, 2, 3)}
    ends = {"proj_head_input": outputs.h, "proj_head_output": outputs.z, "logits_sup": outputs.logits}
    return {**outputs.endpoints, **hiddens, **ends}


def assert_close(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5, rtol=1e-5, err_msg=name)


def test_the_folder_is_named_after_the_step(run, folder):
    assert folder == f"{run}/saved_model/3"


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_module_computes_what_the_live_network_does(module, live, batch):
    answers = module(images(batch), trainable=False)
    assert set(answers) == KEYS
    assert_close(answers, expected(live(images(batch), training=False)))


def test_the_module_takes_other_image_sizes(module, live):
    assert_close(module(images(2, 24), trainable=False), expected(live(images(2, 24), training=False)))


def test_training_mode_takes_the_batchs_statistics(module, run):
    live = tasks.restore_network(checkpoint.Weights(run))  # its moving statistics change
    answers = module(images(8), trainable=True)
    assert_close(answers, expected(live(images(8), training=True)))
    still = tf.saved_model.load(f"{run}/saved_model/3")(images(8), trainable=False)
    assert np.abs(answers["final_avg_pool"] - still["final_avg_pool"]).max() > 1e-3


def test_gradients_flow_in_training_mode(module, live):
    with tf.GradientTape() as tape:
        answers = module(images(4), trainable=True)
        loss = tf.reduce_sum(answers["proj_head_output"] ** 2) + tf.reduce_sum(answers["logits_sup"] ** 2)
    gradients = tape.gradient(loss, module.trainable_variables_list)
    assert len(gradients) == len(live.trainable_variables)
    assert all(gradient is not None and np.isfinite(gradient).all() for gradient in gradients)
    assert all(tf.norm(gradient) > 0 for gradient in gradients[:3])


def test_the_graph_needs_nothing_but_plain_tensorflow(folder):
    saved = saved_model_pb2.SavedModel.FromString((Path(folder) / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    operations = {node.op for node in nodes}
    assert {"Conv2D", "DecodeImage", "MatMul"} <= operations
    odd = ("Collective", "Nccl", "PyFunc", "Xla", "Mkl", "Send", "Recv")
    assert not [operation for operation in operations if any(part in operation for part in odd)]


def encoded(kind, height, width):
    pixels = np.random.default_rng(height).integers(0, 256, [height, width, 3], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files():
    """Encoded images of different kinds and sizes."""
    return [encoded("PNG", 16, 16), encoded("JPEG", 40, 25), encoded("PNG", 9, 60), encoded("JPEG", 100, 100)]


def answer(live, batch, classes):
    outputs = live(batch, training=False)
    return {
        "embedding": outputs.h,
        "probabilities": tf.nn.softmax(outputs.logits),
        "classes": np.array(classes)[np.argmax(outputs.logits, axis=1)].astype(bytes),
    }


def assert_answers(ours, theirs):
    assert set(ours) == set(theirs)
    for name in ("embedding", "probabilities"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)
    assert ours["classes"].numpy().tolist() == theirs["classes"].tolist()


DIGITS = [str(digit) for digit in range(10)]


def test_images_are_served(module, live):
    serve = module.signatures["serving_default"]
    for batch in (1, 5):
        assert_answers(serve(images=tf.constant(images(batch))), answer(live, images(batch), DIGITS))


def test_encoded_images_of_any_size_are_served_as_in_evaluation(module, live, files):
    prepared = np.stack([augment.center_crop(tf.io.decode_image(file, 3), 16) for file in files])
    served = module.signatures["serve_bytes"](image_bytes=tf.constant(files))
    assert_answers(served, answer(live, prepared, DIGITS))
    one = module.signatures["serve_bytes"](image_bytes=tf.constant(files[1:2]))
    np.testing.assert_allclose(one["embedding"][0], served["embedding"][1], atol=1e-5)


def test_a_fresh_process_with_tensorflow_alone_serves_the_same(folder, live, files, tmp_path):
    given = {f"file{i}": np.frombuffer(file, np.uint8) for i, file in enumerate(files)}
    np.savez(tmp_path / "inputs.npz", images=images(3), **given)
    command = [sys.executable, "-c", SERVER, folder, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    outputs = np.load(tmp_path / "outputs.npz")
    answers = {name.removeprefix("module/"): outputs[name] for name in outputs.files if name.startswith("module/")}
    assert_close(answers, expected(live(images(3), training=False)))
    served = answer(live, images(3), DIGITS)
    np.testing.assert_allclose(outputs["served/probabilities"], served["probabilities"], atol=1e-5)
    assert said["served"] == [name.decode() for name in served["classes"]]
    assert outputs["bytes/embedding"].shape == (4, 64) and len(said["bytes"]) == 4
    assert said["foreign"] == []


def test_a_network_without_a_classifier_serves_embeddings(tmp_path_factory, tmp_path, one_stage):
    model_dir = tiny.borrow(tiny.pretrained_without_classifier(tmp_path_factory), tmp_path / "run")
    module = tf.saved_model.load(tiny.exported(subject.decide(dict(model_dir=model_dir, mode="export"))))
    assert set(module(images(2), trainable=False)) == KEYS - {"logits_sup", *(f"block_group{k}" for k in (2, 3, 4))}
    assert set(module.signatures["serving_default"](images=tf.constant(images(2)))) == {"embedding"}


@pytest.mark.parametrize(
    ("step", "keep", "left"),
    [
        (12, 0, {"2", "9", "12"}), (12, 1, {"12"}), (12, 2, {"9", "12"}), (12, 5, {"2", "9", "12"}),
        (9, 1, {"9"}), (9, 2, {"9", "12"}),
    ],
)  # fmt: skip
def test_only_the_newest_exports_stay_as_many_as_asked_for(tmp_path, step, keep, left):
    """12 comes before 2 and 9 in the alphabet. The export of an older step stays when it is the last that was made."""
    for name in ("2", "9", "12", "notes"):
        (tmp_path / name).mkdir()
    export._remove_surplus(str(tmp_path), step, keep)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", *left}


class Small(tf.Module):
    """Stands for the network in an export: 200 kB that are written at once."""

    def __init__(self, *_):
        self.weights = tf.Variable(tf.zeros([50_000]))

    @tf.function
    def __call__(self, images, trainable):
        return tf.reduce_sum(images) + self.weights[0]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def serve(self, images):
        return tf.reduce_sum(images)

    serve_bytes = serve


@pytest.fixture
def borrowed(tmp_path, tmp_path_factory, monkeypatch):
    """A pretrained run named `run` in the working directory, whose exports are small ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "Exported", Small)
    return Path(tiny.borrow(tiny.pretrained(tmp_path_factory), tmp_path / "run"))


def test_a_step_can_be_exported_again_beside_what_a_killed_export_has_left(borrowed):
    assert command("--mode=export", "--model_dir=run") == 0
    exports = borrowed / "saved_model"
    before = tiny.files_in(exports / "3")
    left = exports / "3.unfinished"
    left.mkdir()
    (left / "saved_model.pb").write_text("half")
    for other in ("1", "2"):
        (exports / other).mkdir()
    assert command("--mode=export", "--model_dir=run", "--keep_hub_module_max=2") == 0
    assert set(tiny.files_in(exports / "3")) == set(before)
    assert {path.name for path in exports.iterdir()} == {"2", "3"}


def test_a_full_disk_ends_an_export_with_one_line_and_leaves_no_half_of_it(borrowed, capfd):
    with tiny.full_disk(100_000):
        assert command("--mode=export", "--model_dir=run") == 2
    said = capfd.readouterr().err
    assert said.startswith("run.py: error: --model_dir=run: run/saved_model/3 cannot be written: ")
    assert "File too large" in said and said.count("\n") == 1
    assert list((borrowed / "saved_model").iterdir()) == []


def test_an_export_that_fails_leaves_the_one_before_it(borrowed):
    assert command("--mode=export", "--model_dir=run") == 0
    before = tiny.files_in(borrowed / "saved_model")
    with tiny.full_disk(100_000):
        assert command("--mode=export", "--model_dir=run") == 2
    assert tiny.files_in(borrowed / "saved_model") == before


def test_a_file_where_the_exports_belong_is_named(borrowed, capfd):
    (borrowed / "saved_model").write_text("mine")
    assert command("--mode=export", "--model_dir=run") == 2
    said = capfd.readouterr().err
    assert "run/saved_model/3 cannot be written" in said and said.count("\n") == 1
    assert (borrowed / "saved_model").read_text() == "mine"


def test_without_a_checkpoint_there_is_nothing_to_export(tmp_path):
    of_nothing = subject.Subject(subject.resolve({"model_dir": str(tmp_path)}), of_run=True)
    with pytest.raises(UserError, match="no checkpoint in it"):
        tiny.exported(of_nothing)
    assert list(tmp_path.iterdir()) == []
