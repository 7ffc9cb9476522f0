"""Linear-DPO: a weight that falls linearly in the margin, and a reference that may follow the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import Follows, check_count
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.statistics import Scored, implicit_accuracy
from fastinvdpo.ops.preference_loss.utilities import LINEAR_KAPPA

Reference = Literal["frozen", "ema"]


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
