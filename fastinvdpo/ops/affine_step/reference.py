"""``y_i = a_i·x_i + Σ_j b_ij·o_ij + s_i·z_i`` in plain PyTorch, float32 arithmetic, no dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastinvdpo.ops import philox
from fastinvdpo.ops.layout import like


def forward(
    sample: Tensor,
    outputs: list[Tensor],
    coefficients: Tensor,
    active: Tensor | None,
    noise_scale: Tensor | None,
    noise_index: Tensor | None,
    seed: int,
    offset: int,
) -> Tensor:
    """The step, in the shape, dtype and layout of ``sample``; samples that are not ``active`` stay as they are."""
    dtype = arithmetic_dtype(sample, *outputs)
    columns = [column.to(dtype) for column in per_sample(coefficients, sample)]
    result = columns[0] * sample.to(dtype)
    for column, output in zip(columns[1:], outputs, strict=True):
        result = result + column * output.to(dtype)
    if noise_scale is not None:
        index = torch.arange(sample.shape[0], device=sample.device) if noise_index is None else noise_index
        noise = philox.normal(seed, offset, index, tuple(sample.shape[1:]), dtype)
        result = result + per_sample(noise_scale.unsqueeze(1), sample)[0].to(dtype) * noise
    result = result.to(sample.dtype)
    if active is not None:
        result = torch.where(per_sample(active.unsqueeze(1), sample)[0], result, sample)
    return like(result, sample)


def backward(grad: Tensor, coefficients: Tensor, active: Tensor | None) -> list[Tensor]:
    """The gradients of the sample and of every output, in the shape, dtype and layout of ``grad``."""
    dtype = arithmetic_dtype(grad)
    columns = [column.to(dtype) for column in per_sample(coefficients, grad)]
    gradients = [(column * grad.to(dtype)).to(grad.dtype) for column in columns]
    if active is not None:
        mask = per_sample(active.unsqueeze(1), grad)[0]
        untouched = [grad] + [torch.zeros_like(grad)] * len(gradients[1:])
        gradients = [torch.where(mask, new, old) for new, old in zip(gradients, untouched, strict=True)]
    return [like(gradient, grad) for gradient in gradients]


def per_sample(table: Tensor, like: Tensor) -> list[Tensor]:
    """The columns of an ``(n, j)`` table, each shaped to broadcast over the samples of ``like``."""
    return [column.view(-1, *[1] * (like.ndim - 1)) for column in table.unbind(1)]


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any input is float64, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
