"""Adapters that the installed peft wrote load with peft 0.18, the oldest that pyproject.toml allows."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from fastinvdpo.config.sections import LoraSection
from fastinvdpo.models import load_model
from fastinvdpo.models.adapter_files import adapter_contents, save_adapter
from fastinvdpo.models.adapters import perturb
from fastinvdpo.trainer.networks import Networks
from tests.models import tiny

# The fields of LoraConfig in peft 0.18.0 and 0.18.1. peft 0.19 adds lora_ga_config and use_bdlora to them.
PEFT_0_18 = frozenset((
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config",
    "use_dora", "alora_invocation_tokens", "use_qalora", "qalora_group_size", "layer_replication", "runtime_config",
    "lora_bias", "target_parameters", "arrow_config", "ensure_weight_tying",
))  # fmt: skip


class OldLoraConfig(peft.LoraConfig):
    """Takes the fields of 0.18 alone."""

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            if name not in PEFT_0_18:
                raise TypeError(f"LoraConfig.__init__() got an unexpected keyword argument {name!r}")
        super().__init__(**settings)


@pytest.fixture
def old_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "LoraConfig", OldLoraConfig)
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PeftType.LORA, OldLoraConfig)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, a pipeline, and ``adapter`` for it in both formats; with what the policy predicts."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny.sd_pipeline().save_pretrained(folder / "base", safe_serialization=True)
    model: Any = load_model("stable-diffusion", folder / "base")
    networks = Networks(model, lora=LoraSection(rank=2, alpha=8.0), gradient_checkpointing=False)
    perturb(networks.policy_module, 0.5, seed=0)
    save_adapter(networks.policy_module, folder / "adapter", model.origin)
    model.save_lora(folder / "adapter", networks.policy_module)
    torch.save(predict(networks.policy_module), folder / "prediction.pt")
    return folder


@torch.no_grad()
def predict(unet: Any) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = torch.randn(2, 3, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    prediction: torch.Tensor = unet.eval()(latents, torch.tensor([5, 500]), prompts).sample
    return prediction


def settings_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings in the file of each format."""
    with safe_open(folder / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    theirs = {name.removeprefix("unet."): value for name, value in described.items()}
    return {"peft": json.loads((folder / "adapter" / "adapter_config.json").read_text()), "diffusers": theirs}


def test_both_files_say_the_same_in_words_of_peft_0_18(folder: Path) -> None:
    settings = settings_in(folder)
    assert settings["peft"] == settings["diffusers"]
    assert settings["peft"].keys() <= PEFT_0_18 - {"peft_version", "runtime_config"}
    told = {name: settings["peft"][name] for name in ("peft_type", "r", "lora_alpha", "bias", "inference_mode")}
    assert told == {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "inference_mode": True}
    assert settings["peft"]["target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]


def test_a_reader_at_its_own_defaults_has_the_adapter_that_was_trained(folder: Path) -> None:
    read = peft.LoraConfig(**settings_in(folder)["peft"])
    trained = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    trained.inference_mode = True
    trained.base_model_name_or_path = str(folder / "base")
    assert dataclasses.asdict(read) == dataclasses.asdict(trained)


def test_a_field_that_only_the_newest_knows_is_written_where_it_matters() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    config = peft.LoraConfig(r=2, target_modules=["0"], exclude_modules=["1"])
    peft.inject_adapter_in_model(config, network)
    _, settings = adapter_contents(network)
    assert settings["exclude_modules"] == ["1"]
    assert "layers_pattern" not in settings


def test_peft_0_18_reads_the_adapter(folder: Path, old_peft: None) -> None:
    unet = StableDiffusionPipeline.from_pretrained(folder / "base").unet
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        adapted = peft.PeftModel.from_pretrained(unet, str(folder / "adapter"))
    assert type(adapted.peft_config["default"]) is OldLoraConfig
    torch.testing.assert_close(predict(adapted), torch.load(folder / "prediction.pt"), rtol=0, atol=0)


def test_diffusers_on_peft_0_18_reads_the_adapter(folder: Path, old_peft: None) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "base")
    pipeline.load_lora_weights(folder / "adapter", weight_name="pytorch_lora_weights.safetensors")
    assert type(pipeline.unet.peft_config["default_0"]) is OldLoraConfig
    torch.testing.assert_close(predict(pipeline.unet), torch.load(folder / "prediction.pt"), rtol=0, atol=0)
