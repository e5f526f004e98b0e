"""What a run sees: the data of its config, the labelled subset, and tf.data streams of views in a fixed order.

A training stream is a pure function of (seed, step): epoch e visits every example once in an order drawn from
(seed, e), and the example at position p of the stream is augmented with seeds made of (seed, p). So a stream can
start at any step, and is the same for any number of workers and replicas.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import augment
import recipe
import sources
import strategy as strategy_lib
from config import AUTO_SPLIT, Config
from errors import UserError, reason
from sources import glance

MAX_OPENED = 1000  # A choice of so many labelled images is opened before it is made.
VALUES_AT_ONCE = 2**21  # of the images that are finished together: 8 MB
EVAL_SEED = 0  # An evaluation draws its examples by this seed.


def train_source(
    config: Config, classes: Sequence[str] | None, tfds_order: str = "buffer"
) -> tuple[sources.Source, list[str] | None]:
    """The training split of a run, and the names of its labelled examples where a subset of them was drawn.

    Fine-tuning and supervised training see the labelled examples alone; pretraining and distillation see every
    image, with the labels of the others hidden.

    Args:
      config: of the run.
      classes: the classes of the teacher or, for a kNN bank, of the network, by which a folder's labels are numbered;
        None: the data's own.
      tfds_order: the order in which a TensorFlow dataset is read (see `TfdsSource.in_order`).

    Raises:
      UserError: where the data cannot be read, or has too few labels for the subset.
    """
    source, chosen = _with_drawn_labels(config, _whole_split(config, classes, config.max_corrupt_fraction))
    if isinstance(source, sources.TfdsSource):
        source = source.in_order(tfds_order, config.train_batch_size)
    if config.cache_dataset:
        source = source.in_memory()
    return source, chosen


def open_split(
    config: Config,
    split: str,
    classes: Sequence[str] | None,
    max_corrupt: float | None = None,
    known_by: str = "",
) -> sources.Source:
    """The split `split` of the data of a config, with all its labels.

    Where a part of the training split is held out to evaluate on (`--eval_split=auto`), that part is the split `auto`,
    and the training split is the rest.

    Args:
      config: which data.
      split: such as `train`, or `auto`.
      classes, max_corrupt, known_by: as for `sources.load`.

    Raises:
      UserError: where the data cannot be read.
    """
    flags = ("train_split", "eval_split", "predict_split")
    side = ""
    if split == AUTO_SPLIT:
        split, side = config.train_split, sources.HELD_OUT
    elif config.eval_split == AUTO_SPLIT and split == config.train_split:
        side = sources.KEPT
    with named_split(*(f"--{flag}={split}" for flag in flags if getattr(config, flag) == split)):
        return sources.load(
            config.dataset, split, config.data_dir, classes, max_corrupt, known_by, config.labels, config.images,
            config.max_image_pixels, side,
        )  # fmt: skip


@contextlib.contextmanager
def named_split(*given: str) -> Iterator[None]:
    """Where a split does not exist, the message names the first of `given`, the flag by which it came."""
    try:
        yield
    except sources.NoSuchSplit as mistake:
        if not given:
            raise
        raise UserError(f"{given[0]}: {mistake.why}") from mistake


def facts(config: Config, classes: Sequence[str] | None, replicas: int = 1, accelerator: bool = False) -> recipe.Facts:
    """What a recipe depends on, from the names, the labels and some images of the training split of a run.

    Args:
      config: of the run, as far as it is known.
      classes: as for `train_source`.
      replicas, accelerator: how many devices share a batch, and whether they are GPUs or TPUs.

    Raises:
      UserError: where the data cannot be read, or has too few labels for the subset.
    """
    whole = _whole_split(config, classes, max_corrupt=None)
    source, chosen = _with_drawn_labels(config, whole)
    if chosen is not None:
        labelled = len(chosen)
    elif isinstance(source, sources.ListedSource):
        labelled = int((source.labels >= 0).sum())
    else:  # TensorFlow Datasets have labels for all or for none. To count those of --labelled_dataset takes a pass.
        labelled = source.examples if source.has_labels else 0
    seen = glance.look(whole)  # of a few labels too: each step of a chain is chosen by the same images
    return recipe.Facts(
        source.examples, labelled, len(source.classes), seen.height, seen.width, seen.colour, replicas, accelerator,
        seen.mirrors,
    )  # fmt: skip


def _whole_split(config: Config, classes: Sequence[str] | None, max_corrupt: float | None) -> sources.Source:
    """The training split of a run with all labels that it has, or those of `--labelled_dataset`."""
    known_by = f"--teacher={config.teacher}" if config.teacher else ""
    source = open_split(config, config.train_split, classes, max_corrupt, known_by)
    if config.labelled_dataset:
        if not isinstance(source, sources.TfdsSource):
            raise UserError(f"--labelled_dataset goes with TensorFlow datasets, not with --dataset={config.dataset}")
        with named_split(f"--labelled_split={config.labelled_split}"):
            labelled = sources.load(config.labelled_dataset, config.labelled_split, config.data_dir)
        source = source.labelled_by(labelled)
    return source


def _with_drawn_labels(config: Config, source: sources.Source) -> tuple[sources.Source, list[str] | None]:
    """The training split of a run with the labels that it may see, and the names of a drawn labelled subset."""
    chosen = None
    # A student needs no labels. It takes over the choice of its teacher, which may have learnt from other images.
    if config.subset and (source.has_labels or config.train_mode != "distill"):
        chosen = draw_labelled(source, config.labels_per_class, config.label_fraction, config.label_seed)
        source = source.with_labels(chosen, only=config.train_mode in ("finetune", "supervised"))
    return source, chosen


def tfds_order(source: sources.Source) -> str:
    """The name of the order of a training set of a TensorFlow dataset, as for `TfdsSource.in_order`."""
    order = source.file_order if isinstance(source, sources.TfdsSource | sources.MemorySource) else None
    return "buffer" if order is None else "stripes" if isinstance(order, sources.Stripes) else "windows"


def draw_labelled(source: sources.Source, per_class: int, fraction: float, seed: int) -> list[str]:
    """A choice of labelled examples of `source`, as `choose_labelled` makes it.

    Where it is so small that a damaged image would weigh, the chosen images are opened, and others take the place of
    those that cannot be read. That depends on the images alone, so the choice is the same on every machine.

    Raises:
      UserError: as `choose_labelled`, and where images cannot be read.
    """
    while True:
        names, labels = source.index()
        chosen = choose_labelled(names, labels, per_class, fraction, seed, source.classes)
        if not isinstance(source, sources.FileSource) or len(chosen) > MAX_OPENED:
            return chosen
        drawn = set(chosen)
        checked = source.without_labels_of_unreadable(i for i, name in enumerate(names) if name in drawn)
        if checked is source:
            return chosen
        source = checked


def choose_labelled(
    names: Sequence[str],
    labels: np.ndarray,
    per_class: int = 0,
    fraction: float = 0.0,
    seed: int = 0,
    classes: Sequence[str] = (),
) -> list[str]:
    """A class-balanced choice of labelled examples, the same on every machine; a larger one contains a smaller.

    Args:
      names, labels: the examples, as from `Source.index`.
      per_class: how many of each class, or 0.
      fraction: which share of each class, rounded and at least one, where `per_class` is 0.
      seed: which choice.
      classes: the classes' names, for messages.

    Raises:
      UserError: where a class has too few labelled examples, or there is none.
    """
    by_class: dict[int, list[str]] = {label: [] for label in range(len(classes))}
    for i in sources.hash_order(names, seed):
        if labels[i] >= 0:
            by_class.setdefault(int(labels[i]), []).append(names[i])
    if not any(by_class.values()):
        raise UserError("--labels_per_class and --label_fraction need labels, and this split has none")
    scarce = min(by_class, key=lambda label: len(by_class[label]))
    if per_class > len(by_class[scarce]):
        name = classes[scarce] if classes else scarce
        raise UserError(f"--labels_per_class={per_class}: class {name} has only {len(by_class[scarce])} examples")
    chosen = []
    for label in sorted(by_class):
        members = by_class[label]
        wanted = per_class or max(1, round(fraction * len(members)))
        chosen += members[:wanted]
    return chosen


# The graphs of the streams hold no Python that depends on a tensor, so there is nothing for autograph to rewrite. That
# would take seconds.
@tf.autograph.experimental.do_not_convert
def train_stream(
    source: sources.Source,
    views: Mapping[str, augment.View],
    batch: int,
    seed: int,
    start_step: int = 0,
    context: tf.distribute.InputContext | None = None,
    compiled: bool = False,
    canvas: int = 0,
    part: tuple[int, int] | None = None,
) -> tf.data.Dataset:
    """The endless stream of training batches from `start_step` on.

    Args:
      source: what to read.
      views: how each view of an image is made, by the key it gets in the batch.
      batch: images in a global batch; the replicas take consecutive parts of it.
      seed: of order and augmentation.
      start_step: steps already taken.
      context: this worker's place among the workers.
      compiled: whether XLA compiles the views; see `augment.View.finish`.
      canvas: above 0: leave the views to the device; the images come on canvases with sides of so many pixels.
      part: (i, n): only part i of n of this worker's share, for all its replicas together.

    Returns:
      Batches of one replica's share: each view [n, size, size, 3] float32, `label` [n] int32, -1 unlabelled, and
      `answer` [n, classes] float32 where the source has answers. With a `canvas`, what `augment.of_canvases` takes in
      place of the views.
    """
    share = _share(batch, context)
    replicas = context.num_replicas_in_sync // context.num_input_pipelines if context else 1
    if part:
        share, replicas = share.part(*part), 1
    stream = source.stream(seed, start_step, share)

    def example(position: tf.Tensor, record: dict) -> dict:
        shown = source.with_image(record, replace=True)
        image = shown["image"]
        begun: dict[str, Any] = {}
        if canvas:
            image = augment.shrink(image, canvas)
            begun["canvas"] = augment.on_canvas(image, canvas)
        for number, (key, view) in enumerate(views.items()):
            own = tf.stack([tf.constant(2 * (seed * len(views) + number), tf.int64), position])  # of no other view
            begun[key] = view.begin_on_canvas(tf.shape(image), own) if canvas else view.begin(image, own)
        answer = {"answer": shown["answer"]} if "answer" in shown else {}
        return {**begun, "label": shown["label"], **answer}

    def finished(examples: dict) -> dict:
        made = {}
        for key, view in views.items():
            crops, draws = examples[key]
            made[key] = view.finish(crops, draws, compiled)
        return {**examples, **made}

    return _batched(stream, example, share.size // replicas, None if canvas else finished)


def batches(stream: Iterable) -> Iterator[Any]:
    """The batches of a stream, distributed or not.

    Raises:
      UserError: where an image can no longer be read, or cannot be decoded.
    """
    with strategy_lib.parallel_pipelines():
        iterator = iter(stream)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            mistake = re.search(r"(UserError|InvalidArgumentError): (.*)", error.message)  # of Python in the graph
            if mistake:
                what = "" if mistake[1] == "UserError" else "an image cannot be decoded: "
                raise UserError(what + mistake[2]) from error
            if "ReadFile" in error.message:
                raise UserError(f"an image cannot be read any more: {reason(error)}") from error
            if "DecodeImage" in error.message or "ExtractJpegShape" in error.message:
                raise UserError(f"an image cannot be decoded: {reason(error)}") from error
            raise
        yield batch


def patient_batches(source: sources.Source, make: Callable[[int], Iterable]) -> Iterator[Any]:
    """The batches of a stream over `source`. Where an image fails, the stream is made again to read more carefully.

    Reading carefully takes more time for every image, so it begins with the first image that fails.

    Args:
      source: what is read.
      make: gives the stream without its first so many batches, distributed or not.

    Raises:
      UserError: as `batches`.
    """
    taken = 0
    while True:
        try:
            for batch in batches(make(taken)):
                yield batch
                taken += 1
            return
        except UserError as error:
            failed_in_graph = isinstance(error.__cause__, tf.errors.OpError)
            if not (failed_in_graph and source.read_carefully()):
                raise


@tf.autograph.experimental.do_not_convert
def eval_stream(
    source: sources.Source,
    view: Callable[[tf.Tensor], tf.Tensor],
    batch: int,
    context: tf.distribute.InputContext | None = None,
    limit: int = 0,
    labelled_only: bool = False,
    start_batch: int = 0,
    any_order: bool = False,
) -> tf.data.Dataset:
    """One pass over a split, or over a draw from it; the last batch is filled up with examples whose `mask` is 0.

    The `mask` of an image that cannot be read is 0 too.

    A draw is the same on every machine and for any number of workers and replicas: all of them read the same stream
    of records, and the choice is made before any image is decoded.

    Args:
      source: what to read.
      view: the transform of each image.
      batch: images in a global batch; the replicas take consecutive parts of it.
      context: this worker's place among the workers.
      limit: at most so many examples, drawn at random where the split has more; 0: all, in their fixed order.
      labelled_only: leave out the examples without a label. A draw then takes as many of each class, at most
        ceil(limit / classes). The source must have classes.
      start_batch: how many global batches to leave out at the beginning.
      any_order: all examples of a split may come in another order than `Source.ordered`, which is fixed too. Of a
        TensorFlow dataset in enough files a worker then reads its own share alone.

    Returns:
      Batches of one replica's share: `image` [n, size, size, 3] float32, `label` [n] int32 and `mask` [n] float32.
    """
    share = _share(batch, context)

    def example(position: tf.Tensor, masked_record: tuple[dict, tf.Tensor]) -> dict:
        record, mask = masked_record
        shown = source.with_image(record, replace=False)
        mask *= tf.cast(shown["readable"], tf.float32)
        return {"image": view(shown["image"]), "label": shown["label"], "mask": mask}

    takes_all = not labelled_only and not 0 < limit < source.examples
    own = source.once(share) if any_order and takes_all and isinstance(source, sources.TfdsSource) else None
    if own:
        stream = own.skip(start_batch * share.size).enumerate()
    else:
        stream = _filled_up(source, limit, labelled_only, batch).skip(start_batch * batch).enumerate()
        if not share.is_all:
            stream = stream.filter(lambda position, masked_record: share.has(position))
    return _batched(stream, example, batch // (context.num_replicas_in_sync if context else 1))


def _filled_up(source: sources.Source, limit: int, labelled_only: bool, batch: int) -> tf.data.Dataset:
    """The records that `eval_stream` takes from `source`, each with 1.0, in whole batches: others with 0.0 fill up."""
    chosen = _evaluated(source, limit, labelled_only).map(lambda record: (record, 1.0))
    # How many labelled examples there are is known only at the end. `batch - 1` fillers complete the last batch.
    filling = source.ordered().take(1).cache().repeat(batch - 1).map(lambda record: (record, 0.0))
    return chosen.concatenate(filling).batch(batch, drop_remainder=True).unbatch()


def _evaluated(source: sources.Source, limit: int, labelled_only: bool) -> tf.data.Dataset:
    """The records that `eval_stream` takes from `source`, once each."""
    draws = 0 < limit < source.examples
    records = source.epoch(tf.constant(0, tf.int64), EVAL_SEED) if draws else source.ordered()
    if labelled_only:
        records = records.filter(lambda record: record["label"] >= 0)
        if draws:
            records = _at_most(records, len(source.classes), math.ceil(limit / len(source.classes)))
    return records.take(limit) if draws else records


def _at_most(records: tf.data.Dataset, classes: int, quota: int) -> tf.data.Dataset:
    """The first `quota` records of each class."""

    def count(taken: tf.Tensor, record: dict) -> tuple[tf.Tensor, tuple[dict, tf.Tensor]]:
        wanted = taken[record["label"]] < quota  # taken: [classes] records so far
        taken = tf.tensor_scatter_nd_add(taken, [[record["label"]]], [tf.cast(wanted, tf.int32)])
        return taken, (record, wanted)

    counted = records.scan(tf.zeros([classes], tf.int32), count)
    kept = counted.filter(lambda record, wanted: wanted)
    return kept.map(lambda record, wanted: record)


def _share(batch: int, context: tf.distribute.InputContext | None) -> sources.Share:
    """The places of each global batch that this worker fills: the workers take consecutive parts of one size."""
    context = context or tf.distribute.InputContext()
    size = batch // context.num_input_pipelines
    begin = context.input_pipeline_id * size
    return sources.Share(batch, begin, begin + size)


def _batched(
    stream: tf.data.Dataset,
    example: Callable,
    size: int,
    finished: Callable[[dict], dict] | None = None,
) -> tf.data.Dataset:
    """Batches of `size` examples, which `example` makes of the (position, record) of the stream.

    With `finished`, some examples at a time are batched and given to it; a batch consists of what it returns.
    """
    examples = stream.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    if finished:
        values = max(spec.shape.num_elements() or 1 for spec in tf.nest.flatten(examples.element_spec))
        part = examples_at_once(size, values)
        parts = examples.batch(part, drop_remainder=True)
        parts = parts.map(finished, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        joined = parts.batch(size // part, drop_remainder=True)  # [parts, part, ...]

        def flat(values: tf.Tensor) -> tf.Tensor:
            shape = tf.concat([[size], tf.shape(values)[2:]], axis=0)  # [n, ...]
            return tf.ensure_shape(tf.reshape(values, shape), [size, *values.shape[2:]])

        return joined.map(lambda batch: tf.nest.map_structure(flat, batch)).prefetch(tf.data.AUTOTUNE)
    return examples.batch(size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def examples_at_once(share: int, values: int) -> int:
    """How many examples of a batch are finished together.

    It is a divisor of `share`, so that the parts of a batch begin with it, whatever step a stream starts at. More are
    faster for small images; for large ones they would not stay in the processor's cache, and take memory.

    Args:
      share: examples in a batch, or in a replica's share of it.
      values: numbers in an image.
    """
    wanted = max(1, min(share, VALUES_AT_ONCE // values))
    divisor = next(d for d in range(wanted, 0, -1) if share % d == 0)
    return divisor if 4 * divisor >= wanted else share
