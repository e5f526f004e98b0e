"""How fast training is beside the plain way to write it: the views beside tf.image, the step beside Keras's layers.

    make bench
    python benchmarks/speed.py --only=views_224,step_50
    python benchmarks/speed.py --only=distill_50,cached_50 --time=processor
    python benchmarks/speed.py --only=torch_step_18,torch_views_224 --rivals=PYTHON

Ours and the plain way take turns in one process, so that a machine with other work slows both. Each turn gives a
ratio; the table has the median of the ratios, and the quartiles as their noise. The exit status is 1 where the upper
quartile is below the floor, which stands in `CASES`: then something has become slower. With --time=processor the speed
is that of the processor time of all threads, which is the same on a busy machine; what waits costs nothing then.

The plain pipeline is the one that people write first: each image alone, with tf.image's stateful operators, as tf.data
runs them in parallel, without a blur. The plain step is the same network with `keras.layers.BatchNormalization`, the
same loss in its plainest form, and Keras's SGD. Features are beside `Model.predict` of that network. A distillation
step is beside a supervised step of the same network, and its teacher has the student's architecture.
Cases whose names begin with `torch` or `gpu` compare with PyTorch and torchvision, which PYTHON must have; there the
other way runs in a process of its own (`rivals.py`). Those of `gpu` need one, and TF_FORCE_GPU_ALLOW_GROWTH=true, since
both work on it; there `half` is bfloat16, PyTorch's by autocast, and `xla` is --jit_compile.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine

with engine.quiet_import():
    import tensorflow as tf

import keras
import numpy as np
from sklearn.datasets import load_sample_images

import augment
import data
import model as model_lib
import resnet
import sources
import subject
import tasks
import train
from config import Config

TAU = 0.1
PHOTOGRAPH = (375, 500)  # height and width of ImageNet's usual photograph


class Work(NamedTuple):
    """Something to time: `run` does a part of it, which is of so many images."""

    run: Callable[[], object]
    images: int


class Case(NamedTuple):
    """What is compared: its words, the two ways of doing it, and the least ratio of their speeds that is allowed."""

    words: str
    ours: Callable[[], Work]
    plain: Callable[[], Work]
    floor: float


def photographs() -> list[bytes]:
    """Two photographs, as JPEG."""
    resized = [tf.cast(tf.image.resize(photo, PHOTOGRAPH), tf.uint8) for photo in load_sample_images().images]
    return [tf.io.encode_jpeg(photo, quality=90).numpy() for photo in resized]


def small_images() -> np.ndarray:
    """2,000 images of 32 pixels: parts of the photographs."""
    photos = load_sample_images().images
    random = np.random.default_rng(0)
    corners = random.integers(0, [photos[0].shape[0] - 32, photos[0].shape[1] - 32], [2000, 2])
    return np.stack([photos[i % 2][y : y + 32, x : x + 32] for i, (y, x) in enumerate(corners)])


def our_views(records: Sequence | np.ndarray, decode: Callable, size: int, batch: int, blur: bool) -> Work:
    """Two views of each image, as training makes them."""
    records = np.array(records, object) if isinstance(records[0], bytes) else np.asarray(records)
    names = [str(i) for i in range(len(records))]
    source = sources.MemorySource(records, np.full(len(records), -1, np.int32), names, [], decode)
    view = augment.pretrain_view(size, blur=blur)
    stream = data.train_stream(source, {"view_1": view, "view_2": view}, batch, seed=0, compiled=True)
    return Work(iter(stream).__next__, batch)


def plain_view(image: tf.Tensor, size: int) -> tf.Tensor:
    """A view without blur, by tf.image's stateful operators."""
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.shape(image), tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), min_object_covered=0.1,
        aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0), max_attempts=100,
    )  # fmt: skip
    image = tf.image.resize(tf.slice(image, begin, extent), [size, size], "bicubic")
    image = tf.image.random_flip_left_right(image)
    changes = [
        lambda x: x * tf.random.uniform([], 0.2, 1.8),
        lambda x: tf.image.random_contrast(x, 0.2, 1.8),
        lambda x: tf.image.random_saturation(x, 0.2, 1.8),
        lambda x: tf.image.random_hue(x, 0.2),
    ]

    def jittered() -> tf.Tensor:
        order, x = tf.random.shuffle(tf.range(4)), image
        for i in range(4):
            x = tf.switch_case(order[i], [lambda x=x, change=change: change(x) for change in changes])
            x = tf.clip_by_value(x, 0.0, 1.0)
        return x

    def grey(x: tf.Tensor) -> tf.Tensor:
        return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(x))

    x = tf.cond(tf.random.uniform([]) < 0.8, jittered, lambda: image)
    made = tf.cond(tf.random.uniform([]) < 0.2, lambda: grey(x), lambda: x)
    return tf.clip_by_value(tf.ensure_shape(made, [size, size, 3]), 0.0, 1.0)


