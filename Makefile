# Every target sets up .venv on its first run; `make -j` is not needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(VENV)/constraints.txt
ARGS ?=

.PHONY: help demo test versions check bench host-cost sanitize gpu gpu-compile tables clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(READY)  ## fine-tune a real model with LoRA and FVAE-LoRA side by side; ARGS="--help" for options
	$(BIN)/python -m examples.demo $(ARGS)

test: $(READY)  ## the whole test suite, kernels on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

versions: $(READY)  ## the tests with other versions of Python, torch, Triton, transformers and peft; table in docs/versions.md
	$(BIN)/python -m tests.tools.versions $(ARGS)

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## time all sides in turns, write benchmarks/results/REPORT.md; ARGS="--full" for more
	$(BIN)/python -m benchmarks.report $(ARGS)

host-cost: $(READY)  ## what a step of one adapted layer costs the host, without a GPU; ARGS="--full" for more
	$(BIN)/python -m benchmarks.host_cost $(ARGS)

sanitize: $(READY)  ## the C++ kernels once more, under AddressSanitizer and UBSan (Linux, gcc; 3 minutes)
	$(BIN)/python -m tests.tools.sanitize $(ARGS)

gpu: $(READY)  ## on a GPU: right, and how fast, in one report (docs/gpu.md); ARGS="--minutes 9", "--dry-run" without a GPU
	$(BIN)/python -m benchmarks.gpu $(ARGS)

tables: $(READY)  ## count launches and bytes: the tables of docs/cost.md and docs/roofline.md
	$(BIN)/python -m benchmarks.cost_table
	$(BIN)/python -m benchmarks.roofline

gpu-compile: $(READY)  ## compile every Triton kernel for sm_80, sm_90, sm_100 and gfx942; registers, spills, tensor cores
	$(BIN)/python -m tests.tools.triton.compile_all $(ARGS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build *.egg-info fvae_kernels/*.so

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@echo "setting up $(VENV) (once)"
	$(PYTHON) -m venv $(VENV)
	# a torch for CUDA or ROCm requires the Triton that it was made for; the one for CPUs brings none and gets ours
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) torch setuptools wheel numpy
	$(BIN)/python -c "import triton" 2>/dev/null || cp constraints.txt $(VENV)
	# What a test or two look at, in folders of their own, while the kernels compile: packages that PEFT imports wherever
	# it finds them, slowly and with a lot to say; and the oldest Triton, whose test is skipped without it.
	$(PIP) --no-deps --upgrade --target $(VENV)/quantised torchao hqq einops termcolor & quantised=$$!; \
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target $(VENV)/oldest triton==3.6.0 & \
	$(PIP) --no-build-isolation --editable '.[dev,triton]'; installed=$$?; wait $$quantised || installed=$$?; wait; exit $$installed
	$(PIP) --no-deps --ignore-requires-python ttsem  # says that it needs a newer Python and an older Triton; it does not
	@touch $@
