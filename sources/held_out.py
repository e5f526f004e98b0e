"""Which images of a set are held out to evaluate on, where no split was made for that.

The side of an image depends on its own name: a folder that grows keeps its split, and every machine has the same. Only
where all labelled images of a class would be on one side, one of them changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

SHARE = 0.1


def held_out(names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Whether each image is held out, [n] bool: about a tenth of them.

    A class with two labelled images or more has at least one on each side: the first or the last one in the order of
    the images' random numbers changes sides where that is needed. So have two images or more without any label.

    Args:
      names: of the images.
      labels: [n] int, -1 where unlabelled.
    """
    draws = np.array([_draw(name) for name in names])  # [n]
    chosen = draws < SHARE
    counts = np.bincount(labels[labels >= 0])
    chosen_counts = np.bincount(labels[(labels >= 0) & chosen], minlength=len(counts))
    one_sided = (counts > 1) & ((chosen_counts == 0) | (chosen_counts == counts))
    groups = [np.flatnonzero(labels == label) for label in np.flatnonzero(one_sided)]
    if len(names) > 1 and chosen.all() == chosen.any() and not groups:
        groups = [np.arange(len(names))]  # as where all images are of one class
    for members in groups:
        if chosen[members[0]]:
            chosen[members[np.argmax(draws[members])]] = False
        else:
            chosen[members[np.argmin(draws[members])]] = True
    return chosen


def _draw(name: str) -> float:
    """The random number of an image, from 0 to 1."""
    digest = hashlib.sha256(f"held out:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
