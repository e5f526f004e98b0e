"""The command line: right commands run; what ends them, and how. Wrong ones are in test_wrong_commands.py."""

import json
import logging
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from absl import flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import pilot
import run
import train

ONE_STAGE = True  # see conftest.py
RUN = Path(run.__file__).resolve()
NETWORK = [
    f"--{name}={value}"
    for name, value in {
        **tiny.NETWORK,
        **tiny.QUICK,
        "memory": "queue",
        "memory_size": 48,
        "eval_every_epochs": -1.0,
    }.items()
]


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """A run that has no projection head."""
    model_dir = str(tmp_path_factory.mktemp("supervised") / "run")
    tiny.train_run(**tiny.NETWORK, **tiny.QUICK, train_mode="supervised", train_steps=1, model_dir=model_dir)
    return model_dir


@pytest.fixture
def folder(tmp_path, tmp_path_factory, supervised, monkeypatch):
    """The working directory: runs good and bad, images good and bad."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    tiny.borrow(tiny.pretrained(tmp_path_factory), tmp_path / "pretrained")
    tiny.borrow(supervised, tmp_path / "supervised")
    tiny.digit_images("images/train", 2)
    tiny.digit_images("images/unlabelled", 2, labelled=False)
    return tmp_path


def parse(*arguments):
    """Has run.py read a command line in this process. Returns what is no flag."""
    if "resnet_depth" not in flags.FLAGS:
        run.define_flags()
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
    return run.parse_flags(["run.py", *arguments])


def command(*arguments):
    """Runs run.py's command line in this process. Returns its exit status."""
    try:
        run.main(parse(*arguments))
    except SystemExit as stop:
        return stop.code
    return 0


IMAGES = ["--dataset=image_folder", "--data_dir=images"]


def test_a_wrong_command_line_says_one_line_from_a_shell_too(tmp_path):
    wrong = [sys.executable, RUN, "--train_mode=finetune", "--checkpoint=nowhere"]
    done = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "run.py: error: --checkpoint=nowhere: no such folder or checkpoint\n"
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


AT_ONCE = [
    ["--no_such_flag=1"],
    ["--use_blur=maybe"],
    ["--train_batch_size=0"],
    ["--seed=4294967296"],
    ["--labels_per_class=1", "--label_fraction=0.1"],
    ["--train_mode=finetune", "--checkpoint=nowhere"],
    ["--dataset=image_folder", "--data_dir=nowhere"],
    ["--data_dir=images", "--labels=labels.csv", "--dataset=cifar10"],
    ["--mode=eval", "--model_dir=nowhere"],
    ["--model_dir=pretrained", "--resnet_depth=18"],
]


@pytest.mark.parametrize("arguments", AT_ONCE, ids=" ".join)
def test_what_can_be_refused_without_tensorflow_is_refused_at_once(folder, arguments):
    times = [sys.executable, "-X", "importtime", RUN, *arguments]
    done = subprocess.run(times, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("run.py: error: ")
    imported = re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE)
    assert "config" in imported
    assert not {"tensorflow", "keras", "sklearn", "tensorflow_datasets", "numpy"} & set(imported)
    seconds = max(int(line.split("|")[1]) for line in done.stderr.splitlines() if re.search(r"\| subject$", line)) / 1e6
    assert seconds < 1


def test_an_interruption_is_one_line_that_says_what_goes_on(folder, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.console.Progress, "show", interrupted)
    go_on = [*NETWORK, "--model_dir=pretrained", "--train_steps=5"]
    assert command(*go_on) == 75
    assert capfd.readouterr().err == "run.py: interrupted at step 4: the same command goes on from step 3\n"
    assert command(*NETWORK, "--train_mode=supervised", "--model_dir=new", "--train_steps=5") == 75
    assert "at step 1: the same command starts from the beginning, as nothing was saved\n" in capfd.readouterr().err


