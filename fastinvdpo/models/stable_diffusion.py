"""Stable Diffusion 1.x, 2.x (epsilon and v) and SDXL, its refiner included, from diffusers checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.models.base import cast_inputs
from fastinvdpo.models.pipeline import PipelineModel, sides

if TYPE_CHECKING:
    from fastinvdpo.data.transforms import ImageGeometry

_AESTHETIC_SCORE = 6.0  # of the refiner, as in diffusers' pipeline
_REFINED = 200  # the levels that SDXL's refiner was trained on, the lowest


class StableDiffusionModel(PipelineModel):
    """SD 1.x, 2.x and SDXL.

    ``conditioning`` holds ``encoder_hidden_states`` ``(n, tokens, width)``, and for SDXL also ``text_embeds``
    ``(n, width)`` (the pooled embedding of the second text encoder) and ``time_ids`` ``(n, 6)``: original size, crop
    and target size in pixels; for its refiner ``(n, 5)``, with an aesthetic score in the place of the target size.
    """

    family = "stable-diffusion"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    options = ("vae", "zero_terminal_snr")

    def _set_up(self, **options: Any) -> None:
        rescaled = options.get("zero_terminal_snr")
        self.is_sdxl = hasattr(self.pipeline, "text_encoder_2")
        self.refines = bool(self.pipeline.config.get("requires_aesthetics_score"))
        changed = {} if rescaled is None else {"rescale_betas_zero_snr": rescaled}
        self.schedule = NoiseSchedule.from_config({**self.scheduler_config, **changed})
        self._check_unet()
        self._set_sizes(sides(self.pipeline.unet.config.sample_size))

    @functools.cached_property
    def sampling_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.scheduler_config)

    @classmethod
    def guidance_by_default(
        cls, index: Mapping[str, Any], scheduler: Mapping[str, Any], network: Mapping[str, Any]
    ) -> float:
        """That of diffusers' pipeline; 1 for models distilled to few steps, which are sampled without guidance."""
        few_steps = scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
        if few_steps or scheduler.get("_class_name") in ("LCMScheduler", "TCDScheduler"):
            return 1.0
        return super().guidance_by_default(index, scheduler, network)

    def _levels(self, scheduler: Any, num_inference_steps: int) -> Tensor:
        if not self.refines:
            return super()._levels(scheduler, num_inference_steps)
        if num_inference_steps > _REFINED:
            raise ValueError(f"the refiner knows {_REFINED} levels")
        return torch.arange(num_inference_steps).mul(_REFINED // num_inference_steps).flip(0)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """Embeddings as the checkpoint's own pipeline computes them.

        SDXL checkpoints with ``force_zeros_for_empty_prompt`` have an unconditional embedding of zeros; there ``""``
        gives that one, as sampling without a negative prompt does. ``time_ids`` come from ``geometry``, or describe an
        uncropped image of the model's own resolution.
        """
        texts = self._texts(prompts, geometry)
        encoded = self.pipeline.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not self.is_sdxl:
            return {"encoder_hidden_states": encoded[0]}
        conditioning = {"encoder_hidden_states": encoded[0], "text_embeds": encoded[2]}
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([text == "" for text in texts], device=self.device)
            for value in conditioning.values():
                value[empty] = 0.0
        return {**conditioning, "time_ids": self._time_ids(len(texts), geometry)}

    def encode_geometry(self, geometry: Sequence[ImageGeometry]) -> dict[str, Tensor]:
        return {"time_ids": self._time_ids(len(geometry), geometry)} if self.is_sdxl else {}

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        added = ("text_embeds", "time_ids") if self.is_sdxl else ()
        sample, cast = cast_inputs(network, latents, conditioning, ("encoder_hidden_states", *added))
        if self.is_sdxl:
            # Sizes such as 1023 are not bf16 numbers; the UNet embeds them in float32 before it casts.
            cast["time_ids"] = conditioning["time_ids"]
        output: Tensor = network(
            sample,
            timesteps,
            encoder_hidden_states=cast["encoder_hidden_states"],
            added_cond_kwargs={name: cast[name] for name in added} or None,
            return_dict=False,
        )[0]
        return output

    def _time_ids(self, count: int, geometry: Sequence[ImageGeometry] | None) -> Tensor:
        shapes = [(self.image_size, (0, 0), self.image_size)] * count
        if geometry is not None:
            shapes = [(g.original_size, g.crop_top_left, g.target_size) for g in geometry]
        rows = [(*size, *crop, *((_AESTHETIC_SCORE,) if self.refines else target)) for size, crop, target in shapes]
        return torch.tensor(rows, dtype=torch.float32, device=self.device).reshape(count, 5 if self.refines else 6)

    def _check_unet(self) -> None:
        """Raise ``InvalidInput`` for relatives that want other inputs: inpainting, depth, consistency."""
        pipeline: Any = self.pipeline
        config, channels = pipeline.unet.config, self._latent_channels
        needed = ("text_encoder_2",) if self.refines else ("text_encoder", "text_encoder_2")
        problem = None
        if config.in_channels != channels:
            problem = f"the UNet takes {config.in_channels} channels, the VAE gives {channels}"
        elif config.time_cond_proj_dim is not None or config.class_embed_type is not None:
            problem = "the UNet wants extra conditioning"
        elif (config.addition_embed_type == "text_time") != self.is_sdxl:
            problem = f"addition_embed_type {config.addition_embed_type!r} does not belong to this kind of pipeline"
        elif self.whole and self.is_sdxl and any(getattr(pipeline, part) is None for part in needed):
            problem = "one of the two text encoders is missing"
        if problem is not None:
            raise self._refuse(problem, "use a text-to-image checkpoint of SD 1.x, 2.x or SDXL")
