"""LoRA adapters inside a network: put in, switched off, merged, written."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models.quantization import whole_weight

# Written whatever their values: what readers ask for. peft 0.18 knows all of them.
_ALWAYS = frozenset((
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias", "fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights",
    "rank_pattern", "alpha_pattern",
))  # fmt: skip
# They tell who wrote the file and how it computed, not what the adapter is.
_NEVER = frozenset(("peft_version", "runtime_config"))


def adapter_settings(network: nn.Module) -> dict[str, Any]:
    """The settings of the adapter inside ``network``, for inference, as JSON can hold them.

    peft's own ``to_dict`` has every field that the installed version knows, and diffusers raises a TypeError on one
    that the reader's peft does not. Here a field beyond the common ones stands only where it is not at its default.
    """
    layers: Any = network
    config = layers.peft_config["default"]
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in _ALWAYS or (field.name not in _NEVER and value != default):
            settings[field.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
    return settings | {"peft_type": str(config.peft_type.value), "inference_mode": True}


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
            raise invalid(
                "model.lora.target_modules", target, "names no module of the network", f"choose among {leaves}"
            )
    network.requires_grad_(False)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    try:
        peft.inject_adapter_in_model(settings, network)
    except ValueError as error:
        raise invalid(
            "model.lora.target_modules",
            targets,
            f"cannot carry adapters ({error})",
            "name linear or convolution layers",
        ) from error


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Inside, ``network`` computes what it did without adapters; afterwards they are back, also after an error."""
    layers = _adapter_layers(network)
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
    tuners = require("peft.tuners.tuners_utils", extra="train", purpose="merging LoRA")
    merged = copy.deepcopy(network)
    for name, module in list(merged.named_modules()):
        if isinstance(module, tuners.BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(False)


@torch.no_grad()
def merged_into(base: nn.Module, network: nn.Module) -> nn.Module:
    """``base``, a network without adapters, with those of ``network`` folded into its weights in place.

    The layers of both have the same names, and may have other weights: those below the adapters may be quantized.
    """
    tuners = require("peft.tuners.tuners_utils", extra="train", purpose="merging LoRA")
    for name, layer in network.named_modules():
        if isinstance(layer, tuners.BaseTunerLayer):
            weight: Any = base.get_submodule(name).weight
            for adapter in layer.active_adapters:
                weight += layer.get_delta_weight(adapter).to(weight)
    return base.requires_grad_(False)


def save_adapter(network: nn.Module, directory: Path) -> None:
    """Write the adapter in peft's own format, which ``peft.PeftModel.from_pretrained(unet, directory)`` reads."""
    peft = require("peft", extra="train", purpose="saving a LoRA adapter")
    safetensors = require("safetensors.torch", extra="train", purpose="saving a LoRA adapter")
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(adapter_settings(network), indent=2, sort_keys=True)
    (directory / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
    weights = peft.get_peft_model_state_dict(network)
    # PeftModel keeps the network below two wrappers, and its files carry that prefix.
    renamed = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    safetensors.save_file(renamed, directory / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def perturb(network: nn.Module, scale: float, seed: int) -> None:
    """Move the trainable weights by random amounts of relative size ``scale``, so that policy ≠ reference.

    Full fine-tuning: every tensor W gains ``scale·rms(W)·z``. LoRA, whose product B·A starts at zero: B is drawn so
    that the update it makes to its layer has ``scale`` times the root mean square of that layer's weight.
    """
    generator = torch.Generator().manual_seed(seed)
    if not any(".lora_" in name for name, _ in network.named_parameters()):
        for parameter in network.parameters():
            parameter.add_(_normal_like(parameter, generator), alpha=scale * _rms(parameter))
        return
    for layer in _adapter_layers(network):
        for name, up in layer.lora_B.items():
            down = layer.lora_A[name].weight
            # Entries of B·A: rank·var(B)·mean(A²) is their variance.
            size = layer.scaling[name] * math.sqrt(layer.r[name]) * _rms(down)
            up.weight.add_(
                _normal_like(up.weight, generator), alpha=scale * _rms(whole_weight(layer.get_base_layer())) / size
            )


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device, tensor.dtype)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _adapter_layers(network: nn.Module) -> list[Any]:
    tuners = require("peft.tuners.tuners_utils", extra="train", purpose="training with LoRA")
    return [module for module in network.modules() if isinstance(module, tuners.BaseTunerLayer)]
