"""The scalars of a training run as TensorBoard shows them: each step once, whatever stopped the run in between.

A process that is killed leaves scalars of steps that come after its last checkpoint. The run that goes on does these
steps again. It takes them out of the files first, and says in its own file where it begins, so that a TensorBoard that
is open, and has read them, drops them too. tf.summary's writers can do neither.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping

import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

import run_folder

# TensorBoard reads the files by their names. The number is about the time at which one was begun, in seconds.
_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


class Curve:
    """Writes the scalars of a run, each beginning of it into a file of its own.

    Args:
      folder: where TensorBoard finds them.
      writes: whether anything is written: of several workers only the chief writes.

    Raises:
      UserError: from every method, where a file cannot be read or written.

    Example:
      with Curve("runs/digits_pretrain/train") as scalars:
          scalars.begin(None)
          scalars.write(10, {"loss": 0.5}, "train")
    """

    def __init__(self, folder: str, writes: bool = True) -> None:
        self._folder, self._writes = folder, writes
        self._records: tf.io.TFRecordWriter | None = None
        self._path = ""  # of the file that is being written

    def __enter__(self) -> Curve:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def begin(self, step: int | None) -> None:
        """Says that what follows comes after `step` steps; what was written of later ones is gone. None: all of it."""
        first = 0 if step is None else step + 1
        if not self._writes:
            return
        self._close()
        with run_folder.writing("the TensorBoard scalars"):
            tf.io.gfile.makedirs(self._folder)
            names = [name for name in sorted(tf.io.gfile.listdir(self._folder)) if _FILE.fullmatch(name)]
            for name in names:
                self._drop(name, first)
            # A clock may have been ahead when an older file was begun.
            number = max([int(time.time()), *(int(name.split(".")[3]) + 1 for name in names)])
            name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
            self._path = os.path.join(self._folder, name)
            self._records = tf.io.TFRecordWriter(self._path)
        self._add(event_pb2.Event(file_version="brain.Event:2"))
        # TensorBoard takes the first start that it sees for that of the run, and drops nothing for it. In the files of
        # an older version of this program there is none, so there are always two.
        for _ in range(2):
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(event_pb2.Event(step=first, session_log=start))
        self._flush()

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Writes the scalars of a step under `prefix`. They are in the file then, and outlive the process."""
        summary = summary_pb2.Summary()
        for name, value in values.items():
            summary.MergeFrom(scalar_pb(f"{prefix}/{name}", value))
        self._add(event_pb2.Event(step=step, summary=summary))
        self._flush()

    def bring_to_disk(self) -> None:
        """Makes what was written outlive a failure of power or of the disk too, as the checkpoint of its step does."""
        if self._records:
            with run_folder.writing("the TensorBoard scalars"):
                run_folder.bring_to_disk(self._path)
                run_folder.bring_to_disk(self._folder)

    def _drop(self, name: str, first: int) -> None:
        """Takes the scalars of the steps from `first` on out of a file, at once or not at all."""
        path, unfinished = os.path.join(self._folder, name), os.path.join(self._folder, "unfinished.tmp")
        records = list(RawEventFileLoader(path).Load())  # as far as a killed process has written whole ones
        kept = [record for record in records if not _is_later(record, first)]
        if len(kept) < len(records):
            with tf.io.TFRecordWriter(unfinished) as writer:
                for record in kept:
                    writer.write(record)
            run_folder.bring_to_disk(unfinished)
            tf.io.gfile.rename(unfinished, path, overwrite=True)

    def _add(self, event: event_pb2.Event) -> None:
        if self._records:
            event.wall_time = time.time()
            with run_folder.writing("the TensorBoard scalars"):
                self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        if self._records:
            with run_folder.writing("the TensorBoard scalars"):
                self._records.flush()

    def _close(self) -> None:
        records, self._records = self._records, None
        if records:
            with run_folder.writing("the TensorBoard scalars"):
                records.close()


def _is_later(record: bytes, first: int) -> bool:
    """Whether a record holds scalars of step `first` or of a later one."""
    event = event_pb2.Event.FromString(record)
    return event.HasField("summary") and event.step >= first
