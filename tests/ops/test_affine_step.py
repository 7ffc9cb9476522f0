"""``affine_step``: against the definition in float64, its noise, and as an op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops import philox
from fastinvdpo.ops.affine_step.op import affine_step_op


def inputs(outputs: int, n: int = 5, shape: tuple[int, ...] = (3, 4, 4), dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(outputs)
    tensors = torch.randn(1 + outputs, n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    table = torch.randn(n, 1 + outputs, generator=generator, dtype=torch.float64)
    return tensors[0], list(tensors[1:]), table


def by_definition(sample: Tensor, outputs: list[Tensor], table: Tensor) -> Tensor:
    result = torch.empty_like(sample)
    for i in range(sample.shape[0]):
        result[i] = table[i, 0] * sample[i] + sum(table[i, 1 + j] * output[i] for j, output in enumerate(outputs))
    return result


@pytest.mark.parametrize("count", range(5))
def test_by_definition(count: int) -> None:
    sample, outputs, table = inputs(count)
    torch.testing.assert_close(fastinvdpo.affine_step(sample, outputs, table), by_definition(sample, outputs, table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    sample, outputs, table = inputs(2, dtype=dtype)
    exact = by_definition(sample.double(), [output.double() for output in outputs], table.float().double())
    ours = fastinvdpo.affine_step(sample, outputs, table.float())
    assert ours.dtype == dtype
    error = (ours.double() - exact).abs() / exact.abs().clamp(min=1e-2)
    assert float(error.max()) < 1.01 * max(torch.finfo(dtype).eps / 2, 2e-5)


def test_inactive_samples_are_untouched() -> None:
    sample, outputs, table = inputs(1, dtype=torch.float32)
    sample[1, 0, 0, 0], outputs[0][3, 0, 0, 0] = float("nan"), float("inf")
    active = torch.tensor([True, False, True, False, True])
    result = fastinvdpo.affine_step(sample, outputs, table.float(), active=active)
    assert torch.equal(result[~active].view(torch.int32), sample[~active].view(torch.int32))
    everyone = fastinvdpo.affine_step(sample, outputs, table.float())
    assert torch.equal(result[active], everyone[active])
    assert result.data_ptr() != sample.data_ptr()


def test_gradcheck() -> None:
    sample, outputs, table = inputs(3, n=3, shape=(2, 2))
    active = torch.tensor([True, False, True])
    tensors = [tensor.requires_grad_() for tensor in (sample, *outputs)]
    assert torch.autograd.gradcheck(lambda x, *o: fastinvdpo.affine_step(x, o, table, active=active), tensors)


def test_gradient_in_the_dtype_of_each_output() -> None:
    sample, outputs, table = inputs(2, dtype=torch.float32)
    half = outputs[0].bfloat16().requires_grad_()
    fastinvdpo.affine_step(sample, [half, outputs[1]], table.float()).sum().backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, table[:, 1].bfloat16().view(-1, 1, 1, 1).expand_as(half))


def test_opcheck() -> None:
    sample, outputs, table = inputs(2, dtype=torch.float32)
    tensors = [output.requires_grad_() for output in outputs]
    active, index = torch.tensor([True, False, True, True, False]), torch.arange(5)
    arguments = (sample.requires_grad_(), tensors, table.float(), active, torch.rand(5), index, 3, 4)
    torch.library.opcheck(affine_step_op.default, arguments)


def test_compiles_without_graph_break() -> None:
    sample, outputs, table = inputs(2, dtype=torch.float32)

    def step(x: Tensor) -> Tensor:
        return fastinvdpo.affine_step(x * 2, outputs, table.float(), noise_scale=torch.ones(5), seed=1).cos()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(sample), step(sample))


# Philox -------------------------------------------------------------------------------------------------------------


def test_philox_known_answers() -> None:
    """The vectors that the authors of Philox publish with their generator (Random123, kat_vectors, philox4x32 10)."""
    zeros = philox.blocks(0, 0, torch.zeros(1, dtype=torch.int64), 1)[0, 0]
    assert [f"{int(word):08x}" for word in zeros] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's whole numbers."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_philox_against_whole_numbers() -> None:
    """The third vector that the authors of Philox publish, and other counters and keys."""
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


def test_noise_is_standard_normal() -> None:
    """Kolmogorov-Smirnov against the normal distribution, and no correlation between neighbours."""
    noise = philox.normal(1, 0, torch.arange(100), (1000,), torch.float64)
    ordered = noise.flatten().sort().values
    distribution = 0.5 * (1 + torch.erf(ordered / 2**0.5))
    empirical = (torch.arange(ordered.numel()) + 0.5) / ordered.numel()
    assert float((distribution - empirical).abs().max()) < 1.63 / ordered.numel() ** 0.5  # 1 % level
    for shift in (1, 2, 3, 4):
        assert abs(float((noise[:, shift:] * noise[:, :-shift]).mean())) < 4 / noise.numel() ** 0.5
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 4 / noise.numel() ** 0.5


def test_integers_are_uniform() -> None:
    drawn = philox.integers(3, 0, torch.arange(100_000), 10)
    counts = torch.bincount(drawn, minlength=10).double()
    assert int(drawn.min()) == 0 and int(drawn.max()) == 9
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 27.9  # chi squared, 9 degrees of freedom, 0.1 % level


def test_added_noise() -> None:
    sample, _, table = inputs(0, dtype=torch.float32)
    scale, index = torch.rand(5), torch.tensor([3, 3, 8, 1, 0])
    ours = fastinvdpo.affine_step(sample, [], table.float(), noise_scale=scale, noise_index=index, seed=11, offset=6)
    noise = philox.normal(11, 6, index, (3, 4, 4))
    expected = table.float().view(-1, 1, 1, 1) * sample + scale.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(ours, expected)
