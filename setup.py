"""The packages that are installed, and the native extension; everything else stands in pyproject.toml.

FASTINVDPO_BUILD: ``auto`` (default) builds ``fastinvdpo._C`` where torch and a C++ compiler are there and installs pure
Python otherwise; ``0`` never builds; ``1`` fails where it cannot build. FASTINVDPO_CUDA: ``1`` builds the CUDA kernels,
``0`` does not; by default they are built where nvcc is found and torch was built for CUDA. Whether a GPU is visible
plays no part.
"""

import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup

CHOICE = os.environ.get("FASTINVDPO_BUILD", "auto")
if CHOICE not in ("auto", "0", "1"):
    raise SystemExit(f"FASTINVDPO_BUILD = {CHOICE!r}: is not known. Remedy: use auto, 0 or 1.")

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10


def obstacle() -> str | None:
    """Why the extension cannot be built here; None when it can."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported while building ({error}); install torch first and use --no-build-isolation"
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"


def extension():
    """The extension and its build command."""
    import torch
    from torch.utils import cpp_extension

    cuda = os.environ.get("FASTINVDPO_CUDA", "auto")
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    kernels = sorted(str(path) for path in Path("csrc").glob("*.cu"))
    with_cuda = bool(kernels) and (
        cuda == "1" or (cuda == "auto" and torch.version.cuda is not None and shutil.which("nvcc") is not None)
    )
    flags = [STABLE_ABI, f"-DFASTINVDPO_WITH_CUDA={int(with_cuda)}"]
    host = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    module = kind(
        "fastinvdpo._C",
        sources + (kernels if with_cuda else []),
        include_dirs=[str(Path("csrc").resolve())],
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        extra_compile_args={"cxx": host + flags, "nvcc": ["-O3", "-std=c++17", "-lineinfo", *flags]},
        optional=CHOICE == "auto",
    )
    return module, cpp_extension.BuildExtension


packages = find_packages(include=["fastinvdpo", "fastinvdpo.*"])
package_dir = {}
# Triton kernels live outside the package's folder. kernels/ itself must not become a package: it would shadow the one
# that diffusers imports.
if any(Path("kernels/triton").glob("*.py")):
    packages.append("fastinvdpo._triton")
    package_dir["fastinvdpo._triton"] = "kernels/triton"

options = {}
if CHOICE != "0":
    reason = obstacle()
    if reason is None:
        module, command = extension()
        options = {"ext_modules": [module], "cmdclass": {"build_ext": command}}
    elif CHOICE == "1":
        raise SystemExit(f"FASTINVDPO_BUILD = '1': the native extension cannot be built: {reason}.")
    else:
        print(f"fastinvdpo: installing without native kernels: {reason}.")

setup(packages=packages, package_dir=package_dir, **options)
