"""The commands of the 2020 release's READMEs run as they stand there, and ImageNet's subsets label its images."""

import json
import shlex

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
import tiny
from test_run import command

import data
import sources
import strategy as strategy_lib
from errors import UserError

ONE_STAGE = True  # see conftest.py
# The CIFAR-10 commands differ in the weight decay alone; these are their texts, in the order of the READMEs.
CIFAR = {
    weight_decay: f"""
python run.py --train_mode=pretrain \\
  --train_batch_size=512 --train_epochs=1000 \\
  --learning_rate=1.0 --weight_decay={weight_decay} --temperature=0.5 \\
  --dataset=cifar10 --image_size=32 --eval_split=test --resnet_depth=18 \\
  --use_blur=False --color_jitter_strength=0.5 \\
  --model_dir=/tmp/simclr_test --use_tpu=False
"""
    for weight_decay in ("1e-6", "1e-4")
}
CIFAR_LINEAR = """
python run.py --mode=train_then_eval --train_mode=finetune \\
  --fine_tune_after_block=4 --zero_init_logits_layer=True \\
  --variable_schema='(?!global_step|(?:.*/|^)LARSOptimizer|head)' \\
  --global_bn=False --optimizer=momentum --learning_rate=0.1 --weight_decay=0.0 \\
  --train_epochs=100 --train_batch_size=512 --warmup_epochs=0 \\
  --dataset=cifar10 --image_size=32 --eval_split=test --resnet_depth=18 \\
  --checkpoint=/tmp/simclr_test --model_dir=/tmp/simclr_test_ft --use_tpu=False
"""
IMAGENET = {
    "TF1": """
python run.py --train_mode=pretrain \\
  --train_batch_size=4096 --train_epochs=100 \\
  --learning_rate=0.3 --weight_decay=1e-6 --temperature=0.1 \\
  --dataset=imagenet2012 --image_size=224 --eval_split=validation \\
  --data_dir=$DATA_DIR --model_dir=$MODEL_DIR \\
  --use_tpu=True --tpu_name=$TPU_NAME --train_summary_steps=0
""",
    "TF2": """
python run.py --train_mode=pretrain \\
  --train_batch_size=4096 --train_epochs=100 --temperature=0.1 \\
  --learning_rate=0.075 --learning_rate_scaling=sqrt --weight_decay=1e-4 \\
  --dataset=imagenet2012 --image_size=224 --eval_split=validation \\
  --data_dir=$DATA_DIR --model_dir=$MODEL_DIR \\
  --use_tpu=True --tpu_name=$TPU_NAME --train_summary_steps=0
""",
}
IMAGENET_LINEAR = """
python run.py --mode=train_then_eval --train_mode=finetune \\
  --fine_tune_after_block=4 --zero_init_logits_layer=True \\
  --variable_schema='(?!global_step|(?:.*/|^)LARSOptimizer|head)' \\
  --global_bn=False --optimizer=momentum --learning_rate=0.1 --weight_decay=1e-6 \\
  --train_epochs=90 --train_batch_size=4096 --warmup_epochs=0 \\
  --dataset=imagenet2012 --image_size=224 --eval_split=validation \\
  --data_dir=$DATA_DIR --model_dir=$MODEL_DIR --checkpoint=$CHKPT_DIR \\
  --use_tpu=True --tpu_name=$TPU_NAME --train_summary_steps=0
"""
SUBSETS = (("1pct", 6), ("10pct", 12))  # and how many of ImageNet's stand-in's 40 images are in each
SMALLER = ["--train_steps=1", "--train_batch_size=8", "--eval_batch_size=10", "--resnet_depth=10", "--memory_size=32"]
SMALLER += ["--width_multiplier=0.125", "--num_proj_layers=2", "--eval_every_epochs=-1"]


