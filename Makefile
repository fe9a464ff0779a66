# Thin names for what bootstrap.py and the tools in its environment do.
PYTHON ?= python3
GKD_LAB_VENV ?= .venv
BIN := $(GKD_LAB_VENV)/bin
export GKD_LAB_VENV

.PHONY: setup quickstart test check lint format types schema sweeps notebooks docs clean

setup:  ## the environment, with the tools of a developer
	$(PYTHON) bootstrap.py install dev

quickstart:  ## run the quickstart experiment and write its report
	$(PYTHON) bootstrap.py quickstart

test:  ## the tests
	$(PYTHON) bootstrap.py test

check:  ## everything a change must pass: lint, formatting, types, tests
	$(PYTHON) bootstrap.py check

lint: setup
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

format: setup
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

types: setup
	$(BIN)/python -m mypy

schema: setup  ## write the JSON Schema of the experiment file anew
	$(BIN)/python -m gkd_lab.config.json_schema

sweeps: setup  ## write the sweep files of all experiments anew
	for file in experiments/*.yaml; do name=$$(basename $$file .yaml); $(BIN)/gkd-lab sweep $$name > sweeps/$$name.yaml; done

notebooks: setup  ## execute the notebooks whose tables are in analysis/tables, and store the scores of their starts
	$(BIN)/python analysis/starts.py
	$(BIN)/python analysis/execute.py

docs: setup  ## build the site into site/; open site/index.html
	$(BIN)/python -m mkdocs build --strict

clean:  ## caches and builds; environments and outputs stay
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache
