# `make train` is the way in; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup bridges train real test chaos lint lock clean

HARDWARE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
LOCK := requirements/$(HARDWARE).lock
STAMP := .venv/installed-$(HARDWARE)
BRIDGES := .venv/installed-bridges
BIN := .venv/bin
ARGS ?=

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo '  ARGS="..."    more arguments for train (key=value), test (pytest) or chaos; HARDWARE=cpu|cuda, PYTHON=python3.12 for setup'

setup: $(STAMP)  ## .venv with everything, for this machine's CPU or CUDA; does nothing when it is up to date

$(STAMP): $(LOCK) pyproject.toml requirements/install.sh
	@PYTHON="$(PYTHON)" requirements/install.sh $(HARDWARE)
	@touch $@

bridges: $(BRIDGES)  ## lm-evaluation-harness and inspect_ai beside it, for `beaver-ray bridge` (docs/bridges.md)

$(BRIDGES): $(STAMP) requirements/bridges.lock
	@$(BIN)/python -m pip install --no-input --disable-pip-version-check --quiet --no-deps -r requirements/bridges.lock </dev/null
	@touch $@

train: setup  ## the whole pipeline on the small world, with a report at the end; complete stages are skipped
	@$(BIN)/beaver-ray pipeline configs/local/pipeline.yaml $(ARGS)

WORKSPACE ?= runs/real

real: setup  ## Safe PPO of a real language model (93 MB), on pairs of yours (PAIRS=FILE) or a small set (docs/real-models.md)
	@$(BIN)/python -m launch.real_model "$(WORKSPACE)" "$(PAIRS)"
	@$(BIN)/beaver-ray pipeline configs/real/pipeline.yaml workspace="$(WORKSPACE)" $(ARGS)

test: lint $(BRIDGES)  ## lint, then all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests $(ARGS)

chaos: setup  ## a run on three local nodes under 31 kills of all its processes (10 to 20 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(ARGS)

lint: setup  ## ruff, mypy and the rule that imports run one way
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# Writes requirements/*.lock anew; requirements/lock.py says what it needs. Look at the difference and run the tests
# before you commit it.
lock: setup  ## resolve the lock files anew (downloads several GB)
	@$(BIN)/python requirements/lock.py

clean:  ## remove .venv and caches; runs/ stays
	@rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
