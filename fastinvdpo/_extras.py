"""Optional dependencies: imported where they are used, with an error that says how to install them."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastinvdpo.errors import MissingExtra


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or raise :class:`MissingExtra` naming the extra of this package that brings it.

    >>> diffusers = require("diffusers", extra="train", purpose="loading a UNet")
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{purpose} needs the package {module!r}, which cannot be imported ({error}). "
            f"Remedy: pip install 'fastinvdpo[{extra}]'."
        ) from error