def test_sigterm_saves_the_step_and_the_status_says_that_the_command_goes_on(tmp_path):
    long_run = ["--train_mode=supervised", "--mode=train_then_eval", "--model_dir=run", "--checkpoint_steps=100000"]
    command = [sys.executable, RUN, *NETWORK, *long_run, "--train_steps=100000", "--train_summary_steps=0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = []
    while not lines or "supervised: step 1 of 100,000" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], "the command has ended"
    process.send_signal(signal.SIGTERM)
    # A warning on the terminal has no more than its level before it.
    assert any(line.startswith("WARNING: --train_summary_steps has no effect: ") for line in lines)
    err = process.stderr.read()
    assert process.wait() == 75
    said = [line for line in err.splitlines() if line.startswith("run.py: ")]
    assert said[0] == "run.py: SIGTERM: stops after this step and saves; a second signal stops at once, without saving"
    stopped = re.fullmatch(
        r"run.py: interrupted by SIGTERM at step (\d+): the same command goes on from step \1", said[1]
    )
    assert len(said) == 2
    assert checkpoint.Weights(str(tmp_path / "run")).step == int(stopped[1])
    events = EventAccumulator(str(tmp_path / "run" / "train"), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("train/loss")] == list(range(1, int(stopped[1]) + 1))
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_run_whose_numbers_are_not_finite_ends_with_status_1_and_one_line(folder, capfd):
    wild = ["--train_mode=supervised", "--optimizer=momentum", "--learning_rate=1e30", "--train_steps=3"]
    assert command(*NETWORK, *wild, "--mode=train_then_eval", "--model_dir=new") == 1
    err = capfd.readouterr().err.splitlines()
    assert [line for line in err if line.startswith("run.py: ")] == [err[-1]]
    assert re.match(r"run.py: stopped: \w+ is \w+ at step \d: lower --learning_rate; the same command", err[-1])
    assert not (folder / "new" / "result.json").exists() and not (folder / "new" / "saved_model").exists()


def test_the_largest_seed_there_is_trains(folder):
    assert command(*NETWORK, "--seed=4294967295", "--train_steps=1", "--model_dir=new") == 0


