"""SimCLRv2 from the command line: flags -> Config -> one call. See README.md, or --help for every flag."""

import json
import re
import sys
import time
from logging import Formatter
from typing import Any, NoReturn

from absl import app, flags, logging

import console
import recipe
import subject as subject_lib
from config import ANSWER_FILES, FIELDS, MODES, Config
from engine import quiet_import
from errors import UserError, did_you_mean, did_you_mean_path, is_out_of_memory, lost_worker, one_line, reason
from signals import AGAIN, LISTENER

HELP = {"--help", "-h", "-help", "-?", "--helpfull", "--helpshort", "--helpxml"}
# Exit statuses
FAILED = 1
MISTAKE = 2
# signals.AGAIN, 75: stopped by a signal, for want of time, or as another worker is gone. The same command goes on.

# Flags of the 2020 release that are accepted and do nothing, and what happens instead.
RELEASE_FLAGS = {
    "variable_schema": "--checkpoint takes over encoder and head, and no classifier of other classes or labels",
    "train_summary_steps": "TensorBoard scalars are written every --summary_steps",
}
# Flags that say how a plan is shown.
OUTPUT_FLAGS = {
    "json": (False, "With --mode=plan: one line of JSON."),
    "plan_timing": (True, "With --mode=plan: estimate times from a short timing on this device."),
    "fit": (False, "With --mode=plan: which combination of devices, chunks and recomputed blocks fits into memory."),
    "device_memory": ("", "With --fit: the memory of a device, such as 16G; if not given, that of the devices here."),
    "plan_replicas": (0, "With --mode=plan: how many devices share the batch; 0: as many as there are."),
}
DEFINE = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number"}


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


def check_output_flags(mode: str) -> None:
    """Refuses the flags of a plan where `mode` is another one, which would ignore them.

    Raises:
      UserError: naming each of them.
    """
    given = [f"--{name}" for name, (default, _) in OUTPUT_FLAGS.items() if flags.FLAGS[name].value != default]
    if given and mode in MODES and mode != "plan":
        raise UserError(f"{' and '.join(given)} {'goes' if len(given) == 1 else 'go'} with --mode=plan, not {mode}")
    if flags.FLAGS.device_memory and not flags.FLAGS.fit:
        raise UserError(f"--device_memory={flags.FLAGS.device_memory} is the size that --fit plans for: give --fit too")


def main(_: list[str]) -> None:
    """Does what the flags ask for. What stops it is one line on stderr, and a status of its own."""
    try:
        started = time.monotonic()
        given = given_flags()
        check_output_flags(given.get("mode", FIELDS["mode"].default))
        execute(subject_lib.decide(given, flags.FLAGS.plan_replicas), started)
    except UserError as mistake:
        stop(f"error: {mistake}", MISTAKE)
    except FloatingPointError as not_finite:
        stop(f"stopped: {not_finite}", FAILED)
    except Exception as error:
        if lost := lost_worker(error):
            stop(f"interrupted by {lost}: the same command, given to all workers, goes on", AGAIN)
        if not is_out_of_memory(error):
            raise
        advice = "lower --train_batch_size, --eval_batch_size, --image_size or --memory_size"
        stop(f"error: no memory is left: {advice}: {reason(error)[:200]}", MISTAKE)
    except KeyboardInterrupt as interruption:
        stop(f"interrupted {interruption}".rstrip(), AGAIN)


def stop(message: str, status: int) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"run.py: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def execute(subject: subject_lib.Subject, started: float) -> None:
    """Plans, trains, evaluates, exports or answers as `mode` says, and prints where the results are.

    The command began at `started`, by `time.monotonic`.
    """
    with quiet_import():
        import budget
        import evaluate
        import export
        import pilot
        import preparation
        import strategy as strategy_lib
        import train

    config, of_run = subject.config, subject.of_run
    for name, instead in RELEASE_FLAGS.items():
        if flags.FLAGS[name].present:
            logging.warning("--%s has no effect: %s", name, instead)
    if not flags.FLAGS.json:
        what = config.train_mode if of_run else f"{config.mode} of {config.checkpoint}"
        where = f"the images in {config.data_dir}" if config.dataset == "image_folder" else config.dataset
        if config.mode in ANSWER_FILES:
            network = config.model_dir if of_run else config.checkpoint
            print(f"{config.mode} by {network} on {where} into {config.output}", flush=True)
        else:
            print(f"{what} on {where} in {config.model_dir}", flush=True)
        if subject.eval_split_in_words:
            console.say(subject.eval_split_in_words)
    if config.mode == "plan":
        show_recipe(subject)
        show_plan(config)
        return
    if config.deterministic:
        strategy_lib.make_deterministic()
    if strategy_lib.waits_for_workers(config.strategy_name, config.cluster):
        console.say(
            f"waits until all workers have started, {config.worker_timeout:g} seconds at most; meanwhile only kill -9 "
            f"stops it"
        )
    strategy = strategy_lib.make_strategy(
        config.strategy_name, config.tpu_name, config.tpu_zone, config.gcp_project, config.master, config.cluster,
        config.worker_timeout,
    )  # fmt: skip
    LISTENER.install_again()
    preparation.check_same_command(config, strategy)
    if config.mode in ("train", "train_then_eval"):
        tried = pilot.variants(config, subject.facts, subject.choices) if subject.is_new else []
        if config.train_minutes and subject.is_new:
            length = budget.fit(config, strategy, started, pilot.trainings(tried))
            console.say(length.in_words)
            subject = subject.with_length(length.field, length.value, length.in_words)
            config = subject.config
            budget.warn_of_warmup(config, length.epochs)
        if tried and subject.facts and (trials := pilot.try_views(config, subject.facts, tried, strategy)):
            console.say(trials.in_words())
            subject = subject.with_choices(pilot.choices(trials, config))
            config = subject.config
        show_recipe(subject)
        step = train.train(config, strategy, subject.recipe_reasons, started)
        print(f"trained to step {step}; watch it with: tensorboard --logdir={config.model_dir}", flush=True)
    if config.mode == "train":
        return
    with strategy_lib.together(strategy):
        weights = subject.open()  # once, so that the checkpoint that is evaluated is the one that is exported
    chief = strategy_lib.is_chief(strategy)
    if config.mode in ANSWER_FILES:
        import answers

        answers.answer(config, strategy, weights)
    if config.mode in ("eval", "train_then_eval"):
        result = evaluate.evaluate(config, strategy, weights, of_run)
        numbers = {name: value for name, value in result.items() if name != "alarms"}  # They were said in training.
        print(", ".join(f"{name} {shown(value)}" for name, value in numbers.items()), flush=True)
        if chief:
            evaluate.write_result(config, result)
    if config.mode in ("export", "train_then_eval") and chief:
        print(f"SavedModel: {export.export(config, weights)}")


