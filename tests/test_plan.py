"""The plan: Table 1's parameters, FLOPs against arithmetic and a real pass, steps, data that is not there, memory."""

import dataclasses
import itertools
import json
import math
import resource
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import lars_optimizer
import objective
import plan as plan_lib
import resnet
import schedule as schedule_lib
import tasks
import train
from errors import UserError
from plan import fit, footprint
from subject import resolve

# Table 1 of arXiv 2006.10029: (depth, width, SK) -> million parameters.
TABLE_1 = {
    (50, 1, 0): 24, (50, 1, 1): 35, (50, 2, 0): 94, (50, 2, 1): 140,
    (101, 1, 0): 43, (101, 1, 1): 65, (101, 2, 0): 170, (101, 2, 1): 257,
    (152, 1, 0): 58, (152, 1, 1): 89, (152, 2, 0): 233, (152, 2, 1): 354, (152, 3, 1): 795,
}  # fmt: skip
FINETUNE = dict(train_mode="finetune", checkpoint="not/there/yet")
DISTILL = dict(train_mode="distill", teacher="not/there/yet", distill_neighbors=0)
TINY = dict(tiny.NETWORK, dataset="digits", image_size=16)


def plan(replicas=1, timing=False, **given):
    planned = plan_lib.plan(resolve({"dataset": "imagenet2012", **given}), replicas, timing)
    assert json.loads(json.dumps(planned)) == planned
    return planned


def million(count):
    return round(count / 1e6)


@pytest.mark.parametrize("depth, width, sk", TABLE_1)
def test_the_encoders_are_as_large_as_in_table_1(depth, width, sk):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = plan(resnet_depth=depth, width_multiplier=float(width), sk_ratio=0.0625 * sk, memory="none")
    assert million(planned["encoder_parameters"]) == TABLE_1[depth, width, sk]
    # The weights are not made: those of the largest are 3 GB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


@pytest.mark.parametrize("width, first_layer", [(1, 4), (2, 17)])
def test_the_first_layer_of_the_head_is_the_papers(width, first_layer):
    dim, more = 2048 * width, dict(width_multiplier=float(width))
    layer = dim * dim + 4 * dim
    pretrained, middle, from_h = plan(**more), plan(**more, **FINETUNE, ft_proj_selector=1), plan(**more, **FINETUNE)
    assert million(layer) == first_layer
    assert [p["head_parameters"] for p in (pretrained, middle, from_h)] == [layer, layer, 0]
    whole = 2 * layer + dim * 128 + 3 * 128
    assert [p["built_head_parameters"] for p in (pretrained, middle, from_h)] == [whole, layer, 0]
    assert pretrained["supervised_head_parameters"] == from_h["supervised_head_parameters"] == dim * 1000 + 1000


@pytest.mark.parametrize("mode, first_layer", [("linear", 64 * 5 + 3 * 5), ("none", 0)])
def test_heads_of_other_kinds(mode, first_layer):
    planned = plan(**TINY, proj_head_mode=mode, proj_out_dim=5)
    assert (planned["head_parameters"], planned["built_head_parameters"]) == (first_layer, first_layer)


def test_what_is_planned_is_what_is_made():
    """Parameters and gradients of the very networks that training makes."""
    for given in (
        dict(TINY),
        dict(TINY, lineareval_while_pretraining=False),
        dict(TINY, **FINETUNE, fine_tune_after_block=2, sk_ratio=0.0625),
        dict(TINY, **FINETUNE, fine_tune_after_block=4, ft_proj_selector=-1),
        dict(TINY, train_mode="supervised", se_ratio=0.25, resnet_depth=14),
        dict(TINY, **DISTILL),
    ):
        planned, c = plan(**given), resolve(given)
        task = tasks.make_task(c, [str(i) for i in range(10)], teacher=lambda images: images)
        made, parts = task.model, planned["memory_parts"]
        sizes = [sum(math.prod(v.shape) for v in part.variables) if part else 0 for part in
                 (made.encoder, made.head, made.supervised_head)]  # fmt: skip
        assert sizes == [planned[f"{part}_parameters"] for part in ("encoder", "built_head", "supervised_head")]
        assert parts["weights"] == 4 * sum(sizes)
        assert parts["gradients"] == 4 * sum(math.prod(v.shape) for v in made.trainable_variables)


