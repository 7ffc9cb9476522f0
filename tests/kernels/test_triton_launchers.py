"""What the Triton launchers do in Python, on CPU tensors and with kernels that only note how they were launched."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastinvdpo.ops import triton_kernels
from fastinvdpo.ops.preference_loss import schema as loss_op
from tests.kernels.cases import Problem, problem

UNAVAILABLE = triton_kernels.unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"Triton's launchers not run: {UNAVAILABLE}")


class Noted:
    """Stands in for a kernel."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Noted]:
    """In the place of both kernels of preference_loss."""
    kernel = Noted()
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(triton_kernels.load(loss_op.NAME), name, kernel)
    yield kernel


def forward(p: Problem) -> tuple[Tensor, ...]:
    settings = (p.beta, p.utility, p.label_smoothing)
    return loss_op._FORWARD["triton"](p.policy, p.reference, p.target, p.pair_weight, p.timestep_weight, *settings)


def backward(p: Problem) -> Tensor:
    margin, errors = torch.zeros(len(p.policy) // 2), torch.zeros(p.rows)
    tensors = (torch.ones(()), margin, errors, p.policy, p.target, margin, p.pair_weight, p.timestep_weight)
    return loss_op._BACKWARD["triton"](*tensors, p.beta, p.utility, p.label_smoothing)


class _Made(TorchDispatchMode):
    """Keeps weak references to every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors += [weakref.ref(tensor) for tensor in torch.utils._pytree.tree_leaves(result)]
        return result


def test_no_memory_outlives_a_call(noted: Noted) -> None:
    """What did could lie in the memory pool of a CUDA graph, which takes it back, or serve two graphs at a time."""
    for p in (problem(300), problem(40, steps=3), problem(5, pairs=200)):
        with _Made() as made:
            results = forward(p)
            gradient = backward(p)
        noted.launches.clear()
        assert len(made.tensors) >= len(results) + 1
        del results, gradient
        gc.collect()
        assert [tensor() for tensor in made.tensors if tensor() is not None] == []


@pytest.mark.parametrize(("weight", "copied"), [((4,), False), ((3, 4), False), ((4, 3), True)])
def test_weights_for_all_pairs_are_not_copied(noted: Noted, weight: tuple[int, ...], copied: bool) -> None:
    """Kernels know the stride of a row of weights, which is that of a dense table after a copy."""
    table = torch.rand(weight)
    table = table.T if copied else table.expand(3, 4)
    p = problem(50, pairs=3, steps=4)._replace(timestep_weight=table)
    for call in (forward, backward):
        noted.launches.clear()
        call(p)
        ((_, arguments, _),) = noted.launches
        (given,) = (a for a in arguments if isinstance(a, Tensor) and a.shape == (3, 4) and torch.equal(a, table))
        assert (given.data_ptr() != table.data_ptr()) == copied
        pitch = 4 if copied else table.stride(0)
        assert given.stride() == (pitch, 1) and [a for a in arguments if isinstance(a, int)][:3] == [3, 4, pitch]


def test_arrivals_are_counted_from_zero(noted: Noted) -> None:
    """One counter for all pairs and one for each, of this launch alone."""
    p = problem(300, pairs=3)
    for _ in range(2):
        forward(p)
    counters = [
        [a for a in arguments if isinstance(a, Tensor) and a.dtype == torch.int32] for _, arguments, _ in noted.launches
    ]
    (one,), (other,) = counters
    assert one.tolist() == other.tolist() == [0] * 4
    assert one.data_ptr() != other.data_ptr()
