"""A whole training step (forward, backward, clipping, optimiser): this package's trainer against the released order.

``fastinvdpo bench step``, or ``python -m benchmarks.bench_step`` in a checkout. Every provider makes the same steps of
the same pairs with the same random numbers, one step each in turn, and its gradient is first held to that of the
released order. Costs are counted as in ``fastinvdpo/trainer/accounting.py``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, MissingExtra, invalid
from fastinvdpo.methods import METHODS
from fastinvdpo.trainer.accounting import Costs, forward_flops, peak_flops

from . import results
from .live_memory import peak_bytes
from .measure import percentiles
from .step_models import SIZES
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
    build_case,
)

ALLOWED = 6e-4
"""Distance of two float32 gradients, relative: each may miss the exact one by the 3e-4 that the recorded runs allow."""
WORST = 0.5
"""Half precision is held to float32, at twice what the released order misses there; but never beyond this."""
PEAK_SIZE = {"cuda": 8192, "cpu": 2048}

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure training steps. Returns 0; 1 when a gradient was wrong; 2 for bad usage."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except (InvalidInput, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastinvdpo bench step",
        description="Measure whole training steps of this package's trainer beside the order of the released codes.",
    )
    parser.add_argument("--size", default="tiny", help="tiny (5.7 M parameters), or on a GPU sd15 or sdxl")
    parser.add_argument("--method", default=",".join(METHODS), help="of these, comma-separated")
    names = dict.fromkeys(name for providers in (PEERS, *OURS.values()) for name in providers)
    parser.add_argument("--providers", default=",".join(names), help="of these, comma-separated")
    parser.add_argument("--pairs", type=int, default=None, help="a step (inversion-dpo: 1, others: 4)")
    parser.add_argument("--num-inference-steps", type=int, default=None, help="N of the inversion, for all methods")
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed steps of every provider; 0 measures the rest alone"
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="of the trainer's configuration, as in training.max_batch=4; may be repeated",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of the JSON")
    parser.add_argument("--compare", type=Path, default=None, metavar="OTHER.json", help="show what changed since")
    return parser


def _run(options: argparse.Namespace) -> int:
    from . import report

    console = require("rich.console", extra="train", purpose="the benchmark's output").Console()
    if not console.is_terminal:
        console.width = 160
    other = results.read(options.compare) if options.compare else None
    if other is not None and not options.rounds:
        raise invalid(
            "--compare", str(options.compare), "has times, and --rounds 0 takes none", "leave one of them out"
        )
    methods = _chosen("--method", options.method, METHODS)
    providers = _chosen("--providers", options.providers, [*PEERS, *{name for of in OURS.values() for name in of}])
    _check_size(options.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {**results.origin(device), "skipped": [], "results": [], "copy_gbps": None, "unavailable": {}}
    result["settings"] = {"overrides": options.override, "rounds": options.rounds, "providers": providers}
    for method in methods:
        pairs = options.pairs or (1 if METHODS[method].whole_chain else 4)
        with tempfile.TemporaryDirectory() as folder:
            steps = options.num_inference_steps
            case = build_case(options.size, method, pairs, options.override, Path(folder), steps)
            rows = measure(case, providers, options.rounds)
        title = f"{method} {case.size} pairs={pairs} N={case.timesteps} {rows[0]['dtype']}"
        console.print(f"[bold]{title}[/bold]", highlight=False)
        console.print(table(rows))
        result["results"] += rows
    console.print(f"peak of a matrix product: {rows[0]['peak_flops'] / 1e9:.0f} GFLOP/s", highlight=False)
    path = results.write(result, options.output, "step-")
    if other is not None:
        console.print(report.comparison(results.compare(result, other), result, other))
    console.print(f"Results: {path}", highlight=False, soft_wrap=True)
    return 0 if all(row["correct"] for row in result["results"]) else 1


def measure(case: StepCase, names: Sequence[str], rounds: int) -> list[Row]:
    """A row for every provider of the case that ``names`` has: gradient, memory, and times in turn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "variant 'distance'")  # it is here for comparison
        trainer = Trainer(case)
        try:
            return _measure(case, trainer, names, rounds)
        finally:
            trainer.run.builder.close()
            trainer.run.reporter.close()


