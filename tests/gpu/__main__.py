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
from pathlib import Path
from typing import IO, NamedTuple

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


class Running(NamedTuple):
    """``log``: where its output goes; None: to the terminal. ``start``: seconds of a clock."""

    part: Part
    process: subprocess.Popen[bytes]
    log: IO[bytes] | None
    start: float


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
    """Every part with whether it passed, as they end. What parts say side by side is shown when they end."""
    waiting, running = list(chosen), list[Running]()
    try:
        while waiting or running:
            while waiting and _may_start(waiting[0], running, jobs):
                running.append(_start(waiting.pop(0), quiet=jobs > 1))
            for each in list(running):
                late = time.monotonic() - each.start > LONGEST
                if each.process.poll() is None and not late:
                    continue
                running.remove(each)
                _end(each.process)
                _show(each)
                if late:
                    print(f"stopped after {LONGEST} seconds: a kernel may wait for ever", flush=True)
                yield each.part, not late and each.process.returncode == 0
            time.sleep(0.05)
    finally:
        for each in running:
            _end(each.process)


def _may_start(part: Part, running: Sequence[Running], jobs: int) -> bool:
    return not running or (len(running) < jobs and not part.alone and not running[0].part.alone)


def _start(part: Part, quiet: bool) -> Running:
    environment = {
        name: value for name, value in os.environ.items() if name not in (dispatch.VARIABLE, "TRITON_INTERPRET")
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    if part.what in TOOLS:
        # PyTorch's own allocator hands out parts of large allocations, past whose ends nobody would notice an access.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    print(f"== {part.backend}: {part.what} begins: {' '.join(part.command)}", flush=True)
    log = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - closed when the part has ended
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdout=log, stderr=log and subprocess.STDOUT, start_new_session=True
    )
    return Running(part, process, log, time.monotonic())


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a part is left behind, not even the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _show(ended: Running) -> None:
    print(f"\n== {ended.part.backend}: {ended.part.what}, {time.monotonic() - ended.start:.0f} s")
    if ended.log is not None:
        ended.log.seek(0)
        print(ended.log.read().decode(errors="replace"), flush=True)
        ended.log.close()


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
