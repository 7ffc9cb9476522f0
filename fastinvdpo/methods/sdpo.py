"""Diffusion-SDPO: Diffusion-DPO with a safeguarded loser's gradient; and the loss block of its script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.single_timestep import SingleTimestepMethod
from fastinvdpo.methods.statistics import implicit_accuracy


@dataclass(frozen=True, kw_only=True)
class SDPO(DiffusionDPO):
    """Diffusion-SDPO (arXiv 2511.03317): Diffusion-DPO whose loser's gradient is scaled down where it would raise the
    winner's error, by ``safeguard``, which every method at one timestep has.
    """

    name = "sdpo"

    safeguard: float | None = 0.9


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


def safeguarded_loss(
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
    return safeguarded_loss(SDPO(safeguard=mu, **options), policy_pred, reference_pred, target)
