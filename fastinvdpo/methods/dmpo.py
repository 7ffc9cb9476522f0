"""DMPO: the reverse divergence from a wanted probability, instead of the logistic loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo.errors import invalid
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.sdpo import SafeguardedLoss, safeguarded_loss
from fastinvdpo.methods.statistics import Scored, with_slope

_NEAREST = 1e-6


@dataclass(frozen=True, kw_only=True)
class DMPO(DiffusionDPO):
    """DMPO (arXiv 2507.07510), as the script of Diffusion-SDPO has it: ``u = KL(σ(z) ‖ 1 − α)``.

    Attributes:
        alpha: α in [0, 1), the probability left to the wrong order; kept 1e-6 away from both ends, as released. A
            margin above ``logit(1 − α)`` is pulled back.
    """

    name = "dmpo"
    utilities = ("dmpo",)

    beta: float = 2000.0
    utility: str = "dmpo"
    alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < 1:
            raise invalid("alpha", self.alpha, "out of range", "use a probability of at least 0 and below 1")

    def pair_losses(self, scored: Scored) -> Tensor:
        # On the host in float64: in float32 1 − q loses 1e-3 of the gradient at α = 0.
        alpha = min(max(self.alpha, _NEAREST), 1 - _NEAREST)
        log_q, log_rest, z = math.log1p(-alpha), math.log(alpha), scored.margin.detach()
        won, lost = torch.sigmoid(z), torch.sigmoid(-z)
        value = won * (logsigmoid(z) - log_q) + lost * (logsigmoid(-z) - log_rest)
        return with_slope(value, won * lost * (z - (log_q - log_rest)), scored.margin)


def dmpo(
    policy_pred: Tensor, reference_pred: Tensor, target: Tensor, *, mu: float | None = None, **options: Any
) -> SafeguardedLoss:
    """The same script with ``--train_method dmpo``: as :func:`sdpo`, options of :class:`DMPO`."""
    return safeguarded_loss(DMPO(safeguard=mu, **options), policy_pred, reference_pred, target)
