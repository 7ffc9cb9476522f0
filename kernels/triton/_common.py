"""What the kernels share: how memory is cut into rows and blocks, and the random numbers.

Every tensor is dense memory in which samples (and timesteps) come first: ``rows`` rows of ``n`` elements. Whether a row
is laid out channels first or last makes no difference to elementwise work and to sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

_WIDEST = 8  # elements of a half type in 128 bits


class Rows(NamedTuple):
    """``rows`` rows of ``units·unit`` elements. ``unit`` divides 8; a kernel that counts in units shows the compiler
    that rows start, and masks change, at multiples of it, which is what lets it load 128 bits at a time.
    """

    rows: int
    units: int
    unit: int

    @property
    def n(self) -> int:
        return self.units * self.unit


def rows_of(tensor: Tensor, rows: int) -> Rows:
    n = tensor.numel() // rows
    unit = math.gcd(n, _WIDEST)
    return Rows(rows, n // unit, unit)


def rows_apart(tensors: Sequence[Tensor]) -> tuple[Rows, tuple[int, ...]]:
    """The rows of tensors of one shape whose samples are dense, and may lie apart, and for each tensor the units from
    the beginning of a sample to that of the next: ``unit`` divides these distances.
    """
    samples = tensors[0].shape[0]
    n = tensors[0].numel() // samples
    pitches = [tensor.stride(0) for tensor in tensors] if samples > 1 else [n] * len(tensors)
    unit = math.gcd(n, _WIDEST, *pitches)
    return Rows(samples, n // unit, unit), tuple([pitch // unit for pitch in pitches])


def wide_accesses(rows: Rows, *tensors: Tensor | None) -> bool:
    """Whether a kernel can access all of them 128 bits at a time."""
    return rows.unit == _WIDEST and not any(tensor is not None and tensor.data_ptr() % 16 for tensor in tensors)


class Block(NamedTuple):
    """Elements that a program handles at once, and its warps: eight elements a thread where the row is long enough."""

    size: int
    warps: int


def ceil_div(a: int, b: int) -> int:
    """``triton.cdiv``, which takes longer than a launch does in C."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@lru_cache
def block_of(n: int, largest: int = 1024) -> Block:
    size = min(largest, max(128, next_power_of_2(n)))
    return Block(size, max(1, min(4, size // 256)))


def elementwise_block(rows: Rows, *tensors: Tensor) -> Block:
    """Small inputs: as many programs as possible. Large ones of half types: 16 elements a thread, that is two 128-bit
    loads of each tensor in flight, as float32 has with eight.
    """
    large = rows.rows * rows.n >= 2**22 and all(tensor.element_size() == 2 for tensor in tensors)
    return block_of(rows.n, 2048 if large else 1024)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it that of ``tensor``."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011): four words for every counter; all uint32."""
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, _MULTIPLIER_0)
        high_1 = tl.umulhi(c2, _MULTIPLIER_1)
        low_0 = c0 * _MULTIPLIER_0
        low_1 = c2 * _MULTIPLIER_1
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """``(⌊x/2⁹⌋ + ½)·2⁻²³``, exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _cos_sin_turns(u):
    """``cos 2πu`` and ``sin 2πu`` for u in (0, 1): the nearest quarter turn splits off exactly, and polynomials fitted
    on an eighth of a turn to either side do the rest. (The library's functions carry a slow path for huge angles, and
    with it stack memory.)
    """
    quarter = (u * 4.0 + 0.5).to(tl.int32)
    x = u - quarter.to(tl.float32) * 0.25
    z = x * x
    sine = x * (6.283185287812946 + z * (-41.34166257054795 + z * (81.59254287130155 - z * 75.40161270274746)))
    cosine = 1.0 + z * (
        -19.739208789987508 + z * (64.93936905141977 + z * (-85.44882008965106 + z * 59.42410598175647))
    )
    odd = (quarter & 1) == 1
    turned_cosine = tl.where(odd, sine, cosine)
    turned_sine = tl.where(odd, cosine, sine)
    turned_cosine = tl.where(((quarter + 1) & 2) == 2, -turned_cosine, turned_cosine)
    turned_sine = tl.where((quarter & 2) == 2, -turned_sine, turned_sine)
    return turned_cosine, turned_sine


@triton.jit
def _box_muller(word_0, word_1):
    radius = tl.sqrt(-2.0 * tl.log(_uniform(word_0)))
    cosine, sine = _cos_sin_turns(_uniform(word_1))
    return radius * cosine, radius * sine


@triton.jit
def normal(seed, offset, index, first_block, BLOCK: tl.constexpr):
    """Standard normal numbers of the elements ``4·first_block …`` of stream ``index`` (int64 scalars), ``(BLOCK,)``:
    those of ``fastinvdpo.ops.philox.normal``.
    """
    counter = (first_block + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    words = philox(
        counter,
        offset.to(tl.uint32),
        index.to(tl.uint32),
        (index >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = _box_muller(words[0], words[1])
    z2, z3 = _box_muller(words[2], words[3])
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
