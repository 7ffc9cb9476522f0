"""``fastinvdpo::token_log_probs``: schema, fake kernels, backends and autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops import dispatch, native, triton_kernels
from fastinvdpo.ops.checks import arithmetic_dtype, transformed
from fastinvdpo.ops.layout import float32
from fastinvdpo.ops.token_log_probs import reference as _reference

NAME = "token_log_probs"
_library = torch.library.Library("fastinvdpo", "FRAGMENT")
_library.define(
    "token_log_probs(Tensor hidden, Tensor weight, Tensor targets, int start, int stop, bool mean) "
    "-> (Tensor log_probs, Tensor log_sum, Tensor means)"
)
_library.define(
    "token_log_probs_backward(Tensor of_target, Tensor of_sum, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor log_sum, int start, int stop, bool of_hidden, bool of_weight) -> (Tensor to_hidden, Tensor to_weight)"
)

Results = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor]


def _forward_fused(launch: Callable[..., Results], hidden: Tensor, weight: Tensor, *rest: Any) -> Results:
    """Pass a fused kernel what it takes: dense rows."""
    return launch(hidden.contiguous(), weight.contiguous(), *rest)


def _backward_fused(
    launch: Callable[..., Gradients], of_target: Tensor, of_sum: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> Gradients:
    tensors = (float32(of_target), float32(of_sum), hidden.contiguous(), weight.contiguous())
    to_hidden, to_weight = launch(*tensors, *rest)
    return to_hidden.to(hidden.dtype), to_weight


def _native(name: str, *arguments: Any) -> Any:
    """An op of the extension, whose products are of float32 rows."""
    at = len(arguments) - (6 if name == NAME else 8)
    return native.op(name)(*arguments[:at], float32(arguments[at]), *arguments[at + 1 :])


_FORWARD: dict[str, Callable[..., Results]] = {
    "reference": _reference.forward,
    "native": partial(_forward_fused, partial(_native, NAME)),
    "triton": lambda *given: _forward_fused(triton_kernels.load(NAME).forward, *given),
}
_BACKWARD: dict[str, Callable[..., Gradients]] = {
    "reference": _reference.backward,
    "native": partial(_backward_fused, partial(_native, f"{NAME}_backward")),
    "triton": lambda *given: _backward_fused(triton_kernels.load(NAME).backward, *given),
}


def _backend(hidden: Tensor, weight: Tensor) -> str:
    return dispatch.choose(NAME, dispatch.device_type(hidden), arithmetic_dtype(hidden, weight) is torch.float64)


@torch.library.impl(_library, NAME, "CompositeExplicitAutograd")
def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, start: int, stop: int, mean: bool) -> Results:
    if hidden.is_cpu:  # elsewhere it would wait for the device
        least, largest = map(int, targets.aminmax())
        if least < start or largest >= stop:
            problem = f"are not all of the columns {start} … {stop - 1}"
            raise invalid("targets", (least, largest), problem, "leave those tokens out, or widen the range of columns")
    return _FORWARD[_backend(hidden, weight)](hidden, weight, targets.contiguous(), start, stop, mean)


@torch.library.impl(_library, f"{NAME}_backward", "CompositeExplicitAutograd")
def _backward(*arguments: Any) -> Gradients:
    return _BACKWARD[_backend(*arguments[2:4])](*arguments)


@torch.library.register_fake(f"fastinvdpo::{NAME}", lib=_library)
def _forward_fake(hidden: Tensor, weight: Tensor, targets: Tensor, start: int, stop: int, mean: bool) -> Results:
    shapes = [(len(hidden),), (len(hidden),), tuple(hidden.shape) if mean else (0, 0)]
    dtype = arithmetic_dtype(hidden, weight)
    log_probs, log_sum, means = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return log_probs, log_sum, means


@torch.library.register_fake(f"fastinvdpo::{NAME}_backward", lib=_library)
def _backward_fake(*arguments: Any) -> Gradients:
    hidden, weight = arguments[2:4]
    of_hidden, of_weight = arguments[-2:]
    return (
        hidden.new_empty(hidden.shape if of_hidden else (0, 0)),
        weight.new_empty(weight.shape if of_weight else (0, 0)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    hidden, weight, targets, *ctx.columns, ctx.mean = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _autograd(ctx: Any, of_log_prob: Tensor | None, of_log_sum: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    to_hidden = to_weight = None
    of_hidden, of_weight = ctx.needs_input_grad[:2]
    hidden, weight, targets, log_sum, means = ctx.saved_tensors
    if (of_hidden or of_weight) and not (of_log_prob is None and of_log_sum is None):
        of_target = torch.zeros_like(log_sum) if of_log_prob is None else of_log_prob
        of_sum = -of_target if of_log_sum is None else of_log_sum - of_target
        plain = torch.is_grad_enabled() or transformed(of_target, of_sum)  # can be differentiated again, and mapped
        if ctx.mean and not (plain or of_weight):
            to_hidden = means * of_sum.unsqueeze(1)
            chosen = weight.index_select(0, targets).to(means.dtype)
            to_hidden = to_hidden.addcmul_(chosen, of_target.unsqueeze(1)).to(hidden.dtype)
        else:
            backward: Callable[..., Gradients] = (
                _reference.backward if plain else torch.ops.fastinvdpo.token_log_probs_backward.default
            )
            tensors = (of_target, of_sum, hidden, weight, targets, log_sum)
            to_hidden, to_weight = backward(*tensors, *ctx.columns, of_hidden, of_weight)
    return to_hidden if of_hidden else None, to_weight if of_weight else None, None, None, None, None


torch.library.register_autograd(f"fastinvdpo::{NAME}", _autograd, setup_context=_setup_context, lib=_library)

_op = torch.ops.fastinvdpo.token_log_probs.default


def token_log_probs_op(*inputs: Any) -> Results:
    """``torch.ops.fastinvdpo.token_log_probs``; the reference under transforms of ``torch.func``, which know no op."""
    results: Results = (_reference.forward if transformed() else _op)(*inputs)
    return results
