"""Clocks of the benchmark harness: what is called when, and what is counted. No test looks at how fast anything was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_preference_loss, measure, registry, suite
from benchmarks.problem import Case

CPU = torch.device("cpu")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short samples."""
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 0.0)
    monkeypatch.setattr(measure, "SETTLING", 0.0)


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


def test_calls_take_the_copies_in_turn_and_a_backward_those_of_its_forward() -> None:
    case = Case("preference_loss", "tiny", (2, 6, 5), 3, 1, torch.float32)
    problems = [registry.OPS["preference_loss"](case, CPU) for _ in range(3)]
    for number, problem in enumerate(problems, 1):
        assert isinstance(problem, bench_preference_loss.PreferenceLossProblem)
        with torch.no_grad():
            problem.target.add_(number)  # so that their gradients differ
    expected = [torch.autograd.grad(problem.fused()[0], problem.leaves)[0] for problem in problems]
    for mode in ("backward", "full"):
        task = suite._task(problems, [problem.fused for problem in problems], "reference", mode)
        arguments = task.arguments(6)
        found = [task.call(*each)[0] for each in arguments]
        assert all(torch.equal(one, expected[k % 3]) for k, one in enumerate(found))


def test_footprint_counts_ops_that_work_and_the_memory_they_hold() -> None:
    x = torch.zeros(1000)
    found = measure.footprint(measure.Task(lambda: (x.view(10, 100).t() * 2 + 1).sum()), CPU)
    assert found.launches == 3  # a product, a sum, a reduction; the view is none
    assert 2 * 4000 <= found.peak_bytes < 3 * 4000
    assert measure.footprint(measure.Task(lambda: x + 1), CPU, visible=False).launches is None
