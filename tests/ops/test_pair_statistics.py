"""``pair_statistics``: against the definition in float64, as an op, and on every backend by the bounds of
tests/kernels/statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastinvdpo
from tests.cases import pairwise, predictions
from tests.kernels.statistics import (
    BF16,
    F32,
    F64,
    MIXES,
    UNPAIRED_MASKS,
    Problem,
    both_ways,
    by_definition,
    check_public,
    problem,
)
from tests.places import EVERYWHERE, Place

pytestmark = pytest.mark.usefixtures("poisoned")
everywhere = pytest.mark.parametrize("place", EVERYWHERE)


def outputs(result: fastinvdpo.PairStatistics) -> list[Tensor | None]:
    return [result.policy_mse, result.cross, result.shift_mse, result.pair_cross, result.mask_mean]


def check(place: Place, p: Problem, given: str = "EXQC") -> None:
    check_public(place.backend, p.to(place.device), given)


# The formulas


@pytest.mark.parametrize(
    ("shape", "mask", "with_reference", "paired"),
    [
        ((3, 4), "pairs", True, True),
        *pairwise([(7,), (4, 8, 8), (3, 2, 5, 3)], UNPAIRED_MASKS, [True, False], [True, False]),
    ],
)
def test_sums_by_definition(shape: tuple[int, ...], mask: str, with_reference: bool, paired: bool) -> None:
    p = problem(shape, mask=mask, with_reference=with_reference, paired=paired)
    result = fastinvdpo.pair_statistics(*p[:4], paired=paired)
    for found, expected in zip(outputs(result), by_definition(p), strict=True):
        assert (found is None) == (len(expected) == 0)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_difference_is_that_of_two_errors_to_the_last_digits() -> None:
    """Policy − reference of 1e-3 in float32: two errors subtracted would lose four digits more."""
    policy, reference, target = predictions(8, (4, 64, 64), gap=1e-3, dtype=F32)
    found = fastinvdpo.pair_statistics(policy, reference, target).difference
    exact = [(t.double() - target.double()).square().flatten(1).mean(1) for t in (policy, reference)]
    terms = ((policy - reference).double() * (policy + reference - 2 * target).double()).abs().flatten(1).mean(1)
    assert float(((found - (exact[0] - exact[1])).abs() / terms).max()) < 1e-6


@pytest.mark.parametrize("mask", ["no mask", "elements", "pairs"])
@pytest.mark.parametrize("with_reference", [True, False])
def test_derivatives_of_first_and_second_order(mask: str, with_reference: bool) -> None:
    p = problem((3, 2, 2), pairs=2, mask=mask, with_reference=with_reference)

    def sums(policy: Tensor) -> tuple[Tensor, ...]:
        found = outputs(fastinvdpo.pair_statistics(policy, *p[1:4]))[:4]
        return tuple(value for value in found if value is not None)

    assert torch.autograd.gradcheck(sums, p.policy.requires_grad_())
    assert torch.autograd.gradgradcheck(sums, p.policy)


# Every backend


@everywhere
@pytest.mark.parametrize(
    ("shape", "dtypes", "mask", "with_reference", "paired"),
    [((4, 40, 32), (BF16,) * 3, "pairs", True, True), ((4, 64, 64), (F32,) * 3, "one", True, True),
     *pairwise([(1,), (4, 6, 5), (1, 33, 35), (2, 32, 33)], MIXES, UNPAIRED_MASKS, [True, False], [True, False])],
)  # fmt: skip
def test_sums_and_gradients(
    place: Place, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], mask: str, with_reference: bool, paired: bool
) -> None:
    check(place, problem(shape, dtypes=dtypes, mask=mask, with_reference=with_reference, paired=paired))


@everywhere
@pytest.mark.parametrize(
    ("given", "mask"),
    [("E", "channels"), ("X", "no mask"), ("Q", "channels"), ("C", "no mask"), ("EX", "no mask"), ("XQC", "channels")],
)
def test_gradients_of_some_sums(place: Place, given: str, mask: str) -> None:
    check(place, problem((2, 36, 32), dtypes=(F32,) * 3, mask=mask), given)


@everywhere
def test_the_gradient_of_a_difference_leaves_the_reference_out(place: Place) -> None:
    """It is 2g·e/n, whatever d is: what is not finite there does not matter."""
    p = problem((2, 32, 33), dtypes=(F32,) * 3).to(place.device)
    leaf = p.policy.requires_grad_()
    with fastinvdpo.use_backend(place.backend):
        slope = torch.linspace(-1, 2, len(leaf), device=place.device)
        difference = fastinvdpo.pair_statistics(leaf, *p[1:3]).difference
        (found,) = torch.autograd.grad(difference, leaf, slope)
    expected = 2 * slope.double().view(-1, 1, 1, 1) * (leaf - p.target).detach().double() / leaf[0].numel()
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "samples inside": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda tensor: torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0],
    "off a boundary": lambda tensor: torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(
        tensor.shape
    ),
}


@everywhere
@pytest.mark.parametrize("mask", ["no mask", "elements", "channels"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place: Place, layout: str, mask: str) -> None:
    p, change = problem((2, 32, 33), dtypes=(F32,) * 3, mask=mask), LAYOUTS[layout]
    check(place, p._replace(policy=change(p.policy)))
    weights = p.mask if p.mask is None else change(p.mask)
    check(place, Problem(change(p.policy), change(p.reference), change(p.target), weights))


@everywhere
@pytest.mark.parametrize("dtype", [torch.bool, BF16, F64])
def test_a_mask_of_another_dtype(place: Place, dtype: torch.dtype) -> None:
    p = problem((4, 32, 32), dtypes=(BF16,) * 3, mask="channels").to(place.device)
    mask = p.mask.round().to(dtype)
    found, expected = (both_ways(place.backend, p._replace(mask=k)) for k in (mask, mask.float()))
    assert all(map(torch.equal, [*found[0], found[2]], [*expected[0], expected[2]]))


@everywhere
@pytest.mark.parametrize("mask", ["no mask", "channels"])
@pytest.mark.parametrize("dtypes", [MIXES[0], MIXES[3]], ids=str)
def test_a_samples_sums_depend_on_no_other_sample(place: Place, dtypes: tuple[torch.dtype, ...], mask: str) -> None:
    """The same bits alone, in a batch, and when asked for again; without partners too."""
    p = problem((4, 37, 64), dtypes=dtypes, mask=mask).to(place.device)
    sums, _, gradient = both_ways(place.backend, p, "EXQ")
    for paired, rows in ((True, [1, 4]), (False, [0, 1, 4]), (False, list(range(6)))):
        part = Problem(*(value if value is None else value[rows] for value in p[:4]), paired)
        some, _, slopes = both_ways(place.backend, part, "EXQ")
        assert all(torch.equal(one, other[rows]) for one, other in zip(some[:3], sums[:3], strict=True))
    assert torch.equal(slopes, gradient)
    again = both_ways(place.backend, p, "EXQ")
    assert all(map(torch.equal, [*sums, gradient], [*again[0], again[2]]))


@everywhere
def test_what_is_not_finite_stays_in_its_sample(place: Place) -> None:
    p = problem((4, 9, 9), dtypes=(F32,) * 3).to(place.device)
    p.policy[1, 3, 8, 8] = torch.nan
    (policy_mse, cross, shift_mse, pair_cross, _), _, gradient = both_ways(place.backend, p)
    for sums in (policy_mse, cross, shift_mse):
        assert sums.isnan().tolist() == [False, True, False, False, False, False]
    assert pair_cross.isnan().tolist() == [False, True, False]
    assert gradient.flatten(1).isnan().any(1).tolist() == [False, True, False, False, True, False]


# As an op


def test_compiles_without_graph_break() -> None:
    p = problem(dtypes=(F32,) * 3, mask="channels")

    def loss(policy: Tensor) -> Tensor:
        sums = fastinvdpo.pair_statistics(policy * 1.5, *p[1:4])
        return sums.difference.square().sum() + sums.policy_mse.sum() + sums.pair_cross.sum()

    ours, eager = p.policy.clone().requires_grad_(), p.policy.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(ours).backward()
    loss(eager).backward()
    torch.testing.assert_close(ours.grad, eager.grad)


def test_what_is_not_defined_carries_no_gradient() -> None:
    p = problem(mask="channels")
    policy = p.policy.requires_grad_()
    result = fastinvdpo.pair_statistics(policy, p.reference, p.target, p.mask)
    assert result.policy_mse.requires_grad and not result.mask_mean.requires_grad
    alone = fastinvdpo.pair_statistics(policy, None, p.target, paired=False)
    assert alone.cross is alone.shift_mse is alone.pair_cross is alone.mask_mean is None
    with pytest.raises(fastinvdpo.InvalidInput, match="reference_pred"):
        _ = alone.difference
