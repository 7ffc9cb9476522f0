"""DSPO: the winner's score matched to the one that a preference implies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.sdpo import SafeguardedLoss, safeguarded_loss
from fastinvdpo.methods.statistics import Scored, sigmoid

Variant = Literal["sd15", "sdxl"]
_LARGE_SHIFT = 0.1


@dataclass(frozen=True, kw_only=True)
class DSPO(DiffusionDPO):
    """DSPO (ICLR 2025), with ``c = β·σ(−z)``, in the two forms of its script: the winner's score is matched to the one
    that a preference implies.

    Attributes:
        beta: published are 0.001 to 0.05 (sd15), at which losers count nothing, and 1000 to 5000 (sdxl).
        variant: ``"sd15"``: ``m((e_w − c·d_w)²)``. ``"sdxl"``: ``σ(−z)²``, times ``m(d_w²)`` where that is at least
            0.1, which no realistic shift reaches; the script decides by the micro-batch (``compat``).
    """

    name = "dspo"
    utilities = ("dspo",)
    beta_scales_margin = False

    beta: float = 0.001
    utility: str = "dspo"
    variant: Variant = "sd15"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in get_args(Variant):
            raise invalid("variant", self.variant, "is not known", f"use one of {get_args(Variant)}")
        if self.variant == "sdxl" and self.beta < 1:
            raise invalid("beta", self.beta, "leaves the margin of sdxl at 0", "published are 1000 to 5000")

    def pair_losses(self, scored: Scored) -> Tensor:
        statistics, lost = scored.safeguarded, sigmoid(-scored.margin)
        assert statistics.cross is not None and statistics.shift_mse is not None
        sums = (statistics.policy_mse, statistics.cross, statistics.shift_mse)
        error, cross, shift = (both.chunk(2)[0] for both in sums)
        if self.variant == "sd15":
            c = self.beta * lost
            return error - 2 * c * cross + c.square() * shift
        large = (shift.mean() if self.compat else shift) >= _LARGE_SHIFT
        return lost.square() * torch.where(large, shift, torch.ones_like(shift))


def dspo(
    policy_pred: Tensor, reference_pred: Tensor, target: Tensor, *, mu: float | None = None, **options: Any
) -> SafeguardedLoss:
    """DSPO's script, or the same with ``--train_method dspo``: as :func:`sdpo`, options of :class:`DSPO`."""
    return safeguarded_loss(DSPO(safeguard=mu, **options), policy_pred, reference_pred, target)
