"""Why a run stops before its last step: a signal, the time limit, or a cloud that takes the machine back.

All workers stop after the same step, whichever of them has the reason.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

import tensorflow as tf
from tensorflow.python.distribute.failure_handling import failure_handling_util

import strategy as strategy_lib
from signals import LISTENER

# Several workers ask each other about so often, which takes them a few milliseconds.
MEETING_SECONDS = 5.0
MOST_STEPS_BETWEEN_MEETINGS = 100
# How fast a checkpoint is written until one has been: what a slow network disk takes.
ASSUMED_BYTES_PER_SECOND = 50e6
NOTICE_SECONDS = 5.0  # Google Compute Engine gives notice 30 seconds before it stops a machine.
PRODUCT_NAME = "/sys/class/dmi/id/product_name"


class Watch:
    """Watches for a reason to stop, while it is entered.

    Until `reason` is asked for the first time a signal stops the program at once, as nothing is lost by that. From then
    on signals are deferred.

    Args:
      strategy: of the workers, who ask together.
      max_minutes: how long the process may take, saving included; 0: as long as it takes.
      started: when the process began, by `time.monotonic`.
      state_bytes: how much a checkpoint holds.

    Example:
      with Watch(strategy, 60.0, started, 10**8) as watch:
          for step in range(1, steps + 1):
              ...
              if watch.reason(step):
                  break
    """

    def __init__(self, strategy: tf.distribute.Strategy, max_minutes: float, started: float, state_bytes: int) -> None:
        self._strategy, self._alone = strategy, not strategy_lib.has_several_workers(strategy)
        self._limit = f"--max_minutes={max_minutes:g}"
        self._ends = started + 60.0 * max_minutes if max_minutes else float("inf")
        self._save_seconds = state_bytes / ASSUMED_BYTES_PER_SECOND
        self._asked_at: tuple[int, float] | None = None
        self._asks_at_step = 0
        self._notice = threading.Event()
        self._left = threading.Event()

    def __enter__(self) -> Watch:
        if runs_on_compute_engine():
            threading.Thread(target=self._watch_for_notice, name="preemption notice", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        LISTENER.deferred = False
        self._left.set()

    def saved(self, seconds: float) -> None:
        """Takes into account how many seconds the slowest checkpoint so far took."""
        self._save_seconds = seconds

    def back_to(self, step: int) -> None:
        """The run has gone back to `step`: the workers ask each other after the next one."""
        self._asks_at_step = step

    def reason(self, step: int, now: bool = False) -> str:
        """Why to stop after `step` steps, such as `SIGTERM`; an empty string where there is no reason.

        Every worker must ask after every step, and gets the same answer. They ask each other only now and then, so
        that an answer may come some seconds after the reason.

        Args:
          step: how many steps are done.
          now: the workers ask each other, however long ago they did.
        """
        LISTENER.deferred = True
        if step < self._asks_at_step and not now:
            return ""
        seconds_each, measured = self._seconds_of_a_step(step)
        ahead = 1
        if not self._alone:
            # An accelerator takes some steps before it does them, so that they seem short. More are measured better.
            most = min(2 * measured, MOST_STEPS_BETWEEN_MEETINGS)
            ahead = max(1, min(int(MEETING_SECONDS / seconds_each), most))
        reasons = ("", "SIGINT", "SIGTERM", self._limit, "the notice that this machine is taken back")
        own = self._own_reason(ahead * seconds_each)
        (most,) = strategy_lib.largest(self._strategy, [reasons.index(own)])
        (ahead,) = strategy_lib.as_chief_says(self._strategy, [ahead])
        self._asks_at_step = step + ahead
        return reasons[most]

    def _seconds_of_a_step(self, step: int) -> tuple[float, int]:
        """The mean of the steps since this was last asked, and how many these are. At first it is long."""
        before, self._asked_at = self._asked_at, (step, time.monotonic())
        if before is None or step <= before[0]:
            return MEETING_SECONDS, 0
        steps = step - before[0]
        return max((self._asked_at[1] - before[1]) / steps, 1e-6), steps

    def _own_reason(self, seconds_until_asked_again: float) -> str:
        if LISTENER.first:
            return LISTENER.first
        if self._notice.is_set():
            return "the notice that this machine is taken back"
        # Steps and checkpoints may take half as long again as those so far.
        reserve = 1.5 * (seconds_until_asked_again + self._save_seconds)
        return self._limit if time.monotonic() + reserve >= self._ends else ""

    def _watch_for_notice(self) -> None:
        while not self._left.wait(NOTICE_SECONDS):
            if gives_notice():
                self._notice.set()
                return


def runs_on_compute_engine() -> bool:
    """Whether this machine is one of Google Compute Engine, by its firmware. Asks no network."""
    if os.environ.get("GCE_METADATA_IP"):  # where TensorFlow looks for the metadata server
        return True
    try:
        with open(PRODUCT_NAME) as file:
            return file.read().strip() == "Google Compute Engine"
    except OSError:
        return False


def gives_notice() -> bool:
    """Whether Google Compute Engine has said that it takes this machine back, as it does with spot machines.

    An event of maintenance does not count: its notice comes up to an hour earlier, and SIGTERM follows at the end.
    """
    try:
        return failure_handling_util.request_compute_metadata("instance/preempted").strip() == "TRUE"
    except OSError:
        return False
