# Two commands matter: `make demo` and `make test`. Each sets itself up first.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-main test-triton support fuzz lint format clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Workers of the test run; each is single-threaded.
JOBS ?= 2

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## create .venv and install moec with its pinned dependencies

# An interpreter may be on the path and yet not run (version managers leave such shims): try each.
$(BIN)/python:
	@set -e; for python in python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	      >/dev/null 2>&1; then \
	    echo "creating $(VENV) with $$($$python --version)"; \
	    $$python -m venv $(VENV); exit 0; \
	  fi; \
	done; \
	echo "moec needs Python 3.11, 3.12 or 3.13 (with venv) on the path" >&2; exit 1

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing moec and its pinned dependencies (once, some minutes)'
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,hf,plots]'
	@touch $@

demo: $(STAMP) ## train a small OLMoE model eager, grouped_mm and compiled, side by side
	$(BIN)/python -m examples.train_olmoe

test: test-main test-triton ## run all tests

test-main: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --ignore=tests/triton

# Triton decides at import whether kernels are interpreted, so these have a process of their own.
test-triton: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/triton

support: $(STAMP) ## compare docs/support.md with what every family of transformers does
	OMP_NUM_THREADS=1 $(BIN)/python -m moec.docs support --check

# How long `make fuzz` goes on, and its first seed.
MINUTES ?= 10
SEED ?= 0
fuzz: $(STAMP) ## random graphs and modules through the whole compiler (MINUTES=10 SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m moec.fuzz all --minutes $(MINUTES) --seed $(SEED)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and every cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist *.egg-info
