"""A MARS model and its VQ tokenizer, as the trainer takes them: images are codes, captions are ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models import base
from fastinvdpo.models.base import Origin, TrainedModel, unwrap
from fastinvdpo.models.checkpoints import load_module, part_folder
from fastinvdpo.models.mars.checkpoint import DESCRIPTION, load_mars, save_mars
from fastinvdpo.models.mars.images import encode_images
from fastinvdpo.models.mars.model import MarsConfig, MarsModel

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data.transforms import ImageGeometry

VQ = "vqvae"  # its folder in a checkpoint, as in amused's
LONGEST = 256


class MarsPipeline(TrainedModel):
    """A MARS model with the tokenizer of its images.

    Args:
        network: with a text tokenizer that has an end of text.
        vq: diffusers' ``VQModel``, frozen here.
        max_sequence_length: tokens of a caption at most; longer ones are cut, and have no end then.
        low_resolution: of a cascade, the side of the small images in pixels; None: there are none.

    Raises:
        InvalidInput: model and tokenizers do not fit.
    """

    family = "mars"
    options: ClassVar[tuple[str, ...]] = ("vae", "max_sequence_length", "low_resolution")
    schedule = None
    network: MarsModel

    def __init__(
        self, network: MarsModel, vq: Any, *, max_sequence_length: int = LONGEST, low_resolution: int | None = None
    ) -> None:
        if vq.config.num_vq_embeddings != network.config.codes:
            problem = f"has {vq.config.num_vq_embeddings} codes, and the model {network.config.codes}"
            raise invalid("model.vae", type(vq).__name__, problem, "use the one that the model was made for")
        if getattr(network.tokenizer, "eos_token_id", None) is None:
            problem = "has no tokenizer with an end of text, and captions are trained on"
            raise invalid("model.path", str((network.origin or {}).get("base")), problem, "save one beside the weights")
        self.network, self.vq = network.eval(), vq.requires_grad_(False).eval()
        self.factor = 2 ** (len(vq.config.block_out_channels) - 1)
        self.max_sequence_length, self.low_resolution = max_sequence_length, low_resolution
        if low_resolution is not None and low_resolution % self.factor:
            remedy = f"use a multiple of {self.factor}"
            raise invalid("model.low_resolution", low_resolution, "does not fit the tokenizer's grid", remedy)

    @classmethod
    def load(
        cls, origin: str | Path | Origin, *, dtype: torch.dtype = torch.float32, frozen_parts: bool = True, **given: Any
    ) -> MarsPipeline:
        """A checkpoint of MARS, or a new model on a language model, with ``vae`` of the origin as the VQ tokenizer.

        A checkpoint that a run wrote holds one. ``frozen_parts`` means nothing: nothing is trained without them.

        Raises ``InvalidInput`` where a part is missing or does not fit.
        """
        origin = Origin.of(origin)
        for option in ("unet_init", "variant"):
            if (value := getattr(origin, option)) is not None:
                raise invalid(f"model.{option}", value, "means nothing for a MARS model", "set it to null")
        root = Path(origin.path)
        inside = root / VQ
        if origin.vae is None and not inside.is_dir():
            remedy = "name the directory of diffusers' VQModel, such as the folder vqvae of an amused checkpoint"
            raise invalid("model.vae", None, "is the tokenizer of images, which is missing", remedy)
        folder = inside if origin.vae is None else part_folder("model.vae", origin.vae, VQ)
        diffusers = require("diffusers", extra="train", purpose="the tokenizer of images")
        vq: Any = load_module(diffusers.VQModel, "model.vae", folder, VQ, None, torch.float32)
        if (root / DESCRIPTION).is_file():
            if origin.revision is not None:
                problem = "is of the language model, which the checkpoint names"
                raise invalid("model.revision", origin.revision, problem, "set it to null")
            network = load_mars(root, dtype=dtype)
        else:
            codes = MarsConfig(vq.config.num_vq_embeddings)
            network = load_mars(origin.path, codes, dtype=dtype, revision=origin.revision)
        model = cls(network, vq, **given)
        model.origin = origin
        return model

    @property
    def components(self) -> dict[str, Any]:
        """What the model is made of beside its network."""
        return {"tokenizer": self.network.tokenizer, VQ: self.vq}

    def frozen_modules(self) -> tuple[nn.Module, ...]:
        return (self.vq,)

    def trained(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return _mars(network).visual_parameters()

    def encode_images(self, images: Sequence[Image], posterior: Tensor | None = None) -> Tensor:
        """Codes, int64 ``(n, h·w)`` in raster order; each image by itself, so that none depends on the others."""
        base.check_images(images)
        for i, image in enumerate(images):
            if image.width % self.factor or image.height % self.factor:
                remedy = f"set data.resolution to a multiple of {self.factor}"
                raise invalid(f"images[{i}].size", image.size, "does not fit the tokenizer's grid", remedy)
        pixels = [base.pixels_of([image], "RGB").to(self.vq.device) for image in images]
        return torch.cat([encode_images(self.vq, one) for one in pixels])

    def encode_small(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """``low``, codes of the images with ``low_resolution`` as their shorter side, of a cascade."""
        if self.low_resolution is None:
            return {}
        small = []
        for image in images:
            scale = self.low_resolution / min(image.size)
            size = round(image.width * scale), round(image.height * scale)
            if scale >= 1:
                problem = f"is no smaller than images of {image.size}"
                raise invalid(
                    "model.low_resolution", self.low_resolution, problem, "lower it, or raise data.resolution"
                )
            small.append(image.convert("RGB").resize(size, resample=3))  # bicubic
        return {"low": self.encode_images(small)}

    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """``text`` int64 ``(n, L + 1)``, ids with the end of text, ``length`` int64 ``(n,)`` of them without the end,
        and ``spoken`` with it, which a caption that was cut does not have.
        """
        end, most = self.network.tokenizer.eos_token_id, self.max_sequence_length
        found = [(ids[:most], len(ids) <= most) for ids in self.network.text_ids(base.check_prompts(prompts))]
        rows = {
            "text": [ids + [end] * (most + 1 - len(ids)) for ids, _ in found],
            "length": [len(ids) for ids, _ in found],
            "spoken": [len(ids) + ends for ids, ends in found],
        }
        return {name: torch.tensor(values, device=self.device) for name, values in rows.items()}

    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Log-probabilities of codes ``(n, N)`` (``latents``) after their captions, or where ``timesteps`` is 1 of
        captions after their codes: see :meth:`MarsModel.mixed_log_probs`.
        """
        model, low = _mars(network), conditioning.get("low")
        text, length, spoken = (conditioning[name] for name in ("text", "length", "spoken"))
        return model.mixed_log_probs(latents, timesteps.bool(), text, length, spoken, low=low, network=network)

    def save(self, directory: str | Path, network: nn.Module | None = None) -> None:
        """Write the visual expert and the tokenizer of images; the language model is named, not written."""
        self.save_network(directory, self.network if network is None else network)
        self.vq.save_pretrained(Path(directory) / VQ, safe_serialization=True)

    def save_network(self, directory: str | Path, network: nn.Module) -> None:
        save_mars(_mars(network), directory)


def _mars(network: nn.Module) -> MarsModel:
    found = unwrap(network)
    assert isinstance(found, MarsModel)
    return found
