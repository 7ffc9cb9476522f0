"""CLIP checkpoints of the real transformers classes at tiny widths, and aesthetic heads."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from tests.models.tiny import TOKENS, tokenizer

SIZE, WIDTH, SCALE = 16, 8, 20.0  # pixels of a side, width of the embeddings, exp(logit_scale)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def image_processor() -> Any:
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def clip_model(seed: int = 4) -> CLIPModel:
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **shared,
        "vocab_size": len(tokenizer()),
        "max_position_embeddings": TOKENS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {**shared, "image_size": SIZE, "patch_size": 8}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough that images and captions differ
            parameter.add_(0.3 * torch.randn(parameter.shape))
        model.logit_scale.fill_(math.log(SCALE))
    return model


def write_clip(directory: Path, *, seed: int = 4, processor: bool = True) -> Path:
    clip_model(seed).save_pretrained(directory, safe_serialization=True)
    if processor:
        write_processor(directory)
    return directory


def write_processor(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(directory)
    image_processor().save_pretrained(directory)
    return directory


def head_layers(width: int = WIDTH, seed: int = 3) -> list[nn.Linear]:
    """The linear layers of the published predictor, for embeddings of another width."""
    torch.manual_seed(seed)
    widths = (width, 1024, 128, 64, 16, 1)
    return [nn.Linear(a, b) for a, b in pairwise(widths)]


def head_state(layers: list[nn.Linear]) -> dict[str, torch.Tensor]:
    return {
        f"layers.{number}.{kind}": getattr(layer, kind).detach().clone()
        for number, layer in zip((0, 2, 4, 6, 7), layers, strict=True)
        for kind in ("weight", "bias")
    }


def write_head(path: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    state = head_state(head_layers()) if state is None else state
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path
