"""Wan 2.1 and 2.2 (TI2V-5B), text to video, from diffusers checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastinvdpo.diffusion.schedule import inversion_levels
from fastinvdpo.errors import invalid
from fastinvdpo.models.base import ATTENTION_PROJECTIONS, Origin, cast_inputs, check_frames
from fastinvdpo.models.checkpoints import model_index
from fastinvdpo.models.flow import FlowModel

_IMAGE_SIZE = (480, 832)  # (height, width) that WanPipeline makes by default
_TOKENS = 512  # of its prompts by default


class WanModel(FlowModel):
    """A latent is ``(C, frames, h, w)``, of ``4k + 1`` frames of video ``k + 1``; an image is a video of one frame.

    ``frames``: of the videos that are encoded, and made; one when None.
    """

    family = "wan"
    pipelines = ("WanPipeline",)
    options: ClassVar[tuple[str, ...]] = (*FlowModel.options, "frames")
    default_lora_targets = ATTENTION_PROJECTIONS
    schedulers = (*FlowModel.schedulers, "UniPCMultistepScheduler")
    vae_batch = 1

    @classmethod
    def load(cls, origin: Origin, **options: Any) -> WanModel:
        index = model_index(origin)
        if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0] is not None:
            problem = (
                "has two transformers, for more and for less noise (Wan 2.2 A14B), and one would be left untrained"
            )
            raise invalid("model.path", str(origin.path), problem, "use Wan 2.1, or TI2V-5B of Wan 2.2")
        model: Any = super().load(origin, **options)
        return model

    def _set_up(self, **options: Any) -> None:
        self.frames = check_frames(options.pop("frames", None) or 1)
        patches = self.pipeline.transformer.config.patch_size
        if patches[0] != 1 or patches[1] != patches[2]:
            raise self._refuse(f"its transformer has patches of {tuple(patches)}", "use a checkpoint as published")
        self.patch = patches[1]
        super()._set_up(**options)
        if self.scheduler_config.get("use_dynamic_shifting"):
            raise self._refuse("its schedule is shifted by the size, as in no Wan", "use a checkpoint as published")

    def _vae_sizes(self) -> tuple[int, int]:
        return self._vae.get("z_dim", 16), self._vae.get("scale_factor_spatial", 8)

    def _sample_size(self) -> tuple[int, int]:
        return _IMAGE_SIZE[0] // self._vae_factor, _IMAGE_SIZE[1] // self._vae_factor

    def _set_sizes(self, side: tuple[int, int]) -> None:
        super()._set_sizes(side)
        self.latent_shape = (self._latent_channels, 1 + (self.frames - 1) // 4, *side)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return super()._posterior(pixels.transpose(0, 1).unsqueeze(0))

    def _decoded(self, latents: Tensor) -> Tensor:
        return super()._decoded(latents).transpose(1, 2).flatten(0, 1)

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        settings = {"max_sequence_length": _TOKENS, **self._encode_options}
        hidden, _ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.device, **settings
        )
        return {"encoder_hidden_states": hidden}

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, shift: dict[str, float]) -> None:
        scheduler.set_timesteps(num_inference_steps)

    def _levels(self, scheduler: Any, num_inference_steps: int) -> Tensor:
        """Those of UniPC are of its times, which are whole numbers as the network gets them."""
        if scheduler.config.get("flow_shift") is None:
            return super()._levels(scheduler, num_inference_steps)
        scheduler.set_timesteps(num_inference_steps)
        return self._levels_of(scheduler.timesteps.double() / self.schedule.num_train_timesteps)

    def solver(self, num_inference_steps: int) -> Any | None:
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        if scheduler.config.get("flow_shift") is None:
            return None
        inversion_levels(self.schedule, num_inference_steps)  # its check of the step count
        scheduler.set_timesteps(num_inference_steps)
        scheduler.set_begin_index(0)
        return scheduler

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        sample, cast = cast_inputs(network, latents, conditioning, ("encoder_hidden_states",))
        times = self.schedule.model_times(timesteps)
        if self.pipeline.config.expand_timesteps:  # TI2V-5B: a time for every token
            tokens = sample[0, 0].numel() // self.patch**2
            times = times.unsqueeze(1).expand(-1, tokens)
        output: Tensor = network(
            hidden_states=sample,
            timestep=times,
            encoder_hidden_states=cast["encoder_hidden_states"],
            return_dict=False,
        )[0]
        return output
