"""Memory of large results of the C++ kernels: kept when a result is freed, and never shared by two that live."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastinvdpo
from fastinvdpo.ops import native
from tests.cases import predictions

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

SHAPE = (4, 96, 96)  # with 4 pairs 1.1 MiB in float32
VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
needs_2_11 = pytest.mark.skipif(VERSION < (2, 11), reason="PyTorch 2.10 cannot hand memory back to the extension")


def policy_and_loss(seed: int, pairs: int = 4) -> tuple[Tensor, Tensor]:
    policy, reference, target = predictions(pairs, SHAPE, seed=seed, dtype=torch.float32)
    policy.requires_grad_()
    return policy, fastinvdpo.preference_loss(policy, reference, target, beta=50.0).loss


def gradient(seed: int, backend: str = "native", pairs: int = 4) -> Tensor:
    with fastinvdpo.use_backend(backend):
        policy, loss = policy_and_loss(seed, pairs)
        return torch.autograd.grad(loss, policy)[0]


def assert_right(found: Tensor, seed: int, pairs: int = 4) -> None:
    torch.testing.assert_close(found, gradient(seed, "reference", pairs), rtol=1e-5, atol=1e-12)


def allocated(seed: int, pairs: int = 4) -> int:
    """Bytes of the largest piece of memory that PyTorch allocates for a gradient, which is freed again."""
    with fastinvdpo.use_backend("native"):
        policy, loss = policy_and_loss(seed, pairs)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            torch.autograd.grad(loss, policy)
    return max(event.self_cpu_memory_usage for event in recorded.key_averages())


@needs_2_11
def test_the_next_result_takes_the_memory_of_a_freed_one() -> None:
    size = 2 * 4 * 4 * 96 * 96 * 4
    native.release_kept_memory()
    assert allocated(0) == size
    assert allocated(1) < size / 100
    first = gradient(2)
    address = first.data_ptr()
    assert_right(first, 2)
    del first
    second = gradient(3)
    assert second.data_ptr() == address
    assert_right(second, 3)
    del second
    native.release_kept_memory()
    assert allocated(4) == size


@needs_2_11
def test_memory_of_another_size_is_not_held_on_to() -> None:
    native.release_kept_memory()
    size = allocated(0, pairs=12)
    assert allocated(0, pairs=8) < size / 100  # it does, with less than as much again left over
    assert allocated(0, pairs=4) == size / 3
    assert allocated(0, pairs=12) == size


def test_live_results_share_no_memory() -> None:
    results = [gradient(seed) for seed in range(3)]
    views = [results[1].numpy()]
    del results[1]  # its memory lives as long as the view
    results.append(gradient(3))
    for found, seed in zip(results, (0, 2, 3), strict=True):
        assert_right(found, seed)
    assert_right(torch.from_numpy(views[0]), 1)


def test_a_result_becomes_the_gradient_of_a_leaf() -> None:
    policy, reference, target = predictions(4, SHAPE, seed=5, dtype=torch.float32)
    policy.requires_grad_()
    for _ in range(2):
        with fastinvdpo.use_backend("native"):
            fastinvdpo.preference_loss(policy, reference, target, beta=50.0).loss.backward()
    assert policy.grad is not None
    assert_right(policy.grad / 2, 5)


def test_threads_do_not_disturb_each_other() -> None:
    def repeated(seed: int) -> list[Tensor]:
        return [gradient(seed) for _ in range(10)][-2:]

    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(repeated, range(4))):
            for result in found:
                assert_right(result, seed)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "apart"])
def test_a_large_step_has_the_layout_of_empty_like(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(8, *SHAPE, generator=generator)
    if layout == "channels_last":
        sample = sample.to(memory_format=torch.channels_last)
    if layout == "apart":
        sample = torch.stack([sample, sample], 1)[:, 1]
    coefficients = torch.rand(8, 1, generator=generator)
    for _ in range(2):
        with fastinvdpo.use_backend("native"):
            found = fastinvdpo.affine_step(sample, [], coefficients)
        assert found.stride() == torch.empty_like(sample).stride()
        torch.testing.assert_close(found, sample * coefficients.view(8, 1, 1, 1))
