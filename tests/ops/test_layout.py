"""``ops/layout.py``: whether two tensors share memory, by brute force."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastinvdpo.ops import layout

MEMORY = torch.zeros(96)


def addresses(tensor: Tensor) -> set[int]:
    offsets = torch.zeros(1, dtype=torch.long)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets.unsqueeze(1) + torch.arange(size) * stride).flatten()
    first, width = tensor.data_ptr() - MEMORY.data_ptr(), tensor.element_size()
    return {first + width * offset + byte for offset in offsets.tolist() for byte in range(width)}


def test_samples_of_any_pitch_and_place() -> None:
    """Dense samples, the pitch of each from 0 to beyond its size, whole and half elements."""
    pitches, found = range(8), []
    for one, two, start in itertools.product(pitches, pitches, range(0, 12)):
        first = MEMORY.as_strided((4, 3), (one, 1), 20)
        for second in (
            MEMORY.as_strided((5, 2), (two, 1), 14 + start),
            MEMORY.view(torch.bfloat16).as_strided((3, 3), (two, 1), 37 + 2 * start),
        ):
            found.append(bool(addresses(first) & addresses(second)))
            assert layout.overlap(first, second) == layout.overlap(second, first) == found[-1], (one, two, start)
    assert 100 < sum(found) < len(found) - 100


def test_any_strides() -> None:
    """Also those of samples that are not dense: columns, channels, transposes, windows."""
    strides = [(16, 4, 1), (24, 2, 8), (1, 12, 2), (9, 3, 1), (0, 5, 2), (3, 1, 1), (2, 4, 8)]
    found = []
    for one, two, start in itertools.product(strides, strides, (0, 1, 2, 5, 9)):
        first, second = MEMORY.as_strided((2, 3, 2), one, 4), MEMORY.as_strided((2, 2, 3), two, start)
        found.append(bool(addresses(first) & addresses(second)))
        assert layout.overlap(first, second) == found[-1], (one, two, start)
        assert layout.overlaps_itself(first) == (len(addresses(first)) < 4 * first.numel()), one
    assert 10 < sum(found) < len(found) - 10
    empty = MEMORY[:0].view(0, 3)
    assert not layout.overlap(empty, MEMORY) and not layout.overlaps_itself(empty)
