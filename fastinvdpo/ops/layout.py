"""Memory layouts: fused kernels read a batch as rows, one per sample, in whatever dense order its elements have."""

from __future__ import annotations

from collections.abc import Sequence

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


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor`` in the layout that ``torch.empty_like(model)`` has: itself if it has it already, else a copy."""
    target = torch.empty_like(model, dtype=tensor.dtype)
    return tensor if tensor.stride() == target.stride() else target.copy_(tensor)


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
