"""``affine_step``: against the definition in float64, its noise, and as an op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops import native, philox
from fastinvdpo.ops.affine_step import schema
from tests.cases import pairwise

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(native.unavailable()), reason=str(native.unavailable()))),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(outputs: int, n: int = 5, shape: tuple[int, ...] = (3, 4, 4), dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(outputs)
    tensors = torch.randn(1 + outputs, n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    table = torch.randn(n, 1 + outputs, generator=generator, dtype=torch.float64)
    return tensors[0], list(tensors[1:]), table


@pytest.mark.parametrize("count", range(5))
def test_by_definition(count: int) -> None:
    sample, outputs, table = inputs(count)
    columns = [column.view(-1, 1, 1, 1) for column in table.unbind(1)]
    expected = sum(column * tensor for column, tensor in zip(columns, (sample, *outputs), strict=True))
    torch.testing.assert_close(fastinvdpo.affine_step(sample, outputs, table), expected)


def test_inactive_samples_are_untouched() -> None:
    sample, outputs, table = inputs(1, dtype=torch.float32)
    sample[1, 0, 0, 0], outputs[0][3, 0, 0, 0] = float("nan"), float("inf")
    active = torch.tensor([True, False, True, False, True])
    result = fastinvdpo.affine_step(sample, outputs, table.float(), active=active)
    assert torch.equal(result[~active].view(torch.int32), sample[~active].view(torch.int32))
    everyone = fastinvdpo.affine_step(sample, outputs, table.float())
    assert torch.equal(result[active], everyone[active])
    assert result.data_ptr() != sample.data_ptr()


# Into given memory --------------------------------------------------------------------------------------------------

ACTIVE = {"active": torch.tensor([True, False, True, True, False])}
NOISE = {
    "noise_scale": torch.linspace(0.5, 2, 5),
    "noise_index": torch.tensor([3, 3, 8, 1, 2**40]),
    "seed": 7,
    "offset": 2,
}
OPTIONS = [{}, ACTIVE, NOISE, {**ACTIVE, **NOISE}]
FORMS = {
    "contiguous": lambda x: x.clone(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice of a stack": lambda x: torch.stack([x, x, x], dim=1)[:, 1],
    "every other column": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "samples inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("form", "options", "dtype", "stored"), pairwise(FORMS, OPTIONS, [*DTYPES, torch.float64], [*DTYPES, torch.float64])
)
def test_steps_into_given_memory_give_the_same_bits(
    form: str, options: dict[str, object], dtype: torch.dtype, stored: torch.dtype, backend: str
) -> None:
    """A trajectory is rounded once, from the numbers of the arithmetic: those of a step whose sample is so wide."""
    if backend == "native" and dtype == torch.float64:
        return  # the reference's alone
    values, outputs, table = inputs(2, dtype=dtype)
    table, wide = table.float(), values.to(torch.promote_types(dtype, torch.float32))
    with fastinvdpo.use_backend(backend):
        unrounded = fastinvdpo.affine_step(wide, outputs, table, **options)
        for arrange in FORMS.values():
            trajectory = arrange(torch.full_like(values, float("nan"), dtype=stored))
            result = fastinvdpo.affine_step(values, outputs, table, trajectory=trajectory, **options)
            assert torch.equal(trajectory, unrounded.to(stored)) and torch.equal(result, unrounded.to(dtype))
        values[1, 0, 0, 0] = float("nan")
        expected = fastinvdpo.affine_step(values, outputs, table, **options)
        for arrange in FORMS.values():
            sample, out = FORMS[form](values), arrange(torch.full_like(values, float("nan")))
            version = out._version
            result = fastinvdpo.affine_step(sample, outputs, table, out=out, **options)
            assert result is out and out._version > version
            assert torch.equal(bits(out), bits(expected)) and torch.equal(bits(sample), bits(values))
        assert fastinvdpo.affine_step(sample, outputs, table, out=sample, **options) is sample
        into = outputs[1].clone()
        fastinvdpo.affine_step(values, [outputs[0], into], table, out=into, **options)
        assert torch.equal(bits(sample), bits(expected)) and torch.equal(bits(into), bits(expected))


def test_a_walk_through_its_own_trajectory() -> None:
    """Samples of a stack are read and written where they lie, although they interleave."""
    values, outputs, table = inputs(1, dtype=torch.float32)
    stack = torch.stack([values, *[torch.full_like(values, float("nan"))] * 3], dim=1)
    expected = values
    for position in range(3):
        fastinvdpo.affine_step(stack[:, position], outputs, table.float(), out=stack[:, position + 1])
        expected = fastinvdpo.affine_step(expected, outputs, table.float())
        assert torch.equal(stack[:, position + 1], expected)


def test_autograd_knows_of_a_step_in_place() -> None:
    parameter = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        fastinvdpo.affine_step(parameter, [], torch.full((2, 1), 3.0), out=parameter)
    assert torch.equal(parameter.detach(), torch.full((2, 3), 3.0))
    saved = torch.ones(2, 3)
    product = parameter * saved
    fastinvdpo.affine_step(saved, [], torch.ones(2, 1), out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_steps_into_given_memory_compile_without_graph_break() -> None:
    values, outputs, table = inputs(1, dtype=torch.float32)

    def walk(sample: Tensor, chain: Tensor) -> Tensor:
        latents = sample * 1
        for position in range(3):
            options = {"noise_scale": table[:, 0].float(), "seed": position}
            fastinvdpo.affine_step(
                latents, outputs, table.float(), out=latents, trajectory=chain[:, position], **options
            )
        fastinvdpo.affine_step(sample, outputs, table.float(), out=sample)
        return latents

    results = []
    for function in (walk, torch.compile(walk, fullgraph=True, backend="aot_eager")):
        sample, chain = values.clone(), torch.zeros(5, 4, *values.shape[1:], dtype=torch.bfloat16)
        results.append((function(sample, chain), sample, chain))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert float(results[0][2].abs().sum()) > 0 and not torch.equal(results[0][1], values)


# Backward -----------------------------------------------------------------------------------------------------------


GRADS = {
    **FORMS,
    "one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "one number a sample": lambda x: x[:, :1, :1, :1].expand_as(x),
    "one sample": lambda x: x[:1].expand_as(x),
    "one number a channel": lambda x: x[:, :, :1, :1].expand_as(x),
    "one sample, channels last": lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand_as(x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "dtype", "masked"), pairwise(GRADS, [*DTYPES, torch.float64], [False, True]))
def test_gradients_by_definition(form: str, dtype: torch.dtype, masked: bool, backend: str) -> None:
    if backend == "native" and dtype == torch.float64:
        return  # the reference's alone
    sample, outputs, table = inputs(3, dtype=dtype)
    outputs = [output.to(kind) for output, kind in zip(outputs, (dtype, *DTYPES[:2]), strict=True)]
    table, active = table.float(), ACTIVE["active"] if masked else torch.ones(5, dtype=torch.bool)
    grad = GRADS[form](torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype))
    if masked:
        table[1] = float("nan")  # of a sample at rest: looked at by nobody
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (sample, *outputs)]
    with fastinvdpo.use_backend(backend):
        result = fastinvdpo.affine_step(leaves[0], leaves[1:], table, active=active if masked else None)
        found = torch.autograd.grad(result, leaves, grad)
    for column, gradient in enumerate(found):
        assert gradient.dtype == (sample, *outputs)[column].dtype and gradient.shape == grad.shape
        moving = active.view(-1, 1, 1, 1)
        at_rest = grad.double() if column == 0 else torch.zeros_like(grad, dtype=torch.float64)
        exact = torch.where(moving, table[:, column].double().view(-1, 1, 1, 1) * grad.double(), at_rest)
        # A product that is rounded to float32, then to the storage type; float16 has numbers below its normal ones.
        eps = torch.finfo(gradient.dtype).eps
        rounding = 0.5 * eps + (0 if gradient.dtype == torch.float64 else 2.0**-24)
        least = 2.0**-25 if gradient.dtype == torch.float16 else 0.0
        torch.testing.assert_close(gradient.double(), exact, rtol=rounding, atol=least)


def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, outputs, table = inputs(3, dtype=torch.float32)
    outputs[1] = outputs[1].bfloat16()
    asked = []
    kernel = schema._BACKWARD["reference"]

    def backward(*arguments: object) -> list[Tensor]:
        asked.append(arguments[3:])
        return kernel(*arguments)

    monkeypatch.setitem(schema._BACKWARD, "reference", backward)
    with fastinvdpo.use_backend("reference"):
        for wanted in ([2], [0], [1, 2], [0, 1, 2, 3]):
            leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate((sample, *outputs))]
            fastinvdpo.affine_step(leaves[0], leaves[1:], table.float()).sum().backward()
            assert asked.pop() == (wanted, [leaves[i].dtype for i in wanted]) and not asked
            assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(4)]


# Philox -------------------------------------------------------------------------------------------------------------


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's whole numbers."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_philox_against_whole_numbers() -> None:
    """And those against vectors that the authors of Philox publish (Random123, kat_vectors, philox4x32 10)."""
    zeros = philox.blocks(0, 0, torch.zeros(1, dtype=torch.int64), 1)[0, 0]
    assert [f"{int(word):08x}" for word in zeros] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    published = scalar_philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0])
    assert [f"{word:08x}" for word in published] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]
    index = torch.tensor([0, 7, 2**33 + 5, 2**62 + 11])
    seed, offset = 2**62 + 12345, 2**32 - 1
    ours = philox.blocks(seed, offset, index, 3)
    for row, stream in enumerate(index.tolist()):
        for block in range(3):
            counter = [block, offset, stream % 2**32, stream >> 32]
            assert ours[row, block].tolist() == scalar_philox(counter, [seed % 2**32, seed >> 32])


def test_noise_depends_on_stream_alone() -> None:
    one = philox.normal(5, 2, torch.tensor([4]), (3, 5))
    many = philox.normal(5, 2, torch.tensor([9, 4, 4]), (3, 5))
    assert torch.equal(many[1:2], one) and torch.equal(many[2:], one) and not torch.equal(many[:1], one)
    assert torch.equal(philox.normal(5, 2, torch.tensor([4]), (7,)), one.flatten(1)[:, :7])
    assert not torch.equal(philox.normal(5, 3, torch.tensor([4]), (3, 5)), one)
    assert not torch.equal(philox.normal(6, 2, torch.tensor([4]), (3, 5)), one)


def test_noise_is_standard_normal_and_integers_are_uniform() -> None:
    """Kolmogorov-Smirnov against the normal distribution, no correlation between neighbors; chi squared."""
    noise = philox.normal(1, 0, torch.arange(100), (1000,), torch.float64)
    ordered = noise.flatten().sort().values
    distribution = 0.5 * (1 + torch.erf(ordered / 2**0.5))
    empirical = (torch.arange(ordered.numel()) + 0.5) / ordered.numel()
    assert float((distribution - empirical).abs().max()) < 1.63 / ordered.numel() ** 0.5  # 1 % level
    for shift in (1, 2, 3, 4):
        assert abs(float((noise[:, shift:] * noise[:, :-shift]).mean())) < 4 / noise.numel() ** 0.5
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 4 / noise.numel() ** 0.5
    drawn = philox.integers(3, 0, torch.arange(100_000), 10)
    counts = torch.bincount(drawn, minlength=10).double()
    assert int(drawn.min()) == 0 and int(drawn.max()) == 9
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 27.9  # chi squared, 9 degrees of freedom, 0.1 % level
