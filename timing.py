"""Where the time of a run goes: how long it waits for data, steps, saves, writes and evaluates; a profile of steps."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import tensorflow as tf

import console
import run_folder

# What time is spent on. Whatever is measured as nothing else is part of the step.
KINDS = ("data", "step", "checkpoint", "summaries", "evaluation")
_IN_WORDS = {
    "data": "waiting for data",
    "step": "steps",
    "checkpoint": "checkpoints",
    "summaries": "summaries",
    "evaluation": "evaluation",
}
# Training waits for data where this share of its time is spent so, over at least so many seconds and steps.
WAITS_SHARE = 0.1
WAITS_SECONDS = 20.0
WAITS_STEPS = 20
SHORTEST_SHOWN = 0.05  # A smaller share of waiting is not worth a word in each line.


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A part of a run.

    Attributes:
      seconds: how long it took, by `KINDS`; what is not there took no time.
      steps: how many steps were taken.
    """

    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    steps: int = 0

    def __add__(self, other: Stretch) -> Stretch:
        seconds = {kind: self.seconds.get(kind, 0.0) + other.seconds.get(kind, 0.0) for kind in KINDS}
        return Stretch(seconds, self.steps + other.steps)

    @property
    def total(self) -> float:
        """How many seconds it took."""
        return sum(self.seconds.values())

    def share(self, kind: str) -> float:
        """The share of its time that was spent on `kind`."""
        return self.seconds.get(kind, 0.0) / max(self.total, 1e-9)

    def images_per_second(self, batch: int) -> float:
        """The speed with so many images in a step. Evaluation does not count."""
        return self.steps * batch / max(self.total - self.seconds.get("evaluation", 0.0), 1e-9)

    def scalars(self) -> dict[str, float]:
        """For TensorBoard: the share of each kind, which add up to 1, and the seconds of a step without the others."""
        seconds_per_step = self.seconds.get("step", 0.0) / max(self.steps, 1)
        return {**{kind: self.share(kind) for kind in KINDS}, "seconds_per_step": seconds_per_step}

    def in_short(self) -> str:
        """How long it waited for data, such as `12% waiting for data`; an empty string where that is hardly at all."""
        share = self.share("data")
        return f"{share:.0%} {_IN_WORDS['data']}" if share >= SHORTEST_SHOWN else ""

    def in_words(self) -> str:
        """Such as `12 min: 93% steps, 4% waiting for data, 2% evaluation`, the longest first."""
        shares = sorted(((self.share(kind), kind) for kind in KINDS), reverse=True)
        parts = [f"{share:.0%} {_IN_WORDS[kind]}" for share, kind in shares if share >= 0.005]
        return f"{console.duration(self.total)}: {', '.join(parts)}"


class Awaited(Protocol):
    """What a step returns, perhaps before it is computed, as an eager tensor of TensorFlow."""

    def numpy(self) -> object:
        """Waits until it is computed."""


class Clock:
    """Measures what the time of a run is spent on, from `step` on.

    An accelerator computes a step while the host already waits for the next batch. Such a wait costs nothing: it counts
    as part of the step until that is computed, and only then as waiting for data.

    Args:
      step: how many steps are done.
      ahead: whether the host goes on before a step is computed. A thread then waits for each step.

    Attributes:
      whole: all of the run in this process, without the stretch that has not ended.

    Example:
      with clock.spent("data"):
          batch = next(batches)
      loss = train_step(batch)
      clock.stepped(loss)
    """

    def __init__(self, step: int, ahead: bool = False) -> None:
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="end of steps") if ahead else None
        self._last_step_ends: Future[float] | None = None
        self.whole = Stretch()
        self._kind = "step"
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._step, self._since = step, time.monotonic()
        self._seconds = dict.fromkeys(KINDS, 0.0)
        # When the host began to wait for data and when it had them, and when the step before is computed.
        self._waits: list[tuple[float, float, Future[float]]] = []

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """What is done within it is of `kind`, but for what is done within another such block inside it."""
        began = self._charge()
        outer, self._kind = self._kind, kind
        try:
            yield
        finally:
            ended = self._charge()
            self._kind = outer
            if kind == "data" and self._last_step_ends:
                self._waits.append((began, ended, self._last_step_ends))

    def _charge(self) -> float:
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        self._since = now
        return now

    def stepped(self, result: Awaited) -> None:
        """A step has been taken, and is computed when `result` is. Another thread takes its value: nobody else may."""
        if self._waiter:
            self._last_step_ends = self._waiter.submit(_time_when_computed, result)

    def so_far(self, step: int) -> Stretch:
        """The stretch since the last one ended, when `step` steps are done. It waits until they are computed."""
        self._charge()
        waits, self._waits = self._waits, []
        for began, ended, step_before in waits:
            hidden = min(ended, max(began, step_before.result())) - began
            self._seconds["data"] -= hidden
            self._seconds["step"] += hidden
        return Stretch(dict(self._seconds), step - self._step)

    def lap(self, step: int) -> Stretch:
        """The same, and it ends here: the next stretch begins."""
        stretch = self.so_far(step)
        self.whole += stretch
        self._restart(step)
        return stretch

    def back_to(self, step: int) -> None:
        """The run goes on from `step`. What was done since the last stretch ended counts for the whole run alone."""
        self.lap(step)


