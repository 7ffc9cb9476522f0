"""The Triton kernels, ``fastinvdpo._triton``: loaded at their first use, or the reason why they cannot be."""

from __future__ import annotations

import importlib
import os
import re
from functools import cache
from types import ModuleType

OLDEST = (3, 6)


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` selects Triton's interpreter, which runs kernels on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def load(op: str) -> ModuleType:
    """The module with the launchers of an op, ``forward`` and ``backward``."""
    return importlib.import_module(f"fastinvdpo._triton.{op}")


@cache
def unavailable() -> str | None:
    """Why Triton cannot be used; None when it is imported and recent enough."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"the package triton cannot be imported: {error}"
    version = str(getattr(triton, "__version__", "unknown"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST:
        return f"the package triton has version {version}, and the kernels need {'.'.join(map(str, OLDEST))}"
    if isinstance(triton.language.sum, triton.JITFunction) == interpreted():
        return "TRITON_INTERPRET was changed after triton had been imported, which reads it once"
    return None
