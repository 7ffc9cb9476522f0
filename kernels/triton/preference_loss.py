"""The pair objective: one launch forward, which also finishes the loss, and one backward.

Forward: every program adds up one chunk of one row and leaves its sums in a workspace. The last program of a pair adds
those up and writes the pair's margin and errors; the last of all pairs turns margins into the loss. Both add in a fixed
order: the bits depend on the shape alone, not on the order of arrival.

Each call counts arrivals from zeros of its own. Zeros kept for the next call would be wrong: while CUDA graphs are
recorded, new memory belongs to a pool that takes it back, and graphs that shared counters could not run side by side.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import (
    Rows,
    block_of,
    ceil_div,
    elementwise_block,
    next_power_of_2,
    on_device_of,
    rows_of,
    wide_accesses,
)
from ._utilities import utility_form, utility_slope, utility_value

_FEW_PROGRAMS, _MANY_PROGRAMS = 1024, 8192  # about one wave on the largest GPUs; several, for an even end
_LONGEST_CHUNK = 64  # blocks: bounds the length of a float32 sum
_FINISH_TILE = 128  # partial sums of each kind that the last program of a pair adds up at once


class Plan(NamedTuple):
    """How a forward launch cuts up its rows: elements a block, blocks a chunk, chunks a row."""

    block: int
    blocks_per_chunk: int
    chunks: int


def forward(
    policy: Tensor,
    reference: Tensor,
    target: Tensor | None,
    pair_weight: Tensor | None,
    timestep_weight: Tensor | None,
    beta: float,
    utility: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss (), margin (B,), policy_mse, reference_mse)``, float32, the errors ``(2B,)`` or ``(2B, K)``.

    Args:
        policy, reference, target: ``(2B, …)``, [winners; losers], or with ``timestep_weight`` ``(2B, K, …)``; float32,
            bfloat16 or float16, mixed freely; one dense layout for all, samples (and timesteps) first. ``target=None``:
            it is the reference, which is then read once.
        pair_weight: float32 ``(B,)``; timestep_weight: float32 ``(B, K)`` of dense rows, which may lie apart or be
            one and the same.
    """
    pairs, timesteps, rows = _shape(policy, timestep_weight)
    plan = plan_of(rows)
    margin, loss = policy.new_empty(pairs, dtype=torch.float32), policy.new_empty((), dtype=torch.float32)
    errors = (2 * pairs,) if timestep_weight is None else (2 * pairs, timesteps)
    policy_mse, reference_mse = (policy.new_empty(errors, dtype=torch.float32) for _ in range(2))
    partials = policy.new_empty((1 if target is None else 3) * rows.rows * plan.chunks, dtype=torch.float32)
    form, flip = utility_form(utility, label_smoothing)
    columns = _FINISH_TILE if timesteps == 1 else min(_FINISH_TILE, next_power_of_2(plan.chunks))
    with on_device_of(policy):
        forward_kernel[(rows.rows * plan.chunks,)](
            *(policy, reference, target, pair_weight, timestep_weight),
            *(loss, margin, policy_mse, reference_mse),
            partials,
            policy.new_zeros(1 + pairs, dtype=torch.int32),
            pairs,
            timesteps,
            _pitch(timestep_weight),
            rows.units,
            plan.chunks,
            plan.blocks_per_chunk,
            float(beta),
            flip,
            1.0 / float(beta),
            1.0 / rows.n,
            1.0 / pairs,
            UTILITY=form,
            UNIT=rows.unit,
            BLOCK=plan.block,
            ROWS=_FINISH_TILE // columns,
            COLUMNS=columns,
            num_warps=4,
            # Left alone, the assembler spills in some variants to have even fewer; narrow accesses need more.
            maxnreg=64 if wide_accesses(rows, policy, reference, target) else 80,
        )
    return loss, margin, policy_mse, reference_mse


