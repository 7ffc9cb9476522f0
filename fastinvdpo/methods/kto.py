"""Diffusion-KTO: images that were liked or disliked, each by itself, against a common baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo.errors import invalid
from fastinvdpo.methods.statistics import Gather, reference_mse, sigmoid
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


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Options of Diffusion-KTO (arXiv 2404.04465), which needs no pairs.

    Attributes:
        beta: β > 0; stands without the ½ of the pair methods.
        halo: one of :data:`HALOS`; ``risk_seeking_2`` is unbounded.
        baseline: κ, which carries no gradient. ``"mean"``: the mean of g, at least 0. ``"balanced"``: the mean of the
            means of both labels (the script's ``sigmoid`` offset).
        like_weight, dislike_weight: w of liked and disliked images.

    Raises:
        InvalidInput: a value is out of range.
    """

    beta: float = 1000.0
    halo: str = "sigmoid"
    baseline: str = "mean"
    like_weight: float = 1.0
    dislike_weight: float = 1.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        for name, known in (("halo", tuple(HALOS)), ("baseline", BASELINES)):
            if getattr(self, name) not in known:
                raise invalid(name, getattr(self, name), "is not known", f"use one of {', '.join(known)}")
        for name in ("like_weight", "dislike_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                remedy = "the published value is 1"
                raise invalid(name, getattr(self, name), "must be finite and not negative", remedy)

    def loss(
        self,
        policy_pred: Tensor,
        reference_pred: Tensor,
        target: Tensor,
        liked: Tensor,
        *,
        kappa: Tensor | None = None,
        gather: Gather | None = None,
    ) -> KTOLoss:
        """The loss block of Diffusion-KTO's script.

        Args:
            policy_pred, reference_pred, target: as of :func:`fastinvdpo.preference_loss`, but ``(N, …)``, unpaired: t
                and noise are each image's own.
            liked: bool ``(N,)``.
            kappa: the baseline, a scalar, where ``baseline`` is not to say it: the script's ``original`` offset is
                :func:`mean_reward` of predictions for prompts that belong to other images.
            gather: with several processes, for the baseline, which is one for all; such as ``accelerator.gather``.
        """
        count = tuple(policy_pred.shape[:1])
        if not isinstance(liked, Tensor) or liked.dtype != torch.bool or liked.shape != count:
            given = f"{tuple(liked.shape)}, {liked.dtype}" if isinstance(liked, Tensor) else type(liked).__name__
            raise invalid("liked", given, "must be one bool per image", f"pass bool of shape {count}")
        statistics = pair_statistics(policy_pred, reference_pred, target, paired=False)
        reward, liked = -statistics.difference, liked.to(policy_pred.device)
        kappa = self._kappa(reward.detach(), liked, gather) if kappa is None else kappa.detach()
        advantage, sign = reward - kappa, 2 * liked.to(reward.dtype) - 1
        logit = sign * self.beta * advantage
        weights = torch.full_like(sign, self.like_weight), torch.full_like(sign, self.dislike_weight)
        return KTOLoss(
            (torch.where(liked, *weights) * (1 - HALOS[self.halo](logit, sign))).mean(),
            statistics.policy_mse.mean(),
            reference_mse(statistics).mean(),
            (logit.detach() > 0).to(logit.dtype).mean(),
            kappa,
            *_label_means(advantage.detach(), liked),
            logit,
        )

    def _kappa(self, reward: Tensor, liked: Tensor, gather: Gather | None) -> Tensor:
        if gather is not None:
            reward, liked = gather(reward), gather(liked)
        if self.baseline == "mean":
            return reward.mean().clamp(min=0)
        return torch.stack(_label_means(reward, liked)).mean()


def kto(
    policy_pred: Tensor,
    reference_pred: Tensor,
    target: Tensor,
    liked: Tensor,
    *,
    kappa: Tensor | None = None,
    gather: Gather | None = None,
    **options: Any,
) -> KTOLoss:
    """:meth:`KTO.loss` with these options of :class:`KTO`."""
    return KTO(**options).loss(policy_pred, reference_pred, target, liked, kappa=kappa, gather=gather)


def mean_reward(policy_pred: Tensor, reference_pred: Tensor, target: Tensor) -> Tensor:
    """``mean_j −Δ_j``, scalar, no gradient."""
    with torch.no_grad():
        return -pair_statistics(policy_pred, reference_pred, target, paired=False).difference.mean()


def _label_means(value: Tensor, liked: Tensor) -> tuple[Tensor, Tensor]:
    """The means over liked and over disliked images; 0 where there are none."""
    both = torch.stack([liked, ~liked]).to(value.dtype)
    likes, dislikes = ((both * value).sum(1) / both.sum(1).clamp(min=1)).unbind()
    return likes, dislikes
