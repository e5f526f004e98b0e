"""NT-Xent in blocks against NT-Xent on the whole matrix of logits: time and peak memory, forward and backward.

    python benchmarks/loss.py --batch=1024
    python benchmarks/loss.py --batch=4096 --only=blocks
    python benchmarks/loss.py --batch=4096 --keys=0

Both get the two views of a batch and, with memory, a full queue of keys; without memory the candidates get a gradient
too. The whole matrix is what this program computed before: TensorFlow differentiates it, and the entropy takes a
softmax and a log-softmax more.

Each measurement is a process of its own, and the variants take turns. A process first runs the same function on few
rows. The peak is how far the largest resident set of the process after one run (`ru_maxrss`) is above the one before.
Time is that of the processor and that of the clock, the least of some runs after that. The ratio of times is the median
over the rounds, with the least and the largest. The whole matrix of batch 4096 with 65,536 keys takes about 15 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TAU = 0.1
VARIANTS = ("whole", "blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="images; each has two views")
    parser.add_argument("--keys", type=int, default=65536, help="keys in the queue; 0: no memory")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=0, help="as --loss_block")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each process")
    parser.add_argument("--only", choices=VARIANTS)
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given)))
        return
    variants = [given.only] if given.only else VARIANTS
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(given.rounds):
        for variant in variants:
            command = [sys.executable, __file__, *sys.argv[1:], f"--measure={variant}"]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[variant].append(json.loads(said.splitlines()[-1]))
    matrix = 4 * 2 * given.batch * (2 * given.batch + given.keys)
    print(
        f"{2 * given.batch:,} anchors, {2 * given.batch + given.keys:,} candidates: a matrix of {matrix / 1e6:,.0f} MB"
    )
    for variant, rounds in found.items():
        peak = max(each["peak"] for each in rounds)
        times = ", ".join(
            f"{statistics.median(each[kind] for each in rounds):.2f} s of {kind}" for kind in ("cpu", "clock")
        )
        print(f"{variant}: {times}; peak {peak / 1e6:,.0f} MB, {peak / matrix:.3f} of the matrix")
    if not given.only:
        for kind in ("cpu", "clock"):
            ratios = [b[kind] / w[kind] for w, b in zip(found["whole"], found["blocks"], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"blocks / whole, time of {kind}: {statistics.median(ratios):.2f} ({spread})")


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Peak memory in bytes, and seconds of processor and clock, of a forward and backward pass."""
    import engine

    with engine.quiet_import():
        import tensorflow as tf

    import objective

    def random_keys(rows: int, seed: int) -> tf.Tensor:
        return tf.math.l2_normalize(tf.random.stateless_normal([rows, given.dim], [seed, 0]), axis=-1)

    def whole(anchors: tf.Tensor, candidates: tf.Tensor, queue: tf.Tensor) -> objective.Contrastive:
        n = tf.shape(anchors)[0] // 2
        own = tf.range(2 * n)
        positive = tf.concat([own[n:], own[:n]], axis=0)
        logits = tf.matmul(anchors, candidates, transpose_b=True) / TAU  # [2n, 2n]
        logits = tf.where(tf.one_hot(own, 2 * n, on_value=True, off_value=False), objective.MASKED, logits)
        if given.keys:
            past = tf.matmul(anchors, queue, transpose_b=True) / TAU  # [2n, K]
            past = tf.where(tf.ones(tf.shape(queue)[:1], tf.bool)[None], past, objective.MASKED)
            logits = tf.concat([logits, past], axis=1)  # [2n, 2n + K]
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=positive, logits=logits)  # [2n]
        accuracy = tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == positive, tf.float32)  # [2n]
        p, log_p = tf.nn.softmax(logits), tf.nn.log_softmax(logits)
        return objective.Contrastive(loss, accuracy, -tf.reduce_sum(tf.stop_gradient(p * log_p), axis=1))

    def blocks(anchors: tf.Tensor, candidates: tf.Tensor, queue: tf.Tensor) -> objective.Contrastive:
        past = (queue, tf.ones(tf.shape(queue)[:1], tf.bool)) if given.keys else (None, None)
        return objective.nt_xent(anchors, candidates, TAU, 0, *past, given.block)

    function = {"whole": whole, "blocks": blocks}[given.measure]

    @tf.function(autograph=False)
    def step(anchors: tf.Tensor, candidates: tf.Tensor, queue: tf.Tensor) -> tuple[tf.Tensor, ...]:
        with tf.GradientTape() as tape:
            tape.watch(anchors)
            contrastive = function(anchors, tf.stop_gradient(candidates) if given.keys else anchors, queue)
            loss = tf.reduce_mean(contrastive.loss)
        means = (tf.reduce_mean(contrastive.accuracy), tf.reduce_mean(contrastive.entropy))
        return loss, *means, tape.gradient(loss, anchors)

    few, all_of_them = (8, min(8, given.keys)), (given.batch, given.keys)
    small, inputs = (
        (random_keys(2 * n, 0), random_keys(2 * n, 1), random_keys(keys, 2)) for n, keys in (few, all_of_them)
    )

    def run(tensors: tuple[tf.Tensor, ...]) -> tuple[float, float]:
        processor, clock = time.process_time(), time.perf_counter()
        step(*tensors)[-1].numpy()
        return time.process_time() - processor, time.perf_counter() - clock

    run(small)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run(inputs)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    times = [run(inputs) for _ in range(given.runs)]
    return {"peak": peak, "cpu": min(cpu for cpu, _ in times), "clock": min(clock for _, clock in times)}


if __name__ == "__main__":
    main()
