"""Log-probabilities of tokens: logits exist a tile at a time forward, and in a bounded workspace backward.

Forward: a program takes a block of rows and a split of the vocabulary, block by block, and keeps the running maximum
and sum of exponentials; what the splits found is put together by plain PyTorch. Backward: for one chunk of columns
after the other, a launch forms the logits again and turns them into slopes, and products add these up. How work is cut
depends on shapes and dtypes alone, and no two programs write one number: the same bits on every run.

Products of bfloat16 are of bfloat16 slopes, as autograd's of bfloat16 logits are; float16, whose range small
probabilities leave, and mixed dtypes are multiplied in float32, the weight's rows converted a chunk at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import ceil_div, on_device_of

_PROGRAMS = 1024  # about a wave on the largest GPUs
_WORKSPACE = 2**22  # slopes at a time, unless _NARROWEST columns of all rows are more
_NARROWEST = 1024


class Tile(NamedTuple):
    """Rows, columns and depth of what a program multiplies at once, and its warps."""

    rows: int
    columns: int
    depth: int
    warps: int


def tile_of(dtype: torch.dtype) -> Tile:
    """Tensor cores take half types; float32 goes through the ordinary units, exact to its rounding."""
    return Tile(128, 128, 32, 8) if dtype is torch.bfloat16 else Tile(64, 64, 16, 4)


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, stop: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``log p`` and ``log Σ exp`` of each token, ``(T,)``, and ``Σ_v p_v·w_v`` ``(T, D)`` or ``(0, 0)``; float32.

    Args:
        hidden: ``(T, D)``; weight: ``(V, D)``; float32, bfloat16 or float16, dense.
        targets: int64 ``(T,)``, columns of ``start … stop − 1``; dense.
    """
    hidden = _operand(hidden, weight)
    size = stop - start if hidden.dtype is weight.dtype else _chunk(len(hidden))
    found = [
        sums(hidden, weight[first : min(first + size, stop)].to(hidden.dtype), targets, first)
        for first in range(start, stop, size)
    ]
    log_sums, chosen = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    log_sum = log_sums.logsumexp(1)
    means = hidden.new_empty((0, 0), dtype=torch.float32)
    if mean:
        ones = torch.ones_like(log_sum)
        means, _ = backward(torch.zeros_like(ones), ones, hidden, weight, targets, log_sum, start, stop, True, False)
    return chosen.sum(1) - log_sum, log_sum, means


