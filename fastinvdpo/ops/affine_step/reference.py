"""``y_i = a_i·x_i + Σ_j b_ij·o_ij + s_i·z_i`` in plain PyTorch, float32 arithmetic, no dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastinvdpo.ops import philox
from fastinvdpo.ops.checks import arithmetic_dtype
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
    out: Tensor | None = None,
    trajectory: Tensor | None = None,
) -> Tensor:
    """The step, in ``out`` or in the shape, dtype and layout of ``sample``; samples that are not ``active`` stay as
    they are. ``trajectory`` receives the same, rounded to its own dtype from the numbers of the arithmetic.
    """
    dtype = arithmetic_dtype(sample, *outputs)
    columns = [column.to(dtype) for column in per_sample(coefficients, sample)]
    exact = columns[0] * sample.to(dtype)
    for column, output in zip(columns[1:], outputs, strict=True):
        exact = exact + column * output.to(dtype)
    if noise_scale is not None:
        index = torch.arange(sample.shape[0], device=sample.device) if noise_index is None else noise_index
        noise = philox.normal(seed, offset, index, tuple(sample.shape[1:]), dtype)
        exact = exact + per_sample(noise_scale.unsqueeze(1), sample)[0].to(dtype) * noise
    result = exact.to(sample.dtype)
    if active is not None:
        moving = per_sample(active.unsqueeze(1), sample)[0]
        result = torch.where(moving, result, sample)
        exact = exact if trajectory is None else torch.where(moving, exact, sample.to(dtype))
    if trajectory is not None:
        trajectory.copy_(exact)
    return like(result, sample) if out is None else out.copy_(result)


def backward(
    grad: Tensor, coefficients: Tensor, active: Tensor | None, columns: list[int], dtypes: list[torch.dtype]
) -> list[Tensor]:
    """The gradients of the tensors of these ``columns`` (0: the sample), in their ``dtypes``; layout of ``grad``."""
    float64 = torch.float64 in (grad.dtype, *dtypes)
    table = per_sample(coefficients.double() if float64 else coefficients.float(), grad)
    wide = grad.double() if float64 else grad.float()
    gradients = [table[column] * wide for column in columns]
    if active is not None:
        moving = per_sample(active.unsqueeze(1), grad)[0]
        at_rest = [wide if column == 0 else torch.zeros_like(wide) for column in columns]
        gradients = [torch.where(moving, new, old) for new, old in zip(gradients, at_rest, strict=True)]
    return [like(gradient.to(dtype), grad) for gradient, dtype in zip(gradients, dtypes, strict=True)]


def per_sample(table: Tensor, like: Tensor) -> list[Tensor]:
    """The columns of an ``(n, j)`` table, each shaped to broadcast over the samples of ``like``."""
    return [column.view(-1, *[1] * (like.ndim - 1)) for column in table.unbind(1)]
