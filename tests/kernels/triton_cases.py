"""The Triton kernels against float64. interpreted.py runs this file under Triton's interpreter; on a GPU, by name:

python -m pytest tests/kernels/triton_cases.py
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinvdpo._triton import _common as common
from fastinvdpo._triton import affine_step as affine_kernels
from fastinvdpo._triton import pair_statistics as statistics_kernels
from fastinvdpo._triton import preference_loss as loss_kernels
from fastinvdpo._triton import token_log_probs as token_kernels
from fastinvdpo.ops import philox
from fastinvdpo.ops.affine_step import reference as affine_reference
from fastinvdpo.ops.pair_statistics import schema as statistics_schema
from fastinvdpo.ops.preference_loss import UTILITIES
from fastinvdpo.ops.preference_loss import reference as loss_reference
from fastinvdpo.ops.token_log_probs import reference as token_reference
from tests.cases import pairwise, predictions
from tests.kernels import statistics
from tests.kernels.cases import apart, at_offset, between

pytestmark = pytest.mark.usefixtures("poisoned")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDOFF = {F32: 2.0**-24, BF16: 2.0**-9, F16: 2.0**-12}
UTILITY_CASES = [(name, 0.1 if item.smoothed else 0.0) for name, item in UTILITIES.items()]
# A tail alone; odd rows; rows of 4 and of 8 elements' alignment; several blocks with a tail; several chunks.
SHAPES = [(1,), (7,), (3, 5, 11), (4, 3, 3), (5, 8), (3, 33, 32), (4, 32, 32)]
DTYPES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, BF16, F16), (BF16, F32, BF16), (F16, F32, F32)]


def inputs(pairs: int, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], **options: object) -> list[Tensor]:
    tensors = predictions(pairs, shape, **options)  # type: ignore[arg-type]
    return [tensor.to(DEVICE, dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]


def wide(*values: object) -> list[object]:
    """The same in float64."""
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def check_error(ours: Tensor, plain: Tensor, exact: Tensor, size: Tensor | None = None) -> None:
    """At most twice the error of plain PyTorch, which by luck can be less than one rounding of ``size``: the largest
    element, or the largest of the terms that it is the sum of.
    """
    assert ours.shape == plain.shape == exact.shape and ours.dtype == plain.dtype and ours.stride() == plain.stride()
    error, allowed = ((tensor.double() - exact).abs().max() for tensor in (ours, plain))
    size = exact if size is None else size
    assert error <= 2 * max(allowed, ROUNDOFF[ours.dtype] * size.abs().max())


def check_forward(*arguments: object) -> tuple[Tensor, ...]:
    ours = loss_kernels.forward(*arguments)
    plain, exact = loss_reference.forward(*arguments), loss_reference.forward(*wide(*arguments))  # type: ignore[arg-type]
    for *triple, size in zip(ours, plain, exact, sizes(exact, *wide(*arguments)), strict=True):  # type: ignore[arg-type]
        check_error(*triple, size)
    return ours


def sizes(exact: tuple[Tensor, ...], policy: Tensor, reference: Tensor, target: Tensor | None, *rest) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """What the outputs are sums of, without the signs that cancel; twice, because a term rounds and so does the sum."""
    rho, weight, beta, utility, smoothing = rest
    loss, margin, policy_mse, reference_mse = exact
    target = reference if target is None else target
    terms = (policy - reference) * (policy + reference - 2 * target)
    terms = terms.abs().flatten(1 if weight is None else 2).mean(-1)
    winner, loser = terms.chunk(2)
    terms = loss_reference.pair_scale(beta, rho, weight, winner).abs() * (winner + loser)
    terms = terms if weight is None else terms.sum(1)
    steepest = UTILITIES[utility].slope(margin, beta, smoothing).abs()
    return [2 * size for size in (loss.abs() + (steepest * terms).mean(), terms, policy_mse, reference_mse)]


def check_backward(*arguments: object) -> Tensor:
    ours = loss_kernels.backward(*arguments)
    plain, exact = loss_reference.backward(*arguments), loss_reference.backward(*wide(*arguments))  # type: ignore[arg-type]
    check_error(ours, plain, exact)
    norms = [(tensor.double() - exact).norm() for tensor in (ours, plain)]
    assert norms[0] <= 2 * max(norms[1], ROUNDOFF[ours.dtype] * exact.norm())
    return ours


class TestForward:
    @pytest.mark.parametrize(
        ("shape", "dtypes", "case", "with_target", "timesteps"),
        pairwise(SHAPES, DTYPES, UTILITY_CASES, [True, False], [None, 1, 3]),
    )
    def test_by_reference(
        self,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...],
        case: tuple[str, float],
        with_target: bool,
        timesteps: int | None,
    ) -> None:
        policy, reference, target = inputs(3, shape if timesteps is None else (timesteps, *shape), dtypes, gap=0.1)
        rho = torch.tensor([1.0, -0.5, 2.0], device=DEVICE)
        weight = None if timesteps is None else torch.rand(3, timesteps, device=DEVICE)
        result = check_forward(policy, reference, target if with_target else None, rho, weight, 10.0, *case)
        assert with_target or not result[3].any()

    @pytest.mark.parametrize(("utility", "smoothing"), UTILITY_CASES)
    def test_far_margins(self, utility: str, smoothing: float) -> None:
        """And one that is not a number, in one pair of two."""
        for z in (-1e4, -150.0, -30.0, -1.3, -1.0, -1e-3, 0.0, 0.5, 1.0, 1.225, 13.0, 40.0, 150.0):
            policy, reference = torch.tensor([[[0.0], [0.0]], [[1.0], [0.0]]], device=DEVICE)
            rho = torch.tensor([z], device=DEVICE)
            arguments = (policy, reference, torch.zeros_like(policy), rho, None, 2.0, utility, smoothing)
            loss, margin, *_ = loss_kernels.forward(*arguments)
            exact = loss_reference.forward(*wide(*arguments))[0]  # type: ignore[arg-type]
            assert margin.item() == rho.item()
            torch.testing.assert_close(loss.double(), exact, rtol=2e-7, atol=1e-38)
        policy, reference, target = inputs(2, (7,), (F32, F32, F32))
        policy[0, 3] = torch.nan
        loss, margin, *_ = loss_kernels.forward(policy, reference, target, None, None, 2.0, utility, smoothing)
        assert loss.isnan() and margin.isnan().tolist() == [True, False]

    def test_pair_difference_in_float32(self) -> None:
        """Policy and reference differ by 1e-3 and both miss the target by 1: eager code loses the difference."""
        arguments = (*inputs(4, (4, 64, 64), (F32, F32, F32), gap=1e-3), None, None, 5000.0, "sigmoid", 0.0)
        margin = loss_kernels.forward(*arguments)[1]
        exact = loss_reference.forward(*wide(*arguments))[1]  # type: ignore[arg-type]
        assert ((margin - exact) / exact).abs().max() < 1e-4

    def test_unaligned_storage(self) -> None:
        """A row that starts in the middle of 16 bytes."""
        tensors = [at_offset(tensor, 1, DEVICE) for tensor in inputs(2, (8, 8), (F32, BF16, F16), gap=0.1)]
        check_forward(*tensors, None, None, 20.0, "sigmoid", 0.0)
        grads = [torch.randn(shape, device=DEVICE) for shape in ((), (2,), (4,))]
        check_backward(*grads, tensors[0], tensors[2], torch.randn(2, device=DEVICE), None, None, 20.0, "sigmoid", 0.0)

    @pytest.mark.parametrize(("dtype", "timesteps"), [(F32, None), (BF16, 5)])
    def test_same_bits_twice(self, dtype: torch.dtype, timesteps: int | None) -> None:
        shape = (4, 37, 31) if timesteps is None else (timesteps, 4, 17, 11)
        weight = None if timesteps is None else torch.rand(3, timesteps, device=DEVICE)
        arguments = (*inputs(3, shape, (dtype,) * 3), None, weight, 5000.0, "sigmoid", 0.0)
        assert all(map(torch.equal, loss_kernels.forward(*arguments), loss_kernels.forward(*arguments)))

    def test_more_pairs_and_timesteps_than_a_tile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy, reference, _ = inputs(130, (2,), (F32, F32, F32), gap=0.1)
        check_forward(policy, reference, None, None, None, 5.0, "sigmoid", 0.0)
        monkeypatch.setattr(loss_kernels, "_FINISH_TILE", 8)
        policy, reference, target = inputs(1, (11, 3), (F32, F32, F32), gap=0.1)
        weight = torch.rand(1, 11, device=DEVICE) / 11
        check_forward(policy, reference, target, None, weight, 5.0, "sigmoid", 0.0)

    def test_more_chunks_than_a_tile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The plan of a huge input, in small: chunks of several blocks, and more chunks than are added up at once."""
        for length, block in ((1, 128), (3, 128), (4, 256)):
            plan = loss_kernels.Plan(block, length, -(-3 * 47 * 17 // (block * length)))
            monkeypatch.setattr(loss_kernels, "plan_of", lambda rows, plan=plan: plan)
            monkeypatch.setattr(loss_kernels, "_FINISH_TILE", 8)
            tensors = inputs(2, (3, 47, 17), (F32, BF16, F32), gap=0.1)
            check_forward(*tensors, None, None, 20.0, "sigmoid", 0.0)
            shape = (2, 3, 47, 17)
            weight = torch.rand(2, 2, device=DEVICE)
            check_forward(*inputs(2, shape, (F32, F32, F32), gap=0.1), None, weight, 20.0, "sigmoid", 0.0)

    def test_plans_cover_every_element(self) -> None:
        for n in (1, 7, 1024, 16384, 65536, 4838400, 2**33 + 8):
            plans = {rows: loss_kernels.plan_of(common.Rows(rows, n, 1)) for rows in (2, 128, 10240)}
            assert all(rows * plan.chunks < 2**31 for rows, plan in plans.items())
            for plan in (*plans.values(), *(statistics_kernels.plan_of(n, parts) for parts in (1, 4, 16))):
                chunk = plan.block * plan.blocks_per_chunk
                assert (plan.chunks - 1) * chunk < n <= plan.chunks * chunk
                assert plan.blocks_per_chunk <= 64 and chunk % 8 == 0 and chunk < 2**31


class TestBackward:
    @pytest.mark.parametrize(
        ("shape", "dtypes", "given", "timesteps"),
        pairwise(
            SHAPES, itertools.product((F32, BF16, F16), repeat=2), itertools.product((True, False), repeat=3), [None, 3]
        ),
    )
    def test_by_reference(
        self,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...],
        given: tuple[bool, bool, bool],
        timesteps: int | None,
    ) -> None:
        shape, rows = (shape, (6,)) if timesteps is None else ((timesteps, *shape), (6, timesteps))
        policy, _, target = inputs(3, shape, (dtypes[0], F32, dtypes[1]))
        weight = None if timesteps is None else torch.rand(3, timesteps, device=DEVICE)
        grads = (torch.tensor(0.7), torch.randn(3), torch.randn(rows))
        chosen = [grad.to(DEVICE) if wanted else None for grad, wanted in zip(grads, given, strict=True)]
        margin, rho = torch.randn(3, device=DEVICE), torch.tensor([1.0, -0.5, 2.0], device=DEVICE)
        check_backward(*chosen, policy, target, margin, rho, weight, 20.0, "sigmoid", 0.0)

    @pytest.mark.parametrize(("utility", "smoothing"), UTILITY_CASES)
    def test_utilities(self, utility: str, smoothing: float) -> None:
        """Every pair by itself, so that a large gradient hides no small one."""
        margin = torch.tensor([-130.0, -88.0, -20.0, -1.3, -1.0, -1e-3, 0.0, 0.5, 1.0, 1.225, 7.0, 40.0, 86.0])
        margin = margin.to(DEVICE)
        policy, _, target = inputs(len(margin), (2, 3), (F32, F32, F32))
        arguments = (policy, target, margin, None, None, 3.0, utility, smoothing)
        gradient = loss_kernels.backward(torch.ones((), device=DEVICE), None, None, *arguments)
        exact = loss_reference.backward(torch.ones((), device=DEVICE), None, None, *wide(*arguments))  # type: ignore[arg-type]
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=1e-38)

    def test_not_a_number_stays_one(self) -> None:
        policy, _, target = inputs(2, (7,), (F32, F32, F32))
        margin = torch.tensor([torch.nan, 0.3], device=DEVICE)
        gradient = loss_kernels.backward(
            torch.ones((), device=DEVICE), None, None, policy, target, margin, None, None, 7.0, "sigmoid", 0.0
        )
        assert gradient.isnan().all(1).tolist() == [True, False, True, False]


