"""One case measured: every provider checked against float64, then all timed side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.ops import native

from . import registry
from .measure import LARGE, Copy, Task, copies, footprint, free_memory, interleaved, percentiles, replayed
from .problem import Case, Problem

SHARE_OF_MEMORY = 0.8  # that a case may take: the rest is for the buffers of the copy and for what the estimate misses

Row = dict[str, Any]


class DoesNotFit(Exception):
    """A case needs more memory than there is."""


def measure(
    case: Case,
    modes: Sequence[str],
    providers: Sequence[str],
    *,
    device: torch.device,
    copy: Copy,
    seconds: float,
) -> tuple[list[Row], dict[str, str]]:
    """Rows for every mode and every provider that runs, and for the others why they do not.

    Raises:
        DoesNotFit: the case needs more memory than is free.
    """
    needed, free = registry.OPS[case.op].needs(case), free_memory(device)
    if free is not None and needed > SHARE_OF_MEMORY * free:
        raise DoesNotFit(f"needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    inputs = registry.OPS[case.op].inputs * case.elements * case.dtype.itemsize
    problems: list[Problem] = [registry.OPS[case.op](case, device) for _ in range(copies(inputs, device))]  # type: ignore[call-arg]
    problem = problems[0]
    reasons, errors, forwards = {}, {}, {}
    # The errors of these two are the measure for all, whoever is timed.
    for provider in dict.fromkeys(("eager", "reference", *providers)):
        reason = registry.unavailable(provider, case.op, device)
        if reason is None:
            try:
                forwards[provider] = [registry.forward(provider, each) for each in problems]
                errors[provider] = _errors(problem, forwards[provider][0], provider)
            except Exception as error:  # whatever a compiler, a driver or a kernel raises is the reason
                reason = reason_of(error)
        if reason is not None:
            reasons[provider] = reason
    timed = [provider for provider in providers if provider in errors]
    rows = []
    for mode in modes:
        tasks = {provider: _task(problems, forwards[provider], provider, mode) for provider in timed}
        rows += _rows(problems, mode, tasks, errors, device, copy, seconds)
    return rows, {provider: reason for provider, reason in reasons.items() if provider in providers}


def allowed(provider: str, errors: dict[str, dict[str, float]], problem: Problem) -> dict[str, float]:
    """The error that a provider may have: twice that of plain PyTorch in the same dtype, or what chance makes of it.

    For the released order of operations, and what a compiler makes of it, plain PyTorch is that order; for a backend of
    the op it is the op's reference, which in half precision is far more accurate.
    """
    released = provider in registry.BASELINES
    plain = errors.get("eager" if released else "reference", {})
    chance = problem.chance(released)
    return {name: max(2 * plain.get(name, 0.0), chance[name]) for name in errors[provider]}


def is_correct(errors: dict[str, float], limits: dict[str, float]) -> bool:
    return all(math.isfinite(error) and error <= limits[name] for name, error in errors.items())


def speedups(rows: Sequence[Row]) -> None:
    """Fill in ``speedup`` for the rows of one case and mode: over every baseline, but none for a wrong result."""
    medians = {row["provider"]: row["milliseconds"]["median"] for row in rows}
    for row in rows:
        over = {name: medians[name] / medians[row["provider"]] for name in registry.BASELINES if name in medians}
        row["speedup"] = over if row["correct"] else None


def _errors(problem: Problem, forward: Callable[[], tuple[Tensor, ...]], provider: str) -> dict[str, float]:
    with registry.context(provider):
        outputs = forward()
        gradients = torch.autograd.grad(outputs[0], problem.leaves, problem.cotangent)
    return {**problem.output_errors(outputs), "gradient": problem.gradient_error(gradients)}


def _task(
    problems: Sequence[Problem], forwards: Sequence[Callable[[], tuple[Tensor, ...]]], provider: str, mode: str
) -> Task:
    """Each call takes the next of the problems, which are alike."""
    context = partial(registry.context, provider)
    turns = itertools.cycle(zip(problems, forwards, strict=True))
    # What a recorded backward reads must stay where it is.
    keep = mode == "backward" and problems[0].leaves[0].is_cuda

    def forward() -> tuple[Problem, tuple[Tensor, ...]]:
        problem, call = next(turns)
        return problem, call()

    def backward(made: tuple[Problem, tuple[Tensor, ...]]) -> object:
        problem, outputs = made
        return torch.autograd.grad(outputs[0], problem.leaves, problem.cotangent, retain_graph=keep)

    if mode == "forward":
        return Task(torch.no_grad()(forward), context)
    return Task(backward, context, forward) if mode == "backward" else Task(lambda: backward(forward()), context)


def _replayed(task: Task, calls: int, device: torch.device) -> tuple[list[float], str | None]:
    """Milliseconds of every sample, and why there are none."""
    if device.type == "cpu":
        return [], None
    try:
        return [1000 * sample for sample in replayed(task, calls, device)], None
    except Exception as error:  # whatever a capture does not allow is the reason
        return [], reason_of(error)


def reason_of(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _rows(
    problems: Sequence[Problem],
    mode: str,
    tasks: dict[str, Task],
    errors: dict[str, dict[str, float]],
    device: torch.device,
    copy: Copy,
    seconds: float,
) -> list[Row]:
    problem, case = problems[0], problems[0].case
    moved = problem.moved(mode) * case.elements * case.dtype.itemsize
    seen = {}
    for provider, task in tasks.items():
        with task.context():
            task.call(*task.arguments(1)[0])  # compiles what is not compiled yet, and fills the caches of allocators
        native.release_kept_memory()  # or the call would seem to need none
        seen[provider] = footprint(task, device, visible=provider != "compile" or device.type != "cpu")
    beside = moved >= LARGE or not copy.samples
    samples = interleaved({**tasks, **({"copy": Task(copy)} if beside else {})}, device, seconds)
    copied = samples.pop("copy", [])
    copy.samples += copied
    bandwidth = copy.bandwidth(copied).median
    relevant = {"forward": ("loss", "margin", "output"), "backward": ("gradient",)}
    rows = []
    for provider, times in samples.items():
        names = relevant.get(mode, tuple(errors[provider]))
        found = {name: error for name, error in errors[provider].items() if name in names}
        limits = {name: limit for name, limit in allowed(provider, errors, problem).items() if name in found}
        milliseconds = percentiles([1000 * sample for sample in times])
        graph, no_graph = _replayed(tasks[provider], len(problems), device)
        gbps = moved / milliseconds.median / 1e6
        rows.append(
            {
                "op": case.op,
                "model": case.model,
                "shape": list(case.shape),
                "pairs": case.pairs,
                "timesteps": case.timesteps,
                "dtype": case.dtype_name,
                "mode": mode,
                "provider": provider,
                "milliseconds": milliseconds._asdict(),
                "samples": len(times),
                "copies_of_inputs": len(problems),
                "graph_milliseconds": percentiles(graph)._asdict() if graph else None,
                "no_graph": no_graph,
                "bytes": moved,
                "gbps": gbps,
                "copy_gbps": bandwidth,
                "percent_of_copy": 100 * gbps / bandwidth,
                "peak_bytes": seen[provider].peak_bytes,
                "launches": seen[provider].launches,
                "errors": {name: error if math.isfinite(error) else None for name, error in found.items()},
                "allowed": limits,
                "correct": is_correct(found, limits),
            }
        )
    speedups(rows)
    return rows
