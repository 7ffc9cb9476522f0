"""Exit status 0 if this interpreter can run the make targets of the checkout named by the first argument.

It can when fastinvdpo is installed, from this checkout or as a regular package, with the extras train and dev. Nothing
is imported.
"""

import importlib.util
import sys
from pathlib import Path

NEEDED = (
    "accelerate",
    "datasets",
    "diffusers",
    "hypothesis",
    "matplotlib",
    "mypy",
    "peft",
    "PIL",
    "pyarrow",
    "pydantic",
    "pytest",
    "rich",
    "ruff",
    "safetensors",
    "scipy",
    "setuptools",
    "tensorboard",
    "torch",
    "transformers",
    "typer",
    "wheel",
    "xdist",
    "yaml",
)


def suitable(checkout: Path) -> bool:
    spec = importlib.util.find_spec("fastinvdpo")
    if spec is None or spec.origin is None or not all(map(importlib.util.find_spec, NEEDED)):
        return False
    installed = Path(spec.origin).resolve()
    # Not the editable installation of another checkout: the tests' subprocesses would run that code.
    return any(installed.is_relative_to(place.resolve()) for place in (checkout, Path(sys.prefix)))


if __name__ == "__main__":
    # Python puts the folder of this file first, which holds no package: the checkout alone does not count as installed.
    sys.exit(not suitable(Path(sys.argv[1])))