def examples(keys, size, name, classes=3):
    """A data set of noise images, one of each key, with a name under the feature `name`."""

    def generate():
        for key in keys:
            image = np.random.default_rng(key).integers(0, 256, [size, size, 3], np.uint8)
            yield {"image": image, "label": key % classes, name: f"n{key:04}.JPEG"}

    signature = {"image": tf.TensorSpec([size, size, 3], tf.uint8), "label": tf.TensorSpec([], tf.int64)}
    signature[name] = tf.TensorSpec([], tf.string)
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """A data_dir with small stand-ins of CIFAR-10, ImageNet and its 1% and 10% subsets, under their names."""
    folder = str(tmp_path_factory.mktemp("stand_ins"))
    tfds.disable_progress_bar()
    sets = [("cifar10", None, 4), ("imagenet2012", None, 40), *(("imagenet2012_subset", p, n) for p, n in SUBSETS)]
    for dataset, config, count in sets:
        builder, cifar = tfds.builder_cls(dataset), dataset == "cifar10"
        size, classes, name, test = (32, 10, "id", "test") if cifar else (40, 1000, "file_name", "validation")
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(32, 32, 3) if cifar else (None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=classes),
            name: tfds.features.Text(),
        })  # fmt: skip
        tfds.dataset_builders.store_as_tfds_dataset(
            name=dataset, config=config, features=features, data_dir=folder, disable_shuffling=True,
            version=str((config and builder.builder_configs[config].version) or builder.VERSION),
            split_datasets={"train": examples(range(count), size, name), test: examples(range(100, 110), size, name)},
        )  # fmt: skip
    return folder


@pytest.fixture
def release(tmp_path, stand_ins, monkeypatch, nothing_exported):
    """`release(text, *flags)`: runs a command of the release's, with `flags` after it, in a folder for its /tmp."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", stand_ins)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", stand_ins)  # where a command has no --data_dir
    shell = {"DATA_DIR": stand_ins, "MODEL_DIR": str(tmp_path / "model"), "TPU_NAME": "tpu", "CHKPT_DIR": ""}

    def run(text, *flags, **variables):
        text = text.replace("/tmp/", f"{tmp_path}/")
        for name, value in {**shell, **variables}.items():
            text = text.replace(f"${name}", value)
        python, script, *arguments = shlex.split(text.replace("\\\n", " "))
        assert (python, script) == ("python", "run.py")
        return command(*arguments, *flags)

    return run


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("weight_decay", ["1e-6", pytest.param("1e-4", marks=pytest.mark.slow)])
def test_the_cifar_commands_in_small(release, whole_network, tmp_path, weight_decay):
    assert release(CIFAR[weight_decay], *SMALLER) == 0
    assert release(CIFAR_LINEAR, *SMALLER) == 0
    assert result_in(tmp_path / "simclr_test_ft")["examples"] == 10


@pytest.mark.slow
def test_the_cifar_commands_verbatim(release, tmp_path):
    """On the stand-in's four images: 8 steps of the first, 1 of the second, at their batch of 512."""
    assert release(CIFAR["1e-4"]) == 0
    assert release(CIFAR_LINEAR) == 0
    config = json.loads((tmp_path / "simclr_test_ft" / "config.json").read_text())
    assert config["fine_tune_after_block"] == 4 and config["train_batch_size"] == 512


@pytest.mark.parametrize("release_version", ["TF2", pytest.param("TF1", marks=pytest.mark.slow)])
def test_the_imagenet_commands_in_small_without_a_tpu(release, whole_network, tmp_path, release_version):
    small = [*SMALLER, "--use_tpu=False", "--image_size=40"]
    assert release(IMAGENET[release_version], *small) == 0
    assert release(IMAGENET_LINEAR, *small, CHKPT_DIR=str(tmp_path / "model"), MODEL_DIR=str(tmp_path / "ft")) == 0
    assert result_in(tmp_path / "ft")["examples"] == 10


