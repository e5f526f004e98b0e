"""The published checkpoints of the 2020 release: reads TF1 checkpoints and TF2 SavedModels, writes TF1 checkpoints.

| module | idea |
| --- | --- |
| `names` | what the release calls each weight, in TF1 checkpoints and in TF2 SavedModels |
| `inference` | infers the architecture from the shapes of the weights |
| `reading` | opens a checkpoint, published or ours, as `checkpoint.Weights` |
| `writing` | writes a network as a TF1-named checkpoint |

`python -m published export` writes any checkpoint as a TF1-named one, which existing converters read.

Example:
  weights = published.open_weights("PUBLISHED/finetuned_10pct/r50_1x_sk0", logits=True)
  model = tasks.restore_network(weights)
"""

from engine import quiet_import

with quiet_import():  # `python -m published` imports this file first
    from published.names import release_names
    from published.reading import open_teacher, open_weights
    from published.writing import export, flags_left_open

__all__ = [
    "export",
    "flags_left_open",
    "open_teacher",
    "open_weights",
    "release_names",
]