KEYS = [(0, 0, 0), (1, 2, 3), (2**63 - 1, 2**32 - 1, 2**62 + 12345), (123456789012, 7, 2**40 + 3), (5, 2**31, -1)]


class TestPhilox:
    @pytest.mark.parametrize(("seed", "offset", "index"), KEYS)
    def test_the_same_numbers(self, seed: int, offset: int, index: int) -> None:
        indices = torch.tensor([index, 9], device=DEVICE)
        zero, one = torch.zeros(2, 5000, device=DEVICE), torch.ones(2, device=DEVICE)
        ours = affine_kernels.forward(zero, [], zero[:, :1], None, one, indices, seed, offset)
        exact = philox.normal(seed, offset, indices, (5000,), torch.float64)
        assert (ours - exact).abs().max() < 1e-6

    def test_nothing_but_the_key_counts(self) -> None:
        sample, table = torch.zeros(3, 2500, device=DEVICE), torch.zeros(3, 1, device=DEVICE)
        scale = torch.ones(3, device=DEVICE)
        together = affine_kernels.forward(sample, [], table, None, scale, torch.tensor([4, 8, 4], device=DEVICE), 1, 2)
        alone = affine_kernels.forward(
            sample[:1, :1003], [], table[:1], None, scale[:1], torch.tensor([8], device=DEVICE), 1, 2
        )
        assert torch.equal(together[0], together[2])
        assert torch.equal(together[1, :1003], alone[0])


