"""``fastinvdpo::pair_statistics``: schema, fake kernels, backends and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.ops import dispatch, native, triton_kernels
from fastinvdpo.ops.checks import arithmetic_dtype, transformed
from fastinvdpo.ops.layout import as_rows, float32, like
from fastinvdpo.ops.pair_statistics import reference as _reference

NAME = "pair_statistics"
_library = torch.library.Library("fastinvdpo", "FRAGMENT")
_library.define(
    "pair_statistics(Tensor policy, Tensor? reference, Tensor target, Tensor? mask, bool paired) "
    "-> (Tensor policy_mse, Tensor cross, Tensor shift_mse, Tensor pair_cross, Tensor mask_mean)"
)
_library.define(
    "pair_statistics_backward(Tensor? grad_policy_mse, Tensor? grad_cross, Tensor? grad_shift_mse, "
    "Tensor? grad_pair_cross, Tensor policy, Tensor? reference, Tensor target, Tensor? mask) -> Tensor"
)

_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_SHORTEST_MASK = 1024  # elements of a mask for all channels that is worth reading once for each of them


def _rows(
    policy: Tensor, reference: Tensor | None, target: Tensor, mask: Tensor | None, paired: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """What fused kernels take: predictions of one dense layout, and float32 masks of samples and of pairs, dense rows
    in the order of a sample's elements. A mask's row divides a sample, and holds for each part of it.
    """
    tensors = as_rows([policy, target] if reference is None else [policy, target, reference], 1)
    policy, target = tensors[:2]
    if mask is not None:
        whole = (len(mask), *policy.shape[1:])
        planes = (len(mask), 1, *policy.shape[2:])
        mask = mask.float()
        of_channels = mask.shape == planes and planes != whole and policy.is_contiguous()
        if of_channels and mask.numel() >= _SHORTEST_MASK * len(mask):
            mask = mask.contiguous()
        else:
            mask = torch.empty_like(policy[: len(mask)], dtype=torch.float32).copy_(mask.expand(whole))
    pair_mask = _reference.pair_mask(mask, len(policy)) if paired else None
    return policy, tensors[2] if reference is not None else None, target, mask, pair_mask


def _backward_fused(launch: Callable[..., Tensor], *arguments: Any) -> Tensor:
    *grads, policy, reference, target, mask = arguments
    if grads[1] is None and grads[2] is None:
        reference = None
    rows = _rows(policy, reference, target, mask, grads[3] is not None)
    gradient = launch(*map(float32, grads), *rows)
    return gradient if rows[0] is policy else like(gradient, policy)


# PyTorch's dispatcher separates the native kernels for the CPU from those for CUDA.
_FORWARD: dict[str, Callable[..., _Five]] = {
    "reference": _reference.forward,
    **dict.fromkeys(("native", "cuda"), lambda *given: native.op(NAME)(*_rows(*given), given[-1])),
    "triton": lambda *given: triton_kernels.load(NAME).forward(*_rows(*given), given[-1]),
}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "reference": _reference.backward,
    **dict.fromkeys(("native", "cuda"), lambda *given: _backward_fused(native.op(f"{NAME}_backward"), *given)),
    "triton": lambda *given: _backward_fused(triton_kernels.load(NAME).backward, *given),
}


def _backend(policy: Tensor, reference: Tensor | None, target: Tensor) -> str:
    float64 = arithmetic_dtype(policy, reference, target) is torch.float64
    return dispatch.choose(NAME, dispatch.device_type(policy), float64)


@torch.library.impl(_library, NAME, "CompositeExplicitAutograd")
def _forward(policy: Tensor, reference: Tensor | None, target: Tensor, *settings: Any) -> _Five:
    return _FORWARD[_backend(policy, reference, target)](policy, reference, target, *settings)


@torch.library.impl(_library, f"{NAME}_backward", "CompositeExplicitAutograd")
def _backward(*arguments: Any) -> Tensor:
    return _BACKWARD[_backend(*arguments[4:7])](*arguments)


@torch.library.register_fake(f"fastinvdpo::{NAME}", lib=_library)
def _forward_fake(policy: Tensor, reference: Tensor | None, target: Tensor, mask: Tensor | None, paired: bool) -> _Five:
    dtype, samples = arithmetic_dtype(policy, reference, target), policy.shape[0]
    shifts = 0 if reference is None else samples
    sizes = (samples, shifts, shifts, samples // 2 if paired else 0, 0 if mask is None else samples)
    policy_mse, cross, shift_mse, pair_cross, mask_mean = (policy.new_empty(size, dtype=dtype) for size in sizes)
    return policy_mse, cross, shift_mse, pair_cross, mask_mean


@torch.library.register_fake(f"fastinvdpo::{NAME}_backward", lib=_library)
def _backward_fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Five) -> None:
    policy, reference, target, mask, paired = inputs
    ctx.set_materialize_grads(False)
    undefined = [output[1], output[2]] if reference is None else []
    ctx.mark_non_differentiable(*undefined, *([] if paired else [output[3]]), output[4])
    ctx.save_for_backward(policy, reference, target, mask)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = None
    if ctx.needs_input_grad[0] and any(grad is not None for grad in grads[:4]):
        plain = torch.is_grad_enabled() or transformed(*grads)  # PyTorch's own can be differentiated again, and mapped
        backward: Callable[..., Tensor] = (
            _reference.backward if plain else torch.ops.fastinvdpo.pair_statistics_backward.default
        )
        gradient = backward(*grads[:4], *ctx.saved_tensors)
    return gradient, None, None, None, None


torch.library.register_autograd(f"fastinvdpo::{NAME}", _autograd, setup_context=_setup_context, lib=_library)

_op = torch.ops.fastinvdpo.pair_statistics.default


def pair_statistics_op(*inputs: Any) -> _Five:
    """``torch.ops.fastinvdpo.pair_statistics``; the reference under transforms of ``torch.func``, which know no op."""
    results: _Five = (_reference.forward if transformed() else _op)(*inputs)
    return results
