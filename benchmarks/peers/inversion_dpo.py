"""Inversion-DPO (arXiv 2507.11554): one pair at a time, one side at a time, one guided call after another; the graphs
of all policy calls are kept until the loss is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network

from .common import Conditioning, Inputs, Settings, at, step_up


def gradient(policy: Network, reference: Network, inputs: Inputs, settings: Settings) -> Tensor:
    """Adds the gradient of the mean over pairs; returns that mean. 2N reference and 2N policy calls of 2 samples a
    pair.
    """
    pairs = inputs.latents.shape[0] // 2
    losses = []
    for pair in range(pairs):
        winner, loser = (side(policy, reference, inputs, row, settings) for row in (pair, pairs + pair))
        inside = 0.5 * settings.beta / settings.num_inference_steps * (winner - loser)
        loss = -torch.nn.functional.logsigmoid(inside)
        (loss / pairs).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def side(policy: Network, reference: Network, inputs: Inputs, row: int, settings: Settings) -> Tensor:
    """``Σ_k ‖p_k − r_k‖²/(2ᾱ_k)`` of one image, at the inputs of its inversion by the reference."""
    assert inputs.unconditional is not None
    rows = slice(row, row + 1)
    both = {
        name: torch.cat([inputs.unconditional[name][rows], told[rows]]) for name, told in inputs.conditioning.items()
    }
    latents, source, visited = inputs.latents[rows], -1, []
    with torch.no_grad():
        for target in settings.grid:
            prediction = guided(reference, latents, target, both, settings.guidance_scale)
            visited.append((target, latents, prediction))
            latents = step_up(settings, latents, prediction, source, target)
            source = target
    total = inputs.latents.new_zeros(())
    for level, inputs_of_level, frozen in visited:
        prediction = guided(policy, inputs_of_level, level, both, settings.guidance_scale)
        distance = (prediction - frozen).pow(2).mean()
        total = total + distance / (2 * settings.alphas_cumprod[level])
    return total


def guided(network: Network, latents: Tensor, level: int, both: Conditioning, scale: float) -> Tensor:
    twice = torch.cat([latents, latents])
    unconditional, conditional = network(twice, at(level, twice), both).chunk(2)
    return unconditional + scale * (conditional - unconditional)
