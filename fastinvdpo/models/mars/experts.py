"""SemVIE: every layer of a decoder gets a second, visual expert, and each token takes the one of its modality."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastinvdpo.errors import invalid

_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT = "self_attn.o_proj"
_MLP = "mlp"
_NORMS = ("input_layernorm", "post_attention_layernorm")


class Routing(NamedTuple):
    """Which tokens of a batch each expert takes: places in the flattened batch, and the order that puts them back."""

    text: Tensor
    visual: Tensor
    back: Tensor

    @classmethod
    def of(cls, visual: Tensor) -> Routing:
        """From a bool ``(B, L)``: whether a token is the visual expert's. On a GPU this waits for the device."""
        flat = visual.flatten()
        text_at, visual_at = (~flat).nonzero().squeeze(1), flat.nonzero().squeeze(1)
        return cls(text_at, visual_at, torch.cat([text_at, visual_at]).argsort())


class Routed(nn.Module):
    """A text expert and a visual one in the place of one module; each computes its own tokens alone.

    Without image tokens the text expert sees exactly what it would see unrouted. ``routing`` is set by the layer.
    """

    routing: Routing | None = None

    def __init__(self, text: nn.Module, visual: nn.Module) -> None:
        super().__init__()
        self.text, self.visual = text, visual

    def forward(self, hidden: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D')``."""
        routing = self.routing
        if routing is None or len(routing.visual) == 0 or len(routing.text) == 0:
            expert = self.text if routing is None or len(routing.visual) == 0 else self.visual
            whole: Tensor = expert(hidden)
            return whole
        flat = hidden.flatten(0, 1)
        text = self.text(flat.index_select(0, routing.text))
        visual = self.visual(flat.index_select(0, routing.visual))
        return torch.cat([text, visual]).index_select(0, routing.back).unflatten(0, hidden.shape[:2])


def add_experts(layers: nn.ModuleList, shared_output: bool = False, visual_norms: bool = False) -> None:
    """Give every layer a visual expert, a copy of its text expert, which is frozen.

    A layer then takes the keyword ``routing``, a :class:`Routing`; where activations are checkpointed, the layer that
    runs again takes it again. Norms stay shared and frozen, as the paper's figure shows them, unless ``visual_norms``.

    Args:
        layers: decoder layers of the Llama/Qwen shape.
        shared_output: leave the attention's output projection to the text expert for all tokens.

    Raises:
        InvalidInput: a layer has another shape.
    """
    names = (*_INPUTS, *(() if shared_output else (_OUTPUT,)), _MLP, *(_NORMS if visual_norms else ()))
    layers.requires_grad_(False)
    for layer in layers:
        check_layer(layer)
        for name in names:
            parent, _, own = name.rpartition(".")
            text = layer.get_submodule(name)
            visual = copy.deepcopy(text).requires_grad_(True)
            setattr(layer.get_submodule(parent), own, Routed(text, visual))
        kind: Any = type(layer)
        layer.__class__ = _routed_layer(kind)


def check_layer(layer: nn.Module) -> None:
    """Raise ``InvalidInput`` unless the layer has the parts that experts are made of, dense ones."""
    needed = (*_INPUTS, _OUTPUT, *(f"{_MLP}.{name}_proj" for name in ("gate", "up", "down")), *_NORMS)
    have = dict(layer.named_modules())
    if missing := [name for name in needed if name not in have]:
        problem = f"has no {', '.join(missing)}: it is not of the Llama/Qwen shape"
        raise invalid("decoder", type(layer).__name__, problem, "pass a Llama, Qwen2 or Qwen3 decoder without experts")


@cache
def _routed_layer(kind: Any) -> Any:
    """A decoder layer whose forward takes ``routing``; not a hook, as activation checkpointing repeats the forward."""

    def forward(self: nn.Module, *arguments: Any, routing: Routing | None = None, **options: Any) -> Any:
        for module in self.modules():
            if isinstance(module, Routed):
                module.routing = routing
        return kind.forward(self, *arguments, **options)

    return type(kind.__name__, (kind,), {"forward": forward})
