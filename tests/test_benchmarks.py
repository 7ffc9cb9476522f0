"""The benchmark harness: what it says is true of what it measured. No test looks at how fast anything was."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_affine_step, bench_preference_loss, measure, registry, report, results, run, suite
from benchmarks.problem import Case, Problem
from fastinvdpo import InvalidInput, PreferenceLoss, _backend, cli
from fastinvdpo.ops import preference_loss

CPU = torch.device("cpu")
PROVIDERS = (
    "eager",
    "reference",
    *(["native"] if _backend.unavailable("affine_step", "native", "cpu") is None else []),
)


def tiny(op: str = "preference_loss", timesteps: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, "tiny", (2, 6, 5), 3, timesteps, dtype)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short samples, a small copy."""
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 0.0)
    monkeypatch.setattr(measure, "SETTLING", 0.0)
    monkeypatch.setattr(run, "Copy", lambda device: measure.Copy(device, 2**16))


def measured(case: Case, providers: tuple[str, ...] = PROVIDERS, mode: str = "full") -> dict[str, dict[str, Any]]:
    rows, reasons = suite.measure(case, [mode], providers, device=CPU, copy=measure.Copy(CPU, 2**16), seconds=0.0)
    assert reasons == {}
    return {row["provider"]: row for row in rows}


# Numbers


def test_percentiles() -> None:
    assert measure.percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))
    assert measure.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_tasks_take_turns_and_preparations_come_first(quickly: None) -> None:
    calls: list[str] = []
    tasks = {
        "a": measure.Task(lambda: calls.append("a")),
        "b": measure.Task(lambda given: calls.append(given), prepare=lambda: calls.append("p") or "b"),
    }
    samples = measure.interleaved(tasks, CPU, 0.0, rounds=20)
    assert {name: len(times) for name, times in samples.items()} == {"a": 20, "b": 20}
    # Each sample is a call off the clock and one on it.
    tries, rounds = "".join(calls[: 3 * 6]), "".join(calls[3 * 6 :])
    assert tries == "aa" * 3 + "ppbb" * 3
    orders = [rounds[start : start + 6] for start in range(0, len(rounds), 6)]
    assert len(orders) == 20
    assert set(orders) == {"aappbb", "ppbbaa"}
    assert all(time > 0 for times in samples.values() for time in times)


def test_on_the_cpu_a_task_settles_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SETTLING", 0.05)
    calls: list[float] = []
    measure.timed(measure.Task(lambda: calls.append(time.perf_counter())), 3, CPU)
    assert calls[-4] - calls[0] > 0.04


def test_footprint_counts_ops_that_work_and_the_memory_they_hold() -> None:
    x = torch.zeros(1000)
    found = measure.footprint(measure.Task(lambda: (x.view(10, 100).t() * 2 + 1).sum()), CPU)
    assert found.launches == 3  # a product, a sum, a reduction; the view is none
    assert 2 * 4000 <= found.peak_bytes < 3 * 4000
    assert measure.footprint(measure.Task(lambda: x + 1), CPU, visible=False).launches is None


# Problems


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize(("op", "timesteps"), [("affine_step", 1), ("preference_loss", 1), ("preference_loss", 4)])
def test_every_provider_is_right_at_tiny_sizes(op: str, timesteps: int, dtype: torch.dtype, quickly: None) -> None:
    rows = measured(tiny(op, timesteps, dtype))
    assert set(rows) == set(PROVIDERS)
    assert all(row["correct"] for row in rows.values()), rows
    assert all(row["speedup"]["eager"] > 0 for row in rows.values())


def test_the_released_formula_and_the_op_agree_in_float64() -> None:
    """So what the other tests call an error is one."""
    for op, timesteps in (("affine_step", 1), ("preference_loss", 1), ("preference_loss", 4)):
        problem = registry.OPS[op](tiny(op, timesteps, torch.float64), CPU)
        if isinstance(problem, bench_affine_step.AffineStepProblem):
            levels = torch.tensor([bench_affine_step.SOURCE, bench_affine_step.TARGET], dtype=torch.float64)
            problem.table = problem.exact.expand_as(problem.table)
            problem.arguments = (*problem.leaves, *levels)
        for outputs in (problem.fused(), problem.released(*problem.arguments)):
            gradients = torch.autograd.grad(outputs[0], problem.leaves, problem.cotangent)
            errors = {**problem.output_errors(outputs), "gradient": problem.gradient_error(gradients)}
            # The released order subtracts two means of about 1; at beta = 5000 that costs four digits of sixteen.
            assert max(errors.values()) < 1e-11, (op, errors)


