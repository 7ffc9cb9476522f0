"""Flow-matching transformers from diffusers checkpoints: what they share, Stable Diffusion 3 and 3.5, FLUX.1."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastinvdpo.diffusion.schedule import FLOW, FLOWS, NoiseSchedule, dynamic_shift
from fastinvdpo.errors import invalid
from fastinvdpo.models.base import ATTENTION_PROJECTIONS, cast_inputs, check_guidance
from fastinvdpo.models.pipeline import PipelineModel, sides

if TYPE_CHECKING:
    from fastinvdpo.data.transforms import ImageGeometry

# The guidance that FluxPipeline gives a guidance-distilled transformer (FLUX.1-dev) by default.
_GUIDANCE = 3.5
MASKED_TOKENS = 512  # of the pipelines of MaskedFlowModel by default
_TEXT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_EMBEDDINGS = ("encoder_hidden_states", "pooled_projections")


class FlowModel(PipelineModel):
    """A pipeline around a transformer that predicts the velocity ``ε − x_0``.

    ``conditioning`` holds ``encoder_hidden_states`` ``(n, tokens, width)``, and of SD3 and FLUX.1
    ``pooled_projections`` ``(n, width)``.
    """

    network_folder = "transformer"
    options: ClassVar[tuple[str, ...]] = ("vae", "resolution", "max_sequence_length")
    default_lora_targets: tuple[str, ...] = (*ATTENTION_PROJECTIONS, *_TEXT_PROJECTIONS)
    schedulers: ClassVar[tuple[str, ...]] = FLOWS
    patch = 2
    _latents_per_token = 1  # on the channels of the transformer's input
    source_names: tuple[str, ...] = ()  # of the conditioning: further tokens behind those of the latents

    def _set_up(self, **options: Any) -> None:
        resolution = options.get("resolution")
        self._encode_options = {name: value for name, value in options.items() if name == "max_sequence_length"}
        side = sides(self._sample_size())
        if resolution is not None:
            if resolution % self.size_factor:
                remedy = f"use a multiple, such as {max(1, resolution // self.size_factor) * self.size_factor}"
                raise invalid("data.resolution", resolution, f"is not a multiple of {self.size_factor}", remedy)
            side = sides(resolution // self._vae_factor)
        self._set_sizes(side)
        self._tokens = (side[0] // self.patch) * (side[1] // self.patch)
        scheduler = str(self.scheduler_config["_class_name"])
        if scheduler in self.schedulers:
            self.schedule = self._noise_schedule()
        if scheduler not in self.schedulers or self.schedule.prediction_type != FLOW:
            problem = f"its scheduler {scheduler} is not one of flow matching"
            raise self._refuse(problem, "use a checkpoint as published")
        taken, given = self.pipeline.transformer.config.in_channels, self._latent_channels
        if taken != given * self._latents_per_token:
            problem = f"the transformer takes {taken} channels, the VAE gives {given}"
            raise self._refuse(problem, "use a text-to-image checkpoint")

    def _noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.scheduler_config, image_seq_len=self._tokens)

    def _mu(self, num_inference_steps: int) -> float:
        """The shift of the noise schedule, for a checkpoint whose is not constant."""
        return dynamic_shift(self.scheduler_config, self._tokens)

    def _levels(self, scheduler: Any, num_inference_steps: int) -> Tensor:
        shift = {}
        if scheduler.config.get("use_dynamic_shifting"):
            shift = {"mu": self._mu(num_inference_steps)}
        self._set_timesteps(scheduler, num_inference_steps, shift)
        return self._levels_of(scheduler.sigmas[:-1].unique().flip(0).double())  # Heun's come twice

    def _levels_of(self, noise: Tensor) -> Tensor:
        """The levels, float64, at which the noise of the schedule is σ ``(n,)``."""
        _, table = self.schedule.rates(torch.arange(-1, self.schedule.num_train_timesteps))
        below = torch.searchsorted(table, noise).sub(1).clamp(0, len(table) - 2)
        return below - 1 + (noise - table[below]) / table.diff()[below]

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, shift: dict[str, float]) -> None:
        """As most pipelines: equal steps down to ``1/N`` before the shift."""
        sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, **shift)

    def _sample_size(self) -> Any:
        """Sides of the latents of the model's own resolution."""
        return self.pipeline.default_sample_size

    @property
    def size_factor(self) -> int:
        return self._vae_factor * self.patch

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """Embeddings as the checkpoint's own pipeline computes them; ``geometry`` changes nothing."""
        return self._encode(self._texts(prompts, geometry))

    @abstractmethod
    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """The conditioning of texts."""

    def _shares_of_noise(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """The times of a transformer that multiplies them by 1000 again, rounded as in its pipeline."""
        return self.schedule.model_times(timesteps).to(dtype) / 1000


class MaskedFlowModel(FlowModel):
    """One whose prompts are as long as they are.

    ``conditioning`` holds ``encoder_hidden_states`` ``(n, max_sequence_length, width)`` and
    ``encoder_hidden_states_mask``, int64, 1 for the tokens of the prompt and 0 behind them. An embedding does not
    depend on the batch that it was made in.
    """

    embeddings = ("encoder_hidden_states", "encoder_hidden_states_mask")

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        length = self._encode_options.get("max_sequence_length", MASKED_TOKENS)
        found = self._encode_each(texts, length)
        hidden = torch.stack([pad(one, (0, 0, 0, length - len(one))) for one in found])
        mask = torch.stack([pad(one.new_ones(len(one), dtype=torch.int64), (0, length - len(one))) for one in found])
        return dict(zip(self.embeddings, (hidden, mask), strict=True))

    @abstractmethod
    def _encode_each(self, texts: list[str], length: int) -> list[Tensor]:
        """The embedding of each text, ``(tokens, width)``, of at most ``length`` tokens."""


class StableDiffusion3Model(FlowModel):
    """SD3 and SD3.5. A checkpoint without T5 has zeros in its place, as in diffusers."""

    family = "stable-diffusion-3"
    pipelines = ("StableDiffusion3Pipeline",)

    def _set_up(self, **options: Any) -> None:
        self.patch = self.pipeline.transformer.config.patch_size
        super()._set_up(**options)

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, shift: dict[str, float]) -> None:
        scheduler.set_timesteps(num_inference_steps, **shift)

    def _sample_size(self) -> Any:
        return self.pipeline.transformer.config.sample_size

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            texts, None, None, device=self.device, do_classifier_free_guidance=False, **self._encode_options
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        sample, cast = cast_inputs(network, latents, conditioning, _EMBEDDINGS)
        output: Tensor = network(
            hidden_states=sample,
            timestep=self.schedule.model_times(timesteps),
            **{name: cast[name] for name in _EMBEDDINGS},
            return_dict=False,
        )[0]
        return output