@pytest.mark.parametrize("depth, gmac", [(18, 1.82), (50, 4.11)])
def test_flops_are_the_known_ones(depth, gmac):
    planned = plan(resnet_depth=depth, train_mode="supervised")
    assert math.isclose(planned["flops_per_image"], 2e9 * gmac, rel_tol=0.02)


@pytest.mark.parametrize(
    "given",
    [
        dict(image_size=20), dict(image_size=40, resnet_depth=14, sk_ratio=0.0625, se_ratio=0.25),
        dict(image_size=48, **FINETUNE, ft_proj_selector=2), dict(image_size=33, train_mode="supervised"),
    ],
)  # fmt: skip
def test_flops_are_those_of_a_real_pass(given, monkeypatch):
    given = {**TINY, **given}
    done = []

    def watch(layer, count):
        call = layer.call

        def watched(self, x, *args, **kwargs):
            y = call(self, x, *args, **kwargs)
            done.append(count(self, x.shape, y.shape))
            return y

        monkeypatch.setattr(layer, "call", watched)

    network = tasks.network(resolve(given), 10)
    watch(keras.layers.Conv2D, lambda layer, x, y: 2 * math.prod(layer.kernel_size) * x[-1] * math.prod(y[1:]))
    watch(keras.layers.Dense, lambda layer, x, y: 2 * x[-1] * y[-1])
    network(np.zeros([1, given["image_size"], given["image_size"], 3], np.float32))
    assert sum(done) == plan(**given)["flops_per_image"]


def test_flops_of_a_step():
    pretrain = dict(TINY, train_batch_size=32)
    with_memory, without = plan(**pretrain, memory="queue"), plan(**pretrain, memory="none")
    forward, classifier = with_memory["flops_per_image"], 2 * 64 * 10
    assert without["flops_per_step"] == 32 * 2 * 3 * forward
    assert with_memory["flops_per_step"] == 32 * 2 * (3 * forward + forward - classifier)
    assert plan(**pretrain, memory="queue", replicas=4)["flops_per_step"] == with_memory["flops_per_step"]
    distilled = plan(**DISTILL, **pretrain)
    encoder = distilled["flops_per_image"] - classifier
    assert distilled["flops_per_step"] == 32 * 4 * distilled["flops_per_image"]
    answered_before = plan(**{**DISTILL, "distill_neighbors": 3}, **pretrain)
    assert answered_before["flops_per_step"] == 32 * 3 * distilled["flops_per_image"]
    linear = plan(**FINETUNE, **pretrain, fine_tune_after_block=4, ft_proj_selector=0)
    assert linear["flops_per_step"] == 32 * (encoder + 3 * classifier)


def test_steps_are_those_of_the_release(golden):
    cases = json.loads((golden / "schedule.json").read_text())
    splits = {1_281_167: "imagenet2012", 50_000: "cifar10", 12_811: "imagenet2012_subset/1pct"}
    splits[128_116] = "imagenet2012_subset/10pct"
    known = [case for case in cases if case["num_train_examples"] in splits]
    assert len(known) >= 4
    for case in known:
        fields = ("train_batch_size", "train_epochs", "warmup_epochs", "learning_rate", "learning_rate_scaling")
        given = {name: float(case[name]) if name == "warmup_epochs" else case[name] for name in fields}
        examples, batch = case["num_train_examples"], case["train_batch_size"]
        planned = plan(**TINY | dict(dataset=splits[examples]), **given, memory="none")
        assert (planned["examples"], planned["train_steps"]) == (examples, case["train_steps"])
        assert planned["epoch_steps"] == schedule_lib.epoch_steps(examples, batch)
        schedule = schedule_lib.WarmupCosine(
            planned["peak_learning_rate"], planned["warmup_steps"], planned["train_steps"]
        )
        for step, value in case["values"].items():
            assert math.isclose(schedule(int(step)), value, rel_tol=1e-4, abs_tol=1e-5)


