# Each target does its own set-up. An active environment is used as it is when it has everything; otherwise .venv is made once.
# PYTHON: the interpreter; TORCH: the PyTorch requirement, installed before anything could resolve another build of it;
# CONSTRAINTS: the versions of everything else; ENVIRONMENT=own: make .venv whatever is active; JOBS: test processes; PART: of test-deep,
# all without; ARGS: more arguments for the demo, pytest or the benchmarks; PYTHONS: the interpreters to build wheels for.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
ENVIRONMENT ?= any
JOBS ?= 2
PART ?=
ARGS ?=
PYTHONS ?= $(PYTHON)

# Set, Python would compile anew in every process what pip leaves uncompiled below.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-deep test-faults test-oldest test-gpu check bench docs wheels constraints

help:
	@echo "make demo      align a small Stable Diffusion to preferences over real drawings: ARGS='--method inpo --seed 1 ...'"
	@echo "make test      the test suite: JOBS=2 ARGS='-k schedule'"
	@echo "make test-deep what takes longest: kernels interpreted, compiled, under sanitizers; wheels; every model family; processes; kills"
	@echo "make test-faults  kills, disk errors and signals at file-system calls of every command, mutated inputs: KILLS=400 DISK=190 SIGNALS=100 MUTATIONS=6000 SEED=0"
	@echo "make test-oldest  ops, models and training with the oldest versions that pyproject.toml allows: PYTHON=python3.10"
	@echo "make test-gpu  what only a GPU can check: ARGS='--jobs 4 --no-sanitizer'"
	@echo "make check     ruff and mypy"
	@echo "make wheels    into dist/, one for each of PYTHONS='python3.10 python3.13'"
	@echo "make docs      these pages and the API reference as a site, into site/"
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
	@if [ -f fastinvdpo/_not_built.txt ]; then echo "NATIVE KERNELS MISSING: $$(cat fastinvdpo/_not_built.txt)"; fi
	@touch $@

demo: $(READY)
	$(RUN) -m fastinvdpo demo $(ARGS)

# One thread for each test process: two processes with all threads each would fight for the cores. Tests of a file stay together
# where they can, and share what it makes once. What inductor compiles takes longest of all, and is left to test-deep.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal --ignore tests/ops/test_inductor.py $(ARGS)

# Named one by one: pytest collects none of them by itself, but for inductor's. Parts of a few minutes, of which CI runs one
# (PART=3); a file whose tests share something long in the making stays with one process.
DEEP_1 = tests/kernels/interpreted.py::test_interpreted
DEEP_2 = tests/kernels/interpreted.py::test_through_the_public_ops
DEEP_3 = tests/kernels/native_run.py
DEEP_4 = tests/ops/test_inductor.py tests/trainer/launched.py
DEEP_5 = tests/trainer/curves.py
DEEP_6 = tests/faults/interrupted.py::test_after_a_fault_the_same_command_ends_as_without_one[kill] tests/trainer/shared_gradients.py
DEEP_7 = tests/trainer/chain.py
DEEP_8 = tests/kernels/packaging.py
DEEP_9 = tests/kernels/headers.py
DEEP_10 = $(addprefix tests/kernels/,triton_compiled.py compiled.py)
DEEP_11 = tests/trainer/sharded.py tests/bench_step.py
DEEP = $(if $(PART),$(DEEP_$(PART)),$(foreach number,1 2 3 4 5 6 7 8 9 10 11,$(DEEP_$(number))))

test-deep: $(READY)
	KILLS=$(or $(KILLS),24) OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadgroup $(DEEP) $(ARGS)

# Hours on two cores; how many faults of each kind is set by variables of the environment.
test-faults: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) -rP tests/faults/interrupted.py $(ARGS)
	OMP_NUM_THREADS=1 $(RUN) -m tests.faults.mutated --count $(or $(MUTATIONS),6000) --seed $(or $(SEED),0)

# Fails without a GPU, and where a part could not be run.
test-gpu: $(READY)
	$(RUN) -m tests.gpu $(ARGS)

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

wheels: $(READY)
	$(RUN) .ci/wheels.py $(PYTHONS)

# The results are kept in the checkout, by device.
bench: $(READY)
	$(RUN) -m fastinvdpo bench --output benchmarks/results $(ARGS)

# The site has an environment of its own for the extra `docs`, which sees the packages of the other: the quickstart is run while it is built.
.venv-docs/.ready: pyproject.toml $(READY)
	$(RUN) -m venv .venv-docs
	$(RUN) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > .venv-docs/project.pth
	mv .venv-docs/project.pth .venv-docs/lib/python*/site-packages
	$(RUN) -c 'from tests.layout import pyproject; print(*pyproject()["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/docs.txt
	.venv-docs/bin/python -m pip install --quiet --no-compile --requirement .venv-docs/docs.txt
	@touch $@

# A dead link, a missing page or anchor, an unknown name or a cell that fails ends it.
docs: .venv-docs/.ready
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

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
	  ARGS='tests/ops tests/models $(addprefix tests/trainer/,test_families.py test_networks.py) $(ARGS)'
