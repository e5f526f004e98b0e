"""Ready for a TPU, without one: its address reaches TensorFlow, and XLA compiles whatever a step consists of."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tiny
from tensorflow.python.framework import kernels
from test_run import command
from test_tasks import CLASSES, TASKS, make_batch, make_optimizer, make_task

import architecture
import augment
import data
import export
import predict
import train

# XLA's backends in this installation. A kernel that is there for both is one of those that all backends have.
BACKENDS = {"XLA_CPU_JIT", "XLA_GPU_JIT"}
# Operations that have such kernels, and whose results have a size that only their values tell.
OF_UNKNOWN_SIZE = {"Where", "Unique", "UniqueV2", "DynamicPartition", "BooleanMask", "NonMaxSuppressionV3"}
OF_A_GRAPH = {"Placeholder"}  # the arguments of a function
FAST = ("pretrain with memory", "finetune", "distill")  # The other steps have hardly an operation that these lack.


@pytest.fixture(autouse=True)
def one_stage(monkeypatch):
    monkeypatch.setitem(architecture.BLOCKS, 10, (architecture.BASIC, (1,)))


@pytest.fixture(scope="module", autouse=True)
def xla():
    """XLA's kernels are registered when it first compiles."""
    tf.function(lambda x: x + 1, jit_compile=True)(1.0)


class Reached(Exception):
    """The strategy of the TPU would be made now."""


@pytest.fixture
def tpus(monkeypatch):
    """Stand-ins for what TensorFlow does with a TPU. Returns what they have been given."""
    given = {}

    def resolver(**where):
        given["resolver"] = where
        return SimpleNamespace(**where)

    def strategy(resolver):
        given["strategy"] = resolver
        raise Reached

    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", resolver)
    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", lambda where: given.update(connected=where))
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", lambda where: given.update(started=where))
    monkeypatch.setattr(tf.distribute, "TPUStrategy", strategy)
    return given


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (
            ["--use_tpu", "--tpu_name=pod", "--tpu_zone=europe-west4-a", "--gcp_project=lab"],
            dict(tpu="pod", zone="europe-west4-a", project="lab"),
        ),
        (
            ["--strategy=tpu", "--master=grpc://10.0.0.2:8470"],
            dict(tpu="grpc://10.0.0.2:8470", zone=None, project=None),
        ),
        (["--use_tpu", "--tpu_name=pod", "--master=grpc://10.0.0.2:8470"], dict(tpu="pod", zone=None, project=None)),
        (["--use_tpu"], dict(tpu=None, zone=None, project=None)),
    ],
)
def test_the_flags_of_a_tpu_reach_tensorflow(tpus, tmp_path, monkeypatch, flags, where):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Reached):
        command("--model_dir=run", *flags)
    assert tpus["resolver"] == where
    assert tpus["connected"] is tpus["started"] is tpus["strategy"]


def operations(function):
    """The names of all operations in a concrete function, and in the functions that it calls."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    return {node.op for node in nodes} - OF_A_GRAPH


def check_compiles(function):
    """Each operation has a kernel of every backend, and each tensor a size that is known before the step."""
    found = operations(function)
    assert len(found) > 10
    lacking = [name for name in found if not devices_of(name) >= BACKENDS]
    assert not lacking, f"XLA does not compile {lacking}"
    assert not found & OF_UNKNOWN_SIZE
    unknown = [
        tensor.name
        for operation in function.graph.get_operations()
        for tensor in operation.outputs
        if tensor.dtype != tf.resource and not tensor.shape.is_fully_defined() and not is_scratch(tensor)
    ]
    assert not unknown


def is_scratch(tensor):
    """Whether it is what CUDA's kernels of batch norm keep for their gradient, or zeros like that. XLA's is empty."""
    makers = [tensor, *tensor.op.inputs] if tensor.op.type == "ZerosLike" else [tensor]
    return any(maker.op.type == "FusedBatchNormV3" and maker.value_index == 5 for maker in makers)


@functools.cache
def devices_of(operation):
    """The kinds of device that have a kernel of an operation."""
    return {kernel.device_type for kernel in kernels.get_registered_kernels_for_op(operation).kernel}


def test_what_xla_does_not_compile_is_found():
    """Decoding an image, a text, Python and the choice of some rows, each of which a step must not have."""
    for name in ("DecodeJpeg", "StringJoin", "PyFunc", "ReadFile"):
        assert not devices_of(name) & BACKENDS
    chooses = tf.function(lambda x: tf.boolean_mask(x, x > 0)).get_concrete_function(tf.TensorSpec([4]))
    assert operations(chooses) & OF_UNKNOWN_SIZE


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TASKS])
def test_every_operation_of_a_training_step_compiles(name):
    """tests/test_tasks.py::test_the_whole_step_compiles_with_xla compiles and runs them."""
    task = make_task(name)
    step = train.make_train_step(task, make_optimizer(task), tf.distribute.get_strategy())
    batch = tf.nest.map_structure(tf.constant, make_batch())
    check_compiles(step.get_concrete_function(batch))


def test_every_operation_of_a_step_that_makes_its_own_views_compiles():
    task = make_task("pretrain with memory", augment_on="device", jit_compile=True)
    source = tiny.numbered(16)
    canvas = augment.canvas_side(16)
    stream = data.train_stream(source, task.views, 8, 0, canvas=canvas)
    batch = next(iter(stream))
    step = train.make_train_step(task, make_optimizer(task), tf.distribute.get_strategy())
    check_compiles(step.get_concrete_function(batch))
    assert np.isfinite(float(step(batch)["loss"]))


def test_every_operation_of_an_evaluation_and_of_an_exported_network_compiles():
    """The served function alone adds the names of the classes, and decodes files: on the host, around this."""
    model = make_task("finetune").model

    def outputs(images):
        of_model = model(images, training=False)
        return {"logits": of_model.logits, "h": of_model.h}

    step = predict.make_step(outputs, tf.distribute.get_strategy())
    images = tf.constant(make_batch()["image"])
    batch = {"image": images, "label": tf.zeros([8], tf.int32), "mask": tf.ones([8])}
    evaluation = step.get_concrete_function(batch)
    check_compiles(evaluation)
    compiled = tf.function(outputs, jit_compile=True, autograph=False)(images)
    np.testing.assert_allclose(compiled["logits"], step(batch)["logits"], rtol=1e-4, atol=1e-5)
    module = export.Exported(model, 16, CLASSES)
    for trainable in (False, True):
        check_compiles(module.__call__.get_concrete_function(images, trainable=trainable))
