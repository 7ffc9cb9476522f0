"""The rules of the house: where things live, who may import whom, what an import needs and costs."""

from __future__ import annotations

import graphlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
IMPORT_NAMES = {"huggingface-hub": "huggingface_hub", "pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}


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


# One op, one name


def op_names() -> set[str]:
    return {folder.name for folder in (PACKAGE / "ops").iterdir() if folder.is_dir() and any(folder.glob("*.py"))}


def test_every_op_has_its_rooms() -> None:
    assert op_names() == set(dispatch.IMPLEMENTED) == {"affine_step", "pair_statistics", "preference_loss"}
    rooms = [
        room
        for op in sorted(op_names())
        for room in (
            *(f"fastinvdpo/ops/{op}/{name}.py" for name in ("__init__", "reference", "schema")),
            *(f"csrc/{op}.cpp", f"csrc/{op}.cu", f"kernels/triton/{op}.py"),
            *(f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"),
        )
    ]
    assert [room for room in rooms if not (ROOT / room).is_file()] == []


def test_every_kernel_belongs_to_an_op() -> None:
    kernels = [
        *(ROOT / "csrc").glob("*.cpp"),
        *(ROOT / "csrc").glob("*.cu"),
        *(ROOT / "kernels/triton").glob("[!_]*.py"),
    ]
    assert {path.stem for path in kernels} - {"module"} == op_names()


def test_every_backend_of_an_op_has_a_kernel() -> None:
    for op, backends in dispatch.IMPLEMENTED.items():
        module = importlib.import_module(f"fastinvdpo.ops.{op}.schema")
        assert set(module._FORWARD) == set(backends)
        assert set(getattr(module, "_BACKWARD", backends)) == set(backends)


@pytest.mark.parametrize("op", sorted(dispatch.IMPLEMENTED))
def test_every_op_is_registered_with_a_fake_and_a_backward(op: str) -> None:
    import torch

    for name in (op, f"{op}_backward"):
        overload = getattr(torch.ops.fastinvdpo, name).default
        assert torch._library.simple_registry.singleton.find(overload.name()).fake_impl.kernel is not None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastinvdpo::{op}", "Autograd")


# Imports go down only


def test_every_module_has_a_layer() -> None:
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} <= set(LAYERS)


def test_imports_go_down_only() -> None:
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
        ("ops/philox.py", "from fastinvdpo import diffusion", True),
        ("ops/philox.py", "from .. import diffusion", True),
        ("methods/base.py", "from fastinvdpo import PairBatch", True),
        ("methods/base.py", "from fastinvdpo.models import load_model", True),
        ("models/base.py", "from fastinvdpo.methods import PairBatch", True),
        ("data/pairs.py", "from fastinvdpo.models.base import DiffusionModel", True),
        ("__init__.py", "from fastinvdpo.models import load_model", True),
        ("trainer/trainer.py", "from fastinvdpo.evaluation import sampling", True),
        ("methods/pairs.py", "from fastinvdpo import diffusion", False),
        ("trainer/trainer.py", "from fastinvdpo import PairBatch, build_objective", False),
        ("ops/affine_step/schema.py", "from . import reference", False),
        ("models/base.py", "from fastinvdpo.diffusion.schedule import NoiseSchedule", False),
    ],
)
def test_the_rule_itself(file: str, line: str, wrong: bool) -> None:
    assert any(forbidden(found) for found in imports(PACKAGE / file, line)) == wrong


def test_kernels_import_nothing_of_the_package() -> None:
    found = [item for path in (ROOT / "kernels").rglob("*.py") for item in imports(path)]
    assert [
        str(item) for item in found if item.top == "fastinvdpo" and not item.module.startswith("fastinvdpo._triton")
    ] == []


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


def test_models_and_data_know_no_progress_bar_and_no_process_group() -> None:
    found = [item for path in PACKAGE.rglob("*.py") if room_of(path) in BESIDE_METHODS for item in imports(path)]
    assert found
    wrong = [item for item in found if item.top in {"tqdm", "rich", "accelerate", "tensorboard"}]
    wrong += [item for item in found if item.module.startswith(("torch.distributed", "torch.utils.tensorboard"))]
    assert [str(item) for item in wrong] == []


# Dependencies


def test_everything_imported_is_declared() -> None:
    declared = {IMPORT_NAMES.get(name, name) for name in set().union(*optional_dependencies().values())}
    known = declared | {"fastinvdpo", "torch", "triton"} | sys.stdlib_module_names
    assert [str(found) for path in modules() for found in imports(path) if found.top not in known] == []


def test_torch_is_the_only_dependency_without_an_extra() -> None:
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
    # The commands are private to cli/__init__.py, which asks for typer first; the next test is about that.
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


def test_the_command_line_without_its_extra_says_so() -> None:
    code = """
from fastinvdpo.cli import main
sys.exit(main(["demo"]) - 2)
"""
    done = subprocess.run(
        [sys.executable, "-c", REFUSE + code, "", "typer"], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "'typer'" in done.stderr and "pip install 'fastinvdpo[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_loading_a_model_without_diffusers_names_the_extra() -> None:
    code = """
from fastinvdpo._examples.digits.base import WEIGHTS
from fastinvdpo.models import load_model
try:
    load_model("digits", WEIGHTS / "clean")
except MissingExtra as error:
    assert "'diffusers'" in str(error) and "pip install 'fastinvdpo[train]'" in str(error), error
else:
    raise AssertionError("a model was loaded without diffusers")
"""
    run_python(REFUSE + code, "", "diffusers")


# Packaging


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