class TestAffine:
    def step(self, *arguments: object) -> Tensor:
        ours = affine_kernels.forward(*arguments)
        plain = affine_reference.forward(*arguments)  # type: ignore[arg-type]
        sample, outputs, *rest = arguments
        exact = affine_reference.forward(sample.double(), outputs, *rest)  # type: ignore[arg-type,attr-defined]
        check_error(ours, plain, exact)
        return ours

    @pytest.mark.parametrize(
        ("shape", "dtypes", "count"),
        pairwise(SHAPES, [(F32,) * 5, (BF16,) * 5, (F16,) * 5, (F32, BF16, F16, F32, BF16)], [0, 1, 2, 4]),
    )
    def test_shapes_and_dtypes(self, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], count: int) -> None:
        sample, *outputs = (torch.randn(3, *shape).to(DEVICE, dtype) for dtype in dtypes[: count + 1])
        table = torch.randn(3, 1 + count, device=DEVICE)
        self.step(sample, outputs, table, None, None, None, 0, 0)

    @pytest.mark.parametrize(("shape", "dtype", "indexed"), pairwise(SHAPES, [F32, BF16, F16], [True, False]))
    def test_noise(self, shape: tuple[int, ...], dtype: torch.dtype, indexed: bool) -> None:
        sample, output = torch.randn(2, 3, *shape).to(DEVICE, dtype)
        table, scale = torch.randn(3, 2, device=DEVICE), torch.rand(3, device=DEVICE)
        index = torch.tensor([7, 7, 2**40 + 3], device=DEVICE) if indexed else None
        self.step(sample, [output], table, None, scale, index, 2**40 + 17, 3)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    @pytest.mark.parametrize("noisy", [True, False])
    def test_samples_at_rest_keep_their_bits(self, dtype: torch.dtype, noisy: bool) -> None:
        sample, first, second = torch.randn(3, 4, 3, 7, 5).to(DEVICE, dtype)
        active = torch.tensor([True, False, False, True], device=DEVICE)
        first[1:3] = torch.nan
        sample[1, 0] = torch.inf
        table, scale = torch.randn(4, 3, device=DEVICE), torch.rand(4, device=DEVICE) if noisy else None
        table[2] = torch.nan
        result = affine_kernels.forward(sample, [first, second], table, active, scale, None, 1, 0)
        bits = torch.int32 if dtype == F32 else torch.int16
        assert torch.equal(result[1:3].view(bits), sample[1:3].view(bits))
        sample, *others, table = (tensor[active] for tensor in (sample, first, second, table))
        noise = (scale[active], torch.tensor([0, 3], device=DEVICE)) if scale is not None else (None, None)
        exact = affine_kernels.forward(sample, others, table, None, *noise, 1, 0)
        assert torch.equal(result[active], exact)


