"""Checkpoints: the state of a run at one step, with the config of the run, in files that can be checked.

| module | idea |
| --- | --- |
| `layout` | what stands in a checkpoint under which key, and the config that it carries |
| `index` | where its tensors lie, checked before TensorFlow believes it |
| `reader` | TensorFlow's reader, for files that may come from a stranger |
| `checksums` | whether its files are as they were written |
| `choice` | which checkpoint of a folder is meant, and whether it can be taken |
| `weights` | a checkpoint, opened to read |
| `state_copy` | a copy of a run's state, to be written while training goes on |
| `of_run` | a run's own checkpoints: written, listed, kept, set aside, and restored |
| `save_rule` | after which steps a run saves |
"""

from checkpoint.choice import find, is_ours, newest_that_reads, step_of
from checkpoint.of_run import RunCheckpoints
from checkpoint.save_rule import SaveRule
from checkpoint.weights import Weights

__all__ = ["RunCheckpoints", "SaveRule", "Weights", "find", "is_ours", "newest_that_reads", "step_of"]
