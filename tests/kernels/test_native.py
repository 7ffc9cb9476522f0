"""The C++ kernels for the CPU, through the public ops, against the reference in float64.

Utilities and layouts: tests/ops/test_backends.py. Mixed types: test_native_lengths.py.

Bounds: an error of at most twice that of plain PyTorch (the reference backend) on the same inputs, with the rounding of
one float32 operation as the least that is asked for. Outputs are poisoned: memory that is not written holds NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops import native, philox
from tests.cases import pairwise, predictions

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below one vector, with a tail, above one block and one chunk, and the latents of Stable Diffusion.
SHAPES = ((1,), (7,), (3, 5, 11), (4, 33, 127), (4, 64, 64))
ONE_ROUNDING = 2.0**-24
# Enough that an error over all pairs is not a matter of luck: a margin is a small difference of rounded numbers.
PAIRS = 32


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every new tensor is filled with NaN before an op may use it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def run(backend: str, inputs: tuple[Tensor, Tensor, Tensor | None], **options) -> tuple[Tensor, ...]:
    """Loss, margin, both errors and the gradient of ``loss + Σ margin·c + Σ policy_mse·d``."""
    policy = inputs[0].detach().requires_grad_()
    with fastinvdpo.use_backend(backend):
        result = fastinvdpo.preference_loss(policy, *inputs[1:], beta=options.pop("beta", 50.0), **options)
        weights = torch.linspace(-1, 1, result.margin.numel()).to(result.margin)
        total = result.loss + (result.margin * weights).sum() + 0.1 * result.policy_mse.sum()
        (gradient,) = torch.autograd.grad(total, policy)
    return result.loss, result.margin, result.policy_mse, result.reference_mse, gradient


def distance(values: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Relative error of every value as a vector."""
    pairs = zip(values, exact, strict=True)
    return [float((v.detach().double() - e.detach()).norm() / e.detach().norm().clamp(min=1e-30)) for v, e in pairs]


def check(inputs: tuple[Tensor, Tensor, Tensor | None], **options) -> None:
    widened = tuple(None if tensor is None else tensor.double() for tensor in inputs)
    wide = {name: v.double() if isinstance(v, Tensor) else v for name, v in options.items()}
    exact = run("reference", widened, **wide)
    plain, native = run("reference", inputs, **options), run("native", inputs, **options)
    for value, model in zip(native, plain, strict=True):
        assert (value.shape, value.dtype, value.stride()) == (model.shape, model.dtype, model.stride())
    # A loss may be a small sum of large terms: its error is relative to the margins then.
    large = max(exact[0].abs(), exact[1].square().mean().sqrt()) / exact[0].abs()
    for number, (error, allowed) in enumerate(zip(distance(native, exact), distance(plain, exact), strict=True)):
        assert error <= 2 * max(allowed, ONE_ROUNDING * (float(large) if number == 0 else 1.0))
    again = run("native", inputs, **options)
    assert all(torch.equal(value, other) for value, other in zip(native, again, strict=True))


@pytest.mark.parametrize(("dtype", "shape", "target_free"), pairwise(DTYPES, SHAPES, [False, True]))
def test_shapes(dtype: torch.dtype, shape: tuple[int, ...], target_free: bool) -> None:
    policy, reference, target = predictions(PAIRS, shape, gap=0.1, dtype=dtype)
    check((policy, reference, None if target_free else target))


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


STEP_OPTIONS = ({}, {"active": True}, {"noise": True}, {"active": True, "noise": True})


