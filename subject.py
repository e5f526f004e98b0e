"""Whose network a command means: that of the run in `--model_dir`, or that of `--checkpoint` itself.

Training always means the run in `model_dir`, new or old. The modes that only use a network mean it too. Where no run
lives there and `--checkpoint` is given, they mean the checkpoint's network.

`decide` answers this once; everything after it asks the `Subject`. `resolve` makes its config: a flag beats the run
or the networks that the flags name, these beat the recipe or the data set's preset, and these beat the release's
default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import continuation
import recipe
import run_folder
from architecture import SMALL_IMAGE_PIXELS
from config import (
    ANSWER_FILES,
    AUTO_SPLIT,
    COMMAND_FIELDS,
    ENCODER_FIELDS,
    FIELDS,
    HEAD_FIELDS,
    LABEL_FIELDS,
    NETWORK_MODES,
    PRESET_OF_THE_DATA,
    PRESETS,
    Config,
    check_combination,
    check_flags,
    from_dict,
)
from engine import quiet_import
from errors import UserError, did_you_mean_path

if TYPE_CHECKING:
    import checkpoint

# The folders that are taken for evaluation images where --eval_split is not given: the first of these that is there.
EVAL_SPLITS = ("validation", "valid", "val", "test")


class Subject(NamedTuple):
    """What a command is about.

    Attributes:
      config: every hyper-parameter of the command.
      of_run: whether it is about the run in `config.model_dir`; otherwise it is about `config.checkpoint` itself.
      is_new: whether that run is yet to begin.
      facts: what the recipe of a new run was chosen by; None where nothing was chosen.
      choices: the values of `config` that the recipe chose, by field name.
      known: the values that were decided before the recipe, by field name.
      eval_split_in_words: which split was found to evaluate on, for people to read; empty where none was looked for.
    """

    config: Config
    of_run: bool
    is_new: bool = False
    facts: recipe.Facts | None = None
    choices: Mapping[str, recipe.Choice] = MappingProxyType({})
    known: Mapping[str, Any] = MappingProxyType({})
    eval_split_in_words: str = ""

    @property
    def recipe_reasons(self) -> dict[str, str]:
        """Why the recipe chose a value, by field name."""
        return {name: choice.reason for name, choice in self.choices.items()}

    def with_length(self, field: str, value: int, reason: str) -> Subject:
        """The same run with `train_epochs` or `train_steps`, the `field`, of this value for this reason.

        What the recipe chose by the run's length is chosen again.
        """
        length = {field: value} if field == "train_steps" else {field: value, "train_steps": 0}
        values = self.config.to_dict() | length
        if not self.facts:
            return self._replace(config=Config(**values))
        choices = {field: recipe.Choice(value, reason), **recipe.choose(self.facts, {**self.known, **length})}
        by_old_length = {name: FIELDS[name].default for name in self.choices.keys() - choices.keys()}
        made = Config(**{**values, **by_old_length, **recipe.values(choices)})
        return self._replace(config=made, choices=choices)

    def with_choices(self, chosen: Mapping[str, recipe.Choice]) -> Subject:
        """The same run with other values that the recipe chose, by field name."""
        values = self.config.to_dict() | recipe.values(chosen)
        return self._replace(config=Config(**values), choices={**self.choices, **chosen})

    def open(self) -> checkpoint.Weights:
        """Opens the network of a command: the run's newest checkpoint that can be read, its best one where
        `--checkpoint_choice` says so, or the checkpoint.

        Call it once for a command, since a run that is still training may write a newer one meanwhile.

        Raises:
          UserError: where there is no checkpoint, or it does not tell enough.
        """
        import checkpoint
        import published

        # In training, the choice is about the checkpoint that the run starts from.
        choice = self.config.checkpoint_choice if self.config.mode in NETWORK_MODES else "newest"
        flag = "model_dir" if self.of_run else "checkpoint"
        named = self.config.model_dir if self.of_run else self.config.checkpoint
        if choice == "best":
            run_folder.check_best({flag: named})
        path = run_folder.chosen(named, choice)
        if self.of_run:
            return checkpoint.Weights(path, flag)
        return published.open_weights(path, flag, self.config.to_dict(), self.config.ft_proj_selector, logits=True)


def decide(given: Mapping[str, Any], replicas: int = 0) -> Subject:
    """The subject of a command, from the flags that were given, the run in `model_dir`, the checkpoint and the teacher.

    What can be refused without TensorFlow is refused before it is imported, which takes seconds.

    Args:
      given: the values set by the user, by field name.
      replicas: for a plan, how many devices share a batch; 0: as many as there are.

    Raises:
      UserError: on values that are impossible or contradict each other or what is there.
    """
    check_flags(given)
    _check_storage(given)
    _check_minutes(given)
    folder = folder_of_lists(given)
    if folder:
        given = {**given, "data_dir": folder}
    mode = given.get("mode", FIELDS["mode"].default)
    if mode in ANSWER_FILES and given.get("data_dir") and "dataset" not in given:
        given = {**given, "dataset": "image_folder"}  # The images are a person's own, whatever the run was trained on.
    evaluates = mode in NETWORK_MODES
    # `--train_mode=finetune --checkpoint=...` means the run that was fine-tuned from the checkpoint.
    of_pretraining = given.get("train_mode", "pretrain") == "pretrain"
    names_network = evaluates and of_pretraining and bool(given.get("checkpoint"))
    model_dir = default_model_dir(given, of_checkpoint=names_network)
    saved = run_folder.read_config(model_dir) if mode != "plan" else None
    _check_saved(saved or {}, model_dir)
    of_run = not evaluates or saved is not None
    if evaluates and saved and given.get("checkpoint") not in (None, saved.get("checkpoint")):
        raise UserError(f"--checkpoint: a run lives in --model_dir={model_dir}: leave one of the flags out")
    if not of_run and not names_network:
        raise UserError(
            f"--mode={mode}: no run in --model_dir={model_dir}: train one first, or give --checkpoint alone"
            f"{did_you_mean_path(model_dir)}"
        )
    if saved and not given.get("model_dir"):
        _check_default_folder(given, saved, model_dir)
    known = known_values(given, saved)
    check_combination(known)
    if mode != "export" and known.get("dataset") == "image_folder":
        _check_exists(known["data_dir"])
    if os.path.isdir(given.get("output", "")):
        raise UserError(f"--output={given['output']} is a folder: name a file")
    in_words = ""
    if mode in ("train", "eval", "train_then_eval", "plan") and _lacks_eval_split(given, saved):
        split, in_words = _eval_split_of(known, mode, is_new=saved is None)
        given = {**given, "eval_split": split}
    start = teacher = None
    if not saved:
        _check_choice(given)
        start = _config_of("checkpoint", given, mode)
        teacher = _config_of("teacher", given, mode)
    config = resolve(given, saved, start, teacher, of_checkpoint=not of_run)
    is_new = of_run and not saved
    facts = _facts(config, teacher, replicas) if is_new and config.recipe == "auto" else None
    if not facts:
        return Subject(config, of_run, is_new, eval_split_in_words=in_words)
    networks = _values_of_networks(given, given, config.train_mode, start, teacher, of_checkpoint=False)
    known = {**networks, **given, "train_mode": config.train_mode}
    choices = recipe.choose(facts, known)
    config = resolve(given, None, start, teacher, chosen=recipe.values(choices))
    return Subject(config, of_run, is_new, facts, choices, known, in_words)


def _check_storage(given: Mapping[str, Any]) -> None:
    """Refuses paths of remote storage for which TensorFlow has no file system."""
    for name in ("data_dir", "model_dir", "checkpoint", "teacher", "labels", "images"):
        scheme, remote, _ = str(given.get(name) or "").partition("://")
        if not remote:
            continue
        import tensorflow as tf

        if scheme not in tf.io.gfile.get_registered_schemes():
            raise UserError(
                f"--{name}={given[name]}: TensorFlow has no file system for {scheme}://, only for gs:// and this "
                f"machine's folders: mount the storage as a folder (rclone mount) or copy it, and give that folder"
            )


def _check_minutes(given: Mapping[str, Any]) -> None:
    """Refuses --train_minutes beside flags that it does not go with."""
    minutes = given.get("train_minutes")
    if not minutes:
        return
    for name in ("train_epochs", "train_steps"):
        if given.get(name):
            raise UserError(f"--train_minutes={minutes} contradicts --{name}={given[name]}: give one")
    if given.get("mode") == "plan":
        raise UserError(
            f"--train_minutes={minutes} is measured when training begins: plan with --train_epochs or --train_steps"
        )


def _check_saved(saved: Mapping[str, Any], model_dir: str) -> None:
    """Refuses the config of a run whose values are impossible, each by itself."""
    try:
        check_flags({name: value for name, value in saved.items() if name in FIELDS})
    except UserError as mistake:
        raise UserError(f"--model_dir={model_dir}: {run_folder.CONFIG_FILE} is damaged: {mistake}") from mistake


def _check_choice(given: Mapping[str, Any]) -> None:
    """Refuses --checkpoint_choice=best where no network that the flags name keeps a best checkpoint.

    A network that is not there is left to `_config_of`: a plan may name one, other commands may not.
    """
    if given.get("checkpoint_choice") != "best":
        return
    networks = {flag: given[flag] for flag in ("checkpoint", "teacher") if given.get(flag)}
    if not networks:
        raise UserError(
            "--checkpoint_choice=best is about the networks of --checkpoint and --teacher, and neither is given: leave "
            "it out; a run's own best checkpoint is evaluated by --mode=eval once the run is trained"
        )
    if all(run_folder.is_checkpoint(path, flag) for flag, path in networks.items()):
        run_folder.check_best(networks)


def folder_of_lists(given: Mapping[str, Any]) -> str:
    """The image folder where a list of images is given and no folder: the one in which the list lies; or empty."""
    named = given.get("labels") or given.get("images")
    if not named or given.get("data_dir") or (given.get("dataset") or "image_folder") != "image_folder":
        return ""
    return os.path.dirname(named) or "."


def _check_exists(data_dir: str) -> None:
    where = f"--data_dir={data_dir}"
    if not run_folder.exists(data_dir, where):
        raise UserError(f"{where}: no such folder{did_you_mean_path(data_dir)}")


def _check_default_folder(given: Mapping[str, Any], saved: Mapping[str, Any], model_dir: str) -> None:
    """Refuses images of one folder for the run on another one, whose default model_dir happens to be the same."""
    data_dir = given.get("data_dir")
    if not data_dir or dataset_of(given) != "image_folder":
        return
    theirs = saved.get("data_dir", "") if saved["dataset"] == "image_folder" else ""
    if not theirs or not _is_same_folder(theirs, data_dir):
        raise UserError(
            f"--data_dir={data_dir}: the run in {model_dir}, its default place, is on {theirs or saved['dataset']}: "
            f"choose another --model_dir, or, to go on with that run, give --model_dir={model_dir}"
        )


def _is_same_folder(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _lacks_eval_split(given: Mapping[str, Any], saved: Mapping[str, Any] | None) -> bool:
    """Whether the split to evaluate on is to be looked for: an image folder's that neither a flag nor the run names."""
    if given.get("eval_split") or dataset_of(given, saved) != "image_folder":
        return False
    return not (saved and saved["dataset"] == "image_folder" and saved.get("eval_split"))


