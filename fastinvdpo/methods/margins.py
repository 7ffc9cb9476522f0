"""Methods with a margin of their own: Diff-SNPO bounds the loser's term, MaPO has no reference."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import STREAM_SWAP, PairBatch, check_count
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.statistics import Scored
from fastinvdpo.ops import PairStatistics, PreferenceLoss, philox

# φ(x) = x/(eˣ − 1) = 1 − x/2 + g(x), g even: the terms of g from x² on, 1e-13 at ½.
_SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160)
_SMALL = 0.5


@dataclass(frozen=True, kw_only=True)
class SNPO(DiffusionDPO):
    """Diff-SNPO (ICLR 2026), from two summaries of the paper, as its code could not be had. They disagree on a sign,
    which here follows from the derivation: the winner's error must fall. With ``D = κ·Δ``::

        z = −β(D_w − μ(D_l)),    μ(D) = −log(λ·exp(−D) + 1 − λ),    loss = −log σ(z)

    Attributes:
        beta: stands without the ½ of the other methods.
        loser_share: λ in (0, 1]: making a loser worse earns at most ``−log(1 − λ)``; 1 bounds nothing.
        error_scale: κ > 0, not published. Where ``κ·Δ`` is small, ``μ(D) = λ·D`` and nothing is bounded.
        swap_probability: share of pairs that lose their prompt and change sides, so that the unconditional model
            learns the opposite; in addition to the data's own caption dropout, which should be 0.
    """

    name = "snpo"
    utilities = ("snpo",)

    beta: float = 2000.0
    utility: str = "snpo"
    loser_share: float = 0.9
    error_scale: float = 1.0
    swap_probability: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.loser_share <= 1:
            raise invalid("loser_share", self.loser_share, "out of range", "use a number above 0, up to 1")
        if not 0 < self.error_scale < math.inf:
            raise invalid("error_scale", self.error_scale, "must be positive and finite", "use 1 for mean errors")
        if not 0 <= self.swap_probability <= 1:
            raise invalid("swap_probability", self.swap_probability, "out of range", "use a probability")

    @property
    def guided(self) -> bool:
        return self.swap_probability > 0

    def prepare(self, batch: PairBatch, seed: int) -> PairBatch:
        if not self.swap_probability:
            return batch
        if batch.unconditional is None:
            remedy = "pass the empty prompt's conditioning, or swap_probability=0"
            raise invalid("batch.unconditional", None, "is what reversed pairs are conditioned on", remedy)
        reversed_ = philox.uniform(seed, STREAM_SWAP, batch.sample_index) < self.swap_probability
        rows = torch.arange(2 * batch.pairs).unflatten(0, (2, -1))
        rows = torch.where(reversed_, rows.flip(0), rows).flatten()

        def chosen(conditional: Tensor, empty: Tensor) -> Tensor:
            where = reversed_.repeat(2).to(conditional.device).view(-1, *[1] * (conditional.ndim - 1))
            return torch.where(where, empty, conditional[rows.to(conditional.device)])

        conditioning = {name: chosen(value, batch.unconditional[name]) for name, value in batch.conditioning.items()}
        latents = batch.latents[rows.to(batch.latents.device)]
        return dataclasses.replace(batch, latents=latents, conditioning=conditioning)

    def margin(self, statistics: PairStatistics) -> Tensor:
        winner, loser = (self.error_scale * statistics.difference).chunk(2)
        # Never the exponential of a positive number; at D = 0 both branches have the slope λ, and the first is taken.
        better = loser < 0
        share = torch.full_like(loser, self.loser_share)
        rate = torch.where(better, 1 - share, share)
        size = torch.where(better, loser, -loser)
        bounded = torch.where(better, loser, torch.zeros_like(loser)) - torch.log1p(rate * torch.expm1(size))
        return -self.beta * (winner - bounded)

    def pair_losses(self, scored: Scored) -> Tensor:
        return softplus(-scored.margin)


def snpo(policy_pred: Tensor, reference_pred: Tensor, target: Tensor, **options: Any) -> PreferenceLoss:
    """The loss of :class:`SNPO` with these options, for pairs whose sides the caller has swapped where the prompt was
    dropped; predictions as of :func:`fastinvdpo.preference_loss`, ``(2B, …)``.
    """
    return SNPO(**options).loss(policy_pred, reference_pred, target)


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
