"""Whose network a command means: that of the run in `--model_dir`, or that of `--checkpoint` itself.

Training is always of the run in `model_dir`, a new one or the one that lives there. An evaluation or an export is of
that run too. Only where no run lives there, and `--checkpoint` names a network, it is of that network itself.
`decide` answers this once; everything after it asks the `Subject`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import config as config_lib
import run_folder
from config import Config
from console import quiet_import
from errors import UserError

if TYPE_CHECKING:
    import checkpoint


class Subject(NamedTuple):
    """What a command is about.

    Attributes:
      config: every hyper-parameter of the command.
      of_run: whether it is about the run in `config.model_dir`; otherwise it is about `config.checkpoint` itself.
    """

    config: Config
    of_run: bool

    def open(self) -> checkpoint.Weights:
        """Opens the network to evaluate or export: the run's newest checkpoint that can be read, or the checkpoint.

        Call it once for a command, since a run that is still training may write a newer one meanwhile.

        Raises:
          UserError: where there is no checkpoint, or it does not tell enough.
        """
        import checkpoint
        import published

        if self.of_run:
            return checkpoint.Weights(self.config.model_dir, "model_dir")
        return published.open_weights(
            self.config.checkpoint, "checkpoint", self.config.to_dict(), self.config.ft_proj_selector, logits=True
        )


def decide(given: Mapping[str, Any]) -> Subject:
    """The subject of a command, from the flags that were given, the run in `model_dir`, the checkpoint and the teacher.

    What can be refused without TensorFlow is refused before it is imported, which takes seconds.

    Args:
      given: the values set by the user, by field name.

    Raises:
      UserError: on values that are impossible or contradict each other or what is there.
    """
    config_lib.check_flags(given)
    mode = given.get("mode", config_lib.FIELDS["mode"].default)
    evaluates = mode in ("eval", "export")
    # `--train_mode=finetune --checkpoint=...` means the run that was fine-tuned from the checkpoint.
    names_checkpoint = bool(given.get("checkpoint")) and given.get("train_mode", "pretrain") == "pretrain"
    may_be_checkpoint = evaluates and names_checkpoint
    model_dir = config_lib.default_model_dir(given, of_checkpoint=may_be_checkpoint)
    saved = run_folder.read_config(model_dir) if mode != "plan" else None
    of_run = not evaluates or saved is not None
    if evaluates and saved and given.get("checkpoint") not in (None, saved["checkpoint"]):
        raise UserError(f"--checkpoint: a run lives in --model_dir={model_dir}: leave one of the flags out")
    if not of_run and not may_be_checkpoint:
        raise UserError(
            f"--mode={mode}: no run in --model_dir={model_dir}: train one first, or give --checkpoint alone"
        )
    config_lib.check_combination(config_lib.known_values(given, saved))
    start = teacher = None
    if not saved:
        start = _config_of("checkpoint", given, mode)
        teacher = _config_of("teacher", given, mode)
    config = config_lib.resolve(given, saved, start, teacher, of_checkpoint=not of_run)
    return Subject(config, of_run)


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
        raise UserError(f"--{flag}={path}: no such folder or checkpoint")
    with quiet_import():
        import published

    of_teacher = flag == "teacher"
    architecture = {} if of_teacher else given
    asks_classifier = of_teacher or mode in ("eval", "export")
    layer = given.get("ft_proj_selector")
    return published.open_weights(path, flag, architecture, layer, logits=asks_classifier).config