def _time_when_computed(result: Awaited) -> float:
    # Where the step fails, whoever takes its result hears of it.
    with contextlib.suppress(Exception):
        result.numpy()
    return time.monotonic()


class Profile:
    """Writes a profile of some steps, from the wait for the first one's data on, and ends it when it is left.

    Args:
      steps: which.
      folder: where TensorBoard finds it.
      writes: whether it is written: of several workers only the chief writes one.

    Raises:
      UserError: from every method, where it cannot be written.

    Example:
      with Profile(range(3, 6), "runs/digits_pretrain/train") as profile:
          for step in range(1, steps + 1):
              with profile.of(step):
                  loss = train_step(next(batches))
              profile.stepped(step, loss)
    """

    def __init__(self, steps: range, folder: str, writes: bool = True) -> None:
        self._steps, self._folder, self._writes = steps, folder, writes
        self._is_on = False
        self._before: Awaited | None = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """What is done within it belongs to step number `step`."""
        if self._writes and step in self._steps and not self._is_on:
            if self._before:
                self._before.numpy()  # An accelerator may still compute the step before.
            with run_folder.writing("the profile"):
                tf.profiler.experimental.start(self._folder)
            self._is_on = True
        with tf.profiler.experimental.Trace("step", step_num=step, _r=1) if self._is_on else contextlib.nullcontext():
            yield

    def begins_or_ends_after(self, step: int) -> bool:
        """Whether the profile begins or ends when `step` steps are done. Every worker gets the same answer."""
        return len(self._steps) > 0 and step in (self._steps[0] - 1, self._steps[-1])

    def stepped(self, step: int, result: Awaited) -> None:
        """Step number `step` has been taken, and is computed when `result` is."""
        self._before = result
        if self._is_on and step >= self._steps[-1]:
            result.numpy()
            self._stop()

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            with run_folder.writing("the profile"):
                tf.profiler.experimental.stop()


class DataWarning:
    """Says once that training waits for data, and what to change.

    The first stretch does not count: the first batch takes longer, and the first step is traced.

    Args:
      advice: what to change, as from `advice`.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._seen: Stretch | None = None
        self._is_said = False

    def after(self, stretch: Stretch) -> str:
        """The warning, where it is due when this stretch has ended; otherwise an empty string."""
        if self._seen is None:
            self._seen = Stretch()
            return ""
        self._seen += stretch
        if self._is_said or self._seen.total < WAITS_SECONDS or self._seen.steps < WAITS_STEPS:
            return ""
        seen, self._seen = self._seen, Stretch()
        if seen.share("data") <= WAITS_SHARE:
            return ""
        self._is_said = True
        return f"training waits for data {seen.share('data'):.0%} of the time: {self._advice}"


def advice(cores: int, image_size: int, has_files: bool, in_memory: bool, views_could_move: bool = False) -> str:
    """What to change where training waits for data.

    Args:
      cores: how many processor cores the process has.
      image_size: the size of the network's input.
      has_files: whether the images are decoded from files.
      in_memory: whether these are kept in memory.
      views_could_move: whether there is an accelerator, and the host makes the views.
    """
    more = f"more processor cores than these {cores}" if cores > 1 else "more than one processor core"
    changes = [f"give it {more}"]
    if views_could_move:
        changes.append("let the accelerator make the views: --augment_on=device")
    if has_files:
        changes.append(f"store the images hardly larger than --image_size={image_size}, since most work is decoding")
    if has_files and not in_memory:
        changes.append("add --cache_dataset where they are read over a slow disk or network and fit in memory")
    return "; or ".join(changes)
