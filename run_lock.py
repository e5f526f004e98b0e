"""Who may write into the folder of a run: one training command at a time.

The lock is `flock` on the file `run.lock` in the folder. The operating system gives it back when the process ends, in
whatever way, so that the file itself may stay. On a file system that several hosts share, it holds between them as far
as that file system takes part: NFS does, Lustre where it is mounted with `-o flock`. Where a file cannot be locked,
that is said. Folders such as gs://bucket/run are never locked, since such places know no locks.

Evaluations, predictions and exports take no lock: they may run beside the training, and write files of their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from types import TracebackType
from typing import Self

from absl import logging

import run_folder
from errors import UserError, reason

FILE = "run.lock"


class RunLock:
    """The right of this process to write into a run's folder, until the end of the context.

        with RunLock(model_dir) as lock:
            lock.take_if_there()  # writes nothing, and refuses a folder in which a run is at work
            ...                   # look for mistakes
            lock.take()           # makes the folder
            ...                   # write

    Args:
      model_dir: the folder. It need not be there.
      locks: whether there is anything to do: not in a worker that writes nothing.
    """

    def __init__(self, model_dir: str, locks: bool = True) -> None:
        self._folder = model_dir
        self._path = os.path.join(model_dir, FILE)
        self._locks = locks and not run_folder.is_remote(model_dir)
        self._file: int | None = None  # its descriptor
        self._is_held = False
        self._is_named = False  # The file names this process.
        self._seen: list[str] = []  # the checkpoints that were there before the run was prepared

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Gives the lock back. The file stays, empty: if it were removed, two could hold a lock of that name."""
        if self._file is None:
            return
        if self._is_named:
            with contextlib.suppress(OSError):  # The disk has failed, which the error that ends the run says.
                os.ftruncate(self._file, 0)
        os.close(self._file)
        self._file, self._is_held, self._is_named = None, False, False

    def take_if_there(self) -> None:
        """Takes the lock where a run has left its file, since another process may hold it. Writes nothing.

        Raises:
          UserError: where another process holds it.
        """
        if not self._locks:
            return
        self._seen = self._checkpoints()
        try:
            self._file = os.open(self._path, os.O_RDWR)
        except OSError:  # It is not there, or may not be written, which `take` says where it matters.
            return
        self._lock(self._file)

    def take(self) -> None:
        """Takes the lock, if that is yet to do. Makes the folder and the file, and names this process in it.

        Raises:
          UserError: where another process holds it, or has written checkpoints since `take_if_there`; where the file
            cannot be written.
        """
        if not self._locks:
            return
        try:
            if self._file is None:
                os.makedirs(self._folder, exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._lock(self._file)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, _named_process().encode(), 0)
            self._is_named = True
        except OSError as error:
            raise UserError(f"--model_dir={self._folder} cannot be written: {reason(error)}") from error
        if self._checkpoints() != self._seen:
            raise UserError(
                f"--model_dir={self._folder}: another run has written checkpoints there while this one was preparing: "
                f"give the same command again"
            )

    def _lock(self, file: int) -> None:
        if self._is_held:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--model_dir={self._folder}: another run is writing there, {_holder(file)}: wait for its end, or "
                f"choose another --model_dir"
            ) from None
        except OSError as error:
            logging.warning(
                "%s cannot be locked (%s): nothing keeps a second run out of that folder", self._path, error.strerror
            )
        self._is_held = True

    def _checkpoints(self) -> list[str]:
        return run_folder.checkpoints(self._folder) if os.path.isdir(self._folder) else []


def _named_process() -> str:
    """What the file of a lock says about this process."""
    return json.dumps({"host": socket.gethostname(), "process": os.getpid()}) + "\n"


def _holder(file: int) -> str:
    """Which process the file of a lock names, in words."""
    try:
        named = json.loads(os.pread(file, 4096, 0))
        return f"process {int(named['process'])} on host {named['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "a process that has just begun"
