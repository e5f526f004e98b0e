"""Layouts of image folders: what is a split and what a class, lists of images and labels, what is held out."""

import numpy as np
import pytest
import tiny
from test_run import NETWORK, command

import data
import sources
import subject
from config import Config
from errors import UserError
from sources.held_out import SHARE, held_out

ONE_STAGE = True  # see conftest.py

CATS_AND_DOGS = ["cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"]


def load(root, split="train", **options):
    return sources.load("image_folder", split, str(root), **options)


def unlabelled(source):
    return not source.has_labels and list(source.classes) == []


# Folders


def test_class_folders_without_splits_are_the_split_train(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, *CATS_AND_DOGS)
    source = load(root)
    assert source.names == CATS_AND_DOGS and list(source.classes) == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert f"{root}: its 2 folders are the classes (cat, dog), since none is called train, validation, valid, val" in (
        caplog.text
    )
    part, rest = load(root, "train[:50%]"), load(root, "train[50%:]")
    assert sorted(part.names + rest.names) == CATS_AND_DOGS


@pytest.mark.parametrize("paths", [["1.png", "2.png"], ["all/1.png", "all/2.png"], ["1.png", "deep/er/2.png"]])
def test_images_without_classes_are_unlabelled(tmp_path, paths):
    root = tiny.folder_of(tmp_path, *paths)
    assert load(root).names == paths and unlabelled(load(root))


@pytest.mark.parametrize("name", ["train", "validation", "valid", "val", "test", "unlabelled"])
def test_a_folder_with_the_name_of_a_split_makes_all_folders_splits(tmp_path, name):
    root = tiny.folder_of(tmp_path, "cat/1.png", "dog/2.png", f"{name}/cat/3.png", f"{name}/dog/4.png")
    assert load(root, name).names == ["cat/3.png", "dog/4.png"]
    if name != "train":
        with pytest.raises(UserError, match=f"has no split train; it has .*{name}.*: put the images into DIR/train/"):
            load(root)


def test_any_folder_may_be_named_as_a_split(tmp_path):
    root = tiny.folder_of(tmp_path, "one/cat/1.png", "one/dog/2.png", "two/cat/3.png")
    assert load(root, "one").names == ["cat/1.png", "dog/2.png"]
    assert load(root, "one+two").names == ["one/cat/1.png", "one/dog/2.png", "two/cat/3.png"]
    with pytest.raises(UserError, match="no split three; it has one, two"):
        load(root, "three")


def test_an_unlabelled_and_a_labelled_set_are_taken_together(tmp_path):
    root = tiny.folder_of(
        tmp_path, "unlabelled/1.png", "unlabelled/x/2.png", "labelled/cat/3.png", "labelled/dog/4.png"
    )
    source = load(root, "unlabelled+labelled")
    assert source.labels.tolist() == [-1, -1, 0, 1] and list(source.classes) == ["cat", "dog"]
    with pytest.raises(UserError, match="take both, by --train_split=labelled\\+unlabelled"):
        load(root)
    kept, auto = (load(root, "unlabelled+labelled", side=side) for side in (sources.KEPT, sources.HELD_OUT))
    assert sorted(kept.names + auto.names) == sorted(source.names)


def test_class_folders_without_an_image_are_named(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, *(f"train/{path}" for path in CATS_AND_DOGS))
    (tmp_path / "train" / "horse" / "deep").mkdir(parents=True)
    (tmp_path / "train" / "mule").mkdir()
    (tmp_path / "train" / "mule" / "1.heic").touch()
    source = load(root)
    assert list(source.classes) == ["cat", "dog"] and source.examples == 4
    assert caplog.text.count(f"{root}/train: no image in its folders horse, mule") == 1


def test_a_class_may_have_one_image(tmp_path):
    root = tiny.folder_of(tmp_path, "cat/1.png", "dog/2.png", "dog/3.png")
    source = load(root)
    assert source.labels.tolist() == [0, 1, 1]
    kept, auto = load(root, side=sources.KEPT), load(root, side=sources.HELD_OUT)
    assert sorted(kept.names + auto.names) == source.names and list(kept.classes) == ["cat", "dog"]
    with pytest.raises(UserError, match="--labels_per_class=2: class cat has only 1 example"):
        data.draw_labelled(source, 2, 0.0, 0)