def backward(
    of_target: Tensor,
    of_sum: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    start: int,
    stop: int,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``Σ_t of_target_t·logit_target + of_sum_t·log Σ exp``: with respect to ``hidden``, float32, and
    to ``weight``, in its dtype, or ``(0, 0)``; ``of_target``, ``of_sum`` and ``log_sum`` are dense float32 ``(T,)``.
    """
    hidden = _operand(hidden, weight)
    tokens, width = hidden.shape
    to_hidden = hidden.new_empty((tokens, width) if of_hidden else (0, 0), dtype=torch.float32)
    to_weight = weight.new_empty(weight.shape if of_weight else (0, 0))
    if of_weight:
        to_weight[:start].zero_()
        to_weight[stop:].zero_()
    chunk = min(stop - start, _chunk(tokens))
    workspace = hidden.new_empty(tokens * chunk)
    for first in range(start, stop, chunk):
        end = min(first + chunk, stop)
        block = weight[first:end].to(hidden.dtype)
        found = workspace[: tokens * (end - first)].view(tokens, end - first)
        slopes(of_target, of_sum, hidden, block, targets, log_sum, first, found)
        if of_hidden:
            product(found, block, to_hidden, first > start)
        if of_weight:
            product(found.T, hidden, to_weight[first:end], False)
    return to_hidden, to_weight


def _operand(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden`` in the dtype of the products."""
    return hidden if hidden.dtype is weight.dtype is torch.bfloat16 else hidden.float()


def _chunk(tokens: int) -> int:
    """Columns at a time."""
    return max(_NARROWEST, _WORKSPACE // tokens // _NARROWEST * _NARROWEST)


def sums(hidden: Tensor, weight: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """``log Σ exp`` over each split of the columns, and the target's logit in the split that has it, else 0;
    ``(T, splits)``. The columns are those from ``first`` on, ``weight`` their rows.
    """
    tile, (tokens, width), count = tile_of(hidden.dtype), hidden.shape, len(weight)
    rows, blocks = ceil_div(tokens, tile.rows), ceil_div(count, tile.columns)
    per_split = ceil_div(blocks, min(blocks, max(1, _PROGRAMS // rows)))
    splits = ceil_div(blocks, per_split)
    log_sums, chosen = hidden.new_empty((2, tokens, splits), dtype=torch.float32)
    with on_device_of(hidden):
        sums_kernel[(rows, splits)](
            *(hidden, weight, targets, log_sums, chosen),
            *(tokens, width, first, count, per_split, splits),
            **_meta(tile),
        )
    return log_sums, chosen


def slopes(
    of_target: Tensor,
    of_sum: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    first: int,
    found: Tensor,
) -> None:
    """Fill ``found`` ``(T, columns)``, of the columns from ``first`` on, whose rows ``weight`` has."""
    tile, (tokens, columns) = tile_of(hidden.dtype), found.shape
    with on_device_of(hidden):
        slopes_kernel[(ceil_div(tokens, tile.rows), ceil_div(columns, tile.columns))](
            *(of_target, of_sum, hidden, weight, targets, log_sum, found),
            *(tokens, hidden.shape[1], first, columns),
            **_meta(tile),
        )


def product(a: Tensor, b: Tensor, result: Tensor, add: bool) -> None:
    """``result ← a·b``, or ``result + a·b``; ``b`` and ``result`` have dense rows, ``a`` dense rows or columns."""
    tile, (rows, depth), columns = tile_of(a.dtype), a.shape, b.shape[1]
    with on_device_of(a):
        product_kernel[(ceil_div(rows, tile.rows), ceil_div(columns, tile.columns))](
            a, b, result, rows, columns, depth, *a.stride(), ADD=add, **_meta(tile)
        )


def _meta(tile: Tile) -> dict[str, Any]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "num_warps": tile.warps}


@triton.jit
def _logits(
    hidden, weight, rows, columns, inside, among, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, width, DEPTH):
        at = begin + tl.arange(0, DEPTH)
        there = (at < width)[None, :]
        h = tl.load(hidden + rows.to(tl.int64)[:, None] * width + at[None, :], mask=inside[:, None] & there, other=0.0)
        w = tl.load(
            weight + columns.to(tl.int64)[:, None] * width + at[None, :], mask=among[:, None] & there, other=0.0
        )
        total = tl.dot(h, tl.trans(w), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=("tokens", "first", "count", "per_split", "splits"))
def sums_kernel(  # noqa: PLR0913 - the op's schema
    hidden,
    weight,
    targets,
    log_sums,
    chosen,
    tokens: tl.int32,
    width,
    first: tl.int32,
    count: tl.int32,
    per_split: tl.int32,
    splits: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    target = tl.load(targets + rows, mask=inside, other=-1) - first
    target = tl.where(target < count, target, -1)  # what is masked in the last block is no target
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS], tl.float32)
    begin = tl.program_id(1) * per_split * COLUMNS
    for block in range(begin, tl.minimum(begin + per_split * COLUMNS, count), COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        among = columns < count
        logits = _logits(hidden, weight, rows, columns, inside, among, width, ROWS, COLUMNS, DEPTH)
        logits = tl.where(among[None, :], logits, float("-inf"))
        found += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        higher = tl.maximum(most, tl.max(logits, 1))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        most = higher
    at = rows.to(tl.int64) * splits + tl.program_id(1)
    tl.store(log_sums + at, most + tl.log(total), mask=inside)
    tl.store(chosen + at, found, mask=inside)


@triton.jit(do_not_specialize=("tokens", "first", "count"))
def slopes_kernel(  # noqa: PLR0913 - the op's schema
    of_target,
    of_sum,
    hidden,
    weight,
    targets,
    log_sum,
    result,
    tokens: tl.int32,
    width,
    first: tl.int32,
    count: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, among = rows < tokens, at < count
    logits = _logits(hidden, weight, rows, at, inside, among, width, ROWS, COLUMNS, DEPTH)
    shift = tl.load(log_sum + rows, mask=inside, other=0.0)
    slope = tl.load(of_sum + rows, mask=inside, other=0.0)[:, None] * tl.exp(logits - shift[:, None])
    target = tl.load(targets + rows, mask=inside, other=-1)
    by_target = tl.load(of_target + rows, mask=inside, other=0.0)
    slope += tl.where((first + at)[None, :] == target[:, None], by_target[:, None], 0.0)
    place = result + rows.to(tl.int64)[:, None] * count + at[None, :]
    tl.store(place, slope.to(result.dtype.element_ty), mask=inside[:, None] & among[None, :])


@triton.jit(do_not_specialize=("rows", "depth"))
def product_kernel(  # noqa: PLR0913 - two matrices and where their numbers lie
    a,
    b,
    result,
    rows: tl.int32,
    columns,
    depth: tl.int32,
    a_row,
    a_column,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, among = (row < rows)[:, None], (column < columns)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, depth, DEPTH):
        at = (begin + tl.arange(0, DEPTH)).to(tl.int64)
        there = at < depth
        x = tl.load(
            a + row.to(tl.int64)[:, None] * a_row + at[None, :] * a_column, mask=inside & there[None, :], other=0.0
        )
        y = tl.load(b + at[:, None] * columns + column[None, :], mask=there[:, None] & among, other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    place = result + row.to(tl.int64)[:, None] * columns + column[None, :]
    if ADD:
        total += tl.load(place, mask=inside & among, other=0.0).to(tl.float32)
    tl.store(place, total.to(result.dtype.element_ty), mask=inside & among)
