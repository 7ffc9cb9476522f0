"""Log-probabilities of tokens from hidden states and an output head, without the logits of the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops.checks import check_tensor
from fastinvdpo.ops.token_log_probs.schema import token_log_probs_op

__all__ = ["token_log_probs"]


def token_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, columns: tuple[int, int] | None = None
) -> Tensor:
    """``log softmax(hidden · weightᵀ)`` at the targets; fused backends hold a block of the logits at a time.

    With ``p`` the softmax over the columns, the gradient of a token's log-probability with respect to its hidden state
    is ``w_target − Σ_v p_v·w_v``. Where the weight needs no gradient, as that of a frozen head, the sum is formed in the
    forward (``T·D`` numbers are kept for it); else the backward forms the blocks of logits again.

    Args:
        hidden: ``(…, D)``, the states that predict the targets. float64, float32, bfloat16 or float16.
        weight: ``(V, D)``, one row a token; its dtype may differ.
        targets: int64 ``(…)``, rows of ``weight``.
        columns: ``(start, stop)``: the softmax is over these rows of ``weight`` alone, and targets are among them.
            None: over all.

    Returns:
        ``(…)``, float32 (float64 where an input is). Gradients flow to ``hidden`` and ``weight``, in reverse mode, any
        number of times; transforms of ``torch.func`` run the reference. On a GPU, where looking at the targets would
        wait for the device, one outside the columns is not noticed: the result is undefined.

    Raises:
        InvalidInput: an argument has the wrong type, shape, dtype, layout or device, or carries a tangent; on the CPU,
            a target is not among the columns.
    """
    check_tensor("hidden", hidden, differentiable=True)
    if hidden.ndim == 0 or hidden.numel() == 0:
        raise invalid("hidden.shape", tuple(hidden.shape), "has no elements", "pass (…, D) of at least one token")
    check_tensor("weight", weight, None, hidden, differentiable=True)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
        raise invalid("weight.shape", tuple(weight.shape), "does not fit", f"pass shape (V, {hidden.shape[-1]})")
    check_tensor("targets", targets, (tuple(hidden.shape[:-1]),), hidden, dtypes=(torch.int64,))
    start, stop = (0, len(weight)) if columns is None else columns
    if not 0 <= start < stop <= len(weight):
        remedy = f"pass (start, stop) with 0 ≤ start < stop ≤ {len(weight)}"
        raise invalid("columns", columns, "is no range of the weight's rows", remedy)
    mean = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
    flat = hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1)
    return token_log_probs_op(*flat, start, stop, mean)[0].view(targets.shape)
