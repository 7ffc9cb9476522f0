"""The C++ kernels for the CPU at every length near the ends of vectors, blocks and chunks, in every type.

What is asked of each value is what its roundings allow (cases.py). Rows start at any element, and each tensor ends
where its memory ends, so that a sanitizer sees what reads or writes past it (native_run.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch

import fastinvdpo
from fastinvdpo.ops import native
from fastinvdpo.ops.affine_step import reference as step_reference
from fastinvdpo.ops.preference_loss import UTILITIES
from tests.kernels import statistics
from tests.kernels.cases import at_offset, check_public, check_step, problem
from tests.ops import test_token_log_probs as tokens

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXES = list(itertools.product(DTYPES, repeat=3))
# All tails of a vector of 16 floats with up to two whole ones; the ends of blocks and chunks of a power of two.
LENGTHS = (
    *range(1, 50),
    *(size + d for size in (64, 128, 256, 512, 1024, 2048, 4096, 16384, 32768) for d in (-1, 0, 1)),
)


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda mix: "-".join(str(dtype)[6:] for dtype in mix))
@pytest.mark.parametrize("with_target", [True, False])
def test_preference_loss(dtypes: tuple[torch.dtype, ...], with_target: bool) -> None:
    lengths = LENGTHS if len(set(dtypes)) == 1 else LENGTHS[MIXES.index(dtypes) % 6 :: 6]
    for number, n in enumerate(lengths):
        offsets = [(number + 3 * i) % 9 for i in range(3)]
        steps = (None, 1, 3)[number % 3]
        check_public("native", problem(n, dtypes=dtypes, with_target=with_target, offsets=offsets, steps=steps))


@pytest.mark.parametrize("utility", UTILITIES)
def test_utilities(utility: str) -> None:
    for pairs in (1, 2, 5):
        check_public("native", problem(37, pairs=pairs, utility=utility, gap=0.5))


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda mix: "-".join(str(dtype)[6:] for dtype in mix))
def test_affine_step(dtypes: tuple[torch.dtype, ...]) -> None:
    """Of two or three numbers of outputs, each of which is met by every type."""
    for count in {MIXES.index(dtypes) % 5, (MIXES.index(dtypes) + 2) % 5, 2 if len(set(dtypes)) == 1 else 0}:
        check_affine_step(dtypes, count)


def check_affine_step(dtypes: tuple[torch.dtype, ...], count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    lengths = LENGTHS if count == 2 and len(set(dtypes)) == 1 else LENGTHS[MIXES.index(dtypes) % 9 :: 9]
    for number, n in enumerate(lengths):
        rows, masked, noisy = 1 + number % 3, number % 2 == 1, number // 2 % 2 == 1
        sample, *outputs = (
            at_offset(torch.randn(rows, n, generator=generator).to(dtypes[i % 3]), (number + i) % 9)
            for i in range(1 + count)
        )
        coefficients = torch.randn(rows, 1 + count, generator=generator)
        options = {
            "active": torch.arange(rows) % 2 == 0 if masked else None,
            "noise_scale": torch.rand(rows, generator=generator) if noisy else None,
            "noise_index": torch.arange(rows) * 2**33 if noisy else None,
            "seed": 2**61 + 3 if noisy else 0,
            "offset": 7 if noisy else 0,
        }
        with fastinvdpo.use_backend("native"):
            found = fastinvdpo.affine_step(sample, outputs, coefficients, **options)
        check_step(sample, outputs, (coefficients, *options.values()), found)
        with fastinvdpo.use_backend("native"):
            stored = at_offset(torch.empty(rows, n, dtype=dtypes[1]), (number + 2) % 9)
            wide = fastinvdpo.affine_step(sample.float(), outputs, coefficients, **options)
            fastinvdpo.affine_step(sample, outputs, coefficients, **options, out=sample, trajectory=stored)
        assert torch.equal(sample, found) and torch.equal(stored, wide.to(dtypes[1]))


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda mix: "-".join(str(dtype)[6:] for dtype in mix))
def test_affine_step_backward(dtypes: tuple[torch.dtype, ...]) -> None:
    """One product, rounded like that of the reference."""
    for number, n in enumerate(LENGTHS if len(set(dtypes)) == 1 else LENGTHS[MIXES.index(dtypes) % 9 :: 9]):
        rows = 1 + number % 3
        leaves = [torch.zeros(rows, n, dtype=dtypes[i % 3], requires_grad=True) for i in range(1 + number % 5)]
        coefficients, active = torch.randn(rows, len(leaves)), None if number % 2 else torch.arange(rows) % 2 == 0
        grad = at_offset(torch.randn(rows, n).to(dtypes[0]), number % 9)
        if number % 4 == 3:
            grad = grad[:, :1].expand(rows, n)
        with fastinvdpo.use_backend("native"):
            result = fastinvdpo.affine_step(leaves[0], leaves[1:], coefficients, active=active)
            found = torch.autograd.grad(result, leaves, grad)
        columns, kinds = list(range(len(leaves))), [leaf.dtype for leaf in leaves]
        expected = step_reference.backward(grad, coefficients, active, columns, kinds)
        assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtypes", statistics.MIXES, ids=lambda mix: "-".join(str(dtype)[6:] for dtype in mix))
def test_pair_statistics(dtypes: tuple[torch.dtype, ...]) -> None:
    """Of rows that begin anywhere; masks of a plane are read in place from 1024 elements on."""
    for number, n in enumerate(LENGTHS if len(set(dtypes)) == 1 else LENGTHS[statistics.MIXES.index(dtypes) % 6 :: 6]):
        mask = ("no mask", "elements", "channels")[number % 3]
        p = statistics.problem(
            (1 + number % 2, n),
            dtypes=dtypes,
            mask=mask,
            with_reference=number % 5 > 0,
            paired=number % 4 > 0,
            offsets=[(number + 3 * i) % 9 for i in range(3)],
        )
        statistics.check_public("native", p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_log_probs(dtype: torch.dtype) -> None:
    """Numbers of columns; of one token, or of more than a block has rows."""
    for number, n in enumerate(LENGTHS[DTYPES.index(dtype) :: 3]):
        if n < 4096:
            start = (number % 3) * (n // 5)
            inputs = tokens.problem((1, 3, 513)[number % 3], n, 1 + number % 9, (dtype, dtype), (start, n))
            inputs = (at_offset(inputs[0], number % 9), at_offset(inputs[1], (number + 3) % 9), inputs[2])
            tokens.check("native", inputs, ((0,), (1,), (0, 1))[number % 3], (start, n))
