"""SimCLRv2 from the command line: flags -> Config -> one call. See README.md, or --help for every flag."""

import json
import sys
from typing import Any

from absl import app, flags, logging

from config import FIELDS, Config, asks_checkpoint, default_model_dir, resolve
from console import quiet_import
from errors import UserError

HELP = {"--help", "-h", "-help", "-?", "--helpfull", "--helpshort", "--helpxml"}

RELEASE_FLAGS = {  # accepted for the release's commands, and what happens instead
    "variable_schema": "--checkpoint takes over encoder and head, and no classifier of other classes or labels",
    "train_summary_steps": "TensorBoard scalars are written every --summary_steps",
}
OUTPUT_FLAGS = {  # how the plan is shown
    "json": (False, "With --mode=plan: one line of JSON."),
    "plan_timing": (True, "With --mode=plan: estimate times from a short timing on this device."),
    "plan_replicas": (0, "With --mode=plan: how many devices share the batch; 0: as many as there are."),
}
DEFINE = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def define_flags() -> None:
    """One flag for each field of `Config`, and the release's that have no field."""
    for field in FIELDS.values():
        help_text = field.metadata["help"]
        choices = field.metadata["choices"]
        if choices:
            help_text += f" One of: {', '.join(map(str, choices))}."
        DEFINE[type(field.default)](field.name, field.default, help_text)
    for name, instead in RELEASE_FLAGS.items():
        flags.DEFINE_string(name, None, f"Ignored, from the 2020 release: {instead}.")
    for name, (default, help_text) in OUTPUT_FLAGS.items():
        DEFINE[type(default)](name, default, help_text)


def given_flags() -> dict[str, Any]:
    """The fields of `Config` that the command line sets."""
    return {name: flags.FLAGS[name].value for name in FIELDS if flags.FLAGS[name].present}


def make_config() -> Config:
    """The config of this run: the flags, the run already in model_dir, the checkpoint's and the dataset's presets."""
    with quiet_import():
        import checkpoint
        import published

    given = given_flags()
    mode, model_dir = given.get("mode"), default_model_dir(given)
    saved = checkpoint.read_config(model_dir) if mode != "plan" else None
    if mode in ("eval", "export"):
        if saved and given.get("checkpoint") not in (None, saved["checkpoint"]):
            raise UserError(f"--checkpoint: a run lives in --model_dir={model_dir}: leave one of the flags out")
        if not saved and not asks_checkpoint(given):
            raise UserError(
                f"--mode={mode}: no run in --model_dir={model_dir}: train one first, or give --checkpoint alone"
            )
    opened = {}
    for flag in ("checkpoint", "teacher"):
        path = given.get(flag)
        later = mode == "plan" and path and not checkpoint.exists(path)  # what an earlier step is going to make
        if path and not saved and not later:
            logits = flag == "teacher" or mode in ("eval", "export")
            known = {name: value for name, value in given.items() if flag == "checkpoint" or name == "ft_proj_selector"}
            opened[flag] = published.open_weights(path, flag, known, logits).config
    return resolve(given, saved, opened.get("checkpoint"), opened.get("teacher"))


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; a user's mistake is one line on stderr and status 2."""
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]}: flags look like --name=value")
        execute(make_config())
    except UserError as mistake:
        print(f"run.py: error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as stop:
        print(f"run.py: stopped: {stop}", file=sys.stderr)
        sys.exit(1)


def execute(config: Config) -> None:
    """Trains, evaluates and exports as `config.mode` says, and prints where the results are."""
    with quiet_import():
        import checkpoint
        import evaluate
        import export
        import plan
        import published
        import strategy as strategy_lib
        import train

    for name, instead in RELEASE_FLAGS.items():
        if flags.FLAGS[name].present:
            logging.warning("--%s has no effect: %s", name, instead)
    of_run = checkpoint.is_of_run(config)
    if not flags.FLAGS.json:
        subject = config.train_mode if of_run else f"{config.mode} of {config.checkpoint}"
        print(f"{subject} on {config.dataset} in {config.model_dir}")
    # A plan does not wait for a cluster: it is made for one replica of it.
    elsewhere = config.mode == "plan" and config.strategy_name in ("tpu", "multi_worker")
    name = "one_device" if elsewhere else config.strategy_name
    strategy = strategy_lib.make_strategy(name, config.tpu_name, config.tpu_zone, config.gcp_project, config.master)
    if config.mode == "plan":
        replicas = flags.FLAGS.plan_replicas or strategy.num_replicas_in_sync
        planned = plan.plan(config, replicas, flags.FLAGS.plan_timing)
        print(json.dumps(planned) if flags.FLAGS.json else plan.table(planned))
        return
    if config.mode in ("train", "train_then_eval"):
        step = train.train(config, strategy)
        print(f"trained to step {step}; watch it with: tensorboard --logdir={config.model_dir}")
    if config.mode not in ("eval", "export", "train_then_eval"):
        return
    # Opened once: a run that is still training would have one checkpoint evaluated and the next one exported.
    weights = published.open_subject(config)
    chief = strategy_lib.is_chief(strategy)
    if config.mode in ("eval", "train_then_eval"):
        result = evaluate.evaluate(config, strategy, weights, of_run)
        print(", ".join(f"{name} {shown(value)}" for name, value in result.items()))
        if chief:
            evaluate.write_result(config, result)
    if config.mode in ("export", "train_then_eval") and chief:
        print(f"SavedModel: {export.export(config, weights)}")


def shown(value: str | float) -> str:
    """A value of a result, as it is printed."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flagfiles_first(argv: list[str]) -> list[str]:
    """The command line with its flagfiles before everything else, so that a flag given beside a file beats the file."""
    files, rest = [], argv[1:]
    for name in ("--flagfile", "-flagfile"):
        while name in rest[:-1]:  # --flagfile FILE
            at = rest.index(name)
            files.append(f"--flagfile={rest[at + 1]}")
            del rest[at : at + 2]
    files += [argument for argument in rest if argument.startswith(("--flagfile=", "-flagfile="))]
    return [argv[0], *files, *(argument for argument in rest if argument not in files)]


def parse_flags(argv: list[str]) -> list[str]:
    """The arguments that are no flags; a wrong flag is one line on stderr and status 2."""
    try:
        return flags.FLAGS(flagfiles_first(argv))
    except flags.Error as mistake:
        print(f"run.py: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=lambda argv: app.parse_flags_with_usage(argv) if HELP & set(argv) else parse_flags(argv))
