"""An eye on pretraining: how good its features are while they are learnt, beside raw pixels and the untrained network.

A probe looks at a fixed draw of the training images, never at the evaluation split, so that a choice made by it leaves
the evaluation honest. It changes nothing about training: no weight, no order of the data and no random number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf

import alarms
import augment
import data
import finite
import model as model_lib
import quality
import run_folder
import sources
import strategy as strategy_lib
from config import Config
from errors import UserError
from predict import Predictor
from sources import glance

FILE = "probe.json"
PROBES = 20  # So many are made in a run, unless --eval_every_epochs says otherwise.
MIN_STEPS = 10  # They are at least this far apart, unless --eval_every_epochs says otherwise.
# All probes together compute as much as this share of the run's steps, as far as the limits below allow.
SHARE = 0.01
FORWARD_PASSES = 6  # A step takes each image's two views forward, and backward, which costs as much as two forward.
MIN_IMAGES, MAX_IMAGES = 512, 4000
MAX_BYTES = 2**28  # The images of a probe stay in memory, and take at most this.
LABELLED = 0.75  # This share of a probe's images is labelled, where there are labels. The others are pairs of views.
FOLDS = 3
PIXEL_SIZE = 64  # Larger images are shrunk to this before their raw pixels are compared.
SEED = 0
MEASURE = 2  # 1: nothing was whitened.
_COUNT = "count"


@dataclasses.dataclass
class History:
    """What the probes of a run have found, as probe.json keeps it.

    Attributes:
      images: how many images a probe looks at, counting each view of a pair; labels may not be there for all of them.
      held_out: how many labelled images the accuracies are measured on; 0 where there are too few labels.
      raw_pixels: the most that kNN on raw pixels gives on these; None where there are too few labels.
      probes: what each probe found, by name, with its `step`.
      alarms: what was said, each with the `step`, its `name` and its `text`.
      measure: how accuracies were measured; those of another measure cannot be compared.
    """

    images: int
    held_out: int = 0
    raw_pixels: float | None = None
    probes: list[dict[str, float]] = dataclasses.field(default_factory=list)
    alarms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    measure: int = 1  # Files of before there were two do not say.

    def back_to(self, step: int) -> None:
        """Forgets what came after `step`, from which the run goes on."""
        self.probes = [found for found in self.probes if found["step"] <= step]
        self.alarms = [alarm for alarm in self.alarms if alarm["step"] <= step]


def read(model_dir: str) -> History | None:
    """The history of the run in `model_dir`; None where nothing was probed.

    Raises:
      UserError: where it cannot be read or is damaged.
    """
    path = os.path.join(model_dir, FILE)
    if not run_folder.exists(path, f"--model_dir={model_dir}"):
        return None
    with run_folder.reading(path), tf.io.gfile.GFile(path) as file:
        text = file.read()
    names = {field.name for field in dataclasses.fields(History)}
    try:
        return History(**{name: value for name, value in json.loads(text).items() if name in names})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: remove it, and the run goes on with a new one") from error


def interval(eval_every_epochs: float, examples: int, batch: int, total_steps: int) -> int:
    """Steps between two probes; 0: there are none.

    Args:
      eval_every_epochs: as the flag says: 0 means about `PROBES` times a run, less than 0 never.
      examples: in an epoch.
      batch: images in a step.
      total_steps: of the run.
    """
    if eval_every_epochs < 0:
        return 0
    if eval_every_epochs:
        return max(1, round(eval_every_epochs * examples / batch))
    return max(MIN_STEPS, round(total_steps / PROBES))


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Whether to look after `step` steps: every so many, unless the end is nearer than half of that, and at the end."""
    left = total_steps - step
    return left == 0 or (step % every == 0 and left >= every / 2)


def images_to_probe(total_steps: int, batch: int, image_size: int) -> int:
    """How many images a probe looks at: more in a longer run, so that all probes take about `SHARE` of its time."""
    affordable = SHARE * FORWARD_PASSES * total_steps * batch / PROBES
    fit = MAX_BYTES // (3 * image_size**2)
    return int(min(max(affordable, MIN_IMAGES), MAX_IMAGES, fit))


