"""The published checkpoints, in and out: TF1 checkpoints and TF2 SavedModels of the 2020 release.

| module | idea |
| --- | --- |
| `names` | what the release calls each weight, in TF1 checkpoints and in TF2 SavedModels |
| `inference` | from the shapes of the weights to the architecture |
| `reading` | opening a checkpoint, published or ours, as `checkpoint.Weights` |
| `writing` | writing a network as a TF1-named checkpoint |

`python -m published export` writes any checkpoint as a TF1-named one, for existing converters.

Example:
  weights = published.open_weights("PUBLISHED/finetuned_10pct/r50_1x_sk0", logits=True)
  model = tasks.restore_network(weights)
"""

from console import quiet_import

with quiet_import():  # `python -m published` imports this file first
    from published.inference import Inferred, infer
    from published.names import release_names, tf1_names
    from published.reading import PublishedWeights, differ, open_teacher, open_weights, published_layer
    from published.writing import export, flags_left_open, write

__all__ = [
    "Inferred",
    "PublishedWeights",
    "differ",
    "export",
    "flags_left_open",
    "infer",
    "open_teacher",
    "open_weights",
    "published_layer",
    "release_names",
    "tf1_names",
    "write",
]
