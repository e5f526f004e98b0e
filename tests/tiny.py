"""What the tests share: small sources and streams, images on disk, tiny runs, and what those leave behind."""

import contextlib
import itertools
import resource
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_digits

import architecture
import augment
import checkpoint
import data
import evaluate
import export
import preparation
import sources
import strategy as strategy_lib
import subject
import train

NETWORK = dict(resnet_depth=10, width_multiplier=0.125)
QUICK = dict(
    train_batch_size=16, eval_batch_size=128, warmup_epochs=0.0, checkpoint_steps=100, summary_steps=1,
    optimizer="lars", learning_rate=0.3,
)  # fmt: skip
# Without changes of colour, whose graphs take a fifth of the time of such a run to trace. Batch norm's averages settle
# in three steps.
PRETRAIN = dict(
    NETWORK, **QUICK, train_mode="pretrain", memory="queue", memory_size=48, eval_every_epochs=-1.0,
    color_jitter_strength=0.0, grayscale_probability=0.0, batch_norm_decay=0.1,
)  # fmt: skip
SUPERVISED = dict(NETWORK, **QUICK, train_mode="supervised")
IN_COLOUR = dict(PRETRAIN, color_jitter_strength=0.8, grayscale_probability=0.2)


def numbered(count, classes=3):
    """A source whose image i is filled with the value i."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones([1, 4, 4, 3], np.uint8)
    labels = np.arange(count, dtype=np.int32) % classes
    names = [f"image {i}" for i in range(count)]
    return sources.MemorySource(images, labels, names, [str(c) for c in range(classes)], lambda image: image)


def as_is(image, seed=None):
    return tf.cast(image, tf.float32)


def as_is_at(height, width):
    """A view for images that are all of this size."""

    def view(image, seed=None):
        return tf.image.pad_to_bounding_box(tf.cast(image, tf.float32), 0, 0, height, width)

    return view


def in_order(source):
    """Every (image, label) of a source in its fixed order."""
    return [(source.decode(example["record"]).numpy(), int(example["label"])) for example in source.ordered()]


def taken(stream, batches):
    """The first batches of a stream, as lists by key."""
    made = list(stream.take(batches).as_numpy_iterator())
    return {key: [batch[key] for batch in made] for key in made[0]}


def random_stream(source, batch=8, seed=0, start_step=0, context=None, view=None):
    """Two random views of each image; cheap ones, unless told otherwise."""
    view = view or augment.crop_and_flip(16)
    return data.train_stream(source, {"view_1": view, "view_2": view}, batch, seed, start_step, context)


def write_image(path, pixels, mode="RGB", **options):
    """Writes uint8 `pixels` as the kind of image that the suffix of `path` says; makes the folders above."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).convert(mode).save(path, **options)
    return path


def noise(seed, height=12, width=10):
    """[height, width, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, [height, width, 3], np.uint8)


def folder_of(root, *paths):
    """A folder with an image of noise at each path."""
    for seed, path in enumerate(paths):
        write_image(root / path, noise(seed))
    return str(root)


def coloured_images(folder, per_class):
    """Writes reddish images into folder/a red/ and bluish ones into folder/b blue/, which comes after it."""
    for name, channel in (("a red", 0), ("b blue", 2)):
        for i in range(per_class):
            pixels = noise(i, 16, 16) // 6
            pixels[..., channel] += 200
            write_image(Path(folder) / name / f"{i}.png", pixels)


def coloured_splits(root):
    """Writes 30 coloured images of two classes into root/images/train, and 4 into root/images/test."""
    coloured_images(root / "images" / "train", 15)
    coloured_images(root / "images" / "test", 2)


@contextlib.contextmanager
def full_disk(free):
    """Within it, no file of this process gets longer than `free` bytes: writing on fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def digit_images(split, count, labelled=True):
    """Writes 3 x `count` digits 0 to 2, as PNG and JPEG by turns, into split/<class>/, or all into split/deep/er/."""
    bunch = load_digits()
    for digit in range(3):
        for i, index in enumerate(np.flatnonzero(bunch.target == digit)[:count]):
            pixels = np.kron(bunch.images[index] * (255 / 16), np.ones([3, 3]))
            folder = Path(split) / (f"digit {digit}" if labelled else "deep/er")
            write_image(folder / f"{digit}_{i}.{('png', 'jpg')[i % 2]}", pixels)