class Probe:
    """The probes of one run. Every worker makes them together; the chief keeps their history in probe.json.

    Making one draws the images, and sets TensorFlow's global seed: make it before the stream of training batches.

    Args:
      config: of the run.
      source: its training set, with the labels that it may see.
      model: the network that is trained.
      views: the transforms of the two views.
      total_steps, warmup_steps: of the run.
      step: the step that the run goes on from; None where it is new.
      strategy: where to compute.

    Attributes:
      history: what was found so far.

    Raises:
      UserError: where an image or probe.json cannot be read.
    """

    def __init__(
        self, config: Config, source: sources.Source, model: model_lib.Model, views: Mapping[str, augment.View],
        total_steps: int, warmup_steps: int, step: int | None, strategy: tf.distribute.Strategy,
    ) -> None:  # fmt: skip
        self._path = os.path.join(config.model_dir, FILE)
        self._strategy, self._chief = strategy, strategy_lib.is_chief(strategy)
        self._every = interval(config.eval_every_epochs, source.examples, config.train_batch_size, total_steps)
        self._projection_dim = model.output_dim
        with strategy_lib.together(strategy):
            before = read(config.model_dir) if step is not None else None
            images = (
                before.images if before else images_to_probe(total_steps, config.train_batch_size, config.image_size)
            )
            tf.random.set_seed(SEED + 1)
            crops, labels = labelled_crops(source, config.image_size, int(LABELLED * images))
            self._pairs = min(round((1 - LABELLED) / 2 * images), source.examples)
            view_1, view_2 = pairs_of_views(source, views, self._pairs)
        self._labels, self._folds = labels, folds(labels)
        held_out = len(labels) if self._folds else 0
        if before and (before.held_out, before.measure) != (held_out, MEASURE):
            before = None  # Other labels, or an earlier program's kNN: new probes cannot be compared with those.
        raw_pixels = before.raw_pixels if before else pixel_accuracy(crops, labels, self._folds)
        self.history = before or History(images, held_out, raw_pixels, measure=MEASURE)
        self.history.back_to(step or 0)
        starts_from = "the network of --checkpoint" if config.checkpoint else "the untrained network"
        probed = np.concatenate([crops, view_1, view_2])
        self._run = alarms.Run(
            total_steps, warmup_steps, held_out, raw_pixels, starts_from,
            config.crop_min_area, config.color_jitter_strength, glance.have_colours(probed),
        )  # fmt: skip
        self.history.alarms = [
            alarm for alarm in self.history.alarms if not alarms.outdated(alarm["name"], alarm["step"], self._run)
        ]
        self._means = Means()

        def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
            of_model = model(images, training=False)
            return {"h": of_model.h, "z": of_model.z}

        self._predictor = Predictor(outputs, in_memory(probed), from_bytes, config.train_batch_size, strategy)

    def due(self, step: int) -> bool:
        """Whether to look after `step` steps."""
        return is_due(step, self._every, self._run.total_steps)

    def observe(self, metrics: Mapping[str, tf.Tensor]) -> None:
        """Takes the metrics of a training step into account. It does not wait for them to be computed."""
        values = {
            "contrastive_loss": metrics["contrastive_loss"],
            "chance_loss": -2.0 * tf.math.log(metrics["contrastive_chance"]),
            "contrastive_accuracy": metrics["contrastive_accuracy"],
            "contrastive_chance": metrics["contrastive_chance"],
        }
        self._means.add(values, metrics.get(finite.COUNTS, 1))

    def so_far(self) -> dict[str, float]:
        """What the steps since the last probe have given, for `back_to`. It waits for them to be computed."""
        return self._means.sums()

    def back_to(self, step: int, so_far: Mapping[str, float]) -> None:
        """Forgets what came after `step`, and takes `so_far`, as it was then, for what came before it."""
        self.history.back_to(step)
        self._means = Means(so_far)

    def look(self, step: int) -> dict[str, float] | None:
        """What the features are like after `step` steps, which the history keeps.

        Returns:
          Of the pairs of views `alignment`, `uniformity`, `spread_h`, `spread_z`, `rank_h` and `rank_z`; `knn` and
          `linear`, accuracies on held-out images, where there are labels; the means of the contrastive loss and
          accuracy and of their chance levels over the steps since the probe before. None where the features are not
          finite. `new_alarms` says what is wrong with it.
        """
        batches = list(self._predictor.batches())
        h, z = (np.concatenate([batch[name] for batch in batches]) for name in ("h", "z"))  # [n, D], [n, proj_out_dim]
        if not (np.isfinite(h).all() and np.isfinite(z).all()):
            return None
        labelled = len(self._labels)
        found = {"step": step, **geometry(h[labelled:], z[labelled:], self._pairs), **self._means.result()}
        if self._folds:
            found |= accuracies(h[:labelled], self._labels, self._folds)
        self.history.probes.append(found)
        said = {alarm["name"] for alarm in self.history.alarms}
        for alarm in alarms.find(self.history.probes, self._run):
            if alarm.name not in said:
                self.history.alarms.append({"step": step, **alarm._asdict()})
        self._means = Means()
        if self._chief:
            with run_folder.writing(self._path):
                run_folder.write_json(self._path, dataclasses.asdict(self.history))
        return found

    def new_alarms(self) -> list[str]:
        """The texts of the alarms that the last probe was the first to raise."""
        last = self.history.probes[-1]["step"]
        return [alarm["text"] for alarm in self.history.alarms if alarm["step"] == last]

    def last_is_best(self, kept: int | None) -> bool:
        """Whether kNN was better at the last probe than at step `kept`, whose checkpoint is the best so far.

        Without a checkpoint that is kept, or without its probe, the last probe is the best. Step 0 never is. Every
        worker gets the chief's answer.
        """
        scores = {found["step"]: found["knn"] for found in self.history.probes if "knn" in found}
        last = self.history.probes[-1]["step"]
        is_best = last > 0 and last in scores and (kept is None or scores[last] > scores.get(kept, -1.0))
        (chief_says,) = strategy_lib.as_chief_says(self._strategy, [int(is_best)])
        return bool(chief_says)

    def in_short(self) -> str:
        """The last probe in one number that a person understands; an empty string before the first."""
        if not self.history.probes:
            return ""
        found = self.history.probes[-1]
        if "knn" in found:
            return f"kNN {found['knn']:.1%} (raw pixels {self.history.raw_pixels:.1%})"
        return f"effective rank {found['rank_z']:.1f} of {self._projection_dim}"

    def in_words(self) -> str:
        """The last probe in a line."""
        found = self.history.probes[-1]
        parts = [self.in_short()]
        if "linear" in found:
            parts += [
                f"linear {found['linear']:.1%}",
                f"effective rank {found['rank_z']:.1f} of {self._projection_dim}",
            ]
        parts += [f"alignment {found['alignment']:.2f}", f"uniformity {found['uniformity']:.2f}"]
        return f"probe at step {found['step']}: {', '.join(parts)}"


