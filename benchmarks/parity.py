"""Our numbers against reference numbers recorded by running the 2020 release: writes the table in docs/parity.md.

    python benchmarks/parity.py --golden=FOLDER

FOLDER holds a subfolder per network (spec.json, io.npz, mostly a TF1 checkpoint), schedule.json and augment.npz. Every
row of the table is a quantity, our largest error relative to the largest recorded value, and the tolerance; the exit
status is 1 where an error is above its tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine

with engine.quiet_import():
    import tensorflow as tf

import numpy as np

import augment
import lars_optimizer
import model as model_lib
import objective
import published
import resnet
import schedule as schedule_lib
import tasks
from augment import operators
from config import Config

NETWORKS = ("r10_1x_sk0", "r14_1x_sk0_2layer", "r14_1x_se", "r14_1x_sk1")
SAVED_MODELS = {"r14_1x_sk1_tf2": "r14_1x_sk1"}  # and the network whose numbers it must give
# Where the recorded trajectory is not determined by its inputs: see docs/parity.md.
UNDETERMINED = ("r14_1x_sk1",)
WEIGHT_DECAY, LEARNING_RATE, TAU = 1e-4, 0.05, 0.1


class Row(NamedTuple):
    """One line of the table: what was compared where, our error and the tolerance (None: none can be kept)."""

    where: str
    quantity: str
    error: float
    tolerance: float | None

    @property
    def met(self) -> bool:
        """Whether the error is within the tolerance, if there is one."""
        return self.tolerance is None or self.error <= self.tolerance


def error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"shape {actual.shape} instead of {expected.shape}")
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def fill(name: str, shape: list[int]) -> np.ndarray:
    """The value of a weight where no checkpoint has it: the fill rule of the reference numbers."""
    draw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    kind = name.rsplit("/", 1)[-1]
    if kind == "kernel":
        return draw * np.sqrt(2 / np.prod(shape[:-1]))
    return {"gamma": 1 + 0.1 * draw, "moving_variance": 1 + 0.1 * np.abs(draw)}.get(kind, 0.1 * draw)


class Case:
    """A recorded network: ours with its weights, and what was recorded.

    Attributes:
      model: the network, its supervised head detached as in pretraining.
      variables: its variables by TF1 name.
      io: the recorded arrays.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self.io = folder.name, dict(np.load(folder / "io.npz", allow_pickle=False))
        self.spec = json.loads((folder / "spec.json").read_text())
        config = Config(
            resnet_depth=self.spec["resnet_depth"], width_multiplier=float(self.spec["width_multiplier"]),
            sk_ratio=self.spec["sk_ratio"], se_ratio=self.spec["se_ratio"], image_size=self.spec["image_size"],
            proj_out_dim=self.spec["proj_out_dim"], num_proj_layers=self.spec["num_proj_layers"],
        )  # fmt: skip
        self.model = tasks.network(config, self.spec["num_classes"], detached=True)
        names = published.release_names(self.model, config.proj_head_mode)
        self.variables = {name: variable for name, (_, variable) in names.items()}
        if (folder / "model.ckpt-0.index").exists():
            reader = tf.train.load_checkpoint(str(folder / "model.ckpt-0"))
            self._weights = {name: reader.get_tensor(name) for name, _ in self.spec["variables"]}
        else:
            self._weights = {name: fill(name, shape) for name, shape in self.spec["variables"]}

    def reset(self) -> None:
        """Brings the recorded weights back."""
        for name, value in self._weights.items():
            self.variables[name].assign(value)

    def loss(self, images: np.ndarray) -> tuple[model_lib.Outputs, tf.Tensor, tf.Tensor]:
        """The outputs in training mode, the contrastive loss, and the whole loss as the release adds it up."""
        outputs = self.model(images, training=True)
        z = objective.normalize(outputs.z)
        contrastive = 2 * tf.reduce_mean(objective.nt_xent(z, z, TAU).loss)
        labels = tf.argmax(self.io["labels"], axis=1, output_type=tf.int32)
        supervised = tf.reduce_mean(objective.supervised(outputs.logits, labels)[0])
        decay = objective.weight_decay_loss(self.model.supervised_head.trainable_variables, WEIGHT_DECAY)
        return outputs, contrastive, contrastive + supervised + decay

    def three_steps(self, noise: float = 0.0, seed: int = 0) -> list[float]:
        """The losses of three LARS steps from the recorded weights, on the images plus `noise`."""
        self.reset()
        images = self.io["images"]
        images = images + noise * np.random.default_rng(seed).standard_normal(images.shape).astype(np.float32)
        variables, head = self.model.trainable_variables, self.model.supervised_head.trainable_variables
        optimizer = lars_optimizer.make_optimizer("lars", LEARNING_RATE, 0.9, WEIGHT_DECAY, head)
        optimizer.build(variables)
        losses = []
        for _ in range(3):
            with tf.GradientTape() as tape:
                *_, total = self.loss(images)
            optimizer.apply(tape.gradient(total, [variable.value for variable in variables]), variables)
            losses.append(float(total))
        return losses


