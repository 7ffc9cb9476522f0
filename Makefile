# Each target does its own set-up. An active environment is used as it is when it has everything; otherwise .venv is made once.
# PYTHON: the interpreter; TORCH: the PyTorch requirement, installed before anything could resolve another build of it;
# ENVIRONMENT=own: make .venv whatever is active; JOBS: test processes; ARGS: more arguments for the demo, pytest or the benchmarks.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ENVIRONMENT ?= any
JOBS ?= 2
ARGS ?=

.PHONY: help demo test test-deep test-gpu check bench

help:
	@echo "make demo      align a diffusion model to preferences on real images: ARGS='--method inpo --seed 1 ...'"
	@echo "make test      the test suite: JOBS=2 ARGS='-k schedule'"
	@echo "make test-deep what takes longest: kernels interpreted, compiled, under sanitizers; wheels; every model family; processes; kills"
	@echo "make test-gpu  what only a GPU can check: ARGS=--no-sanitizer"
	@echo "make check     ruff and mypy"
	@echo "make bench     time the ops beside plain PyTorch: ARGS='--quick --filter sdxl'"

ifeq ($(ENVIRONMENT),any)
  ACTIVE := $(shell $(PYTHON) .ci/suitable.py . >/dev/null 2>&1 && echo yes)
endif

ifeq ($(ACTIVE),yes)
  RUN := $(PYTHON)
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif

$(VENV)/.ready: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade 'setuptools>=77' wheel ninja pybind11
	$(VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable '.[train,dev]'
	@touch $@

demo: $(READY)
	$(RUN) -m fastinvdpo demo $(ARGS)

# One thread for each test process: two processes with all threads each would fight for the cores.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) $(ARGS)

# Named one by one, the longest first: pytest collects none of them by itself. A file stays with one process, which makes what its
# tests share once.
DEEP = $(addprefix tests/kernels/,interpreted.py sanitized.py) $(addprefix tests/trainer/,estimated.py chain.py) \
  tests/kernels/packaging.py $(addprefix tests/trainer/,sharded.py killed.py launched.py) tests/bench_step.py \
  $(addprefix tests/kernels/,compiled.py instruction_sets.py) $(addprefix tests/trainer/,processes.py shared_gradients.py)

test-deep: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile $(DEEP) $(ARGS)

# Fails without a GPU, and where a part could not be run.
test-gpu: $(READY)
	$(RUN) -m tests.gpu $(ARGS)

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The results are kept in the checkout, by device.
bench: $(READY)
	$(RUN) -m fastinvdpo bench --output benchmarks/results $(ARGS)
