"""The pair objective in plain PyTorch (Diffusion-DPO, arXiv 2311.12908, equation 14, batched), float32 accumulation, no
dispatch.

Shapes: ``policy``, ``reference``, ``target`` are ``(2B, …)``, [winners; losers], with ``pair_weight`` ``(B,)``; or,
with ``timestep_weight`` ``(B, K)``, ``(2B, K, …)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastinvdpo.ops.checks import arithmetic_dtype
from fastinvdpo.ops.layout import like
from fastinvdpo.ops.preference_loss.utilities import UTILITIES


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
    """``(loss (), margin (B,), policy_mse, reference_mse)``; ``target=None``: it is the reference."""
    dtype = arithmetic_dtype(policy, reference, target)
    batch_dims = 1 if timestep_weight is None else 2
    p, r = (tensor.to(dtype).flatten(batch_dims) for tensor in (policy, reference))
    tau = r if target is None else target.to(dtype).flatten(batch_dims)
    policy_mse = (p - tau).square().mean(-1)
    reference_mse = (r - tau).square().mean(-1)
    # The difference of the two, without subtracting two nearly equal means.
    delta = ((p - r) * ((p - tau) + (r - tau))).mean(-1)
    results = of_differences(delta, pair_weight, timestep_weight, beta, utility, label_smoothing)
    return *results, policy_mse, reference_mse


def of_differences(
    delta: Tensor,
    pair_weight: Tensor | None,
    timestep_weight: Tensor | None,
    beta: float,
    utility: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """``(loss (), margin (B,))`` of ``Δ`` per sample and timestep."""
    winner, loser = delta.chunk(2)
    margin = pair_scale(beta, pair_weight, timestep_weight, winner) * (winner - loser)
    if timestep_weight is not None:
        margin = margin.sum(1)
    return UTILITIES[utility].value(margin, beta, label_smoothing).mean(), margin


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
    """The gradient of ``policy``, in its dtype and layout: ``2(p − τ)/n`` times a scalar per sample and timestep."""
    dtype, batch_dims = margin.dtype, 1 if timestep_weight is None else 2
    grad_z = torch.zeros_like(margin)
    if grad_loss is not None:
        grad_z = grad_loss * UTILITIES[utility].slope(margin, beta, label_smoothing) / margin.numel()
    if grad_margin is not None:
        grad_z = grad_z + grad_margin
    per_pair = grad_z if timestep_weight is None else grad_z.unsqueeze(1).expand_as(timestep_weight)
    winner = per_pair * pair_scale(beta, pair_weight, timestep_weight, per_pair)
    per_sample = torch.cat([winner, -winner])
    if grad_policy_mse is not None:
        per_sample = per_sample + grad_policy_mse
    scale = per_sample * (2 * per_sample.numel() / policy.numel())
    scale = scale.view(*scale.shape, *[1] * (policy.ndim - batch_dims))
    return like((scale * (policy.to(dtype) - target.to(dtype))).to(policy.dtype), policy)


def pair_scale(beta: float, pair_weight: Tensor | None, timestep_weight: Tensor | None, each: Tensor) -> Tensor:
    """``−(β/2)·ρ_i·w_ik`` in the shape, ``(B,)`` or ``(B, K)``, and dtype of ``each``."""
    scale = torch.full_like(each, -0.5 * beta)
    if pair_weight is not None:
        rho = pair_weight.to(each.dtype)
        scale = scale * (rho if timestep_weight is None else rho.unsqueeze(1))
    if timestep_weight is not None:
        scale = scale * timestep_weight.to(each.dtype)
    return scale
