"""The backend choice: who asks, what is refused, what ``auto`` remembers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastinvdpo
from fastinvdpo.errors import InvalidInput
from fastinvdpo.ops import dispatch, native, triton_kernels
from tests.layout import ROOT

OPS = sorted(dispatch.IMPLEMENTED)


@pytest.fixture
def fresh():
    """Choices made in the test are neither remembered from before nor afterwards."""
    dispatch._select.cache_clear()
    yield
    dispatch._select.cache_clear()


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """As if there were a GPU, Triton and an extension with CUDA. What is chosen must not be called."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_gpus_unavailable", lambda: None)
    monkeypatch.setattr(triton_kernels, "unavailable", lambda: None)
    monkeypatch.setattr(native, "cuda_unavailable", lambda: None)


ON_CPU = "reference" if native.unavailable() else "native"


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path) -> Iterator[Path]:
    """As if there were no extension for this Python; the folder of the package in which its remains may lie."""

    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(native, "importlib", SimpleNamespace(import_module=refuse))
    monkeypatch.setattr(native, "HERE", tmp_path)
    forget = (native._load, native.warn_of_fault)
    for remembered in forget:
        remembered.cache_clear()
    yield tmp_path
    for remembered in forget:
        remembered.cache_clear()


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("_not_built.txt", "no compiler, says the test. Remedy: find one\n", "says the test. Remedy: find one"),
        ("_C.cpython-39-x86_64-linux-gnu.so", "", "there is _C.cpython-39-x86_64-linux-gnu.so, but this is Python 3"),
        (None, "", None),
    ],
)
def test_kernels_that_should_be_there_are_missed_aloud_and_once(
    file: str | None, text: str, reason: str | None, not_built: Path
) -> None:
    """Without a trace of a build nobody wanted any, and nothing is said."""
    if file is not None:
        (not_built / file).write_text(text)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for op in OPS * 2:
            assert dispatch.choose(op, "cpu") == "reference"
    found = str(dispatch.unavailable("affine_step", "native", "cpu"))
    assert found.startswith("the extension fastinvdpo._C was not built") and (reason or "") in found
    assert native.fault() == (None if reason is None else f"NATIVE KERNELS MISSING: {found}")
    assert [str(warning.message) for warning in told] == [f"{native.fault()}. Plain PyTorch runs instead."][: len(told)]
    assert len(told) == (reason is not None)


