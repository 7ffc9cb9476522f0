"""The Triton kernels of this checkout, whether or not they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from tests.layout import ROOT

PACKAGE_NAME = "triton_kernels_of_this_checkout"


def kernel_module(name: str) -> ModuleType:
    """``kernels/triton/<name>.py``. Whether it is interpreted or compiled is settled when triton is first imported."""
    if PACKAGE_NAME not in sys.modules:
        folder = ROOT / "kernels/triton"
        spec = importlib.util.spec_from_file_location(
            PACKAGE_NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE_NAME] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE_NAME}.{name}")
