"""CLIP through transformers: images and captions to normalized embeddings, the same in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import Digests
from fastinvdpo.models.checkpoints import check_loaded

if TYPE_CHECKING:
    from PIL.Image import Image

_PURPOSE = "scoring images"
_REMEDY = "give a directory in transformers' format or the id of a hub repository that holds safetensors files"
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


class Clip:
    """A ``CLIPModel`` with its tokenizer and image processor, in float32.

    Args:
        path: directory in transformers' format, or hub id; weights as safetensors only.
        processor: where tokenizer and image processor lie; beside the weights when None, and if they are not there, at
            ``fallback``.

    Attributes:
        key: SHA-256 of the files of weights and processor. width: of the embeddings. max_length: tokens of a caption.
    """

    def __init__(
        self,
        path: str,
        *,
        processor: str | None = None,
        fallback: str | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        transformers = require("transformers", extra="train", purpose=_PURPOSE)
        self.device = torch.device(device)
        folder = _folder(transformers, path, "config.json", revision)
        kind = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != "clip":
            raise invalid("scorer", path, f"holds a model of type {kind!r}", "name a CLIP model, such as CLIP-ViT-H-14")
        try:
            model, info = transformers.CLIPModel.from_pretrained(
                path, revision=revision, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise invalid("scorer", path, f"cannot be loaded ({error})", _REMEDY) from error
        check_loaded("scorer", folder, info)
        self._model = model.eval().requires_grad_(False).to(self.device)
        own = processor is None and fallback is not None and not _holds_processor(transformers, path, revision)
        where, of = (fallback, None) if own else (processor or path, revision if processor is None else None)
        assert where is not None
        place = _folder(transformers, where, "preprocessor_config.json", of)
        # The processor that works with PIL alone: with torchvision there, transformers would choose another one, whose
        # resizing differs in the last bits.
        reader = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=of, trust_remote_code=False)
            self._processor = reader.from_pretrained(where, revision=of)
        except (OSError, ValueError) as error:
            problem = f"its tokenizer or image processor cannot be loaded ({error})"
            raise invalid("scorer", where, problem, "name another place with the option processor") from error
        self.logit_scale: Tensor = self._model.logit_scale.detach().cpu()
        self.width: int = self._model.config.projection_dim
        positions: int = self._model.config.text_config.max_position_embeddings
        self.max_length = min(self._tokenizer.model_max_length, positions)
        weights = sorted(folder.glob("*.safetensors"))
        digests = Digests()
        self.key: dict[str, Any] = {
            "weights": digests.of([folder / "config.json", *weights]),
            "processor": digests.of(
                [place / name for name in (*_TEXT_FILES, *_IMAGE_FILES) if (place / name).is_file()]
            ),
        }

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """``(n, width)``, each of norm 1. Gray, palette and transparent images become RGB first."""
        pixels = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        hidden = self._model.vision_model(pixel_values=pixels["pixel_values"].to(self.device)).pooler_output
        return _normalized(self._model.visual_projection(hidden))

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """``(n, width)``, each of norm 1; what exceeds ``max_length`` tokens is cut off.

        Every caption is padded to the full length, so that its embedding does not follow from the longest beside it.
        """
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        hidden = self._model.text_model(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        ).pooler_output
        return _normalized(self._model.text_projection(hidden))


def _normalized(embeddings: Tensor) -> Tensor:
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


def _folder(transformers: Any, path: str, file: str, revision: str | None) -> Path:
    """The local directory of a repository, by one of its files."""
    try:
        found = transformers.utils.cached_file(path, file, revision=revision)
    except (OSError, ValueError) as error:
        raise invalid("scorer", path, f"cannot be loaded ({error})", _REMEDY) from error
    if found is None:
        raise invalid("scorer", path, f"holds no {file}", _REMEDY)
    return Path(found).parent


def _holds_processor(transformers: Any, path: str, revision: str | None) -> bool:
    try:
        _folder(transformers, path, "preprocessor_config.json", revision)
    except InvalidInput:
        return False
    return True
