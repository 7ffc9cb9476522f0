"""Diffusion-DPO with another loss of its margin: alpha-DPO, Poly-DPO and Linear-DPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import Follows, check_count
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.statistics import Gather, Scored, implicit_accuracy, reference_mse, sigmoid, with_slope
from fastinvdpo.ops import PreferenceLoss
from fastinvdpo.ops.preference_loss.utilities import LINEAR_KAPPA

Reference = Literal["frozen", "ema"]


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


@dataclass(frozen=True, kw_only=True)
class LinearDPO(DiffusionDPO):
    """Linear-DPO (arXiv 2605.21123): ``∂loss/∂(L_w − L_l) = c = clamp(½ − 0.4 z, η, 1 − η)``, without a factor β, as
    released. The loss is ``(2/β)·u(z)`` with ``u' = −c``, 0 at the reference; ``compat`` reports the script's
    ``c·(L_w − L_l)`` instead, which has the same gradient and does not fall as the policy learns.

    Attributes:
        eta: η in [0, ½), the least weight; at 0 a pair with ``z ≥ 1.25`` gets no gradient.
        reference: ``"frozen"``, or ``"ema"``: an average of the policy's weights, which a loop of your own makes with
            :func:`update_reference`.
        reference_decay: δ of that average, in [0, 1); at 0 a copy.
        reference_every: optimizer steps from one update of it to the next.
    """

    name = "linear-dpo"
    utilities = ("linear-dpo",)
    beta_scales_margin = False

    beta: float = 100.0
    utility: str = "linear-dpo"
    eta: float = 1e-3
    reference: Reference = "frozen"
    reference_decay: float = 0.99
    reference_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta < 0.5:
            raise invalid("eta", self.eta, "out of range", "use a weight of at least 0 and below 0.5")
        if self.reference not in get_args(Reference):
            raise invalid("reference", self.reference, "is not known", f"use one of {get_args(Reference)}")
        if not 0 <= self.reference_decay < 1:
            raise invalid("reference_decay", self.reference_decay, "out of range", "use 0.95 to 0.995")
        check_count("reference_every", self.reference_every)
        for name, unset in (("reference_decay", 0.99), ("reference_every", 1)):
            if self.reference == "frozen" and getattr(self, name) != unset:
                problem = "means nothing for a frozen reference"
                raise invalid(name, getattr(self, name), problem, "drop it, or set reference to ema")

    @property
    def reference_follows(self) -> Follows | None:
        return None if self.reference == "frozen" else Follows(self.reference_decay, self.reference_every)

    def weight(self, margin: Tensor) -> Tensor:
        """c per pair before the clamp, ``(B,)``, no gradient."""
        return 0.5 - LINEAR_KAPPA * margin.detach()

    def pair_losses(self, scored: Scored) -> Tensor:
        margin = scored.margin
        if self.compat:
            winner, loser = scored.safeguarded.policy_mse.chunk(2)
            return self.weight(margin).clamp(self.eta, 1 - self.eta) * (winner - loser)
        edge = (0.5 - self.eta) / LINEAR_KAPPA
        inside = margin.clamp(-edge, edge)
        outside = (1 - self.eta) * (margin + edge).clamp(max=0) + self.eta * (margin - edge).clamp(min=0)
        return 2 / self.beta * (inside * (0.5 * LINEAR_KAPPA * inside - 0.5) - outside)


class LinearDPOLoss(NamedTuple):
    """What Linear-DPO's script computes and logs: scalars, and ``ratio`` and ``clip_ratio`` per pair, ``(B,)``, the
    weight before and after its clamp. The loss is not one to compare: it is negative where winners fit better.
    """

    loss: Tensor
    raw_model_loss: Tensor
    raw_ref_loss: Tensor
    implicit_acc: Tensor
    ratio: Tensor
    clip_ratio: Tensor


def linear_dpo(policy_pred: Tensor, reference_pred: Tensor, target: Tensor, **options: Any) -> LinearDPOLoss:
    """The loss block of Linear-DPO's scripts; predictions ``(2B, …)``, options of :class:`LinearDPO` but ``compat``."""
    method = LinearDPO(**options, compat="released")
    result = method.finish(method.score(policy_pred, reference_pred, target))
    ratio, errors = method.weight(result.margin), (result.policy_mse.mean(), result.reference_mse.mean())
    clipped = ratio.clamp(method.eta, 1 - method.eta)
    return LinearDPOLoss(result.loss, *errors, implicit_accuracy(result.margin), ratio, clipped)


@torch.no_grad()
def update_reference(reference: nn.Module, policy: nn.Module, decay: float) -> None:
    """``r ← δ·r + (1 − δ)·p`` over all parameters, after an optimizer step; buffers are copied.

    Raises:
        InvalidInput: the reference is held in less than float32, where it stands still: at a drift of 5e-6 a step half
            precision keeps 4 % of 1000 steps with δ = 0.9999, bfloat16 0.3 %.
    """
    if not 0 <= decay < 1:
        raise invalid("decay", decay, "out of range", "use 0.95 to 0.995")
    weights = dict(policy.named_parameters())
    for name, average in reference.named_parameters():
        if average.dtype not in (torch.float32, torch.float64):
            raise invalid("reference", average.dtype, f"cannot be averaged in ({name})", "pass reference.float()")
        average.lerp_(weights[name].to(average.dtype), 1 - decay)
    buffers = dict(policy.named_buffers())
    for name, buffer in reference.named_buffers():
        buffer.copy_(buffers[name])
