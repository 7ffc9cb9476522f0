"""One case of training steps measured: gradients compared, memory, and times; results are printed after every step.

Both sides, the released order and this package, are held at once and step in turn where they fit; elsewhere
(:attr:`benchmarks.step_models.Size.in_turn`) the released one is measured first and freed, but for its gradient.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.trainer.accounting import Costs, forward_flops, peak_flops

from .live_memory import peak_bytes
from .measure import percentiles
from .step_models import SIZES, RandomModel
from .step_providers import (
    OTHER_OBJECTIVE,
    OURS,
    PEERS,
    Ours,
    Provider,
    Released,
    ReleasedNetworks,
    StepCase,
    Trainer,
)

ALLOWED = 6e-4
"""Distance of two float32 gradients, relative: each may miss the exact one by the 3e-4 that the recorded runs allow."""
WORST = 0.5
"""Half precision is held to float32, at twice what the released order misses there; but never beyond this."""
PEAK_SIZE = {"cuda": 8192, "cpu": 2048}

Row = dict[str, Any]
Keep = Callable[[list[Row]], None]


def measure(case: StepCase, names: Sequence[str], rounds: int, keep: Keep = lambda rows: None) -> list[Row]:
    """A row for every provider of the case that ``names`` has. ``keep`` gets the rows so far after every step."""
    released = [name for name in PEERS if name in names]
    ours = [name for name in OURS[case.method] if name in names]
    if not released:
        what = "has nothing to compare with" if ours else f"none makes steps of {case.method}"
        raise invalid("--providers", list(names), what, "add released")
    measured = Measurement(case, rounds, keep)
    for names_held in [released + ours] if SIZES[case.size].in_turn else [released, ours]:
        measured.side(names_held)
        _free()  # after the call, which held the networks
    return measured.rows()


@dataclass
class Found:
    """What is known of a provider so far. ``failure``: what it ran out of memory in; ``times``: seconds of steps."""

    name: str
    gradient_factor: int = 0
    max_batch: int | None = None
    forward: float = 0.0
    error: float | None = None
    memory: int | None = None
    failure: str | None = None
    times: list[float] = field(default_factory=list)
    evaluations: dict[str, int] = field(default_factory=lambda: {"with_gradient": 0, "without_gradient": 0})


class Measurement:
    """Of one case. ``exact``: the gradient that the others are held to, on the host; None until there is one."""

    def __init__(self, case: StepCase, rounds: int, keep: Keep) -> None:
        self.case, self.rounds, self._keep = case, rounds, keep
        self.dtype = case.autocast or torch.float32
        self.found: dict[str, Found] = {}
        self.exact: list[Tensor] | None = None
        self.allowed: float | None = ALLOWED if case.autocast is None else None
        self.peak = 0.0

    def side(self, names: Sequence[str]) -> None:
        """Everything of these providers, which are held together."""
        self.found |= {name: Found(name) for name in names}
        if not names:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "variant 'distance'")  # it is here for comparison
            with self._watch(names, "a network"):
                trainer = Trainer(self.case)
                try:
                    self._measure(names, trainer)
                finally:
                    trainer.close()

    def rows(self) -> list[Row]:
        """Of the providers that made a step, or could not."""
        known = [found for found in self.found.values() if found.memory is not None or found.failure is not None]
        rows = [self._row(found) for found in known]
        speedups(rows)
        return rows

    def _measure(self, names: Sequence[str], trainer: Trainer) -> None:
        self.peak = self.peak or peak_flops(trainer.device, self.dtype, PEAK_SIZE[trainer.device.type])
        providers = self._providers(names, trainer)
        for each in providers:
            self._gradient(each)
        for each in self._able(providers):
            self._memory(each, trainer.device)
        for number in range(self.rounds):
            self._round(self._able(providers), number, trainer.device)

    def _providers(self, names: Sequence[str], trainer: Trainer) -> list[Provider]:
        """Those that could be built."""
        released, ours = ([name for name in names if (name in PEERS) == peers] for peers in (True, False))
        providers: list[Provider] = []
        with self._watch(released, "its networks"):
            if released:
                model = RandomModel(SIZES[self.case.size]) if ours else trainer.model
                networks = ReleasedNetworks(self.case, model, trainer.device)
                providers += [Released(name, self.case, networks, trainer.batch) for name in released]
        with self._watch(ours, "its networks"):
            if ours:
                trainer.set_up()
        for name in ours:
            if self.found[name].failure is None:
                with self._watch([name], "its inputs"):
                    providers.append(Ours(name, trainer))
        for each in providers:
            found = self.found[each.name]
            found.gradient_factor, found.max_batch = each.gradient_factor, each.max_batch
            with self._watch([each.name], "a forward"):
                found.forward = forward_flops(each.forward)
        return self._able(providers)

    def _gradient(self, each: Provider) -> None:
        """That of the weights at the start, against the released order; in half precision against it in float32. The
        first released step that has one sets the measure.
        """
        found = self.found[each.name]
        with self._watch([each.name], "its gradient", each):
            gradient = each.gradient(each.prepare(0))
            if self.exact is None and isinstance(each, Released):
                gradient = [tensor.cpu() for tensor in gradient]
                self.exact = gradient if self.case.autocast is None else self._float32_gradient(each)
                found.error = relative(gradient, self.exact)
                if self.case.autocast is not None and found.error is not None:
                    self.allowed = min(WORST, 2 * found.error)
            else:
                found.error = relative(gradient, self.exact or [])
            differs = "not compared" if found.error is None else f"differs by {found.error:.0e}"
            self._tell(f"{each.name}: gradient {differs}")

    def _float32_gradient(self, released: Released) -> list[Tensor]:
        """On the host; empty where it does not fit, and then nothing is compared."""
        with self._watch([], "the float32 gradient", released):
            return [tensor.cpu() for tensor in released.float32_gradient(released.prepare(0))]
        return []

    def _memory(self, each: Provider, device: torch.device) -> None:
        with self._watch([each.name], "a step", each):
            each.warm_up()
            self.found[each.name].memory = peak_bytes(lambda: each.step(each.prepare(0)), device)
            self._tell(f"{each.name}: a step holds {(self.found[each.name].memory or 0) / 1e6:.0f} MB at most")
        self._keep(self.rows())

    def _round(self, providers: Sequence[Provider], number: int, device: torch.device) -> None:
        """A step of each, timed; every round starts with another one."""
        shift = number % max(1, len(providers))
        for each in [*providers[shift:], *providers[:shift]]:
            found = self.found[each.name]
            with self._watch([each.name], "a step", each):
                prepared, before = each.prepare(number), each.evaluations
                _wait(device)
                start = time.perf_counter()
                each.step(prepared)
                _wait(device)
                found.times.append(time.perf_counter() - start)
                for kind, count in each.evaluations.items():
                    found.evaluations[kind] += count - before[kind]
                self._tell(f"{each.name}: step {number + 1} of {self.rounds} took {found.times[-1]:.3g} s")
            self._keep(self.rows())

    def _able(self, providers: Sequence[Provider]) -> list[Provider]:
        return [each for each in providers if self.found[each.name].failure is None]

    @contextmanager
    def _watch(self, names: Sequence[str], what: str, provider: Provider | None = None) -> Iterator[None]:
        """Running out of memory is the result of these providers, and no reason to stop."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = f"out of memory in {what}: {str(error).strip().partition(chr(10))[0][:200]}"
        else:
            return
        self._tell(f"{', '.join(names) or 'comparison'}: {reason}")
        for name in names:
            self.found[name].failure = reason
        for parameter in () if provider is None else provider.parameters:
            parameter.grad = None
        _free()
        self._keep(self.rows())

    def _tell(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def _row(self, found: Found) -> Row:
        case, failed = self.case, found.failure is not None
        judged = bool(self.exact) and self.allowed is not None
        same = found.name not in OTHER_OBJECTIVE and (failed or not judged or found.error is not None)
        correct = None
        if not failed and (judged or not same):
            correct = not same or (found.error or 0.0) <= (self.allowed or 0.0)
        row: Row = {
            "op": "step",
            "model": case.size,
            "mode": case.method,
            "pairs": case.pairs,
            "timesteps": case.timesteps,
            "dtype": str(self.dtype).removeprefix("torch."),
            "provider": found.name,
            "sides": "in turn" if SIZES[case.size].in_turn else "one at a time",
            "samples": len(found.times),
            "failure": found.failure,
            "peak_bytes": found.memory,
            "max_batch": found.max_batch,
            "same_objective": same,
            "gradient_error": found.error if same and found.error is not None and math.isfinite(found.error) else None,
            "allowed": self.allowed if same and judged else None,
            "correct": correct,
            "peak_flops": self.peak,
        }
        if found.times:
            row["milliseconds"] = percentiles([1000 * seconds for seconds in found.times])._asdict()
            costs = Costs(found.gradient_factor * found.forward, found.forward, self.peak)
            steps = len(found.times)
            seconds = steps * row["milliseconds"]["median"] / 1000
            row |= costs.row(found.evaluations, pairs=steps * case.pairs, seconds=seconds)
        return row


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float | None:
    """The error of a gradient as one vector; NaN counts as infinite; None for other parameters (adapters)."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in exact]:
        return None
    missed = size = 0.0
    for one, other in zip(found, exact, strict=True):
        wide = other.to(one.device).double()
        missed += float((one.double() - wide).square().sum())
        size += float(wide.square().sum())
    error = math.sqrt(missed / size) if size > 0 else math.inf
    return error if math.isfinite(error) else math.inf


def speedups(rows: Sequence[Row]) -> None:
    """Fill in ``speedup`` and ``memory_ratio`` over the released steps; None for a wrong or another gradient."""
    peers = {row["provider"]: row for row in rows if row["provider"] in PEERS and row["correct"]}
    for row in rows:
        row["speedup"] = row["memory_ratio"] = None
        if row["correct"] and row["same_objective"] and row["provider"] not in PEERS and row["peak_bytes"]:
            held = {name: peer["peak_bytes"] for name, peer in peers.items() if peer["peak_bytes"]}
            row["memory_ratio"] = {name: size / row["peak_bytes"] for name, size in held.items()}
            if "milliseconds" in row:
                mine = row["milliseconds"]["median"]
                timed = {name: peer for name, peer in peers.items() if "milliseconds" in peer}
                row["speedup"] = {name: peer["milliseconds"]["median"] / mine for name, peer in timed.items()}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