class FluxModel(FlowModel):
    """FLUX.1: the transformer sees 2 x 2 latents as one token, with its place as ``img_ids``.

    ``guidance_embedding``: the guidance scale that a distilled transformer gets in training; ``guidance`` in the
    conditioning ``(n,)`` goes before it. It has nothing to do with the two calls of classifier-free guidance.
    """

    family = "flux"
    pipelines = ("FluxPipeline",)
    options = (*FlowModel.options, "guidance_embedding")
    _latents_per_token = 4

    def _set_up(self, **options: Any) -> None:
        super()._set_up(**options)
        guidance = options.get("guidance_embedding")
        self.guidance_embedded = self.pipeline.transformer.config.guidance_embeds
        if guidance is not None and not self.guidance_embedded:
            problem = "is no input of this transformer; only FLUX.1-dev and its kind have one for guidance"
            raise invalid("model.guidance_embedding", guidance, problem, "set it to null")
        self._guidance = _GUIDANCE if guidance is None else guidance

    @classmethod
    def guidance_by_default(
        cls, index: Mapping[str, Any], scheduler: Mapping[str, Any], network: Mapping[str, Any]
    ) -> float:
        return super().guidance_by_default(index, scheduler, network) if network.get("guidance_embeds") else 1.0

    def guidance(self, scale: float | None) -> tuple[float, float | None]:
        """Guidance is an input of a distilled transformer (FLUX.1-dev), and means nothing to the others."""
        if self.guidance_embedded:
            return 1.0, check_guidance(self.own_guidance if scale is None else scale)
        return no_guidance(scale), None

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        hidden, pooled, _ = self.pipeline.encode_prompt(texts, None, device=self.device, **self._encode_options)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        sample, cast = cast_inputs(network, latents, conditioning, (*_EMBEDDINGS, *self.source_names))
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        tokens, hidden = pack_latents(sample), cast["encoder_hidden_states"]
        places = image_ids(height, width, like=hidden)
        for name in self.source_names:
            behind = image_ids(*(side // 2 for side in cast[name].shape[2:]), like=hidden)
            behind[:, 0] = 1
            tokens, places = torch.cat([tokens, pack_latents(cast[name])], dim=1), torch.cat([places, behind])
        guidance = conditioning.get("guidance")
        if guidance is None and self.guidance_embedded:
            guidance = torch.full((len(tokens),), self._guidance, device=tokens.device)
        output: Tensor = network(
            hidden_states=tokens,
            timestep=self._shares_of_noise(timesteps, sample.dtype),
            guidance=guidance,
            **{name: cast[name] for name in _EMBEDDINGS},
            txt_ids=hidden.new_zeros(hidden.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpack_latents(output[:, : height * width], height, width)


def no_guidance(scale: float | None) -> float:
    """1. Raises ``InvalidInput`` for the scale of a guidance that a transformer distilled without has not."""
    if scale is not None and check_guidance(scale) > 1:
        problem = "means nothing to this transformer, which was distilled to be sampled without guidance"
        raise invalid("guidance_scale", scale, problem, "leave it out, or pass 1")
    return 1.0


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
