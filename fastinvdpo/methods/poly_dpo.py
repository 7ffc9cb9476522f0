"""Poly-DPO: the logistic loss with a second term in σ(−z)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from fastinvdpo.errors import invalid
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.statistics import Scored, sigmoid
from fastinvdpo.ops import PreferenceLoss


@dataclass(frozen=True, kw_only=True)
class PolyDPO(DiffusionDPO):
    """Poly-DPO (ViPO, arXiv 2604.24953), from the formula; no code is released: ``u = −log σ(z) + α·σ(−z)``.

    Attributes:
        alpha: α of at least −1 (below, won pairs are pushed back): positive where labels are noisy, negative where
            they are too easy, 0 for Diffusion-DPO.
    """

    name = "poly-dpo"
    utilities = ("poly-dpo",)

    utility: str = "poly-dpo"
    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.alpha < math.inf:
            raise invalid("alpha", self.alpha, "out of range", "use 8 for Pick-a-Pic v2, or another number from -1")

    def pair_losses(self, scored: Scored) -> Tensor:
        return softplus(-scored.margin) + self.alpha * sigmoid(-scored.margin)


def poly_dpo(policy_pred: Tensor, reference_pred: Tensor, target: Tensor, **options: Any) -> PreferenceLoss:
    """The loss of :class:`PolyDPO` with these options; predictions as of :func:`fastinvdpo.preference_loss`."""
    return PolyDPO(**options).loss(policy_pred, reference_pred, target)