@pytest.mark.parametrize(
    "given, examples",
    [
        (dict(dataset="imagenet2012"), 1_281_167),
        (dict(dataset="imagenet2012", train_split="train[:10%]"), 128_117),
        (dict(dataset="imagenet2012:5.1.0", train_split="train+validation"), 1_331_167),
        (dict(dataset="imagenet2012_subset/10pct", train_split="train[100:]"), 128_016),
        (dict(dataset="cifar100", train_split="test"), 10_000),
        (dict(dataset="cifar10", labels_per_class=25, **FINETUNE), 250),
        (dict(dataset="cifar10", label_fraction=0.1, train_mode="supervised"), 5_000),
        (dict(dataset="cifar10", label_fraction=0.1), 50_000),
        (dict(dataset="cifar10", labels_per_class=4, **DISTILL), 50_000),
        (dict(dataset="imagenet2012", labelled_dataset="imagenet2012_subset/1pct", **DISTILL), 1_281_167),
        (dict(dataset="digits"), 1_437),
        (dict(dataset="digits", train_split="train[:80%]"), 1_150),
        (dict(dataset="digits", labels_per_class=7, **FINETUNE), 70),
        (dict(dataset="digits", label_fraction=0.001, **FINETUNE), 10),
    ],
)
def test_examples_that_a_run_sees(given, examples):
    planned = plan(**{**TINY, "train_batch_size": 32, "train_epochs": 9, **given})
    assert (planned["examples"], planned["epoch_steps"]) == (examples, schedule_lib.epoch_steps(examples, 32))
    assert planned["train_steps"] == examples * 9 // 32 + 1


def test_examples_of_a_folder(tmp_path):
    tiny.digit_images(tmp_path / "train", 4)
    tiny.digit_images(tmp_path / "wild", 3, labelled=False)
    folder = dict(TINY, dataset="image_folder", data_dir=str(tmp_path))
    labelled, wild = plan(**folder), plan(**folder, train_split="wild")
    assert (labelled["examples"], labelled["supervised_head_parameters"]) == (12, 65 * 3)
    assert (wild["examples"], wild["supervised_head_parameters"]) == (9, 0)
    unknown = plan(**folder, train_split="wild", **DISTILL)
    assert "supervised_head_parameters" not in unknown and "supervised head     unknown" in plan_lib.table(unknown)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(dataset="no_such_data"), "--dataset=no_such_data"),
        (dict(dataset="cifar10", train_split="training"), "--train_split=training: no such split; there is train"),
        (dict(dataset="cifar10", labels_per_class=6000, **FINETUNE), "--labels_per_class=6000"),
        (dict(dataset="digits", labels_per_class=500, **FINETUNE), "--labels_per_class=500"),
        (dict(dataset="digits", train_batch_size=10, replicas=4), "--train_batch_size=10: must be a multiple of the 4"),
    ],
)
def test_mistakes_are_told(given, message, tmp_path):
    data_dir = {} if given["dataset"] == "digits" else {"data_dir": str(tmp_path)}
    with pytest.raises(UserError, match=message):
        plan(**{**TINY, **data_dir, **given})


def test_a_teacher_that_is_there_is_counted_as_it_is(tmp_path_factory):
    teacher = tiny.pretrained(tmp_path_factory)
    student = dict(TINY, train_mode="distill", distill_neighbors=0, width_multiplier=0.25, train_batch_size=32)
    there, not_there = plan(**student, teacher=teacher), plan(**student, teacher="not/there/yet")
    assert there["encoder_parameters"] == not_there["encoder_parameters"]
    assert there["memory_parts"]["teacher"] == plan(**tiny.PRETRAIN, dataset="digits")["memory_parts"]["weights"]
    assert not_there["memory_parts"]["teacher"] == not_there["memory_parts"]["weights"] > 4 * 2 * 65 * 10
    assert there["flops_per_step"] < not_there["flops_per_step"]


