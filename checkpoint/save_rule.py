"""When a run saves: every so many steps, after so many minutes, and at its end."""

from __future__ import annotations

import time

import tensorflow as tf

import strategy as strategy_lib


class SaveRule:
    """Says after which steps a run saves. Each worker asks after each step, and all get the same answer.

    Args:
      every_steps: a step is due that so many divide.
      every_minutes: a step is due when so much time has passed since the last one that was due, or since this rule was
        made; 0: the clock does not count. Where there are several workers, the chief's clock decides.
      last_step: of the run; it is due.
      strategy: of the run.
    """

    def __init__(
        self, every_steps: int, every_minutes: float, last_step: int, strategy: tf.distribute.Strategy
    ) -> None:
        self._every_steps, self._seconds, self._last_step = every_steps, 60 * every_minutes, last_step
        self._strategy = strategy
        self._last_time = time.monotonic()  # when a step was due the last time
        self._next_look = 0  # the step after which the workers look at the clock again
        self._last_look: tuple[int, float] | None = None  # the step after which they did, and when

    def due(self, step: int) -> bool:
        """Whether the run saves after `step` steps."""
        is_due = self.is_due_by_number(step)
        if self._seconds and step >= self._next_look:
            is_due |= self._is_time(step)
        if is_due:
            self._last_time = time.monotonic()
        return is_due

    def is_due_by_number(self, step: int) -> bool:
        """Whether the run saves after `step` steps whatever the clock says."""
        return step % self._every_steps == 0 or step == self._last_step

    def _is_time(self, step: int) -> bool:
        """Looks at the chief's clock, and decides when to look again.

        Where the workers are several processes, each look makes them wait for each other. So they look again when half
        of the time that is left will have passed, at the speed of the steps since the look before.
        """
        now = time.monotonic()
        left = self._last_time + self._seconds - now
        next_look = step + 1
        if strategy_lib.has_several_workers(self._strategy) and self._last_look and left > 0:
            last_step, last_time = self._last_look
            seconds_a_step = max((now - last_time) / max(step - last_step, 1), 1e-6)
            next_look = step + max(1, int(left / 2 / seconds_a_step))
        is_time, self._next_look = strategy_lib.as_chief_says(self._strategy, [int(left <= 0), next_look])
        self._last_look = (step, now)
        return bool(is_time)
