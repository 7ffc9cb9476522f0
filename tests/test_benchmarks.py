"""The benchmark harness: what it says is true of what it measured. No test looks at how fast anything was."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_affine_step, bench_preference_loss, measure, registry, report, results, run, suite
from benchmarks.problem import Case, Problem
from fastinvdpo import InvalidInput, PreferenceLoss, cli
from fastinvdpo.ops import dispatch, preference_loss
from tests.layout import ROOT, optional_dependencies
from tests.test_house import IMPORT_NAMES

CPU = torch.device("cpu")
PROVIDERS = (
    "eager",
    "reference",
    *(["native"] if dispatch.unavailable("affine_step", "native", "cpu") is None else []),
)
OPS = [
    ("affine_step", 1),
    ("pair_statistics", 1),
    ("preference_loss", 1),
    ("preference_loss", 4),
    ("token_log_probs", 1),
]


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


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize(("op", "timesteps"), OPS)
def test_every_provider_is_right_at_tiny_sizes(op: str, timesteps: int, dtype: torch.dtype, quickly: None) -> None:
    rows = measured(tiny(op, timesteps, dtype))
    assert set(rows) == set(PROVIDERS)
    assert all(row["correct"] for row in rows.values()), rows
    assert all(row["speedup"]["eager"] > 0 for row in rows.values())


def test_the_released_formula_and_the_op_agree_in_float64() -> None:
    """So what the other tests call an error is one."""
    for op, timesteps in OPS:
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


def with_fused(monkeypatch: pytest.MonkeyPatch, change: Callable[[PreferenceLoss], Tensor]) -> None:
    """Backends but the reference return a loss that is changed."""

    def changed(*arguments: Any, **options: Any) -> PreferenceLoss:
        result = preference_loss(*arguments, **options)
        if dispatch.requested()[1] == "reference":
            return result
        return PreferenceLoss(change(result), result.margin, result.policy_mse, result.reference_mse)

    monkeypatch.setattr(bench_preference_loss, "preference_loss", changed)
    monkeypatch.setattr(
        registry, "context", lambda name: dispatch.use_backend("reference" if name == "reference" else "auto")
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
    with registry.context("triton"):  # what auto skips is timed by name
        assert dispatch.requested() == ("use_backend", "triton")
    assert result["skipped"] == [{"case": f"{tiny()}, compile", "reason": "RuntimeError: no compiler here"}]
    assert any("no compiler here" in note for note in report.notes(result))


def test_a_case_that_does_not_fit_or_would_begin_too_late_is_reported(
    monkeypatch: pytest.MonkeyPatch, quickly: None
) -> None:
    cases = [(tiny(), "full"), (tiny("affine_step"), "full")]
    result = run.run(cases, ["eager"], CPU, 0.0, limit=0.0)
    assert [skipped["reason"] for skipped in result["skipped"]] == ["0 seconds had passed"] * 2
    monkeypatch.setattr(suite, "free_memory", lambda device: registry.OPS["preference_loss"].needs(tiny()))
    result = run.run(cases[:1], ["eager"], CPU, 0.0)
    assert result["results"] == []
    assert result["skipped"][0]["case"] == str(tiny()) and "GiB are free" in result["skipped"][0]["reason"]


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
    plot = report.plot(result, path.with_suffix(".png"))
    assert plot is not None and plot.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "other.json").write_text('{"schema": 0}')
    for name in ("other.json", "missing.json"):
        with pytest.raises(InvalidInput, match="results = "):
            results.read(tmp_path / name)


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
    assert "eager 2.00x" in report.comparison(compared, result, old)


def test_tables_have_the_times_of_replays_where_there_are_any(result: dict[str, Any]) -> None:
    rows = result["results"][: len(PROVIDERS)]
    title, headers, *lines = "\n".join(report.tables(rows)).strip().splitlines()
    assert title == "preference_loss tiny pairs=3 K=1 float32 full" and "graph" not in headers
    assert [line.split()[0] for line in lines] == list(PROVIDERS)
    row = {**rows[0], "graph_milliseconds": {"median": rows[0]["milliseconds"]["median"] / 2, "p20": 1.0, "p80": 1.0}}
    (shown,) = report.tables([{**row, "percent_of_copy": 40.0}])
    assert "graph ms  graph % copy" in shown and " 80 " in shown


def test_every_case_is_listed_once_and_quick_is_a_part() -> None:
    everything = list(registry.everything())
    assert len(set(everything)) == len(everything)
    assert {case.op for case, _ in everything} == set(dispatch.IMPLEMENTED)
    for device_type in ("cpu", "cuda"):
        quick = list(registry.quick(device_type))
        assert len(set(quick)) == len(quick) and set(quick) < set(everything)
        cases = [case for case, _ in quick]
        assert len(set(cases)) == len([case for case, _ in groupby(cases)])  # the modes of a case stand together
    sizes = [case.elements * case.dtype.itemsize for case, _ in registry.quick("cuda")]
    assert sum(size >= 256e6 for size in sizes) > len(sizes) / 2
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
    for option, value in {
        "filter": "nothing",
        "providers": "magic",
        "device": "abacus",
        "compare": "none.json",
    }.items():
        assert cli.main([*arguments[:2], f"--{option}", value]) == 2
        assert f"error: {'results' if option == 'compare' else '--' + option}" in capfd.readouterr().err


def test_torch_alone_is_enough_and_every_case_is_kept_when_it_ends(tmp_path: Path) -> None:
    """Nothing but torch can be imported, and the process dies in the second case."""
    others = {IMPORT_NAMES.get(name, name) for name in set().union(*optional_dependencies().values())} - {"triton"}
    code = f"""
