"""DDIM-InPO (arXiv 2503.18454): the policy inverts the whole batch to the level of its first pair."""

from __future__ import annotations

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network

from .common import Inputs, Settings, at, pair_loss, recovered_noise, step_up


def gradient(policy: Network, reference: Network, inputs: Inputs, settings: Settings) -> Tensor:
    """Adds the gradient; returns the loss. All samples make the steps to the grid levels below the first timestep."""
    assert inputs.timesteps is not None
    level = int(inputs.timesteps[0])
    noisy = invert(policy, inputs, settings, level)
    target = recovered_noise(settings, noisy, inputs.latents, level)
    loss = pair_loss(policy, reference, inputs, noisy, target, -0.5 * settings.beta)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def invert(policy: Network, inputs: Inputs, settings: Settings, level: int) -> Tensor:
    """Every step adds ``η·√V`` of noise, V of the interval above the one it crossed; the last one ends at the top."""
    alphas, latents, source = settings.alphas_cumprod.double(), inputs.latents, -1
    for step, target in enumerate(point for point in settings.grid if point < level):
        prediction = policy(latents, at(target, latents), inputs.conditioning)
        latents = step_up(settings, latents, prediction, source, target)
        here, above = alphas[target], alphas[min(target + settings.spacing, len(alphas) - 1)]
        variance = (1 - here) / (1 - above) * (1 - above / here)
        assert inputs.noise is not None
        latents = latents + settings.eta * variance**0.5 * inputs.noise[step]
        source = target
    return latents
