"""LoRA adapters inside a network: put in, switched off, merged."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models.quantization import whole_weight


def add_lora(network: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Put LoRA layers on the named modules of ``network`` in place; only they are trainable afterwards.

    Raises:
        InvalidInput: a target names no module, or one that cannot carry an adapter.
        MissingExtra: peft is not installed.
    """
    peft = require("peft", extra="train", purpose="training with LoRA")
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names if name and not name[-1].isdigit()})
            problem = "names no module of the network"
            raise invalid("model.lora.target_modules", target, problem, f"choose among {leaves}")
    network.requires_grad_(False)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    try:
        peft.inject_adapter_in_model(settings, network)
    except ValueError as error:
        problem = f"cannot carry adapters ({error})"
        raise invalid("model.lora.target_modules", targets, problem, "name linear or convolution layers") from error


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Inside, ``network`` computes what it did without adapters; afterwards they are back, also after an error."""
    layers = [layer for _, layer in _adapter_layers(network)]
    # Not enable_adapters(), which also changes what is trainable: under FSDP2 of other tensors before than after.
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_copy(network: nn.Module) -> nn.Module:
    """A copy of a network with adapters, in which they are folded into ordinary weights."""
    merged = copy.deepcopy(network)
    for name, layer in _adapter_layers(merged):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(False)


@torch.no_grad()
def merged_into(base: nn.Module, network: nn.Module) -> nn.Module:
    """``base``, a network without adapters, with those of ``network`` folded into its weights in place.

    The layers of both have the same names, and may have other weights: those below the adapters may be quantized.
    """
    for name, layer in _adapter_layers(network):
        weight: Any = base.get_submodule(name).weight
        for adapter in layer.active_adapters:
            weight += layer.get_delta_weight(adapter).to(weight)
    return base.requires_grad_(False)


@torch.no_grad()
def perturb(network: nn.Module, scale: float, seed: int) -> None:
    """Move the trainable weights by random amounts of relative size ``scale``, so that policy ≠ reference.

    Full fine-tuning: every tensor W gains ``scale·rms(W)·z``. LoRA, whose product B·A starts at zero: B is random, and
    so large that its update has ``scale`` times the root mean square of its layer's weight.
    """
    generator = torch.Generator().manual_seed(seed)
    if not any(".lora_" in name for name, _ in network.named_parameters()):
        for parameter in network.parameters():
            parameter.add_(_normal_like(parameter, generator), alpha=scale * _rms(parameter))
        return
    for _, layer in _adapter_layers(network):
        for name, up in layer.lora_B.items():
            # Entries of B·A: rank·var(B)·mean(A²) is their variance.
            size = layer.scaling[name] * math.sqrt(layer.r[name]) * _rms(layer.lora_A[name].weight)
            wanted = scale * _rms(whole_weight(layer.get_base_layer()))
            up.weight.add_(_normal_like(up.weight, generator), alpha=wanted / size)


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device, tensor.dtype)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _adapter_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """``(name, layer)`` of every layer that carries adapters."""
    tuners = require("peft.tuners.tuners_utils", extra="train", purpose="training with LoRA")
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, tuners.BaseTunerLayer)]
