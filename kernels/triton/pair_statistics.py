"""The sums of pair objectives and their gradient: one launch each.

A unit is a pair, or a single sample; a row of a mask covers one of the ``parts`` parts of a sample's elements, and
holds for each. How a part is cut into chunks, and the order of every sum, depends on the length of a row alone. The
last program of a unit to finish adds up the sums of all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import Rows, block_of, ceil_div, elementwise_block, next_power_of_2, on_device_of, rows_of

_CHUNKS = 256  # about so many of a row: a batch of a few fills the largest GPUs
_LONGEST_CHUNK = 64  # blocks: bounds the length of a float32 sum
_TILE = 128  # partial sums of each kind that the last program of a unit adds up at once
_OF_SAMPLE, _KINDS = tl.constexpr(4), tl.constexpr(9)  # sums of a sample: E, X, Q, m(k); of both of a pair, and C


class Plan(NamedTuple):
    """How a launch cuts up its rows: parts a row, elements a block, blocks a chunk, chunks a part."""

    parts: int
    block: int
    blocks_per_chunk: int
    chunks: int


def forward(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(E (N,), X (N,), Q (N,), C (B,), m(k) (N,))``, float32, ``(0,)`` for what is not defined.

    Args:
        policy, reference, target: ``(N, …)``, paired [winners; losers]; float32, bfloat16 or float16, mixed freely; one
            dense layout for all, samples first.
        mask: float32, dense rows of which each divides a sample, their number the samples'.
        pair_mask: the same for pairs.
    """
    samples, sides = len(policy), 2 if paired else 1
    rows, plan = _rows_and_plan(policy, mask)
    units, pieces = samples // sides, plan.parts * plan.chunks
    shifts, masked = (0 if tensor is None else samples for tensor in (reference, mask))
    sizes = (samples, shifts, shifts, units if paired else 0, masked)
    results = [policy.new_empty(size, dtype=torch.float32) for size in sizes]
    with on_device_of(policy):
        forward_kernel[(units * pieces,)](
            policy,
            reference,
            target,
            mask,
            pair_mask,
            *results,
            policy.new_empty(_KINDS.value * units * pieces, dtype=torch.float32),
            policy.new_zeros(units, dtype=torch.int32),
            units,
            rows.units,
            plan.parts,
            plan.chunks,
            plan.blocks_per_chunk,
            1 if mask is None else len(mask),
            1 if pair_mask is None else len(pair_mask),
            samples / policy.numel(),
            PAIRED=paired,
            UNIT=rows.unit,
            BLOCK=plan.block,
            TILE=min(_TILE, next_power_of_2(pieces)),
            num_warps=4,
            maxnreg=128 if mask is None else 192,  # left alone, the assembler spills in some variants to have fewer
        )
    policy_mse, cross, shift_mse, pair_cross, mask_mean = results
    return policy_mse, cross, shift_mse, pair_cross, mask_mean


def backward(
    grad_policy_mse: Tensor | None,
    grad_cross: Tensor | None,
    grad_shift_mse: Tensor | None,
    grad_pair_cross: Tensor | None,
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    pair_mask: Tensor | None,
) -> Tensor:
    """The gradient with respect to ``policy``, in its shape, dtype and layout; incoming gradients are dense float32
    ones, the rest as in :func:`forward`.
    """
    samples, sides = len(policy), 1 if grad_pair_cross is None else 2
    rows, plan = _rows_and_plan(policy, mask)
    whole = [tensor for tensor in (policy, reference, target) if tensor is not None]
    block = elementwise_block(rows, *whole)
    blocks = ceil_div(rows.n, block.size)
    gradient = torch.empty_like(policy)
    with on_device_of(policy):
        backward_kernel[(samples * plan.parts * blocks,)](
            grad_policy_mse,
            grad_cross,
            grad_shift_mse,
            grad_pair_cross,
            policy,
            reference,
            target,
            mask,
            pair_mask,
            gradient,
            samples // sides,
            rows.units,
            plan.parts,
            blocks,
            1 if mask is None else len(mask),
            1 if pair_mask is None else len(pair_mask),
            samples / policy.numel(),
            SIDES=sides,
            UNIT=rows.unit,
            BLOCK=block.size,
            num_warps=block.warps,
        )
    return gradient


def _rows_and_plan(policy: Tensor, mask: Tensor | None) -> tuple[Rows, Plan]:
    """The parts of all samples as rows, and how one is cut."""
    samples = len(policy)
    parts = 1 if mask is None else policy.numel() // samples * len(mask) // mask.numel()
    rows = rows_of(policy, samples * parts)
    return rows, plan_of(rows.n, parts)


