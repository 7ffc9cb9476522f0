"""``token_log_probs``: against log-softmax in float64, as an op, and on every backend at most twice the error of plain
PyTorch.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import fastinvdpo
from benchmarks.measure import Task, footprint
from fastinvdpo import InvalidInput, token_log_probs
from fastinvdpo.ops import native, triton_kernels
from tests.cases import pairwise
from tests.places import CPU, Place, on_gpu

pytestmark = pytest.mark.usefixtures("poisoned")
everywhere = pytest.mark.parametrize(
    "place", CPU if triton_kernels.interpreted() else [*CPU, *on_gpu("reference", "triton")]
)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F64: 2.0**-53, F32: 2.0**-24, BF16: 2.0**-9, F16: 2.0**-12}


def problem(
    tokens: int = 5, vocabulary: int = 37, width: int = 8, dtypes: tuple[torch.dtype, ...] = (F64, F64),
    columns: tuple[int, int] | None = None, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(hidden, weight, targets)``; logits of about ``scale``."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator, dtype=F64) * scale / width**0.5
    weight = torch.randn(vocabulary, width, generator=generator, dtype=F64)
    targets = torch.randint(*(columns or (0, vocabulary)), (tokens,), generator=generator)
    return hidden.to(dtypes[0]), weight.to(dtypes[1]), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, columns: tuple[int, int] | None = None) -> Tensor:
    """From all logits, in float32 or, of float64, in that."""
    start, stop = columns or (0, len(weight))
    logits = torch.nn.functional.linear(hidden, weight[start:stop])
    return logits.to(F64 if F64 in (hidden.dtype, weight.dtype) else F32).log_softmax(-1)[
        torch.arange(len(targets)), targets - start
    ]


def both_ways(compute, inputs, of, columns=None):  # type: ignore[no-untyped-def]
    """The values, and the gradients with respect to the inputs of these places."""
    leaves = [tensor.detach().clone().requires_grad_(place in of) for place, tensor in enumerate(inputs[:2])]
    values = compute(*leaves, inputs[2], columns)
    slope = torch.linspace(-1, 2, len(values), dtype=values.dtype, device=values.device)
    return [values.detach(), *torch.autograd.grad(values, [leaves[place] for place in of], slope)]


def terms(wide: list[Tensor], columns: tuple[int, int] | None) -> list[Tensor]:
    """The sums of the absolute terms of both gradients of :func:`both_ways`."""
    hidden, weight, targets = wide
    start, stop = columns or (0, len(weight))
    shares = (hidden @ weight[start:stop].T).softmax(1)
    shares[torch.arange(len(targets)), targets - start] += 1
    shares *= torch.linspace(-1, 2, len(targets), dtype=F64).abs().unsqueeze(1)
    return [shares @ weight[start:stop].abs(), shares.T @ hidden.abs()]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, columns: tuple[int, int] | None) -> Tensor:
    return token_log_probs(hidden, weight, targets, columns=columns)


def check(backend: str, inputs: list[Tensor], of: tuple[int, ...], columns: tuple[int, int] | None) -> None:
    """Values and gradients: at most twice the error of the reference, or of one rounding."""
    with fastinvdpo.use_backend(backend):
        found = both_ways(ours, inputs, of, columns)
    with fastinvdpo.use_backend("reference"):
        usual = both_ways(ours, inputs, of, columns)
    wide = [inputs[0].double(), inputs[1].double(), inputs[2]]
    exact = both_ways(plain, wide, of, columns)
    # A logit's rounding is of the size of its terms, whatever is left of their sum, and moves what follows from it. So
    # is that of the gradients, w_target − Σ p·w and the like.
    logit = ROUNDING[F32] * float((wide[0].abs() @ wide[1].abs().T).max())
    sizes = [exact[0].abs(), *(terms(wide, columns)[place] for place in of)]
    for one, other, expected, size, dtype in zip(
        found, usual, exact, sizes, [F32, *(inputs[i].dtype for i in of)], strict=True
    ):
        assert one.shape == expected.shape and one.dtype == dtype and one.isfinite().all()
        error, allowed = ((tensor.double() - expected).norm() for tensor in (one, other))
        assert error <= 2 * max(allowed, (ROUNDING[dtype] + logit) * size.norm()), (error, allowed)


@pytest.mark.parametrize(
    ("columns", "of", "scale"), pairwise([None, (3, 20), (36, 37), (0, 37)], [(0,), (1,), (0, 1)], [1.0, 200.0])
)
def test_log_softmax_in_float64(columns: tuple[int, int] | None, of: tuple[int, ...], scale: float) -> None:
    inputs = problem(columns=columns, scale=scale)
    for found, expected in zip(
        both_ways(ours, inputs, of, columns), both_ways(plain, inputs, of, columns), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [None, (3, 20)])
@pytest.mark.parametrize("trained", [False, True])
def test_derivatives_of_first_and_second_order(columns: tuple[int, int] | None, trained: bool) -> None:
    hidden, weight, targets = problem(3, 23, 4, columns=columns)
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trained else [])]

    def function(*given: Tensor) -> Tensor:
        return ours(given[0], given[1] if trained else weight, targets, columns)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@everywhere
@pytest.mark.parametrize(
    ("shape", "dtypes", "of", "some", "scale"),
    pairwise(
        [(1, 1, 1), (3, 37, 8), (70, 150, 33), (17, 300, 64)],
        [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)],
        [(0,), (1,), (0, 1)], [False, True], [1.0, 30.0],
    ),
)  # fmt: skip
def test_errors_of_at_most_twice_plain_pytorch(
    place: Place, shape: tuple[int, int, int], dtypes: tuple[torch.dtype, ...], of: tuple[int, ...], some: bool,
    scale: float,
) -> None:  # fmt: skip
    columns = (shape[1] // 5, max(1, shape[1] - shape[1] // 4)) if some else None
    inputs = [tensor.to(place.device) for tensor in problem(*shape, dtypes=dtypes, columns=columns, scale=scale)]
    check(place.backend, inputs, of, columns)


@everywhere
def test_far_logits_tokens_alone_and_what_is_not_finite(place: Place) -> None:
    """Logits of ±10⁴; a token's value is that of any batch; NaN stays in its token."""
    hidden, weight, targets = (tensor.to(place.device) for tensor in problem(9, 50, 16, (F32, F32), scale=1e4))
    with fastinvdpo.use_backend(place.backend):
        values = token_log_probs(hidden, weight, targets)
        torch.testing.assert_close(
            values.double(), plain(hidden.double(), weight.double(), targets), rtol=1e-5, atol=1e-2
        )
        torch.testing.assert_close(
            token_log_probs(hidden[3:4], weight, targets[3:4]), values[3:4], rtol=1e-6, atol=4e-3
        )
        hidden[2, 5] = torch.nan
        assert token_log_probs(hidden, weight, targets).isnan().tolist() == [row == 2 for row in range(9)]
        leaf = hidden.requires_grad_()
        (gradient,) = torch.autograd.grad(token_log_probs(leaf, weight, targets).sum(), leaf)
        assert gradient.isnan().any(1).tolist() == [row == 2 for row in range(9)]


