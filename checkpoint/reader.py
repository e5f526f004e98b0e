"""TensorFlow's reader of checkpoints, for files that may come from a stranger.

It looks at nothing but tensors: no code of a SavedModel runs, and no object is made of a description in a file.
"""

from __future__ import annotations

import os
from typing import Any

import tensorflow as tf

from checkpoint.index import check

UNREADABLE = (tf.errors.OpError, ValueError, RuntimeError, LookupError)  # A damaged checkpoint raises one of these.


def open_reader(prefix: str) -> Any:
    """A `tf.train.CheckpointReader` of the checkpoint `prefix`, whose tensors fit into its files.

    Raises:
      one of `UNREADABLE`: where there is none, or it is damaged.
    """
    check(prefix)
    return tf.train.load_checkpoint(prefix)


def newest_listed(folder: str) -> str:
    """The prefix of the checkpoint in `folder` that TensorFlow's list there calls the newest; empty without one.

    The list may have been made in another folder, or by a stranger. So only the name of the checkpoint counts.
    """
    try:
        state = tf.train.get_checkpoint_state(folder)
    except (tf.errors.OpError, ValueError):  # The list is damaged.
        return ""
    name = os.path.basename(state.model_checkpoint_path) if state else ""
    prefix = os.path.join(folder, name)
    return prefix if name and tf.io.gfile.exists(f"{prefix}.index") else ""
