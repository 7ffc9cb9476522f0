"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same on every backend and launch shape.

Element ``e`` of a sample is lane ``e % 4`` of the Philox block with

    counter = (e // 4, offset, index & 0xFFFFFFFF, index >> 32)        key = (seed & 0xFFFFFFFF, seed >> 32)

so a number depends on (seed, offset, index, e) alone: not on the batch a sample travels in, the device, or what was
drawn before. Nothing is stored between calls, hence nothing has to be restored when a run resumes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastinvdpo.errors import invalid

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def blocks(seed: int, offset: int, index: Tensor, count: int) -> Tensor:
    """The first ``count`` blocks of every stream ``index`` int64 ``(n,)``: uint32 values in int64 ``(n, count, 4)``."""
    check_key(seed, offset)
    block = torch.arange(count, device=index.device)
    shape = (index.numel(), count)
    c0 = (block & _MASK).expand(shape)
    c1 = torch.full(shape, offset, dtype=torch.int64, device=index.device)
    c2 = (index & _MASK).unsqueeze(1).expand(shape)
    c3 = ((index >> 32) & _MASK).unsqueeze(1).expand(shape)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap, and their bit pattern is that of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def normal(seed: int, offset: int, index: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers ``(n, *shape)`` for the streams ``index`` int64 ``(n,)``; equal indices give equal
    numbers.

    Box-Muller on pairs of 23-bit uniforms ``(⌊x / 2⁹⌋ + ½)·2⁻²³``, which float32 holds exactly, so that a float32
    backend differs only by the rounding of its logarithm, root and sine.
    """
    size = math.prod(shape)
    bits = blocks(seed, offset, index, -(-size // 4))
    uniform = ((bits >> 9).double() + 0.5) * 2.0**-23
    radius = torch.sqrt(-2 * torch.log(uniform[..., 0::2]))
    angle = 2 * math.pi * uniform[..., 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :size].reshape(index.numel(), *shape).to(dtype)


def uniform(seed: int, offset: int, index: Tensor) -> Tensor:
    """One float64 number in [0, 1) per stream, 53 random bits, ``(n,)``."""
    bits = blocks(seed, offset, index, 1)[:, 0]
    return ((bits[:, 0] << 21) | (bits[:, 1] >> 11)).double() * 2.0**-53


def integers(seed: int, offset: int, index: Tensor, high: int) -> Tensor:
    """One whole number in ``[0, high)`` per stream, int64 ``(n,)``; ``high``: at most 2³¹."""
    return (uniform(seed, offset, index) * high).long()


def check_key(seed: int, offset: int) -> None:
    """Raise unless ``seed`` fits 63 bits and ``offset`` 32 bits, both non-negative."""
    if not 0 <= seed < 2**63:
        raise invalid("seed", seed, "must be a whole number of at most 63 bits", "use 0 ≤ seed < 2**63")
    if not 0 <= offset < 2**32:
        raise invalid("offset", offset, "must be a whole number of at most 32 bits", "use 0 ≤ offset < 2**32")
