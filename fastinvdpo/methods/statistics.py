"""From the sums over a prediction's elements to a pair's margin: what objectives that are not one fused op share.

With ``e = p − τ`` and ``d = p − r`` an op gives per sample ``E = m(e²)``, ``X = m(e·d)``, ``Q = m(d²)`` and per pair
``C = m(e_w·e_l)``; ``Δ = 2X − Q`` is the difference of the errors of policy and reference. What follows is arithmetic
of a few scalars per pair, in float32 (float64 for float64 predictions), differentiable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops import PairStatistics

RELEASED_GUARD = 1e-9

Gather = Callable[[Tensor], Tensor]
"""All processes' values of a tensor, ``(B,)`` to ``(processes·B,)``, such as ``accelerator.gather``."""


class Scored(NamedTuple):
    """Predictions of B pairs as the objectives see them.

    Attributes:
        statistics: the sums.
        safeguarded: the same, where the losers' gradients are scaled.
        loser_scale: by what, ``(B,)``; None without a safeguard.
        margin: ``z`` per pair, ``(B,)``, of ``safeguarded``.
        gather: for means over the pairs of all processes; None: there is one.
    """

    statistics: PairStatistics
    safeguarded: PairStatistics
    loser_scale: Tensor | None
    margin: Tensor
    gather: Gather | None = None


def pair_margin(statistics: PairStatistics, beta: float) -> Tensor:
    """``z = −(β/2)(Δ_w − Δ_l)``, ``(B,)``."""
    winner, loser = statistics.difference.chunk(2)
    return -0.5 * beta * (winner - loser)


def reference_mse(statistics: PairStatistics) -> Tensor:
    """``m((r − τ)²)`` per sample, ``(n,)``, no gradient; 0 without a reference, which is one that is right."""
    error = statistics.policy_mse.detach()
    return torch.zeros_like(error) if statistics.cross is None else error - statistics.difference.detach()


def safeguard(
    statistics: PairStatistics, mu: float, *, pair_weight: Tensor | None = None, released_elements: int | None = None
) -> tuple[PairStatistics, Tensor]:
    """The same values, where what flows back to losers is multiplied by λ of Diffusion-SDPO (arXiv 2511.03317), so that
    to first order a step does not raise the winner's error; and λ per pair, ``(B,)``, no gradient.

        λ = clamp((1 − μ)·E_w/C, 0, 1),   1 where C ≤ 0

    ``E_w`` and ``C`` are the squared norm of the winner's error and its product with the loser's, in float32, free of
    the factor ``4/(B²n)`` with which the released code underflows in half precision, where it finds ``λ = 1``.

    Args:
        mu: how much of the winner's descent is kept, in [0, 1]; at 1 the loser gets no gradient.
        pair_weight: ``(B,)``; a pair with a negative one is the other way round, and its loser is the winner here.
        released_elements: n, elements per sample: one λ from the sums over the micro-batch, with ``1e-9`` added to the
            denominator at that factor, as released.
    """
    (winner, loser), inner, guard = statistics.policy_mse.detach().chunk(2), statistics.pair_cross, 0.0
    assert inner is not None, "samples are paired"
    inner, pairs = inner.detach(), inner.numel()
    if pair_weight is not None:
        winner = torch.where(pair_weight < 0, loser, winner)
    if released_elements is not None:
        winner, inner = winner.sum(), inner.sum()
        guard = RELEASED_GUARD * pairs**2 * released_elements / 4
    scale = ((1 - mu) * winner / (inner + guard)).clamp(0, 1)
    scale = torch.where(inner > 0, scale, torch.ones_like(scale)).expand(pairs)
    sides = torch.stack([torch.ones_like(scale), scale])
    if pair_weight is not None:
        sides = torch.where(pair_weight < 0, sides.flip(0), sides)
    named = {name: getattr(statistics, name) for name in ("policy_mse", "cross", "shift_mse")}
    scaled = {name: with_slope(value, sides.flatten(), value) for name, value in named.items() if value is not None}
    return dataclasses.replace(statistics, **scaled), scale


def implicit_accuracy(margin: Tensor, tie: float = 0.0) -> Tensor:
    """The share of pairs with ``z > 0`` as scripts count it, scalar, no gradient; ``tie``: what ``z = 0`` counts."""
    z = margin.detach()
    return ((z > 0).to(z.dtype) + tie * (z == 0)).mean()


def with_slope(value: Tensor, slope: Tensor, z: Tensor) -> Tensor:
    """``value``, whose derivative with respect to ``z`` is ``slope``: for functions whose own expression loses it."""
    return value.detach() + slope.detach() * (z - z.detach())


def sigmoid(z: Tensor) -> Tensor:
    """``σ(z)``, whose derivative keeps its digits in both tails; PyTorch's is ``σ(1 − σ)``."""
    value = torch.sigmoid(z)
    return with_slope(value, value * torch.sigmoid(-z), z)


class AutoBeta:
    """β that keeps the mean of ``σ(−z)`` near a wanted one: ``β = clamp(2·log((1 − f)/f)/M, …)``, M a moving average of
    ``mean |Δ_w − Δ_l|`` over calls, on the device. It has a ``state_dict``, which belongs into a checkpoint.

    Args:
        target: f in (0, ½), the wanted mean of σ(−z).
        decay: of M.
        minimum, maximum: bounds of β. The script's maximum is 1, for ``norm="sum"``; with means β is as many times
            larger as a sample has elements.
        gather: with several processes, so that all of them use one M; such as ``accelerator.gather``.

    Attributes:
        beta: of the last call; the maximum before.
    """

    def __init__(
        self,
        target: float = 0.2,
        decay: float = 0.99,
        minimum: float = 1e-3,
        maximum: float = 1.0,
        gather: Gather | None = None,
    ) -> None:
        if not 0 < target < 0.5:
            raise invalid("target", target, "out of range", "use a mean of σ(−z) above 0 and below 0.5, such as 0.2")
        if not 0 <= decay < 1:
            raise invalid("decay", decay, "out of range", "use 0.99")
        if not 0 < minimum <= maximum < math.inf:
            raise invalid("minimum", minimum, f"is no lower bound of β below {maximum}", "use 0.001 and 1")
        self._twice_logit, self._decay, self._gather = 2 * math.log((1 - target) / target), decay, gather
        self._minimum, self._maximum = minimum, maximum
        self._average: Tensor | None = None
        self.beta = torch.tensor(maximum)

    def update(self, gap: Tensor) -> Tensor:
        """β, a scalar, for a batch whose ``Δ_w − Δ_l`` are ``gap`` ``(B,)``."""
        size = gap.detach().abs()
        size = (size if self._gather is None else self._gather(size)).mean()
        if self._average is not None:
            average = self._average.to(size)
            moved = self._decay * average + (1 - self._decay) * size
            size = torch.where(torch.isfinite(size), moved, average)  # a batch that a guard rejects leaves no trace
        self._average = size
        self.beta = (self._twice_logit / size).clamp(self._minimum, self._maximum)
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        return {"average": None if self._average is None else self._average.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average = state["average"]