def plan_of(n: int, parts: int) -> Plan:
    """One block a chunk while that makes few enough."""
    block = block_of(n).size
    per_part = ceil_div(n, block)
    length = min(next_power_of_2(ceil_div(parts * per_part, _CHUNKS)), next_power_of_2(per_part), _LONGEST_CHUNK)
    return Plan(parts, block, length, ceil_div(per_part, length))


@triton.jit(do_not_specialize=("units", "length", "parts", "chunks", "blocks_per_chunk", "masks", "pair_masks"))
def forward_kernel(  # noqa: PLR0913 - the op's schema
    policy,
    reference,
    target,
    mask,
    pair_mask,
    policy_mse,
    cross,
    shift_mse,
    pair_cross,
    mask_mean,
    partials,
    tickets,
    units: tl.int32,
    length: tl.int64,
    parts: tl.int32,
    chunks: tl.int32,
    blocks_per_chunk: tl.int32,
    masks: tl.int32,
    pair_masks: tl.int32,
    per_element: tl.float64,
    PAIRED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """``length``: of a part, in units of ``UNIT`` elements."""
    program = tl.program_id(0)
    pieces = parts * chunks
    unit = program // pieces
    part = program % pieces // chunks
    longest = blocks_per_chunk * (BLOCK // UNIT)
    first = (program % chunks).to(tl.int64) * longest
    # The 64-bit part of an address is a scalar, the part that differs among threads has 32 bits.
    winner = ((unit.to(tl.int64) * parts + part) * length + first) * UNIT
    loser = winner + units.to(tl.int64) * parts * length * UNIT
    count = tl.minimum(length - first, longest).to(tl.int32) * UNIT
    at = tl.arange(0, BLOCK)

    e_w = tl.zeros([BLOCK], tl.float32)
    x_w = tl.zeros([BLOCK], tl.float32)
    q_w = tl.zeros([BLOCK], tl.float32)
    k_w = tl.zeros([BLOCK], tl.float32)
    e_l = tl.zeros([BLOCK], tl.float32)
    x_l = tl.zeros([BLOCK], tl.float32)
    q_l = tl.zeros([BLOCK], tl.float32)
    k_l = tl.zeros([BLOCK], tl.float32)
    both = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        here = begin + at
        inside = here < count
        # All loads first, so that they overlap.
        p = tl.load(policy + winner + here, mask=inside, other=0.0).to(tl.float32)
        error = p - tl.load(target + winner + here, mask=inside, other=0.0).to(tl.float32)
        shift = error
        if reference is not None:
            shift = p - tl.load(reference + winner + here, mask=inside, other=0.0).to(tl.float32)
        if PAIRED:
            p_l = tl.load(policy + loser + here, mask=inside, other=0.0).to(tl.float32)
            error_l = p_l - tl.load(target + loser + here, mask=inside, other=0.0).to(tl.float32)
            shift_l = error_l
            if reference is not None:
                shift_l = p_l - tl.load(reference + loser + here, mask=inside, other=0.0).to(tl.float32)
        k = _weights(mask, unit % masks, length, first, UNIT, here, inside)
        if mask is not None:
            k_w += k
        e_w += k * error * error
        if reference is not None:
            x_w += k * error * shift
            q_w += k * shift * shift
        if PAIRED:
            k = _weights(mask, (unit + units) % masks, length, first, UNIT, here, inside)
            if mask is not None:
                k_l += k
            e_l += k * error_l * error_l
            if reference is not None:
                x_l += k * error_l * shift_l
                q_l += k * shift_l * shift_l
            both += _weights(pair_mask, unit % pair_masks, length, first, UNIT, here, inside) * error * error_l

    programs = tl.num_programs(0).to(tl.int64)
    tl.store(partials + program, tl.sum(e_w))
    if reference is not None:
        tl.store(partials + programs + program, tl.sum(x_w))
        tl.store(partials + 2 * programs + program, tl.sum(q_w))
    if mask is not None:
        tl.store(partials + 3 * programs + program, tl.sum(k_w))
    if PAIRED:
        tl.store(partials + 4 * programs + program, tl.sum(e_l))
        if reference is not None:
            tl.store(partials + 5 * programs + program, tl.sum(x_l))
            tl.store(partials + 6 * programs + program, tl.sum(q_l))
        if mask is not None:
            tl.store(partials + 7 * programs + program, tl.sum(k_l))
        tl.store(partials + 8 * programs + program, tl.sum(both))
    tl.debug_barrier()
    arrived = tl.atomic_add(tickets + unit, 1, sem="acq_rel")
    if arrived == pieces - 1:
        own = partials + unit.to(tl.int64) * pieces
        for side in tl.static_range(2 if PAIRED else 1):
            row = unit + side * units
            table = own + side * _OF_SAMPLE * programs
            tl.store(policy_mse + row, _mean(table, pieces, per_element, TILE))
            if reference is not None:
                tl.store(cross + row, _mean(table + programs, pieces, per_element, TILE))
                tl.store(shift_mse + row, _mean(table + 2 * programs, pieces, per_element, TILE))
            if mask is not None:
                tl.store(mask_mean + row, _mean(table + 3 * programs, pieces, per_element, TILE))
        if PAIRED:
            tl.store(pair_cross + unit, _mean(own + 8 * programs, pieces, per_element, TILE))


@triton.jit
def _weights(mask, row, length, first, UNIT: tl.constexpr, here, inside):
    """Those of the elements ``here`` of a mask's row, from ``first`` units on; 1 without a mask."""
    if mask is None:
        return 1.0
    else:
        return tl.load(mask + (row.to(tl.int64) * length + first) * UNIT + here, mask=inside, other=0.0)


@triton.jit
def _mean(table, length, per_element, TILE: tl.constexpr):
    total = tl.zeros([TILE], tl.float64)
    for begin in range(0, length, TILE):
        at = begin + tl.arange(0, TILE)
        # Other multiprocessors wrote these: read past the first-level cache.
        total += tl.load(table + at, mask=at < length, other=0.0, cache_modifier=".cg").to(tl.float64)
    return (tl.sum(total) * per_element).to(tl.float32)


@triton.jit(do_not_specialize=("units", "length", "parts", "blocks", "masks", "pair_masks"))
def backward_kernel(  # noqa: PLR0913 - the op's schema
    grad_policy_mse,
    grad_cross,
    grad_shift_mse,
    grad_pair_cross,
    policy,
    reference,
    target,
    mask,
    pair_mask,
    gradient,
    units: tl.int32,
    length: tl.int64,
    parts: tl.int32,
    blocks: tl.int32,
    masks: tl.int32,
    pair_masks: tl.int32,
    per_element: tl.float64,
    SIDES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The programs of a winner and its loser are neighbors: each reads what the other does.
    side = tl.program_id(0) % SIDES
    program = tl.program_id(0) // SIDES
    unit = program // (parts * blocks)
    part = program // blocks % parts
    row = unit + side * units
    first = (program % blocks).to(tl.int64) * (BLOCK // UNIT)
    start = ((row.to(tl.int64) * parts + part) * length + first) * UNIT
    at = tl.arange(0, BLOCK)
    inside = at < tl.minimum(length - first, BLOCK // UNIT).to(tl.int32) * UNIT
    p = tl.load(policy + start + at, mask=inside, other=0.0)
    t = tl.load(target + start + at, mask=inside, other=0.0)

    # In float64: a rounding here is one of every element.
    of_error = tl.full([], 0.0, tl.float64)
    of_shift = tl.full([], 0.0, tl.float64)
    if grad_policy_mse is not None:
        of_error += 2.0 * tl.load(grad_policy_mse + row).to(tl.float64)
    if grad_cross is not None:
        between = tl.load(grad_cross + row).to(tl.float64)
        of_error += between
        of_shift += between
    if grad_shift_mse is not None:
        of_shift += 2.0 * tl.load(grad_shift_mse + row).to(tl.float64)
    slope = (of_error * per_element).to(tl.float32) * (p.to(tl.float32) - t.to(tl.float32))
    if reference is not None:  # noqa: SIM102 - the one is known to the compiler
        # The gradient of 2X − Q does not depend on it.
        if of_shift != 0.0:
            r = tl.load(reference + start + at, mask=inside, other=0.0).to(tl.float32)
            slope += (of_shift * per_element).to(tl.float32) * (p.to(tl.float32) - r)
    slope = slope * _weights(mask, row % masks, length, first, UNIT, at, inside)
    if grad_pair_cross is not None:
        of_partner = tl.load(grad_pair_cross + unit)
        if of_partner != 0.0:
            other = start + (1 - 2 * side) * units.to(tl.int64) * parts * length * UNIT
            p_other = tl.load(policy + other + at, mask=inside, other=0.0).to(tl.float32)
            error = p_other - tl.load(target + other + at, mask=inside, other=0.0).to(tl.float32)
            k = _weights(pair_mask, unit % pair_masks, length, first, UNIT, at, inside)
            slope += (of_partner.to(tl.float64) * per_element).to(tl.float32) * k * error
    tl.store(gradient + start + at, slope.to(p.dtype), mask=inside)
