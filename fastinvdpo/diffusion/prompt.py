"""A network's conditioning with its guidance, and forward passes on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastinvdpo.diffusion.schedule import stack_coefficients
from fastinvdpo.errors import invalid
from fastinvdpo.ops import affine_step
from fastinvdpo.ops.affine_step import MAX_OUTPUTS

Conditioning = Mapping[str, Tensor]
"""What a network takes besides latents and timesteps: every tensor has the samples as its leading dimension."""

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``network(latents (n, …), timesteps int64 (n,), conditioning) -> prediction (n, …)``. Timesteps are levels; the
adapters in ``models/`` turn them into a flow model's own times (``NoiseSchedule.model_times``)."""


@dataclass(frozen=True)
class Prompt:
    """The conditioning of a batch: ``ε = ε_uncond + g·(ε_cond − ε_uncond)``; ``g = 1``: one forward pass."""

    conditional: Conditioning
    unconditional: Conditioning | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance_scale != 1 and self.unconditional is None:
            remedy = "pass the embedding of the empty prompt as unconditional, or guidance_scale=1"
            raise invalid("guidance_scale", self.guidance_scale, "needs unconditional conditioning", remedy)

    def select(self, rows: Tensor) -> Prompt:
        """The prompt of some samples: ``rows`` is an int64 index into the batch."""
        return self._each(lambda tensor: tensor[rows.to(tensor.device)])

    def first(self, count: int) -> Prompt:
        """The prompt of the first ``count`` samples, without copying anything."""
        return self._each(lambda tensor: tensor[:count])

    def _each(self, take: Callable[[Tensor], Tensor]) -> Prompt:
        given = self.conditional, self.unconditional
        taken = [None if c is None else {name: take(tensor) for name, tensor in c.items()} for c in given]
        return Prompt(taken[0] or {}, taken[1], self.guidance_scale)

    @property
    def weights(self) -> list[float]:
        """What each network output of :func:`evaluate` counts in the guided prediction."""
        guided = self.guidance_scale != 1 and self.unconditional is not None
        return [1.0 - self.guidance_scale, self.guidance_scale] if guided else [1.0]

    def repeat_interleave(self, repeats: int) -> Prompt:
        """The prompt of a batch in which every sample occurs ``repeats`` times in a row."""
        count = next(iter(self.conditional.values())).shape[0]
        return self.select(torch.arange(count).repeat_interleave(repeats))


def evaluate(network: Network, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> tuple[list[Tensor], list[float]]:
    """Make the one forward pass of a guided prediction: ``(outputs, weights)`` with ``ε = Σ_j weights_j·outputs_j``."""
    if prompt.unconditional is None or len(prompt.weights) == 1:
        return [network(latents, timesteps, prompt.conditional)], [1.0]
    both = {name: torch.cat([prompt.unconditional[name], prompt.conditional[name]]) for name in prompt.conditional}
    prediction = network(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
    return list(prediction.chunk(2)), prompt.weights


def chunked(network: Network, max_batch: int | None) -> Network:
    """``network`` in forward passes of at most ``max_batch`` samples; None: of all samples at once."""
    if max_batch is None:
        return network
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise invalid("max_batch", max_batch, "must be a positive whole number", "pass None for a batch of any size")
    size = max_batch

    def in_chunks(latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        if latents.shape[0] <= size:
            return network(latents, timesteps, conditioning)
        chunks = {name: tensor.split(size) for name, tensor in conditioning.items()}
        parts = enumerate(zip(latents.split(size), timesteps.split(size), strict=True))
        return torch.cat([network(*part, {name: chunks[name][i] for name in chunks}) for i, part in parts])

    return in_chunks


def weighted_sum(outputs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``Σ_j weights_j·outputs_j`` through ``affine_step``, differentiable; one output of weight 1 is returned."""
    first, *others = outputs
    if not others and weights[0] == 1:
        return first
    for start in range(0, max(len(others), 1), MAX_OUTPUTS):
        chunk = others[start : start + MAX_OUTPUTS]
        scale = [1.0 if start else weights[0], *weights[1 + start : 1 + start + len(chunk)]]
        columns = torch.tensor(scale, dtype=torch.float64).expand(first.shape[0], -1)
        first = affine_step(first, chunk, stack_coefficients(first, *columns.unbind(1)))
    return first


def predict(network: Network, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
    """The (guided) prediction ``(n, …)`` at ``latents``; differentiable in the network's parameters."""
    return weighted_sum(*evaluate(network, latents, timesteps, prompt))