def plain_views(records: Sequence | np.ndarray, decode: Callable, size: int, batch: int) -> Work:
    """Two views of each image, the plain way."""

    def two_views(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.image.convert_image_dtype(decode(record), tf.float32)
        return plain_view(image, size), plain_view(image, size)

    stream = tf.data.Dataset.from_tensor_slices(records).repeat().map(two_views, num_parallel_calls=tf.data.AUTOTUNE)
    return Work(iter(stream.batch(batch).prefetch(2)).__next__, batch)


def our_step(depth: int, size: int, batch: int, half: bool = False, xla: bool = False) -> Work:
    """A step of pretraining without the memory."""
    config = subject.resolve({
        "train_mode": "pretrain", "recipe": "paper", "memory": "none", "image_size": size, "resnet_depth": depth,
        "width_multiplier": 1.0, "train_batch_size": batch, "optimizer": "momentum", "temperature": TAU,
        "lineareval_while_pretraining": False, "weight_decay": 0.0, "model_dir": "unused", "jit_compile": xla,
        "mixed_precision": "bfloat16" if half else "float32",
    })  # fmt: skip
    task = tasks.make_task(config, [])
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(task.model.trainable_variables)
    step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
    view_1, view_2 = two_batches(size, batch)
    inputs = {"view_1": view_1, "view_2": view_2, "label": tf.fill([batch], -1)}
    return Work(lambda: step(inputs)["loss"].numpy(), batch)


def plain_step(depth: int, size: int, batch: int) -> Work:
    """The same step with the layers and the optimizer of Keras."""
    with mock.patch.object(resnet, "BatchNorm", keras.layers.BatchNormalization):
        encoder = resnet.resnet(depth, cifar_stem=size <= 32, image_size=size)
        head = model_lib.projection_head(encoder.output["final_avg_pool"].shape[-1])
    assert head
    variables = encoder.trainable_variables + head.trainable_variables
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(variables)
    images = tf.concat(two_batches(size, batch), axis=0)
    positive = tf.concat([tf.range(batch, 2 * batch), tf.range(batch)], axis=0)

    @tf.function(autograph=False)
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            h = encoder(images, training=True)["final_avg_pool"]
            z = tf.math.l2_normalize(head(h, training=True)["proj_head_3"], axis=1)
            logits = tf.linalg.set_diag(tf.matmul(z, z, transpose_b=True) / TAU, tf.fill([2 * batch], -1e9))
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(positive, logits))
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    return Work(lambda: step().numpy(), batch)


def our_features(depth: int, width: float, size: int, batch: int) -> Work:
    """h of a batch, as evaluation computes it."""
    inference = model_lib.Model(resnet.resnet(depth, width, cifar_stem=size <= 32, image_size=size), None).inference()
    images, _ = two_batches(size, batch)
    features = tf.function(lambda: inference(images).h, autograph=False)
    return Work(lambda: features().numpy(), batch)


def plain_features(depth: int, width: float, size: int, batch: int) -> Work:
    """The same with the layers of Keras, and its `predict`."""
    with mock.patch.object(resnet, "BatchNorm", keras.layers.BatchNormalization):
        encoder = resnet.resnet(depth, width, cifar_stem=size <= 32, image_size=size)
    network = keras.Model(encoder.input, encoder.output["final_avg_pool"])
    images = two_batches(size, batch)[0].numpy()
    return Work(lambda: network.predict(images, batch_size=batch, verbose=0), batch)


