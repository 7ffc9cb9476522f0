"""Batches and networks that the tests of methods share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo.methods import METHODS, ChainObjective, PairBatch, build_objective
from tests.cases import sd_schedule, toy_network

SCHEDULE = sd_schedule()
LEVELS = 5
PAIRED = [name for name, method in METHODS.items() if not (method.unpaired or method.needs_noise)]
"""Methods that train on what :func:`pairs` gives."""
REFERENCE = toy_network()


def pairs(count: int = 4, dtype: torch.dtype = torch.float64) -> PairBatch:
    """Scores put every other winner first."""
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randn(count, generator=generator, dtype=torch.float64).to(dtype).repeat(2)
    return PairBatch(
        latents=torch.randn(2 * count, 4, 4, 4, generator=generator, dtype=torch.float64).to(dtype),
        conditioning={"prompt": prompt},
        unconditional={"prompt": torch.zeros_like(prompt)},
        sample_index=torch.arange(100, 100 + count),
        scores=torch.tensor([0.3, 0.21, 0.25, 0.2, 0.2, 0.23, 0.22, 0.24], dtype=dtype)[: 2 * count]
        if count <= 4
        else None,
        noise=torch.randn(2 * count, 4, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
            dtype
        ),
    )


def select(batch: PairBatch, chosen: list[int]) -> PairBatch:
    """Some of the pairs."""
    rows = torch.tensor(chosen + [batch.pairs + pair for pair in chosen])

    def pick(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tensor[rows] for name, tensor in value.items()}
        return value[rows] if isinstance(value, Tensor) else value

    fields = {name: pick(value) for name, value in vars(batch).items() if name != "sample_index"}
    return dataclasses.replace(batch, **fields, sample_index=batch.sample_index[chosen])


class Policy:
    """A toy network with one differentiable parameter, off the reference by a little."""

    def __init__(self, gap: float = 1e-2) -> None:
        steps = torch.arange(4.0, dtype=torch.float64).view(4, 1, 1)
        self.weight = (1 + gap * steps).requires_grad_()

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return self.weight * REFERENCE(latents, timesteps, conditioning)


class Small(nn.Module):
    """Two convolutions with time and prompt; counts the samples of its calls, with and without gradient."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"first": (6, 4, 3, 3), "second": (4, 6, 3, 3), "told": (6, 2)}
        for name, shape in shapes.items():
            weight = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(weight.to(dtype)))
        self.calls: list[tuple[bool, int]] = []

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        self.calls.append((torch.is_grad_enabled(), latents.shape[0]))
        told = torch.stack([timesteps.to(latents.dtype) / 1000, conditioning["prompt"].to(latents.dtype)], dim=1)
        hidden = torch.nn.functional.conv2d(latents, self.first, padding=1) + (told @ self.told.T)[..., None, None]
        return torch.nn.functional.conv2d(torch.tanh(hidden), self.second, padding=1)

    def evaluations(self, with_gradient: bool) -> int:
        return sum(samples for gradient, samples in self.calls if gradient == with_gradient)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])


def networks(dtype: torch.dtype = torch.float64) -> tuple[Small, Small]:
    """A policy, and a reference a little off it."""
    policy, reference = Small(0, dtype), Small(0, dtype)
    with torch.no_grad():
        for parameter, other in zip(reference.parameters(), Small(1, dtype).parameters(), strict=True):
            parameter += 0.1 * other
    return policy, reference.requires_grad_(False)


def chain_objective(variant: str = "endpoint", **options: Any) -> ChainObjective:
    options = {"variant": variant, "num_inference_steps": LEVELS, "beta": 20.0, **options}
    built = build_objective("inversion-dpo", SCHEDULE, **options)
    assert isinstance(built, ChainObjective)
    return built


def relative(one: Tensor, other: Tensor) -> float:
    """``‖one − other‖/‖other‖``, in float64."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())
