"""Statistics that compare a model with the one it was aligned from. NumPy, float64, no randomness."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from fastinvdpo.errors import invalid

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A proportion with its 95 % confidence interval."""

    mean: float
    ci_low: float
    ci_high: float

    def as_dict(self) -> dict[str, float]:
        """The three numbers, for a JSON file."""
        return asdict(self)


def wilson_interval(successes: float, trials: int) -> Interval:
    """Wilson's score interval of a proportion (1927); unlike the normal one it stays sound at 0 and 1.

    ``successes`` may hold halves (ties): a half-won trial varies less than the binomial allows, so the interval is
    then too wide rather than too narrow.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise invalid(
            "successes",
            (successes, trials),
            "is not a count out of trials",
            "pass 0 <= successes <= trials, trials > 0",
        )
    share, z2 = successes / trials, _Z95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At 0 and 1 the bound equals the share exactly; rounding must not push it past.
    return Interval(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


def win_rate(after: ArrayLike, before: ArrayLike) -> Interval:
    """Share of samples whose reward is higher ``after`` than ``before``, both ``(n,)``; a tie counts half."""
    new, old = _finite("after", after), _finite("before", before)
    if new.ndim != 1 or new.shape != old.shape or new.size == 0:
        raise invalid("after", (new.shape, old.shape), "is not paired with before", "pass two vectors of one length")
    wins, ties = int((new > old).sum()), int((new == old).sum())
    return wilson_interval(wins + ties / 2, new.size)


def accuracy(predicted: ArrayLike, expected: ArrayLike) -> float:
    """Share of positions at which two label vectors ``(n,)`` agree."""
    found, wanted = np.asarray(predicted), np.asarray(expected)
    if found.shape != wanted.shape or found.size == 0:
        raise invalid(
            "predicted", (found.shape, wanted.shape), "is not paired with expected", "pass two vectors of one length"
        )
    return float((found == wanted).mean())


def frechet_distance(first: ArrayLike, second: ArrayLike) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features, ``(n, d)`` and ``(m, d)``.

    ``|mu_1 − mu_2|² + tr(S_1 + S_2 − 2 (S_1^½ S_2 S_1^½)^½)`` (Dowson and Landau, 1982), the formula of FID. It
    depends on the number of samples, so compare values only for equal n and m.
    """
    a, b = _finite("first", first), _finite("second", second)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise invalid(
            "first", (a.shape, b.shape), "are not two sets of feature vectors", "pass (n, d) and (m, d), n and m > 1"
        )
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    covariance_a, covariance_b = np.atleast_2d(covariance_a), np.atleast_2d(covariance_b)
    root = _matrix_root(covariance_a)
    cross = np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(cross).sum())


def _matrix_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise invalid(name, f"{array.shape}", "holds NaN or infinity", "look at how the samples were made")
    return array
