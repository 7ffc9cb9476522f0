"""Sampling token after token from a cache of keys and values: images from prompts, captions from images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models.mars.model import MarsModel


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities reach this sum, at least one; 1 keeps all.

    Raises:
        InvalidInput: a value that means nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise invalid("temperature", self.temperature, "is not at least 0", "pass 1, or 0 for the likeliest token")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise invalid("top_k", self.top_k, "is not an integer of at least 0", "pass 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise invalid("top_p", self.top_p, "is not in (0, 1]", "pass 1 to keep all tokens")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of ``(B, V)``, float32: softmax of what is kept."""
        logits = logits.float()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
        if self.top_p < 1:
            descending, order = logits.sort(descending=True)
            shares = descending.softmax(-1)
            left_out = shares.cumsum(-1) - shares >= self.top_p
            logits = logits.masked_fill(left_out.scatter(1, order, left_out), -math.inf)
        return logits.softmax(-1)

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """A token for each row, int64 ``(B,)``."""
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate_images(
    model: MarsModel,
    prompts: Sequence[str | Sequence[int]],
    tokens: int,
    *,
    low: Tensor | None = None,
    guidance: float = 1.0,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes of images, int64 ``(B, tokens)`` in raster order.

    Args:
        prompts: texts or token ids.
        low: codes of small images that these follow from, int64 ``(B, M)``, of a cascade.
        guidance: ``g`` of ``l_∅ + g·(l_c − l_∅)``, ``l_∅`` being the logits of the empty prompt; 1: there is none.
        generator: of the model's device.

    Raises:
        InvalidInput: no prompt, ``tokens`` below 1, or ``guidance`` is not a finite number of at least 0.
    """
    if len(prompts) == 0:
        raise invalid("prompts", list(prompts), "is empty", "pass at least one text")
    if not isinstance(tokens, int) or tokens < 1:
        raise invalid("tokens", tokens, "is no positive integer", "pass the tokens of an image, such as 256")
    if not math.isfinite(guidance) or guidance < 0:
        raise invalid("guidance", guidance, "is not a finite number of at least 0", "pass 1 for no guidance")
    sampling, images = sampling or Sampling(), len(prompts)
    both = model.text_ids(prompts) + ([[]] * images if guidance != 1 else [])
    ids, mask = model.prompt(both, model.visual_head.device)
    if low is not None:
        model.check_codes(low)
        small = model.image_ids(low).repeat(len(both) // images, 1)
        ids = torch.cat([ids[:, :-1], small, ids[:, -1:]], 1)
        mask = torch.cat([mask, torch.ones_like(small)], 1)
    cache, codes = _cache(model), list[Tensor]()
    while True:
        logits = (model(ids, mask, cache)[:, -1] @ model.visual_head.T).float()
        if guidance != 1:
            conditional, free = logits.chunk(2)
            logits = free + guidance * (conditional - free)
        codes.append(sampling.draw(logits, generator))
        if len(codes) == tokens:
            return torch.stack(codes, 1)
        ids = (codes[-1] + model.text_size).repeat(len(both) // images).unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


@torch.no_grad()
def caption_images(
    model: MarsModel,
    codes: Tensor,
    tokens: int,
    *,
    end: int | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Token ids of a caption for each image, without the end of text.

    Args:
        codes: int64 ``(B, N)``.
        tokens: a caption's most.
        end: the id of the end of text; None: the tokenizer's, or without a tokenizer there is none.
        sampling: None takes the likeliest token each time.
    """
    model.check_codes(codes)
    sampling = sampling or Sampling(temperature=0)
    end = getattr(model.tokenizer, "eos_token_id", None) if end is None else end
    ids, cache, found = model.image_ids(codes), _cache(model), list[Tensor]()
    running = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    while len(found) < tokens and bool(running.any()):
        logits = model(ids, None, cache)[:, -1] @ model.text_head.T
        found.append(sampling.draw(logits, generator))
        if end is not None:
            running &= found[-1] != end
        ids = found[-1].unsqueeze(1)
    captions = torch.stack(found, 1).tolist() if found else [[] for _ in codes]
    return [caption[: caption.index(end)] if end in caption else caption for caption in captions]


def _cache(model: MarsModel) -> Any:
    transformers = require("transformers", extra="train", purpose="sampling from a MARS model")
    return transformers.DynamicCache(config=model.decoder.config)
