"""A run's own checkpoints: all of the state of one step, whole or not at all, while training goes on."""

import os
import threading
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import checkpoint
import lars_optimizer
import run_folder
import subject
import tasks
import train
from checkpoint import checksums, of_run
from errors import UserError

ONE_STAGE = True  # see conftest.py

CLASSES = ["zero", "one", "two"]
FILES = [".data-00000-of-00001", ".index", ".sha256"]


def live_run(model_dir, seed, keep=5):
    """A tiny pretraining task with everything a run remembers, and its checkpoints."""
    tf.keras.utils.set_random_seed(seed)
    made = subject.resolve({**tiny.PRETRAIN, "model_dir": str(model_dir), "num_proj_layers": 2})
    task = tasks.make_task(made, CLASSES)
    optimizer = lars_optimizer.make_optimizer("lars", 0.1, head=task.model.supervised_head.trainable_variables)
    optimizer.build(task.model.trainable_variables)
    description = run_folder.describe(made.to_dict(), CLASSES, 99)
    saved = checkpoint.RunCheckpoints(str(model_dir), description, keep, task.model, optimizer, task.state)
    return task, optimizer, saved


def remembered(task, optimizer):
    """Every number a run must not forget."""
    values = {"queue keys": task.queue.keys, "queue count": task.queue.count}
    values |= {f"optimizer {variable.path}": variable for variable in optimizer.variables}
    for network, model in (("model", task.model), ("momentum", task.momentum)):
        for part, layers in model.named_weights().items():
            for layer, variables in layers.items():
                values |= {f"{network} {part} {layer} {name}": value for name, value in variables.items()}
    return {name: np.array(value) for name, value in values.items()}


def random_batch():
    numbers = np.random.default_rng(0)
    views = {key: numbers.random([8, 16, 16, 3], np.float32) for key in ("view_1", "view_2")}
    return {**views, "label": np.arange(8, dtype=np.int32) % 3}


def test_everything_a_run_remembers_comes_back(tmp_path):
    task, optimizer, saved = live_run(tmp_path, seed=0)
    step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
    for _ in range(2):
        step(random_batch())
    assert os.path.basename(saved.save()) == "ckpt-2"
    saved.finish()
    other_task, other_optimizer, other_saved = live_run(tmp_path, seed=1)
    wanted, before = remembered(task, optimizer), remembered(other_task, other_optimizer)
    changed = [name for name in wanted if not np.array_equal(wanted[name], before[name])]
    for part in ("model encoder", "model supervised_head", "momentum head", "optimizer", "queue keys", "queue count"):
        assert any(name.startswith(part) for name in changed), part
    other_saved.resume(str(tmp_path / "ckpt-2"))
    assert other_saved.newest == 2
    after = remembered(other_task, other_optimizer)
    for name, value in wanted.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def small_run(model_dir, **options):
    """The checkpoints of a network with one weight of 100,000 numbers, and what sets all of them and the step."""
    kernel = keras.Variable(np.zeros(100_000, np.float32), name="kernel")
    optimizer = keras.optimizers.SGD(momentum=0.9, name="sgd")
    optimizer.build([kernel])
    model = SimpleNamespace(named_weights=lambda: {"encoder": {"layer": {"kernel": kernel}}})
    saved = checkpoint.RunCheckpoints(str(model_dir), {}, options.pop("keep", 5), model, optimizer, {}, **options)

    def go_to(step):
        optimizer.iterations.assign(step)
        kernel.assign(np.full(100_000, step, np.float32))

    return saved, go_to


def kernel_in(prefix):
    """The number that the weight of `small_run` had when it was saved."""
    reader = tf.train.load_checkpoint(str(prefix))
    assert checksums.damage(str(prefix)) == ""
    values = np.unique(reader.get_tensor("weights/encoder/layer/kernel/.ATTRIBUTES/VARIABLE_VALUE"))
    assert len(values) == 1
    return values[0]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def files_of(*steps):
    return [f"ckpt-{step}{suffix}" for step in steps for suffix in FILES]


@pytest.fixture
def gate(monkeypatch):
    """An event for which the writer waits before it writes."""
    opened = threading.Event()
    whole = of_run.RunCheckpoints._write_whole

    def waits(self, prefix):
        assert opened.wait(60)
        whole(self, prefix)

    monkeypatch.setattr(of_run.RunCheckpoints, "_write_whole", waits)
    return opened


