"""The packages that are installed, and the native extension; everything else stands in pyproject.toml.

FASTINVDPO_BUILD: ``auto`` (default) builds ``fastinvdpo._C`` where torch and a C++ compiler are there and installs pure
Python otherwise; ``0`` never builds; ``1`` fails where it cannot build. FASTINVDPO_CUDA: ``1`` builds the CUDA kernels,
``0`` does not; by default they are built where nvcc is found and torch was built for CUDA. Whether a GPU is visible
plays no part. TORCH_CUDA_ARCH_LIST: the GPUs to build for, such as ``"8.0;9.0+PTX"``; by default those of ARCHITECTURES
that nvcc knows, the last with PTX for GPUs to come. Where ``auto`` cannot build, the reason is told, and left in the
package for fastinvdpo/ops/native.py to tell again.
"""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build_py import build_py
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

NOT_BUILT = "_not_built.txt"
# Without pip's cache, which would serve the pure wheel again.
REMEDY = (
    "FASTINVDPO_BUILD=1 pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir . "
    "builds them, or fails and shows why"
)
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


def leave_word(folder: Path, reason: str | None) -> None:
    """Say why a package has no extension, now and to whoever uses it; with None, take back what the last build said."""
    record = folder / NOT_BUILT
    if reason is None:
        record.unlink(missing_ok=True)
        return
    text = f"{reason}. Remedy: {REMEDY}"
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(text + "\n")
    banner = f"\n{'*' * 80}\nfastinvdpo: NATIVE KERNELS MISSING, pure Python is installed: {text}.\n{'*' * 80}\n"
    print(banner, file=sys.stderr, flush=True)
    # pip keeps to itself what a build that ends well has to say.
    if not sys.stderr.isatty():
        with suppress(OSError), open("/dev/tty", "w") as terminal:  # where there is a terminal
            terminal.write(banner)


def installed_folder(command: Command) -> Path:
    """Where a build command lays the package: an editable installation's is the source itself."""
    in_place = getattr(command, "inplace", False) or getattr(command, "editable_mode", False)
    return Path("fastinvdpo") if in_place else Path(command.build_lib) / "fastinvdpo"


class BuildPackage(build_py):
    """Leaves word of an obstacle, which is known before anything is compiled."""

    def run(self):
        super().run()
        leave_word(installed_folder(self), OBSTACLE)


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
    options = ["-O3", "-std=c++17", "-lineinfo", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    options += [*architecture_flags(), *(f"-I{path}" for path in include)]
    nvcc_says("-c", str(source), "-o", str(target), *options)
    return str(target)


def nvcc_release() -> str:
    """Such as 13.0: the version of CUDA's runtime that comes along."""
    return "".join(re.findall(r"release ([\d.]+)", nvcc_says("--version")))


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

        def run(self):
            folder, reason = installed_folder(self), None
            try:
                super().run()
            except Exception as error:  # PyTorch's rules raise what they like
                if BY_NAME is not None:
                    raise
                reason = f"building them failed ({error})"
            leave_word(folder, reason)

        def build_extension(self, ext):
            try:
                if with_cuda:
                    folder = Path(self.build_temp)
                    ext.extra_objects += [compile_kernel(path, folder, ext.include_dirs) for path in kernels]
                    ext.extra_compile_args.append(f'-DFASTINVDPO_NVCC="{nvcc_release()}"')
                    ext.library_dirs += runtime_folders()
                    ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
                super().build_extension(ext)
            except Exception as error:  # setuptools would forgive its own errors, and nobody would hear of them
                raise RuntimeError(error) from error

    module = cpp_extension.CppExtension(
        "fastinvdpo._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        include_dirs=[str(Path("csrc").resolve())],
        depends=sorted(str(path) for path in [*Path("csrc").glob("*.h"), *kernels]),
        extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi"],
        optional=BY_NAME is None,
    )
    return module, Build


# Kernels, benchmarks and examples are linked into the package's folder, so that they are installed with it. The map
# keeps an editable installation from putting the checkout itself on the path, where kernels/ would shadow the package
# of that name that diffusers looks for.
packages = find_packages(include=["fastinvdpo", "fastinvdpo.*"])
package_dir = {"fastinvdpo._triton": "kernels/triton"}

OBSTACLE = obstacle() if CHOICE != "0" else None
if OBSTACLE is not None and BY_NAME is not None:
    raise SystemExit(f"{BY_NAME} = '1': the native extension cannot be built: {OBSTACLE}.")
modules, commands = [], {"build_py": BuildPackage}
if CHOICE != "0" and OBSTACLE is None:
    module, commands["build_ext"] = extension()
    modules.append(module)

setup(packages=packages, package_dir=package_dir, ext_modules=modules, cmdclass=commands)
