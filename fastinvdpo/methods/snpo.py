"""Diff-SNPO: preferences reversed where the prompt is dropped, and a loser's term that is bounded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import STREAM_SWAP, PairBatch
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.statistics import Scored
from fastinvdpo.ops import PairStatistics, PreferenceLoss, philox


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
    draw_options = (*DiffusionDPO.draw_options, "swap_probability")
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
        rows = rows.to(batch.latents.device)
        mask = None if batch.mask is None else batch.mask[rows]
        return dataclasses.replace(batch, latents=batch.latents[rows], conditioning=conditioning, mask=mask)

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