def test_an_extension_of_an_older_version_is_missed_aloud(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    if native.unavailable() is not None:
        pytest.skip(str(native.unavailable()))
    monkeypatch.setattr(native, "OPS", ("affine_step", "of_tomorrow"))
    for remembered in (native._load, native.warn_of_fault):
        monkeypatch.setattr(native, remembered.__name__, remembered.__wrapped__)
    with pytest.warns(RuntimeWarning, match=r"NATIVE KERNELS MISSING: .* without of_tomorrow. Remedy: build it again"):
        assert dispatch.choose("affine_step", "cpu") == "reference"


def test_float64_is_for_the_reference_alone() -> None:
    assert dispatch.choose("affine_step", "cpu", float64=True) == "reference"
    with dispatch.use_backend("native"), pytest.raises(InvalidInput, match="compute in float32"):
        dispatch.choose("affine_step", "cpu", float64=True)


def test_auto_skips_what_has_not_run_on_a_gpu_until_its_line_is_deleted(
    with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in ("cuda", "triton"):
        assert dispatch.unavailable("affine_step", backend, "cuda") is None
        assert "not been run on a GPU yet" in str(dispatch.skipped(backend, "cuda"))
        with dispatch.use_backend(backend):
            assert dispatch.choose("affine_step", "cuda") == backend
    for device_type in ("cuda", "meta"):
        assert dispatch.choose("affine_step", device_type) == "reference"
    for proven in ("triton", "cuda"):  # the order in which auto prefers them, from the end
        monkeypatch.delitem(dispatch.UNPROVEN, proven)
        dispatch._select.cache_clear()
        assert dispatch.choose("affine_step", "cuda") == proven
        assert dispatch.choose("affine_step", "cuda", float64=True) == "reference"
        assert dispatch.choose("affine_step", "cpu") == ON_CPU
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("affine_step", "cpu") == ON_CPU and "interpreter" in str(dispatch.skipped("triton", "cpu"))
    with dispatch.use_backend("triton"):
        assert dispatch.choose("affine_step", "cpu") == "triton"
        dispatch._select.cache_clear()
        with pytest.raises(InvalidInput, match="run on cpu tensors under TRITON_INTERPRET, not on cuda tensors"):
            dispatch.choose("affine_step", "cuda")


def test_the_reasons_of_gpu_kernels(with_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(backend: str, device_type: str = "cuda") -> str | None:
        return dispatch.unavailable("preference_loss", backend, device_type)

    for backend in ("triton", "cuda"):
        assert reason(backend, "cpu") == f"{backend} kernels run on cuda tensors, not on cpu tensors"
    monkeypatch.setattr(dispatch, "_gpus_unavailable", lambda: "GPU 0 is old, says the test")
    assert reason("triton") == reason("cuda") == "GPU 0 is old, says the test"
    monkeypatch.setattr(triton_kernels, "unavailable", lambda: "no triton, says the test")
    monkeypatch.setattr(native, "cuda_unavailable", lambda: "no extension, says the test")
    assert (reason("triton"), reason("cuda")) == ("no triton, says the test", "no extension, says the test")


@pytest.mark.parametrize(
    ("cuda", "capabilities", "expected"),
    [
        (None, [], "was built without CUDA"),
        ("13.0", [], "finds no usable GPU or driver"),
        ("13.0", [(8, 0), (9, 0)], None),
        ("13.0", [(10, 0), (7, 5)], "GPU 1, Old, has compute capability 7.5, and the kernels need 8.0"),
    ],
)
def test_every_visible_gpu_must_do(
    cuda: str | None, capabilities: list[tuple[int, int]], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old")
    found = dispatch._gpus_unavailable.__wrapped__()
    assert found is None if expected is None else expected in found


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, "cannot be imported: No module named 'triton'"),
        ("3.5.1", "has version 3.5.1, and the kernels need 3.6"),
        ("unheard of", "has version unheard of, and"),
        ("3.6.0+git1", None),
        ("3.10.0", None),
    ],
)
def test_the_reasons_against_triton(found: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class JITFunction:
        pass

    def look_up(name: str) -> SimpleNamespace:
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return SimpleNamespace(__version__=found, JITFunction=JITFunction, language=SimpleNamespace(sum=JITFunction()))

    monkeypatch.setattr(triton_kernels, "importlib", SimpleNamespace(import_module=look_up))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = triton_kernels.unavailable.__wrapped__()
    assert reason is None if expected is None else expected in reason
    if reason is None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert "changed after triton had been imported" in triton_kernels.unavailable.__wrapped__()


@pytest.mark.parametrize(
    ("info", "expected"), [(None, "says the test"), ({"cuda": False}, "built without CUDA"), ({"cuda": True}, "None")]
)
def test_the_reasons_against_cuda(info: dict[str, bool] | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build_info", lambda: info)
    monkeypatch.setattr(native, "unavailable", lambda: "not built, says the test")
    assert expected in str(native.cuda_unavailable())


def test_cpu_tensors_leave_cuda_and_triton_alone() -> None:
    code = """
import sys
import torch
def refuse(*arguments, **options):
    raise AssertionError("CPU tensors made the package look at CUDA")
torch.cuda._lazy_init = torch.cuda.init = torch.cuda.is_available = torch.cuda.device_count = refuse
import fastinvdpo
policy = torch.randn(2, 5, requires_grad=True)
fastinvdpo.preference_loss(policy, torch.zeros(2, 5), None, beta=1.0).loss.backward()
fastinvdpo.affine_step(torch.ones(2, 3), [], torch.ones(2, 1))
assert "triton" not in sys.modules and "fastinvdpo._triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = f"{name} kernels run on cuda tensors, not on cpu tensors"
    with dispatch.use_backend(name), pytest.raises(InvalidInput, match=f"use_backend = '{name}'.*{reason}"):
        dispatch.choose("affine_step", "cpu")
    monkeypatch.setenv(dispatch.VARIABLE, name)
    with pytest.raises(InvalidInput, match=f"FASTINVDPO_BACKEND = '{name}'.*{reason}.*Remedy: choose auto"):
        dispatch.choose("affine_step", "cpu")


def test_what_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    known = r"name = 'Triton'.*auto, cuda, native, reference, triton"
    with pytest.raises(InvalidInput, match=known), dispatch.use_backend("Triton"):
        raise AssertionError("the block was entered")
    monkeypatch.setitem(dispatch.IMPLEMENTED, "affine_step", ("reference",))
    with dispatch.use_backend("cuda"), pytest.raises(InvalidInput, match="no cuda kernel for affine_step"):
        dispatch.choose("affine_step", "cpu")
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(InvalidInput, match="FASTINVDPO_BACKEND = 'fast'"):
        dispatch.choose("preference_loss", "cpu")


def test_blocks_nest_beat_the_environment_and_end_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("", ("default", "auto")), ("cuda", (dispatch.VARIABLE, "cuda"))):
        monkeypatch.setenv(dispatch.VARIABLE, value)  # read at every call
        assert dispatch.requested() == expected
    with dispatch.use_backend("auto"):
        with pytest.raises(ZeroDivisionError), dispatch.use_backend("triton"):
            assert dispatch.requested() == ("use_backend", "triton")
            raise ZeroDivisionError
        assert dispatch.requested() == ("use_backend", "auto")
    assert dispatch.requested() == (dispatch.VARIABLE, "cuda")


def test_a_thread_without_a_choice_follows_and_one_with_a_choice_keeps_it() -> None:
    def own_choice() -> tuple[str, str]:
        with dispatch.use_backend("auto"):
            return dispatch.requested()

    with ThreadPoolExecutor() as threads:
        with dispatch.use_backend("reference"):
            assert threads.submit(dispatch.requested).result() == ("use_backend", "reference")
            assert threads.submit(own_choice).result() == ("use_backend", "auto")
            assert dispatch.requested() == ("use_backend", "reference")
        assert threads.submit(dispatch.requested).result() == ("default", "auto")


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
    with dispatch.use_backend("cuda"), pytest.raises(InvalidInput, match="cuda kernels run on cuda tensors"):
        step(sample, [], coefficients)
    with fastinvdpo.use_backend("reference"):
        torch.testing.assert_close(step(sample, [], coefficients), expected, rtol=0, atol=0)
    assert len(graphs) == (1 if compiled else 0)


def test_the_backward_obeys_the_choice() -> None:
    predictions = torch.randn(2, 5, requires_grad=True)
    loss = fastinvdpo.preference_loss(predictions, torch.zeros(2, 5), torch.ones(2, 5), beta=1.0).loss
    with dispatch.use_backend("cuda"), pytest.raises(InvalidInput, match="cuda kernels run on cuda tensors"):
        loss.backward(retain_graph=True)
    loss.backward()
    assert predictions.grad is not None and bool(predictions.grad.abs().max() > 0)
