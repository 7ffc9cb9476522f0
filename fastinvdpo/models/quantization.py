"""Frozen linear layers in 8 or 4 bits: quantised by bitsandbytes, made whole for each product.

Convolutions have no such layers there and stay as they are. So do norms and biases, which are small.

The products are not those of bitsandbytes' own layers. Its ``Linear8bitLt`` rounds the input to 8 bits as well, that of
the policy and that of the reference each for itself: where the two differ by 0.1 %, that is several times their
difference. It also keeps every input until the backward pass, past gradient checkpointing. Its ``Linear4bit`` fixes its
type at the first call, and turns, on CPUs with bf16 instructions, to a product that autograd does not know.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastinvdpo._extras import require

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel

Kind: TypeAlias = Literal["int8", "nf4"]

_BLOCK = 64


class QuantizedLinear(nn.Linear):
    """``x·Wᵀ + b`` with ``W`` frozen in 8 or 4 bits, in the type of ``x``, or autocast's.

    The weight is made whole in that type for the product, and once more for the gradient of ``x``; between the two
    nothing is kept. The sums are those of ``nn.Linear`` with the weight :meth:`dequantized`.

    Args:
        linear: the layer that it takes the place of, on the device where it is; its bias is taken over.
        kind: ``"int8"``: each row of the weight as 8-bit numbers with one scale (as LLM.int8(), arXiv 2208.07339, has
            weights). ``"nf4"``: blocks of 64 as 4-bit NormalFloat (QLoRA, arXiv 2305.14314).

    Attributes:
        weight: ``(out, in)`` int8, or ``(in·out / 2, 1)`` uint8, two numbers in each.
        scale: float32, the largest magnitude of each row ``(out,)`` or block ``(in·out / 64,)``.
    """

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        weight = linear.weight.detach().contiguous()
        if kind == "int8":
            packed, scale, _ = _bitsandbytes().int8_vectorwise_quant(weight.to(torch.float16))
        else:
            packed, state = _bitsandbytes().quantize_4bit(weight, blocksize=_BLOCK, quant_type="nf4")
            scale = state.absmax
        # Parameters, not buffers, which DistributedDataParallel would send around at every call.
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.requires_grad_(False).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(input, self)
        return product

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight ``(out, in)`` that the layer multiplies by, rounded to ``dtype`` from float32."""
        if self.kind == "int8":
            whole = _bitsandbytes().int8_vectorwise_dequant(self.weight, self.scale)
        else:
            shape = torch.Size((self.out_features, self.in_features))
            state = _bitsandbytes().QuantState(
                self.scale, shape=shape, blocksize=_BLOCK, quant_type="nf4", dtype=torch.float32
            )
            whole = _bitsandbytes().dequantize_4bit(self.weight, state)
        return whole.to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(given.dtype)
        return nn.functional.linear(given, layer.dequantized(given.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


def quantize_linear_layers(network: nn.Module, kind: Kind) -> None:
    """Replace every ``nn.Linear`` of a frozen network in place, on the device where it is.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    for parent in list(network.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:  # a subclass may mean another product
                setattr(parent, name, QuantizedLinear(linear, kind))


def quantize_network(model: DiffusionModel, kind: Kind, again: Callable[[], nn.Module] | None = None) -> None:
    """Quantise the linear layers of a model's network, and let ``model.unquantized()`` give the network as it was.

    Args:
        again: makes that network; None: a copy is kept on the host.
    """
    if again is None:
        again = functools.partial(copy.deepcopy, _on_host(model.network))
    quantize_linear_layers(model.network, kind)
    model.unquantized = again


def whole_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer, quantised or not."""
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


@functools.cache
def _bitsandbytes() -> Any:
    return require("bitsandbytes.functional", extra="bnb", purpose="quantising weights")
