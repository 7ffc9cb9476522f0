"""Inputs that tests and benchmarks share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.diffusion.schedule import NoiseSchedule

GOLDEN = Path(__file__).parent / "golden"

SD_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def sd_schedule(**changes: object) -> NoiseSchedule:
    """Stable Diffusion's noise schedule."""
    return NoiseSchedule.from_config({**SD_SCHEDULER, **changes})


def predictions(
    pairs: int = 3,
    shape: tuple[int, ...] = (4, 8, 8),
    *,
    gap: float = 1e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(policy, reference, target)``, ``(2B, *shape)``: predictions that miss the target by about 1 and differ by
    about ``gap``.
    """
    generator = torch.Generator().manual_seed(seed)
    target, error, difference = torch.randn(3, 2 * pairs, *shape, generator=generator, dtype=torch.float64)
    reference = target + error
    return (reference + gap * difference).to(dtype), reference.to(dtype), target.to(dtype)


def toy_network(
    scale: float = 0.7, seed: int = 0, channels: int = 4
) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """A smooth nonlinear network that depends on latents, time and prompt; sample by sample the same in any batch."""
    mixing = (
        torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / channels
    )

    def network(latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        # Elementwise sums in a fixed order, so that the result of a sample cannot depend on its batch.
        mixed = sum(latents[:, c : c + 1] * mixing[:, c].to(latents.dtype).view(1, -1, 1, 1) for c in range(channels))
        time = (timesteps.to(latents.dtype) / 1000).view(-1, 1, 1, 1)
        prompt = conditioning["prompt"].to(latents.dtype).view(-1, 1, 1, 1)
        return scale * torch.tanh(mixed + latents + prompt) * (1 + time) + 0.1 * time

    return network


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases, one value of each axis, in which each two values of two axes meet: far fewer than their product."""
    values = [list(axis) for axis in axes]
    places = range(len(values))
    left = {
        frozenset({(i, a), (j, b)})
        for i, j in itertools.combinations(places, 2)
        for a, b in itertools.product(range(len(values[i])), range(len(values[j])))
    }
    cases = []
    while left:
        chosen = dict(min(left, key=sorted))
        for i in places:
            if i not in chosen:
                met = [
                    sum(frozenset({(i, a), other}) in left for other in chosen.items()) for a in range(len(values[i]))
                ]
                chosen[i] = met.index(max(met))
        left -= {frozenset(both) for both in itertools.combinations(chosen.items(), 2)}
        cases.append(tuple(values[i][chosen[i]] for i in places))
    return cases


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the settings of one recorded run, such as ``"dpo/sd15_b2"``."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())
