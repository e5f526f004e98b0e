"""The recipe: what fits which data and devices, why, and who decides a value when several could."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from test_run import RUN, command

import data
import recipe
import sources
import strategy
import subject
from config import DATA_FIELDS, FIELDS, TRAIN_MODES, Config
from errors import UserError
from recipe import Choice, Facts
from sources import glance

ONE_STAGE = True  # see conftest.py

NEEDED = {"finetune": {"checkpoint": "c"}, "distill": {"teacher": "t"}}
DATA = {
    "100 grey images of 8 pixels": Facts(100, 0, 0, 8, 8, False),
    "10 images": Facts(10, 10, 2, 64, 64, True),
    "3 images": Facts(3, 0, 0, 100, 100, True),
    "one label a class": Facts(1_437, 10, 10, 28, 28, False),
    "3,000 small images": Facts(3_052, 3_052, 9, 32, 32, True),
    "50,000 small images": Facts(50_000, 250, 10, 32, 32, True),
    "1,000 photographs": Facts(1_000, 1_000, 5, 500, 375, True),
    "1,000 photographs, a GPU": Facts(1_000, 1_000, 5, 500, 375, True, 1, True),
    "wide images": Facts(5_000, 0, 0, 120, 640, True, 1, True),
    "50,000 small images, 2 GPUs": Facts(50_000, 0, 0, 32, 32, True, 2, True),
    "a million, 8 GPUs": Facts(1_000_000, 1_000_000, 1_000, 500, 400, True, 8, True),
    "5 images, 8 GPUs": Facts(5, 5, 2, 96, 96, True, 8, True),
    "3 replicas of a CPU": Facts(10_000, 100, 10, 64, 64, True, 3),
}
PRETRAINING = {
    "100 grey images of 8 pixels": dict(
        image_size=16, train_batch_size=32, train_epochs=1_000, grayscale_probability=0.0, crop_min_area=0.5
    ),
    "10 images": dict(image_size=64, train_batch_size=10, train_epochs=2_000),
    "3 images": dict(image_size=64, train_batch_size=3),
    "one label a class": dict(image_size=24, train_batch_size=64, train_epochs=348),
    "3,000 small images": dict(
        image_size=24, train_batch_size=128, train_epochs=164, resnet_depth=18, width_multiplier=0.25, memory="none",
        color_jitter_strength=0.5, use_blur=False, crop_min_area=0.3,
    ),
    "50,000 small images": dict(
        train_batch_size=256, train_epochs=10, warmup_epochs=0.512, crop_min_area=0.2
    ),
    "1,000 photographs": dict(image_size=128, train_batch_size=64, use_blur=True, width_multiplier=0.25),
    "1,000 photographs, a GPU": dict(
        image_size=224, train_batch_size=64, resnet_depth=50, width_multiplier=1.0, memory="none"
    ),
    "wide images": dict(image_size=112, train_batch_size=64),
    "50,000 small images, 2 GPUs": dict(
        image_size=32, train_batch_size=512, resnet_depth=18, width_multiplier=1.0, memory_size=12_500, train_epochs=500
    ),
    "a million, 8 GPUs": dict(image_size=224, train_batch_size=512, train_epochs=100, memory_size=16_384),
    "5 images, 8 GPUs": dict(image_size=64, train_batch_size=8),
    "3 replicas of a CPU": dict(train_batch_size=255),
}  # fmt: skip


def read(path):
    return json.loads(Path(path).read_text())


def chosen(facts, train_mode="pretrain", **known):
    """The values that the recipe chooses, by name."""
    return recipe.values(recipe.choose(facts, {**known, "train_mode": train_mode}))


# The pure function


@pytest.mark.parametrize("name", DATA)
def test_what_pretraining_gets(name):
    made = chosen(DATA[name])
    assert {field: made[field] for field in PRETRAINING[name]} == PRETRAINING[name]


def test_what_the_other_steps_get():
    few, many = DATA["50,000 small images"], DATA["3,000 small images"]
    made = chosen(few, "finetune")
    assert (made["train_batch_size"], made["train_steps"], made["ft_proj_selector"]) == (64, 200, 0)
    assert chosen(few, "finetune", width_multiplier=1.0)["ft_proj_selector"] == 1
    assert chosen(many, "finetune")["train_steps"] == 953  # 20 epochs
    made = chosen(few, "supervised")
    assert (made["optimizer"], made["train_steps"]) == ("momentum", 400)
    assert chosen(DATA["one label a class"], "supervised")["train_batch_size"] == 10
    made = chosen(few, "distill")
    assert (made["train_steps"], made["distill_temperature"], made["train_batch_size"]) == (5_000, 1.0, 128)
    assert chosen(few, "distill", checkpoint="pretrained")["train_steps"] == 1_000
    assert (made["distill_neighbors"], made["distill_views"], made["crop_min_area"]) == (10, 8, 0.5)
    assert "distill_views" not in chosen(few, "distill", distill_neighbors=0)
    assert chosen(DATA["10 images"], "distill")["train_steps"] == 2_000
    assert chosen(DATA["10 images"], "distill")["distill_neighbors"] == 9
    for too_many_or_no_labels in ("a million, 8 GPUs", "3 images"):
        assert chosen(DATA[too_many_or_no_labels], "distill")["distill_neighbors"] == 0


@pytest.mark.parametrize("train_mode", TRAIN_MODES)
def test_images_with_a_side_are_not_mirrored(train_mode):
    facts = DATA["3,000 small images"]
    assert chosen(facts, train_mode)["use_flip"] is True
    assert chosen(facts._replace(mirrors=False), train_mode)["use_flip"] is False


def test_few_labels_are_learnt_slowly():
    def rate(labels, **known):
        facts = DATA["50,000 small images"]._replace(labelled=labels)
        return chosen(facts, "finetune", **known)["learning_rate"]

    at_random = [rate(count, linear_start=False) for count in (10, 40, 76, 10_000)]
    assert at_random == [0.05, 0.05, 0.2, 0.2]
    assert rate(55, linear_start=False) == pytest.approx(0.1, rel=0.01)  # the middle of 40 and 76, in logarithms
    assert [rate(count) for count in (10, 40, 76, 150, 151)] == [0.0125, 0.0125, 0.05, 0.05, 0.2]
    assert rate(40, optimizer="adam") == recipe.LEARNING_RATES["adam"]


def test_with_few_labels_fine_tuning_starts_from_a_linear_classifier():
    facts = DATA["50,000 small images"]
    starts = [chosen(facts._replace(labelled=count), "finetune")["linear_start"] for count in (40, 150, 151, 10_000)]
    assert starts == [True, True, False, False]
    few = facts._replace(labelled=40)
    assert "linear_start" not in chosen(few._replace(classes=1), "finetune")  # which has nothing to tell apart
    assert "linear_start" not in chosen(few, "finetune", zero_init_logits_layer=True)
    assert "linear_start" not in chosen(few, "supervised")


@pytest.mark.parametrize("train_mode", TRAIN_MODES)
@pytest.mark.parametrize("name", DATA)
def test_every_recipe_is_a_valid_config_and_has_reasons(name, train_mode):
    facts = DATA[name]
    choices = recipe.choose(facts, {"train_mode": train_mode})
    made = Config(**recipe.values(choices), train_mode=train_mode, **NEEDED.get(train_mode, {}))
    assert made.train_batch_size % facts.replicas == 0
    assert made.train_epochs <= recipe.MAX_EPOCHS
    assert all(type(choice.value) is type(FIELDS[field].default) for field, choice in choices.items())
    assert all(choice.reason for choice in choices.values())
    assert not set(choices) & {"train_mode", "seed", "eval_split", "cache_dataset", *DATA_FIELDS}
    labelled = train_mode in ("finetune", "supervised")
    assert made.train_batch_size <= max(facts.labelled if labelled else facts.images, facts.replicas)


@pytest.mark.parametrize("train_mode", TRAIN_MODES)
def test_what_is_known_is_never_chosen_again(train_mode):
    facts = DATA["1,000 photographs, a GPU"]
    for name, value in chosen(facts, train_mode).items():
        assert name not in chosen(facts, train_mode, **{name: value})
    everything = dict(Config(train_mode=train_mode, **NEEDED.get(train_mode, {})).to_dict())
    assert chosen(facts, **everything) == {}


def test_what_is_known_changes_what_is_chosen():
    facts = DATA["50,000 small images"]
    assert chosen(facts, train_batch_size=128)["warmup_epochs"] == 0.256  # 100 steps, as before
    assert chosen(facts, train_batch_size=512)["train_epochs"] == 10  # half the steps
    assert chosen(facts, train_batch_size=256)["learning_rate"] == 0.4
    assert chosen(facts, train_batch_size=256, learning_rate_scaling="sqrt")["learning_rate"] == 0.4 / 16
    assert chosen(facts, optimizer="adam")["learning_rate"] == recipe.LEARNING_RATES["adam"]
    assert chosen(facts, image_size=128)["use_blur"]
    made = chosen(facts, memory="queue")
    assert (made["memory_size"], made["ema_decay"], made["ema_ramp"]) == (512, 0.9, True)
    longer = chosen(facts, memory="queue", train_steps=10_000)
    assert (longer["memory_size"], longer["ema_decay"]) == (2_560, 0.975)  # 5 of 40 steps
    paper = chosen(facts, memory="queue", train_steps=250_000)
    assert (paper["memory_size"], paper["ema_decay"]) == (8_192, 0.999)
    assert chosen(facts, memory_size=100)["memory"] == "queue"
    assert "memory_size" not in chosen(DATA["a million, 8 GPUs"], memory="none")
    assert chosen(facts, "finetune", proj_head_mode="none")["ft_proj_selector"] == 0


def test_a_length_that_is_known_decides_warmup_and_checkpoints():
    facts = DATA["50,000 small images"]
    made = chosen(facts, train_epochs=1)
    assert (made["warmup_epochs"], made["checkpoint_epochs"]) == (0.1, 1)  # a tenth of the run
    assert not {"train_steps", "train_epochs"} & set(made)
    made = chosen(facts, train_steps=500)
    assert made["warmup_epochs"] == 0.256 and made["checkpoint_steps"] == 100
    assert not {"train_epochs", "checkpoint_epochs"} & set(made)
    assert "train_steps" not in chosen(facts, "distill", train_epochs=3)
    made = chosen(facts, "distill", train_steps=0)  # which asks for epochs
    assert made["train_epochs"] == 13 and "train_steps" not in made
    assert not {"checkpoint_steps", "checkpoint_epochs"} & set(chosen(facts, checkpoint_epochs=7))


@pytest.mark.parametrize("accelerator", [False, True])
def test_more_images_never_get_less(accelerator):
    before = None
    for images in (4, 10, 30, 100, 300, 1_000, 3_000, 10_000, 100_000, 1_000_000, 10_000_000):
        facts = Facts(images, images, 10, 64, 64, True, 1, accelerator)
        made = chosen(facts)
        batches = [chosen(facts, mode)["train_batch_size"] for mode in TRAIN_MODES]
        lengths = [chosen(facts, mode)["train_steps"] for mode in ("finetune", "supervised", "distill")]
        now = [*batches, *lengths, made.get("memory_size", 0)]
        now.append(round(made["train_epochs"] * images, -4))  # images seen, but for the last epoch's share
        if before:
            assert all(b <= n for b, n in zip(before, now, strict=False)), images
        before = now


@pytest.mark.parametrize("accelerator", [False, True])
def test_larger_images_never_get_smaller_views(accelerator):
    sizes = [chosen(Facts(1_000, 0, 0, side, 2 * side, True, 1, accelerator))["image_size"] for side in range(8, 1_000)]
    assert sizes == sorted(sizes) and {*sizes} >= {16, 24, 64, 112, 128}
    assert sizes[-1] == (224 if accelerator else 128)


def test_reasons_say_what_was_chosen():
    reasons = {
        name: choice.reason for name, choice in recipe.choose(DATA["10 images"], {"train_mode": "pretrain"}).items()
    }
    assert reasons["train_batch_size"] == "all images"
    assert reasons["learning_rate"] == "0.01562 when scaled to the batch of 10, for momentum"
    few = recipe.choose(DATA["50,000 small images"], {"train_mode": "pretrain", "train_epochs": 3})
    assert few["checkpoint_epochs"].reason == "after every epoch, since there are few"
    short = recipe.choose(DATA["50,000 small images"], {"train_mode": "finetune"})
    assert short["checkpoint_steps"] == Choice(100, "the run is short; its end is saved too")


def test_the_table_has_a_line_for_each_value():
    facts = DATA["3,000 small images"]
    choices = {"image_size": Choice(32, "so large"), "learning_rate": Choice(0.125, "so fast")}
    assert recipe.table(facts, choices).splitlines() == [
        "--recipe=auto for 3,052 colour images of 32 x 32 pixels, all of them labelled, on a CPU; "
        "a flag that is given wins:",
        "  --image_size     32     so large",
        "  --learning_rate  0.125  so fast",
    ]


# The facts


def source_of(images, labels=None):
    names = [f"image {i}" for i in range(len(images))]
    labels = np.zeros(len(images), np.int32) if labels is None else labels
    records = np.array([tf.io.encode_png(image).numpy() for image in images], object)
    return sources.MemorySource(records, labels, names, ["a"], lambda record: tf.io.decode_png(record, channels=3))


def test_a_glance_sees_the_median_size_and_colours():
    grey = [np.full([10 + i, 30, 3], 7, np.uint8) for i in range(5)]
    assert glance.look(source_of(grey)) == glance.Glance(12, 30, False, True)
    tinted = [image + np.array([0, 2, 3], np.uint8) for image in grey]
    assert not glance.look(source_of(tinted)).colour
    assert glance.look(source_of([*grey, tiny.noise(0)])).colour  # a sixth of them
    assert not glance.look(source_of([*grey * 5, tiny.noise(0)])).colour


def test_a_glance_sees_whether_images_have_a_side():
    rng = np.random.default_rng(0)
    letters = np.zeros([60, 16, 16, 3])
    letters[:, 2:14, 3:6] = 200.0  # the upright stroke of an L, and its foot
    letters[:, 11:14, 3:12] = 200.0
    letters += rng.normal(0, 30, letters.shape)
    assert glance.have_a_side(letters)
    assert not glance.have_a_side(np.concatenate([letters[:30], letters[30:, :, ::-1]]))  # both sides alike
    assert not glance.have_a_side((letters + letters[:, :, ::-1]) / 2)  # each its own mirror image
    assert not glance.have_a_side(letters[:5])  # too few to tell
    assert not glance.have_a_side(letters[:1])
    images = [image.clip(0, 255).astype(np.uint8) for image in letters]
    assert not glance.look(source_of(images)).mirrors and glance.look(source_of(images[:5])).mirrors


def test_a_glance_takes_the_same_images_on_every_machine(monkeypatch):
    monkeypatch.setattr(glance, "IMAGES", 3)
    images = [np.zeros([size, size, 3], np.uint8) for size in range(10, 40)]
    source = source_of(images)
    listed_otherwise = source.take(np.arange(30)[::-1])
    assert glance.look(source) == glance.look(listed_otherwise)


def test_a_glance_skips_what_does_not_decode_and_stops_at_many_pixels(tmp_path, monkeypatch):
    tiny.digit_images(tmp_path / "train", 2)
    source = sources.load("image_folder", "train", str(tmp_path))
    (tmp_path / "train" / source.names[0]).unlink()
    (tmp_path / "train" / "digit 1" / "1_0.png").write_bytes(b"no image")
    assert glance.look(source) == glance.Glance(24, 24, False, True)
    monkeypatch.setattr(glance, "PIXELS", 1)
    images = [np.zeros([size, size + 1, 3], np.uint8) for size in range(10, 40)]
    seen = glance.look(source_of(images))
    assert seen.width == seen.height + 1  # one image's size: a median of several would be of all of them
    monkeypatch.setattr(glance, "PIXELS", 10**8)
    assert glance.look(source_of(images)).height == 24


def test_the_facts_of_a_folder_count_the_labels_that_the_run_may_see(tmp_path):
    tiny.digit_images(tmp_path / "train", 4)
    tiny.digit_images(tmp_path / "bare", 4, labelled=False)
    base = dict(dataset="image_folder", data_dir=str(tmp_path), recipe="paper")
    assert data.facts(Config(**base), None) == Facts(12, 12, 3, 24, 24, False, mirrors=False)
    # Whether they have a side is seen on all of them: three would be too few to tell.
    assert data.facts(Config(**base, labels_per_class=1), None) == Facts(12, 3, 3, 24, 24, False, mirrors=False)
    supervised = Config(**base, train_mode="supervised", label_fraction=0.5)
    assert data.facts(supervised, None, 2, True) == Facts(6, 6, 3, 24, 24, False, 2, True, mirrors=False)
    assert data.facts(Config(**base, train_split="bare"), None) == Facts(12, 0, 0, 24, 24, False, mirrors=False)


# Who decides


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Flags for a folder of 30 coloured images of 16 pixels to train on, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    tiny.coloured_splits(tmp_path)
    return dict(dataset="image_folder", data_dir="images")


def test_a_folder_gets_the_recipe_that_fits(images):
    decided = subject.decide(images)
    assert decided.facts == Facts(30, 30, 2, 16, 16, True)
    made = chosen(decided.facts, **images)
    assert {name: getattr(decided.config, name) for name in made} == made
    assert decided.config.recipe == "auto" and set(decided.choices) == set(made)


def test_a_flag_beats_the_recipe_and_the_recipe_the_default(images):
    decided = subject.decide({**images, "train_batch_size": 10, "temperature": 0.7})
    assert (decided.config.train_batch_size, decided.config.temperature) == (10, 0.7)
    assert decided.config.image_size == 16 and decided.config.learning_rate == 0.4
    assert not {"train_batch_size", "temperature"} & set(decided.choices)
    paper = subject.decide({**images, "recipe": "paper"})
    assert paper.config.image_size == FIELDS["image_size"].default and not paper.choices


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100", "imagenet2012", "imagenet2012_subset/1pct"])
def test_known_data_sets_keep_the_papers_values(dataset):
    made = subject.resolve({"dataset": dataset})
    assert made.recipe == "paper"
    assert subject.resolve({"dataset": dataset, "recipe": "auto"}).recipe == "auto"
    assert subject.resolve({"dataset": "mnist"}).recipe == "auto"


def test_the_digits_take_a_recipe_where_it_is_asked_for():
    assert not subject.decide({}).choices
    decided = subject.decide({"recipe": "auto"})
    assert decided.facts == Facts(1437, 1437, 10, 8, 8, False, mirrors=False)
    assert not decided.config.use_flip
    assert decided.config.eval_split == "test"  # which is no hyper-parameter
    assert decided.config.temperature == 0.2 and decided.config.crop_max_aspect == 4 / 3


def test_a_checkpoint_decides_before_the_recipe(images, tmp_path_factory):
    start = tiny.pretrained(tmp_path_factory)
    decided = subject.decide({**images, "train_mode": "finetune", "checkpoint": start, "labels_per_class": 2})
    assert (decided.config.resnet_depth, decided.config.image_size) == (10, 16)
    assert not {"resnet_depth", "image_size", "width_multiplier"} & set(decided.choices)
    assert (decided.config.train_batch_size, decided.config.ft_proj_selector) == (4, 0)
    assert decided.facts.labelled == 4


def test_a_network_without_a_head_is_fine_tuned_from_h():
    given = {"dataset": "image_folder", "data_dir": "d", "train_mode": "finetune", "checkpoint": "c"}
    start = Config(train_mode="supervised").to_dict()
    assert subject.resolve(given, start=start, chosen={"ft_proj_selector": 1}).ft_proj_selector == 0
    start = Config(train_mode="pretrain").to_dict()
    assert subject.resolve(given, start=start, chosen={"ft_proj_selector": 1}).ft_proj_selector == 1


def test_a_run_that_goes_on_keeps_its_values_whatever_the_folder_holds(images, capfd):
    small = [
        f"--{name}={value}"
        for name, value in {
            **images,
            "resnet_depth": 10,
            "width_multiplier": 0.0625,
            "train_steps": 1,
            "eval_every_epochs": -1,
        }.items()
    ]
    assert command(*small, "--model_dir=run") == 0
    said = capfd.readouterr().out
    assert "--recipe=auto for 30 colour images of 16 x 16 pixels" in said
    lines = [line.split() for line in said.splitlines() if line.startswith("  --")]
    before = read("run/config.json")
    assert before["recipe_reasons"]["image_size"] == "the images' shorter side is 16 pixels (median)"
    assert {line[0][2:]: line[1] for line in lines}["train_batch_size"] == str(before["train_batch_size"]) == "16"
    assert {line[0][2:] for line in lines} == set(before["recipe_reasons"])
    assert "resnet_depth" not in before["recipe_reasons"]
    for i in range(40):
        tiny.write_image(f"images/train/a red/large {i}.png", tiny.noise(i, 64, 64))
    tiny.write_image("images/train/grey.png", np.zeros([64, 64]), "L")
    assert command("--model_dir=run", "--train_steps=2") == 0
    assert "--recipe=auto" not in capfd.readouterr().out
    after = read("run/config.json")
    assert {**before, "train_steps": 2} | {k: after[k] for k in ("train_examples", "data_fingerprint")} == after
    assert command("--model_dir=run", "--recipe=paper", "--train_steps=3") == 2
    assert "--recipe=paper contradicts the run in --model_dir=run, which has recipe=auto" in capfd.readouterr().err


def test_a_plan_is_of_the_recipe_and_json_stays_json(images, capfd):
    flags = [f"--{name}={value}" for name, value in images.items()]
    assert command(*flags, "--mode=plan", "--json", "--plan_timing=False", "--plan_replicas=2") == 0
    planned = json.loads(capfd.readouterr().out)
    made = chosen(Facts(30, 30, 2, 16, 16, True, 2))
    assert planned["train_steps"] == made["train_epochs"] * 30 // made["train_batch_size"] + 1
    assert command(*flags, "--mode=plan", "--plan_timing=False") == 0
    assert "  --train_batch_size" in capfd.readouterr().out


def test_data_that_cannot_be_read_is_one_line(images, capfd):
    flags = [f"--{name}={value}" for name, value in images.items()]
    assert command(*flags, "--train_split=nowhere") == 2
    assert "has no split nowhere; it has test, train" in capfd.readouterr().err


def test_a_recipe_cannot_be_planned_without_the_data(monkeypatch):
    def unreadable(*_):
        raise UserError("it is not there")

    monkeypatch.setattr(data, "facts", unreadable)
    given = dict(dataset="cifar10", recipe="auto", mode="plan")
    with pytest.raises(UserError, match="it is not there"):
        subject.decide(given)
    assert subject.decide({**given, "recipe": "paper"}).config.resnet_depth == 50


def test_evaluating_a_checkpoint_chooses_nothing(images, tmp_path_factory):
    start = tiny.pretrained(tmp_path_factory)
    decided = subject.decide({**images, "mode": "eval", "checkpoint": start, "eval_split": "train"})
    assert decided.facts is None and not decided.choices and decided.config.image_size == 16


def test_a_recipe_needs_no_tensorflow():
    check = "import sys, recipe; assert not {'tensorflow', 'numpy', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=RUN.parent, check=True)


def test_the_same_cluster_is_joined_once(monkeypatch):
    joined = []
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}))
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", lambda **_: joined.append(1) or object())
    strategy._cluster.cache_clear()
    assert strategy.make_strategy("multi_worker") is strategy.make_strategy("auto") and joined == [1]
    strategy._cluster.cache_clear()


def test_paper_is_the_default_of_a_config():
    assert Config().recipe == "paper" and "recipe" in {field.name for field in dataclasses.fields(Config)}