@everywhere
def test_leading_dimensions_and_strides(place: Place) -> None:
    hidden, weight, targets = (tensor.to(place.device) for tensor in problem(12, 40, 16, (F32, F32)))
    with fastinvdpo.use_backend(place.backend):
        expected = token_log_probs(hidden, weight, targets)
        other = torch.stack([weight, torch.full_like(weight, torch.nan)], 2)[..., 0]
        shaped = hidden.view(3, 4, 16).transpose(0, 1)
        found = token_log_probs(shaped, other, targets.view(3, 4).transpose(0, 1))
    torch.testing.assert_close(found, expected.view(3, 4).transpose(0, 1))


BACKWARD = [(True, True), (True, False), (False, True)]


@everywhere
@pytest.mark.parametrize(("of_hidden", "of_weight"), BACKWARD)
def test_opcheck(place: Place, of_hidden: bool, of_weight: bool) -> None:
    hidden, weight, targets = (tensor.to(place.device) for tensor in problem(6, 30, 8, (F32, BF16)))
    with fastinvdpo.use_backend(place.backend):
        saved = torch.ops.fastinvdpo.token_log_probs(hidden, weight, targets, 0, 30, False)[1]
        slopes = torch.randn(2, 6, device=place.device)
        backward = torch.ops.fastinvdpo.token_log_probs_backward.default
        torch.library.opcheck(backward, (*slopes, hidden, weight, targets, saved, 0, 30, of_hidden, of_weight))
        leaves = hidden.requires_grad_(of_hidden), weight.requires_grad_(of_weight)
        forward = torch.ops.fastinvdpo.token_log_probs.default
        torch.library.opcheck(forward, (*leaves, targets, 0, 30, of_hidden and not of_weight))


