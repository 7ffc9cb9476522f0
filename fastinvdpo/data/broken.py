"""Rows that cannot be used: counted by cause, listed in a file, left out up to a limit, never replaced."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.output import OutputDirectory

# A row with several faults counts under the first of these.
CAUSES = (
    *("malformed row", "malformed score", "malformed label"),
    *("missing caption", "malformed caption", "missing image", "corrupt image", "short video"),
    *("malformed mask", "malformed noise"),
)
LISTED, SUMMARY = "broken.jsonl", "data.json"
REPORT = (SUMMARY, LISTED)
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


def caught(read: Callable[..., Any], *arguments: Any) -> Any:
    """What ``read`` returns, or the ``BrokenRow`` that it raises."""
    try:
        return read(*arguments)
    except BrokenRow as error:
        return error


def or_cause(read: Callable[..., Any], *arguments: Any) -> Any:
    """What ``read`` returns, or the cause of the ``BrokenRow`` that it raises."""
    found = caught(read, *arguments)
    return found.cause if isinstance(found, BrokenRow) else found


def read_ahead(
    read: Callable[[int], Any], rows: Iterable[int], threads: int = 4, ahead: int = 256
) -> Iterator[tuple[int, Any]]:
    """``(row, what read returns or the BrokenRow that it raises)`` in order; reading in threads, some rows ahead."""
    pool, pending = ThreadPoolExecutor(threads), deque[tuple[int, Any]]()  # decoding leaves the interpreter lock
    try:
        for row in rows:
            pending.append((row, pool.submit(caught, read, row)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        for row, future in pending:
            yield row, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class DataSummary:
    """What became of every row: ``rows = pairs + (ties unless kept) + broken``.

    Attributes:
        rows: rows in the data; pairs: those that are trained on, kept ties among them.
        ties: rows without a winner; ties_kept: whether they are among the pairs.
        broken: how many rows were left out, by cause.
        liked: of single images, which ``pairs`` then counts, those that were liked; both: those of them that another
            row dislikes. None of pairs.
        captioned: whether ``pairs`` counts images with captions.
    """

    path: str
    format: str
    rows: int
    pairs: int
    ties: int
    ties_kept: bool
    broken: dict[str, int]
    liked: int | None = None
    both: int | None = None
    captioned: bool = False

    def __str__(self) -> str:
        parts = [f"{self.rows} rows: {self.pairs} pairs"]
        if self.liked is not None:
            parts = [f"{self.rows} rows: {self.pairs} images, {self.liked} liked"]
            parts[0] += f" ({self.both} also disliked)" if self.both else ""
        elif self.captioned:
            parts = [f"{self.rows} rows: {self.pairs} images"]
        if self.ties:
            parts.append(f"{self.ties} of them ties" if self.ties_kept else f"{self.ties} ties dropped")
        if self.broken:
            parts.append(f"{sum(self.broken.values())} broken rows left out ({by_cause(self.broken)})")
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
        limit = math.floor(self.allowed * self.total) if isinstance(self.allowed, float) else self.allowed
        if len(self.found) > limit:
            share = f"allows {limit} of {self.total} rows; " if isinstance(self.allowed, float) else ""
            problem = f"{share}more rows than that are broken: {self.shown()}; the last: {error}"
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
        return [
            {"row": row, "place": place, "cause": error.cause, "problem": str(error)}
            for row, (place, error) in sorted(self.found.items())
        ]

    def listed(self) -> str:
        """:meth:`lines` as JSON Lines."""
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines())


def by_cause(counts: Mapping[str, int]) -> str:
    """``2 corrupt image, 1 missing caption``."""
    return ", ".join(f"{count} {cause}" for cause, count in counts.items())


def write_report(summary: DataSummary, rows: BrokenRows, output: OutputDirectory) -> None:
    """Write ``data.json`` (the summary) and ``broken.jsonl`` (every row that was left out, maybe none)."""
    output.write(SUMMARY, asdict(summary))
    output.write(LISTED, rows.listed())


def copy_report(source: Path, output: OutputDirectory) -> None:
    """Copy what :func:`write_report` wrote."""
    for name in REPORT:
        if (source / name).is_file():
            output.write(name, (source / name).read_text("utf-8"))


def read_summary(directory: Path) -> DataSummary | None:
    """The summary in a directory, None where there is none."""
    path = directory / SUMMARY
    return DataSummary(**json.loads(path.read_text("utf-8"))) if path.is_file() else None
