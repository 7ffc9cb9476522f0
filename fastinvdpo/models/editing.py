"""Models that edit a source image, FLUX.1-Kontext and Qwen-Image-Edit, from diffusers checkpoints.

The transformer sees the source's latents as further tokens behind those of the image that it denoises. They are
``source_latents`` ``(n, C, h, w)`` in the conditioning, of the source at the size that the pipeline gives it, about a
million pixels, whatever the size of the edited image.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastinvdpo.errors import InvalidInput, MissingExtra, invalid
from fastinvdpo.models.base import SOURCE_LATENTS, Origin, check_images
from fastinvdpo.models.flow import MASKED_TOKENS, FlowModel, FluxModel
from fastinvdpo.models.qwen_image import QwenImageModel

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data.transforms import ImageGeometry

_AREA = 1024 * 1024


class EditingModel(FlowModel):
    """What is the same for both."""

    edits = True
    source_names = (SOURCE_LATENTS,)

    @torch.no_grad()
    def encode_sources(self, sources: Sequence[Image]) -> dict[str, Tensor]:
        self._need_frozen_parts()
        check_images(sources)
        vae, processor = self.pipeline.vae, self.pipeline.image_processor
        latents = []
        for i, source in enumerate(sources):
            if source.size != sources[0].size:
                problem = f"differs from that of the first source, {sources[0].size}"
                raise invalid(f"sources[{i}].size", source.size, problem, "cut them to one size")
            width, height = self._source_size(source)
            pixels = processor.preprocess(processor.resize(source.convert("RGB"), height, width), height, width)
            latents.append(self._source_latents(pixels.to(vae.device, vae.dtype)).to(torch.float32))
        return {SOURCE_LATENTS: torch.cat(latents)}

    def _pipelines_own(self, name: str) -> Any:
        """What is defined beside the pipeline's class."""
        return getattr(importlib.import_module(type(self.pipeline).__module__), name)

    @abstractmethod
    def _source_size(self, source: Image) -> tuple[int, int]:
        """Width and height to which the pipeline resizes a source."""

    def _source_latents(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.pipeline._encode_vae_image(pixels, None)
        return found


class FluxKontextModel(EditingModel, FluxModel):
    """FLUX.1-Kontext: FLUX.1 with a source, whose tokens have a 1 as the first of their three numbers."""

    family = "flux-kontext"
    pipelines = ("FluxKontextPipeline",)

    def _source_size(self, source: Image) -> tuple[int, int]:
        height, width = self.pipeline.image_processor.get_default_height_width(source)
        ratio, unit = width / height, self.size_factor
        sizes = self._pipelines_own("PREFERRED_KONTEXT_RESOLUTIONS")
        _, width, height = min((abs(ratio - width / height), width, height) for width, height in sizes)
        return width // unit * unit, height // unit * unit


class QwenImageEditModel(EditingModel, QwenImageModel):
    """Qwen-Image-Edit, also the Plus pipeline (2509, 2511) with one source: Qwen2.5-VL sees the source in the prompt.

    ``encoder_hidden_states`` hold the source's tokens and up to ``max_sequence_length`` of the prompt.
    """

    family = "qwen-image-edit"
    pipelines = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
    prompt_sees_source = True

    @classmethod
    def load(cls, origin: Origin, *, frozen_parts: bool = True, **options: Any) -> QwenImageEditModel:
        """As of all families. Raises ``MissingExtra`` where the processor lacks torchvision, which its part for videos
        needs.
        """
        try:
            return super().load(origin, frozen_parts=frozen_parts, **options)  # type: ignore[return-value]
        except (InvalidInput, ImportError) as error:
            if frozen_parts and "video_processor" in str(error).lower() and find_spec("torchvision") is None:
                needed = f"the processor of the family {cls.family} needs torchvision, which is not installed"
                raise MissingExtra(f"{needed}. Remedy: pip install torchvision, in the version of torch.") from error
            raise

    def _source_size(self, source: Image) -> tuple[int, int]:
        return self._size_of_area(source, _AREA)

    def _source_latents(self, pixels: Tensor) -> Tensor:
        return super()._source_latents(pixels.unsqueeze(2)).squeeze(2)

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        geometry: Sequence[ImageGeometry] | None = None,
        sources: Sequence[Image] = (),
    ) -> dict[str, Tensor]:
        """Embeddings as the checkpoint's own pipeline computes them, prompt by prompt, each with its source."""
        texts = self._texts(prompts, geometry)
        if len(sources) != len(texts):
            raise invalid("sources", len(sources), f"are not those of {len(texts)} prompts", "pass one a prompt")
        length, found = self._encode_options.get("max_sequence_length", MASKED_TOKENS), []
        for text, source in zip(texts, sources, strict=True):
            images = [self._prompt_image(source.convert("RGB"))]
            hidden, _ = self.pipeline.encode_prompt([text], image=images, device=self.device)
            processor = self.pipeline.processor.image_processor
            patches = processor(images=images, return_tensors="pt")["image_grid_thw"].prod()
            found.append((hidden[0], int(patches) // processor.merge_size**2 + length))
        hidden = torch.stack([pad(one[:most], (0, 0, 0, max(0, most - len(one)))) for one, most in found])
        masks = [torch.arange(most, device=self.device) < len(one) for one, most in found]
        return dict(zip(self.embeddings, (hidden, torch.stack(masks).to(torch.int64)), strict=True))

    def _prompt_image(self, source: Image) -> Any:
        """The image as the prompt has it: that of the VAE, smaller with the Plus pipeline."""
        plus = type(self.pipeline).__name__ == "QwenImageEditPlusPipeline"
        width, height = self._size_of_area(source, self._pipelines_own("CONDITION_IMAGE_SIZE") if plus else _AREA)
        return self.pipeline.image_processor.resize(source, height, width)

    def _size_of_area(self, source: Image, area: int) -> tuple[int, int]:
        width, height = self._pipelines_own("calculate_dimensions")(area, source.width / source.height)[:2]
        return width, height
