"""The native extension ``fastinvdpo._C``: loaded when a backend first needs it, and the reason when it cannot be."""

from __future__ import annotations

import importlib
import platform
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).parents[1]
OPS = ("affine_step", "pair_statistics", "preference_loss", "token_log_probs")
"""All ops; an extension without one of them was built for an older version."""


@cache
def _load() -> tuple[ModuleType | None, str, bool]:
    """The extension, why there is none, and whether somebody wanted one."""
    try:
        module = importlib.import_module("fastinvdpo._C")
        missing = [name for name in OPS if not hasattr(torch.ops.fastinvdpo_native, name)]
        if missing:
            lacking = f"is of an older version, without {', '.join(missing)}"
            return None, f"the extension fastinvdpo._C {lacking}. Remedy: build it again", True
        return module, "", True
    except ImportError as error:
        if error.name != "fastinvdpo._C":
            return None, f"the extension fastinvdpo._C cannot be loaded: {error}", True
    record = HERE / "_not_built.txt"  # setup.py's, where it could not
    others = ", ".join(sorted(path.name for path in HERE.glob("_C.*")))
    if record.is_file():
        why = record.read_text().strip()
    elif others:
        why = f"there is {others}, but this is Python {platform.python_version()}. Remedy: build it with this Python"
    else:
        return None, "the extension fastinvdpo._C was not built (FASTINVDPO_BUILD=1 pip install . says why)", False
    return None, f"the extension fastinvdpo._C was not built: {why}", True


def unavailable() -> str | None:
    """Why the extension cannot be used; None when it is loaded, and with it the ops of ``fastinvdpo_native``."""
    return _load()[1] or None


def fault() -> str | None:
    """Why the extension is not there although it should be; None when it is, or when no build was requested."""
    module, reason, wanted = _load()
    return f"NATIVE KERNELS MISSING: {reason}" if wanted and module is None else None


@cache
def warn_of_fault() -> None:
    """Say once that plain PyTorch stands in for kernels that should be there."""
    if (reason := fault()) is not None:
        warnings.warn(f"{reason}. Plain PyTorch runs instead.", RuntimeWarning, stacklevel=2)


@cache
def op(name: str) -> Callable[..., Any]:
    """The op ``fastinvdpo_native::<name>`` of the extension, which is loaded."""
    found: Callable[..., Any] = getattr(torch.ops.fastinvdpo_native, name).default
    return found


def cuda_unavailable() -> str | None:
    """Why the extension's CUDA kernels cannot be used; None when they are loaded."""
    if (info := build_info()) is None:
        return unavailable()
    return None if info["cuda"] else "fastinvdpo._C was built without CUDA (FASTINVDPO_CUDA=1 pip install . builds it)"


def release_kept_memory() -> None:
    """Free the memory that the extension keeps for the next large result on the CPU; nothing without an extension."""
    module = _load()[0]
    if module is not None:
        module.release_kept_memory()


def build_info() -> dict[str, object] | None:
    """How the extension was built (compiler, torch, cuda, with it nvcc, and cpu_instructions); None without one."""
    module = _load()[0]
    return None if module is None else dict(module.build_info())
