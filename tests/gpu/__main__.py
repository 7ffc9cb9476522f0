"""``make test-gpu``: everything that only a GPU can check, each part in a process of its own, since a kernel that fails
takes the process's GPU with it.

First the switches of the trainer. Then for each backend: the ops through the public functions, streams and graphs, and
its kernels by themselves; for the fused ones compute-sanitizer's memcheck and racecheck over small launches, and more
elements than 32 bits count. Exit status 0 only when every part ran and passed. ``python -m tests.gpu`` needs torch,
triton, numpy and pytest; the trainer's part needs the train extra, and is said to be missing without it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from fastinvdpo.ops import dispatch, native

ROOT = Path(__file__).parents[2]
LONGEST = 3600  # seconds a part may take
PUBLIC = ("tests/ops", "tests/gpu/test_streams.py")
TRAINER = "tests/gpu/test_performance.py"
ALONE = {"reference": (), "triton": ("tests/kernels/triton_cases.py",), "cuda": ("tests/gpu/test_cuda.py",)}
HUGE = "32_bits or Beyond32Bits"  # what needs 24 GiB of the GPU for itself
TOOLS = ("memcheck", "racecheck")
# Failed calls of the driver are no finding: PyTorch asks some of them in order to learn what there is.
WATCH = ("--error-exitcode=9", "--report-api-errors=no", "--target-processes=application-only")


class Part(NamedTuple):
    """``command``: what to run; ``obstacle``: why it cannot be run; ``alone``: nothing may run beside it."""

    backend: str
    what: str
    command: list[str]
    obstacle: str | None
    alone: bool = False


def parts(sanitizer: str | None, extra: list[str], processes: int = 1) -> list[Part]:
    """What is run, the slowest first. ``processes``: of each call of pytest; above one it needs pytest-xdist."""
    pytest = [sys.executable, "-m", "pytest", "-q"]
    spread = [*pytest, *(["-n", str(processes)] if processes > 1 else [])]
    without = [name for name in ("pydantic", "diffusers", "accelerate") if importlib.util.find_spec(name) is None]
    missing = f"{', '.join(without)} missing: pip install 'fastinvdpo[train]'" if without else None
    found, last = [Part("all", "trainer", [*spread, TRAINER, *extra], missing)], []
    for backend, alone in ALONE.items():
        obstacle = dispatch.unavailable("preference_loss", backend, "cuda")
        if alone:
            no_tool = None if sanitizer else "there is no compute-sanitizer (it comes with the CUDA toolkit)"
            for tool in TOOLS:
                watched = [sanitizer or "compute-sanitizer", f"--tool={tool}", *WATCH]
                watched += [sys.executable, "-m", "tests.gpu.sanitized", backend]
                found.append(Part(backend, tool, watched, obstacle or no_tool))
            found.append(Part(backend, "kernels", [*spread, *alone, "-k", f"not ({HUGE})", *extra], obstacle))
            last.append(Part(backend, "huge", [*pytest, *alone, "-k", HUGE, *extra], obstacle, alone=True))
        found.append(Part(backend, "ops", [*spread, *PUBLIC, "-k", f"{backend}-cuda", *extra], obstacle))
    found.append(Part("all", "doctor", [sys.executable, "-m", "fastinvdpo", "doctor"], None))
    return found + last


def run(chosen: Sequence[Part], jobs: int) -> Iterator[tuple[Part, bool]]:
    """Every part with whether it passed, as they end. What parts print side by side is shown when they end."""
    running: set[subprocess.Popen[bytes]] = set()

    def passed(part: Part) -> bool:
        print(f"== {part.backend}: {part.what} begins: {' '.join(part.command)}", flush=True)
        begin = time.monotonic()
        with tempfile.TemporaryFile() if jobs > 1 else contextlib.nullcontext() as log:
            errors = None if log is None else subprocess.STDOUT
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=_environment(part), stdout=log, stderr=errors, start_new_session=True
            )
            running.add(process)
            late = False
            try:
                process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                late = True
            _end(process)
            running.discard(process)
            lines = [f"\n== {part.backend}: {part.what}, {time.monotonic() - begin:.0f} s"]
            if log is not None:
                log.seek(0)
                lines.append(log.read().decode(errors="replace"))
            if late:
                lines.append(f"stopped after {LONGEST} seconds: a kernel may wait for ever")
            print("\n".join(lines), flush=True)
        return not late and process.returncode == 0

    pool = ThreadPoolExecutor(jobs)
    try:
        beside = {pool.submit(passed, part): part for part in chosen if not part.alone}
        for future in as_completed(beside):
            yield beside[future], future.result()
        yield from ((part, passed(part)) for part in chosen if part.alone)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            _end(process)


def _environment(part: Part) -> dict[str, str]:
    chosen_outside = (dispatch.VARIABLE, "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in chosen_outside}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if part.what in TOOLS:
        # PyTorch's own allocator hands out parts of large allocations, past whose ends nobody would notice an access.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return environment


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a part is left behind, not even the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(str(Path(home, "bin/compute-sanitizer")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="The tests that need a GPU.")
    parser.add_argument("--no-sanitizer", action="store_true", help=f"leave out compute-sanitizer's {', '.join(TOOLS)}")
    cores = min(16, len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--jobs", type=int, default=cores, help=f"processes side by side (here {cores}); each holds memory of the GPU"
    )
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs = {arguments.jobs}: is below 1")
    if not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU or driver"
        print(f"test-gpu: nothing was tested: there is no GPU (torch {torch.__version__} {built}).", file=sys.stderr)
        return 1
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {native.build_info()}"
    )
    # The parts that pytest runs are six; one of the others is about as long as one process of these.
    processes = max(1, arguments.jobs // 6) if importlib.util.find_spec("xdist") else 1
    chosen = parts(find_sanitizer(), arguments.pytest, processes)
    if arguments.no_sanitizer:
        chosen = [part for part in chosen if part.what not in TOOLS]
    outcomes: list[tuple[Part, bool | None]] = [(part, None) for part in chosen if part.obstacle]
    outcomes += run([part for part in chosen if not part.obstacle], arguments.jobs)

    print("\n== Summary")
    for part, passed in sorted(outcomes, key=lambda outcome: chosen.index(outcome[0])):
        outcome = f"NOT RUN: {part.obstacle}" if passed is None else "passed" if passed else "FAILED"
        print(f"  {part.backend + ': ' + part.what:24}{outcome}")
    everything = not arguments.no_sanitizer and not arguments.pytest
    for backend in dispatch.UNPROVEN:
        if everything and all(passed for part, passed in outcomes if part.backend == backend):
            print(f"{backend} passed everything: its line in UNPROVEN, in fastinvdpo/ops/dispatch.py, can be deleted.")
    return 0 if all(passed for _, passed in outcomes) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # parts end with this process, whoever ends it
    sys.exit(main())
