"""Steps of a long job: each is a command of this program with a folder of its own, and the job may stop at any time.

A step leaves `step.json` in its folder: its command, what came of it and the seconds it took. When the job is started
again, a step that is done with the same command is skipped, and one that was stopped or failed is run again. A step
whose command has changed gets a fresh folder beside the old one. Where a step fails, the steps that need it are left
out, and the others go on.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import console
from signals import AGAIN

RECORD = "step.json"
RESULT = "result.json"
DONE, FAILED, STOPPED, LEFT_OUT = "done", "failed", "stopped", "left out"
INTERRUPTED = AGAIN  # The exit status of a command that was told to stop, and goes on when it is given again.

Execute = Callable[[Sequence[str]], int]


class Outcome(NamedTuple):
    """What came of a step.

    Attributes:
      kind, name, folder: of the step.
      command: the script, relative to the program's folder, and its flags.
      status: DONE, FAILED or LEFT_OUT.
      seconds: how long it took in all, over several attempts.
      result: what it wrote into its result.json; empty where it wrote none or is not done.
    """

    kind: str
    name: str
    folder: Path
    command: list[str]
    status: str
    seconds: float
    result: dict[str, Any]


def execute(command: Sequence[str]) -> int:
    """Runs a command of this program in a process of its own, to its end, also on Ctrl-C. Returns its exit status.

    Args:
      command: the script, relative to the program's folder, and its flags.
    """
    script, *flags = command
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()  # Where a terminal has sent the process a signal too, it counts them as one.
        process.wait()
        raise


class Steps:
    """Runs the steps of a job.

    Args:
      output: the folder of the job.
      planned: how many steps there will be, by kind.
      execute: runs a command and returns its exit status.

    Attributes:
      outcomes: of the steps so far.

    Example:
      steps = Steps(Path("runs/job"), {"pretrain": 1, "finetune": 1})
      first = steps.run("pretrain", "pretrain", "run.py", {"train_mode": "pretrain"})
      steps.run("finetune", "finetune", "run.py", {"checkpoint": first.folder}, needs=[first])
    """

    def __init__(self, output: Path, planned: Mapping[str, int], execute: Execute = execute) -> None:
        self._output, self._execute = output, execute
        self._planned = Counter(planned)
        self.outcomes: list[Outcome] = []

    def run(
        self,
        kind: str,
        name: str,
        script: str,
        flags: Mapping[str, object],
        needs: Sequence[Outcome] = (),
        folder_flag: str = "model_dir",
        file: str = "",
    ) -> Outcome:
        """Runs a step, or skips it where it is done. A failure is said and told in the outcome.

        Args:
          kind: of the step; steps of one kind take about the same time.
          name: of the step's folder in `output`.
          script: which command, relative to the program's folder.
          flags: of the command.
          needs: the steps before it that must be done.
          folder_flag: the flag by which the command is told its folder.
          file: the flag names this file in the folder instead.

        Raises:
          KeyboardInterrupt: on Ctrl-C; the step can be run again then.
        """
        folder, command, record = self._place(name, script, flags, folder_flag, file)
        missing = [need.name for need in needs if need.status != DONE]
        console.say(f"\nstep {len(self.outcomes) + 1} of {self._planned.total()}: {name}{self._time_left()}")
        if missing:
            console.say(f"left out, since this failed: {', '.join(missing)}")
            record = {"status": LEFT_OUT, "seconds": 0.0}
        elif record.get("status") == DONE:
            console.say(f"done before, in {console.duration(record['seconds'])}: {folder}")
        else:
            record = self._attempt(folder, command, record.get("seconds", 0.0))
        result = read_json(folder / RESULT) if record["status"] == DONE else {}
        outcome = Outcome(kind, name, folder, command, record["status"], record["seconds"], result)
        self.outcomes.append(outcome)
        return outcome

    def _place(
        self, name: str, script: str, flags: Mapping[str, object], folder_flag: str, file: str
    ) -> tuple[Path, list[str], dict[str, Any]]:
        """The folder of a step, its command, and its record there, which is empty where the step is new."""
        for number in itertools.count(1):
            folder = self._output / (name if number == 1 else f"{name}_{number}")
            arguments = [f"--{flag}={value}" for flag, value in {**flags, folder_flag: folder / file}.items()]
            command = [script, *arguments]
            if not folder.exists():
                break
            record = read_json(folder / RECORD)
            if record.get("command") == command:
                return folder, command, record
        if number > 1:
            console.say(f"\n{name}: what is in {self._output / name} was made by another command; {folder} is new")
        return folder, command, {}

    def _attempt(self, folder: Path, command: list[str], seconds_before: float) -> dict[str, Any]:
        """Runs a command and keeps its record. Returns the record."""
        script, *arguments = command
        console.say(f"$ python {shlex.join([os.path.relpath(ROOT / script), *arguments])}")
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"command": command, "status": STOPPED, "seconds": seconds_before}
        _write(folder / RECORD, record)
        started = time.monotonic()
        try:
            exit_status = self._execute(command)
            if exit_status == INTERRUPTED:
                raise KeyboardInterrupt
            record |= {"status": FAILED if exit_status else DONE, "exit_status": exit_status}
        finally:
            record["seconds"] = seconds_before + time.monotonic() - started
            _write(folder / RECORD, record)
        if exit_status:
            console.say(f"{folder}: failed with exit status {exit_status}")
        return record

    def _time_left(self) -> str:
        """How long the steps that are left will take, by those that are done, for a line of text.

        A kind of which no step is done counts as long as the mean of the steps that come several times.
        """
        seconds: dict[str, list[float]] = {}
        for outcome in self.outcomes:
            if outcome.status == DONE:
                seconds.setdefault(outcome.kind, []).append(outcome.seconds)
        left = self._planned - Counter(outcome.kind for outcome in self.outcomes)
        repeated = [value for kind, values in seconds.items() if self._planned[kind] > 1 for value in values]
        unknown = [kind for kind in left if kind not in seconds]
        if unknown and not repeated:
            return ""
        total = 0.0
        for kind, count in left.items():
            total += count * statistics.fmean(seconds.get(kind, repeated))
        return f", about {console.duration(total)} left"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