def labelled_step(
    depth: int, width: float, size: int, batch: int, train_mode: str, cache_teacher: bool = False
) -> Work:
    """A step of distillation or of supervised training."""
    classes = [str(i) for i in range(10)]
    config = Config(
        train_mode=train_mode, image_size=size, resnet_depth=depth, width_multiplier=width, train_batch_size=batch,
        optimizer="momentum", weight_decay=0.0, model_dir="unused", teacher="-" if train_mode == "distill" else "",
        cache_teacher=cache_teacher,
    )  # fmt: skip
    teacher = None
    if train_mode == "distill" and not cache_teacher:
        inference = tasks.network(config, len(classes)).inference()

        def teacher(images: tf.Tensor) -> tf.Tensor:
            return inference(images).logits

    task = tasks.make_task(config, classes, teacher)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(task.model.trainable_variables)
    step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
    inputs = {"image": two_batches(size, batch)[0], "label": tf.zeros([batch], tf.int32)}
    inputs["answer"] = tf.zeros([batch, len(classes)])
    return Work(lambda: step(inputs)["loss"].numpy(), batch)


def two_batches(size: int, batch: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Random images, twice [batch, size, size, 3]."""
    shape = [batch, size, size, 3]
    return tf.random.stateless_uniform(shape, [0, 0]), tf.random.stateless_uniform(shape, [0, 1])


def views(records: Callable[[], Sequence | np.ndarray], decode: Callable, size: int, batch: int, blur: bool) -> tuple:
    return (
        lambda: our_views(records(), decode, size, batch, blur),
        lambda: plain_views(records(), decode, size, batch),
    )


def steps(depth: int, size: int, batch: int) -> tuple:
    return lambda: our_step(depth, size, batch), lambda: plain_step(depth, size, batch)


def rival(*work: object) -> Work:
    """What `rivals.py` does in the Python of --rivals, a part of it for each call."""
    command = [RIVALS[0], str(ROOT / "benchmarks" / "rivals.py"), *map(str, work)]
    # A thread of OpenMP that waits would take a core from ours.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    asked, answers = process.stdin, process.stdout
    assert asked and answers
    images = answers.readline()
    if not images:
        raise SystemExit(f"the rival did not start: {' '.join(command)}")

    def run() -> None:
        asked.write("\n")
        asked.flush()
        if not answers.readline():
            raise SystemExit(f"the rival has ended: {' '.join(command)}")

    return Work(run, int(images))


def rivals(ours: Callable[[], Work], *work: object) -> tuple:
    return ours, lambda: rival(*work)


def gpu_cases() -> dict[str, Case]:
    """Pretraining steps on a GPU, beside PyTorch's."""
    made = {}
    for depth, size, batch in ((18, 32, 512), (50, 224, 128)):
        for half, xla in itertools.product((False, True), (False, True)):
            kinds = [name for name, is_on in (("half", half), ("xla", xla)) if is_on]
            words = ", ".join([f"pretraining step, ResNet-{depth}, {size} pixels, batch {batch}", *kinds])
            ours = functools.partial(our_step, depth, size, batch, half, xla)
            theirs = ("step", depth, size, batch, "half" if half else "float32")
            # An H100 had 0.47 to 0.67 without XLA.
            made["_".join(["gpu_step", str(depth), *kinds])] = Case(f"{words}; PyTorch", *rivals(ours, *theirs), 0.4)
    return made


def features(depth: int, width: float, size: int, batch: int) -> tuple:
    return lambda: our_features(depth, width, size, batch), lambda: plain_features(depth, width, size, batch)


def distillation(depth: int, width: float, size: int, batch: int, cache_teacher: bool) -> tuple:
    return (
        lambda: labelled_step(depth, width, size, batch, "distill", cache_teacher),
        lambda: labelled_step(depth, width, size, batch, "supervised"),
    )


CASES = {
    "views_32": Case(
        "two views of an image of 32 pixels in memory, with blur", *views(small_images, lambda x: x, 32, 256, True), 1.2
    ),
    "views_224": Case(
        "JPEG of 500 x 375 to two views of 224 pixels, with blur",
        *views(photographs, sources.decode_image, 224, 16, True), 1.0,
    ),
    "views_224_no_blur": Case(
        "the same without blur", *views(photographs, sources.decode_image, 224, 16, False), 1.2
    ),
    "step_18": Case("pretraining step, ResNet-18, 32 pixels, batch 64", *steps(18, 32, 64), 0.8),
    "step_50": Case("pretraining step, ResNet-50, 224 pixels, batch 8", *steps(50, 224, 8), 0.8),
    "torch_step_18": Case(
        "pretraining step, ResNet-18, 32 pixels, batch 64; PyTorch",
        *rivals(lambda: our_step(18, 32, 64), "step", 18, 32, 64), 0.8,
    ),
    "torch_step_50": Case(
        "pretraining step, ResNet-50, 224 pixels, batch 8; PyTorch",
        *rivals(lambda: our_step(50, 224, 8), "step", 50, 224, 8), 0.8,
    ),
    "torch_views_224": Case(
        "JPEG of 500 x 375 to two views of 224 pixels, with blur; torchvision on Pillow, two processes",
        *rivals(lambda: our_views(photographs(), sources.decode_image, 224, 16, True), "views", "pillow"), 1.5,
    ),
    "torch_views_224_v2": Case(
        "the same; torchvision.transforms.v2 on tensors, two processes",
        *rivals(lambda: our_views(photographs(), sources.decode_image, 224, 16, True), "views", "tensors"), 1.0,
    ),
    "features_18": Case(
        "features of ResNet-18 at a quarter of its width, 32 pixels, batch 256", *features(18, 0.25, 32, 256), 1.0
    ),
    "features_50": Case("features of ResNet-50, 224 pixels, batch 8", *features(50, 1.0, 224, 8), 1.0),
    "distill_18": Case(
        "distillation step beside a supervised one, ResNet-18 at a quarter of its width, 32 pixels, batch 128",
        *distillation(18, 0.25, 32, 128, False), 0.7,
    ),
    "cached_18": Case("the same with --cache_teacher", *distillation(18, 0.25, 32, 128, True), 0.9),
    "distill_50": Case(
        "distillation step beside a supervised one, ResNet-50, 224 pixels, batch 8",
        *distillation(50, 1.0, 224, 8, False), 0.7,
    ),
    "cached_50": Case("the same with --cache_teacher", *distillation(50, 1.0, 224, 8, True), 0.9),
    **gpu_cases(),
}  # fmt: skip
QUICK = ("views_32", "views_224", "step_18", "features_18", "distill_18", "cached_18")
TIMES = {"clock": time.perf_counter, "processor": time.process_time}
RIVALS = [sys.executable]  # the Python that has PyTorch


def images_per_second(work: Work, seconds: float, now: Callable[[], float] = time.perf_counter) -> float:
    """The speed over at least so many seconds of the time that `now` tells."""
    work.run()  # Perhaps it was prepared while the other way was timed.
    begin = now()
    for count in itertools.count(1):
        work.run()
        passed = now() - begin
        if passed >= seconds:
            return count * work.images / passed
    raise AssertionError


def turns(case: Case, rounds: int, seconds: float, now: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """The speeds of ours and of the plain way, in turns."""
    ours, plain = case.ours(), case.plain()
    for work in (ours, plain):
        for _ in range(4):
            work.run()  # The first times, graphs are traced and compiled, and the parallel calls are tuned.
    for _ in range(rounds):
        yield images_per_second(ours, seconds, now), images_per_second(plain, seconds, now)


def main(arguments: Sequence[str]) -> int:
    """Measures, and prints the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(QUICK), help=f"which of {','.join(CASES)}; default: %(default)s")
    parser.add_argument("--rivals", default=sys.executable, help="the Python of rivals.py; default: this one")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each turn; default: %(default)s")
    parser.add_argument("--time", choices=TIMES, default="clock", help="which time counts; default: %(default)s")
    given = parser.parse_args(arguments)
    RIVALS[0] = given.rivals
    names = given.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--only={given.only}: there is no {', '.join(unknown)}; choose from {', '.join(CASES)}")
    if given.time != "clock" and (elsewhere := [name for name in names if name.startswith(("torch", "gpu"))]):
        parser.error(f"--time={given.time}: {', '.join(elsewhere)} run in another process: use the clock")
    print("| what | ours, images/s | plain, images/s | ratio | quartiles | floor |\n" + "| --- " * 6 + "|", flush=True)
    slow = []
    for name in names:
        case = CASES[name]
        speeds = list(turns(case, given.rounds, given.seconds, TIMES[given.time]))
        ratios = [ours / plain for ours, plain in speeds]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        ours, plain = (statistics.median(of_one) for of_one in zip(*speeds, strict=True))
        print(
            f"| {case.words} | {ours:,.0f} | {plain:,.0f} | {middle:.2f} | {low:.2f} to {high:.2f} | {case.floor} |",
            flush=True,
        )
        if high < case.floor:
            slow.append(name)
    if slow:
        print(f"slower than the floor: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
