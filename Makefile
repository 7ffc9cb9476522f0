# Each target does its own set-up. An active environment is used as it is when it has everything; otherwise .venv is made once.
# PYTHON: the interpreter; TORCH: the PyTorch requirement, installed before anything could resolve another build of it;
# ENVIRONMENT=own: make .venv whatever is active; JOBS: test processes; PART: of test-deep, all without; ARGS: more arguments for the demo, pytest or the benchmarks.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ENVIRONMENT ?= any
JOBS ?= 2
PART ?=
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
	$(RUN) -m fastinvdpo.cli demo $(ARGS)

# One thread for each test process: two processes with all threads each would fight for the cores. Tests of a file stay together
# where they can, and share what it makes once. What inductor compiles takes longest of all, and is left to test-deep.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal --ignore tests/ops/test_inductor.py $(ARGS)

# Named one by one: pytest collects none of them by itself, but for inductor's. Parts of like length, of which CI runs one
# (PART=3); a file whose tests share something long in the making stays with one process.
DEEP_1 = tests/kernels/interpreted.py
DEEP_2 = $(addprefix tests/kernels/,sanitized.py instruction_sets.py) tests/ops/test_inductor.py
DEEP_3 = $(addprefix tests/trainer/,curves.py killed.py processes.py)
DEEP_4 = tests/trainer/chain.py tests/kernels/packaging.py
DEEP_5 = $(addprefix tests/kernels/,triton_compiled.py compiled.py) $(addprefix tests/trainer/,sharded.py shared_gradients.py launched.py) \
  tests/bench_step.py
DEEP = $(if $(PART),$(DEEP_$(PART)),$(DEEP_1) $(DEEP_2) $(DEEP_3) $(DEEP_4) $(DEEP_5))

test-deep: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadgroup $(DEEP) $(ARGS)

# Fails without a GPU, and where a part could not be run.
test-gpu: $(READY)
	$(RUN) -m tests.gpu $(ARGS)

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The results are kept in the checkout, by device.
bench: $(READY)
	$(RUN) -m fastinvdpo.cli bench --output benchmarks/results $(ARGS)
