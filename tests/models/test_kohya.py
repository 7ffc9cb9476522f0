"""LoRA files in kohya's names: read back by diffusers' converter and by the published key map they are the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import adapter_contents, add_lora, perturb
from fastinvdpo.models.kohya import FILE, layer_names, save_kohya
from tests.models import tiny

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
DOUBLE = tuple(f"transformer_blocks.0.{layer}" for layer in (
    *(f"attn.{name}" for name in (*ATTENTION, "add_q_proj", "add_v_proj")), "ff.net.2", "norm1.linear",
))  # fmt: skip
TARGETS = {"sd15": ATTENTION, "sdxl": (*ATTENTION, "conv1"), "flux": DOUBLE, "qwen": (*ATTENTION, "to_add_out")}


def adapted(directory: Path, name: str, targets: tuple[str, ...]) -> Any:
    """A model whose network has an adapter of rank 2 and alpha 8, away from zero."""
    tiny.PIPELINES[name]().save_pretrained(directory / name, safe_serialization=True)
    model: Any = load_model("auto", directory / name, **({"resolution": 16} if name in tiny.FLOW else {}))
    add_lora(model.network, rank=2, alpha=8.0, targets=targets)
    perturb(model.network, 0.5, seed=0)
    return model


def changes(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What an adapter adds to the weight of each layer."""
    tensors, _ = adapter_contents(network)
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    return {
        layer: tensors[f"{layer}.lora_B.weight"].flatten(1) @ tensors[f"{layer}.lora_A.weight"].flatten(1)
        for layer in layers
    }


@pytest.mark.parametrize("name", list(TARGETS))
def test_diffusers_reads_the_trained_change(tmp_path: Path, name: str) -> None:
    model = adapted(tmp_path, name, TARGETS[name])
    expected = changes(model.network)
    save_kohya(model.family, model.network, adapter_contents(model.network)[0], tmp_path)
    plain: Any = load_model("auto", tmp_path / name).pipeline
    plain.load_lora_weights(tmp_path, weight_name=FILE)
    network = getattr(plain, model.network_folder)
    found = {
        layer: module.get_delta_weight(module.active_adapters[0]).flatten(1)
        for layer, module in network.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert expected.keys() <= found.keys()
    for layer, change in found.items():
        wanted = expected.get(layer, torch.zeros_like(change))
        torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-7, msg=layer)


def test_flux_has_the_names_and_the_fused_layers_of_its_original_code(tmp_path: Path) -> None:
    """Rows of a fused layer, in their published order, are the projections; a projection without an adapter is zero."""
    model = adapted(tmp_path, "flux", ("to_q", "to_v", "proj_mlp", "0.proj_out", "attn.to_out.0", "add_k_proj"))
    expected = changes(model.network)
    save_kohya("flux", model.network, adapter_contents(model.network)[0], tmp_path)
    tensors = load_file(tmp_path / FILE)
    fused = {
        "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
        "double_blocks_0_txt_attn_qkv": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
        "double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
        "single_blocks_0_linear1": [
            *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"), "single_transformer_blocks.0.proj_mlp"
        ],
        "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
    }  # fmt: skip
    assert {name.split(".")[0] for name in tensors} == {f"lora_unet_{name}" for name in fused}
    for name, layers in fused.items():
        down, up, alpha = (
            tensors[f"lora_unet_{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        rows = [
            expected.get(layer, torch.zeros(model.network.get_submodule(layer).out_features, down.shape[1]))
            for layer in layers
        ]
        torch.testing.assert_close(float(alpha) / len(down) * up @ down, torch.cat(rows), rtol=1e-5, atol=1e-7)


def test_layers_and_families_without_a_name_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"output\.formats = 'kohya': has no name for the layer x_embedder"):
        layer_names("flux", ["x_embedder"])
    with pytest.raises(InvalidInput, match=r"output\.formats = 'kohya': has no names for the family z-image"):
        layer_names("z-image", [])