def test_a_checkpoint_holds_the_state_of_its_step_though_training_goes_on(tmp_path, gate):
    task, optimizer, saved = live_run(tmp_path, seed=0)
    step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
    step(random_batch())
    wanted = remembered(task, optimizer)
    saved.progress = {"left out": [1]}
    saved.save()
    saved.progress["left out"].append(2)
    for _ in range(2):
        step(random_batch())
    assert not np.array_equal(remembered(task, optimizer)["queue keys"], wanted["queue keys"])
    assert saved.newest == 1 and not run_folder.checkpoints(str(tmp_path))
    gate.set()
    saved.finish()
    other_task, other_optimizer, other_saved = live_run(tmp_path, seed=1)
    other_saved.resume(str(tmp_path / "ckpt-1"))
    assert other_saved.progress == {"left out": [1]}
    for name, value in remembered(other_task, other_optimizer).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def test_the_next_save_waits_for_the_one_before(tmp_path, gate):
    saved, go_to = small_run(tmp_path)
    go_to(1)
    saved.save()
    go_to(2)
    threading.Timer(0.2, gate.set).start()
    saved.save()
    assert gate.is_set() and kernel_in(tmp_path / "ckpt-1") == 1
    saved.finish()
    assert kernel_in(tmp_path / "ckpt-2") == 2 and saved.save_seconds > 0.1


def test_the_best_and_the_newest_of_one_step_are_written_from_one_copy(tmp_path, gate, monkeypatch):
    saved, go_to = small_run(tmp_path)
    go_to(3)
    saved.save_best()
    monkeypatch.setattr(saved._copy, "take", None)  # A second copy would fail, and wait for the writer.
    saved.save()
    assert saved.best == saved.newest == 3 and names_in(tmp_path) == []
    gate.set()
    saved.finish()
    assert kernel_in(tmp_path / "ckpt-3") == kernel_in(tmp_path / "best" / "ckpt-3") == 3


def test_a_step_that_is_saved_is_not_written_again(tmp_path):
    saved, go_to = small_run(tmp_path)
    go_to(1)
    prefix = saved.save()
    saved.finish()
    before = os.stat(f"{prefix}.index")
    assert saved.save() == prefix
    saved.finish()
    assert os.stat(f"{prefix}.index") == before


def test_the_end_of_the_context_waits_for_the_writer(tmp_path):
    saved, go_to = small_run(tmp_path)
    with pytest.raises(KeyboardInterrupt), saved:
        go_to(1)
        saved.save()
        raise KeyboardInterrupt
    assert names_in(tmp_path) == ["checkpoint", *files_of(1)]


def test_a_checkpoint_of_an_older_version_is_restored(tmp_path):
    """That version left the files to TensorFlow's manager, which counts the saves in the checkpoint."""
    saved, go_to = small_run(tmp_path)
    manager = tf.train.CheckpointManager(saved._live, str(tmp_path), max_to_keep=5, checkpoint_name="ckpt")
    for step in (3, 4):
        go_to(step)
        manager.save(checkpoint_number=step)
    again, go_to = small_run(tmp_path, keep=2)
    again.resume(checkpoint.newest_that_reads(str(tmp_path), "", ""))
    assert again.newest == 4 and int(np.asarray(again._step)) == 4
    go_to(5)
    again.save()
    again.finish()
    assert names_in(tmp_path) == ["checkpoint", *(f"ckpt-4{suffix}" for suffix in FILES[:2]), *files_of(5)]


def test_a_run_saves_by_the_clock_too_and_its_scalars_are_on_the_disk_first(tmp_path, monkeypatch):
    on_disk, bring_to_disk = [], run_folder.bring_to_disk
    monkeypatch.setattr(run_folder, "bring_to_disk", lambda path: (on_disk.append(path), bring_to_disk(path)))
    given = {**tiny.NETWORK, **tiny.QUICK, "train_mode": "supervised", "model_dir": str(tmp_path)}
    tiny.train_run(**given, train_steps=3, checkpoint_minutes=1e-9, keep_checkpoint_max=2)
    assert run_folder.checkpoints(str(tmp_path)) == [str(tmp_path / "ckpt-3"), str(tmp_path / "ckpt-2")]
    assert (tmp_path / "run.lock").read_text() == ""
    # Otherwise a disk that fails may keep a checkpoint, and forget the scalars of the steps before it.
    scalars = [place for place, path in enumerate(on_disk) if "events" in path]
    indices = [place for place, path in enumerate(on_disk) if path.endswith(".index")]
    assert len(scalars) == len(indices) == 3
    assert all(scalar < index for scalar, index in zip(scalars, indices, strict=True))


