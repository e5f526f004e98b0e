"""A batch in chunks has the loss, gradient and state of the whole batch, and batch norm's averages move once."""

import numpy as np
import pytest
import tensorflow as tf
import tiny
from helpers import per_replica, split
from test_finite import poisoned
from test_finite import state as whole_state
from test_tasks import make_batch, make_optimizer, make_task, smooth, state_of  # noqa: F401 - a fixture that speeds up

import finite
import resnet
import strategy as strategy_lib
import tasks
import train
from errors import UserError

BATCH = 8


def parts_of(replicas, chunks):
    """The images of the global batch that each chunk has."""
    share = BATCH // replicas
    by_replica = np.arange(BATCH).reshape(replicas, chunks, share // chunks)
    return [by_replica[:, chunk].ravel() for chunk in range(chunks)]


def reference_step(task, optimizer, batch, parts):
    """A step that keeps all activations: the networks see the parts one by one, the loss sees them all."""
    variables = task.model.trainable_variables
    back = np.argsort(np.concatenate(parts))

    def joined(rows):
        return {name: tf.gather(tf.concat([each[name] for each in rows], axis=0), back) for name in rows[0]}

    with tf.GradientTape() as tape:
        chunks = [{name: tf.gather(x, part) for name, x in batch.items()} for part in parts]
        outputs = joined([task.outputs(chunk) for chunk in chunks])
        targets = joined([task.targets(chunk) for chunk in chunks])
        loss, metrics = task.loss_of(outputs, targets, batch, tasks.totals(batch["label"]))
        loss += task.weight_decay()
    optimizer.apply(tape.gradient(loss, variables), variables)
    task.after_step(tf.convert_to_tensor(optimizer.iterations))
    return {"loss": loss, **metrics}


def start(strategy, name, freeze=False, rate=0.05, **changes):
    with strategy.scope():
        task = make_task(name, **changes)
        if freeze:
            networks = [task.model, task.momentum] if getattr(task, "momentum", None) else [task.model]
            for network in networks:
                for layer in (*network.encoder.layers, *(network.head.layers if network.head else ())):
                    layer.trainable = layer.trainable and not isinstance(layer, resnet.BatchNorm)
        return task, make_optimizer(task, rate)


def steps_of(strategy, task, optimizer, batches):
    """The metrics of a step for each batch, and the state after the last, as each replica holds it."""
    step = train.make_train_step(task, optimizer, strategy)
    metrics = [{name: float(x) for name, x in step(split(strategy, batch)).items()} for batch in batches]
    state = state_of(task)
    if "queue keys" in state:
        state["queue keys"] = tf.convert_to_tensor(state["queue keys"])  # also of a queue in shards
    return metrics, {name: per_replica(strategy, value) for name, value in state.items()}


def assert_same(found, expected):
    metrics, state = found
    expected_metrics, expected_state = expected
    for got, wanted in zip(metrics, expected_metrics, strict=True):
        assert got == pytest.approx({name: float(x) for name, x in wanted.items()}, rel=1e-4, abs=1e-5)
    for name, value in expected_state.items():
        for local in state[name]:
            np.testing.assert_allclose(local, np.array(value), rtol=1e-4, atol=1e-4, err_msg=name)


slow = pytest.mark.slow
CASES = [
    ("pretrain with memory", 2, 2, False),
    pytest.param("pretrain with memory", 1, 4, True, marks=slow),
    pytest.param("pretrain without memory", 1, 2, False, marks=slow),
    pytest.param("pretrain without memory", 2, 4, False, marks=slow),
    ("finetune", 1, 4, False),
    pytest.param("finetune", 1, 2, True, marks=slow),
    pytest.param("distill with labels", 2, 2, False, marks=slow),
    pytest.param("distill answers", 1, 2, False, marks=slow),
]


@pytest.mark.parametrize(("name", "replicas", "chunks", "jit_compile"), CASES)
def test_chunks_give_what_all_activations_would(mirrored, name, replicas, chunks, jit_compile):
    """Batch norm sees a chunk of all replicas, in both. Its averages move once for each chunk."""
    batches = [make_batch(i) for i in range(2)]
    task, optimizer = start(mirrored(1), name)
    parts = parts_of(replicas, chunks)
    expected = [reference_step(task, optimizer, batch, parts) for batch in batches]
    strategy = mirrored(replicas)
    accumulated = start(strategy, name, grad_accumulation=chunks, jit_compile=jit_compile)
    assert_same(steps_of(strategy, *accumulated, batches), (expected, state_of(task)))


@pytest.mark.parametrize(
    ("name", "replicas"), [("pretrain with memory", 2), pytest.param("pretrain without memory", 1, marks=slow)]
)
def test_chunks_give_the_step_of_the_whole_batch_where_batch_norm_is_frozen(mirrored, name, replicas):
    batches, strategy = [make_batch(i) for i in range(2)], mirrored(replicas)
    metrics, state = steps_of(mirrored(1), *start(mirrored(1), name, freeze=True), batches)
    found = steps_of(strategy, *start(strategy, name, freeze=True, grad_accumulation=2), batches)
    assert_same(found, (metrics, {key: value[0] for key, value in state.items()}))


def test_chunks_give_the_step_of_the_whole_batch_where_their_statistics_are_the_same():
    """Each chunk has the same images. The averages move by each of them: they forget twice."""
    batch = {key: np.tile(value[:4], [2, *[1] * (value.ndim - 1)]) for key, value in make_batch().items()}
    one, name = tf.distribute.get_strategy(), "pretrain with memory"
    start_of = {key: np.array(value) for key, value in state_of(start(one, name)[0]).items()}
    metrics, state = steps_of(one, *start(one, name), [batch])
    found, state_in_chunks = steps_of(one, *start(one, name, grad_accumulation=2), [batch])
    assert found[0] == pytest.approx(metrics[0], rel=1e-4, abs=1e-5)
    for key, (whole,) in state.items():
        if "moving" in key:  # From a to 0.9 a + 0.1 b; from there to 0.81 a + 0.19 b.
            whole = 1.9 * whole - 0.9 * start_of[key]
        np.testing.assert_allclose(state_in_chunks[key][0], whole, rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.slow
def test_a_step_in_chunks_is_left_out_without_a_trace(mirrored):
    strategy = mirrored(2)
    task, optimizer = start(strategy, "pretrain with memory", grad_accumulation=2)
    with strategy.scope():
        skipped = tf.Variable(0, dtype=tf.int64, trainable=False)
    step = train.make_train_step(task, optimizer, strategy, skipped=skipped)
    step(split(strategy, make_batch(0)))
    before = {name: per_replica(strategy, value) for name, value in whole_state(task, optimizer).items()}
    metrics = step(split(strategy, poisoned(make_batch(1), ["view_1"])))
    assert float(metrics[finite.COUNTS]) == 0 and float(metrics[finite.SKIPPED_STEPS]) == 1
    for name, value in whole_state(task, optimizer).items():
        for was, now in zip(before[name], per_replica(strategy, value), strict=True):
            np.testing.assert_array_equal(now, was + ("iteration" in name), err_msg=name)


@pytest.mark.slow
def test_a_run_in_chunks_with_views_made_on_the_device(tmp_path):
    """It goes on in another number of chunks, and says so; several of its steps go in one call."""
    given = dict(tiny.PRETRAIN, model_dir=str(tmp_path / "run"), augment_on="device", steps_per_call=2)
    tiny.train_run(**given, grad_accumulation=4, train_steps=4)
    tiny.train_run(**given, grad_accumulation=2, train_steps=6)
    assert (tmp_path / "run" / "ckpt-6.index").exists()


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 2])
def test_recomputed_blocks_and_a_queue_in_shards_change_nothing(mirrored, chunks):
    name, strategy, batches = "pretrain with memory", mirrored(2), [make_batch(i) for i in range(3)]
    metrics, state = steps_of(strategy, *start(strategy, name, grad_accumulation=chunks), batches)
    changes = dict(remat=True, shard_queue=True, grad_accumulation=chunks)
    found = steps_of(strategy, *start(strategy, name, **changes), batches)
    assert_same(found, (metrics, {key: value[0] for key, value in state.items()}))


