"""Weights in 16, 8 and 4 bits against their formulas, number by number, whatever third-party kernels say."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastinvdpo.models import quantization
from fastinvdpo.models.quantization import Kind, QuantizedLinear, nf4_dequantizer

# (out, in): rows shorter than the block of 64, no multiple of it, and flat sizes that are no multiple, odd ones too.
SHAPES = [(64, 32), (96, 32), (32, 96), (256, 32), (64, 16), (64, 64), (64, 128), (24, 48)]
SHAPES += [(33, 70), (5, 13), (7, 9), (1, 1), (1, 63), (1, 65), (3, 129), (31, 2)]
KINDS = get_args(Kind)
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Table of QLoRA, arXiv 2305.14314, appendix E, as float32 holds it.
NF4 = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def _linear(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(sum(shape))
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False)
    sizes = 10 ** (2 * torch.rand(shape[0], 1, generator=generator) - 1)
    linear.weight.copy_(sizes * torch.randn(shape, generator=generator))
    return linear


def _layer(
    shape: tuple[int, int], kind: Kind, dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, QuantizedLinear]:
    """A weight as float64, with magnitudes that differ from row to row and from block to block, and its layer."""
    linear = _linear(shape, dtype)
    return linear.weight.double().numpy(), QuantizedLinear(linear, kind)


def _indices(packed: Tensor, size: int) -> np.ndarray:
    byte = packed.numpy().flatten()
    assert len(byte) == (size + 1) // 2
    return np.stack((byte >> 4, byte & 15), 1).flatten()[:size]


# Every number of float8_e4m3fn by its byte: sign, 4 bits of exponent (bias 7, 0 for numbers below 2^-6), 3 of fraction.
FP8 = np.array([
    (-1) ** (byte >> 7) * (2.0 ** ((byte >> 3 & 15) - 7) * (1 + (byte & 7) / 8) if byte >> 3 & 15 else (byte & 7) / 512)
    for byte in range(256)
])  # fmt: skip
FP8[[127, 255]] = np.nan


def _plain(layer: QuantizedLinear) -> np.ndarray:
    """What the layer stores, made whole one number at a time in float32."""
    shape, scale = (layer.out_features, layer.in_features), layer.scale.numpy()
    if layer.kind == "bf16":
        return (layer.weight.numpy().astype(np.int32) << 16).view(np.float32)
    if layer.kind == "fp8":
        return FP8[layer.weight.numpy()].astype(np.float32) / np.float32(448) * scale[:, None]
    if layer.kind == "int8":
        return np.float32(
            [row.astype(np.float32) * (scale[i] / np.float32(127)) for i, row in enumerate(layer.weight.numpy())]
        )
    indices = _indices(layer.weight, shape[0] * shape[1])
    return np.float32([NF4[index] * scale[place // 64] for place, index in enumerate(indices)]).reshape(shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_exactly_those_of_the_formula(shape: tuple[int, int], kind: Kind, dtype: torch.dtype) -> None:
    _, layer = _layer(shape, kind)
    assert torch.equal(layer.dequantized(dtype), torch.from_numpy(_plain(layer)).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_takes_the_nearest_value_of_the_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, layer = _layer(shape, "nf4", dtype)
    flat = weight.flatten()
    blocks = np.split(flat, range(64, len(flat), 64))
    assert np.array_equal(layer.scale.numpy(), np.float32([np.abs(block).max() for block in blocks]))
    scaled = flat / np.repeat([np.abs(block).max() for block in blocks], [len(block) for block in blocks])
    distances = np.abs(scaled[:, None] - NF4.astype(np.float64))
    taken = distances[np.arange(len(flat)), _indices(layer.weight, len(flat))]
    # The quotient is rounded once, and half the sum of two neighbors once, to 2^-24 at most each (float64: the weight
    # and the scale before that); a distance moves by as much.
    assert (taken <= distances.min(1) + 4 * 2**-24).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_takes_the_nearest_multiple_of_the_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, layer = _layer(shape, "int8", dtype)
    assert np.array_equal(layer.scale.numpy(), np.float32(np.abs(weight).max(1)))
    units = weight / np.abs(weight).max(1, keepdims=True) * 127
    # Quotient and product are rounded once each, to 127 · 2^-24 at most (float64: weight and scale before that).
    assert (np.abs(layer.weight.numpy() - units) <= 0.5 + 4 * 127 * 2**-24).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_takes_the_nearest_number_and_bf16_that_of_pytorch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, layer = _layer(shape, "fp8", dtype)
    largest = np.abs(weight).max(1, keepdims=True)
    assert np.array_equal(layer.scale.numpy(), np.float32(largest[:, 0]))
    units = (weight / largest * 448).reshape(-1, 1)
    distances = np.abs(units - FP8[~np.isnan(FP8)])
    taken = np.abs(units[:, 0] - FP8[layer.weight.numpy().flatten()])
    assert (taken <= distances.min(1) + 4 * 448 * 2**-24).all()
    weight, layer = _layer(shape, "bf16", dtype)
    assert torch.equal(layer.dequantized(torch.bfloat16), torch.from_numpy(weight).to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_whose_weight_waits_on_the_host_computes_the_same(kind: Kind) -> None:
    """And moves with its module no more; gradients too. On a CPU, where both are the host."""
    _, layer = _layer((24, 48), kind)
    offloaded = QuantizedLinear(_linear((24, 48)), kind, offload=True)
    assert offloaded.state_dict().keys() == layer.state_dict().keys()
    assert not dict(offloaded.named_parameters()) and offloaded.to("meta").weight.device.type == "cpu"
    results = []
    for one in (layer, offloaded):
        given = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = one(given)
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_rows_and_blocks_of_zeros_and_of_extreme_numbers_stay_and_nan_does_not_become_finite(kind: Kind) -> None:
    linear = nn.Linear(64, 3, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.tensor([0.0, 2.0**-119, 3e38])[:, None].expand(3, 64))
    layer = QuantizedLinear(linear, kind)
    # Made whole by at most two roundings of normal numbers.
    torch.testing.assert_close(layer.dequantized(torch.float32), linear.weight.data, rtol=2**-23, atol=0)
    for bad in (float("nan"), float("inf")):
        linear = nn.Linear(64, 2, bias=False).requires_grad_(False)
        linear.weight[1, 5] = bad
        finite = QuantizedLinear(linear, kind).dequantized(torch.float32).isfinite()
        assert finite[0].all() and not finite[1, 5]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_format_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    """What it packs, our formula reads; an index may differ where a weight lies between two values to rounding."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes cannot be imported")
    weight, layer = _layer(shape, "nf4")
    packed, state = functional.quantize_4bit(torch.from_numpy(weight).float(), blocksize=64, quant_type="nf4")
    assert torch.equal(state.absmax, layer.scale) and packed.shape == layer.weight.shape
    theirs, ours = (_indices(one, weight.size) for one in (packed, layer.weight))
    assert np.abs(theirs.astype(int) - ours).max() <= 1 and (theirs != ours).mean() < 0.01