def test_memory_is_the_sum_of_its_parts():
    base = dict(TINY, train_batch_size=64, memory="queue", memory_size=128)
    one, twice, shared = plan(**base), plan(**base | dict(train_batch_size=128)), plan(**base, replicas=4)
    for planned in (one, twice, shared):
        assert planned["memory_bytes_per_replica"] == sum(planned["memory_parts"].values())
        assert min(planned["memory_parts"].values()) >= 0
    parts, more, less = one["memory_parts"], twice["memory_parts"], shared["memory_parts"]
    by_batch = {"activations", "images", "contrastive_loss"}
    assert {name for name in parts if parts[name] < more[name]} == by_batch
    assert {name for name in parts if parts[name] > less[name]} == by_batch
    assert parts["activations"] == 4 * less["activations"] and 2 * parts["activations"] == more["activations"]
    assert parts["images"] == 2 * 64 * 16 * 16 * 3 * 4
    assert plan(**base, steps_per_call=3)["memory_parts"]["images"] == 3 * 2 * parts["images"]
    keys = 2 * 64 + 128
    assert parts["contrastive_loss"] == (2.5 * (2 * 64) + 2 * 128) * keys * 4
    assert less["contrastive_loss"] == (2.5 * (2 * 16) + 2 * 128) * keys * 4
    assert parts["queue"] == 128 * 128 * 4
    assert parts["momentum_encoder"] == 4 * (one["encoder_parameters"] + one["built_head_parameters"])


def test_the_contrastive_loss_takes_the_memory_of_a_block():
    given = dict(TINY, train_batch_size=4096, memory="queue", memory_size=65536)
    keys = 2 * 4096 + 65536
    copies_of_keys = 2 * keys * 128 * 4
    chosen = plan(**given)["memory_parts"]["contrastive_loss"] - copies_of_keys
    assert 2.4 * objective.BLOCK_BYTES < chosen < 2.6 * objective.BLOCK_BYTES
    assert plan(**given, loss_block=8)["memory_parts"]["contrastive_loss"] == 2.5 * 8 * keys * 4 + copies_of_keys
    whole = plan(**given, loss_block=10**6)["memory_parts"]["contrastive_loss"]
    assert whole == 2.5 * 8192 * keys * 4 + copies_of_keys
    # Without queue the candidates get a gradient. `benchmarks/loss.py --batch=4096 --keys=0` measures it.
    without = plan(**{**given, "memory": "none"}, loss_block=512)["memory_parts"]["contrastive_loss"]
    assert without == (3 * 512 * 8192 + (6 + 5) * 8192 * 128) * 4


def test_memory_counts_what_a_run_has():
    def parts(**given):
        return plan(**{**TINY, "memory": "queue", **given})["memory_parts"]

    lars, adam, alone = parts(optimizer="lars"), parts(optimizer="adam"), parts(memory="none")
    assert adam["slots"] == 2 * lars["slots"] and lars["slots"] == lars["gradients"] == parts()["slots"]
    assert alone["queue"] == alone["momentum_encoder"] == 0 < lars["queue"]
    supervised, distilled = parts(train_mode="supervised", train_batch_size=256), parts(**DISTILL)
    assert supervised["contrastive_loss"] == supervised["queue"] == supervised["teacher"] == 0
    assert distilled["teacher"] == distilled["weights"] == supervised["weights"]
    frozen = [parts(**FINETUNE, fine_tune_after_block=block) for block in (-1, 0, 1, 2, 3, 4)]
    for before, after in itertools.pairwise(frozen):
        assert after["activations"] < before["activations"] and after["gradients"] < before["gradients"]
    assert frozen[-1]["gradients"] == 4 * 65 * 10


def test_activations_are_what_the_backward_pass_reads():
    """By hand for the smallest bottleneck of all, at 8 x 8 pixels with the small stem: each kept tensor once."""
    encoder = resnet.resnet(10, 1 / 16, cifar_stem=True, image_size=8)  # widths 4, 8, 16, 32
    kept = 8 * 8 * 3 + 8 * 8 * 4 * 2  # image, the stem's convolution and ReLU
    for group, (size, width) in enumerate([(8, 4), (4, 8), (2, 16), (1, 32)]):
        padded = (2 * size + 2) ** 2 * width // 2 if group else 0  # the strided convolution's input
        # The strided shortcut's convolution reads a map of its own where it has fewer than 16 channels.
        subsampled = size * size * width // 2 if group in (1, 2) else 0
        # shortcut's convolution; first convolution and ReLU; second convolution; the block's ReLU
        kept += padded + subsampled + 5 * size * size * width
    assert footprint.kept_values(encoder.operations) == kept


