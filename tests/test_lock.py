"""The lock files hold what requirements*.txt allow: each package at one version, with hashes, from no host by name."""

import re

import pytest
from conftest import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKED = re.compile(
    r"^(?P<requirement>[^\s#].*?) \\\n(?P<hashes>(?:    --hash=sha256:[0-9a-f]{64}(?: \\\n|\n))+)", re.M
)


def wanted(name):
    """The requirements in a requirements file, those of the files that it names included."""
    found = []
    for line in (ROOT / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found += wanted(line.removeprefix("-r "))
        elif line:
            found.append(Requirement(line))
    return found


def locked(name):
    """The versions of each package in a lock file, with the markers that say for which Python and system."""
    found = {}
    for match in LOCKED.finditer((ROOT / name).read_text()):
        requirement = Requirement(match["requirement"])
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def version(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_a_lock_file_has_what_is_wanted_and_hashes_alone(name):
    found = locked(f"{name}.lock")
    for requirement in wanted(f"{name}.txt"):
        candidates = found[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version(candidate)) for candidate in candidates), requirement
    rest = LOCKED.sub("", (ROOT / f"{name}.lock").read_text())
    assert all(line.startswith("#") for line in rest.splitlines()), "a line without a hash, or an address"


def test_the_tests_run_with_the_versions_of_the_program():
    program, tests = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {name: list(map(str, tests[name])) for name in program} == {
        name: list(map(str, requirements)) for name, requirements in program.items()
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_gets_one_version(python):
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    for name, candidates in locked("requirements-dev.lock").items():
        chosen = [one for one in candidates if not one.marker or one.marker.evaluate(environment)]
        assert len(chosen) <= 1, name
