"""``fastinvdpo::preference_loss``: schema, fake kernels, backends and autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.ops import dispatch, native, triton_kernels
from fastinvdpo.ops.checks import arithmetic_dtype, transformed
from fastinvdpo.ops.layout import as_rows, float32, like
from fastinvdpo.ops.preference_loss import reference as _reference
from fastinvdpo.ops.preference_loss.utilities import UTILITIES

NAME = "preference_loss"
Results = tuple[Tensor, Tensor, Tensor, Tensor]
_library = torch.library.Library("fastinvdpo", "FRAGMENT")
_SETTINGS = "Tensor? pair_weight, Tensor? timestep_weight, float beta, str utility, float label_smoothing"
_library.define(
    f"preference_loss(Tensor policy, Tensor reference, Tensor? target, {_SETTINGS}) "
    "-> (Tensor loss, Tensor margin, Tensor policy_mse, Tensor reference_mse)"
)
_library.define(
    "preference_loss_backward(Tensor? grad_loss, Tensor? grad_margin, Tensor? grad_policy_mse, Tensor policy, "
    f"Tensor target, Tensor margin, {_SETTINGS}) -> Tensor"
)

_UTILITY_CODES = {name: code for code, name in enumerate(UTILITIES)}


def _fused_forward(launch: Callable[..., Results], *arguments: Any) -> Results:
    """Pass a fused kernel what it takes: predictions in one layout with dense rows, float32 tables."""
    *predictions, pair_weight, timestep_weight, beta, utility, label_smoothing = arguments
    rows = as_rows([tensor for tensor in predictions if tensor is not None], 1 if timestep_weight is None else 2)
    tables = float32(pair_weight), _float32_rows(timestep_weight)
    return launch(*rows, *[None] * (3 - len(rows)), *tables, beta, utility, label_smoothing)


def _fused_backward(launch: Callable[..., Tensor], *arguments: Any) -> Tensor:
    *grads, policy, target, margin, pair_weight, timestep_weight, beta, utility, label_smoothing = arguments
    rows = as_rows([policy, target], 1 if timestep_weight is None else 2)
    tables = float32(margin), float32(pair_weight), _float32_rows(timestep_weight)
    gradient = launch(*map(float32, grads), *rows, *tables, beta, utility, label_smoothing)
    return gradient if rows[0] is policy else like(gradient, policy)


def _native(name: str, *arguments: Any) -> Any:
    """An op of the extension, which knows a utility by its place in the table."""
    *tensors, beta, utility, label_smoothing = arguments
    return native.op(name)(*tensors, beta, _UTILITY_CODES[utility], label_smoothing)


def _float32_rows(table: Tensor | None) -> Tensor | None:
    """``(B, K)`` with dense rows, which may lie apart, or be one row: weights ``(K,)``, expanded, need no copy."""
    if table is not None and table.dtype is torch.float32 and (table.stride(1) == 1 or table.shape[1] == 1):
        return table
    return float32(table)


# PyTorch's dispatcher separates the native kernels for the CPU from those for CUDA.
_FORWARD: dict[str, Callable[..., Results]] = {
    "reference": _reference.forward,
    **dict.fromkeys(("native", "cuda"), partial(_fused_forward, partial(_native, "preference_loss"))),
    "triton": lambda *arguments: _fused_forward(triton_kernels.load(NAME).forward, *arguments),
}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "reference": _reference.backward,
    **dict.fromkeys(("native", "cuda"), partial(_fused_backward, partial(_native, "preference_loss_backward"))),
    "triton": lambda *arguments: _fused_backward(triton_kernels.load(NAME).backward, *arguments),
}


@torch.library.impl(_library, "preference_loss", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> Results:
    float64 = arithmetic_dtype(*arguments[:3]) is torch.float64
    return _FORWARD[dispatch.choose(NAME, dispatch.device_type(arguments[0]), float64)](*arguments)


@torch.library.impl(_library, "preference_loss_backward", "CompositeExplicitAutograd")
def _backward(*arguments: Any) -> Tensor:
    policy, _, margin = arguments[3:6]
    backend = dispatch.choose(NAME, dispatch.device_type(policy), margin.dtype is torch.float64)
    return _BACKWARD[backend](*arguments)


@torch.library.register_fake("fastinvdpo::preference_loss", lib=_library)
def _forward_fake(*arguments: Any) -> Results:
    policy, timestep_weight = arguments[0], arguments[4]
    dtype = arithmetic_dtype(*arguments[:3])
    errors = policy.shape[: 1 if timestep_weight is None else 2]
    shapes = ((), (policy.shape[0] // 2,), errors, errors)
    loss, margin, policy_mse, reference_mse = (policy.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, margin, policy_mse, reference_mse


@torch.library.register_fake("fastinvdpo::preference_loss_backward", lib=_library)
def _backward_fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, reference, target, pair_weight, timestep_weight, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(policy, reference if target is None else target, output[1], pair_weight, timestep_weight)


def _autograd(
    ctx: Any, grad_loss: Tensor | None, grad_margin: Tensor | None, grad_policy_mse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradient = None
    if ctx.needs_input_grad[0] and not (grad_loss is None and grad_margin is None and grad_policy_mse is None):
        tensors = (grad_loss, grad_margin, grad_policy_mse, *ctx.saved_tensors)
        backward: Callable[..., Tensor] = torch.ops.fastinvdpo.preference_loss_backward.default
        if torch.is_grad_enabled() or transformed(*tensors[:3]):
            backward = _reference.backward  # plain PyTorch can be differentiated again, and mapped
        elif _unobserved(*tensors):
            backward = _backward
        gradient = backward(*tensors, *ctx.settings)
    return gradient, None, None, None, None, None, None, None


torch.library.register_autograd("fastinvdpo::preference_loss", _autograd, setup_context=_setup_context, lib=_library)

_op = torch.ops.fastinvdpo.preference_loss.default
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def _unobserved(*tensors: Tensor | None) -> bool:
    """Whether nothing watches or changes what ops do: no compiler, mode or tensor of another class."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


class _Direct(torch.autograd.Function):
    """``register_autograd``'s formula, without the dispatcher, which takes longer than the kernels of a few pairs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Results:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


_apply = super(torch.autograd.Function, _Direct).apply  # Function's own prepares for transforms, and none is active


def preference_loss_op(*inputs: Any) -> Results:
    """``torch.ops.fastinvdpo.preference_loss``; the reference under transforms of ``torch.func``, which know no op."""
    if transformed():
        return _reference.forward(*inputs)
    if _unobserved(*inputs[:5]):
        return _apply(*inputs) if inputs[0].requires_grad and torch.is_grad_enabled() else _forward(*inputs)
    return _op(*inputs)