def _eval_split_of(known: Mapping[str, Any], mode: str, is_new: bool) -> tuple[str, str]:
    """The split of an image folder to evaluate on, and a sentence about it.

    Where there is none, a new run holds out a part of its training split. A run that goes on and has trained on all of
    it has nothing to evaluate on: the split is empty then.

    Args:
      known: the values that are known, `data_dir` and `labels` among them.
      mode: of the command.
      is_new: whether there is no run yet.

    Raises:
      UserError: where `mode` evaluates and there is nothing to evaluate on.
    """
    data_dir, labels = known["data_dir"], known.get("labels", "")
    split = find_eval_split(data_dir, labels)
    if split:
        where = f"{labels} or {data_dir}" if labels else data_dir
        return split, f"--eval_split={split}: the first of {', '.join(EVAL_SPLITS)} that is in {where}"
    lacks = f"{data_dir} has no folder {', '.join(EVAL_SPLITS[:-1])} or {EVAL_SPLITS[-1]}"
    train_split = known.get("train_split", FIELDS["train_split"].default)
    if is_new:
        return AUTO_SPLIT, (
            f"--eval_split={AUTO_SPLIT}: {lacks}: a tenth of the images of --train_split={train_split} is held out by "
            f"their names, to evaluate on, and not trained on"
        )
    if mode == "train":
        return "", f"{lacks}: nothing to evaluate on, until there is one or --eval_split names another"
    raise UserError(
        f"--data_dir={lacks} to evaluate on, and the run was trained on all of --train_split={train_split}: name "
        f"another split by --eval_split"
    )