def _measure(case: StepCase, trainer: Trainer, names: Sequence[str], rounds: int) -> list[Row]:
    device, dtype = trainer.device, case.autocast or torch.float32
    networks = ReleasedNetworks(case, device)
    providers: list[Provider] = [Released(name, case, networks, trainer.batch) for name in PEERS if name in names]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "variant 'distance'")
        providers += [Ours(name, trainer) for name in OURS[case.method] if name in names]
    if not providers:
        raise invalid("--providers", list(names), f"none makes steps of {case.method}", "leave it out")
    forward, peak = forward_flops(trainer.forward), peak_flops(device, dtype, PEAK_SIZE[device.type])
    errors = _gradient_errors(providers, networks)
    for each in providers:
        each.warm_up()
    memory = {each.name: peak_bytes(lambda each=each: each.step(each.prepare(0)), device) for each in providers}
    samples, evaluations = side_by_side(providers, rounds, device)
    rows = []
    for each in providers:
        comparable = each.name not in OTHER_OBJECTIVE and errors[each.name] is not None
        error = errors[each.name]
        allowed = ALLOWED if case.autocast is None else min(WORST, 2 * (errors["released"] or 0.0))
        costs = Costs(each.gradient_factor * forward, forward, peak)
        row: Row = {
            "op": "step",
            "model": case.size,
            "mode": case.method,
            "pairs": case.pairs,
            "timesteps": case.timesteps,
            "dtype": str(dtype).removeprefix("torch."),
            "provider": each.name,
            "samples": rounds,
            "peak_bytes": memory[each.name],
            "max_batch": trainer.run.state.max_batch if isinstance(each, Ours) else None,
            "same_objective": comparable,
            "gradient_error": error if comparable and error is not None and math.isfinite(error) else None,
            "allowed": allowed if comparable else None,
            "correct": not comparable or (error is not None and error <= allowed),
            "peak_flops": peak,
        }
        if rounds:
            times = samples[each.name]
            counted = evaluations[each.name]
            row["milliseconds"] = percentiles([1000 * time for time in times])._asdict()
            seconds = rounds * row["milliseconds"]["median"] / 1000
            row |= costs.row(counted, pairs=rounds * case.pairs, seconds=seconds)
        rows.append(row)
    speedups(rows)
    return rows


def _gradient_errors(providers: Sequence[Provider], networks: ReleasedNetworks) -> dict[str, float | None]:
    """How far every gradient is from that of the released order, in half precision from that order in float32; None:
    it is one of other parameters.
    """
    released = next((each for each in providers if isinstance(each, Released)), None)
    if released is None:
        raise invalid("--providers", [each.name for each in providers], "has nothing to compare with", "add released")
    first = released.prepare(0)
    exact = networks.float32_gradient(first) if networks.autocast else released.gradient(first)
    errors = {each.name: relative(each.gradient(each.prepare(0)), exact) for each in providers}
    return {**errors, "released": errors[released.name]}


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float | None:
    """The error of a gradient as one vector; NaN counts as infinite; None for other parameters (adapters)."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in exact]:
        return None
    squares = [((f.double() - e.double()).square().sum(), e.double().square().sum()) for f, e in
               zip(found, exact, strict=True)]  # fmt: skip
    missed, size = (float(torch.stack(parts).sum()) for parts in zip(*squares, strict=True))
    error = math.sqrt(missed / size) if size > 0 else math.inf
    return error if math.isfinite(error) else math.inf


def side_by_side(
    providers: Sequence[Provider], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Seconds of every step, and the network evaluations of all; round by round, each starting with another one."""
    samples: dict[str, list[float]] = {each.name: [] for each in providers}
    evaluations = {each.name: {"with_gradient": 0, "without_gradient": 0} for each in providers}
    for number in range(rounds):
        shift = number % len(providers)
        for each in [*providers[shift:], *providers[:shift]]:
            prepared, before = each.prepare(number), each.evaluations
            _wait(device)
            start = time.perf_counter()
            each.step(prepared)
            _wait(device)
            samples[each.name].append(time.perf_counter() - start)
            for kind, count in each.evaluations.items():
                evaluations[each.name][kind] += count - before[kind]
    return samples, evaluations


