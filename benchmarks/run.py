"""The command: ``python -m benchmarks.run`` in a checkout, ``fastinvdpo bench`` everywhere.

Measures every case that ``--filter`` leaves. After each it prints a table and writes the results so far as JSON.
Needs torch alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from fastinvdpo.errors import InvalidInput, MissingExtra, invalid

from . import registry, report, results, suite
from .measure import Copy
from .problem import Case

QUICK_SECONDS = 240.0  # after which --quick begins no case: the last one, its compilation included, may take a minute


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks. Returns 0; 1 when a backend's result was wrong; 2 for bad usage.

    Args:
        argv: arguments without the program's name; those of the process when None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["step"]:
        from . import bench_step  # needs the train extra

        return bench_step.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (InvalidInput, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastinvdpo bench",
        description="Measure the fused ops beside plain PyTorch, torch.compile and each other. "
        "For whole training steps: fastinvdpo bench step --help.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few cases: a minute on a CPU, large ones on a GPU in at most five"
    )
    parser.add_argument(
        "--filter",
        default="",
        metavar="WORDS",
        help="only cases in which every expression fits a word, as in 'sdxl pairs=(1|8) float32 full'",
    )
    parser.add_argument("--providers", default=",".join(registry.PROVIDERS), help="of these, comma-separated")
    parser.add_argument("--device", default=None, help="cpu or cuda; the GPU where there is one")
    parser.add_argument("--seconds", type=float, default=None, help="to measure each case for (2; 0.3 with --quick)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of the JSON")
    parser.add_argument("--compare", type=Path, default=None, metavar="OTHER.json", help="show what changed since")
    parser.add_argument("--load", type=Path, default=None, metavar="RESULT.json", help="show this, measure nothing")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser


def _run(options: argparse.Namespace) -> int:
    other = results.read(options.compare) if options.compare else None  # a mistake shows before an hour's work
    if options.load:
        result, path = results.read(options.load), options.load
        print(*report.tables(result["results"]), sep="\n")
    else:
        device = _device(options.device)
        selected = _select(options, device)
        if options.list:
            print(*(f"{case} {mode}" for case, mode in selected), sep="\n")
            return 0
        seconds = options.seconds or (0.3 if options.quick else 2.0)
        settings = {"quick": options.quick, "filter": options.filter, "seconds": seconds}

        def finished(result: results.Result, rows: Sequence[suite.Row]) -> None:
            for shown in report.tables(rows):
                print(shown, flush=True)
            results.write({**result, "settings": settings}, options.output)

        limit = QUICK_SECONDS if options.quick else math.inf
        result = run(selected, _providers(options.providers), device, seconds, limit=limit, finished=finished)
        path = results.write({**result, "settings": settings}, options.output)
    print(*report.notes(result), sep="\n")
    if other is not None:
        print(report.comparison(results.compare(result, other), result, other))
    print(f"Results: {path}")
    ours = [row for row in result["results"] if row["provider"] not in registry.BASELINES]
    return 0 if all(row["correct"] for row in ours) else 1


def run(
    selected: Sequence[tuple[Case, str]],
    providers: Sequence[str],
    device: torch.device,
    seconds: float,
    *,
    limit: float = math.inf,
    finished: Callable[[results.Result, Sequence[suite.Row]], None] = lambda result, rows: None,
) -> results.Result:
    """Measure the selected cases and modes; what :func:`benchmarks.results.write` writes.

    Args:
        seconds: to measure a case for.
        limit: seconds after which no case begins.
        finished: called after every case with the result so far and the rows of the case.
    """
    result: results.Result = {
        **results.origin(device),
        "unavailable": {},
        "skipped": [],
        "results": [],
        "copy_gbps": None,
    }
    copy = Copy(device)
    copy()
    modes = {case: [mode for _, mode in group] for case, group in groupby(selected, key=lambda each: each[0])}
    begin = time.perf_counter()
    for number, (case, wanted) in enumerate(modes.items(), 1):
        if time.perf_counter() - begin > limit:
            result["skipped"].append({"case": str(case), "reason": f"{limit:.0f} seconds had passed"})
            continue
        print(f"[{number}/{len(modes)}] {case}", file=sys.stderr, flush=True)
        rows: list[suite.Row] = []
        try:
            rows, reasons = suite.measure(case, wanted, providers, device=device, copy=copy, seconds=seconds)
        except (suite.DoesNotFit, torch.OutOfMemoryError, MemoryError) as error:
            result["skipped"].append({"case": str(case), "reason": str(error).partition("\n")[0]})
        else:
            result["results"] += rows
            _remember(result, case, reasons)
        _forget(device)
        result["copy_gbps"] = copy.bandwidth()._asdict() if copy.samples else None
        finished(result, rows)
    return result


def _remember(result: results.Result, case: Case, reasons: dict[str, str]) -> None:
    """A provider that runs nowhere is reported once; one that fails in some cases, for each of them."""
    everywhere = result["unavailable"].setdefault(case.op, {})
    for provider, reason in reasons.items():
        if registry.unavailable(provider, case.op, torch.device(result["device"]["type"])) is not None:
            everywhere[provider] = reason
        else:
            result["skipped"].append({"case": f"{case}, {provider}", "reason": reason})


def _forget(device: torch.device) -> None:
    """Compiled code and cached memory of a finished case: torch.compile stops compiling after a few shapes."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _select(options: argparse.Namespace, device: torch.device) -> list[tuple[Case, str]]:
    cases = registry.quick(device.type) if options.quick else registry.everything()
    selected = [(case, mode) for case, mode in cases if registry.matches(case, mode, options.filter)]
    if not selected:
        raise invalid("--filter", options.filter, "leaves no case", "see the words of all cases with --list")
    return selected


def _providers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in registry.PROVIDERS:
            raise invalid("--providers", name, "is not known", f"choose from {', '.join(registry.PROVIDERS)}")
    return names


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise invalid("--device", name, "is not a device", "use cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise invalid("--device", name, "cannot be measured here", "use cpu, or cuda on a machine with a GPU")
    return device


if __name__ == "__main__":
    sys.exit(main())
