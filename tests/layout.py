"""The checkout as data: its folders, its imports, its declared dependencies."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastinvdpo"
EXAMPLES = ROOT / "examples"
INSTALLED_AS = {("kernels", "triton"): "_triton", ("examples",): "_examples", ("benchmarks",): "_benchmarks"}
"""What is linked into the package's folder, which setup.py installs."""


class Import(NamedTuple):
    """One imported module, absolute: ``fastinvdpo.ops.philox``, ``torch.utils.data``."""

    where: Path
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.where.relative_to(ROOT)}:{self.line} imports {self.module}"


def modules() -> list[Path]:
    """Every module of the package, wherever in the checkout it lives."""
    folders = (PACKAGE, ROOT / "kernels", EXAMPLES)
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def benchmark_modules() -> list[Path]:
    return sorted((ROOT / "benchmarks").rglob("*.py"))


def module_name(path: Path) -> str:
    """``fastinvdpo.ops.philox``; kernels, examples and benchmarks by the names they are installed under."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    for folder, name in INSTALLED_AS.items():
        if parts[: len(folder)] == list(folder):
            parts[: len(folder)] = ["fastinvdpo", name]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, source: str | None = None) -> Iterator[Import]:
    """The imports of a module, those inside functions and under TYPE_CHECKING too, and the calls of ``require``."""
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(path, node.lineno, name if _is_module(name) else base)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            yield from (
                Import(path, node.lineno, name.value) for name in node.args[:1] if isinstance(name, ast.Constant)
            )


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def optional_dependencies() -> dict[str, set[str]]:
    """The distributions that each extra brings."""
    extras = pyproject()["project"]["optional-dependencies"]
    return {extra: {re.split(r"[^\w-]", line)[0] for line in lines} for extra, lines in extras.items()}


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = module_name(path.parent / "__init__.py").split(".")
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def _is_module(name: str) -> bool:
    file = ROOT.joinpath(*name.split("."))  # through the links as well
    return name.startswith("fastinvdpo.") and (file.with_suffix(".py").exists() or (file / "__init__.py").exists())