def find_eval_split(data_dir: str, labels: str = "") -> str:
    """The first of `EVAL_SPLITS` that is a split in a table of labels or a folder in `data_dir`; empty where none is.

    Raises:
      UserError: where there is no such folder, or it or the table cannot be read.
    """
    _check_exists(data_dir)
    splits: Sequence[str] = []
    if labels:
        with quiet_import():
            from sources import lists
        splits = lists.splits_in(labels)
    if not splits:
        splits = run_folder.folders_in(data_dir, f"--data_dir={data_dir}")
    return next((split for split in EVAL_SPLITS if split in splits), "")


def _facts(config: Config, teacher: Mapping[str, Any] | None, replicas: int) -> recipe.Facts | None:
    """What the recipe of a new run is chosen by. `replicas` is as for `decide`.

    None where the data cannot be read: training opens the data again, and stops all workers together with the reason.

    Raises:
      UserError: where a plan's data cannot be read.
    """
    with quiet_import():
        import data
        import strategy as strategy_lib
    strategy = strategy_lib.make_strategy(
        config.planned_strategy_name if config.mode == "plan" else config.strategy_name,
        config.tpu_name, config.tpu_zone, config.gcp_project, config.master, config.cluster, config.worker_timeout,
    )  # fmt: skip
    classes = teacher.get("classes") if teacher else None
    try:
        return data.facts(
            config, classes, replicas or strategy.num_replicas_in_sync, strategy_lib.has_accelerator(strategy)
        )
    except UserError:
        if config.mode == "plan":  # A known data set is planned without its files, but with no recipe that fits it.
            raise
        return None


