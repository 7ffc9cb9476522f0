"""``y_i = a_i·x_i + Σ_j b_ij·o_ij + s_i·z_i``: one launch, noise included."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import elementwise_block, normal, on_device_of, rows_of


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
    """The step in the shape, dtype and layout of ``sample``.

    Args:
        sample: ``(n, …)`` float32, bfloat16 or float16, dense, samples first; contiguous with noise, whose numbering
            follows the logical order of the elements.
        outputs: up to four tensors of that shape and layout; dtypes may differ.
        coefficients: ``(n, 1 + len(outputs))``; active: bool ``(n,)``.
        noise_scale: ``(n,)``; noise_index: int64 ``(n,)``.
        seed, offset: 63 and 32 bits.
    """
    result = torch.empty_like(sample)
    if result.numel() == 0:
        return result
    rows = rows_of(sample, sample.shape[0])
    block = elementwise_block(rows, sample, *outputs)
    blocks = triton.cdiv(rows.n, block.size)
    coefficients, active, noise_scale, noise_index = (
        None if table is None else table.contiguous() for table in (coefficients, active, noise_scale, noise_index)
    )
    with on_device_of(sample):
        step_kernel[(rows.rows * blocks,)](
            sample,
            tuple(outputs),
            result,
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


@triton.jit(do_not_specialize=("seed", "offset", "units", "blocks"))
def step_kernel(  # noqa: PLR0913 - the op's schema
    sample,
    outputs,
    result,
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
    # The 64-bit part of an address is a scalar, the part that differs among threads has 32 bits.
    start = (row * units + first) * UNIT
    at = tl.arange(0, BLOCK)
    inside = at < tl.minimum(units - first, BLOCK // UNIT).to(tl.int32) * UNIT
    x = tl.load(sample + start + at, mask=inside, other=0.0)

    needed = inside
    if active is not None:
        moving = tl.load(active + row)
        needed = inside & moving
    y = tl.load(coefficients + row * (1 + COUNT)).to(tl.float32) * x.to(tl.float32)
    for j in tl.static_range(COUNT):
        o = tl.load(outputs[j] + start + at, mask=needed, other=0.0).to(tl.float32)
        y += tl.load(coefficients + row * (1 + COUNT) + 1 + j).to(tl.float32) * o
    if noise_scale is not None:
        index = row
        if noise_index is not None:
            index = tl.load(noise_index + row)
        z = normal(seed.to(tl.int64), offset.to(tl.int64), index, block * (BLOCK // 4), BLOCK)
        y += tl.load(noise_scale + row).to(tl.float32) * z
    y = y.to(x.dtype)
    if active is not None:
        y = tl.where(moving, y, x)
    tl.store(result + start + at, y, mask=inside)
