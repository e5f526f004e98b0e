"""Every command in the README runs, in its order, on a smaller network and for a step each."""

import re

import tiny
from conftest import ROOT
from test_run import command

import export

ONE_STAGE = True  # see conftest.py
README = (ROOT / "README.md").read_text()
SMALLER = [
    *("--resnet_depth=10", "--width_multiplier=0.125", "--image_size=16"),
    *("--train_steps=1", "--train_batch_size=12", "--memory=queue", "--memory_size=32", "--eval_every_epochs=-1"),
]


def commands_in(page):
    """The arguments of every `python run.py` line of a page, with a step instead of minutes."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split()[2:] for line in lines if line.startswith("python run.py")]
    return [[part for part in command if not part.startswith("--train_minutes")] for command in commands]


def fill_in(table):
    """Labels the images that are suggested, as a person would."""
    header, *rows = table.read_text().splitlines()
    assert header == "path,label" and len(rows) == 40
    table.write_text("\n".join([header, *(row + ("cat" if i % 2 else "dog") for i, row in enumerate(rows))]))


def test_every_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    tiny.digit_images("DIR/train", 10)
    tiny.digit_images("DIR/test", 2)
    for i in range(60):
        tiny.write_image(f"PILE/{i}.png", tiny.noise(i))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = commands_in(README)
    assert len(commands) >= 11
    export_run = export.export
    for arguments in commands:
        # tests/test_run.py has a command that exports after its evaluation.
        exports = export_run if "--mode=export" in arguments else lambda config, weights: "not exported here"
        monkeypatch.setattr(export, "export", exports)
        assert command(*arguments, *SMALLER) == 0, arguments
        if "--mode=suggest" in arguments:
            fill_in(tmp_path / "suggested.csv")
    ended = {path.parent.name for path in tmp_path.glob("runs/*/result.json")}
    assert len((tmp_path / "mine.csv").read_text().splitlines()) == 37
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 61
    assert ended == {
        "digits_pretrain",
        "digits_finetune",
        "digits_distill",
        "digits_supervised",
        "mine",
        "mine_ft",
        "mine_distilled",
    }


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)$", README, re.M)
    assert targets == ["demo", "test"] and all(f"\n{target}: " in makefile for target in targets)