# Which stay


def test_only_the_newest_checkpoints_stay(tmp_path):
    saved, go_to = small_run(tmp_path, keep=2)
    for step in (1, 5, 7, 20):
        go_to(step)
        saved.save()
        saved.save_best()
    saved.finish()
    assert names_in(tmp_path) == ["best", "checkpoint", *files_of(20, 7)]
    assert names_in(tmp_path / "best") == files_of(20)
    assert checkpoint.newest_that_reads(str(tmp_path), "", "") == str(tmp_path / "ckpt-20")
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "ckpt-20")


@pytest.mark.parametrize(
    ("minutes", "newest", "every_hours", "staying"),
    [
        ([0, 30, 60, 90], 5, 0.0, [0, 30, 60, 90]),
        ([0, 30, 60, 90], 2, 0.0, [60, 90]),
        ([0, 30, 60, 90], 1, 1.0, [0, 60, 90]),
        ([0, 60, 90, 120], 1, 1.0, [0, 60, 120]),  # and so on from what stayed
        ([0, 30, 60, 90], 1, 0.75, [0, 60, 90]),
    ],
)
def test_of_the_older_ones_one_for_so_many_hours_stays(minutes, newest, every_hours, staying):
    times = {minute: 60.0 * minute for minute in minutes}
    assert of_run.steps_to_keep(times, newest, every_hours) == set(staying)


def test_the_hours_are_those_of_the_writing_also_in_a_copy_of_the_folder(tmp_path):
    saved, go_to = small_run(tmp_path)
    for step in (1, 2, 3):
        go_to(step)
        saved.save()
        saved.finish()
    listed = (tmp_path / "checkpoint").read_text()
    written = tf.train.get_checkpoint_state(str(tmp_path)).all_model_checkpoint_timestamps
    for hours, seconds in enumerate(written):
        listed = listed.replace(f"timestamps: {seconds}\n", f"timestamps: {seconds - 3600 * (3 - hours)}\n", 1)
    (tmp_path / "checkpoint").write_text(listed)
    copied, go_to = small_run(tmp_path, keep=1, keep_every_hours=1.5)
    copied.resume(str(tmp_path / "ckpt-3"))
    go_to(4)
    copied.save()
    copied.finish()
    assert run_folder.checkpoints(str(tmp_path)) == [str(tmp_path / f"ckpt-{step}") for step in (4, 3, 1)]


def test_a_checkpoint_is_set_aside_with_its_checksums(tmp_path):
    saved, go_to = small_run(tmp_path)
    for step in (1, 2):
        go_to(step)
        saved.save()
    saved.set_aside_newest()
    assert saved.newest == 1
    assert names_in(tmp_path) == ["checkpoint", *files_of(1), *(f"{name}.diverged" for name in files_of(2))]


def test_what_is_newer_than_where_the_run_goes_on_is_skipped_with_its_checksums(tmp_path):
    saved, go_to = small_run(tmp_path)
    for step in (1, 2):
        go_to(step)
        saved.save()
        saved.save_best()
    saved.finish()
    again, go_to = small_run(tmp_path)
    again.resume(str(tmp_path / "ckpt-1"))
    assert (again.newest, again.best) == (1, None)
    go_to(3)
    again.save()
    again.finish()
    skipped = [f"{name}.skipped" for name in files_of(2)]
    assert names_in(tmp_path) == sorted(["best", "checkpoint", *files_of(1), *skipped, *files_of(3)])
    assert names_in(tmp_path / "best") == []


# Whole or not at all


