# Sailyard on one machine: `make demo` to see it work, `make test` for everything CI runs.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

RECIPE ?= tiny
DATA ?=
EXIT ?=
PYTEST_ARGS ?=
# Test files side by side. Many start processes of their own, so more than one per two cores is slow.
WORKERS ?= 2

.PHONY: help install demo test test-cluster lint format types contracts unit results clean

help:
	@echo "make install                  build $(VENV) with everything (once; a few minutes)"
	@echo "make demo                     the whole sail_vl2 DAG under Airflow, then the board and the endpoint"
	@echo "make demo EXIT=1              the same, then stop (exit status tells how it went)"
	@echo "make demo DATA=PATH           mix your own images and captions in"
	@echo "make demo RECIPE=tiny-moe     another recipe"
	@echo "make test                     everything CI runs: lint, types, import contracts, tests"
	@echo "make test-cluster             the chart and the pipeline on the cluster of KUBECONFIG (docs/cluster.md)"
	@echo "make format                   apply the formatter and the safe lint fixes"
	@echo "make results                  rewrite the README's results from the latest run"
	@echo "make clean                    remove caches and build products (keeps $(VENV) and .sailyard)"

install: $(STAMP)

# The stamp is as new as the files that decide what is installed, so a second `make` installs nothing.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "Sailyard needs Python 3.11 or 3.12; say which with: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[all]" -c constraints.txt
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m operators.demo --recipe "$(RECIPE)" $(if $(DATA),--data "$(DATA)") $(if $(filter-out 0,$(EXIT)),--exit)

test: lint types contracts unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-cluster: $(STAMP)
	SAILYARD_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster -x -v -s $(PYTEST_ARGS)

results: $(STAMP)
	$(BIN)/python -m sailyard.results README.md

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
