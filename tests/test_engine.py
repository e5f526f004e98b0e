"""The environment that TensorFlow starts in."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT


def environment_after(**given):
    """What a fresh process has in TF_ENABLE_ONEDNN_OPTS once it has imported the engine."""
    before = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    command = "import os, engine; print(os.environ.get('TF_ENABLE_ONEDNN_OPTS'))"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env={**before, **given}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is about x86 processors here")
def test_onednn_is_on_where_tensorflow_alone_would_leave_it_off():
    assert environment_after() == "1"


def test_what_the_user_says_about_onednn_counts():
    assert environment_after(TF_ENABLE_ONEDNN_OPTS="0") == "0"
