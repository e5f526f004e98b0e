"""TensorFlow's reader of checkpoints, for files that may come from a stranger.

It looks at nothing but tensors: no code of a SavedModel runs, and no object is made of a description in a file.
"""

from __future__ import annotations

import math
import os
from typing import Any

import tensorflow as tf


def open_reader(prefix: str) -> Any:
    """A `tf.train.CheckpointReader` of the checkpoint `prefix`, whose tensors fit into its files.

    The index of a checkpoint says how large each tensor is, and TensorFlow takes so much memory before it reads one. So
    the tensors may not be larger, all together, than the files that hold them.

    Raises:
      tf.errors.OpError, ValueError, RuntimeError, LookupError: where there is none, or it is damaged.
    """
    reader = tf.train.load_checkpoint(prefix)
    kinds = reader.get_variable_to_dtype_map()
    promised = largest = 0
    for name, shape in reader.get_variable_to_shape_map().items():
        size = 1 if kinds[name] == tf.string else kinds[name].size  # bytes of a number; at least, of a text
        promised += size * math.prod(shape)
        # A side of 0 hides the others, which may be as large as one likes, and may be the number of classes.
        largest = max(largest, size * math.prod(max(side, 1) for side in shape))
    held = sum(tf.io.gfile.stat(file).length for file in tf.io.gfile.glob(f"{prefix}.data-*"))
    if max(promised, largest) > held:
        said = max(promised, largest)
        raise ValueError(f"its index promises tensors of {said:,} bytes, and its files hold {held:,}")
    return reader


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
