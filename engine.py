"""How TensorFlow starts: fast, quiet, and with the kernels that suit the processor."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import sys
from collections.abc import Iterator

# TensorFlow reads both of these once, while it is loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if platform.machine() in ("x86_64", "AMD64"):
    # TensorFlow itself turns oneDNN on only where a processor has VNNI instructions. On one without them, a narrow
    # ResNet-18 trained at 1.7 to 2 times the speed with it.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# Keras imports these where it can, for plots and for wrappers that nothing here uses. That takes two seconds.
UNUSED_BY_KERAS = ("matplotlib", "sklearn")


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Imports TensorFlow, and drops what its libraries write to stderr: notes on CPU features and absent GPUs."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        _import_tensorflow()
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _import_tensorflow() -> None:
    """Imports TensorFlow, which imports Keras, without `UNUSED_BY_KERAS`; these can be imported afterwards."""
    if "tensorflow" in sys.modules:
        return
    hidden = [name for name in UNUSED_BY_KERAS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # Where a module is None, its import fails.
    gc.disable()  # It would look through all of the modules again and again, and what they hold stays.
    try:
        import tensorflow  # noqa: F401
    finally:
        gc.enable()
        for name in hidden:
            del sys.modules[name]
    gc.freeze()
