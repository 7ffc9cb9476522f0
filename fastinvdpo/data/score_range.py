"""The range of the scores of a set, SmPO's κ: fitted when pairs are scored, kept in the parquet file, read in training.

``p = σ((score_w − score_l)/κ)`` with κ the largest minus the smallest score over all images of the set (SmPO-Diffusion,
arXiv 2506.02698). The published 0.16658 is that of the cosine of PickScore's embeddings over Pick-a-Pic v2, between
0.11544 and 0.28202 in the released code; scores that are multiples of the cosine have the same multiple of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.rows import SCORES, PairSource
from fastinvdpo.errors import invalid

METADATA = b"fastinvdpo.scores"


class ScoreRange(NamedTuple):
    """Extremes of a scorer's values over both images of all pairs."""

    low: float
    high: float

    @property
    def value(self) -> float:
        """κ."""
        return self.high - self.low

    @classmethod
    def of(cls, scores: Sequence[float]) -> ScoreRange | None:
        return cls(min(scores), max(scores)) if len(scores) else None


def measured_range(source: PairSource) -> ScoreRange | None:
    """The range of the scores that are there, whoever wrote them; None without scores, or where all are broken."""
    found: list[float] = []
    for row in range(len(source)) if set(SCORES) <= source.resolve(()) else ():
        try:
            found += source.record(row).scores()
        except BrokenRow:  # PairDataset names the row
            continue
    return ScoreRange.of(found)


def stored_range(source: PairSource, columns: tuple[str, str]) -> ScoreRange | None:
    """The range of two columns that ``fastinvdpo score`` wrote, over all files; None where a file lacks it."""
    ends: list[float] = []
    try:
        for footer in source.footers():
            scores = json.loads(footer.get(METADATA, b'{"scores": []}'))["scores"]
            found = next((score for score in scores if tuple(score["columns"]) == columns), None)
            if found is None:
                return None
            ends += [float(found["low"]), float(found["high"])]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"the metadata {METADATA.decode()!r} cannot be read ({type(error).__name__}: {error})"
        raise invalid("data.path", columns, problem, "score the pairs again with fastinvdpo score") from error
    return ScoreRange.of(ends)
