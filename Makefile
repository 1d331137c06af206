# make demo        install into .venv and run the demo
# make test        install into .venv and run linters and tests (what CI runs)
# make test-all    the same with the longer tests
# make lint        linters only
# make test-oldest the tests with the oldest versions that the metadata allows, in .venv-oldest (uv resolves them)
# make test-newest the tests with the newest ones, in .venv-newest
# make bench       the speed benchmarks, about ten minutes (benchmarks/speed.md)
# make venv        install only
#
# PYTHON: the Python to start from (3.10 or newer); VENV: where to install.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10 python,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $(p))))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-oldest test-newest lint bench venv
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/nnUNetv2_cva demo

# Two processes of one thread each: more threads than cores make OpenMP spin and everything crawl.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m ""

test-oldest:
	$(MAKE) resolved WHICH=oldest RESOLUTION=lowest-direct

test-newest:
	$(MAKE) resolved WHICH=newest RESOLUTION=highest

.PHONY: resolved
resolved: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python .venv-$(WHICH)
	$(BIN)/uv pip install --python .venv-$(WHICH)/bin/python --compile-bytecode --resolution $(RESOLUTION) -e ".[dev]"
	OMP_NUM_THREADS=1 .venv-$(WHICH)/bin/python -m pytest -q -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/augmentation.py
	$(BIN)/python benchmarks/step.py flops
	$(BIN)/python benchmarks/step.py memory
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py time

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer found. Install one, or say where: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@