def backward(  # noqa: PLR0913 - the op's schema
    grad_loss: Tensor | None,
    grad_margin: Tensor | None,
    grad_policy_mse: Tensor | None,
    policy: Tensor,
    target: Tensor,
    margin: Tensor,
    pair_weight: Tensor | None,
    timestep_weight: Tensor | None,
    beta: float,
    utility: str,
    label_smoothing: float,
) -> Tensor:
    """The gradient with respect to ``policy``, in its shape, dtype and layout; ``margin`` is what forward returned.
    Incoming gradients are dense float32 ones, the weights as in :func:`forward`.
    """
    pairs, timesteps, rows = _shape(policy, timestep_weight)
    block = elementwise_block(rows, policy, target)
    blocks = ceil_div(rows.n, block.size)
    gradient = torch.empty_like(policy)
    form, flip = utility_form(utility, label_smoothing)
    with on_device_of(policy):
        backward_kernel[(rows.rows * blocks,)](
            *(grad_loss, grad_margin, grad_policy_mse),
            *(policy, target, margin, pair_weight, timestep_weight),
            gradient,
            pairs,
            timesteps,
            _pitch(timestep_weight),
            rows.units,
            blocks,
            flip,
            1.0 / float(beta),
            1.0 / pairs,
            -float(beta) / rows.n,
            2.0 / rows.n,
            UTILITY=form,
            UNIT=rows.unit,
            BLOCK=block.size,
            num_warps=block.warps,
        )
    return gradient


