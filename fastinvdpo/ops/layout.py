"""Memory layouts: fused kernels read a batch as rows, one per sample, in whatever dense order its elements have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def as_rows(tensors: Sequence[Tensor], batch_dims: int) -> list[Tensor]:
    """The tensors in one layout in which the first ``batch_dims`` dimensions are outermost and each row is dense.

    Contiguous tensors, and tensors that share such a layout (channels_last, say), are returned as they are; others are
    copied into the layout of the first where that one will do, else made contiguous.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return list(tensors)
    first = tensors[0]
    if not _rows_are_dense(first, batch_dims):
        return [tensor.contiguous() for tensor in tensors]
    return [tensor if tensor.stride() == first.stride() else like(tensor, first) for tensor in tensors]


def sample_rows(tensors: Sequence[Tensor], contiguous: bool = False) -> list[Tensor]:
    """The tensors in one layout in which each sample (index of the first dimension) is dense; samples may lie apart, so
    that ``buffer[:, k]`` needs no copy.

    The layout is that of the first tensor where that one will do, else the contiguous one, which can be asked for too.
    Only tensors in another layout are copied.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return list(tensors)
    first = tensors[0]
    order = sample_order(first)
    if order is None or not _apart(first) or (contiguous and order != _contiguous_order(first)):
        first = first.contiguous()
        order = sample_order(first)
    return [first, *(tensor if sample_order(tensor) == order else like(tensor, first) for tensor in tensors[1:])]


def fits(tensor: Tensor, rows: Tensor) -> bool:
    """Whether ``tensor`` can be written sample by sample in the layout of ``rows``, one of :func:`sample_rows`."""
    if tensor.is_contiguous() and rows.is_contiguous():
        return True
    order = sample_order(tensor)
    return order is not None and order == sample_order(rows) and _apart(tensor)


def sample_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides within a sample (0 in dimensions of size 1) when each sample is dense, None otherwise."""
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size > 1):
        if stride != step:
            return None
        step *= size
    return tuple(stride if size > 1 else 0 for stride, size in zip(strides, sizes, strict=True))


def is_constant(tensor: Tensor) -> bool:
    """Whether each sample is one number, expanded."""
    return all(stride == 0 or size == 1 for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True))


def overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors share memory. Told exactly where their samples are dense and equally far apart, or without
    gaps; tensors that interleave in other ways are taken not to.
    """
    one, two = _pieces(first), _pieces(second)
    if one is None or two is None or one.end <= two.begin or two.end <= one.begin:
        return False
    pitches = {tensor.pitch for tensor in (one, two) if tensor.pitch}
    if len(pitches) != 1:
        return not pitches
    pitch = pitches.pop()
    shift = (two.begin - one.begin) % pitch
    return shift < one.size or pitch - shift < two.size


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory because the tensor was expanded."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


class _Pieces(NamedTuple):
    """Addresses of a tensor: pieces of ``size`` bytes, ``pitch`` bytes apart; 0 for one piece."""

    begin: int
    end: int
    size: int
    pitch: int


def _pieces(tensor: Tensor) -> _Pieces | None:
    if tensor.numel() == 0 or sample_order(tensor) is None:
        return None
    begin, samples = tensor.data_ptr(), tensor.shape[0]
    size = tensor.numel() // samples * tensor.element_size()
    pitch = tensor.stride(0) * tensor.element_size()
    if samples == 1 or pitch == size:
        return _Pieces(begin, begin + samples * size, samples * size, 0)
    return _Pieces(begin, begin + (samples - 1) * pitch + size, size, pitch)


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor`` in the layout that ``torch.empty_like(model)`` has: itself if it has it already, else a copy."""
    target = torch.empty_like(model, dtype=tensor.dtype)
    return tensor if tensor.stride() == target.stride() else target.copy_(tensor)


def _contiguous_order(tensor: Tensor) -> tuple[int, ...]:
    order, step = [], 1
    for size in reversed(tensor.shape[1:]):
        order.append(step if size > 1 else 0)
        step *= size
    return tuple(reversed(order))


def _apart(tensor: Tensor) -> bool:
    """Whether no two samples share memory, if each is dense."""
    samples = tensor.shape[0]
    return samples <= 1 or tensor.stride(0) >= tensor.numel() // samples


def _rows_are_dense(tensor: Tensor, batch_dims: int) -> bool:
    row = tensor.numel()
    for size, stride in zip(tensor.shape[:batch_dims], tensor.stride()[:batch_dims], strict=True):
        row //= size
        if size > 1 and stride != row:
            return False
    step = 1
    inner = zip(tensor.stride()[batch_dims:], tensor.shape[batch_dims:], strict=True)
    for stride, size in sorted((stride, size) for stride, size in inner if size > 1):
        if stride != step:
            return False
        step *= size
    return True
