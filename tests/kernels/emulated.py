"""csrc's CUDA kernels run on the host, block by block, as emulation/cuda_emulation.h does it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinvdpo.ops.pair_statistics import schema
from tests.kernels import statistics
from tests.kernels.cases import UTILITY, Problem
from tests.layout import ROOT

HERE = Path(__file__).parent / "emulation"
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> ctypes.CDLL:
    """The kernels as a shared library in ``folder``."""
    path = folder / "emulated.so"
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DFASTINVDPO_EMULATE_CUDA"]
    files = [f"-I{ROOT / 'csrc'}", f"-I{HERE}", str(HERE / "driver.cpp"), "-o", str(path)]
    command = [compiler() or "g++", *flags, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(path))
    library.forward.restype = library.ranges.restype = library.pair_statistics.restype = ctypes.c_int64
    return library


class Launch(NamedTuple):
    """``team``: the largest cluster, 1 for single blocks; ``resident``: blocks that run at a time; ``order``: the seed
    of the order in which they finish.
    """

    team: int = 1
    resident: int = 1 << 20
    order: int = 0


def forward(library: ctypes.CDLL, problem: Problem, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel writes, over results that start as NaN; the ticket is checked."""
    p = problem
    pairs = p.policy.shape[0] // 2
    results = [torch.full(shape, torch.nan) for shape in ((), (pairs,), p.rows, p.rows)]
    tensors = (p.policy, p.reference, p.target)
    ticket = library.forward(
        *(_pointer(tensor) for tensor in tensors),
        _integers(ctypes.c_int, [0 if tensor is None else STORAGE[tensor.dtype] for tensor in tensors]),
        *_settings(p, launch),
        _pointers(results),
    )
    assert ticket == 0
    loss, margin, policy_mse, reference_mse = results
    return loss, margin, policy_mse, reference_mse


def backward(
    library: ctypes.CDLL, problem: Problem, gradients: Sequence[Tensor | None], margin: Tensor, launch: Launch
) -> Tensor:
    """The gradient of the policy, in its dtype, from those of loss, margin and policy_mse."""
    p = problem
    target = p.reference if p.target is None else p.target
    gradient = torch.full_like(p.policy, torch.nan)
    library.backward(
        _pointers(gradients),
        _pointer(p.policy),
        _pointer(target),
        _integers(ctypes.c_int, [STORAGE[p.policy.dtype], STORAGE[target.dtype]]),
        _pointer(margin),
        *_settings(p, launch),
        _pointer(gradient),
    )
    return gradient


def affine_step(
    library: ctypes.CDLL,
    sample: Tensor,
    outputs: Sequence[Tensor],
    settings: Sequence[Any],
    out: Tensor | None = None,
    trajectory: Tensor | None = None,
    resident: int = 1 << 20,
) -> Tensor:
    """``settings``: the arguments of affine_step from ``coefficients`` on. Samples are dense, and may lie apart."""
    coefficients, active, noise_scale, noise_index, seed, offset = settings
    result = torch.full_like(sample, torch.nan) if out is None else out
    rows, stored = sample.shape[0], result if trajectory is None else trajectory
    pitches = [tensor.stride(0) for tensor in (sample, result, stored, *outputs)]
    library.affine_step(
        _address(sample),
        _pointers(outputs),
        _integers(ctypes.c_int, [STORAGE[tensor.dtype] for tensor in (sample, stored, *outputs)]),
        *(_pointer(tensor) for tensor in (coefficients, active, noise_scale, noise_index)),
        _integers(ctypes.c_int64, [rows, sample[0].numel(), len(outputs), resident, seed, offset, *pitches]),
        _address(result),
        None if trajectory is None else _address(trajectory),
    )
    return result


def affine_step_backward(
    library: ctypes.CDLL,
    grad: Tensor,
    gradients: Sequence[Tensor],
    columns: Sequence[int],
    coefficients: Tensor,
    active: Tensor | None = None,
    resident: int = 1 << 20,
) -> None:
    """``grad`` has the elements of the gradients, or one number for each row."""
    n = gradients[0][0].numel()
    targets = [x for column, gradient in zip(columns, gradients, strict=True) for x in (column, gradient.stride(0))]
    sizes = [len(grad), n, len(gradients), coefficients.shape[1], resident, grad.stride(0), grad.ndim == 1, *targets]
    library.affine_step_backward(
        _address(grad),
        _pointers(gradients),
        _integers(ctypes.c_int, [STORAGE[tensor.dtype] for tensor in (grad, *gradients)]),
        _pointer(coefficients),
        _pointer(active),
        _integers(ctypes.c_int64, sizes),
    )


