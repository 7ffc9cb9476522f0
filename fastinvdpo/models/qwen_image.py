"""Qwen-Image from diffusers checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastinvdpo.diffusion.prompt import weighted_sum
from fastinvdpo.models.base import cast_inputs
from fastinvdpo.models.flow import MaskedFlowModel, pack_latents, unpack_latents


class QwenImageModel(MaskedFlowModel):
    """Qwen-Image: a transformer on 2 x 2 latents as one token, and a video VAE that sees an image as one frame. The
    network sees as many tokens as the longest prompt of its batch has.
    """

    family = "qwen-image"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    guidance_argument = "true_cfg_scale"
    _latents_per_token = 4

    def _vae_sizes(self) -> tuple[int, int]:
        return self._vae["z_dim"], 2 ** len(self._vae["temperal_downsample"])

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._posterior(pixels.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def _decoded(self, latents: Tensor) -> Tensor:
        return super()._decoded(latents.unsqueeze(2)).squeeze(2)

    def _encode_each(self, texts: list[str], length: int) -> list[Tensor]:
        hidden, mask = self.pipeline.encode_prompt(texts, device=self.device, max_sequence_length=length)
        if mask is None:  # all prompts are equally long
            return list(hidden)
        return [one[:count] for one, count in zip(hidden, mask.sum(1).tolist(), strict=True)]

    def guided(self, outputs: list[Tensor], weights: list[float]) -> tuple[list[Tensor], list[float]]:
        """As the pipeline: the guided prediction keeps the norm of the conditional one in every token."""
        if len(outputs) == 1:
            return outputs, weights
        combined = pack_latents(weighted_sum(outputs, weights))
        size = pack_latents(outputs[1]).norm(dim=-1, keepdim=True)
        height, width = (side // 2 for side in outputs[0].shape[2:])
        return [unpack_latents(combined * (size / combined.norm(dim=-1, keepdim=True)), height, width)], [1.0]

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        sample, cast = cast_inputs(network, latents, conditioning, (*self.embeddings, *self.source_names))
        hidden, mask = (cast[name] for name in self.embeddings)
        shortest, longest = torch.stack(mask.sum(1).aminmax()).tolist()
        images = [sample, *(cast[name] for name in self.source_names)]
        shape: Any = [(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]
        _, height, width = shape[0]
        output: Tensor = network(
            hidden_states=torch.cat([pack_latents(image) for image in images], dim=1),
            timestep=self._shares_of_noise(timesteps, sample.dtype),
            guidance=None,
            encoder_hidden_states=hidden[:, :longest],
            encoder_hidden_states_mask=None if shortest == longest else mask[:, :longest],
            img_shapes=[shape] * len(sample),
            return_dict=False,
        )[0]
        return unpack_latents(output[:, : height * width], height, width)
