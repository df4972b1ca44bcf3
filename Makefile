# make quickstart   install into .venv and compress a first network, from data inside the package
# make test         all tests that need no network
# make lint         style, format and types
# make bench-quick  measure a small part of docs/benchmarks.md anew, in some minutes, beside the published figures
# make docs         write the pages of docs/ that are made from the code, and check the links
# make release-test build the wheel, install it into an empty environment, and run the first recipe there
#
# Needs Python 3.10 or newer and make. An existing .venv is used as it is. Repeating a target repeats no installation.
# Another interpreter: make quickstart PYTHON=python3.12. Another place: make quickstart VENV=/some/folder.

VENV ?= .venv
BIN := $(VENV)/bin

# The first interpreter that is new enough; only looked for where an environment has to be made.
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(foreach name,$(CANDIDATES),$(shell $(name) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(name))))

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help quickstart install dev test lint bench-quick docs release-test
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile | head -n 6

quickstart: install
	$(BIN)/sparsebayes run recipes/quickstart.yaml

install: $(VENV)/.stamp-package

dev: $(VENV)/.stamp-dev

test: dev
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-quick: install
	$(BIN)/python tools/bench_quick.py

docs: dev
	$(BIN)/python tools/render_recipe_reference.py
	$(BIN)/python tools/render_api_reference.py
	$(BIN)/python tools/render_benchmarks.py
	$(BIN)/python tools/check_links.py

release-test: dev
	SPARSEBAYES_RELEASE_TEST=1 $(BIN)/python -m pytest tests/release

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or newer found; name one: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Without the constraints an installer may choose another torch, and gigabytes with it.
$(VENV)/.stamp-package: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@echo "Installing the package and what it needs into $(VENV): the first time this takes some minutes"
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-package
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
