"""The rules of the house: where things live, who may import whom, what an import needs and costs."""

from __future__ import annotations

import graphlib
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastinvdpo
from fastinvdpo.ops import dispatch
from tests.layout import (
    EXAMPLES,
    PACKAGE,
    ROOT,
    Import,
    benchmark_modules,
    imports,
    module_name,
    modules,
    optional_dependencies,
    pyproject,
)

# From the bottom up: a room may import from itself and from the rooms of lower numbers.
LAYERS = {
    "errors": 0,
    "io": 1,
    "atomic": 0.5,
    "output": 1.5,
    "_extras": 1,
    "ops": 2,
    "diffusion": 3,
    "methods": 4,
    "data": 4.1,  # stands beside methods; knows no model
    "models": 4.2,  # stands beside methods; knows the geometry of its images
    "losses": 4.5,
    "config": 5,
    "": 6,  # fastinvdpo/__init__.py, and what is imported from it
    "trainer": 7,
    "evaluation": 8,
    "_triton": 0.4,
    "_benchmarks": 8.5,
    "_examples": 9,
    "doctor": 10,
    "cli": 12,
    "__main__": 13,
}
BESIDE_METHODS = {"data", "models"}
ABOVE = {"config", "trainer", "evaluation", "_examples", "doctor", "cli"}
IMPORT_NAMES = {"huggingface-hub": "huggingface_hub", "pillow": "PIL", "pyyaml": "yaml"}


def room_of(path: Path) -> str:
    """``ops`` for fastinvdpo/ops/philox.py, ``cli`` for fastinvdpo/cli.py, ``""`` for fastinvdpo/__init__.py."""
    if path.is_relative_to(EXAMPLES):
        return "_examples"
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def forbidden(found: Import) -> bool:
    """Whether a module of the package imports upwards, or across from a room to the one beside it."""
    here, there = room_of(found.where), found.module.split(".")[1] if "." in found.module else ""
    if here == "":  # re-exports only, and nothing that needs an extra
        return there in BESIDE_METHODS | ABOVE
    if {here, there} & BESIDE_METHODS and "methods" in {here, there}:
        return True
    return here != there and LAYERS[there] >= LAYERS[here]


def run_python(code: str, *arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_has_its_files_and_every_kernel_an_op() -> None:
    ops = {folder.name for folder in (PACKAGE / "ops").iterdir() if folder.is_dir() and any(folder.glob("*.py"))}
    assert ops == set(dispatch.IMPLEMENTED) == {"affine_step", "pair_statistics", "preference_loss", "token_log_probs"}
    files = [
        file
        for op in sorted(ops)
        for file in (
            *(f"fastinvdpo/ops/{op}/{name}.py" for name in ("__init__", "reference", "schema")),
            *(f"csrc/{op}.cpp", f"kernels/triton/{op}.py"),
            *((f"csrc/{op}.cu",) if "cuda" in dispatch.IMPLEMENTED[op] else ()),
            *(f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"),
        )
    ]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    patterns = {"csrc": ("*.cpp", "*.cu"), "kernels/triton": ("[!_]*.py",)}
    kernels = {path.stem for folder, found in patterns.items() for name in found for path in (ROOT / folder).glob(name)}
    assert kernels - {"module"} == ops
    for op, backends in dispatch.IMPLEMENTED.items():
        module = importlib.import_module(f"fastinvdpo.ops.{op}.schema")
        assert set(module._FORWARD) == set(backends)
        assert set(getattr(module, "_BACKWARD", backends)) == set(backends)


def test_imports_go_down_only() -> None:
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} <= set(LAYERS)
    paths = [*PACKAGE.rglob("*.py"), *EXAMPLES.rglob("*.py")]
    inside = [found for path in paths for found in imports(path) if found.top == "fastinvdpo"]
    assert len(inside) > 20
    assert [str(found) for found in inside if forbidden(found)] == []


def test_no_circles() -> None:
    """Also inside a room, and counting imports for types alone: a module can be read with what stands below it."""
    paths = [*modules(), *benchmark_modules()]
    graph = {module_name(path): {found.module for found in imports(path)} for path in paths}
    graph = {name: {found for found in targets if found in graph} - {name} for name, targets in graph.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("diffusion/schedule.py", "from fastinvdpo.methods import PairBatch", True),
        ("diffusion/schedule.py", "from ..methods import PairBatch", True),
        ("diffusion/schedule.py", "def f():\n    import fastinvdpo.trainer.trainer", True),
        ("ops/philox.py", "from .. import diffusion", True),
        ("methods/base.py", "from fastinvdpo.models import load_model", True),
        ("data/pairs.py", "from fastinvdpo.models.base import DiffusionModel", True),
        ("__init__.py", "from fastinvdpo.models import load_model", True),
        ("methods/pairs.py", "from fastinvdpo import diffusion", False),
        ("trainer/trainer.py", "from fastinvdpo import PairBatch, build_objective", False),
        ("ops/affine_step/schema.py", "from . import reference", False),
    ],
)
def test_the_rule_itself(file: str, line: str, wrong: bool) -> None:
    assert any(forbidden(found) for found in imports(PACKAGE / file, line)) == wrong


def test_below_the_models_there_is_torch_alone() -> None:
    """Nothing there knows a file format, a progress bar or a process group."""
    allowed = {"fastinvdpo", "torch"} | (
        sys.stdlib_module_names - {"json", "pickle", "sqlite3", "csv", "zipfile", "io"}
    )
    core = [path for path in PACKAGE.rglob("*.py") if room_of(path) not in BESIDE_METHODS | ABOVE | {"io", "output"}]
    found = [item for path in core for item in imports(path)]
    wrong = [item for item in found if item.top not in allowed or item.module.startswith("torch.distributed")]
    wrong = [item for item in wrong if (item.where.name, item.top) != ("inverse_scheduler.py", "diffusers")]
    assert [str(item) for item in wrong] == []


