# Needs Python 3.11 or later, git and make; everything else lands in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check wheel clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(CURDIR)/.venv/bin
STAMP := .venv/.installed
# Torch comes first, alone, at the version of constraints.txt, so that nothing later pulls another one. Where the default
# index has only CUDA builds and a CPU build is wanted, name an index that has it: make setup TORCH_INDEX=URL.
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_INDEX ?=
SITE := build/site
# Two test files at a time: a file that starts ranks keeps them to itself.
PARALLEL ?= -n 2 --dist loadfile
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with every extra and the `autopar` command in it

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "autopar needs Python 3.11 or later; $(PYTHON) is older. Say which: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv .venv
	"$(BIN)/python" -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH)"
	"$(BIN)/python" -m pip install --quiet "setuptools>=77" wheel
	"$(BIN)/python" -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[hf,dev]'
	@touch $(STAMP)

demo: setup ## plan and train a small Llama on 4 local processes, beside one process
	"$(BIN)/python" examples/train_llama.py

test: setup ## every test that is not marked slow
	"$(BIN)/python" -m pytest -m "not slow" $(PARALLEL)

test-all: setup ## every test, the long sweeps too
	"$(BIN)/python" -m pytest $(PARALLEL)

check: setup wheel ## ruff, mypy on the installed wheel, house rules, the smallest tests; under a minute
	"$(BIN)/ruff" check .
	cd $(SITE) && MYPYPATH="$(CURDIR)/$(SITE)" "$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p autopar
	"$(BIN)/python" -m pytest -m "not slow" tests/test_house.py tests/test_documents.py
	"$(BIN)/python" -m pytest -m tiny --ignore=tests/test_house.py --ignore=tests/test_documents.py

# mypy is blind to the mapped folders of an editable install, so it reads the wheel as a user would install it.
wheel: setup
	@rm -rf build
	"$(BIN)/python" -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	"$(BIN)/python" -m pip install --quiet --no-deps --target $(SITE) build/wheel/autopar-*.whl

clean: ## remove build outputs and caches (.venv stays)
	rm -rf build dist out .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