import os, sys
sys.modules |= dict.fromkeys({sorted(others)})  # as if they were not installed
from benchmarks import measure, registry, run
measure.SETTLING = measure.SHORTEST_SAMPLE = 0.0
run.Copy = lambda device: measure.Copy(device, 2**16)
registry.SHAPES = {{"sdxl": (1, 4, 4)}}
sys.argv[1:] = ["--quick", "--filter", "pairs=1 float32", "--seconds", "0.001", "--device", "cpu"]
sys.argv += ["--providers", "eager,reference", "--output", {str(tmp_path)!r}]
assert run.main() == 0
write = run.results.write
run.results.write = lambda *arguments: (write(*arguments), sys.stdout.flush(), os._exit(7))
run.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 7, done.stderr
    assert "[3/3] preference_loss sdxl pairs=1 K=1 float32" in done.stderr
    assert "the plot of the results needs the package 'matplotlib.figure'" in done.stdout and "Results: " in done.stdout
    assert not list(tmp_path.rglob("*.part"))
    kept = [len(results.read(path)["results"]) for path in sorted(tmp_path.rglob("*.json"))]
    assert kept == ([6, 2] if len(kept) == 2 else [2])  # one file where both runs began in the same second


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
    assert measure.percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


def test_replays_are_of_calls_that_were_loaded_and_given_their_arguments_before(
    quickly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of things, on a CPU: what a capture does not allow is done before it, and only replays are timed."""
    seen: list[str] = []

    class Graph:
        def replay(self) -> None:
            seen.append("replay")

    @contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        seen.append("(")
        yield
        seen.append(")")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    task = measure.Task(lambda given: seen.append("call"), prepare=lambda: seen.append("prepare"))
    samples = measure.replayed(task, 3, CPU)
    assert seen[:10] == ["prepare", "call", *["prepare"] * 3, "(", *["call"] * 3, ")"]
    assert set(seen[10:]) == {"replay"} and len(samples) == 7


def test_copies_of_inputs_exceed_the_cache_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 * 2**20))
    gpu = torch.device("cuda")
    assert [measure.copies(size, gpu) for size in (2**10, 2**24, 2**28)] == [measure.MOST_COPIES, 13, 1]
    assert measure.copies(2**10, CPU) == 1


def test_footprint_counts_ops_that_work_and_the_memory_they_hold() -> None:
    x = torch.zeros(1000)
    found = measure.footprint(measure.Task(lambda: (x.view(10, 100).t() * 2 + 1).sum()), CPU)
    assert found.launches == 3  # a product, a sum, a reduction; the view is none
    assert 2 * 4000 <= found.peak_bytes < 3 * 4000
    assert measure.footprint(measure.Task(lambda: x + 1), CPU, visible=False).launches is None