def _misplaced(packed: Tensor, state: Any) -> Tensor:
    """Scales as if every row began a block: wrong for the shapes where bitsandbytes 0.50.2 is with AVX-512."""
    rows, columns = state.shape
    block = torch.arange(rows)[:, None] * (columns // 64) + torch.arange(columns) // 64
    return quantization.dequantize_nf4(packed, torch.ones_like(state.absmax), state.shape) * state.absmax[block]


def _right(packed: Tensor, state: Any) -> Tensor:
    return quantization.dequantize_nf4(packed, state.absmax, state.shape)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A third party's kernel for the CPU: ``.dequantize`` of what it is given, ``.calls`` counted."""
    stand_in = SimpleNamespace(dequantize=_right, calls=0)

    def dequantize_4bit(packed: Tensor, state: Any) -> Tensor:
        stand_in.calls += 1
        return stand_in.dequantize(packed, state)

    def quant_state(absmax: Tensor, **attributes: Any) -> SimpleNamespace:
        assert attributes.items() >= {"blocksize": 64, "quant_type": "nf4", "dtype": torch.float32}.items()
        return SimpleNamespace(absmax=absmax, **attributes)

    functional = SimpleNamespace(QuantState=quant_state, dequantize_4bit=dequantize_4bit)
    monkeypatch.setattr(quantization, "require", lambda module, extra, purpose: functional)
    monkeypatch.setattr(quantization, "_KERNEL_DEVICES", ("cuda", "cpu"))
    nf4_dequantizer.cache_clear()
    yield stand_in
    nf4_dequantizer.cache_clear()


@pytest.mark.parametrize("shape", [(64, 32), (32, 96), (5, 13)])
def test_a_wrong_kernel_does_not_reach_the_weights(kernel: SimpleNamespace, shape: tuple[int, int]) -> None:
    kernel.dequantize = _misplaced
    _, layer = _layer(shape, "nf4")
    with pytest.warns(UserWarning, match=rf"wrong nf4 weights of shape \({shape[0]}, {shape[1]}\) on cpu: plain"):
        found = layer.dequantized(torch.float32)
    assert torch.equal(found, torch.from_numpy(_plain(layer)))
    calls = kernel.calls
    layer(torch.ones(1, shape[1]))
    assert kernel.calls == calls


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_kernel_that_errs_in_one_bit_of_one_weight_is_wrong(kernel: SimpleNamespace, place: int) -> None:
    def almost(packed: Tensor, state: Any) -> Tensor:
        whole = _right(packed, state)
        whole.view(-1)[place] = torch.nextafter(whole.view(-1)[place], torch.tensor(2.0))
        return whole

    kernel.dequantize = almost
    with pytest.warns(UserWarning, match="wrong nf4 weights"):
        assert nf4_dequantizer(torch.device("cpu"), torch.Size((8, 8))) is quantization.dequantize_nf4


@pytest.mark.parametrize("dequantize", [_right, _misplaced], ids=["right", "right for whole rows of blocks"])
def test_a_right_kernel_is_called_after_one_check_a_shape(kernel: SimpleNamespace, dequantize: Any) -> None:
    kernel.dequantize = dequantize
    layers = [_layer(shape, "nf4")[1] for shape in ((64, 64), (64, 128), (64, 64))]
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer, calls in zip(layers, (3, 6, 7), strict=True):
            assert torch.equal(layer.dequantized(torch.float32), torch.from_numpy(_plain(layer)))
            assert kernel.calls == calls
    assert torch.equal(torch.get_rng_state(), before)  # the check draws from a generator of its own


def test_without_the_kernel_plain_pytorch_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(quantization, "_KERNEL_DEVICES", ("cpu",))
    nf4_dequantizer.cache_clear()
    with pytest.warns(UserWarning, match=r"PyTorch makes weights in nf4 whole: .* pip install 'fastinvdpo\[bnb\]'"):
        assert nf4_dequantizer(torch.device("cpu"), torch.Size((64, 32))) is quantization.dequantize_nf4
    nf4_dequantizer.cache_clear()
