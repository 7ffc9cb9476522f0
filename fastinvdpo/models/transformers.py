"""Flow-matching transformers from diffusers checkpoints: what Stable Diffusion 3 and FLUX share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastinvdpo.diffusion.schedule import FLOW, NoiseSchedule, dynamic_shift
from fastinvdpo.errors import invalid
from fastinvdpo.models.base import ATTENTION_PROJECTIONS
from fastinvdpo.models.pipeline import PipelineModel, sides

if TYPE_CHECKING:
    from fastinvdpo.data.transforms import ImageGeometry


class FlowModel(PipelineModel):
    """A pipeline around a transformer that predicts the velocity ``ε − x_0``.

    ``conditioning`` holds ``encoder_hidden_states`` ``(n, tokens, width)`` and ``pooled_projections`` ``(n, width)``.
    """

    network_folder = "transformer"
    options: ClassVar[tuple[str, ...]] = ("resolution", "max_sequence_length")
    # Image and text have projections of their own.
    default_lora_targets = (*ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    patch = 2

    def _set_up(self, **options: Any) -> None:
        resolution = options.get("resolution")
        self._encode_options = {name: value for name, value in options.items() if name == "max_sequence_length"}
        side = self._own_sides()
        if resolution is not None:
            if resolution % self.size_factor:
                remedy = f"use a multiple, such as {max(1, resolution // self.size_factor) * self.size_factor}"
                raise invalid("data.resolution", resolution, f"is not a multiple of {self.size_factor}", remedy)
            side = sides(resolution // self._vae_factor)
        self.latent_shape = (self._vae["latent_channels"], *side)
        self.image_size = (side[0] * self._vae_factor, side[1] * self._vae_factor)
        self._tokens = (side[0] // self.patch) * (side[1] // self.patch)
        if not str(self.scheduler_config["_class_name"]).startswith("FlowMatch"):
            name = self.scheduler_config["_class_name"]
            raise self._refuse(f"its scheduler {name} is not one of flow matching", "use a checkpoint as published")
        self.schedule = NoiseSchedule.from_config(self.scheduler_config, image_seq_len=self._tokens)
        assert self.schedule.prediction_type == FLOW
        self._check_channels(self.pipeline.transformer.config.in_channels, self._vae["latent_channels"])

    def _levels(self, scheduler: Any, num_inference_steps: int) -> Tensor:
        shift = {}
        if scheduler.config.get("use_dynamic_shifting"):
            shift = {"mu": dynamic_shift(scheduler.config, self._tokens)}
        self._set_timesteps(scheduler, num_inference_steps, shift)
        noise = scheduler.sigmas[:-1].unique().double()  # Heun's come twice
        _, table = self.schedule.rates(torch.arange(self.schedule.num_train_timesteps))
        below = torch.searchsorted(table, noise).sub(1).clamp(0, len(table) - 2)
        return (below + (noise - table[below]) / table.diff()[below]).flip(0)

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, shift: dict[str, float]) -> None:
        scheduler.set_timesteps(num_inference_steps, **shift)

    def _own_sides(self) -> tuple[int, int]:
        """``(height, width)`` of the latents of the model's own resolution."""
        return sides(self.pipeline.transformer.config.sample_size)

    def _check_channels(self, taken: int, given: int) -> None:
        if taken != given:
            problem = f"the transformer takes {taken} channels, the VAE gives {given}"
            raise self._refuse(problem, "use a text-to-image checkpoint")

    @property
    def size_factor(self) -> int:
        return self._vae_factor * self.patch

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """Embeddings as the checkpoint's own pipeline computes them; ``geometry`` changes nothing."""
        hidden, pooled = self._encode(self._texts(prompts, geometry))
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def _encode(self, texts: list[str]) -> tuple[Any, Any]:
        raise NotImplementedError
