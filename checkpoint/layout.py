"""What stands in a checkpoint under which key, and the config that each carries, so that it needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

WEIGHTS = "weights"  # The model stands under this key in a checkpoint.
VALUE = ".ATTRIBUTES/VARIABLE_VALUE"  # The key of a variable ends with this.
CONFIG_KEY = "config/.ATTRIBUTES/py_state"
PROGRESS = "progress"  # In the config, what else a run remembers.


class SavedConfig(tf.train.experimental.PythonState):
    """A run's config inside its checkpoints, so that a checkpoint needs nothing beside it.

    Attributes:
      config: what `run_folder.describe` returned.
      progress: what else the run remembers of its way to the checkpoint's step, by name, as JSON can say it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.progress: dict[str, Any] = {}

    def serialize(self) -> str:
        return json.dumps({**self.config, PROGRESS: self.progress} if self.progress else self.config)

    def deserialize(self, content: str) -> None:
        """Takes the progress. The running command's config holds: flags such as --train_steps may have changed."""
        self.progress = json.loads(content).get(PROGRESS, {})
