"""The pair objective in plain PyTorch (Diffusion-DPO, arXiv 2311.12908, equation 14, batched), float32 accumulation, no dispatch.

Shapes: ``policy``, ``reference``, ``target`` are ``(2B, K, n)``, [winners; losers]; ``pair_weight`` ``(B,)``; ``timestep_weight`` ``(B, K)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    """``(loss (), margin (B,), policy_mse (2B, K), reference_mse (2B, K))``; ``target=None``: the reference is the target."""
    dtype = accumulation_dtype(policy, reference, target)
    p, r = policy.to(dtype), reference.to(dtype)
    tau = r if target is None else target.to(dtype)
    policy_mse = (p - tau).square().mean(-1)
    reference_mse = (r - tau).square().mean(-1)
    # The difference of the two, without subtracting two nearly equal means.
    delta = ((p - r) * ((p - tau) + (r - tau))).mean(-1)
    winner, loser = delta.chunk(2)
    margin = (pair_scale(beta, pair_weight, timestep_weight, winner) * (winner - loser)).sum(-1)
    loss = UTILITIES[utility].value(margin, beta, label_smoothing).mean()
    return loss, margin, policy_mse, reference_mse


def backward(
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
    """The gradient with respect to ``policy``, in its shape and dtype: ``2(p − τ)/n`` times one scalar per sample and timestep."""
    dtype = margin.dtype
    grad_z = torch.zeros_like(margin)
    if grad_loss is not None:
        grad_z = grad_loss * UTILITIES[utility].slope(margin, beta, label_smoothing) / margin.numel()
    if grad_margin is not None:
        grad_z = grad_z + grad_margin
    per_sample = torch.zeros(policy.shape[:2], dtype=dtype, device=policy.device)
    winner = grad_z.unsqueeze(-1) * pair_scale(beta, pair_weight, timestep_weight, per_sample.chunk(2)[0])
    per_sample = torch.cat([winner, -winner])
    if grad_policy_mse is not None:
        per_sample = per_sample + grad_policy_mse
    scale = per_sample * (2 / policy.shape[-1])
    return (scale.unsqueeze(-1) * (policy.to(dtype) - target.to(dtype))).to(policy.dtype)


def pair_scale(beta: float, pair_weight: Tensor | None, timestep_weight: Tensor | None, like: Tensor) -> Tensor:
    """``−(β/2)·ρ_i·w_ik`` as ``(B, K)`` in the shape and dtype of ``like``."""
    scale = torch.full_like(like, -0.5 * beta)
    if pair_weight is not None:
        scale = scale * pair_weight.to(like.dtype).unsqueeze(-1)
    if timestep_weight is not None:
        scale = scale * timestep_weight.to(like.dtype)
    return scale


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64, float32 otherwise."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