def test_moved_bytes_are_those_of_the_tensors() -> None:
    row = measured(tiny(dtype=torch.bfloat16), ("eager",), "forward")["eager"]
    assert row["bytes"] == 3 * (2 * 3 * 2 * 6 * 5) * 2
    assert row["gbps"] == pytest.approx(row["bytes"] / row["milliseconds"]["median"] / 1e6)
    assert row["percent_of_copy"] == pytest.approx(100 * row["gbps"] / row["copy_gbps"])
    assert set(row["errors"]) == {"loss", "margin"}


# Wrong results


def with_fused(monkeypatch: pytest.MonkeyPatch, change: Callable[[PreferenceLoss], Tensor]) -> None:
    """Backends but the reference return a loss that is changed."""

    def changed(*arguments: Any, **options: Any) -> PreferenceLoss:
        result = preference_loss(*arguments, **options)
        if _backend.requested()[1] == "reference":
            return result
        return PreferenceLoss(change(result), result.margin, result.policy_mse, result.reference_mse)

    monkeypatch.setattr(bench_preference_loss, "preference_loss", changed)
    monkeypatch.setattr(
        registry, "context", lambda name: _backend.use_backend("reference" if name == "reference" else "auto")
    )
    monkeypatch.setattr(registry, "unavailable", lambda *arguments: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.loss * (1 + 1e-5),
        lambda result: result.loss.detach() + 0 * result.margin.sum(),
        lambda result: result.loss * math.nan,
    ],
    ids=["value", "gradient", "nan"],
)
def test_a_wrong_result_gets_no_speedup(
    change: Callable[[PreferenceLoss], Tensor], monkeypatch: pytest.MonkeyPatch, quickly: None
) -> None:
    with_fused(monkeypatch, change)
    rows = measured(tiny(), ("eager", "reference", "native"))
    assert [rows[name]["correct"] for name in ("eager", "reference", "native")] == [True, True, False]
    assert rows["native"]["speedup"] is None
    assert report.speedup(rows["native"], "eager") == "wrong result"
    assert report.speedup(rows["reference"], "eager").endswith("x")
    json.dumps(rows, allow_nan=False)


def test_errors_are_held_to_twice_plain_pytorch() -> None:
    problem = registry.OPS["preference_loss"](tiny(), CPU)
    errors = {"eager": {"gradient": 1e-2}, "reference": {"gradient": 1e-3}, "native": {"gradient": 1.9e-3}}
    errors["compile"] = errors["native"]
    limits = suite.allowed("native", errors, problem)
    assert limits == {"gradient": 2e-3}
    assert suite.is_correct(errors["native"], limits)
    assert not suite.is_correct({"gradient": 2.1e-3}, limits)
    assert not suite.is_correct({"gradient": math.inf}, {"gradient": math.inf})
    assert suite.allowed("compile", errors, problem) == {"gradient": 2e-2}
    # Where plain PyTorch happens to be exact, a rounding is still no mistake.
    errors["reference"] = {"gradient": 0.0}
    assert suite.allowed("native", errors, problem) == {"gradient": 4 * 2.0**-24}


# What cannot run


def test_a_provider_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, quickly: None) -> None:
    def broken(provider: str, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
        raise RuntimeError("no compiler here\nand a traceback")

    forward = registry.forward
    monkeypatch.setattr(
        registry, "forward", lambda name, problem: (broken if name == "compile" else forward)(name, problem)
    )
    result = run.run([(tiny(), "full")], ["eager", "compile", "triton"], CPU, 0.0)
    assert [row["provider"] for row in result["results"]] == ["eager"]
    assert "triton" in result["unavailable"]["preference_loss"]["triton"]
    assert result["skipped"] == [{"case": f"{tiny()}, compile", "reason": "RuntimeError: no compiler here"}]
    assert any("no compiler here" in note for note in report.notes(result))


def test_backends_that_auto_skips_are_timed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "unavailable", lambda *arguments: None)
    for name in ("triton", "cuda"):
        assert name in registry.PROVIDERS and registry.unavailable(name, "affine_step", torch.device("cuda")) is None
        with registry.context(name):
            assert _backend.requested() == ("use_backend", name)


