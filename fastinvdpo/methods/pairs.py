"""What every method takes and gives: a batch of pairs, its random draws, the loss and what it was computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Prompt
from fastinvdpo.errors import invalid
from fastinvdpo.ops import PreferenceLoss

# Offsets of the random streams of one pair; an inversion uses one offset per step, the strata one each.
STREAM_TIMESTEP, STREAM_NOISE, STREAM_SWAP, STREAM_INVERSION, STREAM_STRATUM = 0, 1, 2, 1 << 16, 1 << 17


@dataclass(frozen=True)
class PairBatch:
    """B pairs of clean latents and what belongs to them. Tensors of 2B samples are stacked [winners; losers].

    Attributes:
        latents: ``(2B, …)``.
        conditioning: what the network takes besides latents and timesteps, every tensor ``(2B, …)``.
        sample_index: int64 ``(B,)`` on the host: each pair's number in the whole run. It keys all random numbers.
        unconditional: the empty prompt's conditioning, ``(2B, …)``; needed with guidance.
        scores: preference scores ``(2B,)``; needed by SmPO.
        trajectory: what :meth:`ChainObjective.reference_trajectory` gave for these latents, ``(2B, …)``; computed when
            None.
        reference_pred: what :meth:`ChainObjective.reference_predictions` gave for that trajectory, ``(2B, N, …)``; the
            reference makes forward passes when None, and none otherwise.
    """

    latents: Tensor
    conditioning: dict[str, Tensor]
    sample_index: Tensor
    unconditional: dict[str, Tensor] | None = None
    scores: Tensor | None = None
    trajectory: Tensor | None = None
    reference_pred: Tensor | None = None

    @property
    def pairs(self) -> int:
        return self.latents.shape[0] // 2

    def prompt(self, guidance_scale: float = 1.0) -> Prompt:
        return Prompt(self.conditioning, self.unconditional, guidance_scale)


@dataclass(frozen=True)
class Draws:
    """Random numbers to use instead of the counter-based ones.

    Attributes:
        timesteps: int64 ``(B,)`` on the host.
        noise: Diffusion-DPO: ``(B, …)``, one per pair; InPO: ``(S, 2B, …)``, one per step of the inversion and sample.
    """

    timesteps: Tensor | None = None
    noise: Tensor | None = None


@dataclass(frozen=True)
class ObjectiveOutput(PreferenceLoss):
    """The loss with what it was computed from: timesteps ``(2B,)`` or ``(2B, K)`` on the host, the others ``(2B, …)``
    or ``(2B, K, …)``; a method without a reference is one whose reference predicts the target.
    """

    timesteps: Tensor
    noisy_latents: Tensor
    target: Tensor | None
    policy_pred: Tensor
    reference_pred: Tensor


def check_batch(batch: PairBatch) -> None:
    samples = batch.latents.shape[0]
    if samples == 0 or samples % 2:
        raise invalid("batch.latents.shape", tuple(batch.latents.shape), "must be (2B, …)", "stack [winners; losers]")
    if batch.sample_index.shape != (samples // 2,) or batch.sample_index.dtype != torch.int64:
        shown = (tuple(batch.sample_index.shape), batch.sample_index.dtype)
        remedy = f"pass shape ({samples // 2},)"
        raise invalid("batch.sample_index", shown, "must be int64 of one number per pair", remedy)
    for name, tensor in batch.conditioning.items():
        if tensor.shape[0] != samples:
            raise invalid(
                f"batch.conditioning[{name!r}].shape", tuple(tensor.shape), "must have 2B rows", f"pass {samples} rows"
            )
