# Everything a checkout can do; `make help` lists it. Needs make and Python 3.11 or later, nothing else.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

ifdef SKIP_INSTALL
# The interpreter as it is, with whatever it has installed: for machines without a network.
BIN := $(PYTHON)
READY :=
READY_FOR_DOCS :=
else
BIN := $(VENV)/bin/python
READY := $(VENV)/.installed
READY_FOR_DOCS := $(VENV)/.installed-docs
endif

# Two torch processes with two threads each on two cores wait for each other most of the time: one thread a worker.
PARALLEL := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo install test lint docs format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10
	@echo
	@echo 'PYTHON=python3.12   the interpreter that makes the environment'
	@echo 'VENV=DIR            where the environment is (.venv)'
	@echo 'WORKERS=N           test processes (2)'
	@echo 'ARGS="..."          handed on to pytest or to the demo'
	@echo 'SKIP_INSTALL=1      use PYTHON with what it has installed; no environment, no network'

demo: $(READY)  ## train and draw a small example from scratch
	$(BIN) -m applications.imaml demo $(ARGS)

install: $(READY)  ## make the environment

test: $(READY)  ## run the tests
	$(PARALLEL) $(BIN) -m pytest -n $(WORKERS) $(ARGS)

lint: $(READY)  ## check style, format and types
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN) -m pyright --pythonpath "$$($(BIN) -c 'import sys; print(sys.executable)')"

docs: $(READY_FOR_DOCS)  ## build the documents into site/
	NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs build --strict

format: $(READY)  ## rewrite the files in the agreed format
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

clean:  ## remove caches and builds, but neither the environment nor runs
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp goes first and comes back last, so that an interrupted install is repeated. torch is asked for by its
# exact version in a command of its own: some package indexes offer their CPU build for such a request only.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'implicitlayers needs Python 3.11 or later, but `$(PYTHON)` is' \
	    "$$($(PYTHON) --version 2>&1 || true). Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@rm -f $@
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@
