"""``make test-gpu``: everything that only a GPU can check, each part in a process of its own, since a kernel that fails
takes the process's GPU with it.

First the switches of the trainer. Then for each backend: the ops through the public functions, streams and graphs, and
its kernels by themselves; for the fused
ones compute-sanitizer's memcheck and racecheck over small shapes. Exit status 0 only when every part ran and passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from fastinvdpo import _backend, _native

ROOT = Path(__file__).parents[2]
LONGEST = 3600  # seconds a part may take
PUBLIC = ("tests/ops", "tests/gpu/test_streams.py")
TRAINER = "tests/gpu/test_performance.py"
ALONE = {"reference": (), "triton": ("tests/kernels/triton_cases.py",), "cuda": ("tests/gpu/test_cuda.py",)}


class Part(NamedTuple):
    """``command``: what to run; ``obstacle``: why it cannot be run."""

    backend: str
    what: str
    command: list[str]
    obstacle: str | None


def parts(sanitizer: str | None, extra: list[str]) -> list[Part]:
    pytest = [sys.executable, "-m", "pytest", "-q"]
    found = [
        Part("all", "doctor", [sys.executable, "-m", "fastinvdpo", "doctor"], None),
        Part("all", "trainer", [*pytest, TRAINER, *extra], None),
    ]
    for backend, alone in ALONE.items():
        obstacle = _backend.unavailable("preference_loss", backend, "cuda")
        found.append(Part(backend, "ops", [*pytest, *PUBLIC, "-k", f"{backend}-cuda", *extra], obstacle))
        if alone:
            found.append(Part(backend, "kernels", [*pytest, *alone, *extra], obstacle))
            missing = None if sanitizer else "there is no compute-sanitizer (it comes with the CUDA toolkit)"
            for tool in ("memcheck", "racecheck"):
                watched = [sanitizer or "compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
                watched += ["--target-processes=application-only", *pytest, "tests/gpu/test_streams.py"]
                watched += ["-m", "sanitizer", "-k", f"{backend}-cuda", *extra]
                found.append(Part(backend, tool, watched, obstacle or missing))
    return found


def run(part: Part) -> bool:
    """Whether the part passed."""
    print(f"\n== {part.backend}: {part.what}\n{' '.join(part.command)}", flush=True)
    environment = {
        name: value for name, value in os.environ.items() if name not in (_backend.VARIABLE, "TRITON_INTERPRET")
    }
    if part.what in ("memcheck", "racecheck"):
        # PyTorch's own allocator hands out parts of large allocations, past whose ends nobody would notice an access.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    try:
        return subprocess.run(part.command, cwd=ROOT, env=environment, timeout=LONGEST).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {LONGEST} seconds: a kernel may wait for ever")
        return False


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(str(Path(home, "bin/compute-sanitizer")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="The tests that need a GPU.")
    parser.add_argument(
        "--no-sanitizer", action="store_true", help="leave out compute-sanitizer's memcheck and racecheck"
    )
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU or driver"
        print(f"test-gpu: nothing was tested: there is no GPU (torch {torch.__version__} {built}).", file=sys.stderr)
        return 1
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {_native.build_info()}"
    )
    chosen = parts(find_sanitizer(), arguments.pytest)
    if arguments.no_sanitizer:
        chosen = [part for part in chosen if part.what not in ("memcheck", "racecheck")]
    outcomes = [(part, None if part.obstacle else run(part)) for part in chosen]

    print("\n== Summary")
    for part, passed in outcomes:
        outcome = f"NOT RUN: {part.obstacle}" if passed is None else "passed" if passed else "FAILED"
        print(f"  {part.backend + ': ' + part.what:24}{outcome}")
    everything = not arguments.no_sanitizer and not arguments.pytest
    for backend in _backend.UNPROVEN:
        if everything and all(passed for part, passed in outcomes if part.backend == backend):
            print(f"{backend} passed everything: its line in UNPROVEN, in fastinvdpo/_backend.py, can be deleted.")
    return 0 if all(passed for _, passed in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