def _config_of(flag: str, given: Mapping[str, Any], mode: str) -> dict[str, Any] | None:
    """The config of the network that `--checkpoint` or `--teacher` names; None where the flag is not given.

    A plan may name a network that an earlier step is going to make: None too.
    """
    path = given.get(flag)
    if not path:
        return None
    if not run_folder.is_checkpoint(path, flag):
        if mode == "plan":
            return None
        raise UserError(f"--{flag}={path}: no such folder or checkpoint{did_you_mean_path(path)}")
    path = run_folder.chosen(path, given.get("checkpoint_choice", "newest"))
    with quiet_import():
        import published

    of_teacher = flag == "teacher"
    architecture = {} if of_teacher else given
    asks_classifier = of_teacher or mode in NETWORK_MODES
    layer = given.get("ft_proj_selector")
    return published.open_weights(path, flag, architecture, layer, logits=asks_classifier).config


def default_model_dir(given: Mapping[str, Any], of_checkpoint: bool = False) -> str:
    """Where a run lives: `model_dir`, or runs/<data>_<train_mode>.

    <data> is as `name_of_data` says. Results of a checkpoint that belongs to no run go to runs/<data>_<mode>.
    """
    if given.get("model_dir"):
        return given["model_dir"]
    train_mode = given.get("train_mode", FIELDS["train_mode"].default)
    return f"runs/{name_of_data(given)}_{given['mode'] if of_checkpoint else train_mode}"


def name_of_data(given: Mapping[str, Any]) -> str:
    """What a folder of results is named after: the data set, or the name of an image folder.

    Example:
      name_of_data({"data_dir": "/data/photos/"}) == "photos"
    """
    data = dataset_of(given).replace("/", "_")
    if data == "image_folder" and given.get("data_dir"):
        return os.path.basename(os.path.abspath(given["data_dir"])) or data
    return data