def speedups(rows: Sequence[Row]) -> None:
    """Fill in ``speedup`` and ``memory_ratio`` over the released steps; None for a wrong or another gradient."""
    peers = {row["provider"]: row for row in rows if row["provider"] in PEERS}
    for row in rows:
        comparable = row["correct"] and row["same_objective"]
        over = {name: peer for name, peer in peers.items() if name != row["provider"] and peer["correct"]}
        row["speedup"] = row["memory_ratio"] = None
        if comparable and row["provider"] not in PEERS:
            row["memory_ratio"] = {name: peer["peak_bytes"] / row["peak_bytes"] for name, peer in over.items()}
            if "milliseconds" in row:
                mine = row["milliseconds"]["median"]
                row["speedup"] = {name: peer["milliseconds"]["median"] / mine for name, peer in over.items()}


def table(rows: Sequence[Row]) -> Any:
    """A rich table of one case."""
    shown = require("rich.table", extra="train", purpose="the table of results").Table(
        box=None, header_style="dim", padding=(0, 2, 0, 0)
    )
    shown.add_column("provider")
    for header in _COLUMNS:
        shown.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*_cells(row), style=None if row["correct"] else "red")
    return shown


_COLUMNS = ("ms/step", "p20-p80", "pairs/s", "evals/pair grad", "no grad", "TFLOP/pair", "MFU %", "peak MB",
            "max batch", "gradient error", "vs released", "vs checkpointed", "memory")  # fmt: skip


def _cells(row: Row) -> list[str]:
    timed = "milliseconds" in row
    cells = [row["provider"]]
    if timed:
        times = row["milliseconds"]
        cells += [f"{times['median']:.0f}", f"{times['p20']:.0f}-{times['p80']:.0f}", f"{row['pairs_per_second']:.3g}"]
        cells += [f"{row[f'evaluations_per_pair_{kind}']:.4g}" for kind in ("with_gradient", "without_gradient")]
        cells += [f"{row['model_flops_per_pair'] / 1e12:.3g}", f"{100 * row['mfu']:.0f}"]
    else:
        cells += [""] * 7
    cells += [f"{row['peak_bytes'] / 1e6:.0f}", "" if row["max_batch"] is None else str(row["max_batch"])]
    if not row["same_objective"]:
        return [*cells, "other objective", "", "", ""]
    error = row["gradient_error"]
    cells.append("not finite" if error is None else f"{error:.0e}")
    if not row["correct"]:
        return [*cells, "wrong", "", ""]
    over = row["speedup"] or {}
    cells += [f"{over[name]:.2f}x" if name in over else "" for name in PEERS]
    ratio = (row["memory_ratio"] or {}).get("released")
    return [*cells, "" if ratio is None else f"{ratio:.1f}x"]


def _chosen(option: str, text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise invalid(option, name, "is not known", f"choose from {', '.join(known)}")
    return names


def _check_size(size: str) -> None:
    if size not in SIZES:
        raise invalid("--size", size, "is not known", f"choose from {', '.join(SIZES)}")
    if SIZES[size].gpu and not torch.cuda.is_available():
        raise invalid("--size", size, "takes hours a step on a CPU", "use tiny here, or a machine with a GPU")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
