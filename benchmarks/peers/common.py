"""What the released steps share: their inputs, the float32 schedule, a DDIM step upwards, the pair loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network

Conditioning = Mapping[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """B pairs; tensors of 2B samples are stacked [winners; losers].

    Attributes:
        latents: ``(2B, …)``, clean.
        conditioning, unconditional: what the network is told, ``(2B, …)``; the latter for guidance.
        timesteps: int64 ``(B,)`` on the host, as drawn; Inversion-DPO draws none.
        noise: Diffusion-DPO: ``(B, …)``; InPO: ``(S, 2B, …)``, as drawn.
        probabilities: SmPO: that the winner is preferred, ``(B,)``.
    """

    latents: Tensor
    conditioning: Conditioning
    unconditional: Conditioning | None = None
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters under the names of the methods' configuration.

    Attributes:
        alphas_cumprod: float32 ``(1000,)``, which the released codes keep as it is.
        steps_offset: the first level of an inversion grid.
    """

    alphas_cumprod: Tensor
    beta: float
    steps_offset: int = 1
    num_inference_steps: int = 10
    eta: float = 0.1
    preference_scale: float = 10.0
    guidance_scale: float = 2.0

    @property
    def spacing(self) -> int:
        return len(self.alphas_cumprod) // self.num_inference_steps

    @property
    def grid(self) -> list[int]:
        """The levels of a whole inversion, ascending."""
        return [self.steps_offset + k * self.spacing for k in range(self.num_inference_steps)]


def scaled_linear(device: torch.device | str = "cpu") -> Tensor:
    """Stable Diffusion's ``ᾱ``, computed and kept in float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, 0).to(device)


def step_up(settings: Settings, latents: Tensor, prediction: Tensor, source: int, target: int) -> Tensor:
    """A DDIM step from level ``source`` (negative: the clean end, which stands at level 0) up to ``target``: the clean
    latent that the prediction stands for, noised again.
    """
    below, above = settings.alphas_cumprod[max(source, 0)], settings.alphas_cumprod[target]
    clean = (latents - root(1 - below) * prediction) / root(below)
    return root(above) * clean + root(1 - above) * prediction


def root(value: Tensor) -> Tensor:
    """The float32 root. Rounded from the float64 one, it has the same last bit on every CPU; torch's own has not."""
    return value.double().sqrt().float()


def recovered_noise(settings: Settings, noisy: Tensor, clean: Tensor, level: int) -> Tensor:
    """``(x_t − √ᾱ_t·x_0) / √(1 − ᾱ_t)``, one level for the whole batch."""
    alpha = settings.alphas_cumprod[level].to(clean.dtype)
    return (noisy - alpha**0.5 * clean) / (1 - alpha) ** 0.5


def at(level: int, latents: Tensor) -> Tensor:
    """The timestep of every sample."""
    return torch.full((latents.shape[0],), level, device=latents.device)


def pair_loss(
    policy: Network, reference: Network, inputs: Inputs, noisy: Tensor, target: Tensor, scale: float | Tensor
) -> Tensor:
    """``−log σ(scale·((‖p − τ‖²_w − ‖p − τ‖²_l) − (‖r − τ‖²_w − ‖r − τ‖²_l)))``: four means, then their differences."""
    assert inputs.timesteps is not None
    times = inputs.timesteps.repeat(2).to(noisy.device)

    def difference(network: Network) -> Tensor:
        errors = (network(noisy, times, inputs.conditioning) - target).pow(2).flatten(1).mean(1)
        winners, losers = errors.chunk(2)
        return winners - losers

    model = difference(policy)
    with torch.no_grad():
        frozen = difference(reference)
    return -torch.nn.functional.logsigmoid(scale * (model - frozen)).mean()
