"""MaPO: a margin between the two errors of one model, without a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import check_count
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.statistics import Scored
from fastinvdpo.ops import PairStatistics

# φ(x) = x/(eˣ − 1) = 1 − x/2 + g(x), g even: the terms of g from x² on, 1e-13 at ½.
_SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160)
_SMALL = 0.5


@dataclass(frozen=True, kw_only=True)
class MaPO(DiffusionDPO):
    """MaPO (arXiv 2406.06424): ``loss = L_w − β·log σ(ℓ)``, ``ℓ = T(φ(s·L_w) − φ(s·L_l))``, ``φ(x) = x/(eˣ − 1)``, of
    the policy's own errors L. To first order Diffusion-DPO at ``β = T·s`` without a reference, and fine-tuning on the
    winners.

    Attributes:
        beta: of the margin's term beside the winner's error.
        snr: s > 0, a constant, not the signal-to-noise ratio of the timestep.
        train_timesteps: T.
    """

    name = "mapo"
    utilities = ("mapo",)
    needs_reference = False
    beta_scales_margin = False

    beta: float = 0.1
    utility: str = "mapo"
    snr: float = 0.5
    train_timesteps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.snr < math.inf:
            raise invalid("snr", self.snr, "must be positive and finite", "the published value is 0.5")
        check_count("train_timesteps", self.train_timesteps)

    def margin(self, statistics: PairStatistics) -> Tensor:
        """``ℓ`` without the difference of two numbers near one."""
        x = self.snr * statistics.policy_mse
        small, large = x.clamp(max=_SMALL).square(), x.clamp(min=_SMALL)
        series = torch.zeros_like(x)
        for coefficient in reversed(_SERIES):
            series = (series + coefficient) * small
        even = torch.where(x < _SMALL, series, 0.5 * large / torch.tanh(0.5 * large) - 1)
        (winner, loser), (even_winner, even_loser) = x.chunk(2), even.chunk(2)
        return self.train_timesteps * (even_winner - even_loser - 0.5 * (winner - loser))

    def pair_losses(self, scored: Scored) -> Tensor:
        return scored.safeguarded.policy_mse.chunk(2)[0] - self.beta * logsigmoid(scored.margin)


class MaPOLoss(NamedTuple):
    """What MaPO's script computes: the loss, the errors of winners and losers ``(B,)``, ``β·log σ(ℓ)`` ``(B,)``."""

    loss: Tensor
    model_losses_w: Tensor
    model_losses_l: Tensor
    ratio_losses: Tensor


def mapo(policy_pred: Tensor, target: Tensor, **options: Any) -> MaPOLoss:
    """``compute_loss`` of MaPO's script, keeping its digits; predictions ``(2B, …)``, options of :class:`MaPO`."""
    method = MaPO(**options)
    scored = method.score(policy_pred, None, target)
    winner, loser = scored.statistics.policy_mse.chunk(2)
    return MaPOLoss(method.finish(scored).loss, winner, loser, method.beta * logsigmoid(scored.margin))
