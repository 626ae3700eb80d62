# Two commands do everything on a machine with Python >= 3.11 and make:
#   make run     the environment, then the whole course of training, evaluation and the page
#   make test    the environment if needed, then every test
# Settings: VENV=folder  PYTHON=python3.12  TORCH_INDEX=address (where torch comes from)  ARGS="…" (for minivlm run)

CONSTRAINTS := constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
ARGS ?=

# The first Python on the path that is new enough; only looked for when there is something to install.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
FIND_PYTHON = $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
                $$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)
PYTHON ?= $(eval PYTHON := $(FIND_PYTHON))$(PYTHON)

# The environment is complete for exactly these two files: its stamp carries their checksum.
STAMP := $(VENV)/.minivlm-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d ' ' -f 1)
# pip itself is pinned and comes first: older ones lose their way among so many packages. It does not compile every file
# of every package, which takes longer than all else: Python compiles what is imported, once.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile -c $(CONSTRAINTS)
PROJECT := .[course,test]
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=1200
COVERAGE := --cov=minivlm --cov=lessons --cov-report=term --cov-fail-under=90
# One process per core, two at most. A file's tests stay in one process, since they share what takes long to prepare.
IN_PARALLEL := -n logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder
# So do a notebook's cells, which share a kernel. The notebooks with most cells come first.
BOOKS_IN_PARALLEL := -n logical --maxprocesses 2 --dist loadfile

# $(call timed,NAME,COMMAND): run the command, then say how long it took.
timed = @start=$$(date +%s); $(2) && echo "== $(1): $$(($$(date +%s) - start)) s"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help environment run test check lint unit nbval browser notebooks lab

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F '|' '{printf "%-18s %s\n", $$1, $$2}'

run: environment ## make the environment, train both stages, evaluate, write the page
	$(BIN)/minivlm run $(ARGS)

test: environment lint unit nbval browser ## make the environment, run every test

check: environment ## the quick part of the tests, in two minutes
	$(call timed,quick tests,$(BIN)/python -m pytest -m "not slow and not browser" $(IN_PARALLEL))

lab: environment ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

lint: environment ## ruff: style and format
	$(call timed,lint,$(BIN)/ruff check . && $(BIN)/ruff format --check .)

# tests fetch nothing, whether or not there is a network
unit nbval browser: export HF_HUB_OFFLINE := 1
# conftest.py gives each test process one thread; this gives one to whatever a test starts, so that none waits for a core
unit check: export OMP_NUM_THREADS := 1
# two kernels share the cores
nbval: export OMP_NUM_THREADS := $(shell n=$$(getconf _NPROCESSORS_ONLN) && echo $$((n > 3 ? n / 2 : 1)))

unit: environment ## the package's tests, with line coverage
	$(call timed,tests,$(BIN)/python -m pytest -m "not browser" --durations=10 $(IN_PARALLEL) $(COVERAGE))

nbval: environment ## run every notebook and worked answer, and compare what they say
	$(call timed,notebooks,$(BIN)/python -m pytest --timeout=0 $(NBVAL) $(BOOKS_IN_PARALLEL) $(wildcard notebooks/*.ipynb))
	$(call timed,solutions,$(BIN)/python -m pytest --timeout=0 $(NBVAL) $(BOOKS_IN_PARALLEL) $(wildcard notebooks/solutions/*.ipynb))

browser: environment ## open notebooks in JupyterLab and Chromium, and use them as a reader does
	$(call timed,browser,$(BIN)/python -m pytest -m browser -ra tests/lessons/test_browser.py)

notebooks: environment ## run every notebook and worked answer, and write them back with what they took
	$(call timed,notebooks,$(BIN)/python -m lessons.refresh \
	  $(wildcard notebooks/*.ipynb) $(wildcard notebooks/solutions/*.ipynb))

environment: $(STAMP) ## make the virtual environment, or bring it up to date

$(STAMP):
	@$(firstword $(PYTHON) false) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  echo "MiniVLM needs Python 3.11 or newer."; \
	  echo "Here, $(firstword $(PYTHON) python3) --version says:" \
	    "$$($(firstword $(PYTHON) python3) --version 2>&1 | head -n 1)"; \
	  echo "Install a newer one, or name one you have: make … PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module, so it cannot make a virtual environment."; \
	  echo "On Debian and Ubuntu: sudo apt install python3-venv. Or use conda: see README.md."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): pip, then torch, then the rest. This takes some minutes."
	$(call timed,install,\
	  $(PIP) --quiet pip setuptools && \
	  $(PIP) $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch && \
	  $(PIP) --quiet --no-build-isolation -e '$(PROJECT)' || { \
	  echo "The installation stopped; the lines above say why. Run the same command again to go on."; exit 1; })
	@rm -f $(VENV)/.minivlm-* && touch $@
