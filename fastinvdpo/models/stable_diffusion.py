"""Stable Diffusion 1.x, 2.x (epsilon and v) and SDXL from diffusers checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models.base import (
    DiffusionModel,
    cast_inputs,
    check_conditioning,
    check_images,
    check_latents,
    check_prompts,
    saveable_network,
)
from fastinvdpo.models.checkpoints import copy_other_parts, load_pipeline, local_folder, pipeline_files, vae_config
from fastinvdpo.schedule import NoiseSchedule

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data.transforms import ImageGeometry

# Images that pass the VAE at once: it runs in float32, and at 1024 x 1024 its activations are the largest of the run.
_VAE_BATCH = 4


class Origin(NamedTuple):
    """The checkpoint whose frozen parts were left on the disk."""

    path: str | Path
    revision: str | None
    variant: str | None


class StableDiffusionModel(DiffusionModel):
    """A diffusers pipeline seen as network, text encoders, VAE and schedule.

    ``conditioning`` holds ``encoder_hidden_states`` ``(n, tokens, width)``, and for SDXL also ``text_embeds``
    ``(n, width)`` (the pooled embedding of the second text encoder) and ``time_ids`` ``(n, 6)``: original size, crop
    and target size in pixels.
    """

    family = "stable-diffusion"

    def __init__(self, pipeline: Any, origin: Origin | None = None) -> None:
        self.pipeline = pipeline
        self._origin = origin
        self.network: nn.Module = pipeline.unet
        self.is_sdxl = hasattr(pipeline, "text_encoder_2")
        self.scheduler_config = dict(pipeline.scheduler.config)
        self.schedule = NoiseSchedule.from_config(self.scheduler_config)
        vae = pipeline.vae.config if origin is None else vae_config(origin.path, origin.revision)
        _check_unet(pipeline, self.is_sdxl, vae["latent_channels"], whole=origin is None)
        side = _side(pipeline.unet.config.sample_size)
        self._vae_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self.latent_shape = (vae["latent_channels"], *side)
        self.image_size = (side[0] * self._vae_factor, side[1] * self._vae_factor)
        for module in self.frozen_modules():
            module.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        unet_init: str | Path | None = None,
        vae: str | Path | None = None,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
        frozen_parts: bool = True,
    ) -> StableDiffusionModel:
        """Load a directory in diffusers' format or a hub id; safetensors only.

        Args:
            unet_init: directory or hub id with a UNet (in ``unet/`` or at the top) to start from, without variant.
            vae: directory or hub id with another VAE (in ``vae/`` or at the top).

        Raises:
            InvalidInput: nothing loadable there, another kind of pipeline, or a UNet that does not fit.
        """
        if not frozen_parts and vae is not None:
            raise invalid("vae", str(vae), "would not be loaded", "leave it out, or load the frozen parts as well")
        pipeline = load_pipeline(
            path,
            unet_init=unet_init,
            vae=vae,
            revision=revision,
            variant=variant,
            dtype=dtype,
            frozen_parts=frozen_parts,
        )
        return cls(pipeline, None if frozen_parts else Origin(path, revision, variant))

    @classmethod
    def files(
        cls,
        path: str | Path,
        *,
        unet_init: str | Path | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> dict[str, list[Path]]:
        return pipeline_files(path, unet_init, revision, variant)

    def frozen_modules(self) -> tuple[nn.Module, ...]:
        names = ("vae", "text_encoder", "text_encoder_2")
        return tuple(part for name in names if (part := getattr(self.pipeline, name, None)) is not None)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Mean of the VAE's posterior, shifted and scaled as the checkpoint asks, ``(n, C, h, w)`` float32.

        The mean, not a sample: the same picture must have the same latent each time it is drawn, or cached trajectories
        and resumed runs would differ. Images of one call share a size, whose sides are multiples of the VAE's factor.
        """
        self._need_frozen_parts()
        check_images(images)
        self._check_sizes(images)
        vae = self.pipeline.vae
        latents = []
        for chunk in _chunks(images, _VAE_BATCH):
            pixels = torch.stack([_colour_pixels(image) for image in chunk]).to(vae.device, vae.dtype)
            latents.append(vae.encode(pixels).latent_dist.mode().to(torch.float32))
        shift, scale = self._latent_affine()
        return (torch.cat(latents) - shift) * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image]:
        self._need_frozen_parts()
        check_latents(latents, channels=self.latent_shape[0])
        image_module = require("PIL.Image", extra="train", purpose="writing pictures")
        vae = self.pipeline.vae
        shift, scale = self._latent_affine()
        images = []
        for chunk in latents.detach().to(vae.device, torch.float32).split(_VAE_BATCH):
            decoded = vae.decode((chunk / scale + shift).to(vae.dtype), return_dict=False)[0]
            pixels = ((decoded.float() + 1.0) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
            size = (pixels.shape[3], pixels.shape[2])
            images += [image_module.frombytes("RGB", size, p.permute(1, 2, 0).numpy().tobytes()) for p in pixels]
        return images

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """Embeddings as the checkpoint's own pipeline computes them.

        SDXL checkpoints with ``force_zeros_for_empty_prompt`` have an unconditional embedding of zeros; there ``""``
        gives that one, as sampling without a negative prompt does. ``time_ids`` come from ``geometry``, or describe an
        uncropped image of the model's own resolution.
        """
        self._need_frozen_parts()
        texts = check_prompts(prompts)
        if geometry is not None and len(geometry) != len(texts):
            problem = f"has not one entry for each of {len(texts)} prompts"
            raise invalid("geometry", len(geometry), problem, "pass one ImageGeometry a prompt")
        encoded = self.pipeline.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not self.is_sdxl:
            return {"encoder_hidden_states": encoded[0]}
        conditioning = {"encoder_hidden_states": encoded[0], "text_embeds": encoded[2]}
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([text == "" for text in texts], device=self.device)
            conditioning = {
                name: value.masked_fill(empty.reshape(-1, *[1] * (value.ndim - 1)), 0.0)
                for name, value in conditioning.items()
            }
        return {**conditioning, "time_ids": self._time_ids(len(texts), geometry)}

    def encode_geometry(self, geometry: Sequence[ImageGeometry]) -> dict[str, Tensor]:
        return {"time_ids": self._time_ids(len(geometry), geometry)} if self.is_sdxl else {}

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        added = ("text_embeds", "time_ids") if self.is_sdxl else ()
        check_conditioning(conditioning, ("encoder_hidden_states", *added))
        sample, cast = cast_inputs(network, latents, conditioning)
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

    def save(self, directory: str | Path, network: nn.Module | None = None) -> None:
        """Write the whole pipeline as safetensors; diffusers loads the directory as well.

        Frozen parts that were not loaded are copied from the checkpoint, or where it has them as a variant, loaded for
        this.
        """
        plain: Any = saveable_network(self.network if network is None else network)
        if self._origin is None or self._origin.variant is not None:
            whole = self if self._origin is None else self.load(**self._origin._asdict())
            own, whole.pipeline.unet = whole.pipeline.unet, plain
            try:
                whole.pipeline.save_pretrained(directory, safe_serialization=True)
            finally:
                whole.pipeline.unet = own
            return
        copy_other_parts(local_folder(self._origin.path, self._origin.revision, None), Path(directory))
        plain.save_pretrained(Path(directory) / "unet", safe_serialization=True)

    def _need_frozen_parts(self) -> None:
        if self._origin is not None:
            remedy = "load the model with frozen_parts=True"
            raise invalid("frozen_parts", False, "left text encoders and VAE out, which this needs", remedy)

    def _latent_affine(self) -> tuple[Any, Any]:
        """``(shift, scale)`` with ``latents = (vae output - shift) * scale``; tensors where they differ by channel."""
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shift, spread = (torch.tensor(v, device=self.pipeline.vae.device).reshape(1, -1, 1, 1) for v in (mean, std))
            return shift, config["scaling_factor"] / spread
        return config.get("shift_factor") or 0.0, config["scaling_factor"]

    def _check_sizes(self, images: Sequence[Image]) -> None:
        factor = self._vae_factor
        for i, image in enumerate(images):
            if image.size != images[0].size:
                problem = f"differs from that of the first image, {images[0].size}"
                raise invalid(f"images[{i}].size", image.size, problem, "set data.resolution, or pass them separately")
            if image.width % factor or image.height % factor:
                remedy = f"resize the image, or set data.resolution to {min(self.image_size)}"
                raise invalid(
                    f"images[{i}].size", image.size, f"is not a multiple of the VAE's factor {factor}", remedy
                )

    def _time_ids(self, count: int, geometry: Sequence[ImageGeometry] | None) -> Tensor:
        own = (*self.image_size, 0, 0, *self.image_size)
        if geometry is None:
            rows = [own] * count
        else:
            rows = [(*g.original_size, *g.crop_top_left, *g.target_size) for g in geometry]
        return torch.tensor(rows, dtype=torch.float32, device=self.device)


def _check_unet(pipeline: Any, is_sdxl: bool, channels: int, *, whole: bool) -> None:
    """Raise ``InvalidInput`` for relatives that want other inputs: inpainting, depth, consistency, refiner."""
    config, remedy = pipeline.unet.config, "use a text-to-image checkpoint of SD 1.x, 2.x or SDXL"
    if config.in_channels != channels:
        problem = f"the UNet takes {config.in_channels} channels, the VAE gives {channels}"
        raise invalid("model.path", pipeline.name_or_path, problem, remedy)
    if config.time_cond_proj_dim is not None or config.class_embed_type is not None:
        raise invalid("model.path", pipeline.name_or_path, "the UNet wants extra conditioning", remedy)
    if (config.addition_embed_type == "text_time") != is_sdxl:
        problem = f"addition_embed_type {config.addition_embed_type!r} does not belong to this kind of pipeline"
        raise invalid("model.path", pipeline.name_or_path, problem, remedy)
    if whole and is_sdxl and (pipeline.text_encoder is None or pipeline.text_encoder_2 is None):
        raise invalid("model.path", pipeline.name_or_path, "one of the two text encoders is missing", remedy)


def _side(sample_size: Any) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else (sample_size[0], sample_size[1])


def _chunks(images: Sequence[Image], size: int) -> Iterator[Sequence[Image]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _colour_pixels(image: Image) -> Tensor:
    """``(3, height, width)`` float32 in [-1, 1]."""
    colour = image.convert("RGB")
    flat = torch.frombuffer(bytearray(colour.tobytes()), dtype=torch.uint8)
    return flat.reshape(colour.height, colour.width, 3).permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0
