"""The tests of the C++ kernels for the CPU in processes of their own: with the lesser instruction sets, and under
AddressSanitizer and UndefinedBehaviorSanitizer with every one; and what FASTINVDPO_ISA refuses.

``make test-deep`` runs this file, by name. It is such a process's program too: ``python -m tests.kernels.native_run
EXTENSION TEST_FILE ...``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fastinvdpo.ops import native
from tests.layout import ROOT

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
# What the interpreter, which is not sanitized, must load first. libstdc++: or exceptions find no handler.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1")


@pytest.fixture(autouse=True)
def _built() -> None:
    """Not a mark: as a program this module must not load the extension of the package."""
    if native.unavailable() is not None:
        pytest.skip(str(native.unavailable()))


def instruction_sets() -> tuple[str, ...]:
    """Those that this process may use: up to the best one that the CPU has, or the one that FASTINVDPO_ISA names."""
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


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS[:-1])
def test_a_lesser_set_than_the_best(instructions: str) -> None:
    """The best one is what the tests in this process use."""
    *lesser, best = instruction_sets()
    if instructions not in lesser:
        pytest.skip(f"{instructions} is not below {best}, with which this process runs the same tests")
    extension = native._load()[0]
    assert extension is not None and extension.__file__ is not None
    files = [
        "test_native.py",
        "test_native_lengths.py",
        "../ops/test_pair_statistics.py",
        "../ops/test_token_log_probs.py",
    ]
    run_tests(Path(extension.__file__), instructions, files, {})


@pytest.mark.parametrize("asked", ["sse9", "AVX2", "avx512"])
def test_a_set_that_cannot_be_had_is_refused_by_every_call(asked: str) -> None:
    if asked in instruction_sets():
        pytest.skip(f"this CPU has {asked}")
    code = """
import torch, fastinvdpo
for call in (
    lambda: fastinvdpo.affine_step(torch.ones(1, 1), [], torch.ones(1, 1)),
    lambda: fastinvdpo.preference_loss(torch.ones(2, 1), torch.ones(2, 1), None, beta=1.0),
) * 2:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    options = {"timeout": 120, "cwd": ROOT, "env": {**os.environ, "FASTINVDPO_ISA": asked}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    problem = f"FASTINVDPO_ISA = '{asked}': this CPU has no such instruction set. Remedy: use one of baseline"
    assert done.returncode == 0, done.stderr
    assert [line[: len(problem)] for line in done.stdout.splitlines()] == [problem] * 4


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_no_instruction_set_reads_or_writes_astray(tmp_path: Path) -> None:
    from torch.utils import cpp_extension  # for the paths of its headers and libraries

    asked = [[str(COMPILER), f"-print-file-name={name}"] for name in RUNTIMES]
    runtimes = [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in asked]
    if set(runtimes) & set(RUNTIMES):  # the bare name of one that the compiler has not
        pytest.skip(f"{COMPILER} has no {', '.join(set(runtimes) & set(RUNTIMES))}")
    include = [str(ROOT / "csrc"), sysconfig.get_path("include"), *cpp_extension.include_paths()]
    # As setup.py does it.
    options = [
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-Wno-psabi",
        *(f"-I{path}" for path in include),
    ]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    sources, extension = map(str, sorted((ROOT / "csrc").glob("*.cpp"))), tmp_path / "_C.so"
    command = [str(COMPILER), *SANITIZE, *options, *sources, "-o", str(extension), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    content = extension.read_bytes()
    assert b"__asan_report_load" in content and b"__ubsan_handle" in content
    environment = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaves what it has to the operating system
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    for instructions in instruction_sets():
        run_tests(extension, instructions, ["test_native_lengths.py"], environment)


def main(path: str, *files: str) -> int:
    # Before anything asks for it, so that this is the one that is found; torch, which it needs, is imported.
    spec = importlib.util.spec_from_file_location("fastinvdpo._C", path)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules["fastinvdpo._C"] = extension

    # What a sanitizer says before it ends the process is not to be captured.
    options = ["-q", "-s", "-p", "no:cacheprovider", "-k", "not cuda"]
    status = pytest.main([*(str(HERE / name) for name in files), *options])
    info = native.build_info()
    assert info is not None and native._load()[0] is extension
    print(json.dumps({"extension": extension.__file__, "instructions": info["cpu_instructions"]}))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
