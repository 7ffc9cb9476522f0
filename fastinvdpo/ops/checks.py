"""The arguments of an op: what no kernel and no derivative is made for is refused, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinvdpo.errors import invalid

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    tensor: Any,
    shapes: tuple[tuple[int, ...], ...] | None = None,
    beside: Tensor | None = None,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    differentiable: bool = False,
) -> None:
    """Raise ``InvalidInput`` unless ``tensor`` is a dense tensor with values that the op can use.

    Args:
        name: what the caller calls it.
        shapes: the shapes that it may have; any when None.
        beside: a tensor whose device it must share.
        dtypes: the dtypes that it may have.
        differentiable: whether the op has a gradient for it; others may require none while gradients are recorded.
    """
    if not isinstance(tensor, Tensor):
        raise invalid(name, tensor, "must be a tensor", f"pass a tensor of shape {_listed(shapes)}")
    if tensor.dtype not in dtypes:
        raise invalid(f"{name}.dtype", tensor.dtype, f"must be {_listed(dtypes)}", "convert it")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise invalid(f"{name}.layout", layout, "is not a dense tensor", f"pass {name}.to_dense(), or padded samples")
    if shapes is not None and tensor.shape not in shapes:
        raise invalid(f"{name}.shape", tuple(tensor.shape), "does not fit", f"pass shape {_listed(shapes)}")
    if tensor.is_meta:
        raise invalid(f"{name}.device", "meta", "holds no values", "load it to a device first")
    if beside is not None and tensor.device != beside.device:
        where = str(beside.device)
        raise invalid(f"{name}.device", str(tensor.device), f"differs from {where}", f"move it with .to({where!r})")
    if forward_ad._current_level >= 0 and _has_tangent(tensor):
        problem = "carries a tangent, and there is no forward-mode derivative"
        raise invalid(name, "a dual tensor", problem, "differentiate in reverse mode, or pass the primal alone")
    if not differentiable and tensor.requires_grad and torch.is_grad_enabled():
        remedy = f"compute it under torch.no_grad() or pass {name}.detach()"
        raise invalid(f"{name}.requires_grad", True, "no gradient flows to it", remedy)


def check_predictions(
    tensors: dict[str, Tensor], paired: bool = True, remedy: str = "stack [winners; losers] as (2B, …)"
) -> None:
    """Raise unless these, under the caller's names, are predictions ``(N, …)`` of one shape, the first with a gradient;
    ``paired``: N = 2B.
    """
    (first, policy), *others = tensors.items()
    check_tensor(first, policy, differentiable=True)
    shape = tuple(policy.shape)
    for name, tensor in others:
        check_tensor(name, tensor, (shape,), policy)
    if len(shape) < 2:
        raise invalid(f"{first}.shape", shape, "must have a batch and at least one more dimension", remedy)
    if paired and (shape[0] == 0 or shape[0] % 2):
        raise invalid(f"{first}.shape", shape, "must hold as many losers as winners", remedy)
    if 0 in shape:
        remedy = "pass predictions of at least one element per sample"
        raise invalid(f"{first}.shape", shape, "has no elements", remedy)


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What an op computes in: float64 when any input is float64, float32 otherwise."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def _has_tangent(tensor: Tensor) -> bool:
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap, ...) is active.

    ``tensors``: gradients, which ``torch.autograd.grad(is_grads_batched=True)`` maps in a way of its own.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch._C._are_functorch_transforms_active() or any(t is not None and batched(t) for t in tensors)


def _listed(allowed: Any) -> str:
    return " or ".join(str(one).removeprefix("torch.") for one in allowed) if allowed else "(n, …)"
