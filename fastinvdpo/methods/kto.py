"""Diffusion-KTO: images that were liked or disliked, each by itself, against a common baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo.errors import invalid
from fastinvdpo.methods.alpha_dpo import Gather
from fastinvdpo.methods.statistics import reference_mse, sigmoid
from fastinvdpo.ops.pair_statistics import pair_statistics
from fastinvdpo.ops.preference_loss import check_beta

HALOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda logit, sign: sigmoid(logit),
    "loss_averse": lambda logit, sign: logsigmoid(logit),
    "risk_seeking_1": lambda logit, sign: -sign * logsigmoid(-sign * logit),
    "risk_seeking_2": lambda logit, sign: sign * torch.exp(sign * logit / 100) - 1,
    "risk_seeking_3": lambda logit, sign: -logsigmoid(-logit),
}
"""Human utilities ``h(ℓ, y)``: of the signed logit ``ℓ = y·β·(g − κ)`` and the label ``y = ±1``."""

BASELINES = ("mean", "balanced")


class KTOLoss(NamedTuple):
    """What Diffusion-KTO's script computes and logs; scalars, but ``logit``, ``(N,)``.

    Attributes:
        loss: ``mean_j w_y·(1 − h_j)``.
        raw_model_loss, raw_ref_loss: mean squared errors; the first carries a gradient.
        implicit_acc: the share of images with ``ℓ > 0``, that is on their label's side of the baseline.
        kl: κ, the baseline.
        diff_pos, diff_neg: mean ``g − κ`` of liked and disliked images; 0 where there are none.
        logit: ℓ.
    """

    loss: Tensor
    raw_model_loss: Tensor
    raw_ref_loss: Tensor
    implicit_acc: Tensor
    kl: Tensor
    diff_pos: Tensor
    diff_neg: Tensor
    logit: Tensor


def kto(
    policy_pred: Tensor,
    reference_pred: Tensor,
    target: Tensor,
    liked: Tensor,
    *,
    beta: float = 1000.0,
    halo: str = "sigmoid",
    baseline: str | Tensor = "mean",
    like_weight: float = 1.0,
    dislike_weight: float = 1.0,
    gather: Gather | None = None,
) -> KTOLoss:
    """The loss block of Diffusion-KTO's script (arXiv 2404.04465), ``g = −Δ`` per image.

    Args:
        policy_pred, reference_pred, target: ``(N, …)``, unpaired: t and noise are each image's own.
        liked: bool ``(N,)``.
        beta: β > 0; stands without the ½ of the pair methods.
        halo: one of :data:`HALOS`; ``risk_seeking_2`` is unbounded.
        baseline: κ, without gradient. ``"mean"``: the mean of g, at least 0. ``"balanced"``: the mean of the means of
            both labels (the script's ``sigmoid`` offset). Or a scalar: the script's ``original`` offset is
            :func:`mean_reward` of predictions for prompts that belong to other images.
        like_weight, dislike_weight: w of liked and disliked images.
        gather: with several processes, for the baseline, which is one for all; such as ``accelerator.gather``.

    Raises:
        InvalidInput: an argument is out of range, or ``liked`` does not fit the predictions.
    """
    check_beta(beta)
    if halo not in HALOS:
        raise invalid("halo", halo, "is not known", f"use one of {', '.join(HALOS)}")
    if not isinstance(baseline, Tensor) and baseline not in BASELINES:
        raise invalid("baseline", baseline, "is not known", f"use one of {', '.join(BASELINES)}, or a scalar tensor")
    if not isinstance(liked, Tensor) or liked.dtype != torch.bool or liked.shape != policy_pred.shape[:1]:
        given = f"{tuple(liked.shape)}, {liked.dtype}" if isinstance(liked, Tensor) else type(liked).__name__
        raise invalid(
            "liked", given, "must be one bool per image", f"pass bool of shape {tuple(policy_pred.shape[:1])}"
        )
    for name, value in (("like_weight", like_weight), ("dislike_weight", dislike_weight)):
        if not 0 <= value < math.inf:
            raise invalid(name, value, "must be finite and not negative", "the published value is 1")
    statistics = pair_statistics(policy_pred, reference_pred, target, paired=False)
    reward, liked = -statistics.difference, liked.to(statistics.policy_mse.device)
    kappa = baseline.detach() if isinstance(baseline, Tensor) else _baseline(baseline, reward.detach(), liked, gather)
    advantage, sign = reward - kappa, 2 * liked.to(reward.dtype) - 1
    logit = sign * beta * advantage
    weight = torch.where(liked, torch.full_like(sign, like_weight), torch.full_like(sign, dislike_weight))
    return KTOLoss(
        (weight * (1 - HALOS[halo](logit, sign))).mean(),
        statistics.policy_mse.mean(),
        reference_mse(statistics).mean(),
        (logit.detach() > 0).to(logit.dtype).mean(),
        kappa,
        *_label_means(advantage.detach(), liked),
        logit,
    )


def mean_reward(policy_pred: Tensor, reference_pred: Tensor, target: Tensor) -> Tensor:
    """``mean_j −Δ_j``, scalar, no gradient."""
    with torch.no_grad():
        return -pair_statistics(policy_pred, reference_pred, target, paired=False).difference.mean()


def _label_means(value: Tensor, liked: Tensor) -> tuple[Tensor, Tensor]:
    """The means over liked and over disliked images; 0 where there are none."""
    both = torch.stack([liked, ~liked]).to(value.dtype)
    likes, dislikes = ((both * value).sum(1) / both.sum(1).clamp(min=1)).unbind()
    return likes, dislikes


def _baseline(kind: str, reward: Tensor, liked: Tensor, gather: Gather | None) -> Tensor:
    if gather is not None:
        reward, liked = gather(reward), gather(liked)
    if kind == "mean":
        return reward.mean().clamp(min=0)
    return torch.stack(_label_means(reward, liked)).mean()
