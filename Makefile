# Head Foundry. `make help` lists the targets. A stage takes CONFIG=file.yaml and ARGS="--section.key value ...".
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
CONFIG ?=
ARGS ?=

export PYTHONUNBUFFERED = 1

# Renewed when the pinned versions or the package's own description change; written last, so a broken-off set-up is taken up again.
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml | cksum | tr ' ' -)
STAGES := demo head-page portraits genhead plan datagen verify survey describe reconstructor perception evaluate ablation drive report import-published bench
# CONFIG if given, else configs/<stage>_tiny.yaml where there is one
SETTINGS = $(or $(CONFIG),$(wildcard configs/$(subst -,_,$@)_tiny.yaml))

.PHONY: help install test test-gpu lint $(STAGES)

help: ## this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  A stage takes CONFIG=file.yaml (default configs/<stage>_tiny.yaml) and ARGS="--section.key value ...";'
	@echo '  make STAGE ARGS=--help lists its settings. PYTHON=/path/to/python3.12 chooses the Python of a new $(VENV).'

install: $(STAMP) ## set up .venv with the pinned packages; nothing happens when that is done

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Head Foundry needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true). Call make with PYTHON=/path/to/python3.11." >&2; exit 1; }
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "Installing the pinned packages into $(VENV) (some minutes the first time)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-*
	@touch $@

# The stages
demo: ## the whole chain at tiny size, from nothing to runs/demo/index.html
head-page: ## a page of renders of the head model
portraits: ## the generator's training portraits (ARGS="--from_folder DIR" takes photographs)
genhead: ## train the 3D head generator
plan: ## forecast hours, bytes and cost of a large data set: make plan ARGS="--measured DIR --identities 1e6 --workers 500"
datagen: ## produce labelled multi-view shards
verify: ## check a folder of shards: make verify ARGS=DIR
survey: ## look at a folder of shards on one page: make survey ARGS="DIR --exclude FILE"
describe: ## croissant.json and a data card for a folder of shards: make describe ARGS=DIR
reconstructor: ## train the one-shot reconstructor
perception: ## train a measurement network and an image motion encoder
evaluate: ## measure a reconstructor on held-out identities, or a generator
ablation: ## train variants of the reconstructor, measure all in the same way, print the table
drive: ## animate one picture with a sequence of motions
report: ## gather a run into one page: make report ARGS=DIR
import-published: ## a published checkpoint as an export: make import-published ARGS="FILE --out DIR --head_model FLAME"
bench: ## time the parts that set the pace beside what the machine could do

$(STAGES): $(STAMP)
	@$(VENV)/bin/python -m pipelines $@ $(if $(SETTINGS),--config $(SETTINGS)) $(ARGS)

# Checks
test: $(STAMP) ## all tests (ARGS="-k word" and other pytest options)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal $(ARGS)

test-gpu: $(STAMP) ## only the tests that need a CUDA device; lists them where there is none
	@$(VENV)/bin/python -m pytest -v -m gpu $(ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