@lru_cache
def plan_of(rows: Rows) -> Plan:
    """One block a chunk while that fits the GPU side by side, then up to eight, or more where there would be too many
    programs. Decided by the shape alone, as are the bits of the result.
    """
    block = block_of(rows.n).size
    per_row = ceil_div(rows.n, block)
    total = rows.rows * per_row
    length = max(min(total // _FEW_PROGRAMS, 8), ceil_div(total, _MANY_PROGRAMS), 1)
    length = min(next_power_of_2(length), next_power_of_2(per_row), _LONGEST_CHUNK)
    return Plan(block, length, ceil_div(per_row, length))


def _shape(policy: Tensor, timestep_weight: Tensor | None) -> tuple[int, int, Rows]:
    pairs = policy.shape[0] // 2
    timesteps = 1 if timestep_weight is None else policy.shape[1]
    return pairs, timesteps, rows_of(policy, 2 * pairs * timesteps)


def _pitch(timestep_weight: Tensor | None) -> int:
    """Elements from one pair's weights to the next pair's: 0 where all have the same."""
    return 0 if timestep_weight is None else timestep_weight.stride(0)


@triton.jit(do_not_specialize=("pairs", "timesteps", "pitch", "units", "chunks", "blocks_per_chunk"))
def forward_kernel(  # noqa: PLR0913 - the op's schema
    policy,
    reference,
    target,
    pair_weight,
    timestep_weight,
    loss,
    margin,
    policy_mse,
    reference_mse,
    partials,
    tickets,
    pairs: tl.int32,
    timesteps: tl.int32,
    pitch: tl.int64,
    units: tl.int64,
    chunks: tl.int32,
    blocks_per_chunk: tl.int32,
    beta: tl.float64,
    flip: tl.float64,
    per_beta: tl.float64,
    per_element: tl.float64,
    per_pair: tl.float64,
    UTILITY: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    longest = blocks_per_chunk * (BLOCK // UNIT)
    first = (program % chunks).to(tl.int64) * longest
    # The 64-bit part of an address is a scalar, the part that differs among threads has 32 bits.
    start = (row * units + first) * UNIT
    length = tl.minimum(units - first, longest).to(tl.int32) * UNIT
    at = tl.arange(0, BLOCK)

    delta = tl.zeros([BLOCK], tl.float32)
    policy_error = tl.zeros([BLOCK], tl.float32)
    reference_error = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, length, BLOCK):
        here = begin + at
        inside = here < length
        p = tl.load(policy + start + here, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(reference + start + here, mask=inside, other=0.0).to(tl.float32)
        difference = p - r
        if target is None:
            delta += difference * difference
        else:
            t = tl.load(target + start + here, mask=inside, other=0.0).to(tl.float32)
            p = p - t
            r = r - t
            # The difference of the two squared errors, without subtracting two nearly equal sums.
            delta += difference * (p + r)
            policy_error += p * p
            reference_error += r * r

    programs = tl.num_programs(0).to(tl.int64)
    tl.store(partials + program, tl.sum(delta))
    if target is not None:
        tl.store(partials + programs + program, tl.sum(policy_error))
        tl.store(partials + 2 * programs + program, tl.sum(reference_error))
    tl.debug_barrier()
    pair = (program // chunks) % (pairs * timesteps) // timesteps
    arrived = tl.atomic_add(tickets + 1 + pair, 1, sem="acq_rel")
    if arrived == 2 * timesteps * chunks - 1:
        _finish_pair(
            partials,
            target,
            pair_weight,
            timestep_weight,
            margin,
            policy_mse,
            reference_mse,
            pair,
            pairs,
            timesteps,
            pitch,
            chunks,
            beta,
            per_element,
            ROWS,
            COLUMNS,
        )
        tl.debug_barrier()
        finished = tl.atomic_add(tickets, 1, sem="acq_rel")
        if finished == pairs - 1:
            _finish_loss(margin, loss, pairs, flip, per_beta, per_pair, UTILITY)


@triton.jit
def _finish_pair(  # noqa: PLR0913 - shares the kernel's arguments
    partials,
    target,
    pair_weight,
    timestep_weight,
    margin,
    policy_mse,
    reference_mse,
    pair,
    pairs,
    timesteps,
    pitch,
    chunks,
    beta,
    per_element,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The mean errors of a pair's rows, and its margin ``−(β/2)·ρ·Σ_k w_k·(Δ_winner − Δ_loser)``."""
    winners = pairs * timesteps
    one_kind = 2 * winners.to(tl.int64) * chunks  # the distance from the partial sums of Δ to those of an error
    # In float64: the sums of winner and loser nearly cancel.
    terms = tl.zeros([ROWS], tl.float64)
    for first in range(0, timesteps, ROWS):
        timestep = first + tl.arange(0, ROWS)
        valid = timestep < timesteps
        winner = pair * timesteps + timestep
        loser = winner + winners
        delta = tl.zeros([ROWS], tl.float64)
        policy_winner = tl.zeros([ROWS], tl.float64)
        policy_loser = tl.zeros([ROWS], tl.float64)
        reference_winner = tl.zeros([ROWS], tl.float64)
        reference_loser = tl.zeros([ROWS], tl.float64)
        for column in range(0, chunks, COLUMNS):
            # All loads first, so that they overlap.
            delta_w = _tile(partials, winner, valid, column, chunks, COLUMNS)
            delta_l = _tile(partials, loser, valid, column, chunks, COLUMNS)
            if target is None:
                policy_winner += tl.sum(delta_w, axis=1)
                policy_loser += tl.sum(delta_l, axis=1)
            else:
                policy_w = _tile(partials + one_kind, winner, valid, column, chunks, COLUMNS)
                policy_l = _tile(partials + one_kind, loser, valid, column, chunks, COLUMNS)
                reference_w = _tile(partials + 2 * one_kind, winner, valid, column, chunks, COLUMNS)
                reference_l = _tile(partials + 2 * one_kind, loser, valid, column, chunks, COLUMNS)
                policy_winner += tl.sum(policy_w, axis=1)
                policy_loser += tl.sum(policy_l, axis=1)
                reference_winner += tl.sum(reference_w, axis=1)
                reference_loser += tl.sum(reference_l, axis=1)
            delta += tl.sum(delta_w, axis=1) - tl.sum(delta_l, axis=1)
        tl.store(policy_mse + winner, (policy_winner * per_element).to(tl.float32), mask=valid)
        tl.store(policy_mse + loser, (policy_loser * per_element).to(tl.float32), mask=valid)
        tl.store(reference_mse + winner, (reference_winner * per_element).to(tl.float32), mask=valid)
        tl.store(reference_mse + loser, (reference_loser * per_element).to(tl.float32), mask=valid)
        if timestep_weight is not None:
            delta *= tl.load(timestep_weight + pair * pitch + timestep, mask=valid, other=0.0).to(tl.float64)
        terms += delta
    z = tl.sum(terms) * (-0.5 * beta * per_element)
    if pair_weight is not None:
        z *= tl.load(pair_weight + pair).to(tl.float64)
    tl.store(margin + pair, z.to(tl.float32))


@triton.jit
def _finish_loss(margin, loss, pairs, flip, per_beta, per_pair, UTILITY: tl.constexpr):
    total = tl.zeros([128], tl.float64)
    for begin in range(0, pairs, 128):
        pair = begin + tl.arange(0, 128)
        valid = pair < pairs
        z = tl.load(margin + pair, mask=valid, other=0.0, cache_modifier=".cg").to(tl.float64)
        total += tl.where(valid, utility_value(z, flip, per_beta, UTILITY), 0.0)
    tl.store(loss, (tl.sum(total) * per_pair).to(tl.float32))


@triton.jit
def _tile(table, row, valid, begin, length, COLUMNS: tl.constexpr):
    """``COLUMNS`` columns, from ``begin`` on, of the given rows of a table whose rows are ``length`` long; float64."""
    column = begin + tl.arange(0, COLUMNS)
    inside = valid[:, None] & (column < length)[None, :]
    address = table + (row.to(tl.int64) * length)[:, None] + column[None, :]
    # Other multiprocessors wrote these: read past the first-level cache.
    return tl.load(address, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)


@triton.jit(do_not_specialize=("pairs", "timesteps", "pitch", "units", "blocks"))
def backward_kernel(  # noqa: PLR0913 - the op's schema
    grad_loss,
    grad_margin,
    grad_policy_mse,
    policy,
    target,
    margin,
    pair_weight,
    timestep_weight,
    gradient,
    pairs: tl.int32,
    timesteps: tl.int32,
    pitch: tl.int64,
    units: tl.int64,
    blocks: tl.int32,
    flip: tl.float64,
    per_beta: tl.float64,
    per_pair: tl.float64,
    from_margin: tl.float64,
    from_mse: tl.float64,
    UTILITY: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks).to(tl.int64) * (BLOCK // UNIT)
    start = (row.to(tl.int64) * units + first) * UNIT
    at = tl.arange(0, BLOCK)
    inside = at < tl.minimum(units - first, BLOCK // UNIT).to(tl.int32) * UNIT
    p = tl.load(policy + start + at, mask=inside, other=0.0)
    t = tl.load(target + start + at, mask=inside, other=0.0)

    winners = pairs * timesteps
    winner = row % winners
    pair = winner // timesteps
    # ∂z/∂p = −(β/2)·ρ·w·(±1)·2(p − τ)/n, and ∂mse/∂p = 2(p − τ)/n. In float64: a rounding here is one of every element.
    scale = tl.full([], 0.0, tl.float64)
    if grad_loss is not None:
        slope = utility_slope(tl.load(margin + pair), flip, per_beta, UTILITY)
        scale += tl.load(grad_loss).to(tl.float64) * slope.to(tl.float64) * per_pair
    if grad_margin is not None:
        scale += tl.load(grad_margin + pair).to(tl.float64)
    scale *= from_margin
    if pair_weight is not None:
        scale *= tl.load(pair_weight + pair).to(tl.float64)
    if timestep_weight is not None:
        scale *= tl.load(timestep_weight + pair * pitch + winner % timesteps).to(tl.float64)
    scale = tl.where(row < winners, scale, -scale)
    if grad_policy_mse is not None:
        scale += tl.load(grad_policy_mse + row).to(tl.float64) * from_mse
    scale = scale.to(tl.float32)
    tl.store(gradient + start + at, (scale * (p.to(tl.float32) - t.to(tl.float32))).to(p.dtype), mask=inside)