@pytest.mark.parametrize(("dtype", "shape", "count", "options"), pairwise(DTYPES, SHAPES, [0, 1, 4], STEP_OPTIONS))
def test_affine_step(dtype: torch.dtype, shape: tuple[int, ...], count: int, options: dict[str, bool]) -> None:
    """A new result, and both results of a step into given memory."""
    generator = torch.Generator().manual_seed(count)
    tensors = torch.randn(1 + count, 3, *shape, generator=generator).to(dtype)
    table, keywords = torch.randn(3, 1 + count, generator=generator), {}
    if "active" in options:
        keywords["active"] = torch.tensor([True, False, True])
    if "noise" in options:
        index = torch.tensor([5, 5, 2**40 + 3])
        keywords |= {"noise_scale": torch.rand(3), "noise_index": index, "seed": 2**61 + 3, "offset": 7}

    def step(backend: str, inputs: Tensor, coefficients: Tensor, stored: torch.dtype | None = None):
        trajectory = None if stored is None else torch.empty(3, 2, *shape, dtype=stored)[:, 1]
        with fastinvdpo.use_backend(backend):
            options = {**keywords, "trajectory": trajectory}
            return fastinvdpo.affine_step(inputs[0], list(inputs[1:]), coefficients, **options), trajectory

    exact = step("reference", tensors.double(), table.double())[0]
    plain = step("reference", tensors, table)[0]
    # Box-Muller in float32: logarithm, root and sine within two roundings each; the reference draws in float64.
    floor = 6 * ONE_ROUNDING if "noise" in options else ONE_ROUNDING
    for stored in (None, *DTYPES):
        native, trajectory = step("native", tensors, table, stored)
        assert (native.shape, native.dtype, native.stride()) == (plain.shape, plain.dtype, plain.stride())
        error, allowed = distance((native,), (exact,))[0], distance((plain,), (exact,))[0]
        assert error <= 2 * max(allowed, floor)
        if stored is not None:
            _, model = step("reference", tensors, table, stored)
            error, allowed = distance((trajectory,), (exact,))[0], distance((model,), (exact,))[0]
            assert error <= 2 * max(allowed, floor)


@pytest.mark.parametrize(
    ("shape", "dtypes", "masked"), pairwise(SHAPES, itertools.product(DTYPES, repeat=2), [False, True])
)
def test_affine_step_backward(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], masked: bool) -> None:
    """Of a sample of the first dtype, and outputs of both."""
    kinds = (dtypes[0], dtypes[1], dtypes[0], dtypes[1])
    tensors = [torch.randn(3, *shape).to(dtype).requires_grad_() for dtype in kinds]
    table, grad = torch.randn(3, 4), torch.randn(3, *shape).to(dtypes[0])
    active = torch.tensor([True, False, True]) if masked else None

    def gradients(backend: str, inputs: list[Tensor], coefficients: Tensor, given: Tensor) -> tuple[Tensor, ...]:
        with fastinvdpo.use_backend(backend):
            result = fastinvdpo.affine_step(inputs[0], inputs[1:], coefficients, active=active)
            return torch.autograd.grad(result, inputs, given)

    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for given in (grad, grad[:1].expand_as(grad), grad.flatten()[0].expand_as(grad)):
        exact = gradients("reference", wide, table.double(), given.double())
        plain, native = (gradients(backend, tensors, table, given) for backend in ("reference", "native"))
        assert [gradient.dtype for gradient in native] == list(kinds)
        assert [gradient.stride() for gradient in native] == [gradient.stride() for gradient in plain]
        for error, allowed in zip(distance(native, exact), distance(plain, exact), strict=True):
            assert error <= 2 * max(allowed, ONE_ROUNDING)


def test_noise_is_that_of_every_backend() -> None:
    """A million normal numbers against Box-Muller in float64, tails included."""
    with fastinvdpo.use_backend("native"):
        drawn = fastinvdpo.affine_step(
            torch.zeros(4, 1 << 18), [], torch.zeros(4, 1), noise_scale=torch.ones(4), seed=9, offset=2
        )
    exact = philox.normal(9, 2, torch.arange(4), (1 << 18,), torch.float64)
    assert float((drawn - exact).abs().max()) < 1e-6 and float(exact.abs().max()) > 4.5
