"""The inversion step, and everything else that is affine in the latent and the network's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops import philox
from fastinvdpo.ops.affine_step.schema import affine_step_op, affine_step_out_op
from fastinvdpo.ops.checks import check_tensor, transformed

__all__ = ["affine_step"]

MAX_OUTPUTS = 4


def affine_step(
    sample: Tensor,
    outputs: Sequence[Tensor],
    coefficients: Tensor,
    *,
    active: Tensor | None = None,
    noise_scale: Tensor | None = None,
    noise_index: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
    out: Tensor | None = None,
    trajectory: Tensor | None = None,
) -> Tensor:
    """``y_i = a_i·x_i + Σ_j b_ij·o_ij + s_i·z_i``: one DDIM step in either direction, guided or not, with or without
    noise.

    The arithmetic is float32 whatever the storage (float64 when ``sample`` or an output is float64). Differentiable in
    ``sample`` and ``outputs`` in reverse mode, any number of times, unless into given memory; transforms of
    ``torch.func`` run the reference. Coefficients: :func:`fastinvdpo.diffusion.schedule.affine_coefficients` (DDIM,
    arXiv 2010.02502, equation 12).

    Args:
        sample: ``x``, ``(n, …)``, float64, float32, bfloat16 or float16.
        outputs: ``o_j``, up to four tensors of that shape; their dtypes may differ.
        coefficients: ``(n, 1 + len(outputs))``, floating: ``a_i`` first, then ``b_ij``; no gradient.
        active: bool ``(n,)``; a sample whose entry is False is returned as it is, bit for bit.
        noise_scale: ``s``, ``(n,)``, no gradient; no noise when None.
        noise_index: int64 ``(n,)``, the stream each sample draws ``z`` from: equal indices draw equal noise (winner and
            loser of a pair, say). The position in the batch when None.
        seed, offset: the key and the step counter of the noise (:mod:`fastinvdpo.ops.philox`), 63 and 32 bits.
        out: receives ``y`` and is returned; shape and dtype of ``sample``, any strides. It may be ``sample`` itself (a
            step in place) or an output.
        trajectory: receives ``y`` too, in the same pass: shape of ``sample``, any of its dtypes and any strides, such
            as ``buffer[:, k]``. Its numbers are rounded once, to its own dtype, whatever that of ``sample``; those of
            samples that are not active are converted.

    Returns:
        ``y``: ``out``, or a new tensor in the shape, dtype and layout of ``sample``.

    Raises:
        InvalidInput: an argument has the wrong type, shape, dtype, layout, device or value; a tensor without a gradient
            here requires one, or carries a tangent; ``out`` or ``trajectory`` while a gradient is recorded or a
            function transformed, or in memory that another argument has.
    """
    check_tensor("sample", sample, differentiable=True)
    if sample.ndim < 1:
        raise invalid("sample.shape", tuple(sample.shape), "has no batch dimension", "pass (n, …)")
    if isinstance(outputs, Tensor) or len(outputs) > MAX_OUTPUTS:
        shown = "a tensor" if isinstance(outputs, Tensor) else f"{len(outputs)} tensors"
        raise invalid("outputs", shown, f"must be a list of at most {MAX_OUTPUTS} tensors", "split the step in two")
    outputs, n, shapes = list(outputs), sample.shape[0], (sample.shape,)
    for position, output in enumerate(outputs):
        check_tensor(f"outputs[{position}]", output, shapes, sample, differentiable=True)
    check_tensor("coefficients", coefficients, ((n, 1 + len(outputs)),), sample)
    if active is not None:
        check_tensor("active", active, ((n,),), sample, dtypes=(torch.bool,))
    if noise_scale is not None:
        check_tensor("noise_scale", noise_scale, ((n,),), sample)
        philox.check_key(seed, offset)
    if noise_index is not None:
        if noise_scale is None:
            raise invalid("noise_index", "a tensor", "has no effect without noise_scale", "pass noise_scale too")
        check_tensor("noise_index", noise_index, ((n,),), sample, dtypes=(torch.int64,))
    arguments = (sample, outputs, coefficients, active, noise_scale, noise_index, seed, offset)
    if out is None and trajectory is None:
        return affine_step_op(*arguments)
    _check_results(sample, outputs, out, trajectory)
    result = torch.empty_like(sample) if out is None else out
    affine_step_out_op(*arguments, result, trajectory)
    return result


def _check_results(sample: Tensor, outputs: list[Tensor], out: Tensor | None, trajectory: Tensor | None) -> None:
    shapes, dtypes = (sample.shape,), (sample.dtype,)
    if out is not None:
        check_tensor("out", out, shapes, sample, dtypes=dtypes, differentiable=True)
    if trajectory is not None:
        check_tensor("trajectory", trajectory, shapes, sample, differentiable=True)
    if transformed():
        name = "trajectory" if out is None else "out"
        raise invalid(name, "a tensor", "cannot be written under a transform of torch.func", "pass neither")
    if torch.is_grad_enabled():
        named = {"sample": sample, "out": out, "trajectory": trajectory}
        named |= {f"outputs[{position}]": output for position, output in enumerate(outputs)}
        for name, tensor in named.items():
            if tensor is not None and tensor.requires_grad:
                remedy = "step under torch.no_grad(), or pass neither out nor trajectory"
                raise invalid(f"{name}.requires_grad", True, "a step into given memory is not differentiable", remedy)
