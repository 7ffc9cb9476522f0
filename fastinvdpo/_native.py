"""The native extension ``fastinvdpo._C``: loaded when a backend first needs it, and the reason when it cannot be."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastinvdpo._C"), ""
    except ImportError as error:
        if error.name == "fastinvdpo._C":
            return None, "the extension fastinvdpo._C was not built (FASTINVDPO_BUILD=1 pip install . says why)"
        return None, f"the extension fastinvdpo._C cannot be loaded: {error}"


def unavailable() -> str | None:
    """Why the extension cannot be used; None when it is loaded, and with it the ops of ``fastinvdpo_native``."""
    return _load()[1] or None


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
    """How the extension was built (compiler, cuda, cpu_instructions); None without one."""
    module = _load()[0]
    return None if module is None else dict(module.build_info())
