"""The CUDA kernels without a GPU: their own source, run on the host thread by thread, against the reference in float64.

Threads change turns at barriers and shuffles only, so this shows few of the races there could be, and nothing of what
the compiler and the machine do.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinvdpo.ops.affine_step import reference as step_reference
from fastinvdpo.ops.preference_loss import UTILITIES
from tests.cases import pairwise
from tests.kernels import emulated, statistics
from tests.kernels.cases import (
    apart,
    at_offset,
    between,
    check_gradient,
    check_loss,
    check_step,
    exact,
    problem,
)
from tests.kernels.emulated import Launch

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler to emulate CUDA with")

BF16 = torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16]
# One block a span; clusters; one cluster for everything; more work than blocks, which finish in another order.
LAUNCHES = [Launch(), Launch(team=8), Launch(team=2, resident=2), Launch(resident=3, order=2)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build(tmp_path_factory.mktemp("emulated"))


# The cut


@pytest.mark.parametrize("n", [1, 7, 2047, 2048, 2049, 16384, 65536, 100003, 4838400])
def test_chunks_cover_a_row_once(library: ctypes.CDLL, n: int) -> None:
    for rows, largest_team, head in itertools.product((2, 128, 10240), (0, 1, 2, 8), (0, 1, 7)):
        cut = emulated.cut(library, rows, n, largest_team, head)
        position = 0
        for begin, end in cut.ranges:
            assert begin == min(position, n) and begin <= end <= n
            assert begin in (0, n) or (begin - head) % cut.chunk == 0
            position = end
        assert position == n
        assert cut.chunk % 2048 == 0 and cut.chunk <= 65536
        assert cut.team <= max(1, largest_team) and cut.team * cut.spans == len(cut.ranges)


def test_rows_beyond_32_bits(library: ctypes.CDLL) -> None:
    n = 2**33 + 5
    cut = emulated.cut(library, 2, n, 8, 3, room=1 << 18)
    assert cut.chunk == 65536 and len(cut.ranges) == cut.spans * 8
    assert cut.ranges[-1][1] == n and cut.spans == -(-n // (8 * 65536))
    assert all(one[1] == two[0] for one, two in zip(cut.ranges, cut.ranges[1:], strict=False))


def test_a_row_is_one_cluster_at_training_shapes(library: ctypes.CDLL) -> None:
    """SD1.5, 64 pairs; small inputs are cut finer, to fill the machine."""
    assert emulated.cut(library, 128, 4 * 64 * 64, 8, 0)[:3] == (2048, 1, 8)
    assert emulated.cut(library, 2, 4 * 128 * 128, 8, 0)[:3] == (2048, 4, 8)


# preference_loss


MIXED = [(BF16, BF16, torch.float32), (torch.float32, torch.float16, BF16), (BF16, torch.float32, torch.float32)]
OFFSETS = [(0, 0, 0), (1, 1, 1), (3, 3, 3), (1, 0, 1), (1, 1, 0), (5, 1, 1)]


@pytest.mark.parametrize(
    ("n", "launch", "dtypes", "offsets", "utility", "steps", "with_target"),
    [
        *pairwise([1, 3, 60, 250, 2053, 4107], LAUNCHES, [*((dtype,) * 3 for dtype in DTYPES), *MIXED], OFFSETS,
                  UTILITIES, [None, 1, 3], [True, False]),
        *((n, launch, (torch.float32,) * 3, (0, 0, 0), "sigmoid", steps, True) for n, launch, steps in (
            (16384, LAUNCHES[1], None), (36867, LAUNCHES[2], None), (2500, LAUNCHES[1], 2), (20, LAUNCHES[1], 40))),
    ],
)  # fmt: skip
def test_forward(
    library: ctypes.CDLL,
    n: int,
    launch: Launch,
    dtypes: tuple[torch.dtype, ...],
    offsets: tuple[int, ...],
    utility: str,
    steps: int | None,
    with_target: bool,
) -> None:
    p = problem(n, pairs=3, steps=steps, dtypes=dtypes, offsets=offsets, utility=utility, with_target=with_target)
    check_loss(p, emulated.forward(library, p, launch))


@pytest.mark.parametrize("pitch", [0, 5])
def test_timestep_weights_of_one_row_and_of_rows_apart(library: ctypes.CDLL, pitch: int) -> None:
    """The bits of a dense table."""
    p = problem(300, pairs=3, steps=4)
    weight = torch.linspace(0.2, 1, 3 * 5).as_strided((3, 4), (pitch, 1))
    dense, strided = p._replace(timestep_weight=weight.contiguous()), p._replace(timestep_weight=weight)
    expected = emulated.forward(library, dense, Launch(team=8))
    check_loss(dense, expected)
    assert all(map(torch.equal, emulated.forward(library, strided, Launch(team=8)), expected))
    gradients, margin = (torch.tensor(0.7), torch.randn(3), torch.rand(p.rows)), expected[1]
    found = emulated.backward(library, strided, gradients, margin, Launch())
    assert torch.equal(found, emulated.backward(library, dense, gradients, margin, Launch()))
    check_gradient(dense, gradients, margin, found)


def test_many_pairs(library: ctypes.CDLL) -> None:
    p = problem(5, pairs=300)
    check_loss(p, emulated.forward(library, p, Launch(resident=64)))


def test_the_difference_is_exact_at_training_settings(library: ctypes.CDLL) -> None:
    """β = 5000, policy − reference about 1e-3: the margin and every pair difference within 1e-4 relative."""
    p = problem(16384, pairs=3, gap=1e-3, beta=5000.0)
    for launch in LAUNCHES[:2]:
        results = emulated.forward(library, p, launch)
        check_loss(p, results)
        torch.testing.assert_close(results[1].double(), exact(p)[1], rtol=1e-4, atol=0)


def test_the_same_bits_in_any_order(library: ctypes.CDLL) -> None:
    p = problem(40000, pairs=2)
    for team in (1, 8):
        launches = [Launch(team, resident, order) for resident, order in ((1 << 20, 0), (1 << 20, 5), (24, 1), (8, 0))]
        first, *others = (emulated.forward(library, p, launch) for launch in launches)
        assert all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_pair(library: ctypes.CDLL, value: float) -> None:
    p = problem(300, pairs=3)
    p.policy[1, 299] = value
    _, margin, policy_mse, _ = emulated.forward(library, p, Launch())
    assert not torch.isfinite(margin[1]) and torch.isfinite(margin[[0, 2]]).all()
    assert torch.isfinite(policy_mse).tolist() == [True, False, True, True, True, True]


BACKWARD_CASES = [
    (4107, None, (torch.float32,) * 3, (0, 0, 0)),
    (4107, None, (torch.bfloat16,) * 3, (0, 0, 0)),
    (2501, 2, (torch.float16,) * 3, (3, 3, 3)),
    (4100, None, (torch.bfloat16, torch.bfloat16, torch.float32), (0, 0, 0)),
    (33, 3, (torch.float32,) * 3, (1, 0, 2)),
]


@pytest.mark.parametrize(("case", "utility", "resident"), pairwise(BACKWARD_CASES, UTILITIES, [1 << 20, 3]))
def test_backward(library: ctypes.CDLL, case: tuple[Any, ...], utility: str, resident: int) -> None:
    n, steps, dtypes, offsets = case
    p = problem(n, steps=steps, dtypes=dtypes, offsets=offsets, utility=utility)
    margin = exact(p)[1].float()
    for gradients in (
        (torch.tensor(0.7), None, None),
        (torch.tensor(0.7), torch.tensor([0.3, -0.2]), torch.rand(p.rows)),
    ):
        found = emulated.backward(library, p, gradients, margin, Launch(resident=resident))
        check_gradient(p, gradients, margin, found)


# pair_statistics


@pytest.mark.parametrize(
    ("shape", "dtypes", "mask", "with_reference", "paired", "launch"),
    pairwise([(1,), (7, 11), (2, 2056), (5, 33, 34)], statistics.MIXES, statistics.UNPAIRED_MASKS, [True, False],
             [True, False], [Launch(), Launch(resident=3, order=2)]),
)  # fmt: skip
def test_pair_statistics(
    library: ctypes.CDLL,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    mask: str,
    with_reference: bool,
    paired: bool,
    launch: Launch,
) -> None:
    p = statistics.problem(shape, dtypes=dtypes, mask=mask, with_reference=with_reference, paired=paired)
    statistics.check_sums(p, emulated.pair_statistics(library, p, launch))
    for given in ("EXQC", "E"):
        grads = statistics.gradients_of(p, given)
        statistics.check_gradient(p, grads, emulated.pair_statistics_backward(library, p, grads, launch))


def test_a_samples_statistics_depend_on_its_elements_alone(library: ctypes.CDLL) -> None:
    """Not on the batch, on where its row begins, or on the order in which blocks finish."""
    for n in (4107, 40000):
        p = statistics.problem((n,), pairs=2, dtypes=(BF16,) * 3)
        sums, grads = emulated.pair_statistics(library, p, Launch()), statistics.gradients_of(p, "EXQ")
        gradient = emulated.pair_statistics_backward(library, p, grads, Launch())
        for sample in range(4):
            alone = statistics.Problem(*(at_offset(tensor[sample], sample)[None] for tensor in p[:3]), None, False)
            found = emulated.pair_statistics(library, alone, Launch(resident=4, order=5))
            assert all(
                torch.equal(one, many[sample : sample + 1]) for one, many in zip(found[:3], sums[:3], strict=True)
            )
            given = [None if grad is None else grad[sample : sample + 1].clone() for grad in grads]
            slope = emulated.pair_statistics_backward(library, alone, given, Launch())
            assert torch.equal(slope[0], gradient[sample])


# affine_step


STEP_CASES = [
    (torch.float32, torch.float32, 4107, 0),
    (torch.bfloat16, torch.bfloat16, 2056, 0),
    (torch.float16, torch.float16, 2051, 0),
    (torch.float32, torch.bfloat16, 4108, 0),
    (torch.float32, torch.float32, 130, 1),
    (torch.bfloat16, torch.bfloat16, 136, 4),
]


def step_settings(rows: int, outputs: int, noise: bool, active: Tensor | None) -> tuple[Any, ...]:
    extra = (torch.tensor([0.5, 1.0, 2.0]), torch.tensor([7, 2**40, 7])) if noise else (None, None)
    return (torch.randn(rows, 1 + outputs), active, *extra, 2**62 + 11, 2**32 - 1)


@pytest.mark.parametrize(("case", "outputs", "noise"), pairwise(STEP_CASES, range(5), [False, True]))
def test_affine_step(library: ctypes.CDLL, case: tuple[Any, ...], outputs: int, noise: bool) -> None:
    rows, (dtype, output_dtype, n, offset) = 3, case
    sample = at_offset(torch.randn(rows, n).to(dtype), offset)
    others = [at_offset(torch.randn(rows, n).to(output_dtype), offset) for _ in range(outputs)]
    for mask in (torch.tensor([True, False, True]), None):
        settings = step_settings(rows, outputs, noise, mask)
        found = emulated.affine_step(library, sample, others, settings, resident=2)
        check_step(sample, others, settings, found)


@pytest.mark.parametrize(
    ("dtypes", "place", "outputs", "stored", "noise"),
    pairwise([*((dtype, dtype) for dtype in DTYPES), (BF16, torch.float32)], [(0, 0), (0, 8), (4, 4), (1, 3)],
             [0, 2, 4], DTYPES, [False, True]),
)  # fmt: skip
def test_affine_step_into_given_memory(
    library: ctypes.CDLL,
    dtypes: tuple[torch.dtype, torch.dtype],
    place: tuple[int, int],
    outputs: int,
    stored: torch.dtype,
    noise: bool,
) -> None:
    """Rows that lie apart, a trajectory of another type, in place: the bits of a new result."""
    rows, n, (dtype, output_dtype), (offset, gap) = 3, 2100, dtypes, place
    values = torch.randn(rows, n).to(dtype)
    others = [torch.randn(rows, n).to(output_dtype) for _ in range(outputs)]
    settings = step_settings(rows, outputs, noise, torch.tensor([True, False, True]))
    expected = emulated.affine_step(library, values, others, settings)
    unrounded = emulated.affine_step(library, values.float(), others, settings)
    placed = [apart(other, gap, offset) for other in others]
    for out in (apart(torch.zeros_like(values), gap, offset), None, *placed[: dtype == output_dtype]):
        sample = apart(values, gap, offset)
        result = sample if out is None else out
        trajectory = apart(torch.zeros(rows, n, dtype=stored), gap, offset)
        emulated.affine_step(library, sample, placed, settings, result, trajectory, resident=3)
        assert torch.equal(result, expected) and torch.equal(trajectory, unrounded.to(stored))
        for tensor in (result, trajectory):
            assert between(tensor, gap).isnan().all()


@pytest.mark.parametrize("columns", [[0], [2], [0, 1], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize(("dtype", "other_dtype", "n", "offset"), STEP_CASES)
def test_affine_step_backward(
    library: ctypes.CDLL, dtype: torch.dtype, other_dtype: torch.dtype, n: int, offset: int, columns: list[int]
) -> None:
    rows, table = 3, torch.randn(3, 5)
    dtypes = [dtype if column == 0 else other_dtype for column in columns]
    values = torch.randn(rows, n).to(dtype)
    grads = [at_offset(values, offset), apart(values, 8, offset), values[:1].expand_as(values), values[:, 0]]
    for active in (torch.tensor([True, False, True]), None):
        if active is not None:
            table[1] = torch.nan  # of a row at rest: looked at by nobody
        for grad in grads:
            gradients = [at_offset(torch.full((rows, n), torch.nan, dtype=kind), offset) for kind in dtypes]
            emulated.affine_step_backward(library, grad, gradients, columns, table, active, resident=2)
            whole = grad.view(rows, -1).expand(rows, n)
            expected = step_reference.backward(whole, table, active, columns, dtypes)  # one product, rounded alike
            for one, two in zip(gradients, expected, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=0)
        table = torch.randn(3, 5)


def test_a_sample_at_rest_keeps_its_bits(library: ctypes.CDLL) -> None:
    bits = torch.tensor([0x7FC01234, -0x3FEDCC, 0x00000001, -0x80000000, 0x3F800000], dtype=torch.int64).to(torch.int32)
    sample = bits.repeat(2, 10).view(torch.float32)
    settings = (torch.full((2, 2), torch.nan), torch.tensor([False, False]), None, None, 0, 0)
    still = emulated.affine_step(library, sample, [sample], settings)
    assert torch.equal(still.view(torch.int32), sample.view(torch.int32))