def pair_statistics(library: ctypes.CDLL, p: statistics.Problem, launch: Launch) -> list[Tensor]:
    """What the kernel writes, over results that start as NaN; the ticket is checked."""
    *predictions, pair_mask = schema._rows(*p)
    shifts, masked = (0 if tensor is None else len(p.policy) for tensor in (p.reference, p.mask))
    lengths = (len(p.policy), shifts, shifts, masked, len(p.policy) // 2 if p.paired else 0)
    results = [torch.full((length,), torch.nan) for length in lengths]
    ticket = library.pair_statistics(
        *_statistics(predictions, pair_mask, p.paired, launch),
        _pointers([result if len(result) else None for result in results]),
    )
    assert ticket == 0
    policy_mse, cross, shift_mse, mask_mean, pair_cross = results
    return [policy_mse, cross, shift_mse, pair_cross, mask_mean]


def pair_statistics_backward(
    library: ctypes.CDLL, p: statistics.Problem, grads: Sequence[Tensor | None], launch: Launch
) -> Tensor:
    """The gradient of the policy, in its dtype."""
    paired = grads[3] is not None
    *predictions, pair_mask = schema._rows(*p[:4], paired)
    gradient = torch.full_like(p.policy, torch.nan)
    library.pair_statistics_backward(
        _pointers(grads), *_statistics(predictions, pair_mask, paired, launch), _pointer(gradient)
    )
    return gradient


def _statistics(
    predictions: Sequence[Tensor | None], pair_mask: Tensor | None, paired: bool, launch: Launch
) -> tuple[ctypes.Array, ...]:
    policy, reference, target, mask = predictions
    assert policy is not None and target is not None
    n = policy[0].numel()
    m = n if mask is None else mask[0].numel()
    masks = [1 if tensor is None else len(tensor) for tensor in (mask, pair_mask)]
    sizes = [len(policy), 1 + paired, n // m, m, *masks, launch.resident, launch.order]
    storage = [STORAGE[tensor.dtype] for tensor in (policy, policy if reference is None else reference, target)]
    return (
        _pointers([policy, reference, target, mask, pair_mask]),
        _integers(ctypes.c_int, storage),
        _integers(ctypes.c_int64, sizes),
    )


class Cut(NamedTuple):
    chunk: int
    spans: int
    team: int
    ranges: list[tuple[int, int]]


def cut(library: ctypes.CDLL, rows: int, n: int, largest_team: int, head: int, room: int = 1 << 16) -> Cut:
    """How a row of ``n`` elements is cut; ``largest_team`` 0: for an elementwise kernel."""
    description, flat = (ctypes.c_int64 * 3)(), (ctypes.c_int64 * (2 * room))()
    arguments = (ctypes.c_int64(rows), ctypes.c_int64(n), largest_team, ctypes.c_int64(head))
    count = library.ranges(*arguments, description, flat, ctypes.c_int64(room))
    kept = range(min(count, room))
    return Cut(*description, [(flat[2 * i], flat[2 * i + 1]) for i in kept])


def _settings(p: Problem, launch: Launch) -> tuple[Any, ...]:
    """Weights, sizes, β, utility and its smoothing."""
    pairs, timesteps = p.policy.shape[0] // 2, p.rows[1] if len(p.rows) == 2 else 1
    n, weight = p.policy.numel() // (2 * pairs * timesteps), p.timestep_weight
    pitch = 0 if weight is None else weight.stride(0)
    sizes = [pairs, timesteps, n, launch.team, launch.resident, launch.order, pitch]
    weights = _pointer(p.pair_weight), None if weight is None else _address(weight)
    numbers = ctypes.c_float(p.beta), UTILITY[p.utility], ctypes.c_float(p.label_smoothing)
    return (*weights, _integers(ctypes.c_int64, sizes), *numbers)


def _integers(kind: type, values: Sequence[int]) -> ctypes.Array:
    return (kind * max(1, len(values)))(*values)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor[0].is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