def show_recipe(subject: subject_lib.Subject) -> None:
    """Prints what the recipe chose for a new run, and why."""
    if subject.facts and not flags.FLAGS.json:
        console.say(recipe.table(subject.facts, subject.choices))


def shown(value: str | float) -> str:
    """A value of a result, as it is printed."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_plan(config: Config) -> None:
    """Prints what the run of `config` will take."""
    import plan
    import strategy as strategy_lib

    replicas, fit_into = flags.FLAGS.plan_replicas, None
    if flags.FLAGS.fit and flags.FLAGS.device_memory:
        fit_into = plan.fit.bytes_of(flags.FLAGS.device_memory)
    if not replicas or (flags.FLAGS.fit and not fit_into):
        here = strategy_lib.make_strategy(config.planned_strategy_name)
        replicas = replicas or here.num_replicas_in_sync
        if flags.FLAGS.fit and not fit_into:
            fit_into = None if config.strategy_name == "tpu" else strategy_lib.device_memory(here)
            if fit_into is None:
                raise UserError("--fit: the memory of these devices is not known here: give it by --device_memory")
    planned = plan.plan(config, replicas, flags.FLAGS.plan_timing, fit_into)
    print(json.dumps(planned) if flags.FLAGS.json else plan.table(planned))
    if fit_into and not flags.FLAGS.json:
        print(plan.fit.table(planned["fits"], fit_into))


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
    """Reads the command line into `flags.FLAGS`. A mistake in it is one line on stderr and status 2.

    Returns:
      The name of the program alone, since every argument is a flag.
    """
    try:
        rest = flags.FLAGS(flagfiles_first(argv))
    except flags.UnrecognizedFlagError as mistake:
        name = mistake.flagname
        meant = did_you_mean(name, flags.FLAGS, "--") or "; --help lists the flags"
        stop(f"error: --{name}: no such flag{_place(name, argv)}{meant}", MISTAKE)
    except flags.IllegalFlagValueError as mistake:
        wrong = re.match(r"flag (--(\w+)=.*?): ", str(mistake), re.DOTALL)
        kind = KINDS.get(flags.FLAGS[wrong[2]].flag_type()) if wrong else None
        if wrong and kind:
            stop(f"error: {wrong[1]}{_place(wrong[2], argv)}: must be {kind}", MISTAKE)
        stop(f"error: {reason(mistake)}", MISTAKE)
    except flags.CantOpenFlagFileError as mistake:
        wrong = re.search(r"\] (.*): ['\"](.*)['\"]$", str(mistake))
        if wrong:
            meant = did_you_mean_path(wrong[2])
            stop(f"error: --flagfile={wrong[2]} cannot be read: {wrong[1]}{meant}", MISTAKE)
        stop(f"error: --flagfile cannot be read: {reason(mistake)}", MISTAKE)
    except UnicodeDecodeError:
        stop("error: --flagfile cannot be read: it is no text in UTF-8, with a flag in each line", MISTAKE)
    except (flags.Error, ValueError) as mistake:
        stop(f"error: {reason(mistake)}", MISTAKE)
    if len(rest) > 1:
        unexpected = rest[1]
        name = unexpected.split("=")[0]
        meant = ""
        if unexpected in MODES:
            meant = f"; did you mean --mode={unexpected}?"
        elif "=" in unexpected and name in flags.FLAGS:
            meant = f"; did you mean --{unexpected}?"
        place = "" if unexpected in argv else " in the flagfile"
        stop(f"error: unexpected argument {unexpected}{place}: flags look like --name=value{meant}", MISTAKE)
    return rest


def _place(flag: str, argv: list[str]) -> str:
    """Where `flag` was given, where that is not the command line itself."""
    given = {argument.lstrip("-").split("=")[0] for argument in argv[1:]}
    return "" if {flag.lstrip("-"), f"no{flag}"} & given else " (in the flagfile)"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be no text
    LISTENER.install()
    define_flags()
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().setFormatter(Formatter("%(levelname)s: %(message)s"))
    # absl itself answers --help.
    app.run(main, flags_parser=app.parse_flags_with_usage if HELP & set(sys.argv) else parse_flags)
