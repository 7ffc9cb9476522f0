"""The sums of pair objectives in plain PyTorch, float32 accumulation, no dispatch.

Shapes: ``policy``, ``reference``, ``target`` are ``(N, …)``; paired, N = 2B, [winners; losers]. ``mask`` broadcasts
against a sample, with N, B or 1 samples of its own.
"""

from __future__ import annotations

from torch import Tensor

from fastinvdpo.ops.checks import arithmetic_dtype
from fastinvdpo.ops.layout import like


def forward(
    policy: Tensor, reference: Tensor | None, target: Tensor, mask: Tensor | None, paired: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``m(k·e²)``, ``m(k·e·d)``, ``m(k·d²)``, ``(N,)``, ``m(k·e_w·e_l)``, ``(B,)``, ``m(k)``, ``(N,)``; or ``(0,)``."""
    dtype = arithmetic_dtype(policy, reference, target)
    p, error = policy.to(dtype), policy.to(dtype) - target.to(dtype)
    k = None if mask is None else mask.to(dtype)
    policy_mse = _mean(error, error, k)
    cross, shift_mse, pair_cross, mask_mean = (policy.new_empty(0, dtype=dtype) for _ in range(4))
    if reference is not None:
        shift = p - reference.to(dtype)
        cross, shift_mse = _mean(error, shift, k), _mean(shift, shift, k)
    if paired:
        winner, loser = error.chunk(2)
        pair_cross = _mean(winner, loser, pair_mask(k, len(error)))
    if k is not None:
        mask_mean = k.flatten(1).mean(1).repeat(len(error) // len(k))
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
) -> Tensor:
    """The gradient with respect to ``policy``, in its shape, dtype and layout:
    ``k·((2g_E + g_X)·e + (g_X + 2g_Q)·d + g_C·e_partner)/n``.
    """
    dtype = arithmetic_dtype(policy, reference, target)
    p, error = policy.to(dtype), policy.to(dtype) - target.to(dtype)
    k = None if mask is None else mask.to(dtype)
    none = error.new_zeros(len(error))
    of_mse, of_cross, of_shift = (
        none if grad is None else grad for grad in (grad_policy_mse, grad_cross, grad_shift_mse)
    )
    gradient = _of_samples(2 * of_mse + of_cross, error) * error
    if reference is not None:
        gradient = gradient + _of_samples(of_cross + 2 * of_shift, error) * (p - reference.to(dtype))
    if k is not None:
        gradient = gradient * _of_samples(k, error)
    if grad_pair_cross is not None:
        partner, weight = error.roll(len(error) // 2, 0), pair_mask(k, len(error))
        partner = partner if weight is None else _of_samples(weight, error) * partner
        gradient = gradient + _of_samples(grad_pair_cross, error) * partner
    return like((gradient * (len(policy) / policy.numel())).to(policy.dtype), policy)


def pair_mask(mask: Tensor | None, samples: int) -> Tensor | None:
    """The weight of a pair's product: the mask that winner and loser share, or the geometric mean of their own."""
    if mask is None or samples == 1 or len(mask) < samples:
        return mask
    winner, loser = mask.chunk(2)
    return (winner * loser).sqrt()


def _mean(one: Tensor, other: Tensor, weight: Tensor | None) -> Tensor:
    product = one * other if weight is None else _of_samples(weight, one) * one * other
    return product.flatten(1).mean(1)


def _of_samples(table: Tensor, samples: Tensor) -> Tensor:
    """``(R, …)`` or ``(R,)`` repeated, so that it broadcasts against ``samples``; R divides their number."""
    table = table if table.ndim > 1 else table.view(-1, *[1] * (samples.ndim - 1))
    return table if len(table) == 1 else table.repeat(len(samples) // len(table), *[1] * (samples.ndim - 1))