def test_compiles_without_graph_break_and_maps() -> None:
    hidden, weight, targets = problem(dtypes=(F32, F32))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return token_log_probs(h * 1.5, w, targets).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(*(leaf.detach() for leaf in leaves)), expected)
    output = token_log_probs(*leaves, targets)
    both = torch.autograd.grad(output, leaves, torch.eye(5), is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(output, leaves, row, retain_graph=True) for row in torch.eye(5)]
    torch.testing.assert_close(both, tuple(map(torch.stack, zip(*alone, strict=True))))


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize(("dtype", "trained"), [(F32, False), (BF16, False), (F32, True)])
def test_the_native_kernel_crosses_blocks_and_its_memory_does_not_grow_with_the_vocabulary(
    dtype: torch.dtype, trained: bool
) -> None:
    """More rows and columns than a block has, ends of blocks off a multiple, targets in every block."""
    peaks = []
    for vocabulary in (2100, 8400):
        columns = (1030, vocabulary - 7)
        inputs = problem(530, vocabulary, 16, (dtype, dtype), columns)
        check("native", inputs, (0, 1) if trained else (0,), columns)
        inputs[0].requires_grad_(), inputs[1].requires_grad_(trained)

        def call(*given: Tensor, columns: tuple[int, int] = columns) -> object:
            return torch.autograd.grad(ours(*given, columns).sum(), given[: 1 + trained])

        with fastinvdpo.use_backend("native"):
            peak = footprint(Task(partial(call, *inputs)), torch.device("cpu")).peak_bytes
        assert peak is not None
        peaks.append(peak - trained * inputs[1].nbytes)
    assert peaks[0] == peaks[1]


CASES = [
    ("hidden", torch.zeros(0, 8), "hidden.shape = (0, 8)"),
    ("hidden", torch.zeros(5, 8).int(), "hidden.dtype"),
    ("weight", torch.zeros(37, 7), "weight.shape = (37, 7)"),
    ("weight", torch.zeros(37, 8, dtype=torch.int8), "weight.dtype"),
    ("targets", torch.zeros(4, dtype=torch.int64), "targets.shape = (4,)"),
    ("targets", torch.zeros(5), "targets.dtype"),
    ("targets", torch.tensor([0, 1, 2, 37, 3]), "targets = (0, 37)"),
    ("targets", torch.tensor([0, 1, 2, -100, 3]), "targets = (-100, 3)"),
    ("columns", (5, 5), "columns = (5, 5)"),
    ("columns", (0, 38), "columns = (0, 38)"),
]


@pytest.mark.parametrize(("name", "value", "message"), CASES)
def test_bad_input_is_named(name: str, value: object, message: str) -> None:
    hidden, weight, targets = problem(dtypes=(F32, F32))
    given = {"hidden": hidden, "weight": weight, "targets": targets, name: value}
    with pytest.raises(InvalidInput, match="Remedy: ") as caught:
        token_log_probs(**given)
    assert str(caught.value).startswith(message)
