"""The C++ kernels for the CPU, through the public ops: what depends on threads, sizes, special values and rounding.

Utilities and layouts: tests/ops/test_backends.py. Exactness at every length, in every mix of types:
test_native_lengths.py. Outputs are poisoned: memory that is not written holds NaN.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops import native, philox
from tests.cases import pairwise, predictions

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("poisoned"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = 32


def run(backend: str, inputs: tuple[Tensor, Tensor, Tensor | None], **options) -> tuple[Tensor, ...]:
    """Loss, margin, both errors and the gradient of ``loss + Σ margin·c + Σ policy_mse·d``."""
    policy = inputs[0].detach().requires_grad_()
    with fastinvdpo.use_backend(backend):
        result = fastinvdpo.preference_loss(policy, *inputs[1:], beta=options.pop("beta", 50.0), **options)
        weights = torch.linspace(-1, 1, result.margin.numel()).to(result.margin)
        total = result.loss + (result.margin * weights).sum() + 0.1 * result.policy_mse.sum()
        (gradient,) = torch.autograd.grad(total, policy)
    return result.loss, result.margin, result.policy_mse, result.reference_mse, gradient


def test_weights_for_all_pairs_are_not_copied() -> None:
    """Nor is anything else, forward and backward: there is one row of weights, and kernels know its stride."""
    policy, *others = predictions(2, (5, 4, 6, 7), gap=0.1, dtype=torch.float32)
    leaf, options = policy.requires_grad_(), {"beta": 5.0, "timestep_weight": torch.rand(5)}
    with (
        fastinvdpo.use_backend("native"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        torch.autograd.grad(fastinvdpo.preference_loss(leaf, *others, **options).loss, leaf)
    names = {event.name for event in profile.events()}
    assert "aten::expand" in names and "aten::copy_" not in names


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    inputs = predictions(3, (4, 64, 64), gap=0.1, dtype=torch.float32)
    one = run("native", inputs)
    torch.set_num_threads(threads)
    try:
        many = run("native", inputs)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(value, other) for value, other in zip(one, many, strict=True))


@pytest.mark.parametrize(("policy", "target", "length"), pairwise(DTYPES, DTYPES, [2**16, 2**16 + 5]))
def test_a_gradient_that_is_written_past_the_caches(policy: torch.dtype, target: torch.dtype, length: int) -> None:
    """From 8 MiB on: the same bits as of its parts, which are smaller. Rows of odd lengths do not begin at a vector."""
    tensors = predictions(PAIRS, (length,), gap=0.1, dtype=torch.float32)
    inputs = (tensors[0].to(policy), tensors[1], tensors[2].to(target))
    pairs = torch.arange(2 * PAIRS).view(2, -1)

    def gradient(rows: Tensor) -> Tensor:
        leaf = inputs[0][rows].requires_grad_()
        with fastinvdpo.use_backend("native"):
            margin = fastinvdpo.preference_loss(leaf, inputs[1][rows], inputs[2][rows], beta=50.0).margin
        return torch.autograd.grad(margin.sum(), leaf)[0]

    whole = gradient(pairs.flatten())
    assert whole.nbytes >= 2**23
    for part in pairs.chunk(4, dim=1):
        assert torch.equal(whole[part.flatten()], gradient(part.flatten()))


def test_special_values_come_through() -> None:
    for value in (float("nan"), float("inf")):
        policy, reference, target = predictions(2, (40,), dtype=torch.float32)
        policy[1, 37] = value
        margin = run("native", (policy, reference, target))[1]
        assert not margin[1].isfinite() and margin[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1.00390625, 0.9990234375, 1.0 + 2.0**-9, -3.0000002, 2.0**-120, 2.0**30])
def test_a_gradient_is_rounded_to_the_nearest(dtype: torch.dtype, factor: float) -> None:
    """Every number there is, times a factor that leaves halves, and more and less than halves, to be rounded; ties go
    to the even one. Half of the numbers are shifted by one place, to be met in another lane.
    """
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    policy = torch.stack([numbers, numbers.roll(1)]).requires_grad_()
    # The kernel scales by 2/n times what comes in.
    incoming = torch.full((2,), factor * numbers.numel() / 2)
    with fastinvdpo.use_backend("native"):
        result = fastinvdpo.preference_loss(policy, policy.detach(), torch.zeros_like(policy), beta=1.0)
        (gradient,) = torch.autograd.grad(result.policy_mse, policy, incoming)
    expected = (policy.detach().float() * torch.tensor(factor)).to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def test_noise_is_that_of_every_backend() -> None:
    """A million normal numbers against Box-Muller in float64, tails included."""
    with fastinvdpo.use_backend("native"):
        drawn = fastinvdpo.affine_step(
            torch.zeros(4, 1 << 18), [], torch.zeros(4, 1), noise_scale=torch.ones(4), seed=9, offset=2
        )
    exact = philox.normal(9, 2, torch.arange(4), (1 << 18,), torch.float64)
    assert float((drawn - exact).abs().max()) < 1e-6 and float(exact.abs().max()) > 4.5
