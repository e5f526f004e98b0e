"""Compares the three steps with supervised training, on real images with the same ten labels: `make demo`.

The demo pretrains once on the embedded digits, without labels. Then it draws ten labelled digits, one of each class,
several times. For each draw it trains a network from scratch on the ten; it fine-tunes the pretrained network on them;
and it distils the fine-tuned network into another copy of the pretrained one, on all training digits without labels.
Each of these steps is an ordinary run.py command, which is printed first. The runs stay in runs/demo.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs") / "demo"
LABEL_SEEDS = (0, 1, 2)


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
      top_1: its accuracy on the test digits; NaN where it has no classifier.
      seconds: how long it took.
    """

    top_1: float
    seconds: float


def run(name: str, **flags: object) -> Outcome:
    """Runs run.py with these flags in RUNS/<name>."""
    flags = {"mode": "train_then_eval", **flags, "model_dir": RUNS / name}
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    print("\n$ python run.py", *arguments, flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, ROOT / "run.py", *arguments], cwd=ROOT, check=True)
    result = json.loads((ROOT / RUNS / name / "result.json").read_text())
    return Outcome(result.get("top_1", float("nan")), time.monotonic() - started)


def table(outcomes_by_method: dict[str, list[Outcome]]) -> str:
    """The results as a Markdown table: mean and range over the draws of ten labels."""
    lines = ["| method | top-1 | labels | seconds |", "| --- | --- | --- | --- |"]
    for method, outcomes in outcomes_by_method.items():
        accuracies = [outcome.top_1 for outcome in outcomes]
        mean = statistics.mean(accuracies)
        seconds = statistics.mean(outcome.seconds for outcome in outcomes)
        lines.append(f"| {method} | {mean:.1%} ({min(accuracies):.1%} - {max(accuracies):.1%}) | 10 | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the demo and prints its table."""
    if (ROOT / RUNS).exists():
        print(f"removing the runs of an earlier demo in {RUNS}")
        shutil.rmtree(ROOT / RUNS)
    started = time.monotonic()
    pretrained = run("pretrain", train_mode="pretrain", lineareval_while_pretraining=False)
    start = RUNS / "pretrain"
    supervised = []
    finetuned = []
    distilled = []
    for seed in LABEL_SEEDS:
        ten = {"labels_per_class": 1, "label_seed": seed}
        teacher = RUNS / f"finetune_{seed}"
        supervised.append(run(f"supervised_{seed}", train_mode="supervised", **ten))
        finetuned.append(run(teacher.name, train_mode="finetune", checkpoint=start, **ten))
        distilled.append(run(f"distill_{seed}", train_mode="distill", checkpoint=start, teacher=teacher))
    outcomes = {
        "supervised from scratch": supervised,
        "pretrained, fine-tuned": finetuned,
        "pretrained, fine-tuned, distilled": distilled,
    }
    print(f"\nTop-1 on the 360 test digits, mean and range over {len(LABEL_SEEDS)} choices of ten labels:\n")
    print(table(outcomes))
    print(f"\nPretraining, once and without labels, took {pretrained.seconds:.0f} seconds.", end=" ")
    print(f"Everything took {time.monotonic() - started:.0f} seconds.")
    print(f"Watch the runs: {sys.executable} -m tensorboard.main --logdir={RUNS}")


if __name__ == "__main__":
    main()
