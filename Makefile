# The house's commands; `make help` lists them. Each creates what it needs in .venv first.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH ?= torch==2.13.0
SUITE ?=
OUT ?= out
PYTEST_ARGS ?= -n 2 --dist worksteal

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch comes first and alone: pip then takes whatever build is offered here (the CPU build where there is one)
# and the second call finds it installed, instead of resolving it anew.
$(VENV)/.core: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c $(CONSTRAINTS) "$(TORCH)"
	$(PIP) -c $(CONSTRAINTS) -e .
	@touch $@

# `pyright[nodejs]` brings node as a wheel; without it pyright fetches one over the network when it first runs.
$(VENV)/.dev: $(VENV)/.core
	$(PIP) -c $(CONSTRAINTS) -e ".[dev,peers,ray]" "pyright[nodejs]"
	@touch $@

venv: $(VENV)/.dev ## .venv with every tool of the house, pinned by constraints.txt

demo: $(VENV)/.core ## both families make the same videos with the shipped weights, and a report compares them
	OMP_WAIT_POLICY=PASSIVE $(BIN)/cogvideo-bench run demo --output_path $(OUT)/demo
	@echo "report: $(abspath $(OUT)/demo/report.html)"

test: $(VENV)/.dev ## the test suite, one thread for each of two processes
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## pyright over the four packages
	$(BIN)/pyright

format: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ifdef SUITE
bench: $(VENV)/.core ## speed and memory beside the peers, or with SUITE=NAME a suite (`cogvideo-bench list` names them)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/cogvideo-bench run $(SUITE) --output_path $(OUT)/$(SUITE)
	@echo "report: $(abspath $(OUT)/$(SUITE)/report.html)"
else
bench: $(VENV)/.dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/cogvideo-bench peers
endif

clean: ## remove caches and build leftovers; keeps .venv, runs and outputs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find cogvideo_ar cogvideox_diff shared benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
