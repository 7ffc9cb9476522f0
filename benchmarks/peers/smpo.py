"""SmPO-Diffusion (arXiv 2506.02698): as InPO, but every step is made twice (ReNoise), and pairs have weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network

from .common import Inputs, Settings, at, pair_loss, recovered_noise, step_up


def gradient(policy: Network, reference: Network, inputs: Inputs, settings: Settings) -> Tensor:
    """Adds the gradient; returns the loss."""
    assert inputs.timesteps is not None and inputs.probabilities is not None
    level = int(inputs.timesteps[0])
    noisy = invert(policy, inputs, settings, level)
    target = recovered_noise(settings, noisy, inputs.latents, level)
    weight = settings.preference_scale * (2 * inputs.probabilities - 1)
    loss = pair_loss(policy, reference, inputs, noisy, target, -0.5 * settings.beta * weight)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def invert(policy: Network, inputs: Inputs, settings: Settings, level: int) -> Tensor:
    """A step with the prediction at its source, then the same step with the mean of that and the one at its end."""
    latents, source = inputs.latents, -1
    for target in (point for point in settings.grid if point < level):
        times = at(target, latents)
        first = policy(latents, times, inputs.conditioning)
        tentative = step_up(settings, latents, first, source, target)
        second = policy(tentative, times, inputs.conditioning)
        latents = step_up(settings, latents, (first + second) / 2, source, target)
        source = target
    return latents