def test_chunks_take_the_memory_and_the_passes_that_they_say():
    """By hand: a batch in 4 chunks keeps a quarter. In pretraining it goes forward once more."""
    given = dict(TINY, train_batch_size=64, memory="queue", memory_size=128)
    whole, chunked = plan(**given), plan(**given, grad_accumulation=4)
    changed = {name for name, size in whole["memory_parts"].items() if chunked["memory_parts"][name] != size}
    assert changed == {"activations", "gradients"}
    assert chunked["memory_parts"]["activations"] == whole["memory_parts"]["activations"] / 4
    assert chunked["memory_parts"]["gradients"] == 2 * whole["memory_parts"]["gradients"]
    forward = whole["flops_per_image"]
    assert chunked["flops_per_step"] - whole["flops_per_step"] == 64 * 2 * forward
    supervised = dict(given, train_mode="supervised")
    assert plan(**supervised, grad_accumulation=4)["flops_per_step"] == plan(**supervised)["flops_per_step"]


def test_a_queue_in_shards_takes_its_part():
    given = dict(TINY, train_batch_size=64, memory="queue", memory_size=128, loss_block=1000)
    whole, sharded = (plan(**given, shard_queue=sharded, replicas=4)["memory_parts"] for sharded in (False, True))
    assert sharded["queue"] == whole["queue"] / 4 == 32 * 128 * 4
    # 32 anchors with 128 candidates and all keys; or the 128 anchors of all replicas with the 32 keys that are here.
    assert whole["contrastive_loss"] == (2.5 * 32 * (128 + 128) + 2 * (128 + 128) * 128) * 4
    assert sharded["contrastive_loss"] == (2.5 * 128 * 32 + 2 * (128 + 32) * 128) * 4


def test_recomputed_blocks_keep_their_inputs_and_one_block():
    """By hand, for the network of `test_activations_are_what_the_backward_pass_reads`."""
    c = resolve(dict(dataset="digits", resnet_depth=10, width_multiplier=1 / 16, image_size=8, train_mode="supervised"))
    network, _ = footprint.count(c)
    image_and_stem = 8 * 8 * 3 + 8 * 8 * 4 * 2  # the last of them is the first block's input
    assert network.kept == image_and_stem + 1280 + 1104 + 640 + 416
    # The inputs of the other three blocks; and what the first block keeps, which is the most.
    assert network.kept_by_remat == image_and_stem + (8 * 8 * 4 + 4 * 4 * 8 + 2 * 2 * 16) + 1280
    stem, blocks = 2 * 27 * 4 * 64, network.block_flops
    assert network.flops == stem + blocks
    remat, plain = (plan(**{**TINY, "train_batch_size": 64, "remat": remat}) for remat in (True, False))
    more = remat["flops_per_step"] - plain["flops_per_step"]
    assert more == 64 * 2 * footprint.count(resolve(dict(TINY)))[0].block_flops
    half_frozen, _ = footprint.count(resolve(dict(TINY, **FINETUNE, fine_tune_after_block=2)))
    assert half_frozen.block_flops < footprint.count(resolve(dict(TINY)))[0].block_flops - half_frozen.frozen_flops / 2


def counts(**changes):
    """A network of 1,000 weights that keeps 100 values an image, or 30 with recomputed blocks; 50 FLOPs forward."""
    fields = dict(
        encoder=1000, head=0, head_first_layer=0, trained=1000, classifier_input=0, output_dim=4, flops=50,
        frozen_flops=0, kept=100, kept_by_remat=30, block_flops=40, largest=0,
    )  # fmt: skip
    return footprint.Counts(**{**fields, **changes})


