# make help lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 2
STUDY ?= config/config.yaml
MINUTES ?= 120
# make test CONSTRAINTS=/dev/null UV= takes the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
UV ?= $(shell command -v uv 2>/dev/null)
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help demo ui test test-fast test-slow test-soak soak lint format reference bench gpu gpu-wheels docs pictures lock install clean

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

test-slow: $(VENV)/.dev  ## the slow ones: whole studies, pages walked, browsers, full disks
	$(BIN)/python -m pytest -m "slow and not soak" -n $(CORES) --dist loadfile

test-soak: $(VENV)/.dev  ## the longest: a real Slurm, servers that are killed, every method trained, the container's steps
	$(BIN)/python -m pytest -m soak

soak: $(VENV)/.dev  ## kill stages at random for MINUTES=120 and compare what they end with (docs/reliability.md)
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

lint: $(VENV)/.dev  ## style (ruff, snakefmt) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff and snakefmt lay out the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

reference: $(VENV)/.dev  ## make the tables of settings and their schema again
	$(BIN)/python -m aps.settings.reference

bench: $(VENV)/.dev  ## every benchmark (benchmarks/README.md)
	$(BIN)/python -m benchmarks

gpu: $(VENV)/.dev  ## what has to be seen on a GPU, in nine minutes: gpu-results/table.txt
	$(BIN)/python benchmarks/gpu.py

# For `python benchmarks/gpu.py --wheels gpu-wheels` with Python 3.12, torch, torchvision and timm, without a network.
gpu-wheels: $(VENV)/.installed  ## what that needs beside torch and timm, as wheels for a machine without a network
	$(BIN)/python -m pip download --quiet --dest gpu-wheels --only-binary=:all: --python-version 3.12 --constraint $(CONSTRAINTS) \
	hypothesis jinja2 matplotlib psutil pyarrow pycocotools pydantic pytest pyyaml safetensors scikit-learn scipy tqdm

docs: $(VENV)/.dev  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html is its first page; $(BIN)/mkdocs serve shows it while you write'

pictures: demo  ## redraw docs/images from the demo: the DAG, its scores and report (needs graphviz, chromium)
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/gap.py
	$(BIN)/python docs/rivals.py

lock:  ## uv.lock, and constraints.txt from it (needs uv); LOCK=--upgrade takes newer versions
	uv lock $(LOCK)
	{ echo '# The versions this release was tested with, for pip --constraint. `make lock` writes them from uv.lock.'; \
	uv export --quiet --frozen --no-hashes --no-emit-project --no-annotate --no-header --all-extras --no-extra detectron2 | \
	awk -F ' ; ' '{ line[NR] = $$0; pin[NR] = $$1; split($$1, part, "=="); name[NR] = part[1]; times[part[1]]++ } \
	END { for (i = 1; i <= NR; i++) print (times[name[i]] > 1) ? line[i] : pin[i] }'; } > constraints.txt
	$(PYTHON) -c 'import hashlib, pathlib, re; digest = hashlib.sha256(pathlib.Path("constraints.txt").read_bytes()).hexdigest(); \
	script = pathlib.Path("workflow/envs/aps.post-deploy.sh"); \
	script.write_text(re.sub("(?m)^# constraints.txt .*", "# constraints.txt " + digest, script.read_text()))'

install: $(VENV)/.installed  ## the environment alone, in .venv

clean:  ## remove the environment; results stay
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("APS needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# uv and pip install the same versions: one reads uv.lock, the other constraints.txt, and a test compares the two.
ifneq ($(UV),)
install-with = UV_PROJECT_ENVIRONMENT=$(VENV) $(UV) sync --quiet --frozen --inexact --python $(BIN)/python $(if $(1),--extra $(1))
else
install-with = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.$(if $(1),[$(1)])'
endif

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(call install-with)
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(call install-with,dev)
	@touch $@
