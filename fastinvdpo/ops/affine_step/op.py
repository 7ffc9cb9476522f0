"""``fastinvdpo::affine_step``: schema, fake kernels, backends and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastinvdpo import _backend, _triton_kernels
from fastinvdpo.ops.affine_step import reference as _reference
from fastinvdpo.ops.layout import as_rows, like

NAME = "affine_step"
_library = torch.library.Library("fastinvdpo", "FRAGMENT")
_library.define(
    "affine_step(Tensor sample, Tensor[] outputs, Tensor coefficients, Tensor? active, Tensor? noise_scale, "
    "Tensor? noise_index, int seed, int offset) -> Tensor"
)
_library.define("affine_step_backward(Tensor grad, Tensor coefficients, Tensor? active) -> Tensor[]")


def _fused(
    kernel: Callable[..., Tensor],
    sample: Tensor,
    outputs: list[Tensor],
    coefficients: Tensor,
    active: Tensor | None,
    noise_scale: Tensor | None,
    noise_index: Tensor | None,
    seed: int,
    offset: int,
) -> Tensor:
    """Hand a fused kernel what it takes: dense rows (contiguous ones with noise, which is drawn in order), float32."""
    tensors = as_rows([sample, *outputs], 1)
    if noise_scale is not None:
        tensors = [tensor.contiguous() for tensor in tensors]
        noise_scale = noise_scale.float().contiguous()
        noise_index = None if noise_index is None else noise_index.contiguous()
    active = None if active is None else active.contiguous()
    table = coefficients.float().contiguous()
    result = kernel(tensors[0], tensors[1:], table, active, noise_scale, noise_index, seed, offset)
    return result if tensors[0] is sample else like(result, sample)


def _native(sample: Tensor, *arguments: Any) -> Tensor:
    return _fused(torch.ops.fastinvdpo_native.affine_step, sample, *arguments)


def _triton(sample: Tensor, *arguments: Any) -> Tensor:
    return _fused(_triton_kernels.load(NAME).forward, sample, *arguments)


# PyTorch's dispatcher tells the native kernels for the CPU from those for CUDA.
_FORWARD: dict[str, Callable[..., Tensor]] = {
    "reference": _reference.forward,
    "native": _native,
    "cuda": _native,
    "triton": _triton,
}


@torch.library.impl(_library, "affine_step", "CompositeExplicitAutograd")
def _forward(sample: Tensor, outputs: list[Tensor], *arguments: Any) -> Tensor:
    float64 = _reference.arithmetic_dtype(sample, *outputs) == torch.float64
    return _FORWARD[_backend.choose(NAME, sample.device.type, float64)](sample, outputs, *arguments)


@torch.library.impl(_library, "affine_step_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, coefficients: Tensor, active: Tensor | None) -> list[Tensor]:
    # No fused kernel: inversions are not differentiated, and guided predictions pass here once per training step.
    return _reference.backward(grad, coefficients, active)


@torch.library.register_fake("fastinvdpo::affine_step", lib=_library)
def _forward_fake(sample: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(sample)


@torch.library.register_fake("fastinvdpo::affine_step_backward", lib=_library)
def _backward_fake(grad: Tensor, coefficients: Tensor, active: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(grad) for _ in range(coefficients.shape[1])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, outputs, coefficients, active, *_ = inputs
    ctx.output_dtypes = [tensor.dtype for tensor in outputs]
    ctx.save_for_backward(coefficients, active)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # With create_graph=True they may be differentiated again: the reference's can be, as plain PyTorch.
    backward = _reference.backward if torch.is_grad_enabled() else torch.ops.fastinvdpo.affine_step_backward
    grad_sample, *grad_outputs = backward(grad, *ctx.saved_tensors)
    grad_outputs = [gradient.to(dtype) for gradient, dtype in zip(grad_outputs, ctx.output_dtypes, strict=True)]
    return grad_sample, grad_outputs, None, None, None, None, None, None


torch.library.register_autograd("fastinvdpo::affine_step", _autograd, setup_context=_setup_context, lib=_library)

affine_step_op = torch.ops.fastinvdpo.affine_step