def resolve(**given):
    """The config of a command, as the command line resolves it."""
    return subject.decide(given).config


def train_run(strategy=None, **given):
    """Trains as the flags `given` say, on one device unless told otherwise. Returns the subject."""
    decided = subject.decide(given)
    if decided.config.deterministic:
        strategy_lib.make_deterministic()
    train.train(decided.config, strategy or tf.distribute.get_strategy(), decided.recipe_reasons)
    return decided


class Killed(BaseException):
    """Ends a run on the spot, as kill -9 would: no code of the run handles it."""


def killed_run(steps, **given):
    """Trains as the flags `given` say, until the process "is killed" when it has taken so many steps."""

    def make_step_that_kills(*arguments, **more):
        step, taken = make_train_step(*arguments, **more), itertools.count()

        def step_that_kills(batch):
            if next(taken) == steps:
                raise Killed
            return step(batch)

        return step_that_kills

    make_train_step = train.make_train_step
    train.make_train_step = make_step_that_kills
    try:
        train_run(**given)
    except Killed:
        return
    finally:
        train.make_train_step = make_train_step
    raise AssertionError(f"the run ended before it had taken {steps} steps")


def begun(**given):
    """Leaves the run that the flags mean at step 0 in its model_dir. That is quick, since no step is traced."""
    config = subject.decide(given).config
    run = preparation.prepare(config, tf.distribute.get_strategy())
    preparation.write_description(config, run)
    run.checkpoints.save()
    run.checkpoints.finish()
    return config.model_dir


def evaluated(decided, strategy=None):
    """Evaluates a subject and writes the result, as the command line does. Returns the result."""
    config = decided.config
    result = evaluate.evaluate(config, strategy or tf.distribute.get_strategy(), decided.open(), decided.of_run)
    evaluate.write_result(config, result)
    return result


def exported(decided):
    """Exports a subject as the command line does. Returns the folder."""
    return export.export(decided.config, decided.open())


def pretrained(factory, name="pretrained", steps=3, **more):
    """The model_dir of a few steps of pretraining on the digits, made once a session. Only to be read."""
    model_dir = factory.getbasetemp() / f"{name}_{len(architecture.BLOCKS[10][1])}"
    if not (model_dir / "checkpoint").exists():
        train_run(**PRETRAIN, **more, model_dir=str(model_dir), train_steps=steps)
    return str(model_dir)


def pretrained_without_classifier(factory):
    """The model_dir of a pretraining run without linear evaluation, at step 0. Only to be read."""
    model_dir = factory.getbasetemp() / f"without_classifier_{len(architecture.BLOCKS[10][1])}"
    if not (model_dir / "checkpoint").exists():
        begun(**PRETRAIN, lineareval_while_pretraining=False, train_steps=1, model_dir=str(model_dir))
    return str(model_dir)


def saved_values(path):
    """Every array of the newest checkpoint in `path`, by its key."""
    weights = checkpoint.Weights(str(path))
    reader = tf.train.load_checkpoint(weights.prefix)
    values = {key: reader.get_tensor(key) for key in weights.shapes}
    return {key: value for key, value in values.items() if isinstance(value, np.ndarray | np.number)}


def files_in(folder):
    """Every file under `folder` with its content, every folder with None."""
    paths = Path(folder).rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def borrow(model_dir, folder):
    """A copy of a run in `folder`, to write into. Returns its model_dir."""
    return str(shutil.copytree(model_dir, folder))
