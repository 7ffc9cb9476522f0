"""Frozen linear layers in 16, 8 or 4 bits, made whole for each product, and between products on the host if one likes.
Convolutions, norms and biases stay as they are.

The numbers are those of the plain formulas here. On a GPU bitsandbytes' kernel makes nf4 whole, for shapes where it has
given the bits of :func:`dequantize_nf4`. Its one for AVX-512 (0.50.2) is wrong where a row is no multiple of a block.

The layers are not those of bitsandbytes. Its ``Linear8bitLt`` rounds the inputs to 8 bits as well, of policy and
reference separately: where the two differ by 0.1 %, that is several times their difference. It also keeps every input
until the backward pass, past gradient checkpointing. Its ``Linear4bit`` fixes its type at the first call, and turns, on
CPUs with bf16 instructions, to a product that autograd does not know. diffusers' group offloading moves what it finds
below a block, adapters with it, whose gradients then meet weights on the host.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastinvdpo._extras import require
from fastinvdpo.errors import MissingExtra

if TYPE_CHECKING:
    from fastinvdpo.models.base import TrainedModel

Kind: TypeAlias = Literal["bf16", "fp8", "int8", "nf4"]
Dequantize: TypeAlias = Callable[[Tensor, Tensor, torch.Size], Tensor]

BLOCK = 64  # weights that share a scale in nf4
# The 16 values of 4-bit NormalFloat: QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

_LARGEST = 448.0  # of float8_e4m3fn
_KERNEL_DEVICES = ("cuda",)  # where a kernel of bitsandbytes is worth its check


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to multiples of its scale / 127, to nearest; as LLM.int8() has weights (arXiv 2208.07339).

    Returns int8 of the shape of ``weight`` ``(out, in)``, and the largest magnitude of each row, float32 ``(out,)``.
    """
    weight = weight.float()
    scale = weight.abs().amax(1)
    return (weight / _divisor(scale)[:, None] * 127).round().to(torch.int8), scale


def dequantize_int8(quantized: Tensor, scale: Tensor) -> Tensor:
    """``quantized · scale / 127`` in float32, the inverse of :func:`quantize_int8` up to its rounding."""
    return quantized * (scale / 127)[:, None]


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to float8_e4m3fn (4 bits of exponent, 3 of fraction), the largest magnitude to the format's, 448.

    Returns the bytes, uint8 of the shape of ``weight`` ``(out, in)``, and the largest magnitude of each row, float32
    ``(out,)``.
    """
    weight = weight.float()
    scale = weight.abs().amax(1)
    return (weight / _divisor(scale)[:, None] * _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8), scale


def dequantize_fp8(quantized: Tensor, scale: Tensor) -> Tensor:
    """``number · scale / 448`` in float32, the inverse of :func:`quantize_fp8` up to its rounding."""
    return quantized.view(torch.float8_e4m3fn).float() / _LARGEST * scale[:, None]


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each weight by the nearest of ``NF4 · scale``, in blocks of 64 of the flat weight; the last may be short.

    Returns uint8 ``(⌈numel / 2⌉, 1)``, two indices into ``NF4`` in each, the first in the upper half; and the largest
    magnitude of each block, float32 ``(⌈numel / 64⌉,)``. bitsandbytes has the same format.
    """
    blocks = nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    values = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize(blocks / _divisor(scale)[:, None], (values[1:] + values[:-1]) / 2, out_int32=True)
    upper, lower = nearest.to(torch.uint8).view(-1, 2)[: math.ceil(weight.numel() / 2)].unbind(1)
    return (upper << 4 | lower)[:, None], scale


