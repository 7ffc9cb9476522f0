"""Clocks: times of several tasks side by side, the copy bandwidth, and what a profiler sees of one call."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from .live_memory import peak_bytes


class Task(NamedTuple):
    """A call to measure. ``prepare`` runs before each call, outside the clock, and returns its argument; so a backward
    gets a graph of its own. ``context`` is entered outside the clock too.
    """

    call: Callable[..., object]
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    prepare: Callable[[], object] | None = None

    def arguments(self, calls: int) -> list[tuple[object, ...]]:
        """For so many calls, each one's arguments."""
        return [() if self.prepare is None else (self.prepare(),) for _ in range(calls)]


SHORTEST_SAMPLE = 1e-3  # seconds: below it a task is repeated within a sample, for the clock's sake
SETTLING = 10e-3  # seconds of calls before a sample on the CPU: the system is still taking back what others have freed
ROTATED = 4  # times the L2: so much do the inputs hold that calls on a GPU take in turn, so that none is still there
MOST_COPIES = 64  # of small inputs, whose calls the host or the launch limits
LARGE = 32 * 2**20  # bytes: tasks that move as much leave the caches; the copy is then measured beside them

# Ops that allocate, or look at memory in another way, and launch nothing.
_NO_LAUNCH = {
    "alias", "as_strided", "chunk", "contiguous", "detach", "detach_", "empty", "empty_like", "empty_strided",
    "expand", "expand_as", "flatten", "is_floating_point", "lift_fresh", "narrow", "new_empty", "permute", "reshape",
    "resolve_conj", "resolve_neg", "result_type", "select", "slice", "split", "squeeze", "t", "to", "transpose",
    "unbind", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip


class Percentiles(NamedTuple):
    """Of a list of samples, in their unit."""

    median: float
    p20: float
    p80: float


def percentiles(samples: Sequence[float]) -> Percentiles:
    """Median, and the 20th and 80th percentile, interpolated between neighbors."""
    if len(samples) == 1:
        return Percentiles(*[samples[0]] * 3)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Percentiles(statistics.median(samples), fifths[0], fifths[3])


def timed(task: Task, repetitions: int, device: torch.device) -> float:
    """Seconds that one call takes, from the host's clock or from CUDA events.

    Others go before, off the clock: caches and freed memory are then as the task itself leaves them, not as whoever ran
    before it did.
    """
    with task.context():
        start = time.perf_counter()
        while device.type == "cpu" and time.perf_counter() - start < SETTLING:
            task.call(*task.arguments(1)[0])
        first, *prepared = task.arguments(repetitions + 1)
        task.call(*first)
        del first
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)  # or the launches would hide behind the preparations
            begin.record()
            for arguments in prepared:
                task.call(*arguments)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1000 / repetitions
        start = time.perf_counter()
        for arguments in prepared:
            task.call(*arguments)
        return (time.perf_counter() - start) / repetitions


def interleaved(
    tasks: Mapping[str, Task], device: torch.device, seconds: float, rounds: int = 7, most: int = 200
) -> dict[str, list[float]]:
    """Samples of every task, one of each in turn, so that whatever else the machine does hits all alike.

    Args:
        tasks: what to time; each has been called before.
        seconds: stop after the round that ends later than this,
        rounds: but never before so many rounds,
        most: nor after more than these.

    Returns:
        For every task, seconds a call took, in the order of the rounds.
    """
    repetitions = {}
    for name, task in tasks.items():
        fastest = min(timed(task, 1, device) for _ in range(3))
        repetitions[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(fastest, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(most):
            if done >= rounds and time.perf_counter() - start > seconds:
                break
            for name in random.Random(done).sample(names, len(names)):  # nobody always runs after the same neighbor
                samples[name].append(timed(tasks[name], repetitions[name], device))
    finally:
        if collecting:
            gc.enable()
    return samples


def copies(size: int, device: torch.device) -> int:
    """How many inputs of so many bytes calls take in turn. On the CPU one: small inputs stay in the caches there."""
    if device.type == "cpu":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_COPIES, math.ceil(ROTATED * cache / size)))


def replayed(task: Task, calls: int, device: torch.device) -> list[float]:
    """Seconds that a call takes on a GPU alone: so many are recorded in a CUDA graph, with results of their own, and
    replayed.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with task.context():
        with torch.cuda.stream(stream):  # a backward runs on the stream of its forward, which must be the recorded one
            task.call(*task.arguments(1)[0])  # kernels are loaded at their first launch
            arguments = task.arguments(calls)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = [task.call(*each) for each in arguments]
        samples = interleaved({"graph": Task(graph.replay)}, device, seconds=0.0)["graph"]
    del kept
    return [sample / calls for sample in samples]


class Copy:
    """A copy between two buffers far larger than any cache: the bandwidth that memory can give."""

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self.size = size or (2**30 if device.type == "cuda" else 2**28)
        self._source = torch.ones(self.size // 4, device=device)
        self._target = torch.empty_like(self._source)
        self.samples: list[float] = []

    def __call__(self) -> None:
        self._target.copy_(self._source)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return 2 * self.size

    def bandwidth(self, samples: Sequence[float] = ()) -> Percentiles:
        """GB/s over the samples given, or over all so far."""
        return percentiles([self.bytes / sample / 1e9 for sample in samples or self.samples])


class Footprint(NamedTuple):
    """Of one call: launches (None where they cannot be seen), and the most memory held beyond what was held before."""

    launches: int | None
    peak_bytes: int | None


def footprint(task: Task, device: torch.device, visible: bool = True) -> Footprint:
    """Profile one call. On a GPU, launches are kernels, copies and fills; on the CPU, ops that do work.

    Args:
        visible: False for compiled code on the CPU, whose loops are no ops and cannot be counted.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise announces each of its starts
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with task.context():
        first, second = task.arguments(2)
        if on_gpu:
            peak = peak_bytes(lambda: task.call(*first), device)
            torch.cuda.synchronize(device)
        with profile(activities=activities, profile_memory=not on_gpu) as recorded:
            task.call(*second)
            if on_gpu:
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    if on_gpu:
        return Footprint(sum(event.get("cat") in _ON_DEVICE for event in events), peak)
    return Footprint(_leaves(events) if visible else None, _peak(events))


_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


def _leaves(events: list[dict[str, Any]]) -> int:
    """Ops that do work and call no other op that does."""
    ops = [event for event in events if event.get("cat") == "cpu_op" and event["name"].count("::") == 1]
    ops = [event for event in ops if event["name"].partition("::")[2] not in _NO_LAUNCH]
    ops.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    leaves = 0
    for event, following in zip(ops, [*ops[1:], None], strict=True):
        ends = event["ts"] + event["dur"]
        leaves += following is None or following["tid"] != event["tid"] or following["ts"] >= ends
    return leaves


def _peak(events: list[dict[str, Any]]) -> int:
    changes = [event for event in events if event["name"] == "[memory]"]
    held = highest = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        highest = max(highest, held)
    return highest


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
