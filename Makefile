# One line each over the real commands. Variables: PYTHON (the interpreter that makes the environment), VENV (where it lies),
# ARGS (passed on to the command), MISSING (skip: test without the programs that system-packages would install). Environment variables
# TDM_* reach the server; PIP_* reach pip, and uv through it.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
MISSING ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python .ci/install.py
# On all cores; what cannot be compiled are examples for other versions of Python.
BYTECODE ?= $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev

# An environment that could not be made whole is no environment.
.DELETE_ON_ERROR:

.DEFAULT_GOAL := help
.PHONY: help serve dev system-packages programs test storm mutants lint format image cluster bench load soak clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1  \t/p' $(MAKEFILE_LIST)

serve: $(RUN)  ## start the server, the page and the API on http://127.0.0.1:8000
	@exec $(BIN)/python -m server up $(ARGS)

dev: $(DEV)  ## install what training, tests and lint need into .venv

system-packages:  ## install the programs that some tests run: a browser, redis-server, promtool (Debian, as root)
	@bash .ci/system-packages

# Before anything is installed into .venv: whoever lacks a program learns it at once.
programs:
	@bash .ci/system-packages --check || [ "$(MISSING)" = skip ]

test: programs $(DEV)  ## run the tests
	@bash .ci/tests $(BIN)/python $(ARGS)

storm: programs $(DEV)  ## kill and freeze workers, apis and Redis at random under load, longer than the tests do
	$(BIN)/python -m pytest --storm tests/failures/test_kill_storm.py $(ARGS)

mutants: $(DEV)  ## break the code on purpose, a change at a time: do the tests notice
	$(BIN)/python -m tests.mutants $(ARGS)

lint: $(DEV)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy server engines loadtests tests

format: $(DEV)  ## rewrite imports and layout
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

image: $(DEV)  ## the Dockerfile's steps without Docker, and a picture by what they make (root, debootstrap, some minutes)
	$(BIN)/python -m tests.image $(ARGS)

cluster: $(DEV)  ## every overlay before a real Kubernetes API server (ARGS='--bin DIR', as setup-envtest fills it)
	$(BIN)/python -m tests.cluster $(ARGS)

bench: $(DEV)  ## our server against a diffusers pipeline behind a lock, in one run
	$(BIN)/python -m loadtests.bench $(ARGS)

load: $(DEV)  ## k6 scenarios, short ones, against a server that is already running (BASE_URL)
	@$(BIN)/python -m loadtests.load --short $(ARGS)

soak: $(DEV)  ## the same at full length, eight hours of steady load last
	@$(BIN)/python -m loadtests.load $(ARGS)

clean:  ## remove the environment and caches; data/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# Stamps: pip runs only when what it would install has changed.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt .ci/install.py | $(BIN)/python
	@echo "installing what serving needs into $(VENV) (once)"
	@$(INSTALL) worker,embedded
	@$(BYTECODE)
	@touch $@

$(DEV): pyproject.toml constraints.txt .ci/install.py | $(BIN)/python
	@echo "installing what development needs into $(VENV)"
	@$(INSTALL) worker,embedded,distill,dev
	@$(BYTECODE)
	@touch $(RUN) $@