def test_kernels_models_and_data_know_no_progress_bar_and_no_process_group() -> None:
    found = [item for path in PACKAGE.rglob("*.py") if room_of(path) in BESIDE_METHODS for item in imports(path)]
    assert found
    wrong = [item for item in found if item.top in {"tqdm", "rich", "accelerate", "tensorboard"}]
    wrong += [item for item in found if item.module.startswith(("torch.distributed", "torch.utils.tensorboard"))]
    kernels = [item for path in (ROOT / "kernels").rglob("*.py") for item in imports(path)]
    wrong += [item for item in kernels if item.top == "fastinvdpo" and "fastinvdpo._triton" not in item.module]
    assert [str(item) for item in wrong] == []


def test_everything_imported_is_declared() -> None:
    declared = {IMPORT_NAMES.get(name, name) for name in set().union(*optional_dependencies().values())}
    known = declared | {"fastinvdpo", "torch", "triton"} | sys.stdlib_module_names
    assert [str(found) for path in modules() for found in imports(path) if found.top not in known] == []
    assert pyproject()["project"]["dependencies"] == ["torch>=2.10"]


def test_importing_fastinvdpo_imports_torch_alone_and_leaves_cuda_alone() -> None:
    code = """
import json, sys
import torch
def refuse(*arguments, **options):
    raise AssertionError("import fastinvdpo looked at CUDA")
torch.cuda._lazy_init = torch.cuda.init = torch.cuda.is_available = torch.cuda.device_count = refuse
before = set(sys.modules)
import fastinvdpo
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    new = set(json.loads(run_python(code)))
    assert "fastinvdpo" in new
    assert new - sys.stdlib_module_names <= {"fastinvdpo", "torch"}


REFUSE = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(name + " is not installed, says the test", name=name)
sys.meta_path.insert(0, Refuse())
import fastinvdpo
from fastinvdpo.errors import MissingExtra
"""


def test_every_module_without_its_extra_imports_or_says_which_one() -> None:
    # The commands are private to cli/__init__.py, which imports typer first: tests/test_cli.py is about that.
    paths = [path for path in PACKAGE.rglob("*.py") if room_of(path) != "cli" or path.name == "__init__.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    missing = [IMPORT_NAMES.get(name, name) for name in optional_dependencies()["train"]]
    code = """
for name in sys.argv[1].split(","):
    try:
        importlib.import_module(name.removesuffix(".__init__"))
    except MissingExtra as error:
        assert "pip install 'fastinvdpo[train]'" in str(error), error
        print("said so:", name)
    except ModuleNotFoundError as error:
        print("bare:", name, error)
"""
    lines = run_python(REFUSE + code, ",".join(sorted(names)), ",".join(missing)).splitlines()
    assert [line for line in lines if line.startswith("bare:")] == []
    assert lines  # the refusal works: some module does need its extra


def test_loading_a_model_without_diffusers_names_the_extra() -> None:
    code = """
from fastinvdpo.models import load_model
try:
    load_model("stable-diffusion", "model")
except MissingExtra as error:
    assert "'diffusers'" in str(error) and "pip install 'fastinvdpo[train]'" in str(error), error
else:
    raise AssertionError("a model was loaded without diffusers")
"""
    run_python(REFUSE + code, "", "diffusers")


def test_versions_agree() -> None:
    assert fastinvdpo.__version__ == pyproject()["project"]["version"]
    assert f"## {fastinvdpo.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_file_with_tests_is_run() -> None:
    """By its name, by ``make test-deep``, or by another test, in an interpreter of its own."""
    started = (ROOT / "Makefile").read_text() + (ROOT / "tests/kernels/interpreted.py").read_text()
    files = [file for file in (ROOT / "tests").rglob("*.py") if not file.name.startswith("test_")]
    holding = [file.name for file in files if re.search(r"^ *def test_", file.read_text(), re.MULTILINE)]
    assert holding
    assert [name for name in holding if name not in started] == []


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} | {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
    assert not (ROOT / "kernels/__init__.py").exists()


# The versions that `make` installs, .ci/constraints.txt, are of what pyproject.toml requires, on every Python.

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Each build of PyTorch brings its own.
FREE = {"torch", "triton"}


def constraints() -> list[Requirement]:
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def holds(requirement: Requirement, python: str) -> bool:
    """Whether it counts for that Python on Linux."""
    there = {"python_version": python, "python_full_version": f"{python}.4", "sys_platform": "linux", "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(there)


def needed(python: str) -> Iterator[Requirement]:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["train"], *extras["dev"]]:
        requirement = Requirement(text)
        if holds(requirement, python):
            yield requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_one_version_of_every_package_is_pinned(python: str) -> None:
    pinned: dict[str, str] = {}
    for constraint in constraints():
        assert re.fullmatch(r"==[\w.]+", str(constraint.specifier)), constraint
        if holds(constraint, python):
            assert constraint.name not in pinned, constraint
            pinned[canonicalize_name(constraint.name)] = str(constraint.specifier).removeprefix("==")
    assert not FREE & pinned.keys()
    assert [name for name in pinned if name.startswith(("nvidia-", "cuda-"))] == []
    for requirement in needed(python):
        if requirement.name not in FREE:
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}: make constraints"


def test_every_requirement_has_a_lower_bound_that_can_be_tried() -> None:
    """`make test-oldest` installs exactly these."""
    bounded = {
        requirement.name: {clause.operator for clause in requirement.specifier} for requirement in needed("3.10")
    }
    assert [name for name, operators in bounded.items() if not operators & {">=", "=="}] == []
