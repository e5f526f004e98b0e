"""The handwritten digits in scikit-learn: a data set that needs no download."""

from __future__ import annotations

import numpy as np

from sources.base import MemorySource, hash_order, split_ranges

# The other 360 of the 1,797 are the test split.
TRAIN_EXAMPLES = 1437


def load(split: str) -> MemorySource:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels: `train` (1,437) and `test` (360).

    Raises:
      UserError: where `split` is neither of them nor a part of them.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.repeat((bunch.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)  # [1797, 8, 8, 3]
    labels = bunch.target.astype(np.int32)
    names = [f"digits/{i}" for i in range(len(images))]
    classes = [str(name) for name in bunch.target_names]
    order = hash_order(names, 0)
    splits = {"train": order[:TRAIN_EXAMPLES], "test": order[TRAIN_EXAMPLES:]}
    ranges = split_ranges(split, {name: len(indices) for name, indices in splits.items()})
    chosen = np.concatenate([splits[name][begin:end] for name, begin, end in ranges])
    return MemorySource(images, labels, names, classes, lambda image: image).take(chosen)
