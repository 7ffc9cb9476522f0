"""``fastinvdpo::preference_loss``: schema, fake kernels, backends and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.ops import dispatch, native, triton_kernels
from fastinvdpo.ops.layout import as_rows, like
from fastinvdpo.ops.preference_loss import reference as _reference
from fastinvdpo.ops.preference_loss.utilities import UTILITIES

NAME = "preference_loss"
_library = torch.library.Library("fastinvdpo", "FRAGMENT")
_library.define(
    "preference_loss(Tensor policy, Tensor reference, Tensor? target, Tensor? pair_weight, Tensor? timestep_weight, "
    "float beta, str utility, float label_smoothing) "
    "-> (Tensor loss, Tensor margin, Tensor policy_mse, Tensor reference_mse)"
)
_library.define(
    "preference_loss_backward(Tensor? grad_loss, Tensor? grad_margin, Tensor? grad_policy_mse, Tensor policy, "
    "Tensor target, Tensor margin, Tensor? pair_weight, Tensor? timestep_weight, float beta, str utility, "
    "float label_smoothing) -> Tensor"
)

# Fused kernels know a utility by its place in the table.
_UTILITY_CODES = {name: code for code, name in enumerate(UTILITIES)}


def _native_forward(
    policy: Tensor,
    reference: Tensor,
    target: Tensor | None,
    pair_weight: Tensor | None,
    timestep_weight: Tensor | None,
    beta: float,
    utility: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    predictions = [policy, reference] if target is None else [policy, reference, target]
    policy, reference, *targets = as_rows(predictions, 1 if timestep_weight is None else 2)
    return native.op("preference_loss")(
        policy,
        reference,
        targets[0] if targets else None,
        _float32(pair_weight),
        _float32_rows(timestep_weight),
        beta,
        _UTILITY_CODES[utility],
        label_smoothing,
    )


def _native_backward(
    grad_loss: Tensor | None,
    grad_margin: Tensor | None,
    grad_policy_mse: Tensor | None,
    policy: Tensor,
    target: Tensor,
    margin: Tensor,
    pair_weight: Tensor | None,
    timestep_weight: Tensor | None,
    *settings: Any,
) -> Tensor:
    beta, utility, label_smoothing = settings
    rows = as_rows([policy, target], 1 if timestep_weight is None else 2)
    gradient = native.op("preference_loss_backward")(
        _float32(grad_loss),
        _float32(grad_margin),
        _float32(grad_policy_mse),
        *rows,
        _float32(margin),
        _float32(pair_weight),
        _float32_rows(timestep_weight),
        beta,
        _UTILITY_CODES[utility],
        label_smoothing,
    )
    return gradient if rows[0] is policy else like(gradient, policy)


def _triton_forward(
    policy: Tensor,
    reference: Tensor,
    target: Tensor | None,
    pair_weight: Tensor | None,
    timestep_weight: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    predictions = [policy, reference] if target is None else [policy, reference, target]
    policy, reference, *targets = as_rows(predictions, 1 if timestep_weight is None else 2)
    tables = (_float32(pair_weight), _float32_rows(timestep_weight))
    return triton_kernels.load(NAME).forward(policy, reference, targets[0] if targets else None, *tables, *settings)


def _triton_backward(
    grad_loss: Tensor | None,
    grad_margin: Tensor | None,
    grad_policy_mse: Tensor | None,
    policy: Tensor,
    target: Tensor,
    margin: Tensor,
    pair_weight: Tensor | None,
    timestep_weight: Tensor | None,
    *settings: Any,
) -> Tensor:
    rows = as_rows([policy, target], 1 if timestep_weight is None else 2)
    gradient = triton_kernels.load(NAME).backward(
        *(_float32(grad) for grad in (grad_loss, grad_margin, grad_policy_mse)),
        *rows,
        _float32(margin),
        _float32(pair_weight),
        _float32_rows(timestep_weight),
        *settings,
    )
    return gradient if rows[0] is policy else like(gradient, policy)


def _float32(table: Tensor | None) -> Tensor | None:
    if table is None or (table.dtype is torch.float32 and table.is_contiguous()):
        return table
    return table.float().contiguous()


def _float32_rows(table: Tensor | None) -> Tensor | None:
    """``(B, K)`` with dense rows, which may lie apart, or be one row: weights ``(K,)``, expanded, need no copy."""
    if table is not None and table.dtype is torch.float32 and (table.stride(1) == 1 or table.shape[1] == 1):
        return table
    return _float32(table)


# PyTorch's dispatcher tells the native kernels for the CPU from those for CUDA.
_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "reference": _reference.forward,
    "native": _native_forward,
    "cuda": _native_forward,
    "triton": _triton_forward,
}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "reference": _reference.backward,
    "native": _native_backward,
    "cuda": _native_backward,
    "triton": _triton_backward,
}


@torch.library.impl(_library, "preference_loss", "CompositeExplicitAutograd")
def _forward(
    policy: Tensor, reference: Tensor, target: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    float64 = _reference.accumulation_dtype(policy, reference, target) is torch.float64
    kernel = _FORWARD[dispatch.choose(NAME, dispatch.device_type(policy), float64)]
    return kernel(policy, reference, target, *arguments)


@torch.library.impl(_library, "preference_loss_backward", "CompositeExplicitAutograd")
def _backward(
    grad_loss: Tensor | None,
    grad_margin: Tensor | None,
    grad_policy_mse: Tensor | None,
    policy: Tensor,
    target: Tensor,
    margin: Tensor,
    *arguments: Any,
) -> Tensor:
    kernel = _BACKWARD[dispatch.choose(NAME, dispatch.device_type(policy), margin.dtype is torch.float64)]
    return kernel(grad_loss, grad_margin, grad_policy_mse, policy, target, margin, *arguments)


@torch.library.register_fake("fastinvdpo::preference_loss", lib=_library)
def _forward_fake(
    policy: Tensor,
    reference: Tensor,
    target: Tensor | None,
    pair_weight: Tensor | None,
    timestep_weight: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _reference.accumulation_dtype(policy, reference, target)
    errors = policy.shape[: 1 if timestep_weight is None else 2]
    shapes = ((), (policy.shape[0] // 2,), errors, errors)
    loss, margin, policy_mse, reference_mse = (policy.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, margin, policy_mse, reference_mse


@torch.library.register_fake("fastinvdpo::preference_loss_backward", lib=_library)
def _backward_fake(
    grad_loss: Tensor | None,
    grad_margin: Tensor | None,
    grad_policy_mse: Tensor | None,
    policy: Tensor,
    *arguments: Any,
) -> Tensor:
    return torch.empty_like(policy)


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
        if torch.is_grad_enabled():
            backward = _reference.backward  # create_graph=True: plain PyTorch can be differentiated again
        elif _unobserved(*tensors):
            backward = _backward
        gradient = backward(*tensors, *ctx.settings)
    return gradient, None, None, None, None, None, None, None


torch.library.register_autograd("fastinvdpo::preference_loss", _autograd, setup_context=_setup_context, lib=_library)

_op = torch.ops.fastinvdpo.preference_loss.default
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def _unobserved(*tensors: Tensor | None) -> bool:
    """Whether nothing watches or changes what ops do: no compiler, mode, transform or tensor of another class."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


class _Direct(torch.autograd.Function):
    """The formula of ``register_autograd`` around the same kernels, without the ways through the dispatcher: with few
    pairs they take longer than the kernels.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


_apply = super(torch.autograd.Function, _Direct).apply  # Function's own prepares for transforms, and none is active


def preference_loss_op(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.fastinvdpo.preference_loss``."""
    if _unobserved(*inputs[:5]):
        return _apply(*inputs) if inputs[0].requires_grad and torch.is_grad_enabled() else _forward(*inputs)
    return _op(*inputs)
