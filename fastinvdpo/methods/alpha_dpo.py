"""alpha-DPO: an α-divergence of the preference's probability, instead of the logistic loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo.errors import invalid
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.statistics import Gather, Scored, implicit_accuracy, reference_mse, with_slope


@dataclass(frozen=True, kw_only=True)
class AlphaDPO(DiffusionDPO):
    """alpha-DPO (ICLR 2026): ``u = [p^α − (1 − α) − αp]/(α(α − 1))``, ``p = σ(z)``.

    Attributes:
        alpha: α > 0; near 1 a bounded relative of ``−log σ``, towards 0 ``−log σ(z) − σ(−z)``.
        dynamic: multiply α by the mean of σ(z), no gradient, as published: over the pairs of a micro-batch on all
            processes, so that the loss depends on how a batch is cut.
    """

    name = "alpha-dpo"
    utilities = ("alpha-dpo",)

    beta: float = 4000.0
    utility: str = "alpha-dpo"
    alpha: float = 0.9999
    dynamic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < math.inf:
            raise invalid("alpha", self.alpha, "must be positive and finite", "the published value is 0.9999")

    def pair_losses(self, scored: Scored) -> Tensor:
        return alpha_divergence(scored.margin, self.current_alpha(scored))

    def current_alpha(self, scored: Scored) -> Tensor:
        """α as it is used, a scalar, no gradient."""
        margin = scored.margin.detach()
        if not self.dynamic:
            return torch.full_like(margin[0], self.alpha)
        return self.alpha * torch.sigmoid(margin if scored.gather is None else scored.gather(margin)).mean()


def alpha_divergence(margin: Tensor, alpha: Tensor) -> Tensor:
    """``u(z)`` elementwise, with the derivative ``h·σ(−z)``, ``h = (p^α − p)/(α − 1)``, neither of which divides the
    small difference of large numbers at α = 1 or underflows in the tails.
    """
    log_p, lost = logsigmoid(margin.detach()), torch.sigmoid(-margin.detach())
    distance = (1 - alpha).abs()
    shared = torch.expm1(distance * log_p) / distance.clamp(min=torch.finfo(log_p.dtype).tiny)
    shared = torch.where(distance == 0, log_p, shared)
    h = torch.exp(torch.minimum(alpha, torch.ones_like(alpha)) * log_p) * shared
    small = (torch.expm1(alpha * log_p) / alpha - torch.expm1(log_p)) / (alpha - 1)
    return with_slope(torch.where(alpha < 0.5, small, (h + lost) / alpha), h * lost, margin)


class AlphaDPOLoss(NamedTuple):
    """What alpha-DPO's script computes and logs; scalars, ``alpha`` as it was used."""

    loss: Tensor
    raw_model_loss: Tensor
    raw_ref_loss: Tensor
    implicit_acc: Tensor
    alpha: Tensor


def alpha_dpo(
    policy_pred: Tensor, reference_pred: Tensor, target: Tensor, *, gather: Gather | None = None, **options: Any
) -> AlphaDPOLoss:
    """The loss block of alpha-DPO's script, in a form that keeps its digits.

    Args:
        policy_pred, reference_pred, target: as of :func:`fastinvdpo.preference_loss`, ``(2B, …)``.
        gather: with several processes, for ``dynamic``; the script passes ``accelerator.gather``.
        options: of :class:`AlphaDPO`; ``dynamic`` is the script after its ``--reweight_step``.
    """
    method = AlphaDPO(**options)
    scored = method.score(policy_pred, reference_pred, target, gather=gather)
    used = method.current_alpha(scored)
    loss = alpha_divergence(scored.margin, used).mean()
    errors = scored.statistics.policy_mse.mean(), reference_mse(scored.statistics).mean()
    return AlphaDPOLoss(loss, *errors, implicit_accuracy(scored.margin), used)
