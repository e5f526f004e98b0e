"""What comes from a stranger is neither run nor believed: checkpoints, tables, caches, images, texts."""

import ast
import csv
import io
import json
import os
import pickle
import re
import socket
import struct
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import release_files
import tables_of_checkpoints
import tensorflow as tf
import tiny
from conftest import ROOT
from PIL import Image

import checkpoint
import config
import npz
import published
import subject
from answers import questions, spreadsheet, tables
from checkpoint import index, reader
from errors import UserError, one_line
from sources import files, kinds, lists, manifest

FOLDERS = ("answers", "augment", "benchmarks", "checkpoint", "plan", "published", "sources", "tools")
ROOMS = [ROOT, *(ROOT / name for name in FOLDERS)]
PROGRAM = [path for room in ROOMS for path in sorted(room.glob("*.py"))]


class Evil:
    """Unpickling it makes the file that it names."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def refused(action, *arguments, **options):
    """What a `UserError` says, in one line."""
    with pytest.raises(UserError) as error:
        action(*arguments, **options)
    assert str(error.value).isprintable()
    return str(error.value)


# Nothing runs


# By the last part of the name that is called, as in `keras.models.load_model`.
FORBIDDEN_CALLS = {
    "load_model", "load_weights", "deserialize_keras_object", "model_from_json", "from_config", "unsafe_load",
    "read_pickle", "eval", "exec", "__import__",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "h5py", "http", "flask"}


def called(node):
    """The name that a call calls, with dots."""
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_the_program_unpickles_deserializes_or_evaluates(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            name = called(node)
            assert name.split(".")[-1] not in FORBIDDEN_CALLS, name
            assert not name.endswith("saved_model.load"), name
            if path != ROOT / "checkpoint" / "reader.py" and "benchmarks" not in path.parts:
                assert not name.endswith(("load_checkpoint", "latest_checkpoint", "NewCheckpointReader")), name
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", f"{path}:{node.lineno}"
            assert options.get("shell") != "True", f"{path}:{node.lineno}"


def test_arrays_are_not_unpickled(tmp_path):
    made = tmp_path / "made"
    objects = np.array([Evil(made)], object)
    np.savez(tmp_path / "a.npz", probabilities=objects)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil(made)))
    np.save(tmp_path / "c.npy", np.zeros(3))
    for name in ("a.npz", "b.npz", "c.npy"):
        with pytest.raises(npz.Damaged):
            npz.read(str(tmp_path / name))
    assert not made.exists()


def test_arrays_take_no_more_memory_than_their_file(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(10**6))
    with pytest.raises(npz.Damaged, match="compressed"):
        npz.read(str(tmp_path / "bomb.npz"))
    content = io.BytesIO()
    np.lib.format.write_array_header_2_0(content, {"descr": "<f8", "fortran_order": False, "shape": (2**50,)})
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("a.npy", content.getvalue())
    with pytest.raises(npz.Damaged):
        npz.read(str(tmp_path / "lie.npz"))


def test_a_table_is_not_unpickled(tmp_path):
    made = tmp_path / "made"
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Evil(made))}
    field = pa.field("path", pa.string(), metadata=metadata)
    table = pa.table([["a.png"], ["cat"]], schema=pa.schema([field, pa.field("label", pa.string())]))
    pq.write_table(table, tmp_path / "t.parquet")
    assert list(lists.read_labels(str(tmp_path / "t.parquet"), str(tmp_path))) == ["a.png"]
    assert not made.exists()


def test_a_saved_model_is_not_run(tmp_path, monkeypatch):
    """Only its variables are read: it works without the file that holds its graphs and objects."""
    release_files.saved_model(tmp_path / "model", resnet_depth=10)
    (tmp_path / "model" / "saved_model.pb").write_bytes(b"nothing that could be loaded")
    monkeypatch.setattr(tf.saved_model, "load", None)
    assert published.open_weights(str(tmp_path / "model")).config["resnet_depth"] == 10


# Checkpoints


CONFIG_KEY = "config/.ATTRIBUTES/py_state"
STEP_KEY = "step/.ATTRIBUTES/VARIABLE_VALUE"


def ours(folder, saved, step=7):
    """A checkpoint that looks like one of ours, with this config and step."""
    content = saved if isinstance(saved, bytes) else json.dumps(saved).encode()
    return release_files.written_raw(folder, {CONFIG_KEY: tf.constant(content), STEP_KEY: tf.constant(step)})


GOOD = {**config.Config().to_dict(), "classes": ["a", "b"]}


@pytest.mark.parametrize(
    "saved",
    [b"", b"\xff", b"[1]", b"[" * 10**5, b'{"classes": 3}', {**GOOD, "classes": ["\ud800"]}, {**GOOD, "seed": "0"},
     {**GOOD, "width_multiplier": 1e9}, {**GOOD, "teacher": ["a"]}, {"classes": []}],
)  # fmt: skip
def test_a_config_in_a_checkpoint_is_checked(tmp_path, saved):
    assert "holds no config of this program" in refused(checkpoint.Weights, ours(tmp_path, saved))


@pytest.mark.parametrize("step", [-1, 1.5, [1, 2], b"7"])
def test_a_step_in_a_checkpoint_is_checked(tmp_path, step):
    assert "does not say at which step" in refused(checkpoint.Weights, ours(tmp_path, GOOD, step))


def test_a_checkpoint_that_is_sound_is_taken(tmp_path):
    assert checkpoint.Weights(ours(tmp_path, GOOD)).step == 7


def test_the_list_of_checkpoints_leads_nowhere_else(tmp_path):
    """TensorFlow itself takes the path of any checkpoint from the list in a folder."""
    elsewhere, _ = release_files.written(tmp_path / "elsewhere", resnet_depth=10)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    for named in (f"{elsewhere}/model.ckpt-7", "../elsewhere/model.ckpt-7"):
        (stranger / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\n')
        assert tf.train.latest_checkpoint(str(stranger))
        assert refused(published.open_weights, str(stranger)).endswith("no checkpoint in it")
    moved, _ = release_files.written(tmp_path / "moved", resnet_depth=10)
    (tmp_path / "moved" / "checkpoint").write_text('model_checkpoint_path: "/gone/model.ckpt-7"\n')
    assert reader.newest_listed(moved) == f"{moved}/model.ckpt-7"


def test_a_side_of_0_does_not_hide_a_number_of_classes(tmp_path):
    kernel = "head_supervised/linear_layer/dense/kernel"
    folder, _ = release_files.written(tmp_path, more={kernel: tf.zeros([0, 2**40])}, resnet_depth=10)
    assert "its index promises more than" in refused(published.open_weights, folder)


def with_lies(tmp_path, **lies):
    """The prefix of a checkpoint of one tensor, `a`, of two texts, whose index has these values instead, and holds."""
    prefix = f"{release_files.written_raw(tmp_path / 'lie', {'a': tf.constant(['x', 'y'])})}/model.ckpt-1"
    made = tables_of_checkpoints.entries(prefix)
    for name, value in lies.items():
        if name == "sides":
            made[b"a"].shape.CopyFrom(tf.TensorShape(value).as_proto())
        else:
            setattr(made[b"a"], name, value)
    index = tables_of_checkpoints.table([(key, entry.SerializeToString()) for key, entry in sorted(made.items())])
    Path(f"{prefix}.index").write_bytes(index)
    return prefix


@pytest.mark.parametrize(
    "lies",
    [{"sides": [2**40, 2**40]}, {"sides": [3]}, {"sides": [2**35]}, {"dtype": 1, "sides": [2**30]}, {"dtype": 0},
     {"offset": -1}, {"offset": 2**40}, {"size": 2**40}, {"shard_id": 5}],
)  # fmt: skip
def test_what_an_index_promises_is_compared_with_the_files(tmp_path, lies):
    """The first of them ends the process where TensorFlow reads it."""
    assert "cannot be read, it may be damaged" in refused(checkpoint.Weights, with_lies(tmp_path, **lies))


def test_the_length_of_a_text_is_compared_with_the_file(tmp_path):
    prefix = with_lies(tmp_path)
    assert reader.open_reader(prefix).get_tensor("a").tolist() == [b"x", b"y"]
    data = Path(f"{prefix}.data-00000-of-00001")
    content = data.read_bytes()
    data.write_bytes(b"\xff\x01" + content[2:])  # One text of 255 bytes.
    assert "promises more of a than is in its files" in refused(checkpoint.Weights, prefix)


def test_blocks_that_overlap_are_refused():
    """To read them again and again would take time out of all proportion to the file."""
    block = tables_of_checkpoints.table([(b"k" * 1000, b"v")])
    assert index.pairs(block) == {b"k" * 1000: b"v"}
    for wrong in (b"", block[:-1], block[:-8] + bytes(8), block[10:]):
        with pytest.raises(ValueError, match="its index is damaged"):
            index.pairs(wrong)
    twice = tables_of_checkpoints.table([(b"k", b"v")], repeat=2)
    with pytest.raises(ValueError, match="overlap"):
        index.pairs(twice)


def test_a_run_of_a_stranger_names_no_machine_and_no_file(tmp_path):
    """Its config.json says how the network is made, not what this computer connects to, or writes."""
    saved = {
        **GOOD, "use_tpu": True, "master": "grpc://elsewhere:8470", "output": "/tmp/x.csv", "memory_check": False,
    }  # fmt: skip
    values = subject.known_values({"mode": "eval"}, saved)
    assert not {"use_tpu", "master", "output", "memory_check"} & set(values)
    assert values["resnet_depth"] == GOOD["resnet_depth"]
    with pytest.raises(UserError, match="a part of a file's name"):
        config.from_dict({**saved, "eval_name": "/../../x"})


@pytest.mark.parametrize("content", ["[]", "3", '{"calibration_temperature": -1}', '{"calibration_temperature": "1"}',
                                     '{"calibration_temperature": NaN}', "[" * 10**5])  # fmt: skip
def test_a_temperature_beside_a_checkpoint_is_checked(tmp_path, content):
    (tmp_path / "result_7.json").write_text(content)
    weights = SimpleNamespace(prefix=f"{tmp_path}/ckpt-7", step=7)
    assert "which --calibrate=False leaves out" in refused(questions.kept_temperature, weights)


def test_a_config_of_a_run_is_checked(tmp_path):
    (tmp_path / "ckpt-3.index").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, "data_dir": [1]}))
    said = refused(subject.decide, {"mode": "eval", "model_dir": str(tmp_path)})
    assert said.endswith("config.json is damaged: --data_dir=[1]: must be of type str")


# Tables and lists


def parquet(file, /, **columns):
    pq.write_table(pa.table(columns), file)
    return str(file)


@pytest.mark.parametrize("path", ["../a.png", "/etc/a.png", "a/../../a.png", "//a.png", "..", "", "./../a.png"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_no_path_leads_out_of_the_folder(tmp_path, path, suffix):
    file = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        file.write_text(f"path,label\n{path},cat\n")
    else:
        parquet(file, path=[path], label=["cat"])
    said = refused(lists.read_labels, str(file), str(tmp_path / "images"))
    assert "leads out of the folder of the images" in said or "has no path" in said


def test_a_long_text_in_many_rows_is_refused(tmp_path):
    """As a dictionary it is there once; as a text for each row it would take 65,536 times as much."""
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2**16, np.int32)), pa.array(["x" * 2**20]))
    file = parquet(tmp_path / "t.parquet", path=shared, label=shared)
    assert os.path.getsize(file) < 2**20
    before = psutil.Process().memory_info().rss
    assert "a text of 1,048,576 bytes, more than 131,072" in refused(lists.read_labels, file, str(tmp_path))
    assert psutil.Process().memory_info().rss - before < 2**28
    assert "a text of" in refused(lists.splits_in, file)


def test_cells_that_are_no_texts_are_refused(tmp_path):
    file = parquet(tmp_path / "t.parquet", path=[["a.png"]], label=["cat"])
    assert "column path holds list" in refused(lists.read_labels, file, str(tmp_path))
    numbers = parquet(tmp_path / "n.parquet", path=["a.png", "b.png"], label=[1.0, None], split=[b"train", b"test"])
    rows = lists.read_labels(numbers, str(tmp_path))
    assert [row.label for row in rows.values()] == ["1", ""]


def test_a_label_of_5000_digits_is_a_text(tmp_path):
    root = tiny.folder_of(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "t.csv").write_text(f"path,label\n1.png,{'9' * 5000}\n2.png,01\n3.png,1\n")
    found = tiny.sources.load("image_folder", "train", root, labels=f"{root}/t.csv")
    assert list(found.classes) == ["01", "1", "9" * 5000]


def test_a_message_is_one_line_and_steers_no_terminal(tmp_path):
    (tmp_path / "t.csv").write_text('path,label\n"../\x1b[2J\ninjected\u202e",cat\n')
    said = refused(lists.read_labels, str(tmp_path / "t.csv"), str(tmp_path))
    assert r"../\x1b[2J\ninjected\u202e leads out" in said
    assert one_line("über\udce4 \n") == r"über\udce4 \n"


# CSV files


FORMULAS = ["=1+1", " =1+1", "\ufeff=1", "\xa0+1", "\x00@a", "\u200b-1", "\uff1d1", "a,=1", 'a";=1']
FORMULAS += [f"a{separator}=1" for separator in ";\t|\r\n"]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_a_formula_in_any_spreadsheet(text):
    guarded = spreadsheet.guarded(text)
    assert spreadsheet.plain(guarded) == text
    file = io.StringIO(newline="")
    spreadsheet.write_rows(file, [[guarded, "b"]])
    assert list(csv.reader(io.StringIO(file.getvalue(), newline=""))) == [[guarded, "b"]]
    for separator in ",;\t|":
        for row in csv.reader(io.StringIO(file.getvalue(), newline=""), delimiter=separator):
            assert not [cell for cell in row if cell.strip("\ufeff\xa0\x00\u200b ").startswith(("=", "+", "-", "@"))]


def test_every_csv_is_written_by_one_function():
    writers = [path.name for path in PROGRAM if "csv.writer" in path.read_text()]
    assert writers == ["spreadsheet.py"]


def test_a_table_with_a_carriage_return_in_a_path_comes_back(tmp_path):
    table = pa.table({"path": ["a\r=1.png", "b.png"], "class": ["x;=1", "\r"]})
    tables.write_csv(iter([table]), str(tmp_path / "t.csv"))
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["path", "class"], ["a\r=1.png", "x;=1"], ["b.png", "'\r"]]


# The cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder of images, and the cache of its listing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tiny.folder_of(tmp_path / "images", "a.png", "b.png")
    os.utime(root, (0, 0))
    assert files.find_images(root) == ["a.png", "b.png"]
    (kept,) = (tmp_path / "cache" / "simclr").iterdir()
    assert manifest.read_listing(root, kinds.SUFFIXES).files == ["a.png", "b.png"]
    return root, kept


def test_a_cache_that_others_can_write_is_not_used(cached):
    root, kept = cached
    os.chmod(kept.parent, 0o777)
    assert manifest.read_listing(root, kinds.SUFFIXES) is None
    manifest.keep_unreadable(root, "a.png", "because")
    os.chmod(kept.parent, 0o700)
    assert manifest.read_unreadable(root) == {}
    if os.geteuid() == 0:
        os.chown(kept.parent, 12345, -1)
        assert manifest.read_listing(root, kinds.SUFFIXES) is None


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.png", "a/../../x.png"])
def test_a_path_in_the_cache_stays_in_the_folder(cached, path):
    root, _ = cached
    state = {"": manifest.state_of_folder(root)}
    manifest.keep_listing(root, kinds.SUFFIXES, manifest.Listing([path], state, {}))
    assert manifest.read_listing(root, kinds.SUFFIXES) is None
    assert files.find_images(root) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "line", ["[" * 10**5, '{"path": "a\\u0000b", "reason": "", "state": [0, 0]}', "3", '{"path": 3, "reason": ""}',
             '{"path": "\\ud800", "reason": "", "state": [0, 0]}', '{"path": "../a", "reason": "", "state": []}'],
)  # fmt: skip
def test_a_damaged_line_in_the_cache_is_passed_over(cached, line):
    root, kept = cached
    kept.with_suffix(".jsonl").write_text(line + "\n")
    assert manifest.read_unreadable(root) == {}


# Images

FRAME = b"\x00\x11\x08\x00\x10\x00\x10\x03"  # what a JPEG of 16 x 16 pixels has in its header


def encoded(kind, size, **options):
    content = io.BytesIO()
    Image.new("P" if kind == "GIF" else "RGB", size, 5).save(content, kind, **options)
    return content.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_comment(kind, content):
    """An image with a comment that looks like the header of a small JPEG."""
    if kind == "JPEG":
        return content[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(FRAME)) + FRAME + content[2:]
    return content[:33] + chunk(b"tEXt", b"a\0" + FRAME) + content[33:]


def tiff_with_tile(width, height, side):
    """A grey TIFF in one tile of `side` x `side` zeros, compressed."""
    content = zlib.compress(bytes(side * side), 9)
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 8),
            (325, len(content))]  # fmt: skip
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + listed + bytes(4)


def decoded(content, max_pixels):
    return files.decode_content(tf.constant(content), max_pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_comment_does_not_hide_the_number_of_pixels(kind):
    large, small = (with_comment(kind, encoded(kind, (side, side))) for side in (1500, 100))
    assert decoded(small, 500**2).shape == [100, 100, 3]
    for read in (decoded, kinds.decode_by_hand):
        with pytest.raises((kinds.TooLarge, tf.errors.InvalidArgumentError), match="1500 x 1500 pixels are more than"):
            read(large, 500**2)


def test_a_tile_of_a_tiff_counts_by_its_own_pixels():
    assert kinds.decode_by_hand(tiff_with_tile(16, 16, 64), 10**4).shape == (16, 16, 3)
    with pytest.raises(kinds.TooLarge, match="4096 x 4096 pixels are more"):
        kinds.decode_by_hand(tiff_with_tile(16, 16, 4096), 10**6)


def test_what_pillow_does_not_know_is_not_decoded_without_a_limit():
    gif = encoded("GIF", (3000, 3000))
    with pytest.raises(kinds.Unreadable, match="Unknown image file format"):
        kinds.decode_by_hand(b"GIF88a" + gif[6:], 10**6)  # TensorFlow takes it for a GIF.


@pytest.mark.parametrize("canvas", [(65535, 65535), (20000, 20000)])
def test_a_canvas_of_gigabytes_is_refused_in_little_memory(canvas):
    frame = encoded("WEBP", (16, 16), lossless=True)[12:]
    sides = b"".join(struct.pack("<I", side - 1)[:3] for side in canvas)
    picture = bytes(6) + struct.pack("<I", 15)[:3] * 2 + bytes(4) + frame
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + sides + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(picture)) + picture
    before = psutil.Process().memory_info().rss
    with pytest.raises(kinds.Unreadable):
        kinds.decode_by_hand(b"RIFF" + struct.pack("<I", len(body)) + body, 10**6)
    assert psutil.Process().memory_info().rss - before < 2**26


def test_a_pipe_is_no_image(tmp_path):
    root = tiny.folder_of(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.png"))
        assert files.find_images(root) == ["a.png"]


# What listens


def test_a_run_listens_nowhere(tmp_path_factory):
    tiny.pretrained(tmp_path_factory)  # in this process
    assert not [it for it in psutil.Process().net_connections() if it.status == psutil.CONN_LISTEN]


def test_tensorboard_listens_on_this_machine_alone():
    from tensorboard import program
    from tensorboard.plugins.core import core_plugin

    board = program.TensorBoard(plugins=[core_plugin.CorePluginLoader()])
    board.configure(argv=["tensorboard", "--logdir=runs"])
    assert not board.flags.bind_all and board.flags.host in (None, "localhost")


# The page


def test_every_promise_names_tests_that_exist():
    page = (ROOT / "SECURITY.md").read_text()
    table = page.split("| --- | --- |")[1].split("\n## ")[0]
    promises = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(promises) > 10
    file = None
    for promise in promises:
        named = re.findall(r"`(tests/\w+\.py)?(?:::(\w+))?`", promise.rsplit(" | ", 1)[1])
        assert named, promise
        for path, name in named:
            file = path or file
            assert f"def {name}" in (ROOT / file).read_text(), (file, name)
