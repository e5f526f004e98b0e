"""The one list of hyper-parameters: its defaults, what it refuses, and who decides a value when several could."""

import dataclasses
import json

import pytest

import config
import continuation
import run
import subject
from config import FIELDS, Config, from_dict
from errors import UserError
from subject import resolve

# The 2020 release's flags (tf2/run.py), all but those of its data sets and of the TPU.
RELEASE_DEFAULTS = dict(
    learning_rate=0.3, learning_rate_scaling="linear", warmup_epochs=10, weight_decay=1e-6, batch_norm_decay=0.9,
    train_batch_size=512, train_split="train", train_epochs=100, train_steps=0, eval_steps=0, eval_batch_size=256,
    checkpoint_epochs=1, checkpoint_steps=0, eval_split="validation", cache_dataset=False, mode="train",
    train_mode="pretrain", lineareval_while_pretraining=True, checkpoint="", zero_init_logits_layer=False,
    fine_tune_after_block=-1, model_dir="", data_dir="", optimizer="lars", momentum=0.9, eval_name="",
    keep_checkpoint_max=5, keep_hub_module_max=1, temperature=0.1, hidden_norm=True, proj_head_mode="nonlinear",
    proj_out_dim=128, num_proj_layers=3, ft_proj_selector=0, global_bn=True, width_multiplier=1, resnet_depth=50,
    sk_ratio=0.0, se_ratio=0.0, image_size=224, color_jitter_strength=1.0, use_blur=True,
)  # fmt: skip
RELEASE_FLAGS = {
    *RELEASE_DEFAULTS,
    *("dataset", "master", "use_tpu", "tpu_name", "tpu_zone", "gcp_project"),
    *("variable_schema", "train_summary_steps"),
}
ARCHITECTURE = dict(resnet_depth=18, width_multiplier=0.5, sk_ratio=0.0625, se_ratio=0.25, image_size=64)


def saved(**values):
    """What a checkpoint or a model_dir says of the run that made it."""
    return {**Config(**values).to_dict(), "classes": ["a", "b"], "git_commit": None}


def refused(**values):
    """The message with which the config refuses `values`."""
    with pytest.raises(UserError) as error:
        Config(**values)
    return str(error.value)


def unresolved(*args):
    with pytest.raises(UserError) as error:
        resolve(*args)
    return str(error.value)


# The list itself


def test_every_field_has_a_help_text_and_a_default_of_its_flags_type():
    for name, field in FIELDS.items():
        assert field.metadata["help"].endswith("."), name
        assert type(field.default) in run.DEFINE, name
        assert str(field.type) == type(field.default).__name__, name


def test_defaults_are_the_releases():
    assert {name: FIELDS[name].default for name in RELEASE_DEFAULTS} == RELEASE_DEFAULTS


def test_the_releases_flags_are_all_known():
    assert {name for name in RELEASE_FLAGS if name not in FIELDS} == set(run.RELEASE_FLAGS)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_a_config_survives_json():
    made = Config(train_mode="finetune", checkpoint="runs/a", label_fraction=0.1, width_multiplier=0.125, seed=3)
    assert from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert from_dict({**made.to_dict(), "classes": ["a"], "flag_of_another_version": 1}) == made
    assert from_dict({"seed": 3}) == Config(seed=3)


# What it refuses


