"""The page docs/reliability.md: the tests that it names exist, and its job script runs, where stand-ins play SLURM."""

import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT

TESTS = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
PAGE = (ROOT / "docs" / "reliability.md").read_text()
# Until it is told to stop it trains; it takes a while to save.
TRAINS = """#!/bin/bash
trap 'sleep 0.3; exit 75' TERM
echo "$@" > started
{then}
"""


@pytest.mark.parametrize(("then", "status"), [("while :; do sleep 0.05; done", 75), ("exit 75", 75), ("exit 0", 0)])
def test_the_slurm_script_gives_the_command_again_while_the_status_is_75(tmp_path, then, status):
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", PAGE, re.DOTALL)
    for name, text in (
        ("job.sh", script),
        ("python", TRAINS.format(then=then)),
        ("scontrol", '#!/bin/bash\necho "$@" > requeued\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)
    if then.startswith("while"):
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == status
    assert (tmp_path / "started").read_text().startswith("run.py --mode=train_then_eval")
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 42\n" if status == 75 else "")


def test_every_test_that_a_promise_names_exists():
    files = set(re.findall(r"tests/(test_\w+\.py)", PAGE))
    assert len(files) > 10 and files <= set(TESTS)
    named = re.findall(r"(?:tests/(test_\w+\.py)::)?\b(test_\w+)\b(?!\.py)", PAGE)
    assert len(named) > 10
    for file, name in named:
        assert any(f"\ndef {name}(" in text for path, text in TESTS.items() if file in ("", path)), name
