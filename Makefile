# Needs nothing but Python 3.11 or newer. `make help` lists the targets.
# Without a GPU, PyTorch's small CPU build saves gigabytes:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
TRL_PYTHON ?=
IMAGE ?= qlora-sweep-job
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-gpu chaos lint bench bench-gpu image clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the pinned packages

# A build from TORCH_INDEX (2.13.0+cpu, 2.13.0+cu126) sorts above PyPI's 2.13.0, so pip takes it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## run a sweep of 3 trials on generated data and a generated model, on the CPU
	$(BIN)/python -m job demo

test: $(STAMP)  ## run all tests (those that need a GPU are skipped without one)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-fast: $(STAMP)  ## run the tests that need no training
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu'

test-gpu: $(STAMP)  ## run the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu

chaos: $(STAMP)  ## kill, stop and freeze workers of a sweep at random, ten times
	CHAOS_ROUNDS=10 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_chaos.py

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict job

bench: $(STAMP)  ## print the seconds of a trial's phases, and tokens/s against transformers.Trainer
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.trial
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training --trl-python=$(TRL_PYTHON)

bench-gpu: $(STAMP)  ## the same on a CUDA GPU capped to a T4's memory: 1B to 8B, 4-bit, fp16
	$(BIN)/python -m benchmarks.training --device cuda --shapes 1b,3b,7b,8b --rounds 1 --gpu-memory-gb 14.6 --trl-python=$(TRL_PYTHON)

image:  ## build the container image (needs Docker)
	docker build --tag $(IMAGE) --build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) .

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
