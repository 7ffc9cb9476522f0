"""The model family of the demo: 8x8 gray pictures of digits, an identity "VAE" and a hash text encoder.

A model is a directory::

    unet/                            diffusers' UNet2DConditionModel (config.json and safetensors weights)
    scheduler/scheduler_config.json  the noise schedule
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.io import read_object
from fastinvdpo.models.base import (
    DiffusionModel,
    Origin,
    cast_inputs,
    cast_weights,
    check_conditioning,
    check_images,
    check_latents,
    check_prompts,
    part_files,
    saveable_network,
)
from fastinvdpo.models.digits_text import embed_prompts
from fastinvdpo.models.weights import load_module

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data.transforms import ImageGeometry

SIDE = 8
_HALF_RANGE = 127.5  # pixel p of 0..255 <-> latent p / 127.5 - 1


class DigitsModel(DiffusionModel):
    """A UNet on 8x8 one-channel pictures; the latent is the picture itself, scaled to [-1, 1]."""

    family = "digits"
    options: ClassVar[tuple[str, ...]] = ()
    latent_shape = (1, SIDE, SIDE)
    image_size = (SIDE, SIDE)

    def __init__(self, network: nn.Module, scheduler_config: Mapping[str, Any]) -> None:
        self.network = network
        self.scheduler_config = dict(scheduler_config)
        self.schedule = NoiseSchedule.from_config(self.scheduler_config)

    @classmethod
    def load(cls, origin: Origin, *, dtype: torch.dtype = torch.float32, frozen_parts: bool = True) -> DigitsModel:
        """Load a directory. Weights stored in half precision are upcast to ``dtype``; ``frozen_parts`` means nothing,
        since there are none.

        Raises:
            InvalidInput: a file is missing, the UNet has other channels, or a revision is given.
        """
        if origin.revision is not None:
            raise invalid("model.revision", origin.revision, "means nothing for a local digits model", "leave it out")
        config_file = Path(origin.path) / "scheduler" / "scheduler_config.json"
        if not config_file.is_file():
            problem = "holds no scheduler/scheduler_config.json"
            raise invalid("model.path", str(origin.path), problem, _MODEL_REMEDY)
        if origin.unet_init is None:
            network = _load_unet("model.path", Path(origin.path), origin.variant, dtype)
        else:
            network = _load_unet("model.unet_init", Path(origin.unet_init), None, dtype)
        model = cls(network, read_object(config_file, "model.path"))
        model.origin = origin
        return model

    @classmethod
    def files(cls, origin: Origin) -> dict[str, list[Path]]:
        network = Path(origin.path if origin.unet_init is None else origin.unet_init)
        folders = {"unet": _unet_folder(network), "scheduler": Path(origin.path) / "scheduler"}
        found = {part: part_files(folder) for part, folder in folders.items()}
        for part, files in found.items():
            if not files:
                raise invalid("model.path", str(origin.path), f"holds no {part}", _MODEL_REMEDY)
        return found

    def encode_images(self, images: Sequence[Image], posterior: Tensor | None = None) -> Tensor:
        """Latents ``(n, 1, 8, 8)`` of 8x8 pictures, which are their pixels; colors become gray."""
        check_images(images)
        for i, image in enumerate(images):
            if image.size != (SIDE, SIDE):
                remedy = f"resize it, or set data.resolution to {SIDE}"
                raise invalid(f"images[{i}].size", image.size, f"digit models need {SIDE}x{SIDE} pixels", remedy)
        pixels = torch.stack([_gray_pixels(image) for image in images])
        return (pixels.to(torch.float32) / _HALF_RANGE - 1.0).to(self.device)

    def decode_latents(self, latents: Tensor) -> list[Image]:
        """8-bit gray pictures; values outside [-1, 1] are clipped."""
        image_module = require("PIL.Image", extra="train", purpose="writing pictures")
        check_latents(latents, channels=1)
        pixels = ((latents.detach().to("cpu", torch.float64) + 1.0) * _HALF_RANGE).round().clamp(0, 255)
        rows = pixels[:, 0].to(torch.uint8)
        size = (rows.shape[2], rows.shape[1])
        return [image_module.frombytes("L", size, bytes(row.flatten().tolist())) for row in rows]

    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """``encoder_hidden_states`` ``(n, 4, 32)`` float32 from the hash text encoder; ``""`` gives zeros."""
        return {"encoder_hidden_states": embed_prompts(check_prompts(prompts)).to(self.device)}

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        check_conditioning(conditioning, ("encoder_hidden_states",))
        sample, cast = cast_inputs(network, latents, conditioning)
        output: Tensor = network(
            sample, timesteps, encoder_hidden_states=cast["encoder_hidden_states"], return_dict=False
        )[0]
        return output

    def save(self, directory: str | Path, network: nn.Module | None = None) -> None:
        plain: Any = saveable_network(self.network if network is None else network)
        root = Path(directory)
        plain.save_pretrained(root / "unet", safe_serialization=True)
        (root / "scheduler").mkdir(parents=True, exist_ok=True)
        (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(self.scheduler_config, indent=2) + "\n")


_MODEL_REMEDY = "name a directory with unet/ and scheduler/, such as one the demo or a training run wrote"


def _load_unet(argument: str, root: Path, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """The UNet in ``root/unet``, or in ``root`` itself when that is a UNet directory."""
    diffusers = require("diffusers", extra="train", purpose="loading a digits model")
    folder = _unet_folder(root)
    if not (folder / "config.json").is_file():
        raise invalid(argument, str(root), "holds no unet/config.json", _MODEL_REMEDY)
    network = load_module(diffusers.UNet2DConditionModel, argument, folder, "unet", variant)
    channels = network.config["in_channels"]  # type: ignore[index]
    if channels != 1:
        raise invalid(argument, str(folder), f"its UNet has {channels} input channels, digits have 1", _MODEL_REMEDY)
    return cast_weights(network, dtype)


def _unet_folder(root: Path) -> Path:
    return root / "unet" if (root / "unet").is_dir() else root


def _gray_pixels(image: Image) -> Tensor:
    gray = image.convert("L")
    return torch.frombuffer(bytearray(gray.tobytes()), dtype=torch.uint8).reshape(1, gray.height, gray.width)
