"""Images as codes: the vector-quantized autoencoder is diffusers' ``VQModel``, such as amused's of 8192 codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastinvdpo.errors import invalid


@torch.no_grad()
def encode_images(vq: Any, pixels: Tensor) -> Tensor:
    """Codes, int64 ``(B, h·w)`` in raster order, of pixels ``(B, C, height, width)`` in [−1, 1]."""
    indices = vq.quantize(vq.encode(pixels).latents)[2][2]
    return indices.view(len(pixels), -1)  # type: ignore[no-any-return]


@torch.no_grad()
def decode_codes(vq: Any, codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels ``(B, C, height, width)`` of codes ``(B, h·w)``; ``grid``: ``(h, w)``. Raises ``InvalidInput`` where they
    do not fit.
    """
    if codes.ndim != 2 or codes.shape[1] != grid[0] * grid[1]:
        raise invalid("codes.shape", tuple(codes.shape), f"does not fit a grid of {grid}", "pass (B, h·w)")
    shape = (len(codes), *grid, vq.config.vq_embed_dim or vq.config.latent_channels)
    entries = vq.quantize.get_codebook_entry(codes.flatten(), shape)
    pixels: Tensor = vq.decoder(vq.post_quant_conv(entries), entries if vq.config.norm_type == "spatial" else None)
    return pixels
