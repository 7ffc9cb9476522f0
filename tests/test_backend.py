"""The backend choice: who asks, what is refused, what ``auto`` remembers."""

from __future__ import annotations

import threading

import pytest
import torch

import fastinvdpo
from fastinvdpo import _backend, _native
from fastinvdpo.errors import InvalidInput

OPS = sorted(_backend.IMPLEMENTED)


@pytest.fixture
def triton_exists(monkeypatch: pytest.MonkeyPatch):
    """As if affine_step had a Triton kernel."""
    monkeypatch.setitem(_backend.IMPLEMENTED, "affine_step", ("triton", "native", "reference"))
    _backend._select.cache_clear()
    yield
    _backend._select.cache_clear()


ON_CPU = "reference" if _native.unavailable() else "native"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
def test_auto_takes_the_best_and_there_is_a_reason_against_each_that_cannot_run(op: str, device_type: str) -> None:
    chosen = _backend.choose(op, device_type)
    assert chosen == (ON_CPU if device_type == "cpu" else "reference")
    reasons = {backend: _backend.unavailable(op, backend, device_type) for backend in _backend.BACKENDS}
    assert reasons.pop("reference") is None and reasons.pop(chosen, None) is None
    assert all(reasons.values())


def test_float64_is_for_the_reference_alone() -> None:
    assert _backend.choose("affine_step", "cpu", float64=True) == "reference"
    with _backend.use_backend("native"), pytest.raises(InvalidInput, match="compute in float32"):
        _backend.choose("affine_step", "cpu", float64=True)


def test_without_the_extension_the_reference_runs_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "unavailable", lambda: "the extension was not built, says the test")
    _backend._select.cache_clear()
    try:
        assert _backend.choose("affine_step", "cpu") == "reference"
        with _backend.use_backend("native"), pytest.raises(InvalidInput, match="not built, says the test"):
            _backend.choose("affine_step", "cpu")
    finally:
        _backend._select.cache_clear()


def test_auto_takes_the_best_that_fits_the_device(triton_exists: None) -> None:
    assert _backend.choose("affine_step", "cuda") == "triton"
    assert _backend.choose("affine_step", "cpu") == ON_CPU
    assert (
        _backend.unavailable("affine_step", "triton", "cpu") == "triton kernels run on cuda tensors, not on cpu tensors"
    )


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        _backend.use_backend(name),
        pytest.raises(InvalidInput, match=f"use_backend = '{name}'.*no {name} kernel for affine_step"),
    ):
        _backend.choose("affine_step", "cpu")
    monkeypatch.setenv(_backend.VARIABLE, name)
    with pytest.raises(InvalidInput, match=f"FASTINVDPO_BACKEND = '{name}'.*no {name} kernel.*Remedy: choose auto"):
        _backend.choose("affine_step", "cpu")


def test_an_explicit_choice_on_the_wrong_device_raises(triton_exists: None) -> None:
    with _backend.use_backend("triton"):
        assert _backend.choose("affine_step", "cuda") == "triton"
        with pytest.raises(InvalidInput, match="run on cuda tensors, not on cpu tensors"):
            _backend.choose("affine_step", "cpu")


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(InvalidInput, match=r"name = 'Triton'.*auto, cuda, native, reference, triton"),
        _backend.use_backend("Triton"),
    ):
        raise AssertionError("the block was entered")
    monkeypatch.setenv(_backend.VARIABLE, "fast")
    with pytest.raises(InvalidInput, match="FASTINVDPO_BACKEND = 'fast'"):
        _backend.choose("preference_loss", "cpu")


def test_the_environment_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _backend.requested() == ("default", "auto")
    monkeypatch.setenv(_backend.VARIABLE, "reference")
    assert _backend.requested() == (_backend.VARIABLE, "reference")
    monkeypatch.setenv(_backend.VARIABLE, "")
    assert _backend.requested() == ("default", "auto")


def test_blocks_nest_beat_the_environment_and_end_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_backend.VARIABLE, "cuda")
    with _backend.use_backend("auto"):
        with pytest.raises(ZeroDivisionError), _backend.use_backend("triton"):
            assert _backend.requested() == ("use_backend", "triton")
            raise ZeroDivisionError
        assert _backend.requested() == ("use_backend", "auto")
    assert _backend.requested() == (_backend.VARIABLE, "cuda")


def _in_a_thread(function):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    thread.join()
    return answers[0]


def test_a_thread_without_a_choice_follows_and_one_with_a_choice_keeps_it() -> None:
    def own_choice() -> tuple[str, str]:
        with _backend.use_backend("auto"):
            return _backend.requested()

    with _backend.use_backend("reference"):
        assert _in_a_thread(_backend.requested) == ("use_backend", "reference")
        assert _in_a_thread(own_choice) == ("use_backend", "auto")
        assert _backend.requested() == ("use_backend", "reference")
    assert _in_a_thread(_backend.requested) == ("default", "auto")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_ops_obey_the_choice_without_recompiling(compiled: bool) -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(fastinvdpo.affine_step, backend=record, fullgraph=True) if compiled else fastinvdpo.affine_step
    sample, coefficients = torch.ones(2, 3), torch.tensor([[2.0], [3.0]])
    expected = torch.tensor([[2.0] * 3, [3.0] * 3])
    torch.testing.assert_close(step(sample, [], coefficients), expected, rtol=0, atol=0)
    with _backend.use_backend("cuda"), pytest.raises(InvalidInput, match="no cuda kernel"):
        step(sample, [], coefficients)
    with fastinvdpo.use_backend("reference"):
        torch.testing.assert_close(step(sample, [], coefficients), expected, rtol=0, atol=0)
    assert len(graphs) == (1 if compiled else 0)


def test_the_backward_obeys_the_choice() -> None:
    predictions = torch.randn(2, 5, requires_grad=True)
    loss = fastinvdpo.preference_loss(predictions, torch.zeros(2, 5), torch.ones(2, 5), beta=1.0).loss
    with _backend.use_backend("cuda"), pytest.raises(InvalidInput, match="no cuda kernel for preference_loss"):
        loss.backward(retain_graph=True)
    loss.backward()
    assert predictions.grad is not None and bool(predictions.grad.abs().max() > 0)
