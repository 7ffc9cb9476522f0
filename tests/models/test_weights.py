"""Weights match the model's configuration, or the load fails with the file and the names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from tests.models import tiny

UNET, ENCODER = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE, SECOND = "vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl")
    tiny.sdxl_pipeline().save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


Tensors = dict[str, torch.Tensor]


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def lack_one(tensors: Tensors) -> Tensors:
    return dict(sorted(tensors.items())[1:])


def with_another(tensors: Tensors) -> Tensors:
    return {**tensors, "no.such.weight": torch.zeros(2)}


def of_another_shape(tensors: Tensors) -> Tensors:
    name = min(name for name in tensors if name.endswith("weight"))
    return {**tensors, name: torch.zeros(3, *tensors[name].shape)}


MISFITS = [(file, lack_one) for file in (UNET, VAE, ENCODER, SECOND)]
MISFITS += [(file, change) for file in (UNET, ENCODER) for change in (with_another, of_another_shape)]


@pytest.mark.parametrize(("file", "change"), MISFITS)
def test_weights_that_do_not_fit_are_refused_by_file_or_name(checkpoint: Path, file: str, change: Any) -> None:
    name = min(load_file(checkpoint / file)) if change is lack_one else "no.such.weight"
    rewrite(checkpoint / file, change)
    with pytest.raises(InvalidInput, match=rf"model\.path = .*{file.split('/')[0]}") as caught:
        load_model("auto", checkpoint)
    assert change is of_another_shape or name in str(caught.value)


WRAPPERS = {
    "compiled": "_orig_mod.{}",
    "distributed": "module.{}",
    "both": "module._orig_mod.{}",
    "a part of a pipeline": "{part}.{}",
    "peft": "base_model.model.{}",
    "nested": "state_dict.{}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrappers_names_of_the_network_are_translated(original: Path, checkpoint: Path, wrapper: str) -> None:
    rewrite(checkpoint / UNET, lambda tensors: {wrapper.format(n, part="unet"): t for n, t in tensors.items()})
    expected, got = (load_model("auto", path, frozen_parts=False).network for path in (original, checkpoint))
    assert all(map(torch.equal, expected.parameters(), got.parameters()))


def test_a_whole_pipelines_weights_serve_as_the_network(original: Path, tmp_path: Path) -> None:
    tensors = {
        f"{part}.{n}": t for part, file in (("unet", UNET), ("vae", VAE)) for n, t in load_file(original / file).items()
    }
    (tmp_path / "unet").mkdir()
    shutil.copyfile(original / "unet/config.json", tmp_path / "unet/config.json")
    save_file({n: t + 1 for n, t in tensors.items()}, tmp_path / UNET, metadata={"format": "pt"})
    found = load_model("auto", original, unet_init=tmp_path).network.state_dict()
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in load_file(original / UNET).items())


def test_attention_names_of_older_diffusers_still_fit(original: Path, checkpoint: Path) -> None:
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name

    rewrite(checkpoint / VAE, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    assert load_file(checkpoint / VAE).keys() != load_file(original / VAE).keys()
    got, expected = (load_model("auto", path).pipeline.vae for path in (checkpoint, original))  # type: ignore[attr-defined]
    assert all(map(torch.equal, got.parameters(), expected.parameters()))


def test_a_text_encoder_under_other_names_and_a_cut_off_file_are_refused(checkpoint: Path) -> None:
    rewrite(checkpoint / SECOND, lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()})
    with pytest.raises(InvalidInput, match=r"text_encoder_2.*does not fit the model: it lacks .*_orig_mod"):
        load_model("auto", checkpoint)
    content = (checkpoint / UNET).read_bytes()
    (checkpoint / UNET).write_bytes(content[:-100])
    with pytest.raises(InvalidInput, match=r"diffusion_pytorch_model\.safetensors': is no whole safetensors file"):
        load_model("auto", checkpoint)


def test_the_only_variant_is_read_and_of_several_one_must_be_named(original: Path, tmp_path: Path) -> None:
    for variant in ("fp16", "ema"):
        pipeline = tiny.sd_pipeline().to(dtype=torch.float16)
        pipeline.save_pretrained(tmp_path / "model", safe_serialization=True, variant=variant)
        if variant == "fp16":
            model = load_model("auto", tmp_path / "model", frozen_parts=False)
            assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
            model.save(tmp_path / "saved")
            DiffusionPipeline.from_pretrained(tmp_path / "saved")
    with pytest.raises(InvalidInput, match=r"as the variants ema, fp16, not plain ones.*model\.variant, or --variant"):
        load_model("auto", tmp_path / "model")
    load_model("auto", tmp_path / "model", variant="ema")
    with pytest.raises(InvalidInput, match=r"model\.variant = 'fp16': is no variant that"):
        load_model("auto", original, variant="fp16")
