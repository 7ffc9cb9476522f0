# Each target does its own set-up. An active environment is used as it is when it has everything; otherwise .venv is made once.
# PYTHON: the interpreter; TORCH: the PyTorch requirement, installed before anything could resolve another build of it;
# CONSTRAINTS: the versions of everything else; ENVIRONMENT=own: make .venv whatever is active; JOBS: test processes; ARGS: more arguments for the demo, pytest or the benchmarks.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
ENVIRONMENT ?= any
JOBS ?= 2
ARGS ?=

# Set, Python would compile anew in every process what pip leaves uncompiled below.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-deep test-oldest test-gpu check bench constraints

help:
	@echo "make demo      align a diffusion model to preferences on real images: ARGS='--method inpo --seed 1 ...'"
	@echo "make test      the test suite: JOBS=2 ARGS='-k schedule'"
	@echo "make test-deep what takes longest: kernels interpreted, compiled, under sanitizers; wheels; every model family; processes; kills"
	@echo "make test-oldest  ops, models and training with the oldest versions that pyproject.toml allows: PYTHON=python3.10"
	@echo "make test-gpu  what only a GPU can check: ARGS=--no-sanitizer"
	@echo "make check     ruff and mypy"
	@echo "make bench     time the ops beside plain PyTorch: ARGS='--quick --filter sdxl'"
	@echo "make constraints  the newest versions: resolved, tested, then kept as .ci/constraints.txt"

ifeq ($(ENVIRONMENT),any)
  ACTIVE := $(shell $(PYTHON) .ci/suitable.py . >/dev/null 2>&1 && echo yes)
endif

ifeq ($(ACTIVE),yes)
  RUN := $(PYTHON)
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif

# Most of what is installed is never imported: Python compiles what is, when it is.
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)

$(VENV)/.ready: pyproject.toml setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) setuptools wheel ninja pybind11 '$(TORCH)'
	$(INSTALL) --no-build-isolation --editable '.[train,dev]'
	@touch $@

demo: $(READY)
	$(RUN) -m fastinvdpo.cli demo $(ARGS)

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
	$(RUN) -m fastinvdpo.cli bench --output benchmarks/results $(ARGS)

# uv reads pyproject.toml, and answers with a version of every package for each Python.
RESOLVE = .venv-uv/bin/uv pip compile --quiet --no-header --no-annotate --extra train --extra dev pyproject.toml

.venv-uv/bin/uv:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv

# Without PyTorch and what each of its builds brings in versions of its own.
constraints: .venv-uv/bin/uv
	rm -rf .venv-newest && mkdir .venv-newest
	printf '%s\n' pip '$(TORCH)' | $(RESOLVE) - --universal --python-version 3.10 | grep -vE '^(torch|triton|nvidia-.*|cuda-.*)==' > .venv-newest/constraints.txt
	$(MAKE) ENVIRONMENT=own VENV=.venv-newest CONSTRAINTS=.venv-newest/constraints.txt check test
	cp .venv-newest/constraints.txt .ci/constraints.txt

# In a copy of the checkout, since the kernels are built in place. From PyPI, torch 2.10 for Linux on x86-64 brings 3 GB of CUDA.
test-oldest: .venv-uv/bin/uv
	rm -rf .venv-oldest/checkout && mkdir -p .venv-oldest/checkout
	$(RESOLVE) --resolution lowest-direct --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" > .venv-oldest/constraints.txt
	git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - | tar -x -C .venv-oldest/checkout
	FASTINVDPO_CUDA=0 $(MAKE) -C .venv-oldest/checkout ENVIRONMENT=own VENV=../environment CONSTRAINTS=../constraints.txt TORCH=torch test \
	  ARGS='tests/ops tests/models $(addprefix tests/trainer/,test_adapter_files.py test_families.py test_networks.py) $(ARGS)'
