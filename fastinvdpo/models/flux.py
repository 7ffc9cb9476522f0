"""FLUX.1 from diffusers checkpoints: a transformer over packed latents, CLIP's pooled embedding and T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo.errors import invalid
from fastinvdpo.models.base import cast_inputs, check_conditioning, check_guidance
from fastinvdpo.models.pipeline import sides
from fastinvdpo.models.transformers import FlowModel

# What FluxPipeline tells a guidance-distilled transformer (FLUX.1-dev) when nothing else is asked for.
_GUIDANCE = 3.5


class FluxModel(FlowModel):
    """FLUX.1: the transformer sees 2 x 2 latents as one token, with its place as ``img_ids``.

    ``guidance_embedding``: the guidance scale that a distilled transformer is told in training; ``guidance`` in the
    conditioning ``(n,)`` goes before it. It has nothing to do with the two calls of classifier-free guidance.
    """

    family = "flux"
    pipelines = ("FluxPipeline",)
    options = ("resolution", "max_sequence_length", "guidance_embedding")

    def _set_up(self, **options: Any) -> None:
        super()._set_up(**options)
        guidance_embedding = options.get("guidance_embedding")
        distilled = self.pipeline.transformer.config.guidance_embeds
        if guidance_embedding is not None and not distilled:
            problem = "is not what this transformer asks for; only FLUX.1-dev and its kind are told a guidance"
            raise invalid("model.guidance_embedding", guidance_embedding, problem, "set it to null")
        self.guidance_embedded = distilled
        self._told = _GUIDANCE if guidance_embedding is None else guidance_embedding

    @classmethod
    def guidance_by_default(cls, pipeline: str, scheduler: Mapping[str, Any], network: Mapping[str, Any]) -> float:
        return super().guidance_by_default(pipeline, scheduler, network) if network.get("guidance_embeds") else 1.0

    def guidance(self, scale: float | None) -> tuple[float, float | None]:
        """Guidance is told to a distilled transformer (FLUX.1-dev), and means nothing to the others."""
        if self.guidance_embedded:
            return 1.0, check_guidance(self.own_guidance if scale is None else scale)
        if scale is not None and check_guidance(scale) > 1:
            problem = "means nothing to this transformer, which is told no guidance"
            raise invalid("guidance_scale", scale, problem, "leave it out, or pass 1")
        return 1.0, None

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, shift: dict[str, float]) -> None:
        """As FluxPipeline: equal steps down to ``1/N`` before the shift."""
        sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, **shift)

    def _own_sides(self) -> tuple[int, int]:
        return sides(self.pipeline.default_sample_size)

    def _check_channels(self, taken: int, given: int) -> None:
        super()._check_channels(taken, 4 * given)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled, _ = self.pipeline.encode_prompt(texts, None, device=self.device, **self._encode_options)
        return hidden, pooled

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        names = ("encoder_hidden_states", "pooled_projections")
        check_conditioning(conditioning, names)
        sample, cast = cast_inputs(network, latents, conditioning)
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        tokens, hidden = pack_latents(sample), cast["encoder_hidden_states"]
        told = conditioning.get("guidance")
        if told is None and self.guidance_embedded:
            told = torch.full((len(tokens),), self._told, device=tokens.device)
        # As FluxPipeline: the transformer multiplies by 1000 again.
        times = self.schedule.model_times(timesteps).to(sample.dtype) / 1000
        output: Tensor = network(
            hidden_states=tokens,
            timestep=times,
            guidance=told,
            **{name: cast[name] for name in names},
            txt_ids=hidden.new_zeros(hidden.shape[1], 3),
            img_ids=image_ids(height, width, like=hidden),
            return_dict=False,
        )[0]
        return unpack_latents(output, height, width)


def pack_latents(latents: Tensor) -> Tensor:
    """``(n, C, 2h, 2w)`` -> ``(n, h·w, 4C)``: one token for 2 x 2 latents."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, (height // 2) * (width // 2), channels * 4)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """``(n, h·w, 4C)`` -> ``(n, C, 2h, 2w)``."""
    n, _, channels = tokens.shape
    patches = tokens.reshape(n, height, width, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, channels // 4, 2 * height, 2 * width)


def image_ids(height: int, width: int, *, like: Tensor) -> Tensor:
    """Row and column of every token, ``(h·w, 3)``; the first of the three numbers is 0."""
    sides = (torch.arange(side, device=like.device) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(like.dtype)
