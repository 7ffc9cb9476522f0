"""The packages that are installed, and the native extension; everything else stands in pyproject.toml.

FASTINVDPO_BUILD: ``auto`` (default) builds ``fastinvdpo._C`` where torch and a C++ compiler are there and installs pure
Python otherwise; ``0`` never builds; ``1`` fails where it cannot build. FASTINVDPO_CUDA: ``1`` builds the CUDA kernels,
``0`` does not; by default they are built where nvcc is found and torch was built for CUDA. Whether a GPU is visible
plays no part. TORCH_CUDA_ARCH_LIST: the GPUs to build for, such as ``"8.0;9.0+PTX"``; by default those of ARCHITECTURES
that nvcc knows, the last with PTX for GPUs to come.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.errors import CompileError

CHOICE = os.environ.get("FASTINVDPO_BUILD", "auto")
CUDA = os.environ.get("FASTINVDPO_CUDA", "auto")
for variable, value in (("FASTINVDPO_BUILD", CHOICE), ("FASTINVDPO_CUDA", CUDA)):
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} = {value!r}: is not known. Remedy: use auto, 0 or 1.")
# What was asked for by name is built, or fails.
BY_NAME = next(
    (name for name, value in (("FASTINVDPO_BUILD", CHOICE), ("FASTINVDPO_CUDA", CUDA)) if value == "1"), None
)

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10
# One for each major version covers its minor ones; no kernel needs instructions of one architecture alone (9.0a).
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")


def obstacle() -> str | None:
    """Why the extension cannot be built here; None when it can."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported while building ({error}); install torch first and use --no-build-isolation"
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"


def nvcc_says(*arguments: str) -> str:
    """What nvcc prints."""
    done = subprocess.run(["nvcc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"nvcc {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def architecture_flags() -> list[str]:
    """nvcc's -gencode options."""
    known = nvcc_says("--list-gpu-code")
    default = ";".join(name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in known.split()) + "+PTX"
    flags = []
    for entry in re.split(r"[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or default):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number):
            remedy = "use numbers, as in '8.0;9.0+PTX'"
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry!r} is not an architecture. Remedy: {remedy}.")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_kernel(source: Path, folder: Path, include: list[str]) -> str:
    """The object file of a .cu file."""
    target = folder.resolve() / f"{source.stem}.cu.o"
    target.parent.mkdir(parents=True, exist_ok=True)
    options = ["-O3", "-std=c++17", "-lineinfo", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden", STABLE_ABI]
    options += [*architecture_flags(), *(f"-I{path}" for path in include)]
    nvcc_says("-c", str(source), "-o", str(target), *options)
    return str(target)


def runtime_folders() -> list[str]:
    """Where nvcc would look for CUDA's runtime, as it says when asked what it would do."""
    plan = nvcc_says("--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)
    return re.findall(r'-L"?([^"\s]+)', "".join(re.findall(r"LIBRARIES=(.*)", plan)))


def extension():
    """The extension and its build command."""
    import torch
    from torch.utils import cpp_extension

    found = shutil.which("nvcc") is not None
    kernels = sorted(Path("csrc").glob("*.cu"))
    with_cuda = bool(kernels) and (CUDA == "1" or (CUDA == "auto" and torch.version.cuda is not None and found))
    if with_cuda and not found:
        raise SystemExit("FASTINVDPO_CUDA = '1': there is no nvcc on PATH. Remedy: install the CUDA toolkit, or use 0.")

    class Build(cpp_extension.BuildExtension):
        """Compiles the CUDA kernels itself: PyTorch's own rules need a PyTorch with CUDA, and would name the objects of
        an op's .cpp and .cu alike. The kernels use PyTorch's C interface only, and CUDA's runtime comes along, so that
        the module loads beside any build of PyTorch. A build that nobody asked for by name may fail.
        """

        def build_extensions(self):
            try:
                super().build_extensions()
            except (
                Exception
            ) as error:  # PyTorch's rules raise what they like, and setuptools forgives its own errors only
                if BY_NAME is not None:
                    raise
                print(f"fastinvdpo: installing without native kernels: building them failed: {error}")

        def build_extension(self, ext):
            if with_cuda:
                ext.extra_objects += [compile_kernel(path, Path(self.build_temp), ext.include_dirs) for path in kernels]
                ext.library_dirs += runtime_folders()
                ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
            super().build_extension(ext)

    module = cpp_extension.CppExtension(
        "fastinvdpo._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        include_dirs=[str(Path("csrc").resolve())],
        depends=sorted(str(path) for path in [*Path("csrc").glob("*.h"), *kernels]),
        extra_compile_args=[
            *("-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi"),
            *(STABLE_ABI, f"-DFASTINVDPO_WITH_CUDA={int(with_cuda)}"),
        ],
        optional=BY_NAME is None,
    )
    return module, Build


# Kernels, benchmarks and examples are linked into the package's folder, so that they are installed with it. The map
# keeps an editable installation from putting the checkout itself on the path, where kernels/ would shadow the package
# of that name that diffusers looks for.
packages = find_packages(include=["fastinvdpo", "fastinvdpo.*"])
package_dir = {"fastinvdpo._triton": "kernels/triton"}

options = {}
if CHOICE != "0":
    reason = obstacle()
    if reason is None:
        module, command = extension()
        options = {"ext_modules": [module], "cmdclass": {"build_ext": command}}
    elif BY_NAME is not None:
        raise SystemExit(f"{BY_NAME} = '1': the native extension cannot be built: {reason}.")
    else:
        print(f"fastinvdpo: installing without native kernels: {reason}.")

setup(packages=packages, package_dir=package_dir, **options)
