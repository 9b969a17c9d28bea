# Two commands do everything: `make demo` and `make test`. Both make a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRANSFORMERS ?=

.PHONY: demo test slow check matrix clean

demo: $(VENV)/.ready
	$(BIN)/dtr demo --out demo-run --overwrite

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

# Needs minutes, a browser or the real model.
slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m "slow and not gpu"

# What CI runs besides the tests.
check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell src tests docs benchmarks README.md CONTRIBUTING.md CHANGELOG.md dev

# The suite on the oldest supported transformers, in an environment of its own.
matrix:
	$(MAKE) test VENV=.venv-oldest TRANSFORMERS=5.17.0

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "No venv module: on Debian, apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	sed "$(if $(TRANSFORMERS),s/^transformers==.*/transformers==$(TRANSFORMERS)/)" constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-oldest demo-run build dist
