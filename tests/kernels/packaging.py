"""What is built and installed, with and without a compiler, and that an installed wheel works by itself.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

import fastinvdpo
from tests.layout import PACKAGE, ROOT

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a build reads: building in the checkout would leave its traces there."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (".ci", "fastinvdpo", "kernels", "csrc", "benchmarks", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


def run_pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Verbose, or pip keeps to itself what a build that succeeds has to say.
    command = [sys.executable, "-m", "pip", *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTINVDPO_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**kept, **PIP, **environment})


def try_to_build(sources: Path, **environment: str) -> tuple[Path | None, str]:
    """The wheel, None when there is none, and what was said."""
    target = sources.parent / "wheels"
    done = run_pip(
        "wheel", "-v", "--no-deps", "--no-build-isolation", f"--wheel-dir={target}", str(sources), **environment
    )
    wheels = list(target.glob("*.whl"))
    assert len(wheels) == (done.returncode == 0), done.stdout + done.stderr
    return (wheels[0] if wheels else None), done.stdout + done.stderr


def build(sources: Path, **environment: str) -> Path:
    wheel, said = try_to_build(sources, **environment)
    assert wheel is not None, said
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def top_level(names: set[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


def extensions(names: set[str]) -> list[str]:
    return [name for name in names if name.endswith((".so", ".pyd"))]


DIST_INFO = f"fastinvdpo-{fastinvdpo.__version__}.dist-info"
PURE = f"fastinvdpo-{fastinvdpo.__version__}-py3-none-any.whl"


def test_a_pure_wheel_holds_the_package_and_nothing_else(sources: Path) -> None:
    wheel = build(sources, FASTINVDPO_BUILD="0")
    names = names_in(wheel)
    assert wheel.name == PURE and extensions(names) == []
    assert top_level(names) == {"fastinvdpo", DIST_INFO}
    assert f"{DIST_INFO}/licenses/LICENSE" in names
    modules = {path.relative_to(sources).as_posix() for path in (sources / "fastinvdpo").rglob("*.py")}
    for folder, linked in (("kernels/triton", "_triton"), ("benchmarks", "_benchmarks"), ("examples", "_examples")):
        found = (path.relative_to(sources / folder).as_posix() for path in (sources / folder).rglob("*.py"))
        modules |= {f"fastinvdpo/{linked}/{name}" for name in found}
    assert {"fastinvdpo/_triton/__init__.py", "fastinvdpo/_triton/_common.py"} <= modules
    assert {name for name in names if name.endswith(".py")} == modules
    assert not any("/results/" in name for name in names)
    data = {name for name in names if not name.endswith(".py") and not name.startswith(DIST_INFO)}
    assert data == {path.relative_to(ROOT).as_posix() for path in (PACKAGE / "presets").glob("*")}
    assert wheel.stat().st_size < 3_000_000

    report = installed_doctor(wheel)
    assert report["native"] is None and report["warnings"] == []
    for kinds in report["backends"].values():
        assert kinds["cpu"]["chosen"] == "reference"
        assert "fastinvdpo._C was not built" in kinds["cpu"]["unavailable"]["native"]


def installed_doctor(wheel: Path) -> dict:
    """Install the wheel alone into a folder and ask its command ``fastinvdpo doctor`` there."""
    target = wheel.parent / "installed"
    done = run_pip("install", "--no-deps", f"--target={target}", str(wheel))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in target.iterdir()} == {"fastinvdpo", DIST_INFO, "bin"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTINVDPO_")}
    # torch from where this process has it; without `site`, which would bring an editable installation of the checkout.
    paths = [str(target), *(path for path in sys.path if path and Path(path) != ROOT)]
    environment = {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def output(*arguments: str) -> str:
        command = [sys.executable, "-S", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=target, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = output("-c", "import fastinvdpo; print(fastinvdpo.__file__)")
    assert Path(where.strip()).is_relative_to(target)
    report = json.loads(output(str(target / "bin/fastinvdpo"), "doctor", "--json"))
    assert report["healthy"] is True and report["fastinvdpo"] == fastinvdpo.__version__
    return report


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_with_a_compiler_the_wheel_runs_native_kernels(sources: Path) -> None:
    wheel = build(sources, FASTINVDPO_BUILD="1", FASTINVDPO_CUDA="0")
    names = names_in(wheel)
    assert wheel.name != PURE and top_level(names) == {"fastinvdpo", DIST_INFO}
    (extension,) = extensions(names)
    assert extension.startswith("fastinvdpo/_C.")
    report = installed_doctor(wheel)
    assert report["native"]["cuda"] is False and report["warnings"] == []
    assert re.fullmatch(r"2\.\d+\.\d+", report["native"]["torch"])
    ran = {(check["op"], check["backend"]) for check in report["checks"] if check["device"] == "cpu"}
    for op, kinds in report["backends"].items():
        assert kinds["cpu"]["chosen"] == "native" and (op, "native") in ran


NO_COMPILER = "there is no C++ compiler"


@pytest.mark.parametrize(("variable", "value"), [("CXX", "/nonexistent/c++"), ("PATH", "/nonexistent")])
def test_without_a_compiler_pure_python_is_installed_and_the_reason_told(
    variable: str, value: str, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    wheel, said = try_to_build(sources, **{variable: value})
    assert wheel is not None and wheel.name == PURE and extensions(names_in(wheel)) == []
    assert f"fastinvdpo: NATIVE KERNELS MISSING, pure Python is installed: {NO_COMPILER}" in said
    (warning,) = installed_doctor(wheel)["warnings"]
    assert "NATIVE KERNELS MISSING" in warning and NO_COMPILER in warning and "Remedy: " in warning


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"FASTINVDPO_BUILD": "1"}, f"FASTINVDPO_BUILD = '1': the native extension cannot be built: {NO_COMPILER}"),
        ({"FASTINVDPO_CUDA": "1"}, f"FASTINVDPO_CUDA = '1': the native extension cannot be built: {NO_COMPILER}"),
        ({"FASTINVDPO_BUILD": "yes"}, "FASTINVDPO_BUILD = 'yes': is not known. Remedy: use auto, 0 or 1"),
        ({"FASTINVDPO_CUDA": "yes"}, "FASTINVDPO_CUDA = 'yes': is not known. Remedy: use auto, 0 or 1"),
        pytest.param(
            {"FASTINVDPO_CUDA": "1", "CXX": str(COMPILER), "PATH": "/nonexistent"},
            "FASTINVDPO_CUDA = '1': there is no nvcc on PATH. Remedy: install the CUDA toolkit, or use 0.",
            marks=pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER),
        ),
    ],
)
def test_what_was_asked_for_by_name_is_built_or_fails(environment: dict[str, str], problem: str, sources: Path) -> None:
    wheel, said = try_to_build(sources, **{"CXX": "/nonexistent/c++", **environment})
    assert wheel is None and problem in said


def test_a_compiler_that_fails_leaves_pure_python_unless_asked_for(sources: Path) -> None:
    broken = shutil.which("false")
    assert broken is not None
    wheel, said = try_to_build(sources, CXX=broken)
    assert wheel is not None and extensions(names_in(wheel)) == [], said
    assert "fastinvdpo: NATIVE KERNELS MISSING, pure Python is installed: building them failed (" in said
    assert "fastinvdpo/_not_built.txt" in names_in(wheel)
    wheel.unlink()
    wheel, said = try_to_build(sources, CXX=broken, FASTINVDPO_BUILD="1")
    assert wheel is None and broken in said
    # A later build takes back what an earlier one said.
    assert "fastinvdpo/_not_built.txt" not in names_in(build(sources, FASTINVDPO_BUILD="0"))


def test_what_is_missing_reaches_the_terminal_of_a_plain_installation(sources: Path, tmp_path: Path) -> None:
    """pip shows nothing of a build that ends well, and a build in isolation finds no torch."""
    options = ("--no-deps", "--no-build-isolation", f"--target={tmp_path / 'installed'}")
    code, said = in_a_terminal([sys.executable, "-m", "pip", "install", *options, str(sources)], CXX="/nonexistent/c++")
    assert code == 0, said
    assert "Successfully installed fastinvdpo" in said
    assert "fastinvdpo: NATIVE KERNELS MISSING, pure Python is installed: " + NO_COMPILER in said


def in_a_terminal(command: list[str], **environment: str) -> tuple[int, str]:
    """The exit status and what a person would see."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(command[0], command, {**os.environ, **PIP, **environment})
    seen = b""
    with suppress(OSError):  # the terminal is gone when its last process is
        while piece := os.read(terminal, 4096):
            seen += piece
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), seen.decode()