@pytest.mark.parametrize("killed_at", range(6))
def test_a_save_that_is_killed_leaves_a_whole_checkpoint_or_none(tmp_path, monkeypatch, killed_at):
    saved, go_to = small_run(tmp_path, keep=1)
    go_to(1)
    saved.save()
    saved.finish()
    renames = []
    rename = tf.io.gfile.rename

    def killed(source, target, overwrite=False):
        renames.append(target)
        if len(renames) > killed_at:
            raise SystemExit
        rename(source, target, overwrite)

    monkeypatch.setattr(tf.io.gfile, "rename", killed)
    monkeypatch.setattr(tf.io.gfile, "rmtree", lambda path: None)
    go_to(2)
    saved.save()
    if killed_at < 5:  # the checksums, three files, the list
        with pytest.raises(SystemExit):
            saved.finish()
    else:
        saved.finish()
    monkeypatch.undo()
    newest = checkpoint.newest_that_reads(str(tmp_path), "", "")
    assert kernel_in(newest) == checkpoint.step_of(newest) == (2 if killed_at > 3 else 1)
    again, go_to = small_run(tmp_path, keep=1)
    again.resume(newest)
    go_to(3)
    again.save()
    again.finish()
    assert names_in(tmp_path) == ["checkpoint", *files_of(3)]


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    saved, go_to = small_run(tmp_path)
    go_to(1)
    prefix = saved.save()
    saved.finish()
    numbers = np.random.default_rng(0)
    for suffix in FILES:
        path = tmp_path / f"ckpt-1{suffix}"
        whole = path.read_bytes()
        for position in {0, len(whole) - 1, *numbers.integers(0, len(whole), 40).tolist()}:
            flipped = bytearray(whole)
            flipped[position] ^= 1 << int(numbers.integers(8))
            path.write_bytes(flipped)
            assert checksums.damage(prefix), (suffix, position)
        for part in (b"", whole[:-1], whole + b"x"):
            path.write_bytes(part)
            assert checksums.damage(prefix), (suffix, part)
        path.write_bytes(whole)
        assert checksums.damage(prefix) == ""


# What is never saved


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    task, _, saved = live_run(tmp_path, seed=0)
    for variable in (task.model.encoder.trainable_variables[0], task.queue.keys, task.momentum.encoder.variables[3]):
        before = np.array(variable)
        variable.assign(np.where(np.arange(before.size).reshape(before.shape) == 1, np.inf, before))
        with pytest.raises(FloatingPointError, match="not finite"):
            saved.save()
        variable.assign(before)
    assert not list(tmp_path.glob("*"))
    saved.save()
    saved.finish()
    assert saved.newest == 0 and names_in(tmp_path) == ["checkpoint", *files_of(0)]


# A full disk


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path):
    saved, go_to = small_run(tmp_path)
    saved.save()
    saved.finish()
    go_to(1)
    with tiny.full_disk(100_000):
        saved.save()
        go_to(2)
        with pytest.raises(
            UserError, match=r"^the checkpoint of step 1 in --model_dir=.* cannot be written: "
        ) as error:
            saved.save()
    assert "\n" not in str(error.value) and saved.newest == 0
    assert names_in(tmp_path) == ["checkpoint", *files_of(0)] and kernel_in(tmp_path / "ckpt-0") == 0


def test_with_warn_a_run_goes_on_and_tries_again(tmp_path, caplog):
    saved, go_to = small_run(tmp_path, on_failure="warn")
    saved.save()
    saved.finish()
    go_to(1)
    with tiny.full_disk(100_000):
        saved.save()
        assert saved.newest_written() == 0
    go_to(2)
    saved.save()
    saved.finish()
    assert caplog.text.count("the checkpoint of step 1") == 1
    assert "tries again at the next save" in caplog.text
    assert names_in(tmp_path) == ["checkpoint", *files_of(0, 2)] and kernel_in(tmp_path / "ckpt-2") == 2


@pytest.mark.parametrize("on_failure", ["stop", "warn"])
def test_the_last_checkpoint_of_a_run_must_be_written(tmp_path, on_failure):
    saved, go_to = small_run(tmp_path, on_failure=on_failure)
    go_to(1)
    with tiny.full_disk(100_000), pytest.raises(UserError, match="the checkpoint of step 1"), saved:
        saved.save()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("on_failure", "advice"), [("stop", "make room and give the same command"), ("warn", "make room")]
)
def test_a_disk_without_space_says_what_to_do(tmp_path, monkeypatch, on_failure, advice):
    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "/run/ckpt-1_temp/part: No space left on device")

    monkeypatch.setattr(tf.train.Checkpoint, "write", full)
    saved, _ = small_run(tmp_path, on_failure=on_failure)
    saved.save()
    with pytest.raises(UserError, match=f"cannot be written: no space left on the disk: {advice}"):
        saved.finish()