class Means:
    """The means of scalars that come step by step. They are added up on the device.

    Args:
      sums: what `sums` of other means returned, to go on with them.
    """

    def __init__(self, sums: Mapping[str, float] = MappingProxyType({})) -> None:
        self._sums: dict[str, Any] = {name: tf.constant(value) for name, value in sums.items() if name != _COUNT}
        self._count: Any = int(sums.get(_COUNT, 0))

    def add(self, values: Mapping[str, tf.Tensor], counts: int | tf.Tensor = 1) -> None:
        """Adds scalars by name, the same names each time. With `counts` 0 they do not count, whatever they are."""
        if isinstance(counts, tf.Tensor):
            values = {name: tf.where(counts > 0, value, 0.0) for name, value in values.items()}
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in values.items()}
        self._count += counts

    def sums(self) -> dict[str, float]:
        """The sum of each name, and how many were added."""
        return {**{name: float(value) for name, value in self._sums.items()}, _COUNT: int(self._count)}

    def result(self) -> dict[str, float]:
        """The mean of each name; nothing where nothing was added."""
        count = int(self._count)
        return {name: float(value) / count for name, value in self._sums.items()} if count else {}


def geometry(h: np.ndarray, z: np.ndarray, pairs: int) -> dict[str, float]:
    """What the features of pairs of views are like, by name.

    Args:
      h, z: [2 pairs, D] features and projections: the first views of all pairs, then the second.
      pairs: how many pairs.
    """
    first, second = z[:pairs], z[pairs:]
    return {
        "alignment": quality.alignment(first, second),
        "uniformity": (quality.uniformity(first) + quality.uniformity(second)) / 2,
        "spread_h": quality.spread(h),
        "spread_z": quality.spread(z),
        "rank_h": quality.effective_rank(h),
        "rank_z": quality.effective_rank(z),
    }


Folds = Sequence[tuple[np.ndarray, np.ndarray]]


