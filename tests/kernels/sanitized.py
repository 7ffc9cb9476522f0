"""The C++ kernels for the CPU under AddressSanitizer and UndefinedBehaviorSanitizer, with every instruction set.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fastinvdpo.ops import native
from tests.kernels.native_run import instruction_sets, run_tests
from tests.layout import ROOT

# What the interpreter, which is not sanitized, must load first. libstdc++: or exceptions find no handler.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def runtime(name: str) -> str:
    """Where the compiler keeps a library; the bare name when it has none."""
    if compiler() is None:
        return name
    asked = [str(compiler()), f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def missing() -> str | None:
    """Why there is nothing to test with; None when there is."""
    if compiler() is None:
        return "there is no C++ compiler"
    absent = [name for name in RUNTIMES if runtime(name) == name]
    return f"{compiler()} has no {', '.join(absent)}" if absent else None


pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


def compile_sanitized(sources: list[Path], target: Path, *options: str) -> Path:
    flags = ["-std=c++17", "-fPIC", "-shared", *map(str, sources), "-o", str(target), *options]
    command = [str(compiler()), *SANITIZE, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return target


def environment() -> dict[str, str]:
    return {
        "LD_PRELOAD": " ".join(map(runtime, RUNTIMES)),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaves what it has to the operating system
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def test_no_instruction_set_reads_or_writes_astray(tmp_path: Path) -> None:
    # torch is imported here alone: the paths of its headers and libraries.
    from torch.utils import cpp_extension

    include = [str(ROOT / "csrc"), sysconfig.get_path("include"), *cpp_extension.include_paths()]
    # As setup.py does it.
    options = ["-fvisibility=hidden", "-Wno-psabi"]
    options += [f"-I{path}" for path in include]
    options += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    extension = compile_sanitized(sorted((ROOT / "csrc").glob("*.cpp")), tmp_path / "_C.so", *options)
    content = extension.read_bytes()
    assert b"__asan_report_load" in content and b"__ubsan_handle" in content
    for instructions in instruction_sets():
        run_tests(extension, instructions, ["test_native_lengths.py"], environment())
