"""``fastinvdpo::affine_step``: schema, fake kernels, backends and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastinvdpo import _backend
from fastinvdpo.ops.affine_step import reference as _reference

NAME = "affine_step"
_library = torch.library.Library("fastinvdpo", "FRAGMENT")
_library.define(
    "affine_step(Tensor sample, Tensor[] outputs, Tensor coefficients, Tensor? active, Tensor? noise_scale, "
    "Tensor? noise_index, int seed, int offset) -> Tensor"
)
_library.define("affine_step_backward(Tensor grad, Tensor coefficients, Tensor? active) -> Tensor[]")

_FORWARD = {"reference": _reference.forward}
_BACKWARD = {"reference": _reference.backward}


@torch.library.impl(_library, "affine_step", "CompositeExplicitAutograd")
def _forward(sample: Tensor, *arguments: Any) -> Tensor:
    return _FORWARD[_backend.choose(NAME, sample.device.type)](sample, *arguments)


@torch.library.impl(_library, "affine_step_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, coefficients: Tensor, active: Tensor | None) -> list[Tensor]:
    return _BACKWARD[_backend.choose(NAME, grad.device.type)](grad, coefficients, active)


@torch.library.register_fake("fastinvdpo::affine_step", lib=_library)
def _forward_fake(sample: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(sample, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastinvdpo::affine_step_backward", lib=_library)
def _backward_fake(grad: Tensor, coefficients: Tensor, active: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(coefficients.shape[1])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, outputs, coefficients, active, *_ = inputs
    ctx.output_dtypes = [tensor.dtype for tensor in outputs]
    ctx.save_for_backward(coefficients, active)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_sample, *grad_outputs = torch.ops.fastinvdpo.affine_step_backward(grad, *ctx.saved_tensors)
    grad_outputs = [gradient.to(dtype) for gradient, dtype in zip(grad_outputs, ctx.output_dtypes, strict=True)]
    return grad_sample, grad_outputs, None, None, None, None, None, None


torch.library.register_autograd("fastinvdpo::affine_step", _autograd, setup_context=_setup_context, lib=_library)

affine_step_op = torch.ops.fastinvdpo.affine_step
