"""Wrong command lines: each ends with status 2 and one line that says what to do, and leaves every file as it was."""

import os
from pathlib import Path

import pytest
import tensorflow as tf
import tiny
from test_run import IMAGES, NETWORK, command

import evaluate
import train
from config import FIELDS
from errors import did_you_mean, did_you_mean_path, one_line

SMALL = {**tiny.NETWORK, **tiny.QUICK}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with runs good and bad, images and tables good and bad. Returns it, and what is in it."""
    path = tmp_path_factory.mktemp("wrong")
    before = os.getcwd()
    os.chdir(path)
    tiny.begun(**{**tiny.PRETRAIN, "model_dir": "pretrained"})
    tiny.begun(**SMALL, train_mode="pretrain", memory="none", lineareval_while_pretraining=False, model_dir="unjudged")
    tiny.begun(**SMALL, train_mode="supervised", model_dir="supervised")
    for name in ("cut", "no_json", "other_json"):
        tiny.borrow("pretrained", name)
    (data_file,) = Path("cut").glob("*.data-*")
    data_file.write_bytes(data_file.read_bytes()[:100])
    Path("no_json/config.json").write_text("{")
    Path("other_json/config.json").write_text("[1]")
    tf.train.Checkpoint(v=tf.Variable(1.0)).save("foreign/ckpt")
    Path("empty").mkdir()
    Path("taken.csv").mkdir()
    Path("a_file").write_text("no run")
    Path("bytes.cfg").write_bytes(b"\x89PNG\xff")
    Path("typo.cfg").write_text("# Table 1\n--learning_rat=1\n")
    Path("words.cfg").write_text("--seed=deep\n")
    Path("dashes.cfg").write_text("seed=1\n")
    tiny.digit_images("images/train", 2)
    tiny.digit_images("images/unlabelled", 2, labelled=False)
    tiny.digit_images("cased/train", 1)
    tiny.digit_images("cased/val", 1)
    Path("cased/val/digit 1").rename("cased/val/Digit 1")
    tables = {
        "labels.csv": "path,label\ntrain/digit 0/0_0.png,cat\n",
        "empty.csv": "",
        "headless.csv": "train/digit 0/0_0.png,cat\n1,2\n",
        "nowhere.csv": "path,label\ntrain/digit 0/0_9.png,cat\n",
        "elsewhere.csv": "path,label\n0_0.PNG,cat\n",
        "twice.csv": "path,label\ntrain/digit 0/0_0.png,cat\n./train/digit 0/0_0.png,dog\n",
        "outside.csv": "path,label\n../a_file,cat\n",
    }
    for name, text in tables.items():
        Path("images", name).write_text(text)
    Path("images/bytes.csv").write_bytes(b"path,label\n\xff,cat\n")
    yield path, tiny.files_in(path)
    os.chdir(before)


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Nothing that is wrong may be found out after hours."""
    monkeypatch.setattr(train, "make_train_step", lambda *_: pytest.fail("training has begun"))
    monkeypatch.delenv("TF_CONFIG", raising=False)


def refused(folder, capfd, *arguments):
    """Gives a command line that is wrong. Returns the line that says so."""
    path, before = folder
    os.chdir(path)
    capfd.readouterr()
    status = command(*arguments)
    written = capfd.readouterr().err
    assert status == 2
    assert written.startswith("run.py: error: ") and written.endswith("\n") and written.count("\n") == 1
    assert tiny.files_in(path) == before
    return written.removeprefix("run.py: error: ").removesuffix("\n")