@pytest.mark.slow
def test_a_queue_in_shards_goes_on_whole(mirrored, tmp_path):
    """The third step, on one device and without shards, leaves the 16 slots alone that it has no new keys for."""
    given = dict(tiny.PRETRAIN, model_dir=str(tmp_path / "run"))
    tiny.train_run(mirrored(2), **given, shard_queue=True, train_steps=2)
    keys = "queue/keys/.ATTRIBUTES/VARIABLE_VALUE"
    before = tiny.saved_values(tmp_path / "run")[keys]
    tiny.train_run(**given, shard_queue=False, train_steps=3)
    after = tiny.saved_values(tmp_path / "run")[keys]
    assert before.shape == after.shape == (48, 128)
    np.testing.assert_array_equal(after[:16], before[:16])
    assert np.all(np.any(before, axis=1)) and not np.any(np.all(after[16:] == before[16:], axis=1))


def test_keys_that_replicas_cannot_share_are_refused():
    strategy_lib.check_shards(64, 4)
    with pytest.raises(UserError, match=r"--shard_queue: --memory_size=65 must be a multiple of the 4 replicas"):
        strategy_lib.check_shards(65, 4)


def test_chunks_that_do_not_divide_a_share_are_refused():
    strategy_lib.check_chunks(4, 64, 2)
    with pytest.raises(UserError, match=r"--grad_accumulation=3: must divide each replica's share .* 32 images"):
        strategy_lib.check_chunks(3, 64, 2)
