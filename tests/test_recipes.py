"""The recipes: each flagfile says where it is from, is right, holds the paper's values, and can be planned."""

import graphlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from test_run import command, parse

import run
from config import FIELDS, Config
from schedule import peak_learning_rate, train_steps, warmup_steps
from subject import resolve

RECIPES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.flags"))}
PAGE = (ROOT / "docs" / "recipes.md").read_text()
ALWAYS = {
    *("mode", "train_mode", "dataset", "eval_split", "model_dir"),
    *("image_size", "resnet_depth", "width_multiplier", "sk_ratio"),
}
EXAMPLES = {
    "imagenet2012": 1_281_167,
    "imagenet2012_subset/1pct": 12_811,
    "imagenet2012_subset/10pct": 128_116,
    "cifar10": 50_000,
}
MILLIONS = {"pretrain_r50_1x_sk0": 24, "pretrain_r50_2x_sk1": 140, "pretrain_r152_3x_sk1": 795}  # Table 1's parameters
PLANNED = (
    *("encoder_parameters", "head_parameters", "flops_per_image"),
    *("train_steps", "epoch_steps", "peak_learning_rate", "memory_bytes_per_replica"),
)


def head_of(name):
    """The comment at the top of a recipe, one line for each of its lines."""
    lines = RECIPES[name].read_text().splitlines()
    return [line for line in lines[: lines.index("")] if line.startswith("#")]


def set_in(name):
    """The flags a recipe sets, as (name, value) in its order."""
    lines = [line for line in RECIPES[name].read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"--\w+=\S+", line) for line in lines), lines
    return [tuple(line[2:].split("=", 1)) for line in lines]


def given_by(*arguments):
    """What a command line sets, read as run.py reads it."""
    assert parse(*arguments) == ["run.py"]
    return run.given_flags()


def made_by(name, **more):
    """The config of a recipe, no checkpoint opened."""
    return resolve({**given_by(f"--flagfile={RECIPES[name]}"), **more})


def named(pattern):
    """The recipes whose whole name matches."""
    found = [name for name in RECIPES if re.fullmatch(pattern, name)]
    assert found, pattern
    return found


def before(c):
    """The name of the recipe that a config starts from or learns from, or None."""
    return (c.checkpoint or c.teacher).removeprefix("runs/") or None


def examples(c):
    return 10 * c.labels_per_class if c.labels_per_class else EXAMPLES[c.dataset]


def steps(c):
    return train_steps(examples(c), c.train_epochs, c.train_batch_size, c.train_steps)


def peak(c):
    return peak_learning_rate(c.learning_rate, c.learning_rate_scaling, c.train_batch_size)


def warmup(c):
    return warmup_steps(examples(c), c.warmup_epochs, c.train_batch_size)


def is_large(c):
    return c.width_multiplier > 1 or c.sk_ratio > 0


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_says_where_it_is_from_and_what_to_expect(name):
    head = head_of(name)
    text = "\n".join(head)
    assert "2006.10029" in text and re.search(r"Table \d|Figure \w|Appendix \w|section \d", text)
    expected = [line for line in head if line.startswith("# expected: ")]
    assert len(expected) == 1 and re.search(r"\d+\.\d% top-1|a plot", expected[0])
    c = made_by(name)
    assert f"# batch {c.train_batch_size}, {steps(c):,} steps; the paper's hardware: " in text
    assert "# our choice: " in text
    assert all(len(line) <= 120 for line in head)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_real_flags_once_and_the_ones_that_matter(name):
    count = Counter(flag for flag, _ in set_in(name))
    assert set(count) <= set(FIELDS) and set(count.values()) == {1}
    assert set(count) >= ALWAYS


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_a_valid_run_of_its_own_name(name):
    c = made_by(name)
    assert c.mode == "train_then_eval" and c.model_dir == f"runs/{name}"
    assert c.eval_split == ("test" if c.dataset == "cifar10" else "validation")
    assert c.image_size == (32 if c.dataset == "cifar10" else 224)
    assert c.train_batch_size <= examples(c)
    assert 1 <= c.checkpoint_epochs <= c.train_epochs and c.summary_steps * 10 < steps(c)
    if network := re.search(r"_r(\d+)_(\d)x_sk([01])$", name):
        depth, width, sk = map(int, network.groups())
        assert (c.resnet_depth, c.width_multiplier, c.sk_ratio) == (depth, width, 0.0625 * sk)
    if share := re.search(r"_(\d+pct)", name):
        subset = f"imagenet2012_subset/{share[1]}"
        chain = [c]
        while before(chain[-1]):
            chain.append(made_by(before(chain[-1])))
        seen = {d.labelled_dataset or d.dataset for d in chain if d.train_mode != "pretrain" and d.distill_alpha < 1}
        seen |= {d.dataset for d in chain if d.train_mode in ("finetune", "supervised")}
        assert seen == {subset if share[1] != "100pct" else "imagenet2012"}


