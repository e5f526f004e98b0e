"""Says whether pretraining pays: compares the three steps with supervised training and with raw pixels, on few labels.

    python tools/three_steps.py --data_dir=DIR --labels_per_class=4
    python tools/three_steps.py --data_dir=DIR --labels=FILE.csv --labels_per_class=4
    python tools/three_steps.py --dataset=cifar10 --labels_per_class=1,4,25 --train_minutes=30

DIR is a folder of images as run.py takes it, and FILE.csv a table of the labels that there are. One pretraining run
sees all images of the training split and, where there are two a class or more, the labels of the first draw: by these
the recipe chooses how much its views change colours. Then, for each number of labels and each draw of them, a network
is trained from scratch on these labels; the pretrained network is fine-tuned on them; and the fine-tuned network is
distilled with all images. Raw pixels, the untrained and the frozen pretrained network are judged with the same labels
on the same test images. At last the distilled network, or the fine-tuned one, says the class of every training image
without a label: predictions.csv.

Every step is an ordinary command, which is printed first, with a folder of its own in --output. Steps that are done
are skipped when the same command is given again, and a step that failed does not stop those that do not need it. The
results are in table.md, table.png and results.json. The exit status is 0 where every step is done, 1 where one failed,
and 75 where it was told to stop, by SIGTERM or Ctrl-C: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import comparison
import config as config_lib
import console
import subject
from comparison import Accuracy
from errors import UserError
from steps import DONE, INTERRUPTED, Execute, Outcome, Steps, execute, read_json

TRAIN_MODES = config_lib.TRAIN_MODES
PREDICTIONS = "predictions.csv"
CHECK = "check"
FROZEN = "frozen"
PREDICT = "predict"
STEP_FLAG = re.compile(rf"--({'|'.join(TRAIN_MODES)})\.(\w+)=(.*)", re.DOTALL)
# What this program says to every run, so that all of them are comparable.
OWN_FLAGS = (
    "mode",
    "train_mode",
    "model_dir",
    "dataset",
    "data_dir",
    "labels",
    "images",
    "eval_split",
    "eval_name",
    "eval_steps",
    *config_lib.LABEL_FIELDS,
    "checkpoint_choice",  # The best checkpoint of pretraining is chosen by more labels than the other steps may see.
)
# Supervised training gets the network of the pretraining run.
NETWORK_FLAGS = ("image_size", *config_lib.ENCODER_FIELDS)
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class Options(NamedTuple):
    """What the command line asks for.

    Attributes:
      dataset, data_dir, train_split, eval_split, labels, images: as the flags of run.py.
      labels_per_class: the numbers of labels a class, ascending.
      label_seeds: the draws of labels.
      train_minutes: how long to pretrain; 0: as long as run.py chooses.
      output: the folder of everything.
      more: further flags of run.py, by train_mode.
    """

    dataset: str
    data_dir: str
    train_split: str
    eval_split: str
    labels: str
    images: str
    labels_per_class: list[int]
    label_seeds: list[int]
    train_minutes: float
    output: Path
    more: dict[str, dict[str, str]]

    @property
    def draws(self) -> list[tuple[int, int]]:
        """Every (labels a class, label seed)."""
        return [(count, seed) for count in self.labels_per_class for seed in self.label_seeds]

    @property
    def data_flags(self) -> dict[str, object]:
        """The flags that say what the data are, and on what to evaluate."""
        named = {name: getattr(self, name) for name in ("data_dir", "labels", "images")}
        return {
            "dataset": self.dataset,
            **{name: value for name, value in named.items() if value},
            "train_split": self.train_split,
            "eval_split": self.eval_split,
        }


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UserError` each."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
      UserError: where an argument is unknown, or its value impossible.
    """
    parser = _Parser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further flags of run.py go to one step each: --pretrain.FLAG=VALUE, --supervised.FLAG=VALUE, "
        "--finetune.FLAG=VALUE, --distill.FLAG=VALUE.",
    )  # fmt: skip
    parser.add_argument("--dataset", default="", help="as for run.py; default: image_folder")
    parser.add_argument("--data_dir", default="", help="the image folder, or where TensorFlow Datasets keeps its data")
    parser.add_argument("--train_split", default="train", help="default: train")
    parser.add_argument(
        "--eval_split",
        default="",
        help=f"the split with the test images; default: test; of a folder of images the first of "
        f"{', '.join(subject.EVAL_SPLITS)}, or a tenth of the training split, held out of it",
    )
    parser.add_argument("--labels", default="", help="a table with the labels of an image folder, as for run.py")
    parser.add_argument("--images", default="", help="a list of the images of an image folder, as for run.py")
    parser.add_argument("--labels_per_class", default="4", help="one or several, such as 1,4,25; default: 4")
    parser.add_argument("--label_seeds", default="0,1,2", help="the draws of labels; default: 0,1,2")
    parser.add_argument("--train_minutes", type=float, default=0.0, help="minutes of pretraining; default: a recipe")
    parser.add_argument(
        "--output", default="", help="the folder of everything; default: runs/<data set or folder>_three_steps"
    )
    given, rest = parser.parse_known_args(arguments)
    dataset = given.dataset or "image_folder"
    data_dir = given.data_dir or subject.folder_of_lists(vars(given))
    if not given.dataset and not data_dir:
        raise UserError("give a folder of images by --data_dir=DIR, or a data set by --dataset=NAME")
    if dataset == "image_folder" and not data_dir:
        raise UserError("--dataset=image_folder needs --data_dir=DIR, the folder of images")
    if dataset != "image_folder" and (given.labels or given.images):
        raise UserError(f"--labels and --images go with a folder of images, not with --dataset={dataset}")
    if not 0 <= given.train_minutes < math.inf:  # NaN is neither.
        raise UserError(f"--train_minutes={given.train_minutes}: must be more than 0")
    data = subject.name_of_data({"dataset": dataset, "data_dir": data_dir})
    options = Options(
        dataset=dataset,
        data_dir=data_dir,
        train_split=given.train_split,
        eval_split=given.eval_split or "test",
        labels=given.labels,
        images=given.images,
        labels_per_class=_numbers("labels_per_class", given.labels_per_class, least=1),
        label_seeds=_numbers("label_seeds", given.label_seeds, least=0),
        train_minutes=given.train_minutes,
        output=Path(given.output or f"runs/{data}_three_steps"),
        more=_flags_of_steps(rest),
    )
    if options.dataset == "image_folder" and not given.eval_split:
        split = subject.find_eval_split(options.data_dir, options.labels)
        return options._replace(eval_split=split or config_lib.AUTO_SPLIT)
    return options


