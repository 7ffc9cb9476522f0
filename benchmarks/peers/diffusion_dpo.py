"""Diffusion-DPO (arXiv 2311.12908): one timestep and one noise for both sides of a pair; no inversion."""

from __future__ import annotations

from torch import Tensor

from fastinvdpo.diffusion.prompt import Network

from .common import Inputs, Settings, pair_loss


def gradient(policy: Network, reference: Network, inputs: Inputs, settings: Settings) -> Tensor:
    """Adds the gradient; returns the loss. One policy and one reference call of 2B samples."""
    assert inputs.timesteps is not None and inputs.noise is not None
    noise = inputs.noise.repeat(2, *[1] * (inputs.noise.ndim - 1))
    alphas = settings.alphas_cumprod.to(noise.device, noise.dtype)[inputs.timesteps.repeat(2).to(noise.device)]
    alphas = alphas.view(-1, *[1] * (noise.ndim - 1))
    noisy = alphas**0.5 * inputs.latents + (1 - alphas) ** 0.5 * noise
    loss = pair_loss(policy, reference, inputs, noisy, noise, -0.5 * settings.beta)
    loss.backward()
    return loss.detach()
