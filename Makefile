# `make demo` and `make test` create what they need: a virtual environment with the pinned requirements.
VENV ?= .venv
PYTHON ?= python3

demo: $(VENV)/.requirements
	$(VENV)/bin/python tools/three_steps.py --dataset=digits --labels_per_class=1 --output=runs/demo

test: $(VENV)/.requirements-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test
