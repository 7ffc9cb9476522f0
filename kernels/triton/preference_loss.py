"""The pair objective: one launch forward, which also finishes the loss, and one backward.

Forward: every program adds up one chunk of one row and leaves its sums in a workspace; the program that finishes last
adds those up in a fixed order, so that the bits depend on the shape alone and not on the order of arrival.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Rows, block_of, elementwise_block, on_device_of, rows_of

_PROGRAMS = 4096  # a few waves on the largest GPUs; more programs than that only cost atomics and partial sums
_LONGEST_CHUNK = 64  # blocks: bounds the length of a float32 sum
_FINISH_TILE = 256  # partial sums of each kind that the last program adds up at once

# One zero for each device and stream: launches on one stream follow each other, and each leaves it at zero.
_tickets: dict[tuple[torch.device, int], Tensor] = {}


class Plan(NamedTuple):
    """How a forward launch cuts up its rows."""

    block: int
    warps: int
    blocks_per_chunk: int
    chunks: int


def forward(  # noqa: PLR0913 - the op's schema
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
        pair_weight: ``(B,)``; timestep_weight: ``(B, K)``.
    """
    pairs, timesteps, rows = _shape(policy, timestep_weight)
    plan = plan_of(rows)
    margin, loss = policy.new_empty(pairs, dtype=torch.float32), policy.new_empty((), dtype=torch.float32)
    errors = (2 * pairs,) if timestep_weight is None else (2 * pairs, timesteps)
    policy_mse, reference_mse = (policy.new_empty(errors, dtype=torch.float32) for _ in range(2))
    partials = policy.new_empty((1 if target is None else 3) * rows.rows * plan.chunks, dtype=torch.float32)
    terms = None if timestep_weight is None else policy.new_empty(pairs * timesteps, dtype=torch.float64)
    form, flip = utility_form(utility, label_smoothing)
    columns = min(64, triton.next_power_of_2(plan.chunks))
    with on_device_of(policy):
        forward_kernel[(rows.rows * plan.chunks,)](
            policy,
            reference,
            target,
            _dense(pair_weight),
            _dense(timestep_weight),
            loss,
            margin,
            policy_mse,
            reference_mse,
            partials,
            terms,
            _ticket(policy.device),
            pairs,
            timesteps,
            rows.units,
            plan.chunks,
            plan.blocks_per_chunk,
            float(beta),
            flip,
            UTILITY=form,
            UNIT=rows.unit,
            BLOCK=plan.block,
            ROWS=_FINISH_TILE // columns,
            COLUMNS=columns,
            num_warps=plan.warps,
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
    """The gradient with respect to ``policy``, in its shape, dtype and layout; ``margin`` is what forward returned."""
    pairs, timesteps, rows = _shape(policy, timestep_weight)
    block = elementwise_block(rows, policy, target)
    blocks = triton.cdiv(rows.n, block.size)
    gradient = torch.empty_like(policy)
    form, flip = utility_form(utility, label_smoothing)
    with on_device_of(policy):
        backward_kernel[(rows.rows * blocks,)](
            _dense(grad_loss),
            _dense(grad_margin),
            _dense(grad_policy_mse),
            policy,
            target,
            _dense(margin),
            _dense(pair_weight),
            _dense(timestep_weight),
            gradient,
            pairs,
            timesteps,
            rows.units,
            blocks,
            float(beta),
            -float(beta) / rows.n,
            2.0 / rows.n,
            flip,
            UTILITY=form,
            UNIT=rows.unit,
            BLOCK=block.size,
            num_warps=block.warps,
        )
    return gradient


def plan_of(rows: Rows) -> Plan:
    """Many short chunks while they fit the GPU side by side, longer ones as the input grows."""
    block = block_of(rows.n)
    per_row = triton.cdiv(rows.n, block.size)
    wanted = triton.next_power_of_2(triton.cdiv(rows.rows * per_row, _PROGRAMS))
    length = min(wanted, _LONGEST_CHUNK, triton.next_power_of_2(per_row))
    return Plan(block.size, block.warps, length, triton.cdiv(per_row, length))


def utility_form(utility: str, label_smoothing: float) -> tuple[str, float]:
    """``(form, flip)``: cdpo and robust are both ``−log σ(z) − flip·z``, form ``smoothed``."""
    if utility == "cdpo":
        return "smoothed", -label_smoothing
    if utility == "robust":
        return "smoothed", label_smoothing / (1 - 2 * label_smoothing)
    return utility, 0.0


def _shape(policy: Tensor, timestep_weight: Tensor | None) -> tuple[int, int, Rows]:
    pairs = policy.shape[0] // 2
    timesteps = 1 if timestep_weight is None else policy.shape[1]
    return pairs, timesteps, rows_of(policy, 2 * pairs * timesteps)


def _dense(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _ticket(device: torch.device) -> Tensor:
    """An int32 zero that no launch in flight uses, but earlier ones on this stream."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            # A graph may be replayed on any stream, beside others that were captured on this one: it owns its zero.
            return torch.zeros(1, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    ticket = _tickets.get((device, stream))
    if ticket is None:
        ticket = _tickets[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return ticket


@triton.jit(do_not_specialize=("pairs", "timesteps", "units", "chunks", "blocks_per_chunk"))
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
    terms,
    ticket,
    pairs: tl.int32,
    timesteps: tl.int32,
    units: tl.int64,
    chunks: tl.int32,
    blocks_per_chunk: tl.int32,
    beta: tl.float32,
    flip: tl.float32,
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
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        _finish_rows(
            partials,
            target,
            pair_weight,
            timestep_weight,
            loss,
            margin,
            policy_mse,
            reference_mse,
            terms,
            pairs,
            timesteps,
            units,
            chunks,
            beta,
            flip,
            UTILITY,
            UNIT,
            ROWS,
            COLUMNS,
        )
        if timestep_weight is not None:
            tl.debug_barrier()
            _finish_pairs(terms, loss, margin, pairs, timesteps, beta, flip, UTILITY, ROWS)
        tl.store(ticket, 0)


@triton.jit
def _finish_rows(  # noqa: PLR0913 - shares the kernel's arguments
    partials,
    target,
    pair_weight,
    timestep_weight,
    loss,
    margin,
    policy_mse,
    reference_mse,
    terms,
    pairs,
    timesteps,
    units,
    chunks,
    beta,
    flip,
    UTILITY: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The mean errors of every row, and ``−(β/2)·ρ_i·w_ik·(Δ_winner − Δ_loser)`` of every winner and its loser."""
    winners = pairs.to(tl.int64) * timesteps
    one_kind = 2 * winners * chunks  # the distance from the partial sums of Δ to those of an error
    # Summed in float64: the terms of a pair nearly cancel.
    mean = 1.0 / (units * UNIT).to(tl.float64)
    total = tl.zeros([ROWS], tl.float64)
    for begin in range(0, winners, ROWS):
        winner = begin + tl.arange(0, ROWS).to(tl.int64)
        valid = winner < winners
        loser = winner + winners
        delta_winner = _row_sums(partials, winner, valid, chunks, ROWS, COLUMNS) * mean
        delta_loser = _row_sums(partials, loser, valid, chunks, ROWS, COLUMNS) * mean
        if target is None:
            tl.store(policy_mse + winner, delta_winner.to(tl.float32), mask=valid)
            tl.store(policy_mse + loser, delta_loser.to(tl.float32), mask=valid)
            nothing = tl.zeros([ROWS], tl.float32)
            tl.store(reference_mse + winner, nothing, mask=valid)
            tl.store(reference_mse + loser, nothing, mask=valid)
        else:
            _store_errors(policy_mse, partials + one_kind, winner, valid, chunks, mean, ROWS, COLUMNS)
            _store_errors(policy_mse, partials + one_kind, loser, valid, chunks, mean, ROWS, COLUMNS)
            _store_errors(reference_mse, partials + 2 * one_kind, winner, valid, chunks, mean, ROWS, COLUMNS)
            _store_errors(reference_mse, partials + 2 * one_kind, loser, valid, chunks, mean, ROWS, COLUMNS)
        term = (delta_winner - delta_loser) * (-0.5 * beta)
        if pair_weight is not None:
            term *= tl.load(pair_weight + winner // timesteps, mask=valid, other=0.0).to(tl.float64)
        if timestep_weight is None:
            z = term.to(tl.float32)
            tl.store(margin + winner, z, mask=valid)
            value = _utility_value(z.to(tl.float64), beta, flip, UTILITY)
            total += tl.where(valid, value, 0.0)
        else:
            term *= tl.load(timestep_weight + winner, mask=valid, other=0.0).to(tl.float64)
            tl.store(terms + winner, term, mask=valid)
    if timestep_weight is None:
        tl.store(loss, (tl.sum(total) / pairs).to(tl.float32))


@triton.jit
def _finish_pairs(terms, loss, margin, pairs, timesteps, beta, flip, UTILITY: tl.constexpr, ROWS: tl.constexpr):  # noqa: PLR0913
    """The terms of a pair's timesteps become its margin, the margins the loss."""
    total = tl.zeros([ROWS], tl.float64)
    for begin in range(0, pairs, ROWS):
        pair = begin + tl.arange(0, ROWS)
        valid = pair < pairs
        z = _row_sums(terms, pair.to(tl.int64), valid, timesteps, ROWS, 16).to(tl.float32)
        tl.store(margin + pair, z, mask=valid)
        total += tl.where(valid, _utility_value(z.to(tl.float64), beta, flip, UTILITY), 0.0)
    tl.store(loss, (tl.sum(total) / pairs).to(tl.float32))


@triton.jit
def _store_errors(mse, partials, row, valid, chunks, mean, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    total = _row_sums(partials, row, valid, chunks, ROWS, COLUMNS)
    tl.store(mse + row, (total * mean).to(tl.float32), mask=valid)


@triton.jit
def _row_sums(table, row, valid, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums, float64 ``(ROWS,)``, of the given rows of a table whose rows are ``length`` long."""
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, length, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = valid[:, None] & (column < length)[None, :]
        # Other multiprocessors wrote these: read past the first-level cache.
        address = table + (row * length)[:, None] + column[None, :]
        sums += tl.load(address, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(sums, axis=1)


@triton.jit
def _softplus(x):
    """``log(1 + eˣ)``, float64."""
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    # log1p by the rounding error of 1 + e: exact to a few units in the last place, also for tiny e.
    small = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.maximum(x, 0.0) + small


@triton.jit
def _utility_value(z, beta, flip, UTILITY: tl.constexpr):
    """``u(z)``, float64; the conditions are such that a margin that is not a number gives a loss that is not one."""
    if UTILITY == "sigmoid":
        return _softplus(-z)
    elif UTILITY == "smoothed":
        return _softplus(-z) - flip * z
    elif UTILITY == "hinge":
        return tl.where(z >= 1.0, 0.0, 1.0 - z)
    elif UTILITY == "ipo":
        gap = (z - 0.5) / beta
        return gap * gap
    else:
        tl.static_assert(UTILITY == "linear")
        edge = (0.5 - 0.01) / 0.4
        above = edge * (0.2 * edge - 0.5) - (z - edge) * 0.01
        below = edge * (0.2 * edge + 0.5) - (z + edge) * 0.99
        return tl.where(z > edge, above, tl.where(z < -edge, below, z * (0.2 * z - 0.5)))


@triton.jit
def _exp_of_negative(x):
    """``eˣ`` for x ≤ 0, float32. The built-in one multiplies by log₂e first, whose rounding error grows with x."""
    x = tl.where(x < -110.0, -110.0, x)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(k, 1.9046542121259336e-09, tl.fma(k, -0.6931471824645996, x))  # log 2, in two parts
    tail = 0.1666650521114506 + r * (0.041666464944505696 + r * (0.00836915395971191 + r * 0.0013933647862928863))
    return (1.0 + r * (1.0 + r * (0.5 + r * tail))) * tl.exp2(k)


@triton.jit
def _sigmoid(x):
    e = _exp_of_negative(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, e), 1.0 + e)


@triton.jit
def _utility_slope(z, beta, flip, UTILITY: tl.constexpr):
    """``u'(z)``, float32."""
    if UTILITY == "sigmoid":
        return -_sigmoid(-z)
    elif UTILITY == "smoothed":
        return -flip - _sigmoid(-z)
    elif UTILITY == "hinge":
        return tl.where(z < 1.0, -1.0, 0.0)
    elif UTILITY == "ipo":
        return tl.div_rn(tl.div_rn(2.0 * (z - 0.5), beta), beta)
    else:
        tl.static_assert(UTILITY == "linear")
        slope = 0.5 - 0.4 * z
        return -tl.where(slope < 0.01, 0.01, tl.where(slope > 0.99, 0.99, slope))


@triton.jit(do_not_specialize=("pairs", "timesteps", "units", "blocks"))
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
    units: tl.int64,
    blocks: tl.int32,
    beta: tl.float32,
    from_margin: tl.float32,
    from_mse: tl.float32,
    flip: tl.float32,
    UTILITY: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * (BLOCK // UNIT)
    start = (row * units + first) * UNIT
    at = tl.arange(0, BLOCK)
    inside = at < tl.minimum(units - first, BLOCK // UNIT).to(tl.int32) * UNIT
    p = tl.load(policy + start + at, mask=inside, other=0.0)
    t = tl.load(target + start + at, mask=inside, other=0.0)

    winners = pairs.to(tl.int64) * timesteps
    winner = row % winners
    pair = winner // timesteps
    scale = 0.0
    if grad_loss is not None:
        slope = _utility_slope(tl.load(margin + pair), beta, flip, UTILITY)
        scale = tl.div_rn(tl.load(grad_loss).to(tl.float32) * slope, pairs.to(tl.float32))
    if grad_margin is not None:
        scale += tl.load(grad_margin + pair).to(tl.float32)
    # ∂z/∂p = −(β/2)·ρ·w·(±1)·2(p − τ)/n, and ∂mse/∂p = 2(p − τ)/n.
    scale *= from_margin
    if pair_weight is not None:
        scale *= tl.load(pair_weight + pair).to(tl.float32)
    if timestep_weight is not None:
        scale *= tl.load(timestep_weight + winner).to(tl.float32)
    scale = tl.where(row < winners, scale, -scale)
    if grad_policy_mse is not None:
        scale += tl.load(grad_policy_mse + row).to(tl.float32) * from_mse
    tl.store(gradient + start + at, (scale * (p.to(tl.float32) - t.to(tl.float32))).to(p.dtype), mask=inside)
