# make help lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 2
STUDY ?= config/config.yaml
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help demo ui test test-fast test-slow lint format reference bench docs install clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## *' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## install, run the whole DAG on embedded data, print the results
	$(BIN)/snakemake all --cores $(CORES) --quiet rules host reason
	@$(BIN)/python -m aps results

ui: $(VENV)/.installed  ## MLflow's page of the demo's runs; STUDY=config/NAME.yaml: of another study's
	$(BIN)/python -m aps ui --configfile $(STUDY)

test: $(VENV)/.dev lint  ## install, check style and types, run every test but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n $(CORES)

test-fast: $(VENV)/.dev  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not end_to_end" -n $(CORES)

test-slow: $(VENV)/.dev  ## the slow ones: a real Slurm, detectron2
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev  ## style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff lay out the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

reference: $(VENV)/.dev  ## make the tables of settings and their schema again
	$(BIN)/python -m aps.settings.reference

bench: $(VENV)/.dev  ## every benchmark (benchmarks/README.md)
	$(BIN)/python -m benchmarks

docs: demo  ## redraw the README's pictures of the DAG and of the demo (needs graphviz)
	$(BIN)/snakemake --rulegraph 2>/dev/null | dot -Tpng -Gdpi=80 -o docs/images/dag.png
	cp results/report/demo/scores.png docs/images/scores.png

install: $(VENV)/.installed  ## the environment alone, in .venv

clean:  ## remove the environment; results stay
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("APS needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
