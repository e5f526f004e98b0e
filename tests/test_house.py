"""The house keeps its order: arrows point one way, flags live in run.py, modules stay small, the README is true."""

import ast
import re

import pytest
from conftest import ROOT

MODULES = {path.stem: path for path in ROOT.glob("*.py")}
# Each module may import those of the rows above its own, and errors.
ROWS = [
    {"errors", "console"},
    {"config", "resnet", "policies", "augment", "memory", "objective", "lars_optimizer", "strategy", "knn"},
    {"model", "sources"},
    {"data", "checkpoint"},
    {"tasks"},
    {"published"},
    {"train", "evaluate", "export", "plan"},
    {"run", "demo"},
]


def imports(path):
    """The names of all modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_row():
    assert set().union(*ROWS) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module):
    row = next(i for i, names in enumerate(ROWS) if module in names)
    allowed = set().union(*ROWS[:row])
    assert set(imports(MODULES[module])) & set(MODULES) <= allowed


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"run"}))
def test_flags_are_read_in_run_alone(module):
    assert not [name for name in imports(MODULES[module]) if name.startswith("absl.flags") or name == "absl.app"]


FILES = [*MODULES.values(), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_modules_stay_within_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_every_public_function_has_a_docstring():
    bare = []
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                bare += [f"{module}.{node.name}"] * (not ast.get_docstring(node))
    assert not bare


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_in_the_pages_exists(page):
    from config import FIELDS
    from run import OUTPUT_FLAGS, RELEASE_FLAGS

    named = set(re.findall(r"--([a-z][a-z_0-9]+)", page.read_text()))
    elsewhere = {"logdir", "flagfile", "golden", "output"}
    assert named - elsewhere <= set(FIELDS) | set(RELEASE_FLAGS) | set(OUTPUT_FLAGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_the_pages_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if link and not (page.parent / link).exists()]


def test_every_module_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [name for name in set(MODULES) - {"errors", "console"} if f"`{name}.py`" not in text]
