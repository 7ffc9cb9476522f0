"""A small language model with a tokenizer of words, and a small VQ tokenizer of images, on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from PIL.Image import Image

from fastinvdpo.models.base import pixels_of
from fastinvdpo.models.mars import MarsConfig, MarsPipeline, load_mars

CODES = 24
WORDS = ("[PAD]", "[END]", "a", "red", "fox", "two", "pears", "on", "table")
_BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}


def decoder(dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def vq_model(images: Sequence[Image], seed: int = 0) -> Any:
    """Its codes are what it makes of images, so that images differ in many of them; a code is four pixels wide."""
    torch.manual_seed(seed)
    vq: Any = diffusers.VQModel(
        **_BLOCKS, block_out_channels=[32, 32, 32], latent_channels=4, num_vq_embeddings=CODES
    ).eval()
    with torch.no_grad():
        latents = vq.encode(pixels_of(images, "RGB")).latents.permute(0, 2, 3, 1).flatten(0, 2)
        vq.quantize.embedding.weight.copy_(latents[:: len(latents) // CODES][:CODES])
    return vq


def write(root: Path, images: Sequence[Image]) -> None:
    """``language``, ``vq``, ``other`` (another tokenizer of images), and ``new``, a checkpoint of the first two."""
    decoder().save_pretrained(root / "language")
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[PAD]"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=split, eos_token="[END]", pad_token="[PAD]")
    fast.save_pretrained(root / "language")
    for seed, name in enumerate(("vq", "other")):
        vq_model(images, seed).save_pretrained(root / name)
    model = MarsPipeline(load_mars(root / "language", MarsConfig(CODES)), vq_model(images))
    model.save(root / "new")
