"""A family for trying the trainer in seconds: 8x8 gray images, an identity "VAE" and a hash text encoder.

A model is a directory::

    unet/                            diffusers' UNet2DConditionModel (config.json and safetensors weights)
    scheduler/scheduler_config.json  the noise schedule
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.io import read_object
from fastinvdpo.models import base
from fastinvdpo.models.base import DiffusionModel, Origin
from fastinvdpo.models.checkpoints import load_module

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data.transforms import ImageGeometry

SIDE = 8
WORDS_PER_PROMPT = 4
EMBEDDING_DIM = 32
_MODEL_REMEDY = "name a directory with unet/ and scheduler/, such as one that a training run wrote"


class DigitsModel(DiffusionModel):
    """A UNet on 8x8 one-channel images; the latent is the image itself, scaled to [-1, 1]."""

    family = "digits"
    latent_shape = (1, SIDE, SIDE)
    image_size = (SIDE, SIDE)

    def __init__(self, network: nn.Module, scheduler_config: Mapping[str, Any]) -> None:
        self.network = network
        self.scheduler_config = dict(scheduler_config)
        self.schedule = NoiseSchedule.from_config(self.scheduler_config)

    @classmethod
    def load(cls, origin: Origin, *, dtype: torch.dtype = torch.float32, frozen_parts: bool = True) -> DigitsModel:
        """Load a directory; ``frozen_parts`` means nothing, since there are none.

        Raises ``InvalidInput`` where a file is missing, the UNet has other channels, or a revision is given.
        """
        for name in ("revision", "config"):
            if (value := getattr(origin, name)) is not None:
                raise invalid(f"model.{name}", str(value), "means nothing for a local digits model", "leave it out")
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
        found = {part: base.part_files(folder) for part, folder in folders.items()}
        for part, files in found.items():
            if not files:
                raise invalid("model.path", str(origin.path), f"holds no {part}", _MODEL_REMEDY)
        return found

    def encode_images(self, images: Sequence[Image], posterior: Tensor | None = None) -> Tensor:
        """Latents ``(n, 1, 8, 8)`` of 8x8 images, which are their pixels; colors become gray."""
        base.check_images(images)
        for i, image in enumerate(images):
            if image.size != (SIDE, SIDE):
                remedy = f"resize it, or set data.resolution to {SIDE}"
                raise invalid(f"images[{i}].size", image.size, f"digit models need {SIDE}x{SIDE} pixels", remedy)
        return base.pixels_of(images, "L").to(self.device)

    def decode_latents(self, latents: Tensor) -> list[Image]:
        """8-bit gray images; values outside [-1, 1] are clipped."""
        base.check_latents(latents, self.latent_shape)
        pixels = ((latents.detach().to("cpu", torch.float64) + 1.0) * 127.5).round().clamp(0, 255)
        return base.images_of(pixels.to(torch.uint8))

    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """``encoder_hidden_states`` ``(n, 4, 32)`` float32 from the hash text encoder; ``""`` gives zeros."""
        return {"encoder_hidden_states": embed_prompts(prompts).to(self.device)}

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        sample, cast = base.cast_inputs(network, latents, conditioning, ("encoder_hidden_states",))
        output: Tensor = network(
            sample, timesteps, encoder_hidden_states=cast["encoder_hidden_states"], return_dict=False
        )[0]
        return output

    def save(self, directory: str | Path, network: nn.Module | None = None) -> None:
        self.save_network(directory, self.network if network is None else network)
        config_file = Path(directory) / "scheduler" / "scheduler_config.json"
        config_file.parent.mkdir(parents=True, exist_ok=True)
        config_file.write_text(json.dumps(self.scheduler_config, indent=2) + "\n")


@functools.lru_cache(maxsize=4096)
def word_vector(word: str) -> tuple[float, ...]:
    """``EMBEDDING_DIM`` nearly normal numbers (mean 0, variance 1) that depend on the word alone.

    Each number is the centered sum of twelve 16-bit uniform integers taken from one SHA-256 digest (Irwin-Hall). A
    logarithm or cosine, as in Box-Muller, could differ in the last bit from one C library to another; sums of integers
    cannot, and nothing has to be shipped.
    """
    return tuple(
        (sum(struct.unpack_from("<12H", hashlib.sha256(f"{word}:{index}".encode()).digest())) - 6 * 65535) / 65536
        for index in range(EMBEDDING_DIM)
    )


def embed_prompts(prompts: Sequence[str]) -> Tensor:
    """Embed prompts as float32 ``(n, 4, 32)``: one row a word, zero rows behind the last one, longer prompts cut.

    Words are split at white space, upper and lower case are one. The empty prompt, all zeros, is the unconditional one.
    """
    texts = base.check_prompts(prompts)
    embeddings = torch.zeros(len(texts), WORDS_PER_PROMPT, EMBEDDING_DIM)
    for row, text in enumerate(texts):
        for place, word in enumerate(text.lower().split()[:WORDS_PER_PROMPT]):
            embeddings[row, place] = torch.tensor(word_vector(word))
    return embeddings


def _load_unet(argument: str, root: Path, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """The UNet in ``root/unet``, or in ``root`` itself when that is a UNet directory."""
    diffusers = require("diffusers", extra="train", purpose="loading a digits model")
    folder = _unet_folder(root)
    if not (folder / "config.json").is_file():
        raise invalid(argument, str(root), "holds no unet/config.json", _MODEL_REMEDY)
    network = load_module(diffusers.UNet2DConditionModel, argument, folder, "unet", variant, dtype)
    channels = network.config["in_channels"]  # type: ignore[index]
    if channels != 1:
        raise invalid(argument, str(folder), f"its UNet has {channels} input channels, digits have 1", _MODEL_REMEDY)
    return network


def _unet_folder(root: Path) -> Path:
    return root / "unet" if (root / "unet").is_dir() else root
