"""Packages that live elsewhere in the checkout and are installed inside this one (setup.py says which)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parents[1]


def load(package: str, folder: str, module: str) -> ModuleType:
    """``fastinvdpo.<package>.<module>``; from ``folder`` of the checkout where that is on the path, not installed.

    Raises:
        ModuleNotFoundError: it is neither installed nor in a checkout.
    """
    name = f"fastinvdpo.{package}"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        init = _ROOT / folder / "__init__.py"
        if error.name != name or not init.is_file():
            raise
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.{module}")