def test_the_thirteen_encoders_are_pretrained_as_in_section_3():
    names = named(r"pretrain_.*")
    networks = {(c.resnet_depth, c.width_multiplier, c.sk_ratio > 0) for c in map(made_by, names)}
    assert len(names) == 13
    assert networks == {(d, w, sk) for d in (50, 101, 152) for w in (1, 2) for sk in (False, True)} | {(152, 3, True)}
    for c in map(made_by, names):
        assert (c.dataset, c.optimizer, c.train_batch_size, c.train_epochs) == ("imagenet2012", "lars", 4096, 800)
        assert (steps(c), warmup(c), c.warmup_epochs) == (250_228, 12_511, 0.05 * c.train_epochs)
        assert math.isclose(peak(c), 6.4) and c.weight_decay == 1e-4
        assert (c.proj_head_mode, c.num_proj_layers, c.proj_out_dim) == ("nonlinear", 3, 128)
        assert (c.memory, c.memory_size, c.ema_decay, c.temperature) == ("queue", 65_536, 0.999, 0.1)
        assert c.color_jitter_strength == 1 and c.use_blur and c.lineareval_while_pretraining


@pytest.mark.parametrize(("share", "total", "layer"), [("1pct", 751, 1), ("10pct", 3_754, 1), ("100pct", 37_535, 0)])
def test_fine_tuning_is_as_in_section_3(share, total, layer):
    names = named(rf"finetune_{share}_.*")
    assert {name.removeprefix(f"finetune_{share}_") for name in names} == {"r50_1x_sk0", "r50_2x_sk1", "r152_3x_sk1"}
    for c in map(made_by, names):
        assert (steps(c), c.train_batch_size, c.ft_proj_selector) == (total, 1024, layer)
        assert math.isclose(peak(c), 0.064 if is_large(c) else 0.16)
        assert (c.optimizer, c.weight_decay, c.warmup_epochs, c.fine_tune_after_block) == ("lars", 0, 0, -1)
        assert (c.augment_policy, c.label_smoothing) == ("none", 0)


def test_linear_evaluation_is_the_releases():
    for c in map(made_by, named(r"linear_.*")):
        assert (c.fine_tune_after_block, c.zero_init_logits_layer, c.ft_proj_selector) == (4, True, 0)
        assert (c.optimizer, c.weight_decay, c.warmup_epochs) == ("momentum", 1e-6, 0)
        assert (steps(c), c.train_epochs) == (28_151, 90) and math.isclose(peak(c), 1.6)


def test_distillation_is_as_in_section_3():
    for name in named(r"(self)?distill_.*|table2_(label_)?distill_.*"):
        c, teacher = made_by(name), made_by(before(made_by(name)))
        assert c.train_mode == "distill" and not c.checkpoint
        assert (c.optimizer, c.weight_decay, c.train_epochs, c.warmup_epochs) == ("lars", 1e-4, 400, 20)
        assert c.learning_rate == 0.1 and c.learning_rate_scaling == "sqrt"
        same = (c.resnet_depth, c.width_multiplier) == (teacher.resnet_depth, teacher.width_multiplier)
        assert c.distill_temperature == (0.1 if same else 1.0) and same == name.startswith("selfdistill")
        if c.dataset == "imagenet2012":
            assert (steps(c), c.train_batch_size) == (125_114, 4096) and math.isclose(peak(c), 6.4)


@pytest.mark.parametrize("share", ["1pct", "10pct"])
def test_table_2_differs_in_the_targets_alone(share):
    kinds = ("label", "label_distill_labelled", "label_distill_all", "distill_all")
    rows = {kind: made_by(f"table2_{kind}_{share}") for kind in kinds}
    subset = f"imagenet2012_subset/{share}"
    assert [(c.dataset, c.labelled_dataset) for c in rows.values()] == [
        *((subset, ""), (subset, "")),
        *(("imagenet2012", subset), ("imagenet2012", "")),
    ]
    assert [c.distill_alpha for c in rows.values()][1:] == [0.5, 0.5, 1]
    assert [before(c) for c in rows.values()] == [None] + [f"finetune_{share}_r50_2x_sk1"] * 3
    for c in rows.values():
        assert (c.resnet_depth, c.width_multiplier, c.sk_ratio, c.distill_temperature) == (50, 1, 0, 1)
        assert (c.augment_policy, c.label_smoothing, c.weight_decay) == ("none", 0, 1e-4)


def test_supervised_training_of_few_labels_is_regularised():
    for name in named(r"supervised_.*"):
        c = made_by(name)
        few = "pct" in name
        assert (c.augment_policy, c.label_smoothing) == (("autoaugment", 0.1) if few else ("none", 0))
        assert (c.train_batch_size, c.train_epochs, c.warmup_epochs) == (1024 if few else 4096, 90, 4.5)