def dataset_of(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> str:
    """The data set of a command: the one given, else the run's, else the image folder that `data_dir` is.

    Without any of these it is the default one. `given` and `saved` are as for `resolve`.
    """
    if "dataset" not in given and not saved and given.get("data_dir"):
        return "image_folder"
    return _first_known("dataset", given, saved)


def resolve(
    given: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
    of_checkpoint: bool = False,
    chosen: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """The config of a command, from the flags that were given and what the files they name already decide.

    Args:
      given: the values set by the user, by field name.
      saved: the config of the run that already lives in its `model_dir`, or None.
      start: the config of `--checkpoint`, or None. It decides the architecture.
      teacher: the config of `--teacher`, or None. Without --checkpoint, the student takes its encoder's architecture.
      of_checkpoint: whether the command is about `--checkpoint` itself and not about a run.
      chosen: the values that the recipe of a new run chose, by field name.

    Raises:
      UserError: on values that are impossible or contradict each other, the checkpoint or the run in `model_dir`.
    """
    model_dir = default_model_dir(given, of_checkpoint)
    dataset = dataset_of(given, saved)
    train_mode = _first_known("train_mode", given, saved)
    values = {**known_values(given, saved), **chosen}
    if saved:
        trains = _first_known("mode", given) in ("train", "train_then_eval")
        continuation.check_flags(given, saved, model_dir, trains)
    else:
        values |= _values_of_networks(given, values, train_mode, start, teacher, of_checkpoint)
    for epochs, steps in (("train_epochs", "train_steps"), ("checkpoint_epochs", "checkpoint_steps")):
        if epochs in given and steps not in given:  # They beat the steps of a preset or of the run so far.
            values.pop(steps, None)
    config = Config(**{**values, **given, "dataset": dataset, "train_mode": train_mode, "model_dir": model_dir})
    _check_networks(config, given, start, teacher)
    return config


def known_values(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What holds before a checkpoint or a teacher is opened: the run's values or else a preset's, then the flags."""
    if not saved:
        dataset = dataset_of(given)
        modes = PRESETS.get(dataset, {})
        preset = {**modes.get("*", {}), **modes.get(_first_known("train_mode", given), {})}
        kind = given.get("recipe", _usual_recipe(dataset))
        if kind == "auto":
            preset = {name: preset[name] for name in PRESET_OF_THE_DATA if name in preset}
        if given.get("zero_init_logits_layer"):
            preset.pop("linear_start", None)  # The classifier starts from one or the other.
        return {**preset, "recipe": kind, **given, "dataset": dataset}
    values = {name: value for name, value in saved.items() if name in FIELDS and name not in COMMAND_FIELDS}
    if given.get("mode") in NETWORK_MODES:  # The run's choice was about the checkpoint that it started from.
        values.pop("checkpoint_choice", None)
    for name in ("max_minutes", "profile_steps", "data_service"):  # They are about one command, not about the run.
        values.pop(name, None)
    if given.get("dataset") not in (None, saved["dataset"]):  # It is evaluated on other data, which lie elsewhere.
        values |= {name: FIELDS[name].default for name in ("data_dir", "labels", "images")}
    if given.get("mode") in ANSWER_FILES and _is_on_other_data(given, saved):
        # They say which images of the run's own data have labels.
        for name in ("train_split", "eval_split", "labels", "images", *LABEL_FIELDS):
            values.pop(name, None)
    return {**values, **given}


def _is_on_other_data(given: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether the flags name other images than those of the run in its `model_dir`."""
    if given.get("dataset") not in (None, saved["dataset"]):
        return True
    data_dir = given.get("data_dir", "")
    return bool(data_dir) and os.path.realpath(data_dir) != os.path.realpath(saved.get("data_dir", ""))


def _usual_recipe(dataset: str) -> str:
    """The recipe where none is given: the paper's for the data sets that it, the release or a preset has values for."""
    name = dataset.split(":")[0].split("/")[0]
    return "paper" if name in PRESETS or name.startswith("imagenet2012") else "auto"


def _first_known(name: str, *sources: Mapping[str, Any] | None) -> Any:
    """The value of a field in the first of `sources` that has it, or else its default."""
    for source in sources:
        if source and name in source:
            return source[name]
    return FIELDS[name].default


def _values_of_networks(
    given: Mapping,
    values: Mapping,
    train_mode: str,
    start: Mapping | None,
    teacher: Mapping | None,
    of_checkpoint: bool,
) -> dict[str, Any]:
    """What a new run takes over from the checkpoint it starts from or, without one, from its teacher."""
    taken: dict[str, Any] = {}
    architecture = start or teacher
    fields = ENCODER_FIELDS + (HEAD_FIELDS if start and train_mode != "distill" else ())
    if start:
        _agree(given, start, fields, f"--checkpoint={given.get('checkpoint')}", "leave the flag out")
    if architecture:
        taken = {name: architecture[name] for name in fields}
        taken["image_size"] = _image_size(values, architecture)
    if start and train_mode == "finetune" and not from_dict(start).built_head_layers:
        taken["ft_proj_selector"] = 0
    if teacher and (values.get("recipe") == "auto" or values.get("distill_neighbors")):
        taken |= _labels_of_teacher(given, values, teacher)
    if teacher:
        taken["ft_proj_selector"] = _classifier_layer(given, from_dict(teacher), "teacher")
    if start and of_checkpoint:
        taken["ft_proj_selector"] = _classifier_layer(given, from_dict(start), "checkpoint")
    return taken


def _labels_of_teacher(given: Mapping, values: Mapping, teacher: Mapping) -> dict[str, Any]:
    """The labels that a teacher of the same data has learnt, unless the flags say which labels to use.

    Label propagation starts from them. A student that saw more labels than its teacher would be no proof of anything.

    Raises:
      UserError: where the teacher has learnt a draw of labels in another folder of images. These may be other images,
        or the same ones that have moved, and only the user knows.
    """
    fields = (*LABEL_FIELDS, "labels")
    same_names = all(teacher.get(name) == _first_known(name, values) for name in ("dataset", "train_split"))
    if not same_names or any(name in given for name in fields):
        return {}
    theirs, ours = teacher.get("data_dir", ""), values.get("data_dir", "")
    if teacher["dataset"] != "image_folder" or _is_same_folder(theirs, ours):
        return {name: teacher[name] for name in fields if name in teacher}
    drawn = [f"--{name}={teacher[name]}" for name in ("labels_per_class", "label_fraction") if teacher.get(name)]
    if drawn and _has_labels(values):
        labels = f"{drawn[0]} --label_seed={teacher.get('label_seed', FIELDS['label_seed'].default)}"
        raise UserError(
            f"--teacher={given['teacher']} has learnt a draw of the labels in {theirs}, and --data_dir={ours} is "
            f"another folder: give {labels} if its images are the same, or else say which of its labels the student "
            f"may see: --labels_per_class=0 means all"
        )
    return {}


def _has_labels(values: Mapping) -> bool:
    """Whether images of the folder to train on have labels; False where it cannot be read, which training reports."""
    with quiet_import():
        import sources
    try:
        split = _first_known("train_split", values)
        return sources.load("image_folder", split, values["data_dir"], images=values.get("images", "")).has_labels
    except UserError:
        return False


def _check_networks(config: Config, given: Mapping, start: Mapping | None, teacher: Mapping | None) -> None:
    """Refuses a config that does not go with the networks it starts from or learns from."""
    for flag, network in (("checkpoint", start), ("teacher", teacher)):
        if network and config.cifar_stem != from_dict(network).cifar_stem:
            raise UserError(
                f"--image_size={config.image_size} contradicts --{flag}={given.get(flag)}, trained at "
                f"{network['image_size']} pixels: images of at most {SMALL_IMAGE_PIXELS} pixels have "
                f"another stem: leave the flag out"
            )
    if not start or config.train_mode not in ("pretrain", "finetune") or config.mode in NETWORK_MODES:
        return
    has, needs = from_dict(start).built_head_layers, config.built_head_layers
    if needs <= has:
        return
    layers = f"{has} layers of the projection head" if has else "no projection head"
    what = f"--checkpoint={config.checkpoint} ({start['train_mode']}) has {layers}"
    if config.train_mode == "finetune":
        raise UserError(f"--ft_proj_selector={config.ft_proj_selector}: {what}: use --ft_proj_selector={has}")
    raise UserError(f"--train_mode=pretrain needs the whole projection head, and {what}: give a pretraining run")


def _image_size(values: Mapping, network: Mapping) -> int:
    """The size that `network` was trained at. A published one's is not known: the preset's, if the stem is the same."""
    preset = values.get("image_size", FIELDS["image_size"].default)
    same_stem = (preset <= SMALL_IMAGE_PIXELS) == from_dict(network).cifar_stem
    return preset if same_stem and "dataset" not in network else network["image_size"]


def _classifier_layer(given: Mapping, network: Config, flag: str) -> int:
    """The head layer the classifier of `network` stands on, which `given` may not contradict."""
    layer, said = network.classifier_layer, given.get("ft_proj_selector")
    if said not in (None, layer) and (said, layer) != (-1, network.head_layers):
        raise UserError(
            f"--ft_proj_selector={said} contradicts --{flag}={given.get(flag)}, whose classifier stands on head layer "
            f"{layer}: leave the flag out"
        )
    return layer


def _agree(given: Mapping, existing: Mapping, names: Sequence[str], where: str, advice: str) -> None:
    """Raises UserError if a flag that was given says something else than `existing` does."""
    clashes = [
        f"--{name}={given[name]} contradicts {where}, which has {name}={existing[name]}"
        for name in names
        if name in given and name in existing and given[name] != existing[name]
    ]
    if clashes:
        raise UserError("; ".join(clashes) + f": {advice}")
