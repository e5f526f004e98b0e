"""What a person sees on the terminal: lines, durations, the progress of a loop."""

from __future__ import annotations

import sys
import time
from types import TracebackType

LINE_SECONDS = 30.0  # Seconds between two lines in a log.


class Progress:
    """How far a loop is: a bar on a terminal; elsewhere, in the log of a batch job, a plain line every half minute.

    Args:
      what: what is done, such as `pretrain`.
      unit: of what, such as `step`.
      total: how many there are; None where that is not known.
      done: how many were done before.
      keep: whether the bar stays after the loop, and a log also gets a line for the first and the last.

    Example:
      with Progress("pretrain", "step", total=100) as progress:
          for step in range(100):
              ...
              progress.advance()
              if progress.due:
                  progress.show(f"loss {loss:.3f}")
    """

    def __init__(self, what: str, unit: str, total: int | None, done: int = 0, keep: bool = True) -> None:
        from tqdm import tqdm

        self._what, self._unit, self._total, self._done = what, unit, total, done
        self._keep = keep
        self._bar = tqdm(
            total=total, initial=done, desc=what, unit=unit, disable=not sys.stderr.isatty(), smoothing=0.05, leave=keep
        )
        self._calls, self._timed_done = 0, done
        self._said = self._timed_from = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        self._bar.update(count)
        self._calls += 1
        if self._calls == 1:  # The first takes longer: a graph is traced for it.
            self._timed_from, self._timed_done = time.monotonic(), self._done

    def back_to(self, done: int) -> None:
        """Only `done` are done, since the loop has gone back."""
        self._bar.update(done - self._done)
        self._done = done
        self._timed_from, self._timed_done = time.monotonic(), done

    @property
    def due(self) -> bool:
        """Whether a plain line should be written now: for the first and the last one, and after half a minute."""
        waited = time.monotonic() - self._said >= LINE_SECONDS
        at_an_end = self._calls == 1 or self._done == self._total
        return self.in_log and (waited or (at_an_end and self._keep))

    def show(self, text: str) -> None:
        """Shows `text` beside the bar or, where a line is due, writes it with the count and the time left."""
        self._bar.set_postfix_str(text, refresh=False)
        if self.due:
            self._said = time.monotonic()
            count = f"{self._unit} {self._done:,}" + (f" of {self._total:,}" if self._total else "")
            parts = [part for part in (count, text, self._time_left()) if part]
            print(f"{self._what}: {', '.join(parts)}", file=sys.stderr, flush=True)

    @property
    def in_log(self) -> bool:
        """Whether there is no bar, but plain lines in a log."""
        return self._bar.disable

    def say(self, text: str) -> None:
        """Writes a line, above the bar where there is one."""
        self._bar.write(f"{self._what}: {text}", file=sys.stderr)
        sys.stderr.flush()

    def _time_left(self) -> str:
        timed = self._done - self._timed_done
        if self._total in (None, self._done) or timed < 1:
            return ""
        seconds_each = (time.monotonic() - self._timed_from) / timed
        return f"{duration(seconds_each * (self._total - self._done))} left"


def say(line: str) -> None:
    """Writes a line on the terminal at once, also where the output goes into a file."""
    print(line, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: `40 s`, `12 min`, `3 h 5 min`, `6 days`.

    Example:
      duration(11_100) == "3 h 5 min"
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / (24 * 60):.0f} days"