def test_help_names_every_flag_without_starting_tensorflow(tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", RUN, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert time.monotonic() - started < 5  # under a second on a machine that does nothing else
    assert not re.search(r"\| +(tensorflow|keras|sklearn)$", done.stderr, re.MULTILINE)
    assert re.search(r"\| +config$", done.stderr, re.MULTILINE)
    missing = [
        name for name in [*run.FIELDS, *run.RELEASE_FLAGS] if not re.search(rf"^ +--.*{name}\b", done.stdout, re.M)
    ]
    assert not missing


def test_a_command_trains_evaluates_and_exports(folder, capfd):
    assert command(*NETWORK, "--mode=train_then_eval", "--train_steps=2", "--model_dir=new run") == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "pretrain on digits in new run"
    assert said[1].startswith("view_1, view_2: random_crop(size=16, ")
    assert said[2].startswith("trained to step 2")
    assert "knn_top_1 0." in said[3] and "examples 360" in said[3]
    assert said[4] == "SavedModel: new run/saved_model/2"
    for name in ("config.json", "ckpt-2.index", "result.json", "result_2.json", "saved_model/2/saved_model.pb"):
        assert (folder / "new run" / name).is_file(), name


def test_an_evaluation_without_other_flags_knows_its_run(folder, capfd):
    assert command("--mode=eval", "--model_dir=pretrained") == 0
    assert "pretrain on digits in pretrained" in capfd.readouterr().out
    assert (folder / "pretrained" / "result_3.json").is_file()


def test_the_default_model_dir_is_named_after_dataset_and_train_mode(folder, capfd):
    assert command(*NETWORK, "--train_mode=supervised", "--train_steps=1") == 0
    assert "supervised on digits in runs/digits_supervised" in capfd.readouterr().out
    assert (folder / "runs" / "digits_supervised" / "ckpt-1.index").is_file()


def test_a_folder_of_images_needs_no_other_flag(folder, capfd, nothing_exported, monkeypatch):
    monkeypatch.setattr(pilot, "FEWEST_STEPS", 1)
    tiny.digit_images("images/val", 1)
    network = ["--resnet_depth=10", "--width_multiplier=0.0625"]
    small = ["--data_dir=images/", "--train_steps=1", "--eval_every_epochs=-1", *network]
    assert command(*small) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "pretrain on the images in images/ in runs/images_pretrain"
    assert said[1] == "--eval_split=val: the first of validation, valid, val, test that is in images/"
    assert said[2].startswith("probability of the right class of 6 images after 1 step:")
    assert said[3].startswith("--recipe=auto for 6 grey images of 24 x 24 pixels")
    saved = json.loads(Path("runs/images_pretrain/config.json").read_text())
    assert (saved["dataset"], saved["data_dir"], saved["eval_split"]) == ("image_folder", "images/", "val")
    labels = ["--train_mode=finetune", "--checkpoint=runs/images_pretrain", "--labels_per_class=1", "--train_steps=1"]
    assert command(*labels, "--data_dir=images", "--mode=train_then_eval") == 0
    assert json.loads(Path("runs/images_finetune/result.json").read_text())["examples"] == 3
    assert command(*small, "--mode=eval") == 0
    assert "--eval_split=" not in capfd.readouterr().out.splitlines()[-1]


def test_a_flagfile_is_read(folder, capfd):
    (folder / "wrong.cfg").write_text("# Table 1\n--train_mode=finetune\n--checkpoint=nowhere\n")
    assert command("--flagfile=wrong.cfg") == 2
    assert "--checkpoint=nowhere" in capfd.readouterr().err


# The 2020 release's README, on digits, in less time.
RELEASE_PRETRAIN = """
    --train_mode=pretrain --train_batch_size=16 --train_epochs=1000 --learning_rate=1.0 --weight_decay=1e-4
    --temperature=0.5 --dataset=digits --image_size=32 --eval_split=test --resnet_depth=18 --use_blur=False
    --color_jitter_strength=0.5 --model_dir=simclr_test --use_tpu=False --train_summary_steps=0
"""
RELEASE_FINETUNE = """
    --mode=train_then_eval --train_mode=finetune --fine_tune_after_block=4 --zero_init_logits_layer=True
    --variable_schema=(?!global_step|(?:.*/|^)Momentum|head) --global_bn=False --optimizer=momentum
    --learning_rate=0.1 --weight_decay=0.0 --train_epochs=100 --train_batch_size=16 --warmup_epochs=0
    --dataset=digits --image_size=32 --eval_split=test --resnet_depth=18 --checkpoint=simclr_test
    --model_dir=simclr_test_ft --use_tpu=False
"""
FEWER = ["--train_steps=1", "--resnet_depth=10", "--width_multiplier=0.125", "--eval_every_epochs=-1"]


def test_the_releases_commands_warn_of_what_has_no_effect(folder, whole_network, nothing_exported, caplog, capfd):
    caplog.set_level(logging.WARNING)
    assert command(*RELEASE_PRETRAIN.split(), *FEWER, "--memory_size=32") == 0
    assert "--train_summary_steps has no effect: TensorBoard scalars are written every --summary_steps" in caplog.text
    caplog.clear()
    assert command(*RELEASE_FINETUNE.split(), *FEWER) == 0
    assert "--variable_schema has no effect" in caplog.text and "train_summary_steps" not in caplog.text
    assert (folder / "simclr_test_ft" / "result.json").is_file()
    assert "finetune on digits in simclr_test_ft" in capfd.readouterr().out


def test_what_evaluation_will_refuse_is_refused_before_training(folder, capfd, monkeypatch):
    monkeypatch.setattr(train, "make_train_step", lambda *_, **__: pytest.fail("training has begun"))
    uneven = ["--strategy=mirrored", "--train_batch_size=8", "--eval_batch_size=6"]
    assert command(*NETWORK, "--mode=train_then_eval", *uneven, "--model_dir=new") == 2
    assert "--eval_batch_size=6: must be a multiple of the 4 replicas" in capfd.readouterr().err
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_unreadable_images_to_evaluate_on_end_the_evaluation_and_training_is_kept(folder, capfd):
    tiny.digit_images("images/test", 2)
    for image in (folder / "images/test/digit 0").iterdir():
        image.write_bytes(b"no image")
    arguments = [*IMAGES, "--image_size=16", "--mode=train_then_eval", "--eval_split=test", "--model_dir=new"]
    arguments.append("--train_steps=1")
    assert command(*NETWORK, *arguments) == 2
    assert "2 of 6 images cannot be read" in capfd.readouterr().err
    assert checkpoint.newest_that_reads("new", "", "") and not (folder / "new" / "result.json").exists()
    assert command("--mode=eval", "--model_dir=new", "--max_corrupt_fraction=0.5") == 0
    assert "examples 4" in capfd.readouterr().out


def test_a_disk_that_fills_up_ends_training_with_one_line_and_the_checkpoint_before_stays(folder, capfd):
    go_on = [*NETWORK, "--model_dir=pretrained", "--train_steps=4"]
    with tiny.full_disk(30_000):
        assert command(*go_on) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("run.py: ")]
    assert len(said) == 1 and "the checkpoint of step 4 in --model_dir=pretrained cannot be written: " in said[0]
    assert checkpoint.newest_that_reads("pretrained", "", "") == "pretrained/ckpt-3"


def test_a_flag_beside_a_flagfile_beats_the_file_wherever_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.flags").write_text("# a recipe\n--mode=train\n--resnet_depth=18\n--learning_rate=0.5\n")
    plan = ["--mode=plan", "--json", "--plan_timing=False"]
    for arguments in (["--flagfile=a.flags", *plan], [*plan, "--flagfile=a.flags"], [*plan, "--flagfile", "a.flags"]):
        assert command(*arguments, "--train_batch_size=512") == 0
        assert json.loads(capsys.readouterr().out)["peak_learning_rate"] == 1.0
        assert not (tmp_path / "runs").exists()
