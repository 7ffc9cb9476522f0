"""Utilities ``u(z)`` of the pair objective and their derivatives: a new one is one line in :data:`UTILITIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from fastinvdpo.errors import invalid

LINEAR_KAPPA = 0.4
LINEAR_ETA = 0.01


class Utility(NamedTuple):
    """``value(z, beta, ε)`` and ``slope(z, beta, ε) = ∂value/∂z``, elementwise; ``smoothed`` says whether ε is used."""

    value: Callable[[Tensor, float, float], Tensor]
    slope: Callable[[Tensor, float, float], Tensor]
    smoothed: bool = False


def _linear_value(z: Tensor) -> Tensor:
    """The antiderivative of ``−clamp(½ − κz, η, 1 − η)`` with ``u(0) = 0``: a parabola with straight ends."""
    edge = (0.5 - LINEAR_ETA) / LINEAR_KAPPA
    inside = z.clamp(-edge, edge)
    parabola = inside * (0.5 * LINEAR_KAPPA * inside - 0.5)
    return parabola - (z - edge).clamp(min=0) * LINEAR_ETA - (z + edge).clamp(max=0) * (1 - LINEAR_ETA)


UTILITIES: dict[str, Utility] = {
    "sigmoid": Utility(lambda z, b, e: softplus(-z), lambda z, b, e: -torch.sigmoid(-z)),
    "cdpo": Utility(
        lambda z, b, e: -(1 - e) * logsigmoid(z) - e * logsigmoid(-z),
        lambda z, b, e: e - torch.sigmoid(-z),
        smoothed=True,
    ),
    "robust": Utility(
        lambda z, b, e: (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e),
        lambda z, b, e: (-(1 - e) * torch.sigmoid(-z) - e * torch.sigmoid(z)) / (1 - 2 * e),
        smoothed=True,
    ),
    "hinge": Utility(lambda z, b, e: (1 - z).clamp(min=0), lambda z, b, e: -(z < 1).to(z.dtype)),
    "ipo": Utility(lambda z, b, e: (z / b - 0.5 / b) ** 2, lambda z, b, e: 2 * (z / b - 0.5 / b) / b),
    "linear": Utility(
        lambda z, b, e: _linear_value(z),
        lambda z, b, e: -(0.5 - LINEAR_KAPPA * z).clamp(LINEAR_ETA, 1 - LINEAR_ETA),
    ),
}


def check_utility(utility: str, label_smoothing: float) -> None:
    """Raise unless ``utility`` is known and ``label_smoothing`` is one it can use."""
    if utility not in UTILITIES:
        raise invalid("utility", utility, "is not known", f"use one of {', '.join(UTILITIES)}")
    if not 0 <= label_smoothing < 0.5:
        raise invalid(
            "label_smoothing", label_smoothing, "out of range", "use a probability of at least 0 and below 0.5"
        )
    if label_smoothing and not UTILITIES[utility].smoothed:
        smoothed = ", ".join(name for name, item in UTILITIES.items() if item.smoothed)
        remedy = f"use one of the utilities {smoothed}, or label_smoothing=0"
        raise invalid("label_smoothing", label_smoothing, f"is not used by utility {utility!r}", remedy)
