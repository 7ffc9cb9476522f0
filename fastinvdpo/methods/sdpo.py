"""Diffusion-SDPO, and the two other methods that its script trains, with and without its safeguard: DMPO and DSPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo.errors import invalid
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.single_timestep import SingleTimestepMethod
from fastinvdpo.methods.statistics import Scored, implicit_accuracy, sigmoid, with_slope

Variant = Literal["sd15", "sdxl"]
_NEAREST = 1e-6
_LARGE_SHIFT = 0.1


@dataclass(frozen=True, kw_only=True)
class SDPO(DiffusionDPO):
    """Diffusion-SDPO (arXiv 2511.03317): Diffusion-DPO whose loser's gradient is scaled down where it would raise the
    winner's error, by ``safeguard``, which every method at one timestep has.
    """

    name = "sdpo"

    safeguard: float | None = 0.9


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


class SafeguardedLoss(NamedTuple):
    """What the script of Diffusion-SDPO computes and logs; scalars, float32 (float64 for float64 predictions).

    Attributes:
        loss: mean over pairs.
        raw_model_loss, raw_ref_loss: mean squared errors over winners and losers; the first carries a gradient.
        implicit_acc: the share of pairs with ``z > 0``.
        avg_win_diff_loss, avg_lose_diff_loss: mean error of the policy less the reference's, by side.
        avg_lose_l_scale: mean λ; 1 without a safeguard.
    """

    loss: Tensor
    raw_model_loss: Tensor
    raw_ref_loss: Tensor
    implicit_acc: Tensor
    avg_win_diff_loss: Tensor
    avg_lose_diff_loss: Tensor
    avg_lose_l_scale: Tensor


def _script_loss(
    method: SingleTimestepMethod, policy_pred: Tensor, reference_pred: Tensor, target: Tensor
) -> SafeguardedLoss:
    scored = method.score(policy_pred, reference_pred, target)
    result = method.finish(scored)
    gap = (result.policy_mse.detach() - result.reference_mse).chunk(2)
    scale = gap[0].new_ones(()) if scored.loser_scale is None else scored.loser_scale.mean()
    errors = result.policy_mse.mean(), result.reference_mse.mean()
    return SafeguardedLoss(result.loss, *errors, implicit_accuracy(result.margin), gap[0].mean(), gap[1].mean(), scale)


def sdpo(
    policy_pred: Tensor, reference_pred: Tensor, target: Tensor, *, mu: float = 0.9, **options: Any
) -> SafeguardedLoss:
    """The loss block of Diffusion-SDPO's script with ``--train_method diffusion-dpo`` and its safeguard.

    Args:
        policy_pred, reference_pred, target: as of :func:`fastinvdpo.preference_loss`, ``(2B, …)``.
        mu: the method's ``safeguard``.
        options: of :class:`SDPO`. ``compat="released"``: one λ per micro-batch, as the script; otherwise each pair's
            own.
    """
    return _script_loss(SDPO(safeguard=mu, **options), policy_pred, reference_pred, target)


def dmpo(
    policy_pred: Tensor, reference_pred: Tensor, target: Tensor, *, mu: float | None = None, **options: Any
) -> SafeguardedLoss:
    """The same script with ``--train_method dmpo``: as :func:`sdpo`, options of :class:`DMPO`."""
    return _script_loss(DMPO(safeguard=mu, **options), policy_pred, reference_pred, target)


def dspo(
    policy_pred: Tensor, reference_pred: Tensor, target: Tensor, *, mu: float | None = None, **options: Any
) -> SafeguardedLoss:
    """DSPO's script, or the same with ``--train_method dspo``: as :func:`sdpo`, options of :class:`DSPO`."""
    return _script_loss(DSPO(safeguard=mu, **options), policy_pred, reference_pred, target)
