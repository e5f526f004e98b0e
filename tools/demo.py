"""The three steps on real images with ten labels, beside supervised training on the same ten: `make demo`.

Pretrains once, without labels, on the embedded digits. Then, for each choice of ten labelled digits (one a class):
supervised training from scratch; fine-tuning of the pretrained network; distillation of the fine-tuned one into
another copy of the pretrained network, on all training digits without labels. Every line it runs is an ordinary
run.py command, printed first. The runs stay in runs/demo.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs") / "demo"
LABEL_SEEDS = (0, 1, 2)


def run(name: str, **flags: object) -> tuple[float, float]:
    """Runs run.py with these flags in RUNS/<name>. Returns the top-1 on the test digits (NaN without) and seconds."""
    flags = {"mode": "train_then_eval", **flags, "model_dir": RUNS / name}
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    print("\n$ python run.py", *arguments, flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, ROOT / "run.py", *arguments], cwd=ROOT, check=True)
    result = json.loads((ROOT / RUNS / name / "result.json").read_text())
    return result.get("top_1", float("nan")), time.monotonic() - started


def table(rows: list[tuple[str, list[float], str, list[float]]]) -> str:
    """The results as a Markdown table: mean and range over the choices of labels."""
    lines = ["| method | top-1 | labels | seconds |", "| --- | --- | --- | --- |"]
    for method, accuracies, labels, seconds in rows:
        mean, low, high = statistics.mean(accuracies), min(accuracies), max(accuracies)
        lines.append(f"| {method} | {mean:.1%} ({low:.1%} - {high:.1%}) | {labels} | {statistics.mean(seconds):.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the demo and prints its table."""
    if (ROOT / RUNS).exists():
        print(f"removing the runs of an earlier demo in {RUNS}")
        shutil.rmtree(ROOT / RUNS)
    started = time.monotonic()
    _, pretrain_seconds = run("pretrain", train_mode="pretrain", lineareval_while_pretraining=False)
    start = {"checkpoint": RUNS / "pretrain"}
    supervised, finetuned, distilled = [], [], []
    for seed in LABEL_SEEDS:
        ten = {"labels_per_class": 1, "label_seed": seed}
        supervised.append(run(f"supervised_{seed}", train_mode="supervised", **ten))
        finetuned.append(run(f"finetune_{seed}", train_mode="finetune", **start, **ten))
        distilled.append(run(f"distill_{seed}", train_mode="distill", **start, teacher=RUNS / f"finetune_{seed}"))
    rows: list[tuple] = [
        ("supervised from scratch", *zip(*supervised, strict=True)),
        ("pretrained, fine-tuned", *zip(*finetuned, strict=True)),
        ("pretrained, fine-tuned, distilled", *zip(*distilled, strict=True)),
    ]
    print(f"\nTop-1 on the 360 test digits, mean and range over {len(LABEL_SEEDS)} choices of ten labels:\n")
    print(table([(method, list(top_1), "10", list(seconds)) for method, top_1, seconds in rows]))
    print(f"\nPretraining, without labels and once for all, took {pretrain_seconds:.0f} seconds.", end=" ")
    print(f"Everything took {time.monotonic() - started:.0f} seconds.")
    print(f"Watch the runs: {sys.executable} -m tensorboard.main --logdir={RUNS}")


if __name__ == "__main__":
    main()
