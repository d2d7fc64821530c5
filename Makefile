# make install | demo | test | test-slow | lint | clean
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow lint clean

install: $(STAMP)

# The exact versions of constraints.txt; one pip call, so that torch is not resolved twice.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pipelines.warm_up
	touch $(STAMP)

demo: install
	$(BIN)/meteor synthetic data outputs/demo/data --scenes 160 --held-out 40
	$(BIN)/meteor synthetic models outputs/demo/models
	$(BIN)/python -m pipelines.all --run jobs/runs/demo.yaml

test: install
	$(BIN)/pytest

# Learning, restarts, several processes: minutes on two cores.
test-slow: install
	$(BIN)/pytest -m slow

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
