# Every target sets up .venv on its first run; `make -j` is not needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
ARGS ?=

.PHONY: help demo test check bench clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(READY)  ## fine-tune a real model with LoRA and FVAE-LoRA side by side; ARGS="--help" for options
	$(BIN)/python -m examples.demo $(ARGS)

test: $(READY)  ## the whole test suite, kernels on the CPU
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## timings, as ratios
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build *.egg-info fvae_kernels/*.so

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@echo "setting up $(VENV) (once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel numpy
	$(PIP) --no-build-isolation --editable '.[dev,triton]'
	@touch $@