@pytest.mark.parametrize("text", [*IMAGENET.values(), IMAGENET_LINEAR])
def test_the_imagenet_commands_ask_for_the_tpu_they_name(release, tmp_path, monkeypatch, capsys, text):
    asked = []

    def resolver(**given):
        asked.append(given)
        raise ValueError("no such TPU")

    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", resolver)
    pretrained = tiny.begun(**tiny.PRETRAIN, image_size=40, train_steps=1, model_dir=str(tmp_path / "pretrained"))
    network = ["--resnet_depth=10", "--width_multiplier=0.125"]
    assert release(text, *network, "--image_size=40", CHKPT_DIR=pretrained) == 2
    assert asked == [dict(tpu="tpu", zone=None, project=None)]
    assert "--strategy=tpu: no TPU at tpu" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_subset_labels_the_images_of_imagenet_by_file_name(stand_ins):
    images = sources.load("imagenet2012", "train", stand_ins)
    for name, count in SUBSETS:
        labelled = images.labelled_by(sources.load(f"imagenet2012_subset/{name}", "train", stand_ins))
        names, labels = labelled.index()
        assert labelled.examples == 40 and labelled.has_labels and list(labelled.classes) == list(images.classes)
        assert {n: label for n, label in zip(names, labels, strict=True) if label >= 0} == {
            f"n{key:04}.JPEG": key % 3 for key in range(count)
        }
    assert images.index()[1].min() >= 0  # the data set itself keeps its labels


def test_a_labelled_set_that_shares_no_file_or_has_no_names_is_refused(stand_ins):
    images = sources.load("imagenet2012", "train", stand_ins)
    with pytest.raises(UserError, match="none of its file names is in --dataset"):
        images.labelled_by(sources.load("imagenet2012", "validation", stand_ins))
    with pytest.raises(UserError, match="both data sets must have file names"):
        images.labelled_by(sources.load("cifar10", "train", stand_ins))
    with pytest.raises(UserError, match="both data sets must have file names"):
        images.labelled_by(sources.load("digits", "train"))


@pytest.mark.parametrize("subset", ["1pct", pytest.param("10pct", marks=pytest.mark.slow)])
def test_distillation_with_a_subset_beside_imagenet(stand_ins, tmp_path, monkeypatch, nothing_exported, subset):
    """Eq. 3: all 40 images teach through the teacher, those of the subset through their labels too."""
    monkeypatch.chdir(tmp_path)
    network = [f"--data_dir={stand_ins}", "--image_size=40", "--learning_rate=0.1", *SMALLER]
    labels = f"imagenet2012_subset/{subset}"
    tiny.begun(**tiny.PRETRAIN, num_proj_layers=2, image_size=40, train_steps=1, model_dir="pre")
    finetune = ["--train_mode=finetune", f"--dataset={labels}", "--checkpoint=pre", "--model_dir=ft", *network]
    assert command(*finetune, "--ft_proj_selector=1") == 0
    distill = [
        *("--mode=train_then_eval", "--train_mode=distill", "--dataset=imagenet2012", f"--labelled_dataset={labels}"),
        *("--teacher=ft", "--model_dir=st", "--distill_alpha=0.5", *network, "--train_batch_size=40"),
    ]
    assert command(*distill) == 0
    assert result_in(tmp_path / "st")["examples"] == 10


def test_pretraining_with_a_subset_evaluates_on_its_labels_alone(stand_ins, tmp_path, monkeypatch):
    given = dict(
        tiny.PRETRAIN, dataset="imagenet2012", labelled_dataset="imagenet2012_subset/1pct", data_dir=stand_ins,
        image_size=40, train_steps=1, model_dir=str(tmp_path),
    )  # fmt: skip
    seen = []
    stream = data.train_stream

    def watched(source, *args, **options):
        seen.append(int(sum(label >= 0 for label in source.index()[1])))
        return stream(source, *args, **options)

    monkeypatch.setattr(data, "train_stream", watched)
    tiny.train_run(strategy_lib.make_strategy(), **given)
    assert seen == [6]
