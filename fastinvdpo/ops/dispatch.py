"""Which backend runs an op: what exists, what was requested, what was chosen and why.

A request, strongest first: ``with use_backend(name)``; the environment variable ``FASTINVDPO_BACKEND``, read at every
call; ``auto``. Nothing is decided at import and nothing here initializes CUDA. Ops call :func:`choose` inside their
kernels, which a compiler does not look into, so a choice changes without recompiling.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops import native, triton_kernels

VARIABLE = "FASTINVDPO_BACKEND"
BACKENDS = ("cuda", "triton", "native", "reference")
"""Every backend's name, in the order in which ``auto`` tries them."""

IMPLEMENTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(native.OPS, BACKENDS),
    "token_log_probs": ("triton", "native", "reference"),
}
"""The backends that have a kernel for each op."""

# Delete a line once `make test-gpu` has passed for that backend: from then on ``auto`` chooses it.
UNPROVEN: dict[str, str] = {
    "cuda": "its kernels have not been run on a GPU yet; they can be chosen by name",
    "triton": "its kernels have not been run on a GPU yet; they can be chosen by name",
}
"""The backends that ``auto`` does not choose although they may be able to run, and why."""

CAPABILITY = (8, 0)
"""The least compute capability that kernels are compiled for."""

_DEVICES = {"cuda": "cuda", "triton": "cuda", "native": "cpu"}  # the reference runs wherever PyTorch does


@dataclass(eq=False)
class _Request:
    backend: str


_here: ContextVar[_Request | None] = ContextVar("fastinvdpo_backend", default=None)
# Autograd runs the backward of CUDA tensors in threads of its own, which inherit no context variable. A thread that
# made no choice therefore follows the choice entered last in the process: a backward runs where its forward ran.
_entered: list[_Request] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the block on one backend: ``auto``, ``reference``, ``native``, ``triton`` or ``cuda``.

    Blocks nest; threads with blocks of their own do not disturb each other. Calling an op that the backend cannot run
    raises.

    Raises:
        InvalidInput: ``name`` is not a backend.
    """
    _check_name("name", name)
    request = _Request(name)
    token = _here.set(request)
    _entered.append(request)
    try:
        yield
    finally:
        _entered.remove(request)
        _here.reset(token)


def choose(op: str, device_type: str, float64: bool = False) -> str:
    """The backend that runs ``op``, a key of :data:`IMPLEMENTED`, on tensors of ``device_type`` ("cpu", "cuda", ...).

    ``float64``: whether an input is float64, which the reference alone computes in.

    Raises:
        InvalidInput: ``FASTINVDPO_BACKEND`` is not a backend, or the backend requested by name cannot run the op there.
    """
    source, name = requested()
    return _select(op, device_type, float64, source, name)


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, whose string takes as long to make as the rest of a choice."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def requested() -> tuple[str, str]:
    """The source of the request and its name: ``use_backend``, ``FASTINVDPO_BACKEND`` or ``default`` with ``auto``."""
    for request in (_here.get(), *_entered[-1:]):
        if request is not None:
            return "use_backend", request.backend
    name = os.environ.get(VARIABLE, "")
    return (VARIABLE, name) if name else ("default", "auto")


def unavailable(op: str, backend: str, device_type: str, float64: bool = False) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of ``device_type``; None when it can.

    Looks at the GPUs, which initializes CUDA, only where ``device_type`` is ``cuda``.
    """
    if backend not in IMPLEMENTED[op]:
        return f"this version has no {backend} kernel for {op}"
    interpreted = backend == "triton" and triton_kernels.interpreted()
    device = "cpu" if interpreted else _DEVICES.get(backend, device_type)
    if device != device_type:
        under = " under TRITON_INTERPRET" if interpreted else ""
        return f"{backend} kernels run on {device} tensors{under}, not on {device_type} tensors"
    if float64 and backend != "reference":
        return f"{backend} kernels compute in float32, and an input is float64"
    if backend == "native":
        return native.unavailable()
    if backend == "triton":
        return triton_kernels.unavailable() or (None if interpreted else _gpus_unavailable())
    return (native.cuda_unavailable() or _gpus_unavailable()) if backend == "cuda" else None


def skipped(backend: str, device_type: str) -> str | None:
    """Why ``auto`` does not choose ``backend`` even where it can run and can be chosen by name; None when it does."""
    if backend == "triton" and device_type == "cpu":
        return "it would run in Triton's interpreter, which is for tests; it can be chosen by name"
    return UNPROVEN.get(backend)


@cache
def _gpus_unavailable() -> str | None:
    """Why no kernel can run on the GPUs. All that are visible must do: a tensor may be on any of them."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch was built for CUDA {torch.version.cuda}, but finds no usable GPU or driver"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < CAPABILITY:
            has, needed = (".".join(map(str, version)) for version in (capability, CAPABILITY))
            what = f"GPU {index}, {torch.cuda.get_device_name(index)}, has compute capability {has}"
            return f"{what}, and the kernels need {needed} (CUDA_VISIBLE_DEVICES can hide it)"
    return None


@cache
def _select(op: str, device_type: str, float64: bool, source: str, name: str) -> str:
    _check_name(source, name)
    if name == "auto":
        considered = (backend for backend in BACKENDS if skipped(backend, device_type) is None)
        chosen = next(backend for backend in considered if unavailable(op, backend, device_type, float64) is None)
        if chosen == "reference" and device_type == "cpu" and not float64:
            native.warn_of_fault()
        return chosen
    reason = unavailable(op, name, device_type, float64)
    if reason is not None:
        raise invalid(source, name, reason, "choose auto or reference, which run everywhere")
    return name


def _check_name(source: str, name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise invalid(source, name, "is not a backend", f"use one of auto, {', '.join(sorted(BACKENDS))}")
