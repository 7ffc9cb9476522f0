"""Diffusion-DPO: forward noising, one noise for winner and loser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.diffusion.schedule import NoiseSchedule, add_noise
from fastinvdpo.methods.pairs import STREAM_NOISE, Draws, PairBatch
from fastinvdpo.methods.single_timestep import SingleTimestepMethod
from fastinvdpo.ops import philox


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO(SingleTimestepMethod):
    """Diffusion-DPO (arXiv 2311.12908). On a flow schedule it is Flow-DPO (arXiv 2501.13918) with a constant β: the
    target is the velocity ``ε − x_0``.
    """

    name = "diffusion-dpo"

    beta: float = 5000.0

    def trajectory(
        self, schedule: NoiseSchedule, policy: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        noise = draws.noise
        if noise is None:
            index = batch.sample_index.to(batch.latents.device)
            noise = philox.normal(seed, STREAM_NOISE, index, tuple(batch.latents.shape[1:]), batch.latents.dtype)
        noise = torch.cat([noise, noise])
        return add_noise(schedule, batch.latents, noise, timesteps), noise