def test_classes_that_differ_in_capitals_or_spaces_alone_are_two_and_are_named(tmp_path, caplog):
    root = tiny.folder_of(tmp_path, "train/Cat/1.png", "train/cat/2.png", "train/big  dog/3.png", "train/big dog/4.png")
    assert list(load(root).classes) == ["Cat", "big  dog", "big dog", "cat"]
    assert "'Cat' and 'cat' count as two classes: give them one name if they are one" in caplog.text
    assert "'big  dog' and 'big dog' count as two classes" in caplog.text
    caplog.clear()
    labels = table(tmp_path, "labels.csv", [("train/Cat/1.png", "Red"), ("train/cat/2.png", "red")])
    assert list(load(root, labels=labels).classes) == ["Red", "red"]
    assert "'Red' and 'red' count as two classes" in caplog.text


# What is held out


def test_about_a_tenth_is_held_out_by_the_names_alone():
    names = [f"{i}.jpg" for i in range(5000)]
    labels = np.arange(5000) % 10
    sides = held_out(names, labels)
    assert SHARE == 0.1 and 400 < sides.sum() < 600
    order = np.random.default_rng(0).permutation(5000)[:3000]
    np.testing.assert_array_equal(held_out([names[i] for i in order], labels[order]), sides[order])
    grown = held_out([*names, *(f"new/{i}.jpg" for i in range(100))], np.concatenate([labels, np.full(100, -1)]))
    np.testing.assert_array_equal(grown[:5000], sides)


def test_every_class_with_two_images_is_on_both_sides():
    labels = np.concatenate([np.repeat(np.arange(200), 2), [200], [-1] * 50])
    names = [f"{i}.jpg" for i in range(len(labels))]
    sides = held_out(names, labels)
    assert all(sides[labels == label].sum() == 1 for label in range(200))
    for count in (2, 3):
        unlabelled_sides = held_out(names[:count], np.full(count, -1))
        assert 0 < unlabelled_sides.sum() < count


def test_a_split_is_held_out_where_a_folder_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.folder_of(tmp_path / "photos", *(f"{'ab'[i % 2]}/{i}.png" for i in range(40)))
    decided = subject.decide(dict(data_dir="photos", recipe="paper", mode="train_then_eval"))
    assert decided.config.eval_split == "auto"
    assert decided.eval_split_in_words == (
        "--eval_split=auto: photos has no folder validation, valid, val or test: a tenth of the images of "
        "--train_split=train is held out by their names, to evaluate on, and not trained on"
    )
    kept, auto = (data.open_split(decided.config, split, None) for split in ("train", "auto"))
    whole = load("photos")
    assert sorted(kept.names + auto.names) == sorted(whole.names) and 1 < auto.examples < 12
    assert set(auto.labels.tolist()) == {0, 1}
    assert data.train_source(decided.config, None)[0].names == kept.names
    given = subject.decide(dict(data_dir="photos", recipe="paper", eval_split="train[90%:]", train_split="train[:90%]"))
    assert data.train_source(given.config, None)[0].examples == 36


def test_a_part_of_the_only_split_is_held_out_and_another_split_leaves_it_whole(tmp_path):
    root = tiny.folder_of(tmp_path, *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(40)))
    assert subject.decide(dict(data_dir=root, recipe="paper")).config.eval_split == "auto"
    tiny.folder_of(tmp_path, "val/a/1.png")
    config = subject.decide(dict(data_dir=root, recipe="paper")).config
    assert config.eval_split == "val" and data.train_source(config, None)[0].examples == 40


def test_a_single_image_cannot_be_held_out(tmp_path):
    root = tiny.folder_of(tmp_path, "1.png")
    config = Config(dataset="image_folder", data_dir=root, eval_split="auto")
    assert data.open_split(config, "train", None).examples == 1
    with pytest.raises(UserError, match="split train has one image, and none can be held out"):
        data.open_split(config, "auto", None)


def test_auto_goes_with_folders_alone():
    with pytest.raises(UserError, match="--eval_split=auto goes with --dataset=image_folder"):
        subject.decide(dict(eval_split="auto"))
    with pytest.raises(UserError, match="--train_split=auto is a part that is held out: name it by --eval_split"):
        subject.decide(dict(data_dir="photos", train_split="auto"))


# Lists


@pytest.fixture
def pile(tmp_path):
    """Six images in no order, in a folder beside nothing else."""
    tiny.folder_of(tmp_path, *(f"{i}.png" for i in range(4)), "deep/4.png", "deep/5.png")
    return tmp_path


