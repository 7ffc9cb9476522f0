"""Memory layouts: fused kernels read a batch as rows, one per sample, in whatever dense order its elements have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastinvdpo.ops.checks import transformed


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

    The layout is that of the first tensor where that one will do, else, or with ``contiguous``, the contiguous one.
    Only tensors in another layout are copied.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return list(tensors)
    first = tensors[0]
    order = sample_order(first)
    if order is None or not _apart(first) or (contiguous and not first[:1].is_contiguous()):
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
    """Whether two tensors share memory, whatever their strides."""
    if first.numel() == 0 or second.numel() == 0:
        return False
    (one, one_end), (two, two_end) = _span(first), _span(second)
    if one_end <= two or two_end <= one:
        return False
    these, those = _pieces(first), _pieces(second)
    if these is not None and those is not None:
        return _meet(these, those) if these.number < those.number else _meet(those, these)
    # Elements that interleave never come closer than the greatest common divisor of all strides lets them.
    step = math.gcd(*_byte_strides(first), *_byte_strides(second))
    if step and (two - one) % step >= first.element_size() and (one - two) % step >= second.element_size():
        return False
    origin, size = min(one, two), math.gcd(first.element_size(), second.element_size(), two - one)
    taken = torch.zeros((max(one_end, two_end) - origin) // size, dtype=torch.bool)
    _cells(first, taken, origin, size).fill_(True)
    return bool(_cells(second, taken, origin, size).any())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor or of overlapping windows do."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                break
            extent = stride * (size - 1) + extent
    else:
        return False
    if 0 in tensor.shape:
        return False
    (begin, end), size = _span(tensor), tensor.element_size()
    counts = torch.zeros((end - begin) // size, dtype=torch.int32)
    places = torch.arange(counts.numel())
    counts.index_add_(0, _cells(tensor, places, begin, size).flatten(), counts.new_ones(tensor.numel()))
    return bool((counts > 1).any())


class _Pieces(NamedTuple):
    """Addresses of a tensor: ``number`` pieces of ``size`` bytes, ``pitch`` bytes apart."""

    number: int
    begin: int
    size: int
    pitch: int


def _pieces(tensor: Tensor) -> _Pieces | None:
    """The samples of a tensor whose samples are dense: one piece where they are without gaps; None for others."""
    if sample_order(tensor) is None:
        return None
    samples, whole = tensor.shape[0], tensor.numel() * tensor.element_size()
    size, pitch = whole // samples, tensor.stride(0) * tensor.element_size()
    if samples == 1 or pitch == size:
        return _Pieces(1, tensor.data_ptr(), whole, whole)
    return _Pieces(samples, tensor.data_ptr(), size, pitch)


def _meet(few: _Pieces, many: _Pieces) -> bool:
    """Whether a piece of one meets a piece of the other, of tensors whose spans do. Where pitches differ, each of the
    ``few`` is compared with its next neighbor.
    """
    if few.pitch == many.pitch >= max(few.size, many.size):
        shift = (many.begin - few.begin) % few.pitch
        return shift < few.size or few.pitch - shift < many.size
    for index in range(few.number):
        begin = few.begin + index * few.pitch
        # The first piece of the many that ends after this one begins; a pitch of 0 holds them all in one place.
        after = (begin - many.begin - many.size) // many.pitch + 1 if many.pitch else 0
        place = many.begin + max(after, 0) * many.pitch
        if after < many.number and place < begin + few.size and begin < place + many.size:
            return True
    return False


def _byte_strides(tensor: Tensor) -> list[int]:
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride * tensor.element_size() for stride, size in strides if size > 1]


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor that is not empty, and the one after its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _cells(tensor: Tensor, memory: Tensor, origin: int, size: int) -> Tensor:
    """A view of ``memory``, one entry for each ``size`` bytes from ``origin`` on, that has the tensor's addresses."""
    parts = tensor.element_size() // size
    strides = [stride * parts for stride in tensor.stride()]
    return memory.as_strided((*tensor.shape, parts), (*strides, 1), (tensor.data_ptr() - origin) // size)


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor`` in the layout that ``torch.empty_like(model)`` has: itself if it has it already, else a copy."""
    target = torch.empty_like(model, dtype=tensor.dtype)
    if tensor.stride() == target.stride() or transformed(tensor):  # vmap cannot copy into what it does not map
        return tensor
    return target.copy_(tensor)


def float32(table: Tensor | None) -> Tensor | None:
    """``table`` as contiguous float32 numbers, itself where it is that."""
    if table is None or (table.dtype is torch.float32 and table.is_contiguous()):
        return table
    return table.float().contiguous()


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
    return sample_order(tensor.flatten(0, batch_dims - 1)) is not None