class TestAffineMemoryAndGradients:
    @pytest.mark.parametrize(
        ("types", "place", "noisy"),
        pairwise([((F32, F32), None), ((F32, F32), BF16), ((BF16, BF16), F32), ((F16, F16), BF16), ((F16, F32), F16)],
                 [((7,), 3), ((3, 19, 32), 8), ((3, 5, 11), 8)], [True, False]),
    )  # fmt: skip
    def test_into_given_memory(self, types: tuple[Any, Any], place: tuple[tuple[int, ...], int], noisy: bool) -> None:
        """Rows that lie apart, a trajectory of another type, in place: the bits of a new result."""
        (dtypes, stored), (shape, gap) = types, place
        values, output = (torch.randn(3, *shape).to(DEVICE, dtype) for dtype in dtypes)
        active = torch.tensor([True, False, True], device=DEVICE)
        scale = torch.rand(3, device=DEVICE) if noisy else None
        settings = (torch.randn(3, 2, device=DEVICE), active, scale, None, 5, 1)
        expected = affine_kernels.forward(values, [output], *settings)
        unrounded = affine_kernels.forward(values.float(), [output], *settings)
        placed = apart(output, gap)
        for out in (apart(torch.zeros_like(values), gap), None, placed if dtypes[0] == dtypes[1] else None):
            sample = apart(values, gap)
            result = sample if out is None else out
            trajectory = None if stored is None else apart(torch.zeros_like(values, dtype=stored), gap)
            returned = affine_kernels.forward(sample, [placed], *settings, result, trajectory)
            assert returned is result and torch.equal(result, expected) and between(result, gap).isnan().all()
            if trajectory is not None:
                assert torch.equal(trajectory, unrounded.to(stored)) and between(trajectory, gap).isnan().all()

    @pytest.mark.parametrize(
        ("shape", "dtypes", "columns", "masked"),
        pairwise([(1,), (3, 5, 11), (3, 19, 32)], [(F32, F32), (BF16, BF16), (F16, F32), (F32, BF16)],
                 [[0], [1, 3], [0, 1, 2, 3, 4]], [True, False]),
    )  # fmt: skip
    def test_backward(
        self, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], columns: list[int], masked: bool
    ) -> None:
        """One product, rounded like that of the reference."""
        values, table = torch.randn(3, *shape).to(DEVICE, dtypes[0]), torch.randn(3, 5, device=DEVICE)
        active = torch.tensor([True, False, True], device=DEVICE) if masked else None
        if masked:
            table[1] = torch.nan
        kinds = [dtypes[0] if column == 0 else dtypes[1] for column in columns]
        for grad in (values, apart(values, 8), values[:1].expand_as(values), values.flatten(1)[:, 0]):
            gradients = [torch.empty(3, *shape, dtype=kind, device=DEVICE) for kind in kinds]
            affine_kernels.backward(grad, table, active, columns, gradients)
            whole = grad if grad.shape == values.shape else grad.view(3, *[1] * len(shape)).expand_as(values)
            expected = affine_reference.backward(whole, table, active, columns, kinds)
            assert all(torch.equal(one, two) for one, two in zip(gradients, expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU with 24 GB: the interpreter would take days")
class TestBeyond32Bits:
    @pytest.fixture(autouse=True)
    def _room(self) -> None:
        if torch.cuda.mem_get_info()[0] < 24 * 2**30:
            pytest.skip("less than 24 GiB of free GPU memory")

    def test_affine(self) -> None:
        n = 2**31 + 8
        sample = torch.ones(2, n, dtype=BF16, device=DEVICE)
        table = torch.tensor([[2.0], [3.0]], device=DEVICE)
        result = affine_kernels.forward(sample, [], table, None, None, None, 0, 0)
        assert (result[0] == 2).all() and (result[1] == 3).all()

    def test_preference_loss(self) -> None:
        n = 2**31 + 8
        policy = torch.zeros(2, n, dtype=BF16, device=DEVICE)
        policy[1, -8:] = 64.0
        target = torch.zeros_like(policy)
        _, margin, policy_mse, _ = loss_kernels.forward(policy, target, target, None, None, 2.0, "sigmoid", 0.0)
        expected = torch.tensor(8 * 64.0**2 / n, device=DEVICE)
        torch.testing.assert_close(policy_mse, torch.stack([torch.zeros_like(expected), expected]))
        torch.testing.assert_close(margin, expected.view(1))


class TestStatistics:
    """What tests/ops/test_pair_statistics.py does not reach through the public op."""

    @pytest.mark.parametrize("mask", ["no mask", "channels"])
    def test_more_chunks_than_a_tile(self, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The plan of a huge input, in small: chunks of several blocks, and more of them than are added up at once."""
        monkeypatch.setattr(statistics_kernels, "_TILE", 4)
        p = statistics.problem((2, 41, 27), pairs=2, dtypes=(F32, BF16, F32), mask=mask).to(DEVICE)
        rows = statistics_schema._rows(*p)
        for block, length in ((128, 1), (128, 3), (256, 2)):

            def plan(n: int, parts: int, block: int = block, length: int = length) -> Any:
                return statistics_kernels.Plan(parts, block, length, -(-n // (block * length)))

            monkeypatch.setattr(statistics_kernels, "plan_of", plan)
            statistics.check_sums(p, statistics_kernels.forward(*rows, True))


class TestTokens:
    """What tests/ops/test_token_log_probs.py does not reach: chunks and splits of a large vocabulary, in small."""

    @pytest.mark.parametrize(("dtype", "mean"), [(F32, True), (F32, False), (BF16, True), (F16, False)])
    def test_several_chunks_and_splits(self, dtype: torch.dtype, mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"_WORKSPACE": 1, "_NARROWEST": 96, "_PROGRAMS": 6}.items():
            monkeypatch.setattr(token_kernels, name, value)
        hidden, weight = (torch.randn(rows, 24).to(DEVICE, dtype) for rows in (70, 400))
        columns, targets = (7, 390), torch.randint(7, 390, (70,), device=DEVICE)
        inputs = (hidden, weight, targets)
        found = token_kernels.forward(*inputs, *columns, mean)
        expected = token_reference.forward(hidden.double(), weight.double(), targets, *columns, mean)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and (one - other).norm() <= 4 * ROUNDOFF[dtype] * other.norm()
        slopes = (*torch.randn(2, 70, device=DEVICE).unbind(), *inputs, found[1], *columns, True, True)
        gradients = token_kernels.backward(*slopes)
        for one, other in zip(gradients, token_reference.backward(*wide(*slopes)), strict=True):  # type: ignore[arg-type]
            assert one.shape == other.shape and (one - other).norm() <= 4 * ROUNDOFF[dtype] * other.norm()
        again = token_kernels.backward(*slopes)
        assert all(map(torch.equal, gradients, again))