def table(folder, name, rows, columns=("path", "label")):
    """Writes a table as the kind of file that its name says. Returns its path."""
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)
    else:
        path.write_text("\n".join(",".join(map(str, row)) for row in (columns, *rows)) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet"])
def test_a_table_says_the_labels_of_some_images(pile, name):
    rows = [("0.png", " cat "), ("deep/4.png", "dog"), ("./2.png", "cat"), ("3.png", "")]
    source = load(pile, labels=table(pile, name, rows))
    assert source.names == ["0.png", "1.png", "2.png", "3.png", "deep/4.png", "deep/5.png"]
    assert source.labels.tolist() == [0, -1, 0, -1, 1, -1] and list(source.classes) == ["cat", "dog"]


@pytest.mark.parametrize("values", [(10, 9, 10), (10.0, 9.0, 10.0)])
def test_labels_may_be_numbers(pile, values):
    rows = list(zip(["0.png", "1.png", "2.png"], values, strict=True))
    for name in ("labels.parquet", "labels.csv") if isinstance(values[0], int) else ("labels.parquet",):
        source = load(pile, labels=table(pile, name, rows))
        assert list(source.classes) == ["9", "10"] and source.labels.tolist() == [1, 0, 1, -1, -1, -1]


def test_a_table_may_say_the_splits(pile):
    rows = [("0.png", "cat", "train"), ("1.png", "dog", ""), ("2.png", "cat", "val"), ("deep/4.png", "", "val")]
    labels = table(pile, "labels.csv", rows, ("path", "label", "split"))
    assert load(pile, labels=labels).names == ["0.png", "1.png", "3.png", "deep/5.png"]
    assert load(pile, labels=labels).labels.tolist() == [0, 1, -1, -1]
    val = load(pile, "val", labels=labels)
    assert val.names == ["2.png", "deep/4.png"] and val.labels.tolist() == [0, -1]
    config = subject.decide(dict(labels=labels, recipe="paper")).config
    assert (config.eval_split, config.data_dir, config.dataset) == ("val", str(pile), "image_folder")
    with pytest.raises(UserError, match="has no split test; it has train, val"):
        load(pile, "test", labels=labels)


def test_a_table_of_labels_goes_with_folders_of_splits(tmp_path):
    root = tiny.folder_of(tmp_path, "train/1.png", "train/x/2.png", "test/1.png")
    labels = table(tmp_path, "labels.csv", [("train/1.png", "cat"), ("test/1.png", "dog")])
    train, test = load(root, labels=labels), load(root, "test", labels=labels)
    assert (train.names, train.labels.tolist()) == (["1.png", "x/2.png"], [0, -1])
    assert (test.names, test.labels.tolist()) == (["1.png"], [1])
    assert load(root, "train+test", labels=labels).names == ["train/1.png", "train/x/2.png", "test/1.png"]
    with pytest.raises(UserError, match="split test has the classes dog, which --teacher=t does not know"):
        load(root, "test", classes=["cat"], labels=labels, known_by="--teacher=t")


@pytest.mark.parametrize("name", ["images.txt", "images.csv"])
def test_a_list_says_which_images_there_are(pile, name):
    listed = ["deep/5.png", str(pile / "1.png"), "0.png"]
    path = table(pile, name, [(path,) for path in listed], ("path",))
    if name.endswith(".txt"):
        (pile / name).write_text("\n".join(["", *listed, ""]))
    assert load(pile, images=path).names == ["0.png", "1.png", "deep/5.png"]
    labels = table(pile, "labels.csv", [("0.png", "cat"), ("1.png", "dog")])
    both = load(pile, images=path, labels=labels)
    assert both.labels.tolist() == [0, 1, -1]
    labels = table(pile, "labels.csv", [("0.png", "cat"), ("2.png", "dog")])
    with pytest.raises(UserError, match=r"row 3: 2.png is not among the images in --images=.*images"):
        load(pile, images=path, labels=labels)


def test_class_folders_of_listed_images_are_classes(tmp_path):
    root = tiny.folder_of(tmp_path, *CATS_AND_DOGS)
    images = table(tmp_path, "images.csv", [("cat/2.png",), ("dog/3.png",)], ("path",))
    assert load(root, images=images).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("9.png", "cat")], ("path", "label"), "row 2: 9.png is not among the images in"),
        ([("0.png", "cat"), ("./0.png", "dog")], ("path", "label"), "row 3: 0.png is in row 2 too: remove one"),
        ([("0.png", "cat")], ("file", "label"), "row 2 has no column path; the columns are file, label"),
        ([("0.png", "cat")], ("path", "class"), "row 2 has no column label; the columns are path, class"),
        ([("../0.png", "cat")], ("path", "label"), "row 2: ../0.png leads out of the folder of the images"),
        ([("deep/../../0.png", "cat")], ("path", "label"), "row 2: .* leads out of the folder of the images"),
        ([("/etc/passwd", "cat")], ("path", "label"), "row 2: /etc/passwd leads out of the folder of the images"),
        ([("", "cat")], ("path", "label"), "row 2 has no path"),
        ([], ("path", "label"), "has no row"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line_that_names_the_row(pile, rows, columns, message):
    with pytest.raises(UserError, match=message) as error:
        load(pile, labels=table(pile, "labels.csv", rows, columns))
    assert "\n" not in str(error.value) and "--labels=" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.xlsx", b"", "give a file that ends in .csv or .parquet"),
        ("labels.parquet", b"no parquet", "cannot be read: "),
        ("labels.csv", b"path,label\n\xff,cat\n", "cannot be read: .*utf-8"),
        ("labels.csv", b"", "has no row"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(pile, name, content, message):
    (pile / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(pile, labels=str(pile / name))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"nowhere.csv cannot be read: No such file or directory"):
        load(pile, labels="nowhere.csv")


def test_lists_go_with_folders_alone():
    with pytest.raises(UserError, match="--labels goes with --dataset=image_folder alone"):
        subject.decide(dict(labels="labels.csv", dataset="cifar10"))


# The command line


LABELS = "path,label,split\ncat/1.png,feline,train\ndog/3.png,canine,val\n"
LAYOUTS = {
    "classes": (CATS_AND_DOGS, "", "2 colour images", "all of them labelled", "auto: DIR has no folder"),
    "no folder": (["1.png", "2.png", "3.png"], "", "2 colour images", "none of them labelled", "auto: DIR has no"),
    "one folder": (["all/1.png", "all/2.png"], "", "1 colour images", "none of them labelled", "auto: DIR has no"),
    "train alone": ([f"train/{path}" for path in CATS_AND_DOGS], "", "2 colour images", "all of", "auto: "),
    "train and val": (
        [f"{split}/{path}" for split in ("train", "val") for path in CATS_AND_DOGS], "",
        "4 colour images", "all of them labelled", "val: the first of",
    ),
    "two sets": (
        ["unlabelled/1.png", "unlabelled/2.png", *(f"labelled/{path}" for path in CATS_AND_DOGS)],
        "--train_split=unlabelled+labelled", "4 colour images", "2 of them labelled", "auto: DIR has no folder",
    ),
    "table": (CATS_AND_DOGS, "--labels=labels.csv", "3 colour images", "1 of them labelled", "val: the first of"),
    "list": (CATS_AND_DOGS, "--images=images.txt", "1 colour images", "all of them", "auto: DIR has no folder"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_from_the_command_line(tmp_path, monkeypatch, capfd, layout):
    paths, flag, *said = LAYOUTS[layout]
    monkeypatch.chdir(tmp_path)
    tiny.folder_of(tmp_path / "DIR", *paths)
    (tmp_path / "labels.csv").write_text(LABELS)
    (tmp_path / "images.txt").write_text("cat/1.png\ndog/3.png\n")
    flags = ["--mode=plan", "--plan_timing=False", "--data_dir=DIR", *NETWORK[:2], *([flag] if flag else [])]
    assert command(*flags) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert all(words in out for words in said), out


def test_a_pile_of_images_with_a_table_of_labels_is_pretrained_on_and_fine_tuned(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tiny.coloured_images("pile", 12)
    rows = [(f"{name}/{i}.png", name[2:]) for name in ("a red", "b blue") for i in range(8)]
    table(tmp_path / "pile", "labels.csv", rows)
    run = ["--labels=pile/labels.csv", "--image_size=16", "--train_steps=2", "--recipe=paper", "--memory=none"]
    assert command(*NETWORK, *run, "--model_dir=pretrained", "--eval_every_epochs=-1") == 0, capfd.readouterr().err
    labels = ["--train_mode=finetune", "--checkpoint=pretrained", "--labels_per_class=2", "--model_dir=tuned"]
    assert command(*run, *labels, "--mode=train", "--train_batch_size=8") == 0, capfd.readouterr().err
    capfd.readouterr()
    assert command("--mode=eval", "--model_dir=tuned", "--labels=pile/labels.csv") == 0, capfd.readouterr().err
    assert "top_1" in capfd.readouterr().out
    assert command("--model_dir=tuned", "--eval_split=train", "--train_steps=3", *run[:1], *labels[:2]) == 2
    assert "--eval_split=train contradicts the run in --model_dir=tuned, which has eval_split=auto" in (
        capfd.readouterr().err
    )
