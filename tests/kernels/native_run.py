"""The tests of the C++ kernels in a process of their own, with an extension and an instruction set that are chosen.

Also that process's program: ``python -m tests.kernels.native_run EXTENSION TEST_FILE ...``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.layout import ROOT

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
HERE = Path(__file__).parent


def instruction_sets() -> tuple[str, ...]:
    """Those that this process may use: up to the best one that the CPU has, or the one that FASTINVDPO_ISA names."""
    from fastinvdpo.ops import native

    info = native.build_info()
    assert info is not None
    return INSTRUCTION_SETS[: INSTRUCTION_SETS.index(str(info["cpu_instructions"])) + 1]


def run_tests(extension: Path, instructions: str, files: Sequence[str], environment: Mapping[str, str]) -> None:
    """Assert that the tests pass, none skipped, with that extension and those instructions."""
    command = [sys.executable, "-m", "tests.kernels.native_run", str(extension), *files]
    plain = {"PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "FASTINVDPO_ISA": instructions, **plain, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    # A sanitizer says first what it found.
    output = f"{instructions}:\n{done.stderr[:5000]}\n{done.stdout[-20000:]}"
    assert done.returncode == 0, output
    *_, summary, used = done.stdout.strip().splitlines()
    assert json.loads(used) == {"extension": str(extension), "instructions": instructions}
    assert " passed" in summary and "skipped" not in summary, output


def main(path: str, *files: str) -> int:
    import pytest
    import torch  # noqa: F401 - brings the libraries that the extension needs

    # Before anything asks for it, so that this is the one that is found.
    spec = importlib.util.spec_from_file_location("fastinvdpo._C", path)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules["fastinvdpo._C"] = extension

    # What a sanitizer says before it ends the process is not to be captured.
    status = pytest.main([*(str(HERE / name) for name in files), "-q", "-s", "-p", "no:cacheprovider"])
    from fastinvdpo.ops import native

    info = native.build_info()
    assert info is not None and native._load()[0] is extension
    print(json.dumps({"extension": extension.__file__, "instructions": info["cpu_instructions"]}))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
