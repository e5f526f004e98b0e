"""--deterministic: a run that was killed and goes on ends where an uninterrupted one ends, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import bits
import faults
import pytest
import tensorflow as tf
import tiny
from conftest import ROOT
from tensorflow.python.framework import config as tf_config
from test_sources import tfds_dir  # noqa: F401 - a fixture

import signals
import train

ONE_STAGE = True  # see conftest.py; kills.py has it too
# 60 images: the third step goes into the second epoch, the sixth into the third.
DIGITS = dict(train_split="train[:60]")
# Probes after steps 3 and 6.
PRETRAIN = dict(tiny.IN_COLOUR, **DIGITS, image_size=8, train_batch_size=24, memory_size=80, eval_every_epochs=1.2)
OTHERS = dict(tiny.NETWORK, **tiny.QUICK, **DIGITS, image_size=8)


@pytest.fixture(autouse=True)
def nondeterministic_again():
    yield
    tf_config.disable_op_determinism()


STEPS = dict(deterministic=True, train_steps=6, checkpoint_steps=2)


def assert_ends_the_same(folder, **given):
    """Compares a run with one that is killed after three steps."""
    given = {**given, **STEPS}
    whole, killed = str(folder / "whole"), str(folder / "killed")
    tiny.train_run(**given, model_dir=whole)
    tiny.killed_run(3, **given, model_dir=killed)
    tiny.train_run(**given, model_dir=killed)
    assert bits.different(whole, killed) == {}


def test_pretraining_with_memory_that_is_killed_three_times_ends_the_same(tmp_path):
    """The short form of `python benchmarks/faults.py --only=kills`."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = {**PRETRAIN, **STEPS, "checkpoint_steps": 4}  # It goes on from step 4, between two probes.
    kills = [sys.executable, ROOT / "tests" / "kills.py", json.dumps({**given, "model_dir": str(killed)})]
    with subprocess.Popen(kills, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as killing:
        tiny.train_run(**given, model_dir=str(whole))
        said = killing.communicate()[0]
    assert killing.returncode == 0, said
    assert (killed / "ckpt-6_temp" / "ckpt-6.index").exists() and not (killed / "ckpt-6.index").exists()
    tiny.train_run(**given, model_dir=str(killed))
    assert bits.different(str(whole), str(killed)) == {}
    assert faults.wrong_examples(whole, killed) == 0
    keys = tf.train.load_checkpoint(str(whole)).get_variable_to_shape_map()
    assert {key.split("/")[0] for key in keys} >= {"weights", "optimizer", "step", "momentum", "queue"}
    probes = (whole / "probe.json").read_text()
    assert '"step": 3' in probes and (killed / "probe.json").read_text() == probes


def test_the_comparison_sees_the_last_bit(tmp_path):
    for name, value in (("one", 1.0), ("other", 1.0 + 2.0**-23)):
        state = tf.train.Checkpoint(value=tf.Variable(value), step=tf.Variable(3))
        state.write(str(tmp_path / name / "ckpt-3"))
    one, other = str(tmp_path / "one"), str(tmp_path / "other" / "ckpt-3")
    assert bits.different(one, one) == {}
    assert bits.different(one, other) == {"value/.ATTRIBUTES/VARIABLE_VALUE": 2.0**-23}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folders of a pretraining run and of a run that was fine-tuned from it. Only to be read."""
    base = tmp_path_factory.mktemp("chain")
    tiny.train_run(**PRETRAIN, train_steps=2, model_dir=str(base / "pretrain"))
    finetune = dict(OTHERS, train_mode="finetune", checkpoint=str(base / "pretrain"))
    tiny.train_run(**finetune, train_steps=2, model_dir=str(base / "finetune"))
    return base


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        dict(train_mode="supervised", augment_policy="randaugment", optimizer="adam"),
        dict(train_mode="finetune", ft_proj_selector=1),
        dict(train_mode="distill"),
        dict(train_mode="distill", distill_neighbors=3, labels_per_class=2),
    ],
    ids=["supervised", "finetune", "distill", "distill with neighbours"],
)
def test_the_other_steps_end_the_same(chain, tmp_path, given):
    named = {"finetune": {"checkpoint": "pretrain"}, "distill": {"teacher": "finetune"}}.get(given["train_mode"], {})
    networks = {flag: str(chain / run) for flag, run in named.items()}
    assert_ends_the_same(tmp_path, **{**OTHERS, **given, **networks})


@pytest.mark.slow
@pytest.mark.parametrize("train_mode", ["pretrain", "supervised"])
@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_runs_on_other_data_end_the_same(tfds_dir, tmp_path, kind, train_mode):  # noqa: F811 - the fixture
    given = dict(PRETRAIN if train_mode == "pretrain" else OTHERS, train_mode=train_mode, train_split="train")
    if kind == "folder":
        tiny.digit_images(tmp_path / "images" / "train", 14)
        given |= dict(dataset="image_folder", data_dir=str(tmp_path / "images"))
    else:
        given |= dict(dataset="tiny_labelled", data_dir=tfds_dir)
    assert_ends_the_same(tmp_path, **given)


@pytest.mark.slow
def test_a_run_that_xla_compiles_ends_the_same(tmp_path):
    assert_ends_the_same(tmp_path, **PRETRAIN, jit_compile=True)


@pytest.mark.slow  # tests/test_steps_per_call.py compares the steps.
def test_several_steps_in_one_call_end_the_same_also_after_a_stop(tmp_path, monkeypatch):
    steps = dict(train_steps=12, checkpoint_steps=9, summary_steps=4, eval_every_epochs=-1.0)
    given = {**PRETRAIN, **STEPS, **steps}
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    tiny.train_run(**given, model_dir=whole)
    lengths = []

    def several(*args):
        steps = train_several(*args)

        def noted(batches):
            lengths.append(len(batches))
            return steps(batches)

        return noted

    train_several = train.several_steps
    monkeypatch.setattr(train, "several_steps", several)
    with monkeypatch.context() as patched:
        patched.setattr(signals.LISTENER, "first", "SIGTERM")
        with pytest.raises(KeyboardInterrupt, match=r"^by SIGTERM at step 3: the same command goes on from step 3$"):
            tiny.train_run(**given, steps_per_call=3, model_dir=stopped)
    tiny.train_run(**given, steps_per_call=3, model_dir=stopped)
    # Steps 1 to 3, and 5 to 7. The host looks after 4, 8, 9, 10, which tries the checkpoint of 9, and 12.
    assert lengths == [3, 3]
    assert bits.different(whole, stopped) == {}
    assert faults.wrong_examples(Path(whole), Path(stopped)) == 0
