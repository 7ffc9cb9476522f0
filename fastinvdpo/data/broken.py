"""Rows that cannot be used: counted by cause, listed in a file, left out up to a limit, never replaced."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastinvdpo.errors import InvalidInput, invalid

# A row with several faults counts under the first of these.
CAUSES = (
    *("malformed row", "malformed score", "malformed label"),
    *("missing caption", "malformed caption", "missing image", "corrupt image"),
)
LISTED, SUMMARY = "broken.jsonl", "data.json"
_LINE = {"row", "place", "cause", "problem"}
_SHOWN = 10


class BrokenRow(InvalidInput):
    """A row that cannot be used; ``cause`` is one of :data:`CAUSES`."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return BrokenRow, (self.cause, str(self))


def broken(cause: str, argument: str, value: Any, problem: str, remedy: str) -> BrokenRow:
    """As :func:`fastinvdpo.errors.invalid`, with the cause that it counts under."""
    return BrokenRow(cause, str(invalid(argument, value, problem, remedy)))


@dataclass(frozen=True)
class DataSummary:
    """What became of every row: ``rows = pairs + (ties unless kept) + broken``.

    Attributes:
        rows: rows in the data; pairs: those that are trained on, kept ties among them.
        ties: rows without a winner; ties_kept: whether they are among the pairs.
        broken: how many rows were left out, by cause.
    """

    path: str
    format: str
    rows: int
    pairs: int
    ties: int
    ties_kept: bool
    broken: dict[str, int]

    def __str__(self) -> str:
        left_out = sum(self.broken.values())
        parts = [f"{self.rows} rows: {self.pairs} pairs"]
        if self.ties:
            parts.append(f"{self.ties} of them ties" if self.ties_kept else f"{self.ties} ties dropped")
        if left_out:
            parts.append(f"{left_out} broken rows left out ({by_cause(self.broken)})")
        return ", ".join(parts)


@dataclass
class BrokenRows:
    """Collects broken rows, and raises once there are more than allowed.

    Attributes:
        allowed: a count, or a share of ``total`` when it is a fraction below 1. With 0, the first broken row raises.
        found: row -> (where it lies, the error).
    """

    allowed: int | float
    total: int
    found: dict[int, tuple[str, BrokenRow]] = field(default_factory=dict)

    def add(self, row: int, place: str, error: BrokenRow) -> None:
        self.found[row] = (place, error)
        if self.allowed == 0:
            raise error
        is_share = isinstance(self.allowed, float)
        limit = math.floor(self.allowed * self.total) if is_share else self.allowed
        if len(self.found) > limit:
            problem = f"more rows than that are broken: {self.shown()}; the last: {error}"
            problem = f"allows {limit} of {self.total} rows; {problem}" if is_share else problem
            raise invalid("data.max_broken", self.allowed, problem, "repair the file") from error

    def shown(self) -> str:
        """The first rows, and how many there are of every cause."""
        rows = sorted(self.found)
        more = ", …" if len(rows) > _SHOWN else ""
        return f"[{', '.join(map(str, rows[:_SHOWN]))}{more}] ({by_cause(self.counts())})"

    def counts(self) -> dict[str, int]:
        """Rows by cause, in the order of :data:`CAUSES`; causes without a row are left out."""
        causes = [error.cause for _, error in self.found.values()]
        return {cause: causes.count(cause) for cause in CAUSES if cause in causes}

    def lines(self) -> list[dict[str, Any]]:
        """One entry for every broken row, in the order of the rows."""
        return [entry(row, place, error) for row, (place, error) in sorted(self.found.items())]


def entry(row: int, place: str, error: BrokenRow) -> dict[str, Any]:
    """A broken row as it is listed."""
    return {"row": row, "place": place, "cause": error.cause, "problem": str(error)}


def jsonl(lines: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def by_cause(counts: Mapping[str, int]) -> str:
    """``2 corrupt image, 1 missing caption``."""
    return ", ".join(f"{count} {cause}" for cause, count in counts.items())


def write_report(summary: DataSummary, rows: BrokenRows, directory: Path) -> None:
    """Write ``data.json`` (the summary) and ``broken.jsonl`` (every row that was left out, maybe none).

    Raises:
        InvalidInput: other files than such reports have these names, or the directory cannot be written.
    """
    check_report(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SUMMARY).write_text(json.dumps(asdict(summary), indent=2, ensure_ascii=False) + "\n", "utf-8")
        (directory / LISTED).write_text(jsonl(rows.lines()), "utf-8")
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise invalid("output", str(directory), problem, "name another directory") from None


def copy_report(source: Path, directory: Path) -> None:
    """Copy what :func:`write_report` wrote. Raises ``InvalidInput`` as it does."""
    check_report(directory)
    for name in (SUMMARY, LISTED):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def read_summary(directory: Path) -> DataSummary | None:
    """The summary in a directory, None where there is none."""
    path = directory / SUMMARY
    return DataSummary(**json.loads(path.read_text("utf-8"))) if path.is_file() else None


def check_report(directory: Path) -> None:
    """Raise ``InvalidInput`` where another file than such a report has the name of one."""
    require_own(directory / SUMMARY, lambda path: read_summary(path.parent) is not None)
    require_own(directory / LISTED, lambda path: all(set(line) == _LINE for line in _lines(path)))


def _lines(path: Path) -> Iterator[Any]:
    return (json.loads(line) for line in path.read_text("utf-8").split("\n") if line)


def require_own(path: Path, is_own: Callable[[Path], bool]) -> None:
    """Raise ``InvalidInput`` where something is at ``path`` that ``is_own`` does not recognize."""
    try:
        own = is_own(path) if path.exists() else not path.is_symlink()
    except (OSError, ValueError, TypeError, RecursionError):  # no JSON, no image, or of another kind
        own = False
    if not own:
        problem = "is there, and was not written by fastinvdpo"
        raise invalid("output", str(path), problem, "name another directory, or move that file")
