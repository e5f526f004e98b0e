"""The comparison of the three steps: its statistics, its commands, and how it goes on."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import ROOT
from PIL import Image
from scipy import stats

import checkpoint
import comparison
import data
import frozen
import preparation
import steps
import three_steps
from comparison import Accuracy, Comparison, Estimate
from config import Config
from errors import UserError

MANY = 10_000
OURS = Comparison("finetune", "supervised", "fine-tuning", "supervised training")


def measured(method, top_1s, labels_per_class=1):
    """The accuracies of a method on label seeds 0, 1, ..."""
    return [Accuracy(method, labels_per_class, seed, top_1) for seed, top_1 in enumerate(top_1s)]


def of_every_method(*counts):
    """Made-up accuracies on three draws of each number of labels."""
    return [
        found
        for count in counts
        for place, method in enumerate(comparison.METHODS)
        for found in measured(method, [0.3 + 0.05 * place + 0.01 * seed for seed in range(3)], count)
    ]


def test_the_interval_is_students():
    values = [0.556, 0.586, 0.589, 0.6]
    mean, half_width, draws = comparison.estimate(values)
    low, high = stats.t.interval(0.95, df=3, loc=np.mean(values), scale=stats.sem(values))
    assert draws == 4 and mean == pytest.approx(np.mean(values))
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))


def test_one_draw_has_no_interval():
    assert comparison.estimate([0.5]) == Estimate(0.5, None, 1)
    with pytest.raises(ValueError, match="no value"):
        comparison.estimate([])


def test_differences_are_paired_by_label_seed():
    # The accuracies differ by 30 points from draw to draw, the gain by 2.
    accuracies = measured("supervised", [0.2, 0.5, 0.8]) + measured("finetune", [0.3, 0.62, 0.91])
    gain = comparison.mean_difference(accuracies, OURS, 1)
    assert gain.mean == pytest.approx(0.11)
    assert gain.half_width == pytest.approx(stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3))
    assert comparison.mean_difference(accuracies, OURS, 4) is None


def test_a_draw_on_which_one_method_failed_is_no_pair():
    accuracies = measured("supervised", [0.2, None, 0.8]) + measured("finetune", [0.3, 0.9, 1.0])
    gain = comparison.mean_difference(accuracies, OURS, 1)
    assert gain.mean == pytest.approx(0.15) and gain.draws == 2


@pytest.mark.parametrize(
    ("mean", "half_width", "test_images", "said"),
    [
        (0.123, 0.031, MANY, "pays"),
        (0.003, 0.002, MANY, "pays"),
        (-0.123, 0.031, MANY, "does not pay"),
        (0.001, 0.004, MANY, "does not pay"),
        (0.05, 0.08, MANY, "cannot tell"),
        (-0.05, 0.08, MANY, "cannot tell"),
        (0.5, None, MANY, "cannot tell"),
        (1 / 360, 0.0, 360, "does not pay"),  # the same one image more on each draw
        (1 / 90, 0.0, 90, "cannot tell"),
        (5 / 90, 0.0, 90, "pays"),
    ],
)
def test_verdicts(mean, half_width, test_images, said):
    assert comparison.verdict(Estimate(mean, half_width, 3), test_images) == said


def test_verdicts_in_words():
    def said(mean, half_width, draws=3):
        return comparison.sentence(OURS, Estimate(mean, half_width, draws), MANY)

    assert said(0.123, 0.031) == "fine-tuning pays: +12.3 ± 3.1 points over supervised training"
    assert said(-0.02, 0.001) == "fine-tuning does not pay: -2.0 ± 0.1 points over supervised training"
    unclear = "10,000 test images cannot tell whether fine-tuning pays:"
    assert said(0.01, 0.04) == f"3 label seeds and {unclear} +1.0 ± 4.0 points over supervised training"
    assert said(0.01, None, 1) == f"one label seed and {unclear} +1.0 points over supervised training"


def test_the_table():
    accuracies = of_every_method(1, 25)
    accuracies = [
        found._replace(top_1=None)
        if found.method == "distill" and (found.labels_per_class == 25 or found.label_seed == 1)
        else found
        for found in accuracies
    ]
    lines = comparison.markdown(accuracies, MANY).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["method"] == ["1 label a class", "25 labels a class"]
    assert list(rows)[2 : 2 + len(comparison.METHODS)] == list(comparison.METHODS.values())
    assert rows["supervised from scratch"] == ["41.0 ± 2.5", "41.0 ± 2.5"]
    assert rows["pretrained, fine-tuned, distilled"] == ["61.0 ± 12.7 (2 of 3 draws)", "failed"]
    assert rows["fine-tuning over supervised training"] == ["+15.0 ± 0.0, pays"] * 2
    assert rows["distillation over fine-tuning"] == ["+5.0 ± 0.0, pays (2 of 3 draws)", "failed"]
    assert "- With 25 labels a class, fine-tuning pays: +25.0 ± 0.0 points over raw pixels." in lines
    assert len({len(line) for line in lines if line.startswith(("| method", "| raw", "| pretrained"))}) == 1


def test_one_seed_is_said_in_the_table():
    text = comparison.markdown(of_every_method(4)[::3], MANY)
    assert "One draw of the labels (label seed 0), so no interval." in text and "±" not in text


def test_the_figures_for_programs():
    found = json.loads(json.dumps(comparison.as_json(of_every_method(1, 4), MANY)))
    assert list(found) == ["accuracies", "means", "differences", "verdicts"]
    assert len(found["accuracies"]) == 2 * 3 * len(comparison.METHODS)
    assert found["accuracies"][1] == {"method": "pixels", "labels_per_class": 1, "label_seed": 1, "top_1": 0.31}
    assert set(found["means"][0]) == {"method", "labels_per_class", "mean", "half_width", "draws"}
    assert len(found["differences"]) == 2 * len(comparison.COMPARISONS)
    assert set(found["differences"][0]) == {*found["means"][0], "against", "verdict"}
    assert len(found["verdicts"]) == 6


@pytest.mark.parametrize("counts", [(1,), (1, 4, 25)])
def test_the_picture(tmp_path, counts):
    failed = [found._replace(top_1=None) if found.method == "distill" else found for found in of_every_method(*counts)]
    comparison.plot(failed, tmp_path / "table.png", "digits")
    pixels = np.asarray(Image.open(tmp_path / "table.png").convert("RGB"))
    assert pixels.shape[0] > 500 and pixels.shape[1] > 900
    for method in ("supervised", "finetune"):  # Each method is there in its colour, paler where it is a bar.
        colour = np.array([int(comparison.STYLES[method][0][i : i + 2], 16) for i in (1, 3, 5)])
        shade = colour if len(counts) > 1 else 0.75 * colour + 0.25 * 255
        assert (np.abs(pixels - shade).max(axis=-1) < 3).sum() > 100, method


class Machine:
    """Pretends to run commands: notes them, and leaves what the commands leave. `broken` fail, `slow` are stopped."""

    def __init__(self, monkeypatch):
        self.now, self.commands, self.broken, self.slow = 0.0, [], (), ()
        monkeypatch.setattr(steps.time, "monotonic", lambda: self.now)

    def __call__(self, command):
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in command[1:])
        folder = flags.get("model_dir") or flags["output"]
        if flags.get("mode") == "predict":
            folder = str(Path(flags["output"]).parent)
            self.commands.append((command[0], flags, folder))
            self.now += 20
            Path(flags["output"]).write_text(f"by {flags['model_dir']}")
            return 0
        self.commands.append((command[0], flags, folder))
        train_mode = flags.get("train_mode", "frozen")
        self.now += {"pretrain": 600, "frozen": 20}.get(train_mode, 60)
        if folder.endswith(self.slow):
            raise KeyboardInterrupt
        if folder.endswith(self.broken):
            return 1
        top_1 = {"supervised": 0.3, "finetune": 0.5, "distill": 0.6}.get(train_mode)
        result = {"top_1": top_1} if top_1 else {}
        if command[0] == "tools/frozen.py":
            result = {"test_images": 360, "train_images": 1437, "classes": ["a", "b"]}
        if "pretrained" in flags:
            counts, seeds = flags["labels_per_class"].split(","), flags["label_seeds"].split(",")
            draws = [{"labels_per_class": int(count), "label_seed": int(seed)} for count in counts for seed in seeds]
            methods = ("pixels", "untrained", "frozen_knn", "frozen_linear")
            result["accuracies"] = [{"method": method, **draw, "top_1": 0.4} for method in methods for draw in draws]
        Path(folder, "result.json").write_text(json.dumps(result))
        if train_mode == "pretrain":
            saved = {"image_size": 32, "resnet_depth": 18, "width_multiplier": 0.25, "git_commit": "abc"}
            Path(folder, "config.json").write_text(json.dumps(saved))
            alarms = [{"step": 9, "name": "rising", "text": "still rising"}]
            Path(folder, "probe.json").write_text(json.dumps({"alarms": alarms}))
        return 0

    def folders(self):
        """The folders of the commands since the last call."""
        done, self.commands = self.commands, []
        return [folder.removeprefix("out/") for _, _, folder in done]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR" / "test").mkdir(parents=True)
    # Drawing takes half a second each time.
    monkeypatch.setattr(comparison, "plot", lambda accuracies, path, title: path.write_text(title))
    return Machine(monkeypatch)


def compare(machine, *more):
    """The comparison on a pretended folder with two draws of one label a class. Returns the exit status."""
    command = ["--data_dir=DIR", "--labels_per_class=1", "--label_seeds=0,1", "--output=out", *more]
    return three_steps.compare(three_steps.parse(command), command, machine)


OF_SEED = [f"labels_1/seed_{{}}/{name}" for name in ("supervised", "finetune", "distill")]
ALL = ["check", "pretrain", "frozen", *(folder.format(seed) for seed in (0, 1) for folder in OF_SEED), "predict"]


def test_the_commands(machine):
    assert compare(machine, "--train_minutes=2", "--pretrain.seed=3", "--finetune.ft_proj_selector=2") == 0
    assert [folder for _, _, folder in machine.commands] == [f"out/{name}" for name in ALL]
    of = {folder.removeprefix("out/"): (script, flags) for script, flags, folder in machine.commands}
    data_flags = {"dataset": "image_folder", "data_dir": "DIR", "train_split": "train", "eval_split": "test"}
    assert all(flags.items() >= data_flags.items() for _, flags in of.values())
    script, pretrain = of["pretrain"]
    assert script == "run.py" and pretrain["lineareval_while_pretraining"] == "False"
    assert pretrain["train_minutes"] == "2.0" and pretrain["seed"] == "3"
    assert not {"labels_per_class", "label_seed", "checkpoint"} & set(pretrain)
    script, judged = of["frozen"]
    assert script == "tools/frozen.py" and judged["pretrained"] == "out/pretrain" and judged["label_seeds"] == "0,1"
    assert of["check"] == (script, {**{k: v for k, v in judged.items() if k != "pretrained"}, "output": "out/check"})
    labels = {"labels_per_class": "1", "label_seed": "1"}
    _, supervised = of["labels_1/seed_1/supervised"]
    network = {"image_size": "32", "resnet_depth": "18", "width_multiplier": "0.25"}  # those of the pretraining run
    assert supervised.items() >= {"train_mode": "supervised", **network, **labels}.items()
    assert "checkpoint" not in supervised and "train_minutes" not in supervised
    _, finetune = of["labels_1/seed_1/finetune"]
    assert finetune.items() >= {"checkpoint": "out/pretrain", "ft_proj_selector": "2", **labels}.items()
    _, distill = of["labels_1/seed_1/distill"]
    teacher = "out/labels_1/seed_1/finetune"
    assert distill.items() >= {"checkpoint": "out/pretrain", "teacher": teacher, **labels}.items()
    assert "ft_proj_selector" not in distill
    script, predict = of["predict"]
    assert script == "run.py" and predict == {
        **data_flags, "mode": "predict", "model_dir": "out/labels_1/seed_0/distill", "labels_per_class": "1",
        "label_seed": "0", "unlabelled_only": "True", "output": "out/predict/predictions.csv",
    }  # fmt: skip
    assert Path("out/predictions.csv").read_text() == "by out/labels_1/seed_0/distill"


@pytest.mark.parametrize(
    ("counts", "broken", "best"),
    [
        ("1,4", (), "labels_4/seed_0/distill"),
        ("1,4", ("labels_4/seed_0/distill",), "labels_4/seed_1/distill"),
        ("4", ("distill",), "labels_4/seed_0/finetune"),
        ("4", ("finetune",), ""),
        ("4,800", (), ""),
    ],
)
def test_the_best_classifier_predicts(machine, counts, broken, best):
    machine.broken = broken
    compare(machine, f"--labels_per_class={counts}")
    assert Path("out/predictions.csv").exists() == bool(best)
    assert not best or Path("out/predictions.csv").read_text() == f"by out/{best}"


def test_a_student_of_other_images_sees_no_labels(machine):
    compare(machine, "--pretrain.train_split=train+more", "--distill.train_split=train+more")
    flags = {folder: flags for _, flags, folder in machine.commands}
    distill = flags["out/labels_1/seed_0/distill"]
    assert distill["train_split"] == "train+more" and distill["distill_alpha"] == "1.0"
    assert "labels_per_class" not in distill
    assert flags["out/pretrain"]["train_split"] == "train+more"
    assert flags["out/labels_1/seed_0/finetune"]["train_split"] == "train"


def test_the_results(machine, capsys):
    compare(machine)
    out = Path("out")
    results = json.loads((out / "results.json").read_text())
    assert results["git_commit"] == "abc" and results["test_images"] == 360 and results["label_seeds"] == [0, 1]
    assert results["seconds"] == 600 + 3 * 20 + 6 * 60
    assert [step["name"] for step in results["steps"]] == ALL
    assert {"command", "status", "seconds", "result"} <= set(results["steps"][0])
    assert {found["method"] for found in results["accuracies"]} == set(comparison.METHODS)
    table = (out / "table.md").read_text()
    assert table.startswith("# DIR: 360 test images of 2 classes\n") and "at commit abc" in table
    assert "Seconds: check 20, pretrain 600, frozen 20, supervised 60 (mean of 2)" in table
    assert "- Said while pretraining: still rising\n" in table and results["alarms"] == ["still rising"]
    assert table in capsys.readouterr().out
    assert (out / "table.png").read_text() == "DIR: 360 test images of 2 classes"


def test_what_is_done_is_skipped(machine, capsys):
    compare(machine)
    first = json.loads(Path("out/results.json").read_text())
    machine.folders()
    assert compare(machine) == 0 and machine.folders() == []
    assert json.loads(Path("out/results.json").read_text()) == first
    assert "done before, in 10 min: out/pretrain" in capsys.readouterr().out


def test_a_step_with_other_flags_gets_a_fresh_folder(machine, capsys):
    compare(machine)
    machine.folders()
    changed = "--finetune.train_steps=9"
    compare(machine, changed)
    changed_runs = [f"labels_1/seed_{seed}/{name}_2" for seed in (0, 1) for name in ("finetune", "distill")]
    assert machine.folders() == [*changed_runs, "predict_2"]
    assert "made by another command; out/labels_1/seed_0/finetune_2 is new" in capsys.readouterr().out
    compare(machine)
    assert Path("out/predictions.csv").read_text() == "by out/labels_1/seed_0/distill"
    compare(machine, changed)
    assert machine.folders() == []
    assert Path("out/predictions.csv").read_text() == "by out/labels_1/seed_0/distill_2"


def test_a_folder_that_is_not_ours_is_left_alone(machine):
    Path("out/pretrain").mkdir(parents=True)
    compare(machine)
    assert "pretrain_2" in machine.folders() and not list(Path("out/pretrain").iterdir())


def test_a_failed_step_does_not_stop_the_others(machine, capsys):
    machine.broken = ("seed_1/finetune",)
    assert compare(machine) == 1
    assert machine.folders() == [name for name in ALL if name != "labels_1/seed_1/distill"]
    out = capsys.readouterr().out
    assert "left out, since this failed: labels_1/seed_1/finetune" in out
    assert re.search(r"pretrained, fine-tuned +\| +50.0 \(1 of 2 draws\)", out)
    assert "not done: labels_1/seed_1/finetune, labels_1/seed_1/distill; the same command" in out
    results = json.loads(Path("out/results.json").read_text())
    assert [step["status"] for step in results["steps"]][-3:] == ["failed", "left out", "done"]
    assert {"method": "distill", "labels_per_class": 1, "label_seed": 1, "top_1": None} in results["accuracies"]
    machine.broken = ()
    assert compare(machine) == 0
    assert machine.folders() == ["labels_1/seed_1/finetune", "labels_1/seed_1/distill"]


def test_without_pretraining_there_is_supervised_training(machine, capsys):
    machine.broken = ("pretrain",)
    assert compare(machine) == 1
    assert machine.folders() == ["check", "pretrain", *(OF_SEED[0].format(seed) for seed in (0, 1))]
    out = capsys.readouterr().out
    assert re.search(r"pretrained, fine-tuned +\| +failed", out) and re.search(r"raw pixels, kNN +\| +failed", out)


def test_wrong_data_stop_it_at_once(machine):
    machine.broken = ("check",)
    assert compare(machine) == 2
    assert machine.folders() == ["check"] and not Path("out/results.json").exists()


def test_a_stopped_step_goes_on_in_its_folder(machine):
    machine.slow = ("seed_0/finetune",)
    with pytest.raises(KeyboardInterrupt):
        compare(machine)
    (*_, stopped) = machine.commands
    machine.folders()
    machine.slow = ()
    assert compare(machine) == 0
    assert machine.commands[0] == stopped
    assert machine.folders() == ALL[ALL.index("labels_1/seed_0/finetune") :]
    record = json.loads(Path("out/labels_1/seed_0/finetune/step.json").read_text())
    assert record["status"] == "done" and record["seconds"] == 120  # of both attempts


def test_a_command_that_was_interrupted_stops_the_job(machine):
    with pytest.raises(KeyboardInterrupt):
        compare(lambda command: steps.INTERRUPTED)


def test_time_left(machine, capsys):
    compare(machine)
    said = re.findall(r"step \d+ of 10: (.*)", capsys.readouterr().out)
    assert said == [
        *("check", "pretrain", "frozen", "labels_1/seed_0/supervised"),
        "labels_1/seed_0/finetune, about 6 min left",
        "labels_1/seed_0/distill, about 5 min left",
        "labels_1/seed_1/supervised, about 4 min left",
        "labels_1/seed_1/finetune, about 3 min left",
        "labels_1/seed_1/distill, about 2 min left",
        "predict, about 1 min left",
    ]


def test_a_real_command_is_run_with_its_exit_status():
    assert steps.execute(["errors.py"]) == 0
    assert steps.execute(["tools/three_steps.py", "--labels_per_class=0"]) == 2


MISTAKES = {
    "--labels_per_class=0": "--labels_per_class=0: must be whole numbers of at least 1, such as 1,4",
    "--labels_per_class=1,x": "--labels_per_class=1,x: must be whole numbers",
    "--label_seeds=": "--label_seeds=: must be whole numbers of at least 0",
    "--train_minutes=-1": "--train_minutes=-1.0: must be more than 0",
    "--train_minutes=long": "invalid float value",
    "--train_epochs=3": "unknown argument --train_epochs=3: flags of a step look like --pretrain.train_epochs=20",
    "--pretrain.train_epochs": "unknown argument --pretrain.train_epochs",
    "--teach.train_epochs=3": "unknown argument --teach.train_epochs=3",
    "somewhere": "unknown argument somewhere",
    "--pretrain.epochs=3": "--pretrain.epochs: run.py has no flag --epochs",
    "--finetune.labels_per_class=3": "--finetune.labels_per_class: this program chooses --labels_per_class itself",
    "--finetune.checkpoint=a": "--finetune.checkpoint: this program chooses --checkpoint itself",
    "--finetune.checkpoint_choice=best": "--finetune.checkpoint_choice: this program chooses",
    "--distill.learning_rate=fast": "--distill.learning_rate=fast: must be a number",
    "--train_minutes=nan": "--train_minutes=nan: must be more than 0",
    "--pretrain.use_flip=no": "--pretrain.use_flip=no: must be true or false",
    "--pretrain.resnet_depth=19": "--resnet_depth=19",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_mistakes_are_one_line(argument, capsys):
    assert three_steps.main(["--data_dir=DIR", argument]) == 2
    said = capsys.readouterr().err
    assert said.startswith("three_steps.py: error: ") and MISTAKES[argument] in said and said.count("\n") == 1


def test_an_output_that_is_no_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    tiny.digit_images(tmp_path / "DIR" / "train", 2)
    assert three_steps.main([f"--data_dir={tmp_path / 'DIR'}", f"--output={tmp_path / 'file'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"three_steps.py: error: {tmp_path / 'file'}") and said.count("\n") == 1


def test_more_mistakes():
    with pytest.raises(UserError, match="give a folder of images by --data_dir=DIR"):
        three_steps.parse([])
    with pytest.raises(UserError, match=r"--distill\.train_split: other images have other labels"):
        three_steps.parse(["--data_dir=DIR", "--distill.train_split=more", "--distill.distill_alpha=0.5"])


def test_the_test_images_are_looked_for_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.digit_images("DIR/train", 3)
    assert three_steps.parse(["--data_dir=DIR"]).eval_split == "auto"
    opened = frozen.open_data(Config(dataset="image_folder", data_dir="DIR", eval_split="auto"), [1], [0])
    assert opened.train_images + opened.test.examples == 9 and opened.bank.examples == 3
    assert three_steps.parse(["--data_dir=DIR", "--eval_split=train[80%:]"]).eval_split == "train[80%:]"
    for folder in ("test", "val"):
        (tmp_path / "DIR" / folder).mkdir()
        assert three_steps.parse(["--data_dir=DIR"]).eval_split == folder
    assert three_steps.parse(["--dataset=cifar10", "--data_dir=DIR"]).eval_split == "test"
    with pytest.raises(UserError, match="--data_dir=nowhere: no such folder"):
        three_steps.parse(["--data_dir=nowhere"])
    with pytest.raises(UserError, match="--dataset=image_folder needs --data_dir=DIR"):
        three_steps.parse(["--dataset=image_folder"])


def test_labels_may_stand_in_a_table(tmp_path, monkeypatch):
    """Every step gets the table, and the draws of labels are from it alone."""
    monkeypatch.chdir(tmp_path)
    tiny.digit_images("DIR/all", 3)
    names = sorted(path.relative_to("DIR").as_posix() for path in Path("DIR").rglob("*_*.*"))
    rows = [f"{name},{name[-7]},{'test' if '_2.' in name else 'train'}" for name in names]
    Path("DIR/labels.csv").write_text("\n".join(["path,label,split", *rows]))
    options = three_steps.parse(["--labels=DIR/labels.csv"])
    assert options.eval_split == "test" and options.output == Path("runs/DIR_three_steps")
    assert options.data_flags["labels"] == "DIR/labels.csv" and options.data_flags["data_dir"] == "DIR"
    config = Config(**options.data_flags)
    opened = frozen.open_data(config, [1, 2], [0])
    assert opened.train_images == 6 and opened.test.examples == 3 and opened.bank.examples == 6
    with pytest.raises(UserError, match="--labels and --images go with a folder of images, not with --dataset=digits"):
        three_steps.parse(["--labels=DIR/labels.csv", "--dataset=digits"])


def test_a_comparison_is_named_after_its_data():
    assert three_steps.parse(["--data_dir=a/photos/", "--eval_split=t"]).output == Path("runs/photos_three_steps")
    assert three_steps.parse(["--dataset=a/b", "--data_dir=c"]).output == Path("runs/a_b_three_steps")
    assert three_steps.parse(["--dataset=digits", "--output=mine"]).output == Path("mine")


def test_the_demo_is_the_comparison_on_the_digits():
    (line,) = re.findall(r"three_steps\.py (.*)", (ROOT / "Makefile").read_text())
    options = three_steps.parse(shlex.split(line))
    assert options.draws == [(1, 0), (1, 1), (1, 2)] and options.output == Path("runs/demo")
    assert options.data_flags == {"dataset": "digits", "train_split": "train", "eval_split": "test"}
    assert not any(options.more.values())


def test_frozen_features_see_the_labels_that_a_run_draws():
    opened = frozen.open_data(Config(eval_split="test"), [1, 4], [0, 2])
    assert set(opened.rows) == {(1, 0), (1, 2), (4, 0), (4, 2)} and opened.train_images == 1437
    names, labels = opened.bank.index()
    for (count, seed), rows in opened.rows.items():
        config = tiny.resolve(train_mode="supervised", labels_per_class=count, label_seed=seed)
        _, chosen = data.train_source(config, None)
        assert [names[row] for row in rows] == chosen
        assert np.bincount(labels[rows]).tolist() == [count] * 10


def test_test_images_without_labels_are_a_mistake(tmp_path):
    tiny.digit_images(tmp_path / "train", 2)
    tiny.digit_images(tmp_path / "test", 2, labelled=False)
    with pytest.raises(UserError, match="--eval_split=test has no labels"):
        frozen.open_data(Config(dataset="image_folder", data_dir=str(tmp_path), eval_split="test"), [1], [0])


def test_frozen_accuracies(tmp_path, tmp_path_factory):
    """The untrained network is the run's before its first step, and every method is judged on every draw."""
    opened = frozen.open_data(Config(eval_split="test[:40]"), [1, 30], [0, 1])
    weights = checkpoint.Weights(tiny.pretrained(tmp_path_factory))
    config = tiny.resolve(**tiny.PRETRAIN, model_dir=str(tmp_path / "new"))
    initial = preparation.prepare(config, tf.distribute.get_strategy()).task.model
    untrained = frozen.untrained_network(config, weights.classes)
    for ours, theirs in zip(untrained.encoder.variables, initial.encoder.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    found = frozen.accuracies(weights, opened)
    drawn = {(row["method"], row["labels_per_class"], row["label_seed"]): row["top_1"] for row in found}
    methods = ("pixels", "untrained", "frozen_knn", "frozen_linear")
    assert set(drawn) == {(method, count, seed) for method in methods for count in (1, 30) for seed in (0, 1)}
    assert 0.1 < drawn["pixels", 1, 0] < drawn["pixels", 30, 0] and drawn["pixels", 30, 0] > 0.8
    assert drawn["frozen_linear", 30, 0] > 0.3


@pytest.mark.slow
def test_the_whole_comparison(tmp_path):
    tiny.digit_images(tmp_path / "DIR" / "train", 12)
    tiny.digit_images(tmp_path / "DIR" / "test", 8)
    small = dict(tiny.NETWORK, image_size=16, train_batch_size=12, train_steps=2, optimizer="momentum", memory="none")
    flags = [f"--{mode}.{name}={value}" for mode in three_steps.TRAIN_MODES for name, value in small.items()]
    command = [sys.executable, ROOT / "tools" / "three_steps.py", "--data_dir=DIR", "--labels_per_class=2,4", *flags]
    first = subprocess.run([*command, "--label_seeds=1"], cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "runs" / "DIR_three_steps"
    results = json.loads((out / "results.json").read_text())
    found = {(row["method"], row["labels_per_class"]): row["top_1"] for row in results["accuracies"]}
    assert set(found) == {(method, count) for method in comparison.METHODS for count in (2, 4)}
    assert all(0 <= top_1 <= 1 for top_1 in found.values())
    predictions = (out / "predictions.csv").read_text().splitlines()
    assert predictions[0].startswith("path,class,probability,class_2,") and len(predictions) == 1 + 3 * 12 - 3 * 4
    for mode in ("supervised", "finetune", "distill"):
        folder = out / "labels_4" / "seed_1" / mode
        assert found[mode, 4] == json.loads((folder / "result.json").read_text())["top_1"]
        assert len(json.loads((folder / "labelled_subset.json").read_text())["examples"]) == 12
    assert (out / "table.png").exists()
    again = subprocess.run([*command, "--label_seeds=1"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("done before") == 10