def forward_rows(name: str, model: model_lib.Model, io: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """The forward pass in inference mode at every endpoint and head layer."""
    outputs = model(io["images"], training=False)
    for endpoint in resnet.ENDPOINTS[:-1]:
        mean = tf.reduce_mean(outputs.endpoints[endpoint], axis=[1, 2])  # [N, C]
        yield Row(name, f"inference: {endpoint}, mean over space", error(mean, io[f"eval/{endpoint}_mean"]), 1e-4)
    yield Row(name, "inference: h", error(outputs.h, io["eval/h"]), 1e-4)
    for k, hidden in enumerate(outputs.hiddens):
        yield Row(name, f"inference: head layer {k}", error(hidden, io[f"eval/head_{k}"]), 1e-4)
    yield Row(name, "inference: logits", error(outputs.logits, io["eval/logits"]), 1e-4)


def training_rows(case: Case) -> Iterator[Row]:
    """Training mode, the losses and the gradients of the first step."""
    case.reset()
    trainable = {name: v for name, v in case.variables.items() if f"grad_norm/{name}" in case.io}
    with tf.GradientTape() as tape:
        outputs, contrastive, total = case.loss(case.io["images"])
    for quantity, value in (("h", outputs.h), ("z", outputs.z)):
        yield Row(case.name, f"training: {quantity}", error(value, case.io[f"train/{quantity}"]), 1e-4)
    for quantity, value in (("contrastive", contrastive), ("total", total)):
        yield Row(case.name, f"training: {quantity} loss", error(value, case.io[f"train/{quantity}_loss"]), 1e-4)
    gradients = tape.gradient(total, [variable.value for variable in trainable.values()])
    expected = np.array([case.io[f"grad_norm/{name}"] for name in trainable])
    errors = np.abs([np.linalg.norm(gradient) for gradient in gradients] - expected) / expected
    # At the edge of a ReLU or between two equal maxima rounding decides where a gradient goes: a few norms differ.
    yield Row(case.name, "gradient norms: median", float(np.median(errors)), 1e-3)
    yield Row(case.name, "gradient norms: largest", float(np.max(errors)), 5e-3)


def step_rows(case: Case) -> Iterator[Row]:
    """Three steps of LARS: losses, and the state after them."""
    losses, recorded = case.three_steps(), case.io["train/losses_3_steps"]
    by_step = np.abs(np.array(losses) - recorded) / recorded
    determined = case.name not in UNDETERMINED
    yield Row(case.name, "LARS: loss of step 1", float(by_step[0]), 1e-4)
    yield Row(case.name, "LARS: losses of steps 2 and 3", float(by_step[1:].max()), 1e-2 if determined else None)
    norms: dict[str, list[float]] = {"weights": [], "moving mean": [], "moving variance": []}
    sums = []
    for name, variable in case.variables.items():
        value = np.float64(variable.value)
        kind = {"moving_mean": "moving mean", "moving_variance": "moving variance"}.get(variable.name, "weights")
        norm = case.io[f"after_3_steps_norm/{name}"]
        norms[kind].append(abs(np.linalg.norm(value) - norm) / norm)
        sums.append(abs(value.sum() - case.io[f"after_3_steps_sum/{name}"]) / np.abs(value).sum())
    for kind, errors in norms.items():
        yield Row(case.name, f"LARS: norms of {kind} after step 3", float(max(errors)), 1e-2 if determined else None)
    yield Row(case.name, "LARS: sums, to the sum of magnitudes", float(max(sums)), 2e-2 if determined else None)
    outputs, *_ = case.loss(case.io["images"])
    after = error(outputs.h, case.io["train/h_after_3"])
    yield Row(case.name, "LARS: h after step 3", after, 2e-2 if determined else None)


def published_rows(golden: Path) -> Iterator[Row]:
    """The forward pass of checkpoints read as published ones are."""
    checkpoints = {name: name for name in NETWORKS if (golden / name / "model.ckpt-0.index").exists()} | SAVED_MODELS
    for folder, network in checkpoints.items():
        weights = published.open_weights(str(golden / folder))
        io = dict(np.load(golden / network / "io.npz", allow_pickle=False))
        worst = max(row.error for row in forward_rows(folder, tasks.restore_network(weights), io))
        kind = "TF2 SavedModel" if folder in SAVED_MODELS else "TF1 checkpoint"
        yield Row(network, f"read as a published {kind}: whole forward pass", worst, 1e-4)


def schedule_rows(golden: Path) -> Iterator[Row]:
    """The number of steps and the learning rate by step."""
    for case in json.loads((golden / "schedule.json").read_text()):
        examples, batch = case["num_train_examples"], case["train_batch_size"]
        steps = schedule_lib.train_steps(examples, case["train_epochs"], batch)
        peak = schedule_lib.peak_learning_rate(case["learning_rate"], case["learning_rate_scaling"], batch)
        warmup = schedule_lib.warmup_steps(examples, case["warmup_epochs"], batch)
        schedule = schedule_lib.WarmupCosine(peak, warmup, steps)
        rates = [float(schedule(int(step))) for step in case["values"]]
        setting = f"{examples:,} images, {case['train_epochs']} epochs, batch {batch}, {case['learning_rate_scaling']}"
        yield Row("number of steps", setting, error(steps, case["train_steps"]), 1e-6)
        yield Row("learning rate by step", setting, error(rates, list(case["values"].values())), 1e-6)


def changed_colors(photo: tf.Tensor, factors: Mapping[str, float]) -> tf.Tensor:
    """The photograph [H, W, 3] with changed colours, by the factor of each change, in the order of `factors`."""
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    order = [*factors, *(name for name in neutral if name not in factors)]
    places = tf.constant([[order.index(name) for name in neutral]])
    return operators.change_colors(photo[None], tf.constant([[*(neutral | dict(factors)).values()]]), places)[0]


def augment_rows(golden: Path) -> Iterator[Row]:
    """The image operators on a photograph, with given factors."""
    recorded = dict(np.load(golden / "augment.npz", allow_pickle=False))
    photo = tf.image.convert_image_dtype(recorded["photo_0"], tf.float32)
    changes = ("brightness", "contrast", "saturation", "hue")
    for key, expected in recorded.items():
        if match := re.fullmatch(rf"({'|'.join(changes)})_(.*)", key):
            made = changed_colors(photo, {match[1]: float(match[2])})
        elif key.startswith("order_"):
            steps = key.split("_")[1:]
            by_letter = {change[0]: change for change in changes}
            made = changed_colors(photo, {by_letter[step[0]]: float(step[1:]) for step in steps})
        elif match := re.fullmatch(r"blur_k(\d+)_sigma(.*)", key):
            blurred = operators.gaussian_blur(photo[None], int(match[1]), tf.constant([float(match[2])]))
            made = tf.clip_by_value(blurred[0], 0.0, 1.0)
        elif key == "grayscale":
            made = operators.grayscale().apply(photo[None], tf.zeros([1, 0]))[0]
        elif key in ("eval_preprocess_96", "center_crop_96"):  # the second was recorded before it was clipped
            made, expected = augment.center_crop(tf.constant(recorded["photo_0"]), 96), np.clip(expected, 0, 1)
        else:
            continue
        yield Row("a photograph", key.replace("_", " "), error(made, expected), 1e-5)


def measure(golden: Path) -> Iterator[tuple[str, list[Row]]]:
    """The rows by section."""
    for name in NETWORKS:
        case = Case(golden / name)
        case.reset()
        yield "networks", [*forward_rows(name, case.model, case.io), *training_rows(case), *step_rows(case)]
    yield "networks", list(published_rows(golden))
    yield "schedule", list(schedule_rows(golden))
    yield "augmentation", list(augment_rows(golden))


def table(rows: list[Row]) -> str:
    """Errors by quantity and place, as a Markdown table."""
    places = list(dict.fromkeys(row.where for row in rows))
    by_quantity: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_quantity.setdefault(row.quantity, {})[row.where] = row
    lines = ["| quantity | " + " | ".join(places) + " | tolerance |", "| --- |" + " --- |" * (len(places) + 1)]
    for quantity, found in by_quantity.items():
        errors = [f"{found[place].error:.0e}" if place in found else "" for place in places]
        tolerances = {f"{row.tolerance:.0e}" for row in found.values() if row.tolerance is not None}
        lines.append(f"| {quantity} | {' | '.join(errors)} | {', '.join(sorted(tolerances))} |")
    return "\n".join(lines)


def spread_text(golden: Path, runs: int = 8) -> str:
    """How far the losses of the undetermined network move with noise on its images, a Markdown table."""
    lines = []
    for name in UNDETERMINED:
        case = Case(golden / name)
        recorded = case.io["train/losses_3_steps"]
        for noise in (1e-7, 1e-4):
            losses = np.array([case.three_steps(noise, seed) for seed in range(runs)])  # [runs, 3]
            ranges = [f"{low:.2f} to {high:.2f}" for low, high in zip(losses.min(0), losses.max(0), strict=True)]
            lines.append(f"| {name}, images + {noise:.0e} n | {' | '.join(ranges)} |")
        lines.append(f"| {name}, recorded | {' | '.join(f'{loss:.2f}' for loss in recorded)} |")
    header = f"| losses of {runs} runs | step 1 | step 2 | step 3 |\n| --- | --- | --- | --- |\n"
    return header + "\n".join(lines)


def write(path: Path, sections: Mapping[str, str]) -> None:
    """Puts each section's text between its marks in a Markdown file."""
    text = path.read_text()
    for name, content in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{path} has no marks {begin} and {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    path.write_text(text)


def main() -> int:
    """Measures, writes the tables into docs/parity.md, and says which errors are above their tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True, help="the folder of recorded numbers")
    golden = parser.parse_args().golden
    rows: dict[str, list[Row]] = {}
    for section, more in measure(golden):
        rows.setdefault(section, []).extend(more)
    sections = {name: table(of_section) for name, of_section in rows.items()}
    write(ROOT / "docs" / "parity.md", sections | {"spread": spread_text(golden)})
    above = [row for of_section in rows.values() for row in of_section if not row.met]
    for row in above:
        print(f"above its tolerance: {row.where}, {row.quantity}: {row.error:.1e} > {row.tolerance:.0e}")
    print(f"docs/parity.md: {sum(map(len, rows.values()))} quantities, {len(above)} above their tolerance")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
