"""Which values of two checkpoints differ in any bit: `python benchmarks/bits.py RUN OTHER_RUN`.

Takes the folders of two runs, of which it compares the newest checkpoints, or the prefixes of two checkpoints.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import run_folder

COUNTS_SAVES = "save_counter"  # TensorFlow's count of the saves, which says nothing about the run


def different(one: str, other: str) -> dict[str, float]:
    """How far the values of two checkpoints are apart, by their key; empty where every bit is the same.

    Whether a value is -0.0 or 0.0 counts too, as a distance of 0. Texts, such as the config, are not compared.

    Args:
      one, other: the folders of two runs, or the prefixes of two checkpoints.

    Raises:
      ValueError: where a checkpoint lacks a value of the other one, or a value has another shape or dtype there.
    """
    values, others = _values(one), _values(other)
    if set(values) != set(others):
        raise ValueError(f"only one of the checkpoints has {', '.join(sorted(set(values) ^ set(others)))}")
    distances = {}
    for key, value in values.items():
        if (value.shape, value.dtype) != (others[key].shape, others[key].dtype):
            raise ValueError(f"{key} is {value.dtype}{value.shape} in one, {others[key].dtype}{others[key].shape}")
        if value.tobytes() != others[key].tobytes():
            distances[key] = float(np.abs(value.astype(np.float64) - others[key].astype(np.float64)).max())
    return distances


def _values(path: str) -> dict[str, np.ndarray]:
    """Every number or array of numbers in a checkpoint, by its key."""
    in_folder = run_folder.checkpoints(path)
    reader = tf.train.load_checkpoint(in_folder[0] if in_folder else path)
    dtypes = reader.get_variable_to_dtype_map()
    numbers = [key for key, dtype in dtypes.items() if dtype != tf.string and not key.startswith(COUNTS_SAVES)]
    return {key: np.asarray(reader.get_tensor(key)) for key in numbers}


def main() -> None:
    """Prints the values that differ. The exit status is 0 where there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one")
    parser.add_argument("other")
    arguments = parser.parse_args()
    distances = different(arguments.one, arguments.other)
    for key, distance in sorted(distances.items()):
        print(f"{key}: {distance:.3g}")
    print(f"{len(distances)} values differ" if distances else "every bit is the same")
    sys.exit(1 if distances else 0)


if __name__ == "__main__":
    main()