def another_python() -> str | None:
    """An interpreter of another version than this, with its headers: on PATH, or installed beside this one."""
    minors = [minor for minor in (13, 12, 11, 10) if minor != sys.version_info[1]]
    beside = Path(sys.base_prefix).parent
    candidates = [f"python3.{minor}" for minor in minors]
    candidates += [str(path) for minor in minors for path in beside.glob(f"*/bin/python3.{minor}")]
    ask = "import sysconfig; print(sysconfig.get_path('include'))"
    for name in filter(shutil.which, candidates):
        # A name on PATH may lead nowhere, as those of version managers do.
        done = subprocess.run([name, "-c", ask], capture_output=True, text=True)
        if done.returncode == 0 and Path(done.stdout.strip(), "Python.h").is_file():
            return name
    return None


OTHER = another_python()


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.skipif(OTHER is None, reason="there is no other Python with its headers")
def test_a_wheel_for_another_python_is_built_with_this_one(sources: Path) -> None:
    environment = {**os.environ, "FASTINVDPO_CUDA": "0"}
    command = [sys.executable, str(sources / ".ci/wheels.py"), str(OTHER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    tag = str(OTHER).rpartition("python")[2].replace(".", "")
    assert f"-cp{tag}-cp{tag}-" in wheel.name
    (extension,) = extensions(names_in(wheel))
    assert f"_C.cpython-{tag}-" in extension
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(extension)
        assert f"Tag: cp{tag}-cp{tag}-" in archive.read(f"{DIST_INFO}/WHEEL").decode()
    # pybind11 keeps the version that it was compiled for, to refuse others.
    assert f"3.{tag[1:]}\0".encode() in content and f"3.{sys.version_info[1]}\0".encode() not in content


@pytest.mark.parametrize("python", ["/nonexistent/python3.12", shutil.which("false")])
def test_an_interpreter_that_does_not_run_is_named(python: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / ".ci/wheels.py"), python], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"PYTHONS: {python!r} does not run: ")