def folds(labels: np.ndarray) -> Folds:
    """Parts of a stratified cross-validation: the indices of a bank and of the images held out, for each fold.

    Args:
      labels: [n], of classes with two images or more.

    Returns:
      Up to `FOLDS` folds; none where there are fewer than two classes.
    """
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels)
    smallest = min(FOLDS, counts[counts > 0].min(initial=FOLDS))
    if np.count_nonzero(counts) < 2:
        return []
    split = StratifiedKFold(int(smallest), shuffle=True, random_state=SEED)
    return list(split.split(labels, labels))


def accuracies(h: np.ndarray, labels: np.ndarray, folds: Folds) -> dict[str, float]:
    """The accuracy of kNN and of a linear classifier on features `h` [n, D], each held out in one of `folds`."""
    knn_hits, linear_hits = [], []
    for bank, held_out in folds:
        guesses = quality.chosen_knn_predictions(h[bank], labels[bank], h[held_out])
        knn_hits.append(guesses == labels[held_out])
        guesses = quality.linear_predictions(h[bank], labels[bank], h[held_out])
        linear_hits.append(guesses == labels[held_out])
    return {"knn": float(np.concatenate(knn_hits).mean()), "linear": float(np.concatenate(linear_hits).mean())}


def log_probabilities(h: np.ndarray, labels: np.ndarray, folds: Folds) -> np.ndarray:
    """The logarithm of the probability that a linear classifier on features `h` [n, D] gives to each right label.

    Returns:
      [n], 0 or less, one fold after the other.
    """
    return np.concatenate([
        quality.linear_log_probabilities(h[bank], labels[bank], h[held_out], labels[held_out])
        for bank, held_out in folds
    ])  # fmt: skip


def pixel_accuracy(crops: np.ndarray, labels: np.ndarray, folds: Folds) -> float | None:
    """The most that kNN on raw pixels gives on the same folds of the same images; None without folds.

    Args:
      crops: [n, size, size, 3] uint8.
      labels: [n].
      folds: as from `folds`.
    """
    if not folds:
        return None
    if crops.shape[1] > PIXEL_SIZE:
        shrunk = [tf.image.resize(crop, [PIXEL_SIZE, PIXEL_SIZE], "area").numpy() for crop in crops]
        crops = np.stack(shrunk)  # [n, 64, 64, 3] float32
    hits = [
        quality.pixel_knn_hits(crops[bank], labels[bank], crops[held_out], labels[held_out]) for bank, held_out in folds
    ]
    return float(np.concatenate(hits, axis=1).mean(axis=1).max())


def labelled_crops(source: sources.Source, size: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The central crops of a class-balanced draw of labelled images, without the classes that have one image in it.

    Returns:
      [n, size, size, 3] uint8 with n at most `limit`, and their labels [n]. Both are empty without labels.
    """
    crops, labels = [np.empty([0, size, size, 3], np.uint8)], [np.empty([0], np.int32)]
    if source.has_labels:

        def stream(taken: int) -> tf.data.Dataset:
            return data.eval_stream(
                source, lambda image: augment.center_crop(image, size), 64, None, limit, True, taken
            )

        for batch in data.patient_batches(source, stream):
            counted = batch["mask"].numpy() > 0
            crops.append(to_bytes(batch["image"].numpy()[counted]))
            labels.append(batch["label"].numpy()[counted])
    drawn = np.concatenate(labels)
    several = np.bincount(drawn, minlength=1)[drawn] > 1
    return np.concatenate(crops)[several], drawn[several]


def pairs_of_views(
    source: sources.Source, views: Mapping[str, augment.View], pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """The two views of each of `pairs` images, as training makes them. The draw and the views are always the same.

    Returns:
      Two arrays [pairs, size, size, 3] uint8.
    """
    stream = functools.partial(data.train_stream, source, views, pairs, SEED)
    batch = next(data.patient_batches(source, stream))
    return to_bytes(batch["view_1"].numpy()), to_bytes(batch["view_2"].numpy())


def in_memory(images: np.ndarray) -> sources.MemorySource:
    """Images [n, size, size, 3] uint8 as a source without labels."""
    labels = np.full(len(images), sources.UNLABELLED, np.int32)
    return sources.MemorySource(images, labels, [""] * len(images), [], lambda image: image)


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8, which takes a quarter of the memory."""
    return np.rint(255 * images).astype(np.uint8)


def from_bytes(image: tf.Tensor) -> tf.Tensor:
    """An image of `to_bytes` in [0, 1] again."""
    return tf.cast(image, tf.float32) / 255.0
