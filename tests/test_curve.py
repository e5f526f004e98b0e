"""The TensorBoard scalars of a run that was killed: each step once, as TensorBoard reads them."""

import os
import re
import time

import pytest
import tensorflow as tf
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

import curve
from errors import UserError


def write(folder, begins, steps, tag="loss"):
    """One process of a run: what it writes of `steps`, each with a value that tells the processes apart."""
    with curve.Curve(str(folder)) as scalars:
        scalars.begin(begins)
        for step, value in steps.items():
            scalars.write(step, {tag: value}, "train")


def pairs(events):
    return [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events]


def opened(folder):
    """What TensorBoard's server reads a run with."""
    return EventMultiplexer(tensor_size_guidance={"scalars": 0}).AddRun(str(folder), "run").Reload()


def read(folder, tag="train/loss"):
    """The (step, value) of a tag: as TensorBoard shows them, and as scripts read them, which drops no tensor itself."""
    of_script = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    found = pairs(opened(folder).Tensors("run", tag))
    assert found == pairs(of_script.Tensors(tag))
    return found


def test_steps_that_are_done_again_count_once(tmp_path):
    write(tmp_path, None, {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0})
    write(tmp_path, 2, {3: 13.0, 4: 14.0})
    write(tmp_path, 1, {2: 22.0})  # The newest checkpoint was damaged.
    assert read(tmp_path) == [(0, 0.0), (1, 1.0), (2, 22.0)]


def test_a_tensorboard_that_is_open_drops_them_too(tmp_path):
    write(tmp_path, None, {1: 1.0, 2: 2.0, 3: 3.0})
    is_open = opened(tmp_path)
    write(tmp_path, 1, {2: 12.0})
    assert pairs(is_open.Reload().Tensors("run", "train/loss")) == [(1, 1.0), (2, 12.0)]


def test_a_run_goes_back_within_a_process(tmp_path):
    with curve.Curve(str(tmp_path)) as scalars:
        scalars.begin(None)
        for step in (1, 2, 3):
            scalars.write(step, {"loss": step}, "train")
        scalars.begin(1)
        scalars.write(2, {"loss": 12.0}, "train")
    assert read(tmp_path) == [(1, 1.0), (2, 12.0)]


def test_a_run_that_begins_again_has_nothing_of_the_first_attempt(tmp_path):
    write(tmp_path, None, {0: 0.0, 1: 1.0})
    write(tmp_path, None, {1: 11.0})
    assert read(tmp_path) == [(1, 11.0)]


def test_what_no_later_process_writes_again_is_dropped_too(tmp_path):
    write(tmp_path, None, {1: 1.0, 2: 2.0})
    write(tmp_path, 1, {2: 12.0}, tag="accuracy")
    assert read(tmp_path) == [(1, 1.0)]


def test_a_run_of_an_older_version_goes_on(tmp_path):
    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default():
        for step in (1, 2, 3):
            tf.summary.scalar("train/loss", float(step), step=step)
    writer.close()
    write(tmp_path, 2, {3: 13.0})
    assert read(tmp_path) == [(1, 1.0), (2, 2.0), (3, 13.0)]


def test_a_process_that_was_killed_leaves_all_that_was_written_and_half_a_record_does_no_harm(tmp_path):
    killed = curve.Curve(str(tmp_path))
    killed.begin(None)
    killed.write(1, {"loss": 1.0}, "train")  # It is not closed.
    assert read(tmp_path) == [(1, 1.0)]
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content + content[-20:-5])
    (tmp_path / "unfinished.tmp").write_bytes(b"of a run that was killed while it went on")
    write(tmp_path, 1, {2: 12.0})
    assert read(tmp_path) == [(1, 1.0), (2, 12.0)]
    write(tmp_path, 0, {1: 21.0})
    assert read(tmp_path) == [(1, 21.0)]


def test_a_clock_that_was_ahead_does_not_change_the_order_of_the_files(tmp_path, monkeypatch):
    with monkeypatch.context() as ahead:
        ahead.setattr(curve.time, "time", lambda: 4_000_000_000.0)
        write(tmp_path, None, {1: 1.0, 2: 2.0})
    assert time.time() < 4_000_000_000
    write(tmp_path, 1, {2: 12.0})
    assert read(tmp_path) == [(1, 1.0), (2, 12.0)]


def test_who_is_not_the_chief_writes_nothing(tmp_path):
    with curve.Curve(str(tmp_path / "train"), writes=False) as scalars:
        scalars.begin(None)
        scalars.write(1, {"loss": 1.0}, "train")
    assert not (tmp_path / "train").exists()


def test_a_disk_that_is_full_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=re.escape("cannot be written")):  # noqa: SIM117 - the limit ends first
        with tiny.full_disk(2000), curve.Curve(str(tmp_path)) as scalars:
            scalars.begin(None)
            for step in range(100):
                scalars.write(step, {"loss": 1.0}, "train")
    assert os.listdir(tmp_path)
