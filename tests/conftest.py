"""What every test shares: four logical CPUs, strategies over some of them, the reference numbers, a published file."""

import functools
import gc
import os
import sys
import tempfile
from pathlib import Path

# What a start keeps for the next one is not to be found by tests that come later.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: F401  # It sets the environment that TensorFlow starts in.

# isort: split
import pytest
import tensorflow as tf

import architecture

ROOT = Path(__file__).resolve().parent.parent
WHOLE, ONE = architecture.BLOCKS[10], (architecture.BASIC, (1,))

# Before TensorFlow starts. The numbers that tests compare are those of float32 on a CPU, on every machine.
tf.config.set_visible_devices([], "GPU")
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration() for _ in range(4)]
)
# Rewriting a graph of several replicas takes longer than a test runs it.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
# Tracing makes so many objects that stay that looking for garbage among them as often as usual is a tenth of its time.
gc.set_threshold(500_000, 10, 5)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than the default run should")


@pytest.fixture(scope="module", autouse=True)
def networks_of_the_module(request):
    """A module that says ONE_STAGE has a ResNet-10 with one group of blocks instead of four.

    It is traced in half the time. That is for modules about what happens to a run, whatever its network. Other
    processes know nothing of it.
    """
    with pytest.MonkeyPatch.context() as patched:
        if getattr(request.module, "ONE_STAGE", False):
            patched.setitem(architecture.BLOCKS, 10, ONE)
        yield


@pytest.fixture
def one_stage(monkeypatch):
    """One group of blocks, for a test in a module that does not say ONE_STAGE."""
    monkeypatch.setitem(architecture.BLOCKS, 10, ONE)


@pytest.fixture
def whole_network(monkeypatch):
    """All four groups of blocks, for a test in a module that says ONE_STAGE."""
    monkeypatch.setitem(architecture.BLOCKS, 10, WHOLE)


@pytest.fixture
def nothing_exported(monkeypatch):
    """--mode=train_then_eval leaves out its export, for a test of something else; tests/test_run.py has the whole."""
    import export

    monkeypatch.setattr(export, "export", lambda config, weights: "none")


@functools.cache
def _mirrored(replicas):
    if replicas == 1:
        return tf.distribute.get_strategy()
    # Two strategies of one process share their collectives' keys, and fail where they differ in size.
    own_keys = type("Mirrored", (tf.distribute.MirroredStrategy,), {"_collective_key_base": 1000 * replicas})
    return own_keys([f"CPU:{i}" for i in range(replicas)])


@pytest.fixture(scope="session")
def mirrored():
    """`mirrored(n)`: a MirroredStrategy over n logical CPUs, or for 1 the default strategy."""
    return _mirrored


@pytest.fixture(scope="session")
def golden():
    """The folder of reference numbers: $SIMCLR_GOLDEN, or ../shared/golden beside the repository."""
    folder = Path(os.environ.get("SIMCLR_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no reference numbers in {folder}: set SIMCLR_GOLDEN to their folder")
    return folder


@pytest.fixture(scope="session")
def fine_tuned(tmp_path_factory):
    """A ResNet-10 with a whole head whose classifier stands on its first layer, in a folder that does not tell."""
    from release_files import written

    folder = tmp_path_factory.mktemp("some") / "model"
    return written(folder, classes=10, resnet_depth=10, image_size=32, ft_proj_selector=1)


@pytest.fixture(autouse=True)
def global_seed():
    """Each test starts from one global seed; not from 0, with which TensorFlow shuffles by no tensor."""
    tf.random.set_seed(1)
