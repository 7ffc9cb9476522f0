"""FLUX.2-klein from diffusers checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.models.base import cast_inputs
from fastinvdpo.models.flow import FlowModel, no_guidance

_STEPS = 50  # that Flux2KleinPipeline makes by default; the noise of training is shifted as for so many


class Flux2KleinModel(FlowModel):
    """FLUX.2-klein, base and distilled. A latent ``(128, h, w)`` is what the transformer sees as ``h·w`` tokens: 2 x 2
    of the VAE's, normalized by the running statistics that the VAE holds.
    """

    family = "flux2-klein"
    pipelines = ("Flux2KleinPipeline",)
    default_lora_targets = (*FlowModel.default_lora_targets, "to_qkv_mlp_proj")
    patch = 1

    def _vae_sizes(self) -> tuple[int, int]:
        channels, factor = super()._vae_sizes()
        return 4 * channels, 2 * factor

    def _sample_size(self) -> Any:
        return self.pipeline.default_sample_size // 2

    def _noise_schedule(self) -> NoiseSchedule:
        if not self.scheduler_config.get("use_dynamic_shifting"):
            return super()._noise_schedule()
        constant = {"use_dynamic_shifting": False, "shift": math.exp(self._mu(_STEPS))}
        return NoiseSchedule.from_config({**self.scheduler_config, **constant})

    def _mu(self, num_inference_steps: int) -> float:
        """Linear in the tokens, along a line of its own for each number of steps; from 4,301 tokens on along one."""
        many = 0.00016927 * self._tokens + 0.45666666  # 200 steps
        if self._tokens > 4300:
            return many
        few = 8.73809524e-05 * self._tokens + 1.89833333  # 10 steps
        return few + (many - few) * (num_inference_steps - 10) / 190

    @classmethod
    def guidance_by_default(
        cls, index: Mapping[str, Any], scheduler: Mapping[str, Any], network: Mapping[str, Any]
    ) -> float:
        return 1.0 if index.get("is_distilled") else super().guidance_by_default(index, scheduler, network)

    def guidance(self, scale: float | None) -> tuple[float, float | None]:
        return (no_guidance(scale), None) if self.pipeline.config.is_distilled else super().guidance(scale)

    def _normalized(self, latents: Tensor) -> Tensor:
        n, channels, height, width = latents.shape
        patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        mean, std = self._statistics()
        return (patches.reshape(n, 4 * channels, height // 2, width // 2) - mean) / std

    def _unnormalized(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        n, channels, height, width = latents.shape
        patches = (latents * std + mean).reshape(n, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return patches.reshape(n, channels // 4, 2 * height, 2 * width)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm, epsilon = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        return norm.running_mean.view(1, -1, 1, 1), (norm.running_var.view(1, -1, 1, 1) + epsilon).sqrt()

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        hidden, _ = self.pipeline.encode_prompt(texts, device=self.device, **self._encode_options)
        return {"encoder_hidden_states": hidden}

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        sample, cast = cast_inputs(network, latents, conditioning, ("encoder_hidden_states",))
        hidden = cast["encoder_hidden_states"]
        height, width = sample.shape[2:]
        output: Tensor = network(
            hidden_states=sample.flatten(2).transpose(1, 2),
            timestep=self._shares_of_noise(timesteps, sample.dtype),
            guidance=None,
            encoder_hidden_states=hidden,
            txt_ids=_places((1, 1, 1, hidden.shape[1]), hidden),
            img_ids=_places((1, height, width, 1), hidden),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(sample.shape)


def _places(sides: tuple[int, ...], like: Tensor) -> Tensor:
    """Image, row, column and place in the text of every token, int64 ``(n, tokens, 4)``."""
    grid = torch.cartesian_prod(*(torch.arange(side, device=like.device) for side in sides))
    return grid.expand(len(like), -1, -1)
