"""PNAPO: pairs of generated images on a rectified flow, where each side keeps the noise that it was generated from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.diffusion.schedule import NoiseSchedule, add_noise
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import Draws, PairBatch
from fastinvdpo.methods.single_timestep import SingleTimestepMethod
from fastinvdpo.methods.smpo import smoothed_pair_weight
from fastinvdpo.methods.statistics import Scored, pair_margin
from fastinvdpo.ops import PairStatistics, PreferenceLoss
from fastinvdpo.ops.preference_loss.utilities import UTILITIES

SeedDtype = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PNAPO(SingleTimestepMethod):
    """PNAPO (arXiv 2605.09433), from a summary of the paper; no code is released. On a rectified flow, where each image
    has the noise x_T that it was generated from, ``x_t = (1 − t)·x_0 + t·x_T`` and ``τ = x_T − x_0`` per side, one t in
    a pair::

        z = −β·(2σ(δ) − 1)·g(s)·(Δ_w − Δ_l)

    Attributes:
        beta: stands without the ½ of the other methods; whether of a mean or a sum is not published, here of the mean.
        score_scale: δ is this times the winner's score less the loser's. Its size decides β: at differences of order
            1e-2 a pair weighs δ/2, one two-hundredth.
        decay_start, decay_end: s₁ and s₂ in optimizer steps: ``g`` is 1 up to s₁, falls along a cosine and is ½ from s₂
            on. They are not published; None: g is 1.
        seed_dtype: the type in which a pipeline drew the noise of a seed, from ``torch.Generator()`` on the CPU, one
            for each image. The same seed gives other numbers in bf16.
    """

    name = "pnapo"
    needs_scores = True
    needs_noise = True
    draw_options = ("name", "seed_dtype")
    flow_only = True

    beta: float = 5000.0
    score_scale: float = 1.0
    decay_start: int | None = None
    decay_end: int | None = None
    seed_dtype: SeedDtype = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.score_scale < math.inf:
            raise invalid(
                "score_scale", self.score_scale, "must be positive and finite", "use 1 for scores as they are"
            )
        start, end = self.decay_start, self.decay_end
        if (start is None) != (end is None) or (start is not None and end is not None and not 0 <= start <= end):
            problem = "are not the first and the last step of a decay"
            raise invalid("decay_start, decay_end", (start, end), problem, "give both, or null for none")
        if self.seed_dtype not in get_args(SeedDtype):
            raise invalid("seed_dtype", self.seed_dtype, "is not known", f"use one of {get_args(SeedDtype)}")

    @property
    def preference(self) -> dict[str, Any]:
        return {**super().preference, "beta": 2 * self.beta}

    def margin(self, statistics: PairStatistics) -> Tensor:
        return pair_margin(statistics, 2 * self.beta)

    def pair_losses(self, scored: Scored) -> Tensor:
        return UTILITIES[self.utility].value(scored.margin, 2 * self.beta, self.label_smoothing)

    def schedule_weight(self, step: int) -> float:
        """``g`` after so many optimizer steps."""
        if self.decay_start is None or self.decay_end is None or step < self.decay_start:
            return 1.0
        if step >= self.decay_end:
            return 0.5
        share = (step - self.decay_start) / (self.decay_end - self.decay_start)
        return 0.75 + 0.25 * math.cos(math.pi * share)

    def pair_weight(self, batch: PairBatch) -> Tensor:
        if batch.scores is None:
            raise invalid("batch.scores", None, "pnapo weighs pairs by their scores", "give the data score columns")
        winner, loser = batch.scores.chunk(2)
        return reward_weight(self.score_scale * (winner - loser), self.schedule_weight(batch.step))

    def trajectory(
        self, schedule: NoiseSchedule, network: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        noise = self.noise_of(batch)
        return add_noise(schedule, batch.latents, noise, timesteps), noise

    def noise_of(self, batch: PairBatch) -> Tensor:
        """``x_T`` of each side, as the latents."""
        if batch.noise is not None:
            return batch.noise.to(batch.latents)
        if batch.seeds is None:
            problem = "pnapo needs the noise that each image was generated from, or its seed"
            raise invalid(
                "batch.noise", None, problem, "give the data columns noise_0 and noise_1, or seed_0 and seed_1"
            )
        shape, dtype = (1, *batch.latents.shape[1:]), _DTYPES[self.seed_dtype]
        drawn = [
            torch.randn(shape, generator=torch.Generator().manual_seed(s), dtype=dtype) for s in batch.seeds.tolist()
        ]
        return torch.cat(drawn).to(batch.latents)


def reward_weight(reward_gap: Tensor, schedule_weight: float) -> Tensor:
    """``(2σ(δ) − 1)·g``, float32 ``(B,)``."""
    return (schedule_weight * smoothed_pair_weight(torch.sigmoid(reward_gap.double()), 1.0)).to(torch.float32)


def pnapo(
    policy_pred: Tensor,
    reference_pred: Tensor,
    target: Tensor,
    *,
    beta: float,
    reward_gap: Tensor,
    schedule_weight: float = 1.0,
) -> PreferenceLoss:
    """The loss of :class:`PNAPO`, forward and backward in one op each.

    Args:
        policy_pred, reference_pred: predictions at ``x_t = (1 − t)·x_0 + t·x_T``, one t in a pair, ``(2B, …)``.
        target: ``x_T − x_0`` of each side.
        beta: stands without the ½ of the other methods; published are 2000 and 5000, of mean or sum is not known.
        reward_gap: δ, the winner's reward less the loser's, ``(B,)``. Its unit decides β: of order 1e-2 it shrinks β
            two-hundredfold.
        schedule_weight: g; falls from 1 to ½ along a cosine in the course of the published training.
    """
    if not isinstance(reward_gap, Tensor):
        raise invalid("reward_gap", reward_gap, "must be a tensor", "pass one reward difference a pair, (B,)")
    weight = reward_weight(reward_gap, schedule_weight)
    return PNAPO(beta=beta).loss(policy_pred, reference_pred, target, weight)
