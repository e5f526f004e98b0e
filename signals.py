"""SIGTERM and SIGINT: a command that they stop ends with the status `AGAIN`, which means: give the same command again.

The first signal raises `KeyboardInterrupt` in the main thread. While signals are deferred it does not: who defers them
asks `LISTENER.first` now and then, and stops in order. A second signal ends the process at once, also where its main
thread waits for a long operation of TensorFlow, in which Python runs no handler.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

AGAIN = 75  # EX_TEMPFAIL of sysexits.h. No other end of this program has it, nor a process that a signal killed.
# Two signals within so many seconds are one request: a terminal or a queue may send it to a whole group of processes,
# and a script in that group may pass it on.
SAME_REQUEST_SECONDS = 1.0


class Listener:
    """Listens to the signals of this process.

    Attributes:
      first: the name of the first signal, such as `SIGTERM`; empty before it.
      deferred: whether a first signal is only noted.
    """

    def __init__(self) -> None:
        self.first = ""
        self.deferred = False
        self._came = 0.0
        self._raised = False
        self._listens = False

    def install(self) -> None:
        """Begins to listen. For the main thread. A signal that was ignored stays ignored.

        Call it again after TensorFlow has joined a cluster: its coordination service then takes SIGTERM for itself.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._in_main_thread)
        if not self._listens:
            self._listens = True
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()

    def install_again(self) -> None:
        """Does what `install` does, where it was called before."""
        if self._listens:
            self.install()

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if not self.deferred and not self._raised:
            self._raised = True
            raise KeyboardInterrupt(f"by {self.first}")

    def _listen(self, reading: int) -> None:
        """Notes each signal when it comes, whatever the main thread is doing."""
        while True:
            for number in os.read(reading, 16):
                self._note(number)

    def _note(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.first:
            self._came = now
            self.first = name
            if self.deferred:
                _say(f"{name}: stops after this step and saves; a second signal stops at once, without saving")
        elif now - self._came >= SAME_REQUEST_SECONDS:
            _say(f"stopped at once by {name}, the second signal: the same command goes on from the last checkpoint")
            os._exit(AGAIN)


def _say(text: str) -> None:
    """Writes a line on stderr. Unlike print, it may interrupt another writer of this process."""
    os.write(2, f"run.py: {text}\n".encode())


LISTENER = Listener()
