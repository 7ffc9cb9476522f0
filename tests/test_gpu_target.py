"""``make test-gpu`` where there is no GPU: it says so and fails, and what it would run can be read."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastinvdpo.ops import dispatch
from tests.gpu import __main__ as target
from tests.gpu import sanitized
from tests.layout import ROOT, optional_dependencies
from tests.test_house import IMPORT_NAMES

OTHERS = {IMPORT_NAMES.get(name, name) for name in set().union(*optional_dependencies().values())}
OTHERS = OTHERS - {"numpy", "pytest", "triton"} | {"xdist", "typer"}


def test_without_a_gpu_it_fails_and_says_so() -> None:
    code = """
import sys
import torch
torch.cuda.is_available = lambda: False
from tests.gpu.__main__ import main
sys.exit(main([]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 1
    assert "nothing was tested: there is no GPU" in done.stderr


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[target.Part]]:
    """As if there were one; nothing is run, what would be is recorded. ``failing``: parts that fail."""
    ran: list[target.Part] = []

    def prepare(failing: tuple[tuple[str, str], ...] = (), unavailable: tuple[str, ...] = ()) -> list[target.Part]:
        def reason(op: str, backend: str, device_type: str, float64: bool = False) -> str | None:
            return "not here, says the test" if backend in unavailable else None

        def run(chosen: list[target.Part], jobs: int) -> list[tuple[target.Part, bool]]:
            ran.extend(chosen)
            return [(part, (part.backend, part.what) not in failing) for part in reversed(chosen)]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of the test")
        monkeypatch.setattr(dispatch, "unavailable", reason)
        monkeypatch.setattr(target, "find_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
        monkeypatch.setattr(target, "run", run)
        return ran

    return prepare


def test_everything_is_run_and_a_pass_names_the_line_to_delete(on_gpu, capsys: pytest.CaptureFixture[str]) -> None:
    ran = on_gpu()
    assert target.main(["--jobs", "18"]) == 0
    tests = [part for part in ran if "pytest" in part.command and not part.alone]
    assert len(tests) == 6 and all(part.command[part.command.index("-n") + 1] == "3" for part in tests)
    fused = ("ops", "kernels", "memcheck", "racecheck", "huge")
    assert sorted((part.backend, part.what) for part in ran) == sorted(
        [("all", "doctor"), ("all", "trainer"), ("reference", "ops")]
        + [(backend, what) for backend in ("triton", "cuda") for what in fused]
    )
    shown = capsys.readouterr().out
    assert all(f"{backend} passed everything: its line" in shown for backend in dispatch.UNPROVEN)


def test_every_file_it_names_exists_nothing_is_left_out_and_huge_tests_run_by_themselves() -> None:
    chosen = target.parts(None, [])
    named = {word for part in chosen for word in part.command if word.startswith("tests/")}
    assert len(named) == 5 and all((ROOT / name).exists() for name in named)
    assert {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")} <= {Path(name).name for name in named}
    assert [part.what for part in chosen if part.alone] == ["huge", "huge"] == [part.what for part in chosen[-2:]]
    kernels = [part.command for part in chosen if part.what == "kernels"]
    assert len(kernels) == 2 and all(f"not ({target.HUGE})" in command for command in kernels)


def test_what_fails_or_cannot_run_fails_the_whole(on_gpu, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu(failing=(("triton", "racecheck"),))
    assert target.main([]) == 1
    shown = capsys.readouterr().out
    assert "triton: racecheck       FAILED" in shown
    assert "triton passed everything" not in shown and "cuda passed everything" in shown

    on_gpu(unavailable=("cuda",))
    assert target.main([]) == 1
    shown = capsys.readouterr().out
    assert "cuda: kernels           NOT RUN: not here, says the test" in shown and "cuda passed everything" not in shown


def test_what_is_missing_fails_the_whole_and_is_named(
    on_gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran, find_spec = on_gpu(), importlib.util.find_spec
    monkeypatch.setattr(target, "find_sanitizer", lambda: None)
    assert target.main([]) == 1
    assert "cuda: memcheck          NOT RUN: there is no compute-sanitizer" in capsys.readouterr().out
    ran.clear()
    assert target.main(["--no-sanitizer"]) == 0
    assert not {"memcheck", "racecheck"} & {part.what for part in ran}
    assert "passed everything" not in capsys.readouterr().out  # it was not everything
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find_spec(name))
    assert target.main(["--no-sanitizer"]) == 1
    assert "all: trainer            NOT RUN: diffusers missing" in capsys.readouterr().out


def test_what_it_runs_imports_torch_triton_numpy_and_pytest_alone() -> None:
    """And what these stand on. The selection of huge tests finds all three."""
    files = [*target.PUBLIC, *target.ALONE["triton"], *target.ALONE["cuda"]]
    code = f"""
import sys
sys.modules |= dict.fromkeys({sorted(OTHERS)})  # as if they were not installed
import tests.gpu.__main__, tests.gpu.sanitized, fastinvdpo.doctor
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-k", {target.HUGE!r}, *{files}]))
"""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    collected = {line.rpartition("::")[2] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {"test_affine", "test_preference_loss", "test_more_elements_than_32_bits_count"}


def part(name: str, code: str, alone: bool = False) -> target.Part:
    return target.Part("test", name, [sys.executable, "-c", code], None, alone)


def test_parts_that_must_be_alone_come_last_and_nothing_is_left_of_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """Nor of what it started."""
    monkeypatch.setattr(target, "LONGEST", 2)
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    chosen = [
        part("passes", "print('whole')"),
        part("hangs", child),
        part("alone", "import sys; sys.exit(3)", alone=True),
    ]
    outcomes = list(target.run(chosen, 2))
    assert {each.what: passed for each, passed in outcomes} == {"passes": True, "hangs": False, "alone": False}
    assert outcomes[-1][0].what == "alone"
    shown = capfd.readouterr().out
    assert "stopped after 2 seconds" in shown
    pid = int(next(line for line in shown.splitlines() if line.isdecimal()))
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"  # killed; nobody has waited yet


def test_the_sanitizer_watches_a_plain_script_and_no_calls_of_the_driver() -> None:
    watched = [part.command for part in target.parts("compute-sanitizer", []) if part.what in target.TOOLS]
    assert len(watched) == 4
    for command in watched:
        assert "--report-api-errors=no" in command and "pytest" not in command
        assert command[-4:-1] == [sys.executable, "-m", "tests.gpu.sanitized"]


def test_its_launches_are_right_on_the_host() -> None:
    backend = "reference" if dispatch.unavailable("affine_step", "native", "cpu") else "native"
    command = [sys.executable, "-m", "tests.gpu.sanitized", backend, "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0 and "all 143 results are right" in done.stdout, done.stdout + done.stderr


def test_its_script_tells_wrong_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = sanitized.OPS.preference_loss_backward
    monkeypatch.setattr(sys, "argv", ["sanitized", "reference", "cpu"])
    monkeypatch.setattr(sanitized.OPS, "preference_loss_backward", lambda *given: right(*given) * (1 + 1e-3))
    monkeypatch.setattr(sanitized, "step", lambda *case: None)
    assert sanitized.main() == 1
    assert "loss (7, 3, (torch.float32" in capsys.readouterr().out
