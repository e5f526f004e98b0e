"""Streams: every example once an epoch, the same for any start and any number of workers; and labelled subsets."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
import tiny
from tensorflow.python.framework import config as tf_config

import augment
import data
import sources
from errors import UserError


def visited(source, batches, batch, seed=0, start_step=0):
    """The numbers of the images that a training stream of `numbered` visits."""
    stream = data.train_stream(source, {"image": augment.View(tiny.as_is)}, batch, seed, start_step)
    return np.concatenate(tiny.taken(stream, batches)["image"])[:, 0, 0, 0].astype(int).tolist()


# Training stream


def test_training_visits_every_example_once_an_epoch_in_another_order():
    order = visited(tiny.numbered(10), batches=5, batch=4)
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != sorted(first)


def test_training_order_follows_the_seed():
    source = tiny.numbered(30)
    assert visited(source, 3, 10, seed=1) == visited(source, 3, 10, seed=1)
    assert visited(source, 3, 10, seed=1) != visited(source, 3, 10, seed=2)


def test_a_batch_larger_than_the_data_goes_on_with_the_next_epoch():
    order = visited(tiny.numbered(3), batches=1, batch=9)
    assert [sorted(order[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3


def test_training_labels_belong_to_their_images():
    stream = data.train_stream(tiny.numbered(10), {"image": augment.View(tiny.as_is)}, 5, seed=0)
    batches = tiny.taken(stream, 4)
    images, labels = np.concatenate(batches["image"]), np.concatenate(batches["label"])
    np.testing.assert_array_equal(images[:, 0, 0, 0] % 3, labels)


def noisy(count=20):
    images = np.stack([tiny.noise(i, 30, 30) for i in range(count)])
    names = [str(i) for i in range(count)]
    return sources.MemorySource(images, np.arange(count, dtype=np.int32), names, names, lambda image: image)


@pytest.mark.parametrize(("step", "view"), [(1, None), (3, augment.pretrain_view(24)), (7, None)])
def test_a_stream_that_starts_later_equals_one_that_skipped_there_images_too(step, view):
    whole = tiny.taken(tiny.random_stream(noisy(), view=view), step + 3)
    late = tiny.taken(tiny.random_stream(noisy(), start_step=step, view=view), 3)
    for key in ("view_1", "view_2", "label"):
        np.testing.assert_array_equal(np.stack(whole[key][step:]), np.stack(late[key]))


def test_two_views_of_an_image_differ_and_so_do_two_epochs_and_two_seeds():
    one = sources.MemorySource(tiny.noise(0, 30, 30)[None], np.zeros(1, np.int32), ["0"], ["0"], lambda image: image)
    batches = tiny.taken(tiny.random_stream(one, batch=1), 2)
    other_seed = tiny.taken(tiny.random_stream(one, batch=1, seed=1), 1)
    made = [*batches["view_1"], *batches["view_2"], *other_seed["view_1"]]
    for i, view in enumerate(made):
        assert all(np.abs(view - other).max() > 0.01 for other in made[:i])


@pytest.mark.parametrize(("workers", "replicas"), [(2, 2), (4, 4), (2, 4), (1, 2)])
def test_the_shares_of_all_workers_and_replicas_make_up_the_global_batch(workers, replicas):
    single = tiny.taken(tiny.random_stream(noisy()), 6)
    per_worker = replicas // workers
    shares = []
    for worker in range(workers):
        context = tf.distribute.InputContext(workers, worker, replicas)
        shares.append(tiny.taken(tiny.random_stream(noisy(), context=context), 6 * per_worker))
    for key, batches in single.items():
        for step, batch in enumerate(batches):
            parts = [part for share in shares for part in share[key][step * per_worker : (step + 1) * per_worker]]
            assert {len(part) for part in parts} == {8 // replicas}
            np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_a_worker_reads_no_file_of_another_worker(tmp_path):
    root = tiny.folder_of(tmp_path, *(f"train/all/{i}.png" for i in range(12)))
    source = sources.load("image_folder", "train", root)
    view = {"image": augment.View(tiny.as_is_at(12, 10))}

    def shown(workers, worker):
        context = tf.distribute.InputContext(workers, worker, workers)
        return np.concatenate(tiny.taken(data.train_stream(source, view, 6, 0, 0, context), 2)["image"])  # an epoch

    alone = shown(1, 0)
    for worker in range(3):
        own = np.concatenate([alone[2 * worker : 2 * worker + 2], alone[6 + 2 * worker : 8 + 2 * worker]])
        others = [
            tmp_path / "train" / "all" / f"{i}.png"
            for i in range(12)
            if not any(np.array_equal(tiny.as_is(tiny.noise(i)), image) for image in own)
        ]
        assert len(others) == 8
        for path in others:
            path.rename(tmp_path / path.name)
        np.testing.assert_array_equal(shown(3, worker), own)
        for path in others:
            (tmp_path / path.name).rename(path)


@pytest.mark.slow
def test_more_records_in_memory_than_a_graph_can_hold_are_streamed():
    large = dataclasses.replace(tiny.numbered(4), records=np.zeros([4, 600_000_000], np.uint8))  # 2.4 GB
    batch = next(
        data.train_stream(large, {"image": augment.View(lambda image, seed: image[:5])}, 3, 0).as_numpy_iterator()
    )
    assert batch["image"].shape == (3, 5)


def test_the_device_makes_the_views_that_the_host_would_make():
    views = {"view_1": augment.pretrain_view(24), "view_2": augment.crop_and_flip(24)}
    on_host = tiny.taken(data.train_stream(noisy(), views, 8, seed=0), 3)
    for step, batch in enumerate(data.train_stream(noisy(), views, 8, seed=0, canvas=64).take(3)):
        assert batch["canvas"].dtype == tf.uint8 and batch["canvas"].shape == (8, 64, 64, 3)
        made = augment.of_canvases(batch, views)
        assert set(made) == {"view_1", "view_2", "label"}
        for key in made:
            np.testing.assert_allclose(made[key], on_host[key][step], atol=2e-5)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("float32", 1e-3),
        pytest.param("bfloat16", 1e-2, marks=pytest.mark.slow),
        pytest.param("float16", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_device_makes_the_views_trains_as_one_whose_host_makes_them(
    tmp_path, one_stage, precision, tolerance
):
    given = dict(tiny.IN_COLOUR, train_split="train[:40]", image_size=24, train_steps=3, deterministic=True)
    given |= dict(mixed_precision=precision)
    tiny.train_run(**given, augment_on="host", model_dir=str(tmp_path / "host"))
    tiny.train_run(**given, augment_on="device", steps_per_call=2, model_dir=str(tmp_path / "device"))
    tf_config.disable_op_determinism()
    on_host, on_device = tiny.saved_values(tmp_path / "host"), tiny.saved_values(tmp_path / "device")
    assert on_host.keys() == on_device.keys()
    for name, values in on_host.items():
        np.testing.assert_allclose(values, on_device[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_compiled_streams_are_those_that_are_not():
    views = {"view_1": augment.pretrain_view(24), "view_2": augment.crop_and_flip(24)}
    batch, compiled = (
        next(data.train_stream(noisy(), views, 8, 0, compiled=compiled).as_numpy_iterator())
        for compiled in (False, True)
    )
    for key in batch:
        np.testing.assert_allclose(batch[key], compiled[key], atol=1e-5)


@pytest.mark.parametrize(
    ("share", "values", "at_once"),
    [
        (256, 3 * 32 * 32, 256),
        (4096, 3 * 32 * 32, 512),
        (64, 3 * 224 * 224, 8),
        (50, 3 * 224 * 224, 10),
        (97, 3 * 224 * 224, 97),
        (7, 10**9, 1),
    ],
)
def test_parts_of_a_batch_are_small_and_begin_with_it(share, values, at_once):
    assert data.examples_at_once(share, values) == at_once


# Evaluation stream


@pytest.mark.parametrize("batch", [1, 3, 5, 10, 64])
def test_evaluation_gives_each_example_once_for_any_batch_size(batch):
    batches = list(data.eval_stream(tiny.numbered(10), tiny.as_is, batch).as_numpy_iterator())
    assert {len(b["mask"]) for b in batches} == {batch}
    images, labels, mask = (np.concatenate([b[key] for b in batches]) for key in ("image", "label", "mask"))
    assert images[mask > 0][:, 0, 0, 0].astype(int).tolist() == list(range(10))
    assert labels[mask > 0].tolist() == [i % 3 for i in range(10)]
    assert len(mask) - mask.sum() < batch


@pytest.mark.parametrize("workers", [2, 4])
def test_evaluation_over_several_workers_gives_each_example_once(workers):
    seen = []
    for worker in range(workers):
        context = tf.distribute.InputContext(workers, worker, workers)
        for batch in data.eval_stream(tiny.numbered(10), tiny.as_is, 8, context).as_numpy_iterator():
            assert len(batch["mask"]) == 8 // workers
            seen += batch["image"][batch["mask"] > 0][:, 0, 0, 0].astype(int).tolist()
    assert sorted(seen) == list(range(10))


# Labelled subsets


def many(sizes):
    """Names and labels of classes of these sizes."""
    labels = np.concatenate([np.full(size, label, np.int32) for label, size in enumerate(sizes)])
    return [f"folder/{i}.png" for i in range(len(labels))], labels


def labels_of(chosen, names, labels):
    of = dict(zip(names, labels.tolist(), strict=True))
    return [of[name] for name in chosen]


def test_a_choice_of_labels_is_balanced_and_without_repeats():
    names, labels = many([10, 20, 30])
    chosen = data.choose_labelled(names, labels, per_class=4)
    assert sorted(labels_of(chosen, names, labels)) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(chosen)) == 12


def test_a_larger_choice_contains_a_smaller():
    names, labels = many([50, 40, 30])
    per_class = [set(data.choose_labelled(names, labels, per_class=k)) for k in (1, 4, 25)]
    fraction = [set(data.choose_labelled(names, labels, fraction=f)) for f in (0.01, 0.1, 0.5, 1.0)]
    for chosen in (per_class, fraction):
        assert all(small < large for small, large in itertools.pairwise(chosen))
    assert fraction[-1] == set(names)


def test_a_choice_does_not_depend_on_the_order_of_the_listing():
    names, labels = many([20, 20])
    order = np.random.default_rng(0).permutation(40)
    again = data.choose_labelled([names[i] for i in order], labels[order], per_class=5)
    assert again == data.choose_labelled(names, labels, per_class=5)


def test_a_choice_follows_its_seed_and_is_the_same_on_every_machine():
    source = sources.load("digits", "train")
    choices = {seed: data.choose_labelled(*source.index(), per_class=1, seed=seed) for seed in range(5)}
    assert len({tuple(chosen) for chosen in choices.values()}) == 5
    assert choices[0][:5] == ["digits/957", "digits/1040", "digits/696", "digits/1756", "digits/497"]


def test_a_fraction_is_rounded_in_each_class_and_leaves_none_without():
    names, labels = many([100, 16, 14, 2])
    chosen = labels_of(data.choose_labelled(names, labels, fraction=0.1), names, labels)
    assert [chosen.count(label) for label in range(4)] == [10, 2, 1, 1]


def test_unlabelled_examples_are_never_chosen():
    names, labels = many([10, 10])
    labels[::2] = -1
    assert set(labels_of(data.choose_labelled(names, labels, fraction=1.0), names, labels)) == {0, 1}


def test_impossible_choices_say_why():
    names, labels = many([10, 3])
    with pytest.raises(UserError, match="labels_per_class=4: class 1 has only 3"):
        data.choose_labelled(names, labels, per_class=4)
    with pytest.raises(UserError, match="labels_per_class=4: class dog has only 3 examples"):
        data.choose_labelled(names, labels, per_class=4, classes=["cat", "dog"])
    with pytest.raises(UserError, match="need labels"):
        data.choose_labelled(names, np.full(13, -1, np.int32), per_class=1)
