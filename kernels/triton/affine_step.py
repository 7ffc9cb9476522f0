"""``y_i = a_i·x_i + Σ_j b_ij·o_ij + s_i·z_i`` and its gradients: one launch each, noise included."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import ceil_div, elementwise_block, normal, on_device_of, rows_apart


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
    """The step, in ``out`` or in the shape, dtype and layout of ``sample``.

    Args:
        sample: ``(n, …)`` float32, bfloat16 or float16; each sample dense, and contiguous with noise, whose numbering
            follows the logical order of the elements. Samples may lie apart.
        outputs: up to four tensors of that shape and order within a sample; dtypes may differ.
        coefficients: ``(n, 1 + len(outputs))``; active: bool ``(n,)``.
        noise_scale: ``(n,)``; noise_index: int64 ``(n,)``; these four contiguous.
        seed, offset: 63 and 32 bits.
        out: as ``sample``; may be its memory, or that of an output.
        trajectory: receives the step too, rounded to a dtype of its own; otherwise as ``sample``.
    """
    result = torch.empty_like(sample) if out is None else out
    if result.numel() == 0:
        return result
    tensors = [sample, result, *outputs] + ([] if trajectory is None else [trajectory])
    rows, pitches = rows_apart(tensors)
    block = elementwise_block(rows, *tensors)
    blocks = ceil_div(rows.n, block.size)
    with on_device_of(sample):
        step_kernel[(rows.rows * blocks,)](
            sample,
            tuple(outputs),
            result,
            trajectory,
            pitches,
            coefficients,
            active,
            noise_scale,
            noise_index,
            seed,
            offset,
            rows.units,
            blocks,
            COUNT=len(outputs),
            UNIT=rows.unit,
            BLOCK=block.size,
            num_warps=block.warps,
        )
    return result


def backward(
    grad: Tensor, coefficients: Tensor, active: Tensor | None, columns: list[int], gradients: list[Tensor]
) -> None:
    """Write the gradients of the inputs that ``columns`` of the table belong to (0: the sample).

    Args:
        grad: ``(n, …)`` as ``sample`` in :func:`forward`, or one number for each sample, ``(n,)``.
        coefficients: ``(n, 1 + outputs)``; active: bool ``(n,)``; both contiguous.
        gradients: receive the results; of one shape and dense order, in dtypes of their own.
    """
    constant = grad.numel() == grad.shape[0]
    tensors = gradients if constant else [*gradients, grad]
    rows, pitches = rows_apart(tensors)
    block = elementwise_block(rows, *tensors)
    blocks = ceil_div(rows.n, block.size)
    with on_device_of(grad):
        backward_kernel[(rows.rows * blocks,)](
            grad,
            tuple(gradients),
            grad.stride(0) if constant else pitches[-1],
            coefficients,
            active,
            rows.units,
            blocks,
            WIDTH=coefficients.shape[1],
            COLUMNS=tuple(columns),
            CONSTANT=constant,
            UNIT=rows.unit,
            BLOCK=block.size,
            num_warps=block.warps,
        )


@triton.jit(do_not_specialize=("pitches", "seed", "offset", "units", "blocks"))
def step_kernel(  # noqa: PLR0913 - the op's schema
    sample,
    outputs,
    result,
    trajectory,
    pitches,
    coefficients,
    active,
    noise_scale,
    noise_index,
    seed: tl.int64,
    offset: tl.int64,
    units: tl.int64,
    blocks: tl.int32,
    COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    first = block * (BLOCK // UNIT)
    # The 64-bit part of an address is a scalar, the part that differs among threads has 32 bits. Units rather than
    # elements show the compiler that rows start at multiples of them.
    at = tl.arange(0, BLOCK)
    inside = at < tl.minimum(units - first, BLOCK // UNIT).to(tl.int32) * UNIT
    x = tl.load(sample + (row * pitches[0] + first) * UNIT + at, mask=inside, other=0.0)

    needed = inside
    if active is not None:
        moving = tl.load(active + row)
        needed = inside & moving
    y = tl.load(coefficients + row * (1 + COUNT)).to(tl.float32) * x.to(tl.float32)
    for j in tl.static_range(COUNT):
        o = tl.load(outputs[j] + (row * pitches[2 + j] + first) * UNIT + at, mask=needed, other=0.0).to(tl.float32)
        y += tl.load(coefficients + row * (1 + COUNT) + 1 + j).to(tl.float32) * o
    if noise_scale is not None:
        index = row
        if noise_index is not None:
            index = tl.load(noise_index + row)
        z = normal(seed.to(tl.int64), offset.to(tl.int64), index, block * (BLOCK // 4), BLOCK)
        y += tl.load(noise_scale + row).to(tl.float32) * z
    rounded = y.to(x.dtype)
    if active is not None:
        rounded = tl.where(moving, rounded, x)
        y = tl.where(moving, y, x.to(tl.float32))
    tl.store(result + (row * pitches[1] + first) * UNIT + at, rounded, mask=inside)
    if trajectory is not None:
        stored = y.to(trajectory.dtype.element_ty)
        tl.store(trajectory + (row * pitches[2 + COUNT] + first) * UNIT + at, stored, mask=inside)


@triton.jit(do_not_specialize=("pitch", "units", "blocks"))
def backward_kernel(  # noqa: PLR0913 - the op's schema
    grad,
    gradients,
    pitch: tl.int64,
    coefficients,
    active,
    units: tl.int64,
    blocks: tl.int32,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CONSTANT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * (BLOCK // UNIT)
    at = tl.arange(0, BLOCK)
    inside = at < tl.minimum(units - first, BLOCK // UNIT).to(tl.int32) * UNIT
    if CONSTANT:
        g = tl.zeros((BLOCK,), tl.float32) + tl.load(grad + row * pitch).to(tl.float32)
    else:
        g = tl.load(grad + (row * pitch + first) * UNIT + at, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(len(COLUMNS)):
        product = tl.load(coefficients + row * WIDTH + COLUMNS[k]).to(tl.float32) * g
        if active is not None:
            at_rest = g if COLUMNS[k] == 0 else tl.zeros_like(g)
            product = tl.where(tl.load(active + row), product, at_rest)
        target = gradients[k] + (row * units + first) * UNIT + at
        tl.store(target, product.to(gradients[k].dtype.element_ty), mask=inside)