def _numbers(flag: str, text: str, least: int) -> list[int]:
    """Different whole numbers from a text such as `1,4,25`, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"--{flag}={text}: must be whole numbers of at least {least}, such as {least},{least + 3}")
    return sorted({int(part) for part in parts})


def _flags_of_steps(arguments: Sequence[str]) -> dict[str, dict[str, str]]:
    """The flags of run.py for each train_mode, from arguments such as `--pretrain.train_epochs=20`.

    Raises:
      UserError: on another argument, a flag that run.py has not, one that this program gives itself, or a wrong value.
    """
    more: dict[str, dict[str, str]] = {train_mode: {} for train_mode in TRAIN_MODES}
    for argument in arguments:
        match = STEP_FLAG.fullmatch(argument)
        if not match:
            raise UserError(f"unknown argument {argument}: flags of a step look like --pretrain.train_epochs=20")
        train_mode, name, text = match.groups()
        if name not in config_lib.FIELDS:
            raise UserError(f"--{train_mode}.{name}: run.py has no flag --{name}")
        if name in _own_flags(train_mode):
            raise UserError(f"--{train_mode}.{name}: this program chooses --{name} itself: leave the flag out")
        more[train_mode][name] = text
    for train_mode, flags in more.items():
        typed = {name: _typed(f"{train_mode}.{name}", name, text) for name, text in flags.items()}
        config_lib.check_flags(typed)
        if train_mode == "distill" and "train_split" in flags and typed.get("distill_alpha", 1.0) < 1:
            raise UserError("--distill.train_split: other images have other labels: leave --distill.distill_alpha out")
    return more


def _own_flags(train_mode: str) -> tuple[str, ...]:
    """The flags of a run that this program chooses itself."""
    if train_mode == "pretrain":
        return (*OWN_FLAGS, "train_minutes", "teacher", "view_pilot")
    if train_mode == "distill":
        return (*OWN_FLAGS, "checkpoint", "teacher")
    return (*OWN_FLAGS, "train_split", "checkpoint", "teacher")


def _typed(flag: str, name: str, text: str) -> Any:
    """The value of a field of `Config` from a text."""
    kind: Any = type(config_lib.FIELDS[name].default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        raise UserError(f"--{flag}={text}: must be {KINDS[kind]}") from error


class Classifier(NamedTuple):
    """A network that was trained on a draw of labels: where these are few, the last is the best.

    Attributes:
      labels_per_class, label_seed: the draw.
      run: the step that trained it.
    """

    labels_per_class: int
    label_seed: int
    run: Outcome


class Chain:
    """The steps of the comparison, in their order, each with its command.

    Args:
      options: what to compare, on what.
      execute: runs a command and returns its exit status.
    """

    def __init__(self, options: Options, execute: Execute = execute) -> None:
        planned = {CHECK: 1, FROZEN: 1, "pretrain": 1, PREDICT: 1}
        planned |= dict.fromkeys(("supervised", "finetune", "distill"), len(options.draws))
        self._options = options
        self._steps = Steps(options.output, planned, execute)
        self._classifiers: list[Classifier] = []
        self.accuracies: list[Accuracy] = []

    @property
    def outcomes(self) -> list[Outcome]:
        """What came of each step so far."""
        return self._steps.outcomes

    def check(self) -> Outcome:
        """Draws the labels and opens both splits, before anything takes long."""
        return self._judge(CHECK, [])

    def pretrain(self) -> Outcome:
        """Pretrains, once, without a classifier beside it. Of the labels it sees the first draw alone.

        Two labels a class or more let the recipe try which views suit the images. One label cannot, and then all
        labels may be there: they only tell how it goes.
        """
        flags: dict[str, object] = {"lineareval_while_pretraining": False}
        labels_per_class, label_seed = self._options.draws[0]
        if labels_per_class > 1:
            flags |= {"labels_per_class": labels_per_class, "label_seed": label_seed}
        else:
            flags["view_pilot"] = False
        if self._options.train_minutes:
            flags["train_minutes"] = self._options.train_minutes
        return self._train("pretrain", "pretrain", flags, [], mode="train")

    def frozen(self, pretrained: Outcome) -> None:
        """Judges raw pixels, the untrained and the frozen pretrained network, for all draws of labels at once."""
        outcome = self._judge(FROZEN, [pretrained])
        for found in outcome.result.get("accuracies", []):
            self.accuracies.append(Accuracy(**found))

    def few_labels(self, pretrained: Outcome, labels_per_class: int, label_seed: int) -> None:
        """Trains from scratch, fine-tunes and distils, with one draw of labels."""
        folder = f"labels_{labels_per_class}/seed_{label_seed}"
        labels: dict[str, object] = {"labels_per_class": labels_per_class, "label_seed": label_seed}
        start: dict[str, object] = {"checkpoint": pretrained.folder}
        supervised = self._train("supervised", f"{folder}/supervised", {**network_of(pretrained), **labels}, [])
        finetuned = self._train("finetune", f"{folder}/finetune", {**start, **labels}, [pretrained])
        teacher = {**start, "teacher": finetuned.folder}
        if "train_split" in self._options.more["distill"]:
            # The labels are drawn from another split, and the student may see no others.
            labels = {"distill_alpha": 1.0}
        distilled = self._train("distill", f"{folder}/distill", {**teacher, **labels}, [pretrained, finetuned])
        for outcome in (supervised, finetuned, distilled):
            top_1 = outcome.result.get("top_1")
            self.accuracies.append(Accuracy(outcome.kind, labels_per_class, label_seed, top_1))
        best = distilled if distilled.status == DONE else finetuned
        self._classifiers.append(Classifier(labels_per_class, label_seed, best))

    def predict(self, train_images: int, classes: int) -> Outcome | None:
        """Writes predictions.csv: the classes of the training images that have no label, by the best classifier.

        It is a distilled one where there is one, with as many labels as possible, from the first of their draws. Which
        of them did best on the test images does not matter.

        Args:
          train_images, classes: how many there are.

        Returns:
          What came of it; None where every training image has a label.
        """

        def quality(one: Classifier) -> tuple[bool, bool, int, int]:
            return one.run.status == DONE, one.run.kind == "distill", one.labels_per_class, -one.label_seed

        best = max(self._classifiers, key=quality)
        if best.labels_per_class * classes >= train_images:
            return None
        flags = {
            "mode": "predict",
            "model_dir": best.run.folder,
            **self._options.data_flags,
            "labels_per_class": best.labels_per_class,
            "label_seed": best.label_seed,
            "unlabelled_only": True,
        }
        return self._steps.run(PREDICT, PREDICT, "run.py", flags, [best.run], folder_flag="output", file=PREDICTIONS)

    def _train(
        self,
        train_mode: str,
        name: str,
        flags: Mapping[str, object],
        needs: Sequence[Outcome],
        mode: str = "train_then_eval",
    ) -> Outcome:
        """Runs run.py. What the command line says of this train_mode beats `flags`."""
        chosen = {"mode": mode, "train_mode": train_mode, **self._options.data_flags, **flags}
        return self._steps.run(train_mode, name, "run.py", {**chosen, **self._options.more[train_mode]}, needs)

    def _judge(self, name: str, needs: Sequence[Outcome]) -> Outcome:
        """Runs tools/frozen.py, with the network of the step that is needed, if there is one."""
        flags: dict[str, object] = {
            **self._options.data_flags,
            "labels_per_class": ",".join(map(str, self._options.labels_per_class)),
            "label_seeds": ",".join(map(str, self._options.label_seeds)),
        }
        if needs:
            flags["pretrained"] = needs[0].folder
        return self._steps.run(name, name, "tools/frozen.py", flags, needs, folder_flag="output")


def network_of(run: Outcome) -> dict[str, Any]:
    """The image size and the encoder of a run, as flags; none where the run did not get as far as its config.json."""
    saved = read_json(run.folder / "config.json")
    return {name: saved[name] for name in NETWORK_FLAGS if name in saved}


def compare(options: Options, command: Sequence[str], execute: Execute = execute) -> int:
    """Runs the whole comparison, prints its table and writes the results. Returns the exit status.

    Args:
      options: what to compare, on what.
      command: this command line, for the record.
      execute: runs the command of a step and returns its exit status.
    """
    console.say(f"all of it is judged on the images of --eval_split={options.eval_split}")
    chain = Chain(options, execute)
    check = chain.check()
    if check.status != DONE:  # Its command has said what is wrong with the data. No other step can do better.
        return 2
    pretrained = chain.pretrain()
    chain.frozen(pretrained)
    for labels_per_class, label_seed in options.draws:
        chain.few_labels(pretrained, labels_per_class, label_seed)
    predicted = chain.predict(check.result["train_images"], len(check.result["classes"]))
    if predicted and predicted.status == DONE:
        shutil.copyfile(predicted.folder / PREDICTIONS, options.output / PREDICTIONS)
        console.say(f"{options.output / PREDICTIONS}: the classes of the training images without a label")
    report(options, command, chain, check, pretrained)
    failed = [outcome.name for outcome in chain.outcomes if outcome.status != DONE]
    if failed:
        console.say(f"not done: {', '.join(failed)}; the same command tries these again")
    return 1 if failed else 0


def report(options: Options, command: Sequence[str], chain: Chain, check: Outcome, pretrained: Outcome) -> None:
    """Prints the table, and writes table.md, table.png and results.json."""
    data = options.dataset if options.dataset != "image_folder" else Path(options.data_dir).resolve().name
    images, classes = check.result["test_images"], len(check.result["classes"])
    title = f"{data}: {images:,} test images of {classes} classes"
    commit = read_json(pretrained.folder / "config.json").get("git_commit")
    alarms = [alarm["text"] for alarm in read_json(pretrained.folder / "probe.json").get("alarms", [])]
    command_line = shlex.join(["python", "tools/three_steps.py", *command])
    text = "\n".join(
        [
            f"# {title}",
            "",
            comparison.markdown(chain.accuracies, images),
            *(f"- Said while pretraining: {alarm}" for alarm in alarms),
            *([""] if alarms else []),
            f"Seconds: {seconds_in_words(chain.outcomes)}.",
            f"`{command_line}`" + (f", at commit {commit}" if commit else ""),
            "",
        ]
    )
    results = {
        "command": command_line,
        "git_commit": commit,
        **options.data_flags,
        "train_images": check.result["train_images"],
        "test_images": images,
        "classes": check.result["classes"],
        "labels_per_class": options.labels_per_class,
        "label_seeds": options.label_seeds,
        **comparison.as_json(chain.accuracies, images),
        "alarms": alarms,
        "seconds": sum(outcome.seconds for outcome in chain.outcomes),
        "steps": [{**outcome._asdict(), "folder": str(outcome.folder)} for outcome in chain.outcomes],
    }
    (options.output / "table.md").write_text(text, encoding="utf-8")
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    comparison.plot(chain.accuracies, options.output / "table.png", title)
    console.say(f"\n{text}\nIn {options.output}: table.md, table.png, results.json, and the runs.")


def seconds_in_words(outcomes: Sequence[Outcome]) -> str:
    """How long the steps took. Example: "pretrain 226, supervised 14 (mean of 3), 463 in all"."""
    by_kind: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.status == DONE:
            by_kind.setdefault(outcome.kind, []).append(outcome.seconds)
    parts = []
    for kind, seconds in by_kind.items():
        of_several = f" (mean of {len(seconds)})" if len(seconds) > 1 else ""
        parts.append(f"{kind} {statistics.fmean(seconds):.0f}{of_several}")
    return ", ".join([*parts, f"{sum(outcome.seconds for outcome in outcomes):.0f} in all"])


def main(command: Sequence[str]) -> int:
    """Does what the command line asks for. Returns the exit status."""
    try:
        return compare(parse(command), command)
    except UserError as mistake:
        print(f"three_steps.py: error: {mistake}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"three_steps.py: error: {where}{error.strerror}: make room, or choose another --output", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("three_steps.py: interrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the step under way ends in order
    sys.exit(main(sys.argv[1:]))