def test_what_fits_into_a_memory():
    """By hand: 4 bytes times 16,000 for the weights (weights, gradients, slot, two copies) and the images."""
    c = resolve(dict(TINY, train_mode="supervised", train_batch_size=64, image_size=8, optimizer="lars"))
    images = 64 * 3 * 8 * 8
    of_weights = 5 * 1000
    half = {"mixed_precision": "bfloat16"}  # half of the activations, and a copy of the weights in it

    def found(device_values, replicas=1):
        rows = fit.fits(c, replicas, 4 * device_values, 0, counts())
        return [
            (row["replicas"], row["flags"], row["memory_bytes_per_replica"] // 4, row["forward_passes"]) for row in rows
        ]

    # Everything fits: the plain step is the best, and recomputed blocks cost 0.8 of a forward pass.
    assert found(of_weights + images + 6400) == [
        (1, {}, of_weights + images + 6400, 3.0),
        (1, half, of_weights + 500 + images + 3200, 3.0),
        (1, {"remat": True}, of_weights + images + 64 * 30, 3.8),
        (1, {**half, "remat": True}, of_weights + 500 + images + 32 * 30, 3.8),
    ]
    # One byte less: two chunks, whose gradients lie beside those so far; or recomputed blocks. On two devices, nothing.
    on_two = of_weights + images // 2
    assert found(of_weights + images + 6399) == [
        (1, {"grad_accumulation": 2}, of_weights + 1000 + images + 3200, 3.0),
        (1, half, of_weights + 500 + images + 3200, 3.0),
        (1, {"remat": True}, of_weights + images + 64 * 30, 3.8),
        (1, {**half, "remat": True}, of_weights + 500 + images + 32 * 30, 3.8),
        (2, {}, on_two + 3200, 3.0),
        (2, half, on_two + 500 + 1600, 3.0),
        (2, {"remat": True}, on_two + 32 * 30, 3.8),
        (2, {**half, "remat": True}, on_two + 500 + 16 * 30, 3.8),
    ]
    assert found(of_weights - 1) == []
    rows = fit.fits(c, 1, 4 * (of_weights + images + 6399), 0, counts())
    lines = fit.table(rows, 16 * 10**9).splitlines()
    assert lines[0].startswith("fits into 16 GB a device, the best first")
    assert [line.split() for line in lines[2:5]] == [
        ["1", "--grad_accumulation=2", "86", "kB", "3.0", "1.00"],
        ["1", "--mixed_precision=bfloat16", "84", "kB", "3.0", "1.00"],
        ["1", "--remat=True", "76.8", "kB", "3.8", "1.27"],
    ]
    assert lines[6].split()[:4] == ["2", "none", "needed", "57.4"] and lines[6].endswith("0.50")
    assert fit.table([], 10**6).startswith("nothing fits into 1 MB a device: lower --image_size")


def test_pretraining_in_chunks_costs_a_forward_pass():
    c = resolve(dict(TINY, memory="none", train_batch_size=64, lineareval_while_pretraining=False))
    parts = footprint.memory_parts(c, 1, 0, counts())
    rows = fit.fits(c, 1, sum(parts.values()) - 1, 0, counts())
    passes = [(row["flags"], row["forward_passes"]) for row in rows if "mixed_precision" not in row["flags"]]
    assert passes[:2] == [({"remat": True}, 3.8), ({"grad_accumulation": 2}, 4.0)]


def test_small_blocks_of_the_loss_are_tried_where_nothing_else_fits():
    c = resolve(dict(TINY, memory="queue", memory_size=4096, train_batch_size=64, lineareval_while_pretraining=False))
    smallest = dataclasses.replace(c, grad_accumulation=64, remat=True)
    device_bytes = sum(footprint.memory_parts(smallest, 1, 0, counts()).values()) - 1
    rows = [row for row in fit.fits(c, 1, device_bytes, 0, counts()) if row["replicas"] == 1]
    assert rows and all(row["flags"]["loss_block"] == 8 for row in rows)
    # By hand: blocks of 8 anchors instead of all 128 save 2.5 x 120 x (128 + 4096) values.
    saved = 4 * 2.5 * 120 * (128 + 4096)
    at_once = dataclasses.replace(c, grad_accumulation=rows[0]["flags"].get("grad_accumulation", 1))
    if rows[0]["flags"].get("remat"):
        at_once = dataclasses.replace(at_once, remat=True)
    whole = sum(footprint.memory_parts(at_once, 1, 0, counts()).values())
    assert rows[0]["memory_bytes_per_replica"] == whole - saved <= device_bytes


@pytest.mark.parametrize(
    "text, size", [("16G", 16 * 10**9), ("500MB", 500 * 10**6), ("15.5 GiB", int(15.5 * 2**30)), ("8000", 8000)]
)
def test_sizes_of_memory(text, size):
    assert fit.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "16X", "-1G", "0", "16 G B"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match=r"--device_memory=.*: give a size such as 16G"):
        fit.bytes_of(text)


