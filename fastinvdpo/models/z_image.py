"""Z-Image and Z-Image-Turbo from diffusers checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo.models.base import ATTENTION_PROJECTIONS, cast_inputs, check_guidance
from fastinvdpo.models.flow import MaskedFlowModel

_TURBO_SHIFT = 3.0  # of the scheduler of Z-Image-Turbo; that of Z-Image is 6


class ZImageModel(MaskedFlowModel):
    """Z-Image: one transformer for the tokens of text and image, which takes prompts of any length in a list."""

    family = "z-image"
    pipelines = ("ZImagePipeline",)
    default_lora_targets = ATTENTION_PROJECTIONS

    @classmethod
    def guidance_by_default(
        cls, index: Mapping[str, Any], scheduler: Mapping[str, Any], network: Mapping[str, Any]
    ) -> float:
        """That of diffusers' pipeline; 0, which is none, for Z-Image-Turbo, which its scheduler's shift tells."""
        turbo = scheduler.get("shift") == _TURBO_SHIFT and not scheduler.get("use_dynamic_shifting")
        return 0.0 if turbo else super().guidance_by_default(index, scheduler, network)

    def guidance(self, scale: float | None) -> tuple[float, float | None]:
        """The pipeline adds ``scale·(ε_cond − ε_uncond)`` to ε_cond: its 0 is the 1 of others."""
        return 1.0 + check_guidance(self.own_guidance if scale is None else scale), None

    def _sample_size(self) -> Any:
        return 128  # 1024 pixels

    def _encode_each(self, texts: list[str], length: int) -> list[Tensor]:
        found: list[Tensor] = self.pipeline.encode_prompt(
            texts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )[0]
        return found

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        sample, cast = cast_inputs(network, latents, conditioning, self.embeddings)
        hidden, mask = (cast[name] for name in self.embeddings)
        output: list[Tensor] = network(
            list(sample.unsqueeze(2).unbind()),
            (1000 - self.schedule.model_times(timesteps)) / 1000,  # 1 is the image, 0 the noise
            [one[:count] for one, count in zip(hidden, mask.sum(1).tolist(), strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(output).squeeze(2)
