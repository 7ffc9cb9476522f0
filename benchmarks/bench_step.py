"""A whole training step (forward, backward, clipping, optimizer): this package's trainer against the released order.

``fastinvdpo bench step``, or ``python -m benchmarks.bench_step`` in a checkout. Every provider makes the same steps of
the same pairs with the same random numbers, and its gradient is first held to that of the released order. What is known
is written after every step. Costs are counted as in ``fastinvdpo/trainer/accounting.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastinvdpo.errors import InvalidInput, MissingExtra, invalid
from fastinvdpo.methods import METHODS

from . import report, results
from .step_measure import Row, measure
from .step_models import SIZES
from .step_providers import OURS, PEERS, build_case

QUICK_METHODS = "diffusion-dpo,inversion-dpo"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure training steps. Returns 0; 1 when a gradient was wrong, or none could be compared; 2 for bad usage."""
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
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_METHODS}; one pair, N = 2, two rounds, where nothing else is said"
    )
    parser.add_argument("--method", default=None, help=f"of {','.join(OURS)} (all)")
    names = dict.fromkeys(name for providers in (PEERS, *OURS.values()) for name in providers)
    parser.add_argument("--providers", default=",".join(names), help="of these, comma-separated")
    parser.add_argument("--pairs", type=int, default=None, help="a step (inversion-dpo: 1, others: 4)")
    parser.add_argument("--num-inference-steps", type=int, default=None, help="N of the inversion, for all methods")
    parser.add_argument(
        "--rounds", type=int, default=None, help="timed steps of every provider (5); 0 measures the rest alone"
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
    quick = options.quick
    rounds = (2 if quick else 5) if options.rounds is None else options.rounds
    steps = options.num_inference_steps or (2 if quick else None)
    other = results.read(options.compare) if options.compare else None
    if other is not None and not rounds:
        raise invalid(
            "--compare", str(options.compare), "has times, and --rounds 0 takes none", "leave one of them out"
        )
    methods = _chosen("--method", options.method or (QUICK_METHODS if quick else ",".join(OURS)), OURS)
    providers = _chosen("--providers", options.providers, [*PEERS, *{name for of in OURS.values() for name in of}])
    _check_size(options.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {**results.origin(device), "skipped": [], "results": [], "copy_gbps": None, "unavailable": {}}
    result["settings"] = {"overrides": options.override, "rounds": rounds, "providers": providers}

    def keep(rows: list[Row]) -> None:
        results.write({**result, "results": [*result["results"], *rows]}, options.output, "step-")

    for method in methods:
        pairs = options.pairs or (1 if quick or METHODS[method].whole_chain else 4)
        with tempfile.TemporaryDirectory() as folder:
            case = build_case(options.size, method, pairs, options.override, Path(folder), steps)
            title = f"{method} {case.size} pairs={pairs} N={case.timesteps}"
            print(title, file=sys.stderr, flush=True)
            rows = measure(case, providers, rounds, keep)
        result["results"] += rows
        print(f"{title} {rows[0]['dtype']}, sides {rows[0]['sides']}\n{table(rows)}\n", flush=True)
    print(f"peak of a matrix product: {rows[0]['peak_flops'] / 1e9:.0f} GFLOP/s")
    path = results.write(result, options.output, "step-")
    if other is not None:
        print(report.comparison(results.compare(result, other), result, other))
    print(f"Results: {path}")
    compared = {row["correct"] for row in result["results"] if row["same_objective"]}
    return 0 if True in compared and False not in compared else 1


def table(rows: Sequence[Row]) -> str:
    """Of one case."""
    return report.table(("provider", *_COLUMNS), map(_cells, rows))


_COLUMNS = ("ms/step", "p20-p80", "pairs/s", "evals/pair grad", "no grad", "TFLOP/pair", "MFU %", "peak MB",
            "max batch", "gradient error", "vs released", "vs checkpointed", "memory")  # fmt: skip


def _cells(row: Row) -> list[str]:
    cells = [row["provider"], *[""] * 7]
    if "milliseconds" in row:
        times = row["milliseconds"]
        cells[1:4] = (
            f"{times['median']:.0f}",
            f"{times['p20']:.0f}-{times['p80']:.0f}",
            f"{row['pairs_per_second']:.3g}",
        )
        cells[4:6] = (f"{row[f'evaluations_per_pair_{kind}']:.4g}" for kind in ("with_gradient", "without_gradient"))
        cells[6:8] = f"{row['model_flops_per_pair'] / 1e12:.3g}", f"{100 * row['mfu']:.0f}"
    cells.append("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}")
    cells.append("" if row["max_batch"] is None else str(row["max_batch"]))
    over, ratio = row["speedup"] or {}, (row["memory_ratio"] or {}).get("released")
    cells.append(_verdict(row))
    cells += [f"{over[name]:.2f}x" if name in over else "" for name in PEERS]
    return [*cells, "" if ratio is None else f"{ratio:.1f}x"]


def _verdict(row: Row) -> str:
    error = row["gradient_error"]
    if row["failure"] is not None:
        return "out of memory"
    if not row["same_objective"]:
        return "other objective"
    if row["correct"] is None:
        return "not compared"
    shown = "not finite" if error is None else f"{error:.0e}"
    return shown if row["correct"] else f"wrong: {shown}"


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


if __name__ == "__main__":
    sys.exit(main())
