"""Deterministic sampling (DDIM, arXiv 2010.02502, eta = 0), so that two networks are compared from the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastinvdpo.diffusion.prompt import Prompt, evaluate
from fastinvdpo.diffusion.schedule import affine_coefficients, inversion_levels, stack_coefficients
from fastinvdpo.errors import invalid
from fastinvdpo.models.base import DiffusionModel
from fastinvdpo.ops import affine_step, philox

# Keeps the initial noise apart from the random streams of training under the same seed.
STREAM_SAMPLING = 1 << 20


@torch.no_grad()
def sample(
    model: DiffusionModel,
    network: nn.Module,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
    places: Sequence[int] | None = None,
) -> Tensor:
    """Latents ``(n, *model.latent_shape)``, float32, that ``network`` draws for ``n`` prompts.

    The grid is that of the inversion (diffusers' "leading" spacing) walked downwards, from standard normal noise at
    its top level to the clean end. The noise of a prompt depends on ``seed`` and its place in the list alone, not
    on the batch it travels in; ``places`` says which those are when ``prompts`` are a part of that list. Guidance
    ``ε_uncond + g·(ε_cond − ε_uncond)`` doubles the network evaluations; ``guidance_scale = 1`` is none.

    Raises InvalidInput for no prompts, another number of places, or a step count, batch size or guidance scale that
    means nothing.
    """
    if len(prompts) == 0:
        raise invalid("prompts", list(prompts), "is empty", "pass at least one prompt")
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "must be positive", "pass 100, say")
    if not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise invalid(
            "guidance_scale", guidance_scale, "must be a finite number, not negative", "pass 1 for no guidance"
        )
    numbers = list(range(len(prompts)) if places is None else places)
    if len(numbers) != len(prompts):
        raise invalid("places", len(numbers), f"are not those of {len(prompts)} prompts", "pass one for each")
    levels = inversion_levels(model.schedule, num_inference_steps).flip(0)
    was_training = network.training
    network.eval()
    try:
        parts = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            prompt = encode_prompt(model, batch, guidance_scale)
            draws = torch.tensor(numbers[start : start + len(batch)], device=model.device)
            noise = philox.normal(seed, STREAM_SAMPLING, draws, model.latent_shape)
            parts.append(_descend(model, network, noise, prompt, levels))
    finally:
        network.train(was_training)
    return torch.cat(parts)


def encode_prompt(model: DiffusionModel, prompts: Sequence[str], guidance_scale: float) -> Prompt:
    """The encoded captions, with the empty caption beside them unless ``guidance_scale`` is 1, which needs none."""
    if guidance_scale == 1:
        return Prompt(model.encode_prompts(prompts))
    return Prompt(model.encode_prompts(prompts), model.encode_prompts([""] * len(prompts)), guidance_scale)


def _descend(model: DiffusionModel, network: nn.Module, latents: Tensor, prompt: Prompt, levels: Tensor) -> Tensor:
    """Walk the descending ``levels`` and one step more, to the clean end (level -1)."""

    def predict(latents: Tensor, timesteps: Tensor, conditioning: object) -> Tensor:
        return model.predict(network, latents, timesteps, conditioning)  # type: ignore[arg-type]

    below = torch.cat([levels[1:], levels.new_tensor([-1])])
    for source, target in zip(levels, below, strict=True):
        timesteps = source.expand(len(latents))
        outputs, weights = evaluate(predict, latents, timesteps.to(latents.device), prompt)
        kept, scale = affine_coefficients(model.schedule, timesteps, target.expand(len(latents)))
        columns = [kept, *(scale * weight for weight in weights)]
        latents = affine_step(latents, outputs, stack_coefficients(latents, *columns))
    return latents
