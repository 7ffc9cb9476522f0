"""The CUDA kernels on a GPU by themselves: the cases that tests/kernels/ runs on the host, and huge ones."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fastinvdpo.ops import philox
from fastinvdpo.ops.affine_step import reference as step_reference
from fastinvdpo.ops.preference_loss import UTILITIES
from tests.kernels.cases import (
    ROUNDING,
    UTILITY,
    Problem,
    at_offset,
    check_gradient,
    check_loss,
    check_step,
    exact,
    problem,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = [(torch.bfloat16, torch.bfloat16, torch.float32), (torch.float32, torch.float16, torch.bfloat16)]


def obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    try:
        module = importlib.import_module("fastinvdpo._C")
    except ImportError as error:
        return f"fastinvdpo._C cannot be imported: {error}"
    return None if module.build_info()["cuda"] else "fastinvdpo._C was built without CUDA"


OBSTACLE = obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"CUDA kernels not run: {OBSTACLE}")


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = (p.pair_weight, p.timestep_weight)
    settings = (p.beta, UTILITY[p.utility], p.label_smoothing)
    return torch.ops.fastinvdpo_native.preference_loss(p.policy, p.reference, p.target, *weights, *settings)


def backward(p: Problem, gradients: tuple[Tensor | None, ...], margin: Tensor) -> Tensor:
    target = p.reference if p.target is None else p.target
    weights = (p.pair_weight, p.timestep_weight)
    settings = (p.beta, UTILITY[p.utility], p.label_smoothing)
    op = torch.ops.fastinvdpo_native.preference_loss_backward
    return op(*gradients, p.policy, target, margin, *weights, *settings)


@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("dtypes", [*((dtype,) * 3 for dtype in DTYPES), *MIXED])
@pytest.mark.parametrize("n", [1, 7, 2053, 16384, 65536, 1_000_003])
def test_forward(n: int, dtypes: tuple[torch.dtype, ...], with_target: bool) -> None:
    p = problem(n, pairs=3, dtypes=dtypes, with_target=with_target, device="cuda")
    check_loss(p, forward(p))


@pytest.mark.parametrize("offsets", [(1, 1, 1), (1, 0, 2), (5, 1, 1)])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16,) * 3, MIXED[0]])
def test_off_boundaries(dtypes: tuple[torch.dtype, ...], offsets: tuple[int, ...]) -> None:
    p = problem(40001, dtypes=dtypes, offsets=offsets, device="cuda")
    check_loss(p, forward(p))
    gradients, margin = (torch.tensor(0.7, device="cuda"), None, None), exact(p)[1].float()
    check_gradient(p, gradients, margin, backward(p, gradients, margin))


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("steps", [None, 3, 80])
def test_utilities_and_timesteps(utility: str, steps: int | None) -> None:
    p = problem(5000, pairs=5, steps=steps, utility=utility, device="cuda")
    check_loss(p, forward(p))
    margin = exact(p)[1].float()
    gradients = (torch.tensor(0.7, device="cuda"), torch.randn(5, device="cuda"), torch.rand(p.rows, device="cuda"))
    check_gradient(p, gradients, margin, backward(p, gradients, margin))


@pytest.mark.parametrize("pairs", [1, 64])
def test_the_difference_is_exact_at_training_settings(pairs: int) -> None:
    p = problem(65536, pairs=pairs, gap=1e-3, beta=5000.0, device="cuda")
    torch.testing.assert_close(forward(p)[1].double(), exact(p)[1], rtol=1e-4, atol=0)


def test_more_elements_than_32_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of free GPU memory")
    n = 2**30 + 3
    policy = torch.zeros(2, n, dtype=torch.bfloat16, device="cuda")
    reference = torch.zeros_like(policy)
    policy[1, -1] = 256.0
    p = Problem(policy, reference, None)
    _, margin, policy_mse, _ = forward(p)
    mean = 256.0**2 / n
    torch.testing.assert_close(
        policy_mse.double().cpu(), torch.tensor([0.0, mean], dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert margin.item() == pytest.approx(25.0 * mean, rel=1e-6)
    gradient = backward(p, (None, None, torch.ones(2, device="cuda")), margin)
    assert gradient.count_nonzero().item() == 1
    assert gradient[1, -1].item() == pytest.approx(2 * 256.0 / n, rel=2**-8)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("outputs", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "output_dtype", "n", "offset"),
    [
        *((dtype, dtype, 16384, 0) for dtype in DTYPES),
        (torch.float32, torch.bfloat16, 65536, 0),
        (torch.float32, torch.float32, 4107, 1),
        (torch.bfloat16, torch.bfloat16, 4104, 4),
    ],
)
def test_affine_step(
    dtype: torch.dtype, output_dtype: torch.dtype, n: int, offset: int, outputs: int, noise: bool
) -> None:
    rows = 5
    sample = at_offset(torch.randn(rows, n).to(dtype), offset, "cuda")
    others = [at_offset(torch.randn(rows, n).to(output_dtype), offset, "cuda") for _ in range(outputs)]
    active = torch.tensor([True, False, True, True, False], device="cuda")
    extra = (torch.rand(rows, device="cuda"), torch.arange(rows, device="cuda") % 2 + 2**40) if noise else (None, None)
    settings = (torch.randn(rows, 1 + outputs, device="cuda"), active, *extra, 2**62 + 11, 2**32 - 1)
    check_step(sample, others, settings, torch.ops.fastinvdpo_native.affine_step(sample, others, *settings))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [0, 2, 4])
@pytest.mark.parametrize(("n", "gap"), [(16384, 0), (16384, 16384), (4107, 3)])
def test_affine_step_in_place_with_a_trajectory(
    n: int, gap: int, outputs: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    """The bits of a new result, and the trajectory rounded once; nothing is written between the rows."""
    rows = 5
    values = torch.randn(rows, n, device="cuda").to(dtype)
    sample = torch.empty(rows, n + gap, dtype=dtype, device="cuda")[:, :n].copy_(values)
    others = [torch.randn(rows, n, device="cuda").to(dtype) for _ in range(outputs)]
    active = torch.tensor([True, False, True, True, False], device="cuda")
    settings = (torch.randn(rows, 1 + outputs, device="cuda"), active, torch.rand(rows, device="cuda"), None, 3, 1)
    expected = torch.ops.fastinvdpo_native.affine_step(values, others, *settings)
    room = torch.full((rows, n + gap), torch.nan, dtype=stored, device="cuda")
    torch.ops.fastinvdpo_native.affine_step_out(sample, others, *settings, sample, room[:, :n])
    assert torch.equal(sample, expected)
    check_step(values, others, settings, room[:, :n])
    assert room[:, n:].isnan().all()


@pytest.mark.parametrize("dtypes", [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("n", [1, 4107, 16384, 1_000_003])
def test_affine_step_backward(n: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """One product, rounded like that of the reference."""
    rows, columns = 3, [0, 2, 3]
    table = torch.randn(rows, 5, device="cuda")
    values, kinds = torch.randn(rows, n, device="cuda").to(dtypes[0]), [dtypes[0], dtypes[1], dtypes[1]]
    for active in (None, torch.tensor([True, False, True], device="cuda")):
        for grad in (values, values[:1].expand_as(values), values[:, 0]):
            gradients = [torch.full((rows, n), torch.nan, dtype=kind, device="cuda") for kind in kinds]
            torch.ops.fastinvdpo_native.affine_step_backward(grad, table, active, columns, gradients)
            whole = grad.view(rows, -1).expand(rows, n)
            expected = step_reference.backward(whole, table, active, columns, kinds)
            assert all(torch.equal(one, two) for one, two in zip(gradients, expected, strict=True))


def test_noise_is_that_of_every_backend() -> None:
    sample, scale = torch.zeros(3, 5001, device="cuda"), torch.ones(3, device="cuda")
    index = torch.tensor([5, 2**33 + 1, 5], device="cuda")
    one = torch.ones(3, 1, device="cuda")
    step = torch.ops.fastinvdpo_native.affine_step(sample, [], one, None, scale, index, 123, 4)
    expected = philox.normal(123, 4, index, (5001,), torch.float64)
    assert (step.double() - expected).abs().max() < 40 * ROUNDING