FINETUNE, DISTILL, SUPERVISED = (f"--train_mode={mode}" for mode in ("finetune", "distill", "supervised"))
PREDICT = ["--mode=predict", "--checkpoint=supervised"]
WRONG = [
    (["--data_service=localhost:5050"], "--data_service=localhost:5050: give grpc://HOST:PORT, several with commas"),
    (["--data_dir=s3://bucket/images"], "--data_dir=s3://bucket/images: TensorFlow has no file system for s3://, only"),
    (["--model_dir=s3://bucket/run"], "rclone mount) or copy it, and give that folder"),
    # What is no flag
    (["--no_such_flag=1"], "--no_such_flag: no such flag; --help lists the flags"),
    (["--trian_mode=pretrain"], "--trian_mode: no such flag; did you mean --train_mode?"),
    (["--batch_size=3"], "--batch_size: no such flag; did you mean --eval_batch_size or --train_batch_size?"),
    (["--noseed"], "--noseed: no such flag; did you mean --seed?"),
    (["--seed"], "Missing value for flag --seed"),
    (["--nouse_blur=1"], "--nouse_blur=1 does not take an argument"),
    (["train"], "unexpected argument train: flags look like --name=value; did you mean --mode=train?"),
    (["mode=plan"], "unexpected argument mode=plan: flags look like --name=value; did you mean --mode=plan?"),
    (["--use_blur", "False"], "unexpected argument False: flags look like --name=value"),
    # Flagfiles
    (["--flagfile=nowhere.cfg"], "--flagfile=nowhere.cfg cannot be read: No such file or directory"),
    (["--flagfile=tpyo.cfg"], "No such file or directory; did you mean typo.cfg?"),
    (["--flagfile=empty"], "--flagfile=empty cannot be read: Is a directory"),
    (["--flagfile=bytes.cfg"], "--flagfile cannot be read: it is no text in UTF-8"),
    (["--flagfile=typo.cfg"], "--learning_rat: no such flag (in the flagfile); did you mean --learning_rate?"),
    (["--flagfile=words.cfg"], "--seed=deep (in the flagfile): must be a whole number"),
    (["--flagfile=dashes.cfg"], "unexpected argument seed=1 in the flagfile: flags look like --name=value"),
    # Values that are not among the choices
    (["--mode=trian"], "predict, embed, suggest; did you mean --mode=train?"),
    (["--mode=fly"], "--mode=fly: choose one of train, eval, train_then_eval, export, plan, predict, embed, suggest"),
    (["--train_mode=fine_tune"], "did you mean --train_mode=finetune?"),
    (["--optimizer=LARS"], "--optimizer=LARS: choose one of lars, momentum, adam; did you mean --optimizer=lars?"),
    (["--optimizer=sgd"], "--optimizer=sgd: choose one of lars, momentum, adam"),
    (["--memory=Queue"], "did you mean --memory=queue?"),
    (["--strategy=multiworker"], "did you mean --strategy=multi_worker?"),
    (["--resnet_depth=51"], "--resnet_depth=51: choose one of 10, 14, 18"),
    (["--seed=-1", "--image_size=4"], "--seed=-1: must be at least 0; --image_size=4: must be at least 8"),
    # Texts that name no file
    (["--eval_name=a/b"], "--eval_name=a/b: must be a part of a file's name"),
    (["--model_dir=\udce4"], r"--model_dir=\udce4: must be text in UTF-8"),
    (["--checkpoint=a\nb", FINETUNE], r"--checkpoint=a\nb: no such folder or checkpoint"),
    # Contradictions between flags
    ([FINETUNE], "needs --checkpoint"),
    ([DISTILL], "needs --teacher"),
    (["--teacher=pretrained"], "--teacher goes with --train_mode=distill"),
    ([SUPERVISED, "--checkpoint=pretrained"], "--train_mode=supervised starts from scratch"),
    (["--fine_tune_after_block=4"], "--fine_tune_after_block=4 freezes"),
    (["--proj_head_mode=none", "--ft_proj_selector=1"], "the projection head has 0 layers"),
    (["--labels_per_class=1", "--label_fraction=0.1"], "exclude each other"),
    (["--train_minutes=1", "--train_steps=3"], "--train_minutes=1.0 contradicts --train_steps=3: give one"),
    (["--train_minutes=1", "--mode=plan"], "plan with --train_epochs or --train_steps"),
    (["--use_tpu", "--strategy=mirrored"], "--use_tpu contradicts --strategy=mirrored"),
    (["--strategy=multi_worker"], "set TF_CONFIG"),
    (["--strategy=mirrored", "--train_batch_size=6"], "--train_batch_size=6: must be a multiple of the 4 replicas"),
    (["--mode=plan", "--plan_replicas=3"], "must be a multiple of the 3 replicas"),
    (["--grad_accumulation=7"], "--grad_accumulation=7: must divide each replica's share of the batch"),
    (["--strategy=mirrored", "--memory=queue", "--shard_queue", "--memory_size=66"], "--shard_queue: --memory_size=66"),
    (["--strategy=mirrored", "--jit_compile"], "--jit_compile: compiles the step of one device, and here are 4"),
    (["--mode=plan", "--fit", "--use_tpu"], "--fit: the memory of these devices is not known here"),
    (["--mode=plan", "--fit", "--device_memory=much"], "--device_memory=much: give a size such as 16G"),
    (["--device_memory=16G"], "--device_memory goes with --mode=plan, not train"),
    (["--fit", "--device_memory=16G", "--mode=eval"], "--fit and --device_memory go with --mode=plan, not eval"),
    (["--plan_timing=False"], "--plan_timing goes with --mode=plan, not train"),
    (["--plan_replicas=2"], "--plan_replicas goes with --mode=plan, not train"),
    (["--json"], "--json goes with --mode=plan, not train"),
    (["--fit", "--mode=paln"], "--mode=paln: choose one of"),
    (["--mode=plan", "--device_memory=16G"], "--device_memory=16G is the size that --fit"),
    (["--mode=plan", "--plan_replicas=-1"], "--plan_replicas=-1: must be at least 1 (0: as many as there are)"),
    (["--dataset=image_folder"], "needs --data_dir"),
    (["--dataset=digits", "--data_dir=images"], "does not go with --dataset=digits"),
    (["--checkpoint_choice=best"], "--checkpoint_choice=best is about the networks of --checkpoint and --teacher"),
    # Checkpoints and teachers that do not exist or do not fit
    ([FINETUNE, "--checkpoint=nowhere"], "--checkpoint=nowhere: no such folder or checkpoint"),
    ([FINETUNE, "--checkpoint=pretraind"], "no such folder or checkpoint; did you mean pretrained?"),
    ([FINETUNE, "--checkpoint=pretrained/ckpt-9"], "--checkpoint=pretrained/ckpt-9: no such folder or checkpoint"),
    ([FINETUNE, "--checkpoint=empty"], "--checkpoint=empty: no checkpoint in it"),
    ([FINETUNE, "--checkpoint=images"], "--checkpoint=images: no checkpoint in it"),
    ([FINETUNE, "--checkpoint=foreign"], "holds no network of the 2020 release"),
    ([FINETUNE, "--checkpoint=cut"], "--checkpoint=cut: none of its checkpoints can be taken"),
    ([FINETUNE, "--augment_policy=autoaugment", "--checkpoint=none"], "--checkpoint=none: no such folder"),
    ([FINETUNE, "--checkpoint=pretrained", "--resnet_depth=18"], "--resnet_depth=18 contradicts --checkpoint"),
    ([FINETUNE, "--checkpoint=pretrained", "--image_size=64"], "--image_size=64 contradicts --checkpoint=pretrained"),
    ([FINETUNE, "--checkpoint=supervised", "--ft_proj_selector=1"], "has no projection head: use --ft_proj_selector=0"),
    ([FINETUNE, "--checkpoint=pretrained", "--checkpoint_choice=best"], "use --checkpoint_choice=newest"),
    (["--mode=eval", "--checkpoint=supervised", "--model_dir=pretrained"], "leave one of the flags out"),
    (["--mode=eval", "--checkpoint=pretrained", "--ft_proj_selector=2", "--model_dir=new"], "stands on head layer 0"),
    (["--mode=eval", FINETUNE, "--checkpoint=pretrained", "--model_dir=new"], "no run in --model_dir=new"),
    (["--mode=export", "--checkpoint=nowhere", "--model_dir=new"], "--checkpoint=nowhere: no such folder"),
    ([DISTILL, "--teacher=supervized"], "--teacher=supervized: no such folder or checkpoint; did you mean supervised?"),
    ([DISTILL, "--teacher=a_file"], "--teacher=a_file: no checkpoint in it"),
    ([DISTILL, "--teacher=unjudged"], "--teacher=unjudged has no supervised head"),
    ([DISTILL, "--teacher=supervised", "--image_size=64"], "--image_size=64 contradicts --teacher=supervised"),
    ([DISTILL, "--teacher=pretrained", *IMAGES], "digit 0"),
    ([DISTILL, "--teacher=supervised", *IMAGES, "--train_split=unlabelled", "--distill_alpha=0.5"], "use 1"),
    ([DISTILL, "--teacher=supervised", *IMAGES, "--train_split=unlabelled", "--distill_neighbors=3"], "use 0"),
    # Runs
    (["--model_dir=a_file"], "--model_dir=a_file is a file"),
    (["--model_dir=a_file/run"], "a_file is no folder: choose another --model_dir"),
    (["--model_dir=foreign"], "--model_dir=foreign holds checkpoints and no config.json"),
    (["--model_dir=no_json"], "--model_dir=no_json: config.json cannot be read"),
    (["--model_dir=other_json"], "--model_dir=other_json: config.json is of another program"),
    (["--model_dir=cut"], "put one back, or choose another --model_dir to start again"),
    (["--model_dir=pretrained", "--resnet_depth=18"], "contradicts the run in --model_dir=pretrained"),
    (["--model_dir=pretrained", SUPERVISED], "which has train_mode=pretrain"),
    (["--model_dir=pretrained", "--checkpoint=supervised"], "contradicts the run in --model_dir=pretrained, which has"),
    (["--model_dir=pretrained", "--dataset=cifar10"], "--dataset=cifar10 contradicts the run"),
    (["--model_dir=pretrained", "--data_dir=images"], "leave it out, or use --dataset=image_folder"),
    (["--mode=eval", "--model_dir=empty"], "no run in --model_dir=empty: train one first"),
    (["--mode=eval", "--model_dir=pretraind"], "or give --checkpoint alone; did you mean pretrained?"),
    (["--mode=export"], "no run in --model_dir=runs/digits_pretrain: train one first"),
    # Memory
    (["--train_batch_size=2147483647"], "--train_batch_size=2147483647 takes about"),
    (["--mode=train_then_eval", "--eval_batch_size=2147483647"], "--eval_batch_size=2147483647 takes about"),
    (["--image_size=2147483647"], "lower --image_size"),
    (["--memory=queue", "--memory_size=2147483647"], "or --memory_size"),
    # Data sets and splits
    (["--dataset=cifra10"], "nor a TensorFlow dataset; did you mean --dataset=cifar10?"),
    (["--dataset=digit"], "did you mean --dataset=digits?"),
    (["--dataset=images"], "did you mean --data_dir=images?"),
    (["--dataset=my photos"], "--dataset=my photos: neither digits, image_folder nor a TensorFlow dataset"),
    (["--dataset="], "--dataset=: neither digits"),
    (["--mode=plan", "--dataset=no_such_dataset"], "--dataset=no_such_dataset"),
    (["--dataset=no_such_dataset", "--data_dir=empty"], "--dataset=no_such_dataset"),
    (["--train_split=validation"], "--train_split=validation: no such split; there is train, test"),
    (["--train_split=trian[:80%]"], "--train_split=trian[:80%]: no such split; there is train, test; did you mean"),
    (["--train_split=train[:80"], "--train_split=train[:80: not understood: write it like train, train[:80%] or"),
    (["--train_split=train[:0%]"], "--train_split=train[:0%]: selects no example"),
    (["--mode=train_then_eval", "--eval_split=tset"], "--eval_split=tset: no such split; there is train, test; did"),
    (["--mode=eval", "--model_dir=pretrained", "--eval_split=nope"], "--eval_split=nope: no such split"),
    ([*PREDICT, "--output=x.csv", "--predict_split=nope"], "--predict_split=nope: no such split"),
    (["--mode=plan", "--plan_timing=False", "--dataset=cifar10", "--train_split=trian"], "--train_split=trian: no"),
    # Folders of images
    (["--data_dir=nowhere"], "--data_dir=nowhere: no such folder"),
    (["--data_dir=image"], "--data_dir=image: no such folder; did you mean images?"),
    (["--data_dir=a_file"], "--data_dir=a_file: is a file: give the folder of the images, unpacked"),
    (["--data_dir=empty"], "--data_dir=empty has no split train; it has no subfolder: put the images into DIR/train/"),
    ([*IMAGES, "--train_split=trian"], "no split trian; it has train, unlabelled: put the images into DIR/trian/"),
    ([*IMAGES, "--train_split=trian"], "or name another split; did you mean train?"),
    (["--data_dir=images/train", "--train_split=x"], "no split x; it has digit 0, digit 1, digit 2: put the images"),
    (["--data_dir=images", "--train_split=auto"], "name it by --eval_split"),
    ([SUPERVISED, *IMAGES, "--train_split=unlabelled"], "--train_mode=supervised needs labels"),
    ([FINETUNE, "--checkpoint=pretrained", *IMAGES, "--train_split=unlabelled"], "--train_mode=finetune needs labels"),
    ([*IMAGES, "--train_split=unlabelled", "--labels_per_class=1"], "need labels, and this split has none"),
    ([SUPERVISED, "--labels_per_class=1000"], "--labels_per_class=1000: class"),
    (["--mode=eval", "--checkpoint=supervised", *IMAGES, "--eval_split=train"], "which --checkpoint=supervised"),
    # Classes that are called otherwise in the split to evaluate on
    (
        [SUPERVISED, "--data_dir=cased", "--mode=train_then_eval"],
        "split val has the classes Digit 1, which --train_split=train does not know; it knows digit 0, digit 1",
    ),
    ([SUPERVISED, "--data_dir=cased", "--mode=train_then_eval"], "; did you mean digit 1?"),
    # Tables
    (["--data_dir=images", "--labels=nowhere.csv"], "--labels=nowhere.csv cannot be read: No such file or directory"),
    (["--labels=images/lables.csv"], "No such file or directory; did you mean images/labels.csv?"),
    (["--labels=images/labels.csv", "--dataset=cifar10"], "--labels goes with --dataset=image_folder alone"),
    (["--labels=images"], "--labels=images: give a file that ends in .csv or .parquet"),
    (["--labels=images/empty.csv"], "--labels=images/empty.csv has no row: list some images"),
    (["--labels=images/headless.csv"], "--labels=images/headless.csv: row 2 has no column path"),
    (["--labels=images/bytes.csv"], "--labels=images/bytes.csv cannot be read: 'utf-8' codec"),
    (["--labels=images/nowhere.csv"], "row 2: train/digit 0/0_9.png is not among the images in images"),
    (["--labels=images/elsewhere.csv"], "or remove the row; did you mean train/digit 0/0_0.png?"),
    (["--labels=images/twice.csv"], "--labels=images/twice.csv: row 3: train/digit 0/0_0.png is in row 2 too"),
    (["--labels=images/outside.csv"], "--labels=images/outside.csv: row 2: ../a_file leads out of the folder"),
    (["--data_dir=images", "--images=a_file"], "--images=a_file: give a file that ends in .txt, .csv or .parquet"),
    (["--images=images/headless.csv"], "--images=images/headless.csv: row 2 has no column path"),
    # Answers
    (PREDICT, "--mode=predict needs --output=FILE.csv or FILE.parquet"),
    ([*PREDICT, "--output=x.txt"], "--output=x.txt: --mode=predict writes FILE.csv or FILE.parquet"),
    ([*PREDICT, "--output=taken.csv"], "--output=taken.csv is a folder: name a file"),
    ([*PREDICT, "--output=a_file/x.csv"], "--output=a_file/x.csv cannot be written"),
    ([*PREDICT, "--output=x.csv", "--unlabelled_only"], "all 1437 images of train have a label"),
    (["--mode=embed", "--checkpoint=supervised", "--output=x.npz", "--embed_layer=3"], "--embed_layer=3: --check"),
    (["--mode=suggest", "--checkpoint=supervised", "--output=x.csv"], "--mode=suggest needs --count"),
    (["--output=x.csv"], "--output goes with --mode=predict, embed, suggest, not train"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=[f"{i}-{' '.join(row[0])}"[:60] for i, row in enumerate(WRONG)]
)
def test_a_wrong_command_line_ends_with_status_2_and_one_line_and_writes_nothing(folder, capfd, arguments, message):
    assert message in refused(folder, capfd, *NETWORK, *arguments)


def impossible_values(field):
    """Texts that the flag of a field refuses, each with what the message says."""
    kind, low, high = type(field.default), field.metadata["low"], field.metadata["high"]
    if kind is bool:
        return [("maybe", "must be true or false"), ("", "must be true or false")]
    if kind is str:
        return [("?", "choose one of ")] if field.metadata["choices"] else []
    what = "a whole number" if kind is int else "a number"
    values = [(text, f"must be {what}") for text in ("deep", "", *(["1.5", "nan", "1e3"] if kind is int else []))]
    if kind is float:
        values += [("nan", "must be a finite number"), ("-inf", "must be a finite number")]
    if field.metadata["choices"]:
        return [*values, ("-1", "choose one of ")]
    if low is not None:
        values.append((str(low - 1), f"must be at least {low}"))
    if high is not None:
        values.append((str(high + max(1, high // 2**40)), f"must be at most {high}"))
    return values


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_refuses_what_is_out_of_its_range(folder, capfd, name):
    for text, message in impossible_values(FIELDS[name]):
        said = refused(folder, capfd, f"--{name}={text}")
        assert said.startswith(f"--{name}={kept_text(text, FIELDS[name])}: ") and message in said


def kept_text(text, field):
    """A value as a message shows it: once it is read as a number, as Python writes it."""
    try:
        return str(type(field.default)(text)) if type(field.default) in (int, float) else text
    except ValueError:
        return text


def test_a_folder_that_is_read_only_is_refused_before_training(folder, capfd, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        said = refused(folder, capfd, *NETWORK, "--model_dir=new/run")
    path, _ = folder
    assert said == f"--model_dir=new/run cannot be written: {path} is read-only: choose another --model_dir"


@pytest.mark.parametrize(
    "error", [MemoryError("80 GB"), tf.errors.ResourceExhaustedError(None, None, "OOM when\nallocating [1]")]
)
def test_a_machine_without_memory_says_which_flags_to_lower(folder, capfd, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(evaluate, "evaluate", full)
    said = refused(folder, capfd, "--mode=eval", "--model_dir=supervised")
    assert said.startswith("no memory is left: lower --train_batch_size, --eval_batch_size, --image_size or")


def test_an_error_of_the_program_is_no_mistake_of_the_user(folder, monkeypatch):
    def broken(*_):
        raise ValueError("a fault")

    os.chdir(folder[0])
    monkeypatch.setattr(evaluate, "evaluate", broken)
    with pytest.raises(ValueError, match="a fault"):
        command("--mode=eval", "--model_dir=supervised")


def test_names_that_may_be_meant(tmp_path, monkeypatch):
    flags = ["train_mode", "mode", "train_batch_size", "eval_batch_size"]
    assert did_you_mean("trian_mode", flags, "--") == "; did you mean --train_mode?"
    assert did_you_mean("batch_size", flags) == "; did you mean eval_batch_size or train_batch_size?"
    assert did_you_mean("train_mode", ["train_mode"]) == ""
    assert did_you_mean("xyz", flags) == did_you_mean("x", []) == ""
    (tmp_path / "photos").mkdir()
    assert did_you_mean_path(f"{tmp_path}/Photo/") == f"; did you mean {tmp_path}/photos?"
    assert did_you_mean_path(f"{tmp_path}/no/where") == did_you_mean_path("gs://photo/s") == ""
    monkeypatch.chdir(tmp_path)
    assert did_you_mean_path("fotos") == "; did you mean photos?"


def test_a_line_stays_one_line():
    assert one_line("a\nb\tc \x1b[1m ä\u202f\udce4") == "a\\nb\\tc \\x1b[1m ä\u202f\\udce4"
