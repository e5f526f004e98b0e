"""The house keeps its order: arrows point one way, flags live in run.py, the README is true."""

import ast
import re

import pytest
from conftest import ROOT

# The files of each module: one at the root, or all files of a package.
MODULES = {path.stem: [path] for path in ROOT.glob("*.py")}
PACKAGES = {path.parent.name: sorted(path.parent.glob("*.py")) for path in ROOT.glob("*/__init__.py")}
MODULES |= PACKAGES
# Each module may import those of the rows above its own, and errors.
ROWS = [
    {"errors", "console", "engine", "architecture", "calibration", "signals"},
    {"run_folder", "config", "recipe", "npz", "cluster", "whitening"},
    {"resnet", "folding", "augment", "memory", "objective", "lars_optimizer", "schedule", "strategy", "knn", "alarms"}
    | {"run_lock", "curve", "timing"},
    {"model", "sources", "quality", "propagation", "continuation", "stopping"},
    {"data", "checkpoint"},
    {"tasks", "service"},
    {"published", "finite", "accumulation"},
    {"plan", "predict"},
    {"probe", "teacher_answers", "linear_start"},
    {"preparation"},
    {"train", "evaluate", "export", "answers"},
    {"pilot"},
    {"subject", "budget"},
    {"run"},
]


def imports(path):
    """The names of all modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write the module's whole name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(module):
    """The other modules of the house that a module imports."""
    names = {name.split(".")[0] for path in MODULES[module] for name in imports(path)}
    return (names & set(MODULES)) - {module}


def test_every_module_has_its_row():
    assert set().union(*ROWS) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module):
    row = next(i for i, names in enumerate(ROWS) if module in names)
    allowed = set().union(*ROWS[:row])
    assert modules_imported(module) <= allowed


def files_imported(package, path):
    """The files of its own package that a file imports; where it names the package alone, `__init__`."""
    stems = {path.stem for path in PACKAGES[package]}
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == package:
            found.add(parts[1] if len(parts) > 1 and parts[1] in stems else "__init__")
    if path.stem == "__init__":  # it names the package to reach its files
        found.discard("__init__")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_files_of_a_package_import_each_other_without_a_circle(package):
    waiting = {path.stem: files_imported(package, path) for path in PACKAGES[package]}
    while waiting:
        ready = [stem for stem, needed in waiting.items() if not needed & set(waiting)]
        assert ready, f"a circle among {sorted(waiting)}"
        for stem in ready:
            del waiting[stem]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"run"}))
def test_flags_are_read_in_run_alone(module):
    names = [name for path in MODULES[module] for name in imports(path)]
    assert not [name for name in names if name.startswith("absl.flags") or name == "absl.app"]


def test_every_public_function_has_a_docstring():
    bare = []
    for path in [path for files in MODULES.values() for path in files]:
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not bare


PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_in_the_pages_exists(page):
    from config import FIELDS
    from run import OUTPUT_FLAGS, RELEASE_FLAGS

    named = set(re.findall(r"--([a-z][a-z_0-9]+)", page.read_text()))
    of_three_steps = {"label_seeds", "pretrain", "supervised", "finetune", "distill"}  # as in --pretrain.train_epochs
    of_slurm = {"gpus", "job", "time", "signal", "requeue", "open", "dependency"}
    of_docker = {"file", "tag", "build"}
    of_cost = {"run", "hardware", "devices", "peak_flops", "share", "link", "price"}
    elsewhere = {"logdir", "flagfile", "golden", "output", "parts", "only", "task", "kills", "plot", "rivals", "rows"}
    of_servers = {"port", "host", "batches"}  # as in tools/data_service.py and benchmarks/served.py
    elsewhere |= of_three_steps | of_slurm | of_docker | of_cost | of_servers
    assert named - elsewhere <= set(FIELDS) | set(RELEASE_FLAGS) | set(OUTPUT_FLAGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_the_pages_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if link and not (page.parent / link).exists()]


def test_every_module_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    named = {name: f"`{name}/`" if name in PACKAGES else f"`{name}.py`" for name in MODULES}
    assert not [name for name in set(MODULES) - {"errors", "console"} if named[name] not in text]
