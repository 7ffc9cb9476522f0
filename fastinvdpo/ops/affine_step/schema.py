"""``fastinvdpo::affine_step``: schemas, fake kernels, backends and autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops import dispatch, native, triton_kernels
from fastinvdpo.ops.affine_step import reference as _reference
from fastinvdpo.ops.checks import arithmetic_dtype, transformed
from fastinvdpo.ops.layout import fits, float32, is_constant, like, overlap, overlaps_itself, sample_order, sample_rows

NAME = "affine_step"
_STORED = (torch.float32, torch.bfloat16, torch.float16)  # what fused kernels write
_library = torch.library.Library("fastinvdpo", "FRAGMENT")
_ARGUMENTS = (
    "Tensor sample, Tensor[] outputs, Tensor coefficients, Tensor? active, Tensor? noise_scale, Tensor? noise_index, "
    "int seed, int offset"
)
_library.define(f"affine_step({_ARGUMENTS}) -> Tensor")
_library.define(f"affine_step_out({_ARGUMENTS}, Tensor(a!) out, Tensor(b!)? trajectory) -> ()")
# The gradients of some inputs: ``columns`` are theirs in the table, ``dtypes`` the names of their dtypes, since opcheck
# knows no lists of dtypes themselves.
_library.define(
    "affine_step_backward(Tensor grad, Tensor coefficients, Tensor? active, int[] columns, str[] dtypes) -> Tensor[]"
)


def _forward_fused(launch: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Pass a fused kernel what it takes: dense samples (contiguous ones with noise, which is drawn in order), float32
    tables. ``launch`` takes the arguments of ``affine_step_out``, and returns what it wrote.
    """
    sample, outputs, coefficients, active, noise_scale, noise_index, seed, offset, out, trajectory = arguments
    first, *others = sample_rows([sample, *outputs], contiguous=noise_scale is not None)
    active, noise_index = (None if table is None else table.contiguous() for table in (active, noise_index))
    settings = (float32(coefficients), active, float32(noise_scale), noise_index, seed, offset)
    if out is None:
        result = launch(first, others, *settings, None, None)
        return result if first is sample else like(result, sample)
    written = out if fits(out, first) else torch.empty_like(first)
    stored = trajectory
    if trajectory is not None and not (trajectory.dtype in _STORED and fits(trajectory, first)):
        stored = torch.empty_like(first, dtype=trajectory.dtype if trajectory.dtype in _STORED else torch.float32)
    launch(first, others, *settings, written, stored)
    if stored is not trajectory:
        trajectory.copy_(stored)
    return out if written is out else out.copy_(written)


def _backward_fused(
    launch: Callable[..., None],
    grad: Tensor,
    coefficients: Tensor,
    active: Tensor | None,
    columns: list[int],
    dtypes: list[torch.dtype],
) -> list[Tensor]:
    """Pass a fused kernel the gradient in the layout of those it writes, or one number for each sample."""
    gradients = written = [torch.empty_like(grad, dtype=dtype) for dtype in dtypes]
    if not gradients or grad.numel() == 0:
        return gradients
    if not fits(gradients[0], gradients[0]):
        written = [torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format) for dtype in dtypes]
    if is_constant(grad):
        grad = grad.flatten(1)[:, 0] if grad.ndim > 1 else grad
    elif not grad.is_contiguous() and sample_order(grad) != sample_order(written[0]):
        grad = torch.empty_like(written[0], dtype=grad.dtype).copy_(grad)
    launch(grad, float32(coefficients), None if active is None else active.contiguous(), columns, written)
    return (
        gradients if written is gradients else [made.copy_(new) for made, new in zip(gradients, written, strict=True)]
    )


def _native_forward(*prepared: Any) -> Tensor:
    *functional, out, _ = prepared
    if out is None:
        result: Tensor = native.op("affine_step")(*functional)
        return result
    native.op("affine_step_out")(*prepared)
    return out


def _native_backward(*prepared: Any) -> None:
    native.op("affine_step_backward")(*prepared)


# PyTorch's dispatcher separates the native kernels for the CPU from those for CUDA.
_FORWARD: dict[str, Callable[..., Tensor]] = {
    "reference": _reference.forward,
    **dict.fromkeys(("native", "cuda"), partial(_forward_fused, _native_forward)),
    "triton": lambda *arguments: _forward_fused(triton_kernels.load(NAME).forward, *arguments),
}
"""They take the arguments of ``affine_step_out`` and return ``out``, or a new tensor without one."""
_BACKWARD: dict[str, Callable[..., list[Tensor]]] = {
    "reference": _reference.backward,
    **dict.fromkeys(("native", "cuda"), partial(_backward_fused, _native_backward)),
    "triton": lambda *arguments: _backward_fused(triton_kernels.load(NAME).backward, *arguments),
}


