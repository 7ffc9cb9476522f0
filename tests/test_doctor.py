"""The doctor: what it reports, that it notices wrong results, that it needs torch alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import fastinvdpo
from fastinvdpo import doctor
from fastinvdpo.ops import dispatch
from tests.test_house import REFUSE, run_python


def test_report_is_complete_and_fits_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fastinvdpo"] == fastinvdpo.__version__
    assert report["torch"] == torch.__version__
    assert report["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert report["devices"][0]["type"] == "cpu"
    assert report["cuda"]["available"] or report["cuda"]["reason"]
    for op in dispatch.IMPLEMENTED:
        found = report["backends"][op]["cpu"]
        assert found["chosen"] not in {**found["unavailable"], **found["skipped"]}
        told = {found["chosen"], "reference", *found["unavailable"], *found["skipped"]}
        assert told == set(dispatch.BACKENDS) and not set(found["unavailable"]) & set(found["skipped"])
        assert all(found["unavailable"].values()) and all(found["skipped"].values())
    ran = {(check["op"], check["device"], check["backend"], check["dtype"]) for check in report["checks"]}
    for op, backends in dispatch.IMPLEMENTED.items():
        able = [name for name in backends if dispatch.unavailable(op, name, "cpu") is None]
        assert {(op, "cpu", name, dtype) for name in able for dtype in ("float32", "bfloat16")} <= ran
    assert report["healthy"] is True


def test_the_text_has_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(doctor._CHECKS) == set(dispatch.IMPLEMENTED)
    monkeypatch.setattr(doctor.native, "fault", lambda: "NATIVE KERNELS MISSING: a reason, says the test")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    for op in dispatch.IMPLEMENTED:
        assert f"{op} on cpu: {dispatch.choose(op, 'cpu')}" in text
        assert f"ok  {op} on cpu, reference, float32: error" in text
        assert "    cannot run cuda: cuda kernels run on cuda tensors" in text
    *_, warning, verdict = text.splitlines()
    assert verdict == "Healthy."
    assert warning.startswith("WARNING: NATIVE KERNELS MISSING: a reason, says the test. ")


def test_what_auto_skips_is_told_apart_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every kernel can run."""
    monkeypatch.setattr(dispatch, "unavailable", lambda op, backend, device_type, float64=False: None)
    monkeypatch.setattr(dispatch, "choose", lambda op, device_type: "reference")
    monkeypatch.setattr(doctor, "_run_check", lambda *arguments: {"passed": True, "arguments": arguments})
    report = doctor.report()
    for op in dispatch.IMPLEMENTED:
        found = report["backends"][op]["cpu"]
        assert set(found["skipped"]) == {"cuda", "triton"} and found["unavailable"] == {}
        assert found["skipped"]["cuda"] == dispatch.UNPROVEN["cuda"]
        checked = [arguments[3] for check in report["checks"] if (arguments := check["arguments"])[0] == op]
        # A kernel that breaks the device must not hide that others were right.
        assert list(dict.fromkeys(checked)) == ["reference", "native", "triton", "cuda"]
    text = doctor.render({**report, "checks": []})
    assert f"    auto skips cuda: {dispatch.UNPROVEN['cuda']}\n" in text


@pytest.mark.parametrize(
    ("nvcc", "torch_cuda", "told"),
    [("13.0", "12.8", True), ("13.1", "13.0", False), ("12.8", "13.0", False), ("13.0", None, False)],
)
def test_kernels_that_need_a_newer_driver_than_torch_are_told(
    nvcc: str, torch_cuda: str | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.native, "fault", lambda: None)
    monkeypatch.setattr(doctor.native, "build_info", lambda: {"cuda": True, "nvcc": nvcc})
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    needed = f"built by nvcc {nvcc} and need a driver for CUDA 13, which this PyTorch, built for CUDA {torch_cuda},"
    warnings = doctor._warnings()
    assert [needed in warning for warning in warnings] == ([True] if told else [])


def test_missing_and_old_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, not by letter, and whatever build of it is installed."""
    needed = [
        *(
            "torch>=2.10",
            'peft>=0.18; extra == "train"',
            'ruff==0.17.*; extra == "dev"',
            'mkdocs-material==9.*; extra == "docs"',
            'rich>=14.0; extra == "train"',
        ),
        *('typer>=0.20; extra == "train"', 'xformers; extra == "xformers"'),
    ]
    installed = {"torch": "2.9.1+cpu", "peft": "0.18.0", "rich": "13.9.4"}
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(doctor, "_version", installed.get)
    report = doctor.report()
    assert report["extras"] == {
        "train": {"peft": "0.18.0", "rich": "13.9.4", "typer": None},
        "xformers": {"xformers": None},
    }
    assert report["too_old"] == {"torch": "2.10", "rich": "14.0"}
    text = doctor.render({**report, "checks": []})
    assert "train: missing typer: pip install 'fastinvdpo[train]'" in text
    assert "xformers: missing xformers: pip install 'fastinvdpo[xformers]'" in text
    assert "  rich is older than 14.0: pip install 'rich>=14.0'" in text


@pytest.mark.parametrize("wrong", [1e-5, float("nan")])
def test_a_wrong_result_is_noticed(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fastinvdpo.affine_step
    monkeypatch.setattr(
        fastinvdpo, "affine_step", lambda first, *rest: right(first, *rest) + wrong * (first.dtype != torch.float64)
    )
    assert doctor.main(["--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    # Half precision cannot tell so small an error from its rounding.
    checks = {(check["op"], check["passed"]) for check in checks if check["dtype"] == "float32"}
    assert checks == {
        ("affine_step", False),
        ("pair_statistics", True),
        ("preference_loss", True),
        ("token_log_probs", True),
    }


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_gradient_is_noticed(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastinvdpo.preference_loss

    def scaled(policy: torch.Tensor, *arguments, **options):
        # The value of policy, exactly, with its gradient multiplied by ``wrong``; right in float64.
        factor = 1 if policy.dtype == torch.float64 else wrong
        return right(policy.detach() + (policy - policy.detach()) * factor, *arguments, **options)

    monkeypatch.setattr(fastinvdpo, "preference_loss", scaled)
    checks = [check for check in doctor.report()["checks"] if check["op"] == "preference_loss"]
    passed = [check["passed"] for check in checks if check["dtype"] == "float32"]
    assert passed and not any(passed)


def test_a_choice_that_cannot_run_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "affine_step on cpu: none: FASTINVDPO_BACKEND = 'cuda': cuda kernels run on cuda tensors" in text
    assert text.endswith("Not healthy: a check failed.\n")


def test_the_command_works_with_torch_alone() -> None:
    names = "diffusers transformers accelerate peft datasets pydantic typer rich yaml PIL pyarrow scipy"
    absent = {*names.split(), "matplotlib", "tensorboard", "safetensors", "triton", "numpy"}
    code = "from fastinvdpo.cli import main; sys.exit(main(['doctor', '--json']))"
    assert json.loads(run_python(REFUSE + code, "", ",".join(sorted(absent))))["healthy"] is True
    with pytest.raises(SystemExit) as end:
        doctor.main(["--jsno"])
    assert end.value.code == 2
