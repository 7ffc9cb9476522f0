"""The inversion step, and everything else that is affine in the latent and the network's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops import philox
from fastinvdpo.ops.affine_step.op import affine_step_op, affine_step_out_op

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
    ``sample`` and ``outputs``, unless into given memory. Coefficients:
    :func:`fastinvdpo.diffusion.schedule.affine_coefficients` (DDIM, arXiv 2010.02502, equation 12).

    Args:
        sample: ``x``, ``(n, …)``, any floating dtype.
        outputs: ``o_j``, up to four tensors of that shape; their dtypes may differ.
        coefficients: ``(n, 1 + len(outputs))``, float32 or float64: ``a_i`` first, then ``b_ij``.
        active: bool ``(n,)``; a sample whose entry is False is returned as it is, bit for bit.
        noise_scale: ``s``, ``(n,)``; no noise when None.
        noise_index: int64 ``(n,)``, the stream each sample draws ``z`` from: equal indices draw equal noise (winner and
            loser of a pair, say). The position in the batch when None.
        seed, offset: the key and the step counter of the noise (:mod:`fastinvdpo.ops.philox`), 63 and 32 bits.
        out: receives ``y`` and is returned; shape and dtype of ``sample``, any strides. It may be ``sample`` itself (a
            step in place) or an output.
        trajectory: receives ``y`` too, in the same pass: shape of ``sample``, any floating dtype and strides, such as
            ``buffer[:, k]``. Its numbers are rounded once, to its own dtype, whatever that of ``sample``; those of
            samples that are not active are converted.

    Returns:
        ``y``: ``out``, or a new tensor in the shape, dtype and layout of ``sample``.

    Raises:
        InvalidInput: an argument has the wrong type, shape, dtype, device or value; ``out`` or ``trajectory`` while a
            gradient is recorded, or in memory that another argument has (told where samples are dense).
    """
    outputs = list(outputs)
    _check_tensors(sample, outputs)
    n = sample.shape[0]
    _check_table("coefficients", coefficients, sample, (n, 1 + len(outputs)))
    if active is not None:
        _check_table("active", active, sample, (n,), kind="bool")
    if noise_scale is not None:
        _check_table("noise_scale", noise_scale, sample, (n,))
        philox.check_key(seed, offset)
    if noise_index is not None:
        if noise_scale is None:
            raise invalid(
                "noise_index", "a tensor", "has no effect without noise_scale", "pass noise_scale, or drop it"
            )
        _check_table("noise_index", noise_index, sample, (n,), kind="int64")
    arguments = (sample, outputs, coefficients, active, noise_scale, noise_index, seed, offset)
    if out is None and trajectory is None:
        return affine_step_op(*arguments)
    _check_results(sample, outputs, out, trajectory)
    result = torch.empty_like(sample) if out is None else out
    affine_step_out_op(*arguments, result, trajectory)
    return result


def _check_tensors(sample: Tensor, outputs: list[Tensor]) -> None:
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        shown = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        raise invalid(
            "sample", shown, "must be a floating-point tensor", "pass latents in float32, bfloat16 or float16"
        )
    if sample.ndim < 1:
        raise invalid("sample.shape", tuple(sample.shape), "has no batch dimension", "pass (n, …)")
    if len(outputs) > MAX_OUTPUTS:
        raise invalid(
            "outputs", f"{len(outputs)} tensors", f"at most {MAX_OUTPUTS} are supported", "split the step in two"
        )
    for position, output in enumerate(outputs):
        name = f"outputs[{position}]"
        if not isinstance(output, Tensor) or not output.is_floating_point():
            shown = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise invalid(name, shown, "must be a floating-point tensor", "pass the network's prediction")
        if output.shape != sample.shape:
            expected = f"differs from sample's {tuple(sample.shape)}"
            raise invalid(f"{name}.shape", tuple(output.shape), expected, "pass predictions of the sample's shape")
        if output.device != sample.device:
            where = f"differs from sample's {sample.device}"
            raise invalid(f"{name}.device", str(output.device), where, "move it to the sample's device")


def _check_results(sample: Tensor, outputs: list[Tensor], out: Tensor | None, trajectory: Tensor | None) -> None:
    for name, result in (("out", out), ("trajectory", trajectory)):
        if result is None:
            continue
        if not isinstance(result, Tensor) or not result.is_floating_point():
            shown = result.dtype if isinstance(result, Tensor) else type(result).__name__
            raise invalid(name, shown, "must be a floating-point tensor", "pass a tensor to write to, or None")
        if result.shape != sample.shape:
            expected = f"differs from sample's {tuple(sample.shape)}"
            raise invalid(f"{name}.shape", tuple(result.shape), expected, "pass a tensor of the sample's shape")
        if result.device != sample.device:
            where = f"differs from sample's {sample.device}"
            raise invalid(f"{name}.device", str(result.device), where, "make it on the sample's device")
    if out is not None and out.dtype != sample.dtype:
        remedy = "pass a tensor of the sample's dtype; trajectory may have another"
        raise invalid("out.dtype", out.dtype, f"differs from sample's {sample.dtype}", remedy)
    if torch.is_grad_enabled():
        named = {"sample": sample, "out": out, "trajectory": trajectory}
        named |= {f"outputs[{position}]": output for position, output in enumerate(outputs)}
        for name, tensor in named.items():
            if tensor is not None and tensor.requires_grad:
                remedy = "step under torch.no_grad(), or pass neither out nor trajectory"
                raise invalid(f"{name}.requires_grad", True, "a step into given memory is not differentiable", remedy)


def _check_table(
    name: str, table: Tensor, sample: Tensor, shape: tuple[int, ...], kind: str = "floating point"
) -> None:
    if not isinstance(table, Tensor):
        raise invalid(name, table, "must be a tensor", f"pass a {kind} tensor of shape {shape}")
    if tuple(table.shape) != shape:
        raise invalid(f"{name}.shape", tuple(table.shape), "does not fit the sample", f"pass shape {shape}")
    fits = table.is_floating_point() if kind == "floating point" else str(table.dtype) == f"torch.{kind}"
    if not fits:
        raise invalid(f"{name}.dtype", table.dtype, f"must be {kind}", f"convert it to {kind}")
    if table.device != sample.device:
        where = f"differs from sample's {sample.device}"
        raise invalid(f"{name}.device", str(table.device), where, "move it to the sample's device")