def test_a_case_that_does_not_fit_is_skipped_and_told(monkeypatch: pytest.MonkeyPatch, quickly: None) -> None:
    case = tiny()
    monkeypatch.setattr(suite, "free_memory", lambda device: registry.OPS[case.op].needs(case))
    result = run.run([(case, "full")], ["eager"], CPU, 0.0)
    assert result["results"] == []
    assert result["skipped"][0]["case"] == str(case) and "GiB are free" in result["skipped"][0]["reason"]


# Files


@pytest.fixture
def result(quickly: None) -> dict[str, Any]:
    return run.run([(tiny(), "full"), (tiny("affine_step"), "forward")], PROVIDERS, CPU, 0.0)


def test_results_survive_the_file_and_hold_what_they_must(result: dict[str, Any], tmp_path: Path) -> None:
    path = results.write(result, tmp_path)
    assert path.parent == tmp_path / results.slug(result["device"]["name"])
    assert results.read(path) == json.loads(json.dumps(result))
    assert {"schema", "date", "commit", "device", "versions", "native", "copy_gbps", "results", "skipped"} <= set(
        result
    )
    assert result["versions"]["torch"] == torch.__version__
    assert result["commit"] is None or len(result["commit"]) == 40
    assert len(result["results"]) == 2 * len(PROVIDERS)
    for row in result["results"]:
        assert {*results.KEY, "shape", "samples", "peak_bytes", "launches", "errors", "allowed", "correct"} <= set(row)
        assert set(row["milliseconds"]) == {"median", "p20", "p80"}
    picture = report.plot(result, path.with_suffix(".png"))
    assert picture is not None and picture.read_bytes()[:4] == b"\x89PNG"


def test_compare_says_what_got_faster(result: dict[str, Any]) -> None:
    old = json.loads(json.dumps(result))
    for row in old["results"]:
        row["milliseconds"]["median"] *= 2
    old["results"][0]["correct"] = False
    del old["results"][-1]
    compared = results.compare(result, old)
    assert len(compared) == len(result["results"]) - 1
    assert compared[0]["ratio"] is None
    assert [row["ratio"] for row in compared[1:]] == pytest.approx([2.0] * (len(compared) - 1))
    assert results.summary(compared) == pytest.approx(dict.fromkeys(PROVIDERS, 2.0))
    assert "2.00x" in report.comparison(compared, result, old).caption


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"schema": 0}')
    for name in ("other.json", "missing.json"):
        with pytest.raises(InvalidInput, match="results = "):
            results.read(tmp_path / name)


# The command


def test_every_case_is_listed_once_and_quick_is_a_part() -> None:
    everything = list(registry.everything())
    assert len(set(everything)) == len(everything)
    assert {case.op for case, _ in everything} == set(_backend.IMPLEMENTED)
    assert set(registry.quick()) < set(everything)
    chosen = [case for case, mode in everything if registry.matches(case, mode, "sdxl pairs=(1|8) K=80 float32 full")]
    assert [(case.pairs, case.timesteps) for case in chosen] == [(1, 80), (8, 80)]


def test_the_command_measures_and_compares(
    monkeypatch: pytest.MonkeyPatch, quickly: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # The command runs the modules under the package's own name.
    from fastinvdpo._benchmarks import registry as installed
    from fastinvdpo._benchmarks import run as command

    monkeypatch.setattr(command, "Copy", lambda device: measure.Copy(device, 2**16))
    monkeypatch.setattr(installed, "SHAPES", {"sdxl": (1, 4, 4)})
    arguments = ["bench", "--quick", "--filter", "pairs=1 float32", "--seconds", "0.001", "--device", "cpu"]
    arguments += ["--providers", "eager,reference", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    (written,) = tmp_path.rglob("*.json")
    assert written.with_suffix(".png").is_file()
    assert cli.main([*arguments[:1], "--load", str(written), "--compare", str(written)]) == 0
    shown = capfd.readouterr().out
    assert "preference_loss sdxl pairs=1 K=1 float32 full" in shown and "geometric means: eager 1.00x" in shown
    for wrong in (
        ["--filter", "nothing"],
        ["--providers", "magic"],
        ["--device", "abacus"],
        ["--compare", "none.json"],
    ):
        assert cli.main([*arguments[:2], *wrong]) == 2
        assert f"error: {wrong[0]}" in (told := capfd.readouterr().err) or "error: results" in told
