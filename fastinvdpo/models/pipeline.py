"""What all diffusers pipelines share: loading, the VAE in both directions, saving."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.diffusion.schedule import inversion_levels
from fastinvdpo.errors import invalid
from fastinvdpo.models import base, kohya
from fastinvdpo.models.adapters import DIFFUSERS_FILE, adapter_contents, order_metadata
from fastinvdpo.models.base import DiffusionModel, Origin
from fastinvdpo.models.checkpoints import ENCODERS, copy_other_parts, load_pipeline, pipeline_files, vae_config
from fastinvdpo.models.single_file import load_parts
from fastinvdpo.ops import philox

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data.transforms import ImageGeometry

_STREAM_POSTERIOR = 1 << 21  # no other random number of a run has this offset


class PipelineModel(DiffusionModel):
    """A diffusers pipeline seen as network, text encoders, VAE and schedule.

    Attributes:
        pipelines: the pipeline classes of the family.
        guidance_argument: what their call names the scale of guidance.
        whole: whether text encoders and VAE were loaded.
        vae_batch: latents that are decoded at once. Images are encoded one by one: sums round as the batch is, and what
            a pair becomes must not depend on the pairs beside it.
    """

    pipelines: ClassVar[tuple[str, ...]]
    guidance_argument: ClassVar[str] = "guidance_scale"
    vae_batch: ClassVar[int] = 4

    def __init__(self, pipeline: Any, origin: Origin | None = None, *, whole: bool = True, **options: Any) -> None:
        self.pipeline, self.origin, self.whole = pipeline, origin, whole
        network: Any = getattr(pipeline, self.network_folder)
        self.network: nn.Module = network
        self.scheduler_config = {"_class_name": type(pipeline.scheduler).__name__, **dict(pipeline.scheduler.config)}
        self._vae = pipeline.vae.config if whole or origin is None else vae_config(origin)
        self._latent_channels, self._vae_factor = self._vae_sizes()
        self._set_up(**options)
        index = {**dict(pipeline.config), "_class_name": type(pipeline).__name__}
        self.own_guidance = self.guidance_by_default(index, self.scheduler_config, dict(network.config))
        for module in self.frozen_modules():
            module.requires_grad_(False).eval()

    @abstractmethod
    def _set_up(self, **options: Any) -> None:
        """Check the parts, and set ``schedule``, ``latent_shape`` and ``image_size``; ``options``: the class's."""

    def _vae_sizes(self) -> tuple[int, int]:
        """Channels of a latent, and how many pixels wide one is."""
        return self._vae["latent_channels"], 2 ** (len(self._vae["block_out_channels"]) - 1)

    def _set_sizes(self, side: tuple[int, int]) -> None:
        self.latent_shape = (self._latent_channels, *side)
        self.image_size = (side[0] * self._vae_factor, side[1] * self._vae_factor)

    @classmethod
    def load(
        cls, origin: Origin, *, dtype: torch.dtype = torch.float32, frozen_parts: bool = True, **options: Any
    ) -> PipelineModel:
        """Load a directory in diffusers' format, a hub id or a single file; safetensors only.

        Raises ``InvalidInput`` for nothing loadable, another kind of pipeline, or a denoiser that does not fit.
        """
        parts: Any = (origin, cls.pipelines, cls.network_folder)
        loaded = load_parts(*parts, dtype=dtype, frozen_parts=frozen_parts)
        pipeline = load_pipeline(*parts, dtype=dtype, frozen_parts=frozen_parts, loaded=loaded)
        return cls(pipeline, origin, whole=frozen_parts, **options)

    @classmethod
    def files(cls, origin: Origin) -> dict[str, list[Path]]:
        return pipeline_files(origin, cls.network_folder)

    @classmethod
    def guidance_by_default(
        cls, index: Mapping[str, Any], scheduler: Mapping[str, Any], network: Mapping[str, Any]
    ) -> float:
        diffusers = require("diffusers", extra="train", purpose="sampling")
        parameters = inspect.signature(getattr(diffusers, index["_class_name"]).__call__).parameters
        return float(parameters[cls.guidance_argument].default)

    def sampling_levels(self, num_inference_steps: int) -> Tensor:
        inversion_levels(self.schedule, num_inference_steps)  # its check of the step count
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        try:
            return self._levels(scheduler, num_inference_steps)
        except (TypeError, ValueError) as error:
            problem = f"cannot be made by the checkpoint's {type(scheduler).__name__} ({error})"
            raise invalid("num_inference_steps", num_inference_steps, problem, "use another number of steps") from error

    def _levels(self, scheduler: Any, num_inference_steps: int) -> Tensor:
        scheduler.set_timesteps(num_inference_steps)
        # One of second order calls twice a step.
        times = torch.as_tensor(scheduler.timesteps)[:: scheduler.order].double()
        return times.round().long().clamp(0, self.schedule.num_train_timesteps - 1).unique().flip(0)

    def frozen_modules(self) -> tuple[nn.Module, ...]:
        return tuple(part for name in ENCODERS if (part := getattr(self.pipeline, name, None)) is not None)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Any], posterior: Tensor | None = None) -> Tensor:
        """Mean or sample of the VAE's posterior, shifted and scaled as in the checkpoint, ``(n, C, h, w)`` float32, of
        videos ``(n, C, frames, h, w)``.

        Images of one call share a size, whose sides are multiples of ``size_factor``.
        """
        self._need_frozen_parts()
        shown = [list(image) if isinstance(image, list | tuple) else [image] for image in images]
        for i, frames in enumerate(shown):
            if len(frames) != self.frames:
                problem = f"are not the {self.frames} of the model"
                raise invalid(f"len(images[{i}])", len(frames), problem, "set data.frames, of the family wan alone")
        flat = [frame for frames in shown for frame in frames]
        base.check_images(flat)
        self._check_sizes(flat)
        vae = self.pipeline.vae
        latents = []
        for i, frames in enumerate(shown):
            mean, std = self._posterior(base.pixels_of(frames, "RGB").to(vae.device, vae.dtype))
            latents.append(mean.to(torch.float32))
            if posterior is not None:
                index, shape = posterior[i : i + 1].to(vae.device), tuple(latents[-1].shape[1:])
                noise = philox.normal(0, _STREAM_POSTERIOR, index, shape)
                latents[-1] += std.to(torch.float32) * noise
        return self._normalized(torch.cat(latents))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image]:
        """Images, by the operations of diffusers' pipelines in their order: the same bytes from the same latents."""
        self._need_frozen_parts()
        base.check_latents(latents, self.latent_shape)
        vae = self.pipeline.vae
        images = []
        for chunk in latents.detach().to(vae.device, torch.float32).split(self.vae_batch):
            decoded = self._decoded(self._unnormalized(chunk).to(vae.dtype))
            images += base.images_of(((decoded * 0.5 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8))
        return images

    def save(self, directory: str | Path, network: nn.Module | None = None) -> None:
        """Write the whole pipeline as safetensors; diffusers loads the directory as well.

        Frozen parts that were not loaded are copied from the checkpoint, or where it has them as a variant, loaded for
        this.
        """
        network = self.network if network is None else network
        plain, left_out = base.saveable_network(network), None if self.whole else self.origin
        if left_out is not None and copy_other_parts(left_out, Path(directory), self.network_folder):
            self.save_network(directory, plain)
            return
        pipeline = self.pipeline if left_out is None else self.load(left_out).pipeline
        own = getattr(pipeline, self.network_folder)
        setattr(pipeline, self.network_folder, plain)
        try:
            pipeline.save_pretrained(directory, safe_serialization=True)
        finally:
            setattr(pipeline, self.network_folder, own)

    def save_lora(self, directory: str | Path, network: nn.Module, formats: Sequence[str] = ("diffusers",)) -> None:
        """Write ``pytorch_lora_weights.safetensors``, which the pipeline's ``load_lora_weights`` reads, and with format
        ``kohya`` the file of :mod:`fastinvdpo.models.kohya`.
        """
        plain, kind = base.unwrap(network), self.network_folder
        tensors, settings = adapter_contents(plain, self.origin)
        if "diffusers" in formats:
            parts = {f"{kind}_lora_layers": tensors, f"{kind}_lora_adapter_metadata": settings}
            self.pipeline.save_lora_weights(str(directory), **parts)
            order_metadata(Path(directory) / DIFFUSERS_FILE)
        if "kohya" in formats:
            kohya.save_kohya(self.family, plain, tensors, Path(directory))

    def translated_lora(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        config: Any = {"unet_config": self.pipeline.unet.config} if self.network_folder == "unet" else {}
        found = self.pipeline.lora_state_dict(dict(tensors), **config)
        weights, alphas = found if isinstance(found, tuple) else (found, None)
        return {**weights, **{name: torch.tensor(float(alpha)) for name, alpha in (alphas or {}).items()}}

    def _texts(self, prompts: Sequence[str], geometry: Sequence[ImageGeometry] | None) -> list[str]:
        """The prompts, when they can be encoded."""
        self._need_frozen_parts()
        texts = base.check_prompts(prompts)
        if geometry is not None and len(geometry) != len(texts):
            problem = f"has not one entry for each of {len(texts)} prompts"
            raise invalid("geometry", len(geometry), problem, "pass one ImageGeometry a prompt")
        return texts

    def _refuse(self, problem: str, remedy: str) -> Exception:
        source = self.pipeline.name_or_path if self.origin is None else str(self.origin.path)
        return invalid("model.path", source, problem, remedy)

    def _need_frozen_parts(self) -> None:
        if not self.whole:
            remedy = "load the model with frozen_parts=True"
            raise invalid("frozen_parts", False, "left text encoders and VAE out, which this needs", remedy)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, as the VAE gives them."""
        distribution = self.pipeline.vae.encode(pixels).latent_dist
        return distribution.mode(), distribution.std

    def _decoded(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.pipeline.vae.decode(latents, return_dict=False)[0]
        return pixels

    def _normalized(self, latents: Tensor) -> Tensor:
        """What the network sees of the VAE's latents."""
        shift, scale = self._latent_affine()
        return (latents - shift) * scale

    def _unnormalized(self, latents: Tensor) -> Tensor:
        shift, scale = self._latent_affine()
        return latents / scale + shift

    def _latent_affine(self) -> tuple[Any, Any]:
        """``(shift, scale)`` with ``latents = (vae output - shift) * scale``; tensors where they differ by channel."""
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shape = (-1, *[1] * (len(self.latent_shape) - 1))
            shift, spread = (torch.tensor(v, device=self.pipeline.vae.device).reshape(shape) for v in (mean, std))
            return shift, config.get("scaling_factor", 1.0) / spread
        return config.get("shift_factor") or 0.0, config["scaling_factor"]

    @property
    def size_factor(self) -> int:
        """Sides of images are multiples of this."""
        return self._vae_factor

    def _check_sizes(self, images: Sequence[Image]) -> None:
        factor = self.size_factor
        for i, image in enumerate(images):
            if image.size != images[0].size:
                problem = f"differs from that of the first image, {images[0].size}"
                raise invalid(f"images[{i}].size", image.size, problem, "set data.resolution, or pass them separately")
            if image.width % factor or image.height % factor:
                problem = f"is not a multiple of the VAE's factor {factor}"
                if factor != self._vae_factor:
                    problem = f"is not a multiple of {factor}, the VAE's factor times the patches' size"
                remedy = f"resize the image, or set data.resolution to {min(self.image_size)}"
                raise invalid(f"images[{i}].size", image.size, problem, remedy)


def sides(sample_size: Any) -> tuple[int, int]:
    """``(height, width)`` of a configuration's ``sample_size``."""
    return (sample_size, sample_size) if isinstance(sample_size, int) else (sample_size[0], sample_size[1])
