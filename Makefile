# `make demo` and `make test` create what they need: a virtual environment with the packages of the lock files, each of
# which must have the hash that stands there. requirements*.txt say which versions may be locked.
VENV ?= .venv
TOOLS ?= .venv-tools
PYTHON ?= python3
INSTALL = -m pip install --quiet --disable-pip-version-check

demo: $(VENV)/.requirements
	$(VENV)/bin/python tools/three_steps.py --dataset=digits --labels_per_class=1 --output=runs/demo

# The tests of a file run in one process, which prepares once what they share.
test: $(VENV)/.requirements-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

# Fails where training has become slower beside the plain way to write it (three to five minutes).
bench: $(VENV)/.requirements
	$(VENV)/bin/python benchmarks/speed.py

# Fuzzes what comes from strangers with many more inputs than `make test` does.
fuzz: $(VENV)/.requirements-dev
	$(VENV)/bin/python -m pytest -m slow tests/test_fuzz.py

# Writes the lock files anew: the newest versions that requirements*.txt allow.
lock: $(TOOLS)/.requirements
	$(LOCK) --upgrade requirements.txt --output-file=requirements.lock
	$(LOCK) --upgrade requirements-dev.txt --constraint=requirements.lock --output-file=requirements-dev.lock

# Fails where a locked package has a known vulnerability, and where it cannot be looked up.
audit: $(TOOLS)/.requirements
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip -r requirements-dev.lock

LOCK = $(TOOLS)/bin/uv pip compile --quiet --universal --python-version=3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command="make lock"

$(VENV)/.requirements: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) --require-hashes -r requirements.lock
	touch $@

$(VENV)/.requirements-dev: requirements-dev.lock $(VENV)/.requirements
	$(VENV)/bin/python $(INSTALL) --require-hashes -r requirements-dev.lock
	touch $@

$(TOOLS)/.requirements: requirements-tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(INSTALL) -r requirements-tools.txt
	touch $@

.PHONY: demo test bench fuzz lock audit