def test_all_wrong_values_are_named_at_once_in_one_line():
    message = refused(seed=-1, resnet_depth=7, label_fraction=2.0)
    assert all(part in message for part in ("--seed=-1", "--resnet_depth=7", "--label_fraction=2.0"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(train_mode="finetune"), "--train_mode=finetune needs --checkpoint"),
        (dict(train_mode="distill"), "--train_mode=distill needs --teacher"),
        (dict(teacher="t"), "--teacher goes with --train_mode=distill, not pretrain"),
        (dict(train_mode="finetune", checkpoint="c", teacher="t"), "not finetune"),
        (dict(train_mode="supervised", checkpoint="c"), "--train_mode=supervised starts from scratch"),
        (dict(fine_tune_after_block=4), "--fine_tune_after_block=4 freezes blocks, which only"),
        (dict(train_mode="finetune", checkpoint="c", ft_proj_selector=4), "the projection head has 3 layers"),
        (dict(proj_head_mode="linear", ft_proj_selector=2), "the projection head has 1 layers"),
        (dict(proj_head_mode="none", ft_proj_selector=1), "the projection head has 0 layers"),
        (dict(train_mode="supervised", ft_proj_selector=1), "--train_mode=supervised has no projection head"),
        (dict(train_mode="distill", teacher="t", augment_policy="autoaugment"), "finetune, not distill"),
        (dict(augment_on="device", color_operators="broad"), "leave out --color_operators"),
        (dict(augment_on="device", sobel_probability=0.5), "leave out --sobel_probability"),
        (
            dict(train_mode="supervised", augment_on="device", augment_policy="randaugment"),
            "leave out --augment_policy",
        ),
        (dict(label_smoothing=0.1), "does not go with --train_mode=pretrain"),
        (dict(train_mode="supervised", labelled_dataset="d", dataset="e"), "use --dataset=d"),
        (dict(labelled_dataset="d", dataset="e", label_fraction=0.1), "give one"),
        (dict(labelled_dataset="d"), "not of --dataset=digits"),
        (dict(labels_per_class=1, label_fraction=0.1), "exclude each other"),
        (dict(dataset="image_folder"), "--dataset=image_folder needs --data_dir"),
        (dict(data_dir="d"), "--data_dir does not go with --dataset=digits"),
        *[
            (dict(profile_steps=wrong), f"--profile_steps={wrong}: give the first and the last step")
            for wrong in ("5", "5,", "a,b", "0,5", "6,5", "-1,5", "1,2,3")
        ],
        (dict(use_tpu=True, strategy="mirrored"), "--use_tpu contradicts --strategy=mirrored"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values, message):
    assert message in refused(**values)


def test_all_contradictions_are_named_at_once():
    message = refused(train_mode="finetune", teacher="t", labels_per_class=1, label_fraction=0.5)
    assert all(part in message for part in ("needs --checkpoint", "--teacher goes with", "exclude each other"))


@pytest.mark.parametrize(
    "values",
    [
        dict(train_mode="finetune", checkpoint="c", ft_proj_selector=3, fine_tune_after_block=4),
        dict(train_mode="finetune", checkpoint="c", ft_proj_selector=-1, labels_per_class=1),
        dict(train_mode="distill", teacher="t", distill_alpha=0.5, label_fraction=0.01),
        dict(train_mode="distill", teacher="t", checkpoint="c"),
        dict(train_mode="supervised", se_ratio=0.25),
        dict(proj_head_mode="none", checkpoint="c"),
        dict(use_tpu=True),
        dict(profile_steps="5,5"),
        dict(use_tpu=True, strategy="tpu"),
        dict(dataset="image_folder", data_dir="d"),
        dict(dataset="cifar10", data_dir="d"),
    ],
)
def test_values_that_go_together_are_accepted(values):
    assert dataclasses.replace(Config(**values)) == Config(**values)


def test_the_steps_of_a_profile_are_the_first_the_last_and_those_between():
    assert Config(profile_steps="3,5").profiled_steps == range(3, 6)
    assert len(Config().profiled_steps) == 0


def test_the_small_stem_is_for_at_most_32_pixels():
    assert Config(image_size=32).cifar_stem and not Config(image_size=33).cifar_stem


def test_use_tpu_is_another_name_for_the_tpu_strategy():
    assert (Config(use_tpu=True).strategy_name, Config().strategy_name) == ("tpu", "auto")


# Who decides


def test_with_no_flag_the_digits_preset_holds():
    made, preset = resolve({}), {**config.PRESETS["digits"]["*"], **config.PRESETS["digits"]["pretrain"]}
    assert len(preset) > 10 and preset["eval_split"] == "test"
    for name, field in FIELDS.items():
        if name != "model_dir":
            assert getattr(made, name) == preset.get(name, field.default), name
    assert (made.dataset, made.train_mode, made.model_dir) == ("digits", "pretrain", "runs/digits_pretrain")


def test_presets_follow_the_dataset():
    assert resolve({"dataset": "cifar10"}).memory == "none"
    assert resolve({"dataset": "cifar10"}).resnet_depth == 50
    assert resolve({"dataset": "imagenet2012_subset/1pct"}).model_dir == "runs/imagenet2012_subset_1pct_pretrain"


def test_a_preset_of_one_train_mode_beats_that_of_all(monkeypatch):
    presets = {"digits": {"*": {"seed": 1, "momentum": 0.5}, "supervised": {"seed": 2}}}
    monkeypatch.setattr(subject, "PRESETS", presets)
    made = resolve({"train_mode": "supervised"})
    assert (made.seed, made.momentum, resolve({}).seed) == (2, 0.5, 1)


def test_flags_beat_presets():
    made = resolve({"resnet_depth": 34, "image_size": 28, "eval_split": "train", "model_dir": "m"})
    assert (made.resnet_depth, made.image_size, made.eval_split, made.model_dir) == (34, 28, "train", "m")
    preset = config.PRESETS["digits"]["*"]
    assert made.width_multiplier == preset["width_multiplier"]  # where no flag says otherwise


@pytest.mark.parametrize("period", ["train", "checkpoint"])
def test_epochs_that_are_given_beat_steps_that_are_not(monkeypatch, period):
    epochs, steps = f"{period}_epochs", f"{period}_steps"
    monkeypatch.setattr(subject, "PRESETS", {"digits": {"*": {steps: 7}}})
    assert getattr(resolve({}), steps) == 7
    assert getattr(resolve({epochs: 3}), steps) == 0
    assert getattr(resolve({epochs: 3, steps: 5}), steps) == 5
    assert getattr(resolve({epochs: 3}, saved(**{steps: 9})), steps) == 0


def test_zeros_as_the_classifiers_start_beat_that_of_a_preset():
    finetuning = dict(train_mode="finetune", checkpoint="runs/pretrain")
    assert subject.known_values(finetuning)["linear_start"] is True
    assert "linear_start" not in subject.known_values({**finetuning, "zero_init_logits_layer": True})
    assert refused(**finetuning, linear_start=True, zero_init_logits_layer=True)


def test_every_preset_makes_a_config():
    needed = {"finetune": {"checkpoint": "c"}, "distill": {"teacher": "t"}}
    for dataset, modes in config.PRESETS.items():
        assert set(modes) <= {"*", *config.TRAIN_MODES}
        for mode in config.TRAIN_MODES:
            made = resolve({"dataset": dataset, "train_mode": mode, **needed.get(mode, {})})
            for name, value in {**modes.get("*", {}), **modes.get(mode, {})}.items():
                assert getattr(made, name) == value


def test_a_checkpoint_decides_the_architecture():
    start = saved(**ARCHITECTURE, proj_out_dim=64, num_proj_layers=2, temperature=0.5)
    made = resolve({"dataset": "cifar10", "train_mode": "finetune", "checkpoint": "c"}, start=start)
    wanted = {**ARCHITECTURE, "proj_out_dim": 64, "num_proj_layers": 2}
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert made.temperature == 0.1  # of how it was trained, nothing is taken over


def test_a_student_that_starts_from_a_checkpoint_takes_its_encoder_and_not_the_teachers():
    teacher = saved(resnet_depth=50, image_size=64)
    made = resolve({"train_mode": "distill", "teacher": "t", "checkpoint": "c"}, None, saved(**ARCHITECTURE), teacher)
    assert {name: getattr(made, name) for name in ARCHITECTURE} == ARCHITECTURE


def test_a_flag_that_repeats_the_checkpoint_is_accepted():
    given = {"train_mode": "finetune", "checkpoint": "c", "resnet_depth": 18}
    assert resolve(given, start=saved(**ARCHITECTURE)).resnet_depth == 18


def test_a_flag_that_contradicts_the_checkpoint_is_refused_and_both_are_named():
    given = {"train_mode": "finetune", "checkpoint": "path/c", "resnet_depth": 50, "proj_out_dim": 32}
    message = unresolved(given, None, saved(**ARCHITECTURE))
    assert "--resnet_depth=50 contradicts --checkpoint=path/c, which has resnet_depth=18" in message
    assert "--proj_out_dim=32 contradicts --checkpoint=path/c, which has proj_out_dim=128" in message


@pytest.mark.parametrize(("trained_at", "wanted"), [(224, 32), (32, 64)])
def test_an_image_size_that_needs_another_stem_than_the_checkpoints_is_refused(trained_at, wanted):
    given = {"dataset": "cifar10", "train_mode": "finetune", "checkpoint": "c", "image_size": wanted}
    message = unresolved(given, None, saved(image_size=trained_at))
    assert f"--image_size={wanted} contradicts --checkpoint=c, trained at {trained_at} pixels" in message


def test_another_image_size_with_the_same_stem_is_accepted():
    given = {"dataset": "cifar10", "train_mode": "finetune", "checkpoint": "c", "image_size": 96}
    assert resolve(given, start=saved(image_size=224)).image_size == 96


def test_a_student_without_an_architecture_takes_its_teachers():
    made = resolve({"train_mode": "distill", "teacher": "t"}, teacher=saved(**ARCHITECTURE))
    assert {name: getattr(made, name) for name in ARCHITECTURE} == ARCHITECTURE


def test_a_student_may_have_an_architecture_of_its_own():
    made = resolve({"train_mode": "distill", "teacher": "t", "resnet_depth": 34}, teacher=saved(**ARCHITECTURE))
    assert made.resnet_depth == 34


def test_a_run_goes_on_with_its_own_values_and_the_new_flags():
    before = saved(train_mode="supervised", model_dir="old/place", momentum=0.5, train_steps=10, **ARCHITECTURE)
    made = resolve({"model_dir": "m", "train_steps": 20}, before)
    assert made.model_dir == "m" and made.train_steps == 20 and made.momentum == 0.5
    assert made.train_mode == "supervised" and made.resnet_depth == 18


OTHER_VALUES = dict(
    train_mode="supervised", image_size=64, optimizer="adam", memory="none", memory_size=10, ft_proj_selector=1,
    fine_tune_after_block=4, lineareval_while_pretraining=False, resnet_depth=18, width_multiplier=2.0, sk_ratio=0.0625,
    se_ratio=0.25, proj_head_mode="linear", proj_out_dim=64, num_proj_layers=2, labels_per_class=1, label_fraction=0.5,
    label_seed=1, train_split="train[:80%]",
)  # fmt: skip


@pytest.mark.parametrize("change", [dict(labels_per_class=5), dict(label_seed=1)])
def test_a_run_keeps_its_labelled_examples(change):
    before = saved(dataset="cifar10", train_mode="supervised", model_dir="m", labels_per_class=1)
    ((name, value),) = change.items()
    assert f"--{name}={value} contradicts the run" in unresolved({"model_dir": "m", **change}, before)


NETWORK_FIELDS = [name for name, kin in continuation.KIN.items() if kin is continuation.Kin.NETWORK]


@pytest.mark.parametrize("name", NETWORK_FIELDS)
def test_a_run_keeps_what_its_weights_depend_on(name):
    before, other = saved(dataset="cifar10", model_dir="m"), OTHER_VALUES[name]
    message = unresolved({"model_dir": "m", name: other}, before)
    assert f"--{name}={other} contradicts the run in --model_dir=m, which has {name}={before[name]}" in message
    assert "choose another --model_dir" in message


def test_a_run_cannot_train_on_another_dataset_but_can_be_evaluated_on_it():
    before = saved(dataset="cifar10", model_dir="m")
    given = {"model_dir": "m", "dataset": "cifar100", "eval_split": "test"}
    assert "--dataset=cifar100 contradicts the run" in unresolved({**given, "mode": "train_then_eval"}, before)
    assert "--dataset=cifar100 contradicts the run" in unresolved(given, before)
    made = resolve({**given, "mode": "eval"}, before)
    assert (made.dataset, made.eval_split) == ("cifar100", "test")


def test_a_run_on_an_image_folder_can_be_evaluated_on_another_dataset():
    before = saved(dataset="image_folder", data_dir="images", model_dir="m", image_size=16)
    made = resolve({"model_dir": "m", "mode": "eval", "dataset": "digits", "eval_split": "test"}, before)
    assert (made.dataset, made.data_dir) == ("digits", "")
