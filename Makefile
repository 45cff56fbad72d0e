# Every target sets up what it needs, so any of them works on a fresh checkout.
# PYTHON=/path/to/python3 chooses the interpreter that .venv is made from.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
TORCH := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Arguments for the tools: make test ARGS="-k budget", make bench ARGS="--cases quick".
ARGS ?=

.PHONY: help install demo test check bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## Make .venv and install memopt in it, with the tools for developing

demo: $(READY) ## Train a small language model: eager, Inductor and memopt at two budgets
	$(BIN)/python -m bench.demo $(ARGS)

test: $(READY) ## Run the tests, without those marked slow or gpu
	$(BIN)/python -m pytest -q -n 2 --dist loadscope -m "not slow and not gpu" $(ARGS)

check: $(READY) ## Lint, check the formatting and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## Measure memopt and its peers on every case
	$(BIN)/python -m bench run $(ARGS)

docs: $(DOCS_READY) ## Build the site in site/, strictly
	$(BIN)/python -m mkdocs build --strict

clean: ## Remove what the other targets made, .venv included
	rm -rf $(VENV) build dist site demo-out *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A torch that the base interpreter has, in the supported range, is used as it is. One line in a
# .pth file shows it to the new environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
	  "memopt needs Python 3.10 or newer, and '$(PYTHON)' is not: run make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo \
	  "'$(PYTHON)' cannot make virtual environments: install its venv package (python3-venv on Debian)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c 'import memopt._versions as v; v.check()' 2>/dev/null; then \
	  $(PYTHON) -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("torch").origin).parents[1])' \
	    > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth" \
	  && echo "using the torch of $(PYTHON)"; fi

$(READY): pyproject.toml | $(BIN)/python
	$(BIN)/python -c 'import memopt._versions as v; v.check()' 2>/dev/null || $(PIP) install torch==$(TORCH)
	$(PIP) install -e '.[dev]'
	@touch $@

$(DOCS_READY): pyproject.toml | $(READY)
	$(PIP) install -e '.[docs]'
	@touch $@
