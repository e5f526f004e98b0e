"""The folder of a run, `--model_dir`: its config.json, and JSON files written whole or not at all.

Local files are read without TensorFlow, so that a command line that contradicts a run is refused at once.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errors import UserError, reason

CONFIG_FILE = "config.json"
BEST_FOLDER = "best"  # where a run keeps the checkpoint with the best probe
STATE_FILE = "checkpoint"  # TensorFlow's list of the checkpoints in a folder
RUN_CHECKPOINT = re.compile(r"ckpt-(\d+)\.index")
MAKE_ROOM = "make room and give the same command again"
_NOT_THE_PROGRAM = ("tests/", "benchmarks/", "tools/", "deploy/")
_PACKAGES = ("tensorflow", "keras", "numpy", "tensorflow-datasets")


def read_config(model_dir: str) -> dict[str, Any] | None:
    """The config of the run that lives in `model_dir`; None where none does.

    A run lives there from its first checkpoint on. A run that stopped before it has left nothing to continue from.

    Raises:
      UserError: where `model_dir` cannot be read or is not a folder, or holds checkpoints of another program, or a
        damaged config.
    """
    where = f"--model_dir={model_dir}"
    if exists(model_dir, where) and not _is_folder(model_dir):
        raise UserError(f"{where} is a file: give a folder")
    with reading(where):
        names = _list(model_dir)
    has_checkpoint = STATE_FILE in names or any(name.endswith(".index") for name in names)
    if CONFIG_FILE not in names:
        if has_checkpoint:
            raise UserError(f"{where} holds checkpoints and no {CONFIG_FILE}: put it back, or choose another folder")
        return None
    with reading(f"{where}: {CONFIG_FILE}"):
        saved = json.loads(_read(os.path.join(model_dir, CONFIG_FILE)))
    if not isinstance(saved, dict) or not {"train_mode", "resnet_depth", "dataset", "classes"} <= set(saved):
        raise UserError(f"{where}: {CONFIG_FILE} is of another program: choose another folder")
    return saved if has_checkpoint else None


def checkpoints(model_dir: str) -> list[str]:
    """The prefixes of the run's checkpoints, the newest first, by the step in their names.

    TensorFlow's own list, the file `checkpoint`, is not used: it may name deleted checkpoints and omit others.

    Raises:
      UserError: where the folder cannot be read.
    """
    with reading(model_dir):
        found = [RUN_CHECKPOINT.fullmatch(name) for name in _list(model_dir)]
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    return [os.path.join(model_dir, f"ckpt-{step}") for step in steps]


def files_of(prefix: str) -> list[str]:
    """The files of a checkpoint: those in its folder whose names begin with its name and a dot."""
    folder, name = os.path.split(prefix)
    return [os.path.join(folder, file) for file in _list(folder) if file.startswith(f"{name}.")]


def chosen(path: str, choice: str) -> str:
    """What `path` means: itself, or with `choice` "best" the folder of its best checkpoint, where it keeps one."""
    best = os.path.join(path, BEST_FOLDER)
    return best if choice == "best" and checkpoints(best) else path


def check_best(networks: Mapping[str, str]) -> None:
    """Makes sure that one of the networks, paths by the name of their flag, keeps a best checkpoint.

    Raises:
      UserError: where none of them does.
    """
    if any(chosen(path, "best") != path for path in networks.values()):
        return
    named = " and ".join(f"--{flag}={path}" for flag, path in networks.items())
    raise UserError(
        f"{named} {'holds' if len(networks) == 1 else 'hold'} no best checkpoint, which only pretraining with labels "
        f"and --keep_best keeps: use --checkpoint_choice=newest"
    )


def describe(
    config: Mapping[str, Any],
    classes: Sequence[str],
    examples: int,
    data_fingerprint: str = "",
    recipe_reasons: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What config.json holds: the hyper-parameters, the data's classes and examples, versions and the git commit.

    `recipe_reasons` says by field name why the recipe chose a value.
    """
    return {
        **config,
        "recipe_reasons": dict(recipe_reasons or {}),
        "classes": list(classes),
        "train_examples": examples,
        "data_fingerprint": data_fingerprint,
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "git_commit": _git_commit(),
    }


def program() -> str:
    """Which program this is, in short: its commit, if it is in a git checkout, and a checksum of its modules."""
    folder = os.path.dirname(os.path.abspath(__file__))
    paths = [path for pattern in ("*.py", "*/*.py") for path in glob.glob(pattern, root_dir=folder)]
    checksum = 0
    for path in sorted(path for path in paths if not path.startswith(_NOT_THE_PROGRAM)):
        with open(os.path.join(folder, path), "rb") as file:
            checksum = zlib.crc32(path.encode() + b"\0" + file.read(), checksum)
    commit = _git_commit()
    return f"{checksum:08x}" + (f" of commit {commit[:7]}" if commit else "")


