"""The scalars of a training run as TensorBoard shows them: each step once, whatever stopped the run in between.

A process that is killed leaves scalars of steps that come after its last checkpoint. The run that goes on does these
steps again, and says so in its file of events: TensorBoard then drops what it has read of them. tf.summary's writers
cannot say it.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping

import tensorflow as tf
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.record_writer import RecordWriter

import run_folder

_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")  # The number is about the time, in seconds.


class Curve:
    """Writes the scalars of one process of a run into a file of its own.

    Args:
      folder: where TensorBoard finds them.
      writes: whether anything is written: only the chief of several workers writes.

    Raises:
      UserError: where the file cannot be written, here and in every method.
    """

    def __init__(self, folder: str, writes: bool = True) -> None:
        self._folder = folder
        self._records: RecordWriter | None = None
        if not writes:
            return
        with run_folder.writing(folder):
            tf.io.gfile.makedirs(folder)
            name = f"events.out.tfevents.{_number(folder):010d}.{socket.gethostname()}.{os.getpid()}"
            self._records = RecordWriter(tf.io.gfile.GFile(os.path.join(folder, name), "wb"))
            self._add(event_pb2.Event(file_version="brain.Event:2"))

    def __enter__(self) -> Curve:
        return self

    def __exit__(self, *error: object) -> None:
        if self._records:
            with run_folder.writing(self._folder):
                self._records.close()

    def begin(self, step: int | None) -> None:
        """Says that what follows comes after `step` steps: nothing else counts of the later ones. None: nothing at all.

        TensorBoard takes the first beginning in a folder for that of the run and drops nothing for it. In the folder of
        an older version of this program none is written yet, so there are two of them.
        """
        first = 0 if step is None else step + 1
        for _ in range(2):
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(event_pb2.Event(step=first, session_log=start))
        self._flush()

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Writes the scalars of a step under `prefix`. When it returns they are in the file, and outlive the process.

        Example:
          curve.write(10, {"loss": 0.5}, "train")
        """
        summary = summary_pb2.Summary()
        for name, value in values.items():
            summary.MergeFrom(scalar_pb(f"{prefix}/{name}", value))
        self._add(event_pb2.Event(step=step, summary=summary))
        self._flush()

    def _add(self, event: event_pb2.Event) -> None:
        if self._records:
            event.wall_time = time.time()
            with run_folder.writing("the TensorBoard scalars"):
                self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        if self._records:
            with run_folder.writing("the TensorBoard scalars"):
                self._records.flush()


def _number(folder: str) -> int:
    """The number in the name of a new file: the time, or more where a clock was ahead when an older file was made.

    TensorBoard reads the files by their names.
    """
    found = [_FILE.fullmatch(name) for name in tf.io.gfile.listdir(folder)]
    return max([int(time.time()), *(int(match[1]) + 1 for match in found if match)])
