"""A run's own checkpoints: written while it trains on, listed, kept, set aside, and restored.

A checkpoint is written into a folder `ckpt-<step>_temp` beside its place, with its checksums, and brought to the disk.
Its files then move to their place, the index last. A checkpoint counts where its index is, so at any moment it is
there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow as tf
from absl import logging

import checkpoint.checksums as checksums
import model as model_lib
import run_folder
import strategy as strategy_lib
from checkpoint.choice import step_of
from checkpoint.layout import WEIGHTS, SavedConfig
from checkpoint.reader import UNREADABLE
from checkpoint.state_copy import StateCopy
from errors import UserError, reason

UNFINISHED = "_temp"  # behind the name of a checkpoint: the folder in which it is written


class Writing(NamedTuple):
    """A checkpoint that is being written.

    Attributes:
      step: of the state in it.
      is_best: whether it goes into the folder `best`.
      done: what the writer gives when it has ended; None in a worker that does not write.
    """

    step: int
    is_best: bool
    done: Future[None] | None


class RunCheckpoints:
    """The checkpoints of one run.

    `save` and `save_best` copy the state and return; a thread writes the copy. At most one copy is being written: the
    next save waits for it. Used as a context, the end waits too, so that no thread writes after it:

        with checkpoints:
            ...                 # train
            checkpoints.save()  # returns at once

    Where there are several workers, each must make the same calls, and the chief alone writes.

    Args:
      model_dir: where they live.
      config: what `run_folder.describe` returned; saved inside each.
      keep: how many of the newest to keep.
      model: the network.
      optimizer: with its step, `optimizer.iterations`.
      state: what else the run must remember, in nested dicts and modules of variables.
      strategy: says which worker writes, and lets all of them hear of a failure. None: the current one.
      keep_every_hours: of the checkpoints before the newest `keep`, one for every so many hours stays; 0: none.
      on_failure: what follows when a checkpoint cannot be written: `stop`, the next call raises; or `warn`.

    Attributes:
      save_seconds: from the call of `save` to the end of its writing, of the slowest so far.
    """

    def __init__(
        self, model_dir: str, config: Mapping[str, Any], keep: int, model: model_lib.Model, optimizer: Any,
        state: Mapping[str, Any], strategy: tf.distribute.Strategy | None = None, keep_every_hours: float = 0.0,
        on_failure: str = "stop",
    ) -> None:  # fmt: skip
        self._strategy = strategy or tf.distribute.get_strategy()
        self._step = optimizer.iterations
        slots = {v.path.replace("/", "."): v for v in optimizer.variables if v is not self._step}
        remembered = {WEIGHTS: model.named_weights(), "optimizer": slots, **state, "step": self._step}
        self._config, self._config_to_write = SavedConfig(config), SavedConfig(config)
        self._live = tf.train.Checkpoint(**remembered, config=self._config)
        self._copy = StateCopy(remembered, compiled=strategy_lib.has_several_workers(self._strategy))
        self._folder, self._keep, self._keep_every_hours = model_dir, keep, keep_every_hours
        self._chief = strategy_lib.is_chief(self._strategy)
        self._on_failure = on_failure
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._being_written: list[Writing] = []
        self._failures: list[BaseException] = []  # of what was written since the last save began
        self._copied_step: int | None = None
        self._newest: int | None = None
        self._best: int | None = None
        self._is_tidy = False
        self.save_seconds = 0.0

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint that was restored or saved, also while it is being written; None: none."""
        steps = [writing.step for writing in self._being_written if not writing.is_best]
        return steps[-1] if steps else self._newest

    @property
    def best(self) -> int | None:
        """The step of the checkpoint in the folder `best`, also while it is being written; None where there is none.

        A checkpoint there that is newer than the one that the run goes on from does not count: the run does its step
        again.
        """
        steps = [writing.step for writing in self._being_written if writing.is_best]
        return steps[-1] if steps else self._best

    @property
    def progress(self) -> dict[str, Any]:
        """What the run remembers besides variables, by name, as JSON can say it: restored, and saved as it is then."""
        return self._config.progress

    @progress.setter
    def progress(self, progress: Mapping[str, Any]) -> None:
        self._config.progress = dict(progress)

    def newest_written(self) -> int | None:
        """The step of the newest checkpoint that is whole; None where there is none. Waits for the one being written.

        Unlike other calls, a worker may make this one alone.
        """
        self._wait()
        if self._chief:
            return self._newest
        # The chief may have been killed while it wrote.
        return max(map(step_of, run_folder.checkpoints(self._folder)), default=None)

    def resume(self, prefix: str) -> None:
        """Restores the checkpoint `prefix`, as from `checkpoint.newest_that_reads`.

        Raises:
          UserError: where it is of another network.
        """
        self.settle()
        try:
            self._live.read(prefix).assert_existing_objects_matched()
        except (*UNREADABLE, AssertionError) as error:
            why = reason(error)[:200]
            raise UserError(f"--model_dir={self._folder}: cannot go on from {prefix}: {why}") from error
        self._newest = int(np.asarray(self._step))
        kept = run_folder.checkpoints(os.path.join(self._folder, run_folder.BEST_FOLDER))
        self._best = max((step_of(best) for best in kept if step_of(best) <= self._newest), default=None)
        self._copied_step, self._is_tidy = None, False

    def save(self) -> str:
        """Begins to write a checkpoint of the current step, unless that is saved already. Returns its prefix.

        Raises:
          FloatingPointError: where a number of the state is not finite; nothing is written then.
          UserError: where the checkpoint before could not be written, and `on_failure` is `stop`.
        """
        began = time.monotonic()
        if self.newest != int(np.asarray(self._step)):
            self._begin(self._copied(), False, began)
        return os.path.join(self._folder, f"ckpt-{self.newest}")

    def save_best(self) -> str:
        """Begins to write a checkpoint of the current step into the folder `best`, in place of the one there.

        `resume` never reads it, and it does not count as the newest.

        Raises:
          FloatingPointError, UserError: as `save`.

        Returns:
          Its prefix.
        """
        self._begin(self._copied(), True, time.monotonic())
        return os.path.join(self._folder, run_folder.BEST_FOLDER, f"ckpt-{self.best}")

    def settle(self) -> None:
        """Waits until what was saved last is written. `newest` and `best` are then true, and the same on every worker.

        Raises:
          UserError: where it could not be written, and `on_failure` is `stop`.
        """
        self._wait()
        self._hear_of_failures(stops=self._on_failure == "stop")

    def finish(self) -> None:
        """Waits until what was saved last is written.

        Raises:
          UserError: where it could not be written, whatever `on_failure` says.
        """
        self._wait()
        self._hear_of_failures(stops=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """As `finish`. Where something else has gone wrong, a failure is logged, and does not hide it."""
        if error is None:
            self.finish()
            return
        self._wait()
        if self._on_failure == "stop":  # Otherwise it was said when it happened.
            for failure in self._failures:
                logging.error("%s", failure)

    def set_aside_newest(self) -> None:
        """Takes the newest checkpoint out of the run, since its weights do not give a finite loss.

        Its files stay, with `.diverged` behind their names. `newest` is then the one before, or None.

        Raises:
          UserError: where the folder cannot be written.
        """
        self._wait()
        there = run_folder.checkpoints(self._folder)
        bad = [prefix for prefix in there if step_of(prefix) == self._newest]
        good = [prefix for prefix in there if self._newest is not None and step_of(prefix) < self._newest]
        self._newest = step_of(good[0]) if good else None
        if not self._chief:
            return
        with run_folder.writing(f"--model_dir={self._folder}"):
            for prefix in bad:
                logging.warning("%s gives a loss that is not finite: it is now called %s.*.diverged", prefix, prefix)
                _rename(prefix, "diverged")
            _write_list(self._folder, good)

    def _copied(self) -> int:
        """Copies the state where the copy is of another step. Returns the step.

        The copy of this very step may be there, and even be in the writer's hands, since the best checkpoint and the
        newest are often saved at one step.
        """
        step = int(np.asarray(self._step))
        if self._copied_step == step:
            return step
        self.settle()
        self._copied_step = None
        bad = self._copy.take()
        if bad:
            raise FloatingPointError(f"{bad} holds numbers that are not finite")
        self._copied_step = step
        return step

    def _begin(self, step: int, is_best: bool, began: float) -> None:
        """Hands the copy, which is of `step`, to the writer."""
        done = None
        if self._chief:
            done = self._writer.submit(self._write, step, is_best, copy.deepcopy(self.progress), began)
        self._being_written.append(Writing(step, is_best, done))

    def _wait(self) -> None:
        """Waits for the writer, and takes what it has written, or its failures, into account."""
        failures = []
        for writing in self._being_written:
            failure = writing.done.exception() if writing.done else None
            if failure:
                failures.append(failure)
            elif writing.is_best:
                self._best = writing.step
            else:
                self._newest = writing.step
        self._being_written = []
        self._failures += failures

    def _hear_of_failures(self, stops: bool) -> None:
        """Makes every worker know what the chief has written; with `stops`, a failure stops all of them.

        Raises:
          UserError: with `stops`, where a checkpoint could not be written.
        """
        failures, self._failures = self._failures, []
        mine = [-1 if self._newest is None else self._newest, -1 if self._best is None else self._best, len(failures)]
        newest, best, failed = strategy_lib.as_chief_says(self._strategy, mine)
        self._newest, self._best = None if newest < 0 else newest, None if best < 0 else best
        for failure in failures:
            if stops or not isinstance(failure, UserError):
                raise failure
        if stops and failed:
            raise UserError("the chief could not write a checkpoint and has stopped: see its message")

    # What the writer's thread does

    def _write(self, step: int, is_best: bool, progress: dict[str, Any], began: float) -> None:
        """Writes the copy of the state as the checkpoint of `step`, and removes those that it replaces.

        Raises:
          UserError: where the folder cannot be written. The checkpoints before stay.
        """
        goes_on = self._on_failure == "warn"
        what = f"the {'best checkpoint, of' if is_best else 'checkpoint of'} step {step} in --model_dir={self._folder}"
        make_room = "make room" if goes_on else run_folder.MAKE_ROOM
        self._config_to_write.progress = progress
        try:
            with run_folder.writing(what, make_room):
                if not self._is_tidy:
                    self._tidy()
                    self._is_tidy = True
                if is_best:
                    folder = os.path.join(self._folder, run_folder.BEST_FOLDER)
                    self._write_whole(os.path.join(folder, f"ckpt-{step}"))
                    _remove_all_but({step}, folder)
                else:
                    self._write_whole(os.path.join(self._folder, f"ckpt-{step}"))
                    self._keep_the_newest()
        except UserError as failure:
            if goes_on:
                logging.warning("%s. The run goes on without it and tries again at the next save", failure)
            raise
        if not is_best:
            self.save_seconds = max(self.save_seconds, time.monotonic() - began)

    def _write_whole(self, prefix: str) -> None:
        """Writes the copy of the state to `prefix`, whole or not at all."""
        folder, name = os.path.split(prefix)
        tf.io.gfile.makedirs(folder)
        _remove_unfinished(folder)
        unfinished = prefix + UNFINISHED
        tf.io.gfile.makedirs(unfinished)
        try:
            content = tf.train.Checkpoint(**self._copy.variables, config=self._config_to_write)
            staged = os.path.join(unfinished, name)
            content.write(staged)
            checksums.write(staged)
            files = sorted(run_folder.files_of(staged), key=_is_index)
            for file in files:
                run_folder.bring_to_disk(file)
            _remove(prefix)  # One of this step that does not count: it was made before the run went back.
            for file in files:
                tf.io.gfile.rename(file, os.path.join(folder, os.path.basename(file)), overwrite=True)
            run_folder.bring_to_disk(folder)
        finally:
            with contextlib.suppress(OSError, tf.errors.OpError):  # What went wrong before it says more.
                _remove_unfinished(folder)

    def _tidy(self) -> None:
        """Makes the folder hold what this run goes on from, before it saves for the first time.

        Checkpoints that were skipped as damaged would count as the newest if they could be read again one day, so
        their names get `.skipped`. What a stopped save left is removed, and what is in the folder `best` and does not
        count.
        """
        best = os.path.join(self._folder, run_folder.BEST_FOLDER)
        _remove_unfinished(self._folder)
        _remove_unfinished(best)
        _remove_all_but(set() if self._best is None else {self._best}, best)
        for prefix in run_folder.checkpoints(self._folder):
            if self._newest is None or step_of(prefix) > self._newest:
                _rename(prefix, "skipped")
        _write_list(self._folder, run_folder.checkpoints(self._folder))

    def _keep_the_newest(self) -> None:
        """Lists the checkpoints that stay, and removes the others."""
        there = run_folder.checkpoints(self._folder)
        times = {step_of(prefix): written for prefix, written in _times(self._folder, there).items()}
        staying = steps_to_keep(times, self._keep, self._keep_every_hours)
        _write_list(self._folder, [prefix for prefix in there if step_of(prefix) in staying])
        _remove_all_but(staying, self._folder)


def steps_to_keep(times: Mapping[int, float], newest: int, every_hours: float) -> set[int]:
    """The steps of the checkpoints that stay.

    Args:
      times: when the checkpoint of each step was written, in seconds.
      newest: so many of the newest stay.
      every_hours: of those before them, the oldest stays, and each that is so many hours younger than the last one that
        stays; 0: none of them.

    Example:
      steps_to_keep({10: 0.0, 20: 1800.0, 30: 3600.0, 40: 5400.0}, newest=1, every_hours=1.0) == {10, 30, 40}
    """
    steps = sorted(times)
    staying = set(steps[-newest:])
    if every_hours:
        last = -math.inf
        for step in steps[:-newest]:
            if times[step] - last >= 3600 * every_hours:
                staying.add(step)
                last = times[step]
    return staying


def _times(folder: str, prefixes: Sequence[str]) -> dict[str, float]:
    """When each checkpoint in `folder` was written: as TensorFlow's list says, otherwise as its file says.

    The list comes first because a folder that is copied keeps it, and the times of its files are those of the copy.
    """
    try:
        listed = tf.train.get_checkpoint_state(folder)
    except UNREADABLE:  # The list is damaged.
        listed = None
    known = {}
    if listed:
        known = {
            os.path.basename(path): written
            for path, written in zip(
                listed.all_model_checkpoint_paths, listed.all_model_checkpoint_timestamps, strict=False
            )
        }
    times = {}
    for prefix in prefixes:
        name = os.path.basename(prefix)
        times[prefix] = known[name] if name in known else tf.io.gfile.stat(f"{prefix}.index").mtime_nsec / 1e9
    return times


def _write_list(folder: str, prefixes: Sequence[str]) -> None:
    """Writes TensorFlow's list of the checkpoints: `prefixes`, the newest first. Without any there is no list."""
    path = os.path.join(folder, run_folder.STATE_FILE)
    if not prefixes:
        if tf.io.gfile.exists(path):
            tf.io.gfile.remove(path)
        return
    times = _times(folder, prefixes)
    lines = [f'model_checkpoint_path: "{os.path.basename(prefixes[0])}"']
    for prefix in reversed(prefixes):
        lines.append(f'all_model_checkpoint_paths: "{os.path.basename(prefix)}"')
        lines.append(f"all_model_checkpoint_timestamps: {times[prefix]}")
    # Older versions of this program leave the removing to TensorFlow, which keeps what is not newer than this.
    lines.append("last_preserved_timestamp: 0.0")
    run_folder.write_text(path, "\n".join(lines) + "\n")


def _remove_unfinished(folder: str) -> None:
    """Removes what a stopped save left in `folder`: its own folder, and files that had moved to their place already."""
    if not tf.io.gfile.isdir(folder):
        return
    for name in tf.io.gfile.listdir(folder):
        name = name.rstrip("/")
        if name.startswith("ckpt-") and name.endswith(UNFINISHED):
            prefix = os.path.join(folder, name.removesuffix(UNFINISHED))
            if not tf.io.gfile.exists(f"{prefix}.index"):
                _remove(prefix)
            tf.io.gfile.rmtree(os.path.join(folder, name))


def _remove_all_but(steps: set[int], folder: str) -> None:
    """Removes the checkpoints in `folder` of other steps than `steps`."""
    for prefix in run_folder.checkpoints(folder):
        if step_of(prefix) not in steps:
            _remove(prefix)


def _remove(prefix: str) -> None:
    """Removes the files of a checkpoint. The index goes last: stopped before it, the next removal ends the work."""
    for file in sorted(_own_files(prefix), key=_is_index):
        tf.io.gfile.remove(file)


def _rename(prefix: str, suffix: str) -> None:
    """Puts a suffix behind the names of a checkpoint's files, so that they count no longer."""
    for file in sorted(_own_files(prefix), key=_is_index, reverse=True):
        tf.io.gfile.rename(file, f"{file}.{suffix}", overwrite=True)


def _own_files(prefix: str) -> list[str]:
    """The files of a checkpoint, without those that were set aside."""
    return [file for file in run_folder.files_of(prefix) if not file.endswith((".skipped", ".diverged"))]


def _is_index(file: str) -> bool:
    return file.endswith(".index")