def dequantize_nf4(packed: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """The weight of ``shape`` that :func:`quantize_nf4` packed: ``NF4[index] · scale`` of its block, in float32."""
    whole = nn.functional.pad(packed.flatten(), (0, -packed.numel() % (BLOCK // 2)))
    values = nn.functional.embedding(whole.int(), _pairs(packed.device)).view(-1, BLOCK)
    return values.mul_(scale[:, None]).flatten()[: shape.numel()].view(shape)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two values that a byte stands for: ``(256, 2)``."""
    values = torch.tensor(NF4, device=device)
    return torch.stack((values.repeat_interleave(16), values.repeat(16)), 1)


@functools.cache
def nf4_dequantizer(device: torch.device, shape: torch.Size) -> Dequantize:
    """Choose what makes weights of ``shape`` whole on a device: bitsandbytes' kernel or :func:`dequantize_nf4`.

    The kernel must be there and give every bit of the formula, for random indices and for those of 1.0 alone, as a 0.0
    would hide a wrong scale. Warns if it does not.
    """
    if device.type not in _KERNEL_DEVICES:
        return dequantize_nf4
    try:
        _bitsandbytes()
    except MissingExtra as missing:
        warnings.warn(f"plain PyTorch makes weights in nf4 whole: {missing}", stacklevel=2)
        return dequantize_nf4
    generator, size = torch.Generator().manual_seed(0), shape.numel()
    indices = torch.randint(256, (math.ceil(size / 2), 1), generator=generator, dtype=torch.uint8).to(device)
    scale = torch.rand(math.ceil(size / BLOCK), generator=generator).to(device)
    probes = ((packed, scale, shape) for packed in (indices, torch.full_like(indices, 255)))
    if all(torch.equal(_by_bitsandbytes(*probe), dequantize_nf4(*probe)) for probe in probes):
        return _by_bitsandbytes
    problem = f"bitsandbytes gives wrong nf4 weights of shape {tuple(shape)} on {device}"
    warnings.warn(f"{problem}: plain PyTorch takes its place", stacklevel=2)
    return dequantize_nf4


def _by_bitsandbytes(packed: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    state = _bitsandbytes().QuantState(scale, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=torch.float32)
    whole: Tensor = _bitsandbytes().dequantize_4bit(packed, state)
    return whole


def _bitsandbytes() -> Any:
    return require("bitsandbytes.functional", extra="bnb", purpose="bitsandbytes' kernel for weights in nf4")


class QuantizedLinear(nn.Linear):
    """``x·Wᵀ + b`` with ``W`` frozen in 16, 8 or 4 bits, in the type of ``x``, or autocast's.

    The weight is made whole in that type for the product, and once more for the gradient of ``x``; between the two
    nothing is kept. The sums are those of ``nn.Linear`` with the weight :meth:`dequantized`. ``linear``: the layer that
    it takes the place of, on the device where it is; its bias is taken over. ``offload``: the weight waits on the host,
    page-locked where there is a GPU, and crosses over for each product.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, kind: Kind, offload: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        packed, scale = _QUANTIZE[kind](linear.weight.detach())
        # Wan takes the type of its embedding of time from that of the first parameter.
        for name, tensor in (("scale", scale), ("weight", packed)):
            if offload:  # no parameter: those move with the module, and DistributedDataParallel wants them in one place
                setattr(self, name, tensor.cpu().pin_memory() if torch.cuda.is_available() else tensor.cpu())
            else:  # no buffer: DistributedDataParallel would send those around at every call
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", linear.bias)
        self.requires_grad_(False).train(linear.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "scale", "bias"):
            if (value := getattr(self, name)) is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(input, self)
        return product

    def dequantized(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The weight ``(out, in)`` that the layer multiplies by, rounded to ``dtype`` from float32.

        ``device``: where it is made; None: where it is kept.
        """
        shape, kept = torch.Size((self.out_features, self.in_features)), (self.weight, self.scale)
        packed, scale = (tensor.to(device, non_blocking=True) for tensor in kept)
        return _DEQUANTIZE[self.kind](packed, scale, shape).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(given.dtype)
        return nn.functional.linear(given, layer.dequantized(given.dtype, given.device), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype, gradient.device), None


_QUANTIZE: dict[Kind, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "bf16": lambda weight: (weight.to(torch.bfloat16).view(torch.int16), weight.new_ones(())),
    "fp8": quantize_fp8,
    "int8": quantize_int8,
    "nf4": quantize_nf4,
}
_DEQUANTIZE: dict[Kind, Dequantize] = {
    "bf16": lambda packed, scale, shape: packed.view(torch.bfloat16),
    "fp8": lambda packed, scale, shape: dequantize_fp8(packed, scale),
    "int8": lambda packed, scale, shape: dequantize_int8(packed, scale),
    "nf4": lambda packed, scale, shape: nf4_dequantizer(packed.device, shape)(packed, scale, shape),
}


def quantize_linear_layers(network: nn.Module, kind: Kind, offload: bool = False) -> None:
    """Replace every ``nn.Linear`` of a frozen network in place, on the device where it is."""
    for parent in list(network.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:  # a subclass may mean another product
                setattr(parent, name, QuantizedLinear(linear, kind, offload))


def quantize_network(
    model: TrainedModel, kind: Kind, again: Callable[[], nn.Module] | None = None, *, offload: bool = False
) -> None:
    """Quantize the linear layers of a model's network, and let ``model.unquantized()`` give the network as it was.

    ``again`` makes that network; None: a copy is kept on the host.
    """
    if again is None:
        again = functools.partial(copy.deepcopy, _on_host(model.network))
    quantize_linear_layers(model.network, kind, offload)
    model.unquantized = again


def whole_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer, quantized or not."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantized(torch.float32)
    weight: Any = layer.weight
    return weight.detach()


def _on_host(network: nn.Module) -> nn.Module:
    """A copy on the host, never a whole one on the network's own device first."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        there = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
    return copy.deepcopy(network, memo)