def _step(sample: Tensor, outputs: list[Tensor], *arguments: Any) -> Tensor:
    float64 = arithmetic_dtype(sample, *outputs) == torch.float64
    backend = dispatch.choose(NAME, dispatch.device_type(sample), float64)
    return _FORWARD[backend](sample, outputs, *arguments)


@torch.library.impl(_library, "affine_step", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> Tensor:
    return _step(*arguments, None, None)


@torch.library.impl(_library, "affine_step_out", "CompositeExplicitAutograd")
def _forward_out(*arguments: Any) -> None:
    sample, outputs, *_, out, trajectory = arguments
    _check_memory(sample, outputs, out, trajectory)  # here, where tensors have memory, which a compiler's have not
    _step(*arguments)
    torch.autograd.graph.increment_version([out] if trajectory is None else [out, trajectory])


@torch.library.impl(_library, "affine_step_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, coefficients: Tensor, active: Tensor | None, columns: list[int], dtypes: list[str]
) -> list[Tensor]:
    wanted = [getattr(torch, name) for name in dtypes]
    backend = dispatch.choose(NAME, dispatch.device_type(grad), torch.float64 in (grad.dtype, *wanted))
    return _BACKWARD[backend](grad, coefficients, active, columns, wanted)


def _by_reference(
    grad: Tensor, coefficients: Tensor, active: Tensor | None, columns: list[int], dtypes: list[str]
) -> list[Tensor]:
    return _reference.backward(grad, coefficients, active, columns, [getattr(torch, name) for name in dtypes])


@torch.library.register_fake("fastinvdpo::affine_step", lib=_library)
def _forward_fake(sample: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(sample)


@torch.library.register_fake("fastinvdpo::affine_step_out", lib=_library)
def _forward_out_fake(*arguments: Any) -> None:
    return None


@torch.library.register_fake("fastinvdpo::affine_step_backward", lib=_library)
def _backward_fake(
    grad: Tensor, coefficients: Tensor, active: Tensor | None, columns: list[int], dtypes: list[str]
) -> list[Tensor]:
    return [torch.empty_like(grad, dtype=getattr(torch, name)) for name in dtypes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sample, outputs, coefficients, active, *_ = inputs
    ctx.dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (sample, *outputs)]
    ctx.save_for_backward(coefficients, active)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    sample, outputs, *_ = ctx.needs_input_grad
    needed = [sample, *outputs]
    columns = [column for column, need in enumerate(needed) if need]
    dtypes = [ctx.dtypes[column] for column in columns]
    # Plain PyTorch can be differentiated again, and mapped.
    by_reference = torch.is_grad_enabled() or transformed(grad)
    backward = _by_reference if by_reference else torch.ops.fastinvdpo.affine_step_backward
    coefficients, active = ctx.saved_tensors
    made = iter(backward(grad, coefficients, active, columns, dtypes))
    grad_sample, *grad_outputs = (next(made) if need else None for need in needed)
    return grad_sample, grad_outputs, None, None, None, None, None, None


torch.library.register_autograd("fastinvdpo::affine_step", _autograd, setup_context=_setup_context, lib=_library)

affine_step_out_op = torch.ops.fastinvdpo.affine_step_out


def affine_step_op(*arguments: Any) -> Tensor:
    """``torch.ops.fastinvdpo.affine_step``; the reference under transforms of ``torch.func``, which know no op."""
    result: Tensor = (_reference.forward if transformed() else torch.ops.fastinvdpo.affine_step)(*arguments)
    return result


def _check_memory(sample: Tensor, outputs: list[Tensor], out: Tensor, trajectory: Tensor | None) -> None:
    """Raise where a result would destroy what is still to be read."""
    inputs = {"sample": sample, **{f"outputs[{position}]": output for position, output in enumerate(outputs)}}
    for name, result in (("out", out), ("trajectory", trajectory)):
        if result is None:
            continue
        shown = f"strides {result.stride()}"
        if overlaps_itself(result):
            raise invalid(name, shown, "has elements that share memory", "pass a tensor that was not expanded")
        others = inputs if name == "out" else {**inputs, "out": out}
        for other_name, other in others.items():
            if overlap(result, other) and not (name == "out" and _same(result, other)):
                remedy = "pass memory of its own" + (", or an input itself" if name == "out" else "")
                raise invalid(name, shown, f"shares memory with {other_name}", remedy)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape are the same memory in the same order."""
    strides = zip(first.shape, first.stride(), second.stride(), strict=True)
    same_order = all(size == 1 or one == other for size, one, other in strides)
    return same_order and first.data_ptr() == second.data_ptr() and first.dtype == second.dtype
