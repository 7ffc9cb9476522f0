"""Results for people: tables as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from .results import Result, summary

Row = dict[str, Any]


def table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their cells, the first to the left and the others to the right; empty columns are left out."""
    columns = list(zip(headers, *lines, strict=True))
    columns = [column for place, column in enumerate(columns) if place == 0 or any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    shown = []
    for first, *others in zip(*columns, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        shown.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(shown)


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """A title and a table for the rows of every case and mode, which must stand together."""
    for title, together in groupby(rows, key=case_of):
        yield f"{title}\n{table(_COLUMNS, map(_cells, together))}\n"


_COLUMNS = ("provider", "ms", "p20-p80", "GB/s", "% copy", "graph ms", "graph % copy", "launches", "peak MB",
            "worst error", "vs eager", "vs compile")  # fmt: skip


def case_of(row: Row) -> str:
    return f"{row['op']} {row['model']} pairs={row['pairs']} K={row['timesteps']} {row['dtype']} {row['mode']}"


def speedup(row: Row, baseline: str) -> str:
    """``3.2x``; nothing over itself; never a number for a wrong result."""
    if row["provider"] == baseline:
        return ""
    if row["speedup"] is None:
        return "wrong result"
    return f"{row['speedup'][baseline]:.2f}x" if baseline in row["speedup"] else ""


def _cells(row: Row) -> list[str]:
    times, graph = row["milliseconds"], row.get("graph_milliseconds")
    cells = [row["provider"], f"{times['median']:.3f}", f"{times['p20']:.3f}-{times['p80']:.3f}"]
    cells += [f"{row['gbps']:.1f}", f"{row['percent_of_copy']:.0f}"]
    if graph is None:
        cells += ["", ""]
    else:
        share = row["percent_of_copy"] * times["median"] / graph["median"]
        cells += [f"{graph['median']:.3f}", f"{share:.0f}"]
    cells.append("" if row["launches"] is None else str(row["launches"]))
    cells.append("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}")
    return [*cells, _worst(row), *(speedup(row, baseline) for baseline in ("eager", "compile"))]


def _worst(row: Row) -> str:
    """The error nearest to its limit, or furthest beyond it."""
    shares = {
        name: float("inf") if error is None else error / row["allowed"][name] for name, error in row["errors"].items()
    }
    name = max(shares, key=lambda name: shares[name])
    error = row["errors"][name]
    return f"{name} {'not finite' if error is None else format(error, '.0e')}"


def notes(result: Result) -> Iterator[str]:
    """What was not measured, and why."""
    for op, reasons in result["unavailable"].items():
        for provider, reason in reasons.items():
            yield f"{op}, {provider}: {reason}"
    for skipped in result["skipped"]:
        yield f"skipped {skipped['case']}: {skipped['reason']}"
    for row in result["results"]:
        if row.get("no_graph"):
            yield f"no graph of {case_of(row)}, {row['provider']}: {row['no_graph']}"
    copied = result["copy_gbps"]
    if copied is not None:
        yield f"copy: {copied['median']:.1f} GB/s ({copied['p20']:.1f}-{copied['p80']:.1f})"


def comparison(compared: Sequence[Result], new: Result, old: Result) -> str:
    """A table of old against new; below it stands where the two runs cannot be compared."""
    lines = []
    for row in compared:
        ratio = "wrong result" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        lines.append([case_of(row), row["provider"], f"{row['old']:.3f}", f"{row['new']:.3f}", ratio])
    shown = [f"{_where(old)}  →  {_where(new)}", table(("case", "provider", "old ms", "new ms", "faster"), lines)]
    means = [f"{provider} {ratio:.2f}x" for provider, ratio in summary(compared).items()]
    shown.append("geometric means: " + ", ".join(means) if means else "the two runs share no correct result")
    if new["device"]["name"] != old["device"]["name"]:
        shown.append(f"different devices: {old['device']['name']}, {new['device']['name']}")
    bandwidths = [each["copy_gbps"]["median"] for each in (old, new) if each["copy_gbps"]]
    if len(bandwidths) == 2:
        shown.append(f"copy {bandwidths[0]:.1f} GB/s then, {bandwidths[1]:.1f} GB/s now")
    return "\n".join(shown)


def _where(result: Result) -> str:
    return f"{(result['commit'] or 'no commit')[:9]} ({result['date'][:16]})"
