"""csrc compiles against the headers of every PyTorch that the package promises, for the CPU and for CUDA.

``make test-deep`` runs this file, by name. The headers come from published wheels, once, and stay in the user's cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.layout import ROOT, pyproject

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastinvdpo/torch-headers"
# Those for macOS hold the same headers of the stable ABI as those for Linux in a tenth of the bytes.
PLATFORM = ("--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64", "--python-version=3.12")
PUBLISHED = ("2.10.0", "2.11.0", "2.12.0")
INSTALLED = "installed"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
NVCC = shutil.which("nvcc")
SOURCES = sorted(path.name for kind in ("cpp", "cu") for path in (ROOT / "csrc").glob(f"*.{kind}"))


def headers(version: str) -> Path:
    """The folder ``include`` of a PyTorch. Skips the test where it cannot be fetched."""
    if version == INSTALLED:
        import torch

        return Path(torch.__path__[0]) / "include"
    kept = CACHE / version
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fetch(version, Path(folder))
            # Whole, or not at all: another process may be after the same.
            try:
                (Path(folder) / "torch/include").rename(kept)
            except OSError:
                assert kept.exists()
    return kept


def fetch(version: str, folder: Path) -> None:
    """Lay ``torch/include`` of a published wheel into the folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *PLATFORM]
    done = subprocess.run(
        [*command, f"--dest={folder}", f"torch=={version}"], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        *_, reason = done.stderr.strip().splitlines() or ["pip said nothing"]
        pytest.skip(f"the wheel of torch {version} could not be fetched: {reason}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])


def compiled(source: Path, include: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the compiler says. Nothing is optimized, and no machine code made for a GPU."""
    cuda = source.suffix == ".cu"
    options = ["-std=c++17", f"-I{ROOT / 'csrc'}"]
    options += [f"-I{path}" for path in (include, include / "torch/csrc/api/include", sysconfig.get_path("include"))]
    if cuda:
        kind = [str(NVCC), "-c", "-G", "-gencode=arch=compute_90,code=compute_90", "-o", str(folder / "kernel.o")]
    else:
        kind = [str(COMPILER), "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-psabi"]
    return subprocess.run([*kind, *options, str(source)], capture_output=True, text=True, timeout=1800)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("version", [*PUBLISHED, INSTALLED])
def test_the_sources_compile(version: str, source: str, tmp_path: Path) -> None:
    tool, name = (NVCC, "nvcc") if source.endswith(".cu") else (COMPILER, "C++ compiler")
    if tool is None:
        pytest.skip(f"there is no {name}")
    done = compiled(ROOT / "csrc" / source, headers(version), tmp_path)
    assert done.returncode == 0, done.stderr[:5000]


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_code_that_would_see_more_than_the_stable_abi_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text('#include <torch/csrc/stable/tensor.h>\n#include "common.h"\n')
    done = compiled(source, headers(INSTALLED), tmp_path)
    assert done.returncode != 0 and "stable_abi.h comes before PyTorch's headers" in done.stderr


def test_the_oldest_one_is_the_one_that_is_promised() -> None:
    (requirement,) = pyproject()["project"]["dependencies"]
    promised = re.fullmatch(r"torch>=(\d+)\.(\d+)", requirement)
    assert promised is not None
    major, minor = map(int, promised.groups())
    assert PUBLISHED[0] == f"{major}.{minor}.0"
    text = (ROOT / "csrc/stable_abi.h").read_text()
    assert f"#define TORCH_TARGET_VERSION 0x{major:02x}{minor:02x}000000000000\n" in text
