"""Log-probabilities of tokens in plain PyTorch, float32 accumulation, no dispatch.

Shapes: ``hidden`` ``(T, D)``, ``weight`` ``(V, D)``, ``targets`` int64 ``(T,)`` within ``start … stop − 1``.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from fastinvdpo.ops.checks import arithmetic_dtype


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, stop: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``log p`` and ``log Σ exp`` of each token, ``(T,)``; with ``mean`` ``Σ_v p_v·w_v``, ``(T, D)``, else ``(0, 0)``."""
    dtype = arithmetic_dtype(hidden, weight)
    columns = weight[start:stop].to(dtype)
    logits = hidden.to(dtype) @ columns.T
    log_sum = logits.logsumexp(1)
    chosen = logits.gather(1, (targets - start).unsqueeze(1)).squeeze(1)
    means = (logits - log_sum.unsqueeze(1)).exp() @ columns if mean else logits.new_empty(0, 0)
    return chosen - log_sum, log_sum, means


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
    """The gradients of ``Σ_t of_target_t·logit_target + of_sum_t·log Σ exp`` with respect to ``hidden`` and ``weight``,
    each in its dtype, or ``(0, 0)`` where it is not needed: with
    ``s = of_target·[v = target] + of_sum·exp(logit − log Σ exp)`` they are ``s·W`` and ``sᵀ·H``.
    """
    dtype = arithmetic_dtype(hidden, weight)
    h, columns = hidden.to(dtype), weight[start:stop].to(dtype)
    slopes = of_sum.unsqueeze(1) * (h @ columns.T - log_sum.unsqueeze(1)).exp()
    slopes = slopes.scatter_add(1, (targets - start).unsqueeze(1), of_target.unsqueeze(1).to(dtype))
    none = hidden.new_empty(0, 0)
    to_hidden = (slopes @ columns).to(hidden.dtype) if of_hidden else none
    to_weight = weight.new_empty(0, 0)
    if of_weight:
        to_weight = pad((slopes.T @ h).to(weight.dtype), (0, 0, start, len(weight) - stop))
    return to_hidden, to_weight