def test_cifar_is_as_in_appendix_g():
    names = named(r"cifar10_pretrain_.*")
    assert {made_by(name).resnet_depth for name in names} == {18, 34, 50, 101, 152, 200}
    for c in map(made_by, names):
        assert (c.train_epochs, c.train_batch_size, steps(c)) == (800, 512, 78_126)
        assert (c.temperature, c.memory, c.num_proj_layers, c.sk_ratio) == (0.2, "none", 2, 0.0625)
        assert (c.color_operators, c.use_blur) == ("broad", False) and c.sobel_probability > 0
        assert ("basic blocks" in "\n".join(head_of(Path(c.model_dir).name))) == (c.resnet_depth < 50)
    few, some, every = (made_by(f"cifar10_finetune_{labels}_r50_1x_sk1") for labels in (250, 4000, 50000))
    assert [examples(c) for c in (few, some, every)] == [250, 4000, 50_000]
    assert [c.ft_proj_selector for c in (few, some, every)] == [1, 1, 0]
    assert not every.subset


def test_recipes_come_in_an_order():
    """What a recipe starts from is another's run, none waits for itself, and the page lists them in that order."""
    waits = {name: {before(made_by(name))} - {None} for name in RECIPES}
    assert set().union(*waits.values()) <= set(RECIPES)
    graphlib.TopologicalSorter(waits).prepare()  # raises where there is a cycle
    for name in RECIPES:
        c = made_by(name)
        if before(c):
            mode = made_by(before(c)).train_mode
            assert mode == "pretrain" if c.train_mode == "finetune" else mode in ("finetune", "distill")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (?:`(\w+)`)? *\|$", PAGE, re.M)
    assert {name: {after} - {""} for name, after in rows} == waits
    done = set()
    for name, after in rows:
        assert not after or after in done
        done.add(name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_agrees_with_the_run_before_it(name):
    """Where the checkpoint or teacher is there, its config contradicts no flag and changes no architecture."""
    c = made_by(name)
    opened = {flag: made_by(before(c)).to_dict() for flag in ("checkpoint", "teacher") if getattr(c, flag)}
    given = given_by(f"--flagfile={RECIPES[name]}")
    after = resolve(given, start=opened.get("checkpoint"), teacher=opened.get("teacher"))
    changed = {field for field in FIELDS if getattr(after, field) != getattr(c, field)}
    assert changed <= ({"ft_proj_selector"} if c.train_mode == "distill" else set())  # there it is the teacher's


def test_the_expected_number_is_the_same_wherever_it_stands():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|[^|]*\|$", PAGE, re.M))
    assert set(rows) == set(RECIPES)
    for name in RECIPES:
        head = "\n".join(head_of(name))
        numbers = re.findall(r"(\d+\.\d)% top-[15]", re.search(r"^# expected: (.*)$", head, re.M)[1])
        assert re.findall(r"\d+\.\d", rows[name]) == numbers
        row = re.search(rf"^# +{made_by(name).resnet_depth} +([\d. ]+)$", head, re.M)  # of the column of Table 1
        assert not row or numbers[0] in row[1].split()


def test_the_commands_of_the_page_are_right():
    text = "".join(re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)).replace("\\\n", " ")
    lines = [line.split()[2:] for line in text.splitlines() if line.lstrip().startswith("python run.py")]
    assert len(lines) >= 10
    for arguments in lines:
        first, *rest = [argument.replace("$s", "3") for argument in arguments]
        config = resolve(given_by(first.replace("configs/", f"{ROOT}/configs/"), *rest))
        assert first.startswith("--flagfile=configs/") and isinstance(config, Config)
        assert config.mode == "plan" or config.data_dir
    loops = [line for name in RECIPES for line in head_of(name) if "python run.py" in line]
    assert loops and all(line.split("configs/")[1].split(".flags")[0] in RECIPES for line in loops)


# One recipe of each kind, with a small network. To plan a large one, or a teacher besides, takes seconds.
PLANNED_FAST = (
    "cifar10_finetune_250_r50_1x_sk1",
    "cifar10_pretrain_r18_1x_sk1",
    "distill_1pct_r50_1x_sk0",
    "finetune_10pct_r50_1x_sk0",
    "linear_r50_1x_sk0",
    "pretrain_r50_1x_sk0",
    "supervised_1pct_r50_1x_sk0",
    "table2_label_distill_labelled_1pct",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in PLANNED_FAST else pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_can_be_planned_before_there_is_anything(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert command(f"--flagfile={RECIPES[name]}", "--mode=plan", "--json", "--plan_timing=False") == 0
    planned = json.loads(capsys.readouterr().out)
    assert set(PLANNED) <= set(planned)
    c = made_by(name)
    assert planned["train_steps"] == steps(c)
    assert planned["epoch_steps"] in (examples(c) // c.train_batch_size, math.ceil(examples(c) / c.train_batch_size))
    assert math.isclose(planned["peak_learning_rate"], peak(c), rel_tol=1e-6)
    assert planned["encoder_parameters"] > 0 and planned["flops_per_image"] > 0
    assert planned["memory_bytes_per_replica"] > 4 * planned["encoder_parameters"]
    with_head = c.train_mode == "pretrain" or c.ft_proj_selector > 0
    assert (planned["head_parameters"] > 0) == with_head
    assert name not in MILLIONS or round(planned["encoder_parameters"] / 1e6) == MILLIONS[name]
    assert not list(tmp_path.iterdir())
