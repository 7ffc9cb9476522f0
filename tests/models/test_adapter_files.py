"""Adapters as files: what is written means the same to every reader, what is read fits to the last tensor."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastinvdpo.config.sections import LoraSection
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import adapters as files
from fastinvdpo.models import load_model
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
    files.save_adapter(networks.policy_module, folder / "adapter", model.origin)
    model.save_lora(folder / "adapter", networks.policy_module)
    torch.save(predict(networks.policy_module), folder / "prediction.pt")
    return folder


@torch.no_grad()
def predict(unet: Any) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = torch.randn(2, 3, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    prediction: torch.Tensor = unet.eval()(latents, torch.tensor([5, 500]), prompts).sample
    return prediction


def test_both_files_say_the_same_in_words_of_peft_0_18(folder: Path) -> None:
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    with safe_open(folder / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings == {name.removeprefix("unet."): value for name, value in described.items()}
    assert settings.keys() <= PEFT_0_18 - {"peft_version", "runtime_config"}
    told = {name: settings[name] for name in ("peft_type", "r", "lora_alpha", "bias", "inference_mode")}
    assert told == {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "inference_mode": True}
    assert settings["target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    read = peft.LoraConfig(**settings)  # by a reader at its own defaults
    trained = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    trained.inference_mode = True
    trained.base_model_name_or_path = str(folder / "base")
    assert dataclasses.asdict(read) == dataclasses.asdict(trained)


def test_files_have_the_same_bytes_each_time_they_are_written(folder: Path, tmp_path: Path) -> None:
    """safetensors writes several entries of metadata in any order."""
    model: Any = load_model("stable-diffusion", folder / "base")
    networks = Networks(model, lora=LoraSection(rank=2, alpha=8.0), gradient_checkpointing=False)
    names = ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors")
    written = set()
    for _ in range(16):
        model.save_lora(tmp_path, networks.policy_module, ("diffusers", "kohya"))
        written.add(tuple((tmp_path / name).read_bytes() for name in names))
    assert len(written) == 1
    assert load_file(tmp_path / names[0]).keys() == load_file(folder / "adapter" / names[0]).keys()


def test_a_field_that_only_the_newest_knows_is_written_where_it_matters() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    config = peft.LoraConfig(r=2, target_modules=["0"], exclude_modules=["1"])
    peft.inject_adapter_in_model(config, network)
    _, settings = files.adapter_contents(network)
    assert settings["exclude_modules"] == ["1"]
    assert "layers_pattern" not in settings


def test_peft_0_18_reads_the_adapter_and_diffusers_on_it(folder: Path, old_peft: None) -> None:
    unet = StableDiffusionPipeline.from_pretrained(folder / "base").unet
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        adapted = peft.PeftModel.from_pretrained(unet, str(folder / "adapter"))
    assert type(adapted.peft_config["default"]) is OldLoraConfig
    torch.testing.assert_close(predict(adapted), torch.load(folder / "prediction.pt"), rtol=0, atol=0)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "base")
    pipeline.load_lora_weights(folder / "adapter", weight_name="pytorch_lora_weights.safetensors")
    assert type(pipeline.unet.peft_config["default_0"]) is OldLoraConfig
    torch.testing.assert_close(predict(pipeline.unet), torch.load(folder / "prediction.pt"), rtol=0, atol=0)


def trained_change(folder: Path) -> dict[str, torch.Tensor]:
    """Layer -> what peft adds to its weight."""
    unet = StableDiffusionPipeline.from_pretrained(folder / "base").unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    after = peft.PeftModel.from_pretrained(unet, str(folder / "adapter")).merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def test_the_tensors_alone_give_the_trained_change(folder: Path) -> None:
    """A dictionary without settings, for diffusers; and kohya's names, by diffusers' own key map."""
    tensors = load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    kohya = convert_state_dict_to_kohya(dict(tensors))
    assert {float(tensor) for name, tensor in kohya.items() if name.endswith(".alpha")} <= {2.0}
    for stored, tolerance in ((tensors, 0), (kohya, 1e-6)):
        pipeline = StableDiffusionPipeline.from_pretrained(folder / "base")
        pipeline.load_lora_weights(dict(stored))
        expected = torch.load(folder / "prediction.pt")
        torch.testing.assert_close(predict(pipeline.unet), expected, rtol=0, atol=tolerance)


def test_an_adapter_names_the_weights_that_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    assert files.trained_on(folder / "adapter" / "adapter_model.safetensors") == {"path": str(folder / "base")}
    tiny.unet().save_pretrained(tmp_path / "tuned" / "unet")
    model: Any = load_model("auto", folder / "base", unet_init=tmp_path / "tuned", frozen_parts=False)
    networks = Networks(model, lora=LoraSection(rank=2), gradient_checkpointing=False)
    files.save_adapter(networks.policy_module, tmp_path / "adapter", model.origin)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "tuned")
    assert files.trained_on(tmp_path / "adapter" / "adapter_model.safetensors")["unet_init"] == str(tmp_path / "tuned")


def peft_names(name: str) -> str:
    return f"base_model.model.{name}"


def kohya_names(name: str) -> str:
    layer, _, factor = name.partition(".lora_")
    return f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"


def older_names(name: str) -> str:
    layer, _, factor = name.partition(".lora_")
    parent, _, child = layer.removesuffix(".0").rpartition(".")
    return f"unet.{parent}.processor.{child}_lora.{'down' if factor[0] == 'A' else 'up'}.weight"


NAMES: dict[str, Callable[[str], str]] = {
    "peft": peft_names,
    "bare": lambda name: name,
    "unet.": lambda name: f"unet.{name}",
    "transformer.": lambda name: f"transformer.{name}",
    "compiled": lambda name: f"unet._orig_mod.{name}",
    "distributed": lambda name: f"module.unet.{name}",
    "named adapter": lambda name: peft_names(name).replace(".weight", ".default.weight"),
    "nested": lambda name: f"state_dict.unet.{name}",
    "kohya": kohya_names,
    "diffusers of 2023": older_names,
}


Tensors = dict[str, torch.Tensor]


def stored(folder: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    save_file({n: t.contiguous() for n, t in change(plain).items()}, target, metadata={"format": "pt"})
    return target


def merged(folder: Path, file: Path) -> dict[str, torch.Tensor]:
    """Layer -> what reading and merging ``file`` adds to its weight."""
    model = load_model("auto", folder / "base", frozen_parts=False)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    files.merge_adapter(model.network, files.read_adapter(file, model.network, model.translated_lora))
    after = model.network.state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_every_known_way_of_naming_is_read(folder: Path, tmp_path: Path, name: Callable[[str], str]) -> None:
    file = stored(folder, tmp_path / "own.safetensors", lambda tensors: {name(n): t for n, t in tensors.items()})
    assert files.adapter_file(tmp_path) == files.adapter_file(file) == file
    torch.testing.assert_close(merged(folder, file), trained_change(folder), rtol=1e-4, atol=1e-6)


def test_names_of_the_original_sdxl_code_are_read(tmp_path: Path) -> None:
    tiny.sdxl_pipeline().save_pretrained(tmp_path / "base")
    model = load_model("auto", tmp_path / "base", frozen_parts=False)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    first = f"lora_unet_{layer.replace('.', '_').replace('down_blocks_1_attentions_0', 'input_blocks_3_1')}"
    width = model.network.get_submodule(layer).weight.shape[0]  # type: ignore[union-attr, index]
    factors = {"lora_down.weight": torch.randn(2, width), "lora_up.weight": torch.randn(width, 2)}
    tensors = {f"{first}.{name}": tensor for name, tensor in factors.items()} | {f"{first}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "own.safetensors")
    adapter = files.read_adapter(tmp_path / "own.safetensors", model.network, model.translated_lora)
    assert list(adapter) == [layer] and adapter[layer][2] == 0.5


def test_alpha_counts_by_tensor_by_layer_and_by_the_root_of_the_rank(folder: Path, tmp_path: Path) -> None:
    whole = trained_change(folder)
    alphas = [f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.alpha" for name in whole]
    ones = {name: torch.tensor(1.0) for name in alphas}
    file = stored(folder, tmp_path / "own.safetensors", lambda t: {kohya_names(n): v for n, v in t.items()} | ones)
    halved = {name: change / 2 for name, change in whole.items()}
    torch.testing.assert_close(merged(folder, file), halved, rtol=1e-4, atol=1e-6)
    target = tmp_path / "adapter"
    target.mkdir()
    stored(folder, target / "adapter_model.safetensors", lambda tensors: {peft_names(n): t for n, t in tensors.items()})
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    changed = settings | {"use_rslora": True, "alpha_pattern": {"attn1.to_q": 6}}
    (target / "adapter_config.json").write_text(json.dumps(changed))
    factors = {True: 6 / math.sqrt(2), False: 2 / math.sqrt(2)}
    expected = {name: change * factors[name.endswith("attn1.to_q.weight")] for name, change in whole.items()}
    torch.testing.assert_close(merged(folder, target / "adapter_model.safetensors"), expected, rtol=1e-4, atol=1e-6)


def with_another(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.zeros(2, 16)}


UNKNOWN = "unet.no.such.layer"
MISFITS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "unknown layer": (with_another(f"{UNKNOWN}.lora_A.weight"), f"has unknown {UNKNOWN}|no known format"),
    "half a layer": (lambda tensors: dict(sorted(tensors.items())[1:]), "lacks half of down_blocks"),
    "text encoder": (with_another("text_encoder.layers.0.q_proj.lora_A.weight"), "changes text encoders .*q_proj"),
    "kohya's text encoder": (with_another("lora_te1_q_proj.lora_down.weight"), "changes text encoders"),
    "DoRA": (with_another("unet.conv_in.lora_magnitude_vector"), "is a DoRA"),
    "LoHa": (with_another("lora_unet_conv_in.hada_w1_a"), "is a LoHa"),
    "another model": (lambda tensors: {n: torch.zeros(2, 2) for n in tensors}, "does not fit the base model: .*layer"),
    "nothing": (lambda tensors: {}, "holds no tensors"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_tensors_that_fit_no_layer_are_refused(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    file = stored(folder, tmp_path / "own.safetensors", change)
    with pytest.raises(InvalidInput, match=rf"aligned = .*own\.safetensors.*({message})"):
        merged(folder, file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4', which is not read"),
        ({"peft_type": "LOHA"}, "has peft_type 'LOHA'"),
        ({"use_dora": True}, "has use_dora True"),
        ({"lora_alpha": None}, "has unusable settings"),
        ({"alpha_pattern": {"(": 1}}, "has unusable settings"),
        ([], "adapter_config.json': holds no JSON object"),
    ],
)
def test_settings_of_another_change_are_refused(folder: Path, tmp_path: Path, settings: Any, message: str) -> None:
    file = stored(folder, tmp_path / "adapter_model.safetensors", lambda tensors: tensors)
    own = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    content = own | settings if isinstance(settings, dict) else settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=f"aligned = .*{message}"):
        merged(folder, file)


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"pickle")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(InvalidInput, match="is stored as pickles"):
            files.adapter_file(path)