def _git_commit() -> str | None:
    """The commit of this program, with `+` where its files have changed since; None outside a git checkout."""
    folder = os.path.dirname(os.path.abspath(__file__))

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_config(model_dir: str, description: Mapping[str, Any]) -> None:
    """Writes config.json into `model_dir`, which it makes where needed.

    Raises:
      UserError: where it cannot be written.
    """
    import tensorflow as tf

    with writing(f"--model_dir={model_dir}"):
        tf.io.gfile.makedirs(model_dir)
        write_json(os.path.join(model_dir, CONFIG_FILE), description)


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: str, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file, whole or not at all. It is on the disk before it takes the place of the one before."""
    import tensorflow as tf

    with tf.io.gfile.GFile(f"{path}.tmp", "wb") as file:
        file.write(content)
    bring_to_disk(f"{path}.tmp")
    tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)


def bring_to_disk(path: str) -> None:
    """Waits until a file, or the names in a folder, would outlive a power failure. Other than local paths stay as is.

    Raises:
      OSError: where the disk does not take it.
    """
    if is_remote(path):
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some network file systems cannot do this to a folder.
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what goes wrong while `what` is read, a folder without permission or a damaged file, into a `UserError`."""
    try:
        yield
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")  # Its errors come only from where it was imported.
        expected: tuple[type[Exception], ...] = (
            OSError,
            ValueError,
            RecursionError,
        )  # the last of JSON that is too deep
        if tensorflow:
            expected += (tensorflow.errors.OpError,)
        if not isinstance(error, expected):
            raise
        raise UserError(f"{what} cannot be read: {reason(error)}") from error


@contextlib.contextmanager
def writing(what: str, make_room: str = MAKE_ROOM) -> Iterator[None]:
    """Turns a full disk or a folder without permission, met while `what` is written, into a `UserError`.

    `make_room` is the advice where the disk is full.
    """
    import tensorflow as tf

    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        why = reason(error)
        if "No space left" in why:
            why = f"no space left on the disk: {make_room}"
        raise UserError(f"{what} cannot be written: {why}") from error


def check_writable(model_dir: str) -> None:
    """Makes sure that a run can write into its folder, or make it, before the hours that it computes. Writes nothing.

    Whether a remote folder can be written shows only when that is done.

    Raises:
      UserError: where the folder, or the one in which it is to be made, is read-only or no folder.
    """
    if is_remote(model_dir):
        return
    nearest = os.path.abspath(model_dir)
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    what = "read-only" if os.path.isdir(nearest) else "no folder"
    if what == "no folder" or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--model_dir={model_dir} cannot be written: {nearest} is {what}: choose another --model_dir")


def exists(path: str, where: str) -> bool:
    """Whether there is a file or a folder at `path`.

    Raises:
      UserError: naming `where`, if that cannot be found out, as with a bucket that cannot be reached.
    """
    if not is_remote(path):
        return os.path.exists(path)
    import tensorflow as tf

    try:
        return tf.io.gfile.exists(path)
    except tf.errors.OpError as error:
        raise UserError(f"{where} cannot be reached: {reason(error)}") from error


def folders_in(path: str, where: str) -> list[str]:
    """The names of the folders in a folder, sorted.

    Raises:
      UserError: naming `where`, if they cannot be listed.
    """
    with reading(where):
        return sorted(name for name in _list(path) if _is_folder(os.path.join(path, name)))


def is_checkpoint(path: str, flag: str) -> bool:
    """Whether there is a folder, a checkpoint or a part of one at `path`, given by `--flag`.

    Raises:
      UserError: where that cannot be found out.
    """
    where = f"--{flag}={path}"
    return exists(path, where) or exists(f"{path.removesuffix('.index')}.index", where)


def is_remote(path: str) -> bool:
    """Whether a path is of another file system than this machine's, such as gs://bucket/run."""
    return "://" in path


def _is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    import tensorflow as tf

    return tf.io.gfile.isdir(path)


def _list(folder: str) -> list[str]:
    """The names in a folder; none where there is no folder."""
    if not _is_folder(folder or "."):
        return []
    if not is_remote(folder):
        return os.listdir(folder or ".")
    import tensorflow as tf

    return [name.rstrip("/") for name in tf.io.gfile.listdir(folder)]


def _read(path: str) -> str:
    if not is_remote(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    import tensorflow as tf

    with tf.io.gfile.GFile(path) as file:
        return file.read()