def test_timing_is_left_out_on_demand():
    names = {"device_flops_per_second", "step_seconds", "total_seconds"}
    given = dict(TINY, train_batch_size=16, train_steps=7)
    timed, untimed = plan(**given, timing=True, replicas=2), plan(**given, replicas=2)
    assert set(timed) - set(untimed) == names
    assert math.isclose(timed["step_seconds"], timed["flops_per_step"] / 2 / timed["device_flops_per_second"])
    assert math.isclose(timed["total_seconds"], 7 * timed["step_seconds"])
    assert "s a step" in plan_lib.table(timed) and "s a step" not in plan_lib.table(untimed)


@pytest.mark.parametrize("replicas", [0, -3])
def test_a_number_of_replicas_that_makes_no_sense_is_told(replicas):
    with pytest.raises(UserError, match=f"--plan_replicas={replicas}: must be at least 1"):
        plan(**TINY, replicas=replicas)


@pytest.mark.slow
def test_the_time_of_a_step_is_about_right():
    c = resolve(dict(TINY, width_multiplier=0.25, train_batch_size=64))
    task = tasks.make_task(c, [str(i) for i in range(10)], teacher=lambda images: images)
    optimizer = lars_optimizer.make_optimizer(c.optimizer, 0.1)
    optimizer.build(task.model.trainable_variables)
    step = train.make_train_step(task, optimizer, tf.distribute.get_strategy())
    batch = {view: tf.zeros([64, 16, 16, 3]) for view in task.views} | {"label": tf.zeros([64], tf.int32)}
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        float(step(batch)["loss"])
        taken.append(time.perf_counter() - started)
    assert 1 / 5 < plan_lib.plan(c)["step_seconds"] / min(taken) < 5


def test_a_table_for_people():
    planned = plan(resnet_depth=50, train_batch_size=4096, train_epochs=800, replicas=128)
    lines = plan_lib.table(planned).splitlines()
    assert "encoder parameters  23.6 M" in lines
    assert "projection head     8.67 M (4.2 M for fine-tuning)" in lines
    assert "FLOPs per image     8.2 G (forward)" in lines
    assert "steps               250,228 (313 an epoch)" in lines
    assert any("B (estimate: activations " in line for line in lines)
    long = dict(step_seconds=0.5, total_seconds=40 * 3600 + 61, device_flops_per_second=1e12)
    last = plan_lib.table(planned | long).splitlines()[-1]
    assert last == "time                40 h 1 min (estimate: 0.500 s a step)"
    longer = long | {"total_seconds": 86400 * 365.0}
    assert plan_lib.table(planned | longer).splitlines()[-1].split("  ")[-1].startswith("365 days")
    texts = [footprint.in_short(value) for value in (0, 1, 999, 999.9, 12_345, 999_999, 1e9, 3.2e22)]
    assert texts == ["0", "1", "999", "1 k", "12.3 k", "1 M", "1 G", "3.2e+04 E"]


LARGEST = """
import resource, time
started = time.monotonic()
import tensorflow as tf, keras, plan
from subject import resolve
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
given = dict(dataset="imagenet2012", resnet_depth=152, width_multiplier=3.0, sk_ratio=0.0625, train_batch_size=4096)
planned = plan.plan(resolve(given), replicas=128, timing=False)
with keras.StatelessScope():  # as some of its layers do inside; Keras now makes up for values it has left out
    pass
print(planned["encoder_parameters"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(time.monotonic() - started)
"""


@pytest.mark.slow
def test_the_largest_network_is_planned_fast_and_not_built():
    """Its weights alone are 3 GB. In a process of its own the memory is measured more closely than above."""
    made = subprocess.run([sys.executable, "-c", LARGEST], cwd=resnet.__file__.rpartition("/")[0], text=True,
                          capture_output=True, check=True)  # fmt: skip
    parameters, kilobytes, seconds = map(float, made.stdout.split())
    assert million(parameters) == 795 and kilobytes < 200_000 and seconds < 30
