"""LoRA files under the names of kohya's scripts, as ComfyUI, Forge and other tools read them.

A layer is ``lora_unet_`` and its name with underscores; its tensors are ``lora_down.weight``, ``lora_up.weight`` and
``alpha``. SD, SDXL and Qwen-Image keep diffusers' names. FLUX.1 has those of its original code, where projections of
one input are one layer: of their adapters the first factors stand one below the other, the second ones on a diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models.adapters import order_metadata
from fastinvdpo.models.base import TrainedModel

FILE = "lora_kohya.safetensors"
FAMILIES = ("stable-diffusion", "flux", "flux-kontext", "qwen-image", "qwen-image-edit")
# The layers of a block under their original names, and those of diffusers that are in each.
_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_FLUX_BLOCKS = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
_FLUX_LAYER = re.compile(r"(?P<kind>(single_)?transformer_blocks)\.(?P<block>\d+)\.(?P<layer>.+)")


def layer_names(family: str, layers: list[str]) -> dict[str, list[str]]:
    """``kohya's name -> diffusers' names`` of all layers that are in it, for a network whose ``layers`` are adapted.

    Raises ``InvalidInput`` for a family or a layer whose name there is not known.
    """
    if family not in FAMILIES:
        remedy = "leave it out: ComfyUI and Forge read diffusers' file of the other families"
        raise invalid("output.formats", "kohya", f"has no names for the family {family}", remedy)
    if not family.startswith("flux"):
        return {f"lora_unet_{layer.replace('.', '_')}": [layer] for layer in layers}
    names = {}
    for layer in layers:
        match = _FLUX_LAYER.fullmatch(layer)
        blocks, groups = _FLUX_BLOCKS[match["kind"]] if match else ("", {})
        group = next((name for name, members in groups.items() if match and match["layer"] in members), None)
        if match is None or group is None:
            remedy = "leave it out of model.lora.target_modules, or kohya out of output.formats"
            raise invalid("output.formats", "kohya", f"has no name for the layer {layer}", remedy)
        members = [f"{match['kind']}.{match['block']}.{member}" for member in groups[group]]
        names[f"lora_unet_{blocks}_{match['block']}_{group}"] = members
    return names


def check_layers(model: TrainedModel, targets: Sequence[str]) -> None:
    """Raise ``InvalidInput`` where an adapter on the named modules of a model's network could not be written."""
    names = [name for name, module in model.network.named_modules() if hasattr(module, "weight")]
    adapted = [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]
    layer_names(model.family, adapted)


def kohya_tensors(family: str, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, of an adapter in peft's names whose scale is in its tensors (``adapter_contents``)."""
    layers = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors))
    written = {}
    for name, members in layer_names(family, layers).items():
        downs = [tensors[f"{layer}.lora_A.weight"] for layer in members if layer in layers]
        ups = [_second_factor(network, tensors, layer) for layer in members]
        down, up = (downs[0], ups[0]) if len(members) == 1 else (torch.cat(downs), torch.block_diag(*ups))
        written[f"{name}.lora_down.weight"], written[f"{name}.lora_up.weight"] = down, up
        written[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return written


def _second_factor(network: nn.Module, tensors: Mapping[str, Tensor], layer: str) -> Tensor:
    """``(out, rank)``; rank 0 for a layer without an adapter."""
    if (found := tensors.get(f"{layer}.lora_B.weight")) is not None:
        return found
    plain: Any = network.get_submodule(layer)
    return torch.zeros(plain.out_features, 0)


def save_kohya(family: str, network: nn.Module, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write :data:`FILE`; arguments as of :func:`kohya_tensors`."""
    safetensors = require("safetensors.torch", extra="train", purpose="saving a LoRA adapter")
    written = {name: tensor.contiguous() for name, tensor in kohya_tensors(family, network, tensors).items()}
    metadata = {"ss_network_module": "networks.lora", "format": "pt"}
    safetensors.save_file(written, directory / FILE, metadata=metadata)
    order_metadata(directory / FILE)
