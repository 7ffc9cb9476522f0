"""Which pairs keep a label that comes from scores: those on whose winner enough scorers agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from fastinvdpo.errors import invalid

Scores: TypeAlias = tuple[int, list[list[float]]]  # row; the scores of image 0 and 1, by every scorer


def votes_of(agree: int | str | None, relabel: str | None, names: Sequence[str]) -> int | None:
    """How many scorers must agree; None: it does not matter. Raises ``InvalidInput`` for what cannot be agreed on."""
    if agree is None:
        return None
    if relabel is None:
        remedy = "name the scorer whose winner it is, with relabel"
        raise invalid("agree", agree, "keeps labels that scorers agree on, and none are made", remedy)
    votes = len(names) if agree == "all" else agree
    if isinstance(votes, bool) or not isinstance(votes, int) or not 2 <= votes <= len(names):
        remedy = f"use 2 to {len(names)}, or all" if len(names) > 1 else "name several scorers"
        raise invalid("agree", agree, f"is no number of scorers that can agree, of {', '.join(names)}", remedy)
    return votes


def agreed(
    scored: Sequence[Scores], names: Sequence[str], relabel: str | None, votes: int | None
) -> tuple[list[Scores], dict[str, int]]:
    """The rows on whose winner enough scorers agree, and for how many others each scorer did not."""
    if relabel is None or votes is None:
        return list(scored), {}
    kept: list[Scores] = []
    dissent = dict.fromkeys(names, 0)
    for row, scores in scored:
        signs = [(first > second) - (first < second) for first, second in scores]
        winner = signs[names.index(relabel)]
        agreeing = [winner != 0 and sign == winner for sign in signs]
        if sum(agreeing) >= votes:
            kept.append((row, scores))
            continue
        for name, agrees in zip(names, agreeing, strict=True):
            dissent[name] += not agrees
    if not kept:
        problem = f"is more than agree on any of {len(scored)} pairs"
        raise invalid("agree", votes, problem, "lower it, or look at the scores without it")
    return kept, {name: count for name, count in dissent.items() if count}
