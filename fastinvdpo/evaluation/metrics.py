"""Statistics that compare a model with the one it was aligned from. NumPy, float64, no randomness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastinvdpo.errors import invalid

_Z95 = 1.959963984540054


class Interval(NamedTuple):
    """A proportion with its 95 % confidence interval."""

    mean: float
    ci_low: float
    ci_high: float


def wilson_interval(successes: float, trials: int) -> Interval:
    """Wilson's score interval of a proportion (1927); unlike the normal one it stays sound at 0 and 1.

    ``successes`` may hold halves (ties): a half-won trial varies less than the binomial allows, so the interval is
    then too wide rather than too narrow.
    """
    if trials < 1 or not 0 <= successes <= trials:
        remedy = "pass 0 <= successes <= trials, trials > 0"
        raise invalid("successes", (successes, trials), "is not a count out of trials", remedy)
    share, z2 = successes / trials, _Z95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At 0 and 1 the bound equals the share exactly; rounding must not push it past.
    return Interval(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


def win_rate(after: ArrayLike, before: ArrayLike) -> Interval:
    """Share of samples whose reward is higher ``after`` than ``before``, both ``(n,)``; a tie counts half."""
    new, old = (np.asarray(values, dtype=np.float64) for values in (after, before))
    if new.ndim != 1 or new.shape != old.shape or new.size == 0 or not np.isfinite([new, old]).all():
        problem = "is not paired with before, or holds NaN or infinity"
        raise invalid("after", (new.shape, old.shape), problem, "pass two vectors of finite numbers, of one length")
    return wilson_interval(int((new > old).sum()) + int((new == old).sum()) / 2, new.size)


def statistics(*, base: Sequence[float], aligned: Sequence[float]) -> dict[str, Any]:
    """Mean and median of both sides, and how often the aligned one is higher, of scores in the order of the prompts."""
    pairs = list(zip(aligned, base, strict=True))
    return {
        "base": {"mean": fmean(base), "median": median(base)},
        "aligned": {"mean": fmean(aligned), "median": median(aligned)},
        "win_rate": win_rate(aligned, base)._asdict(),
        "wins": sum(new > old for new, old in pairs),
        "ties": sum(new == old for new, old in pairs),
        "losses": sum(new < old for new, old in pairs),
    }
