"""The cache with text encoders and a VAE: training from it loads neither, and SDXL keeps each image's geometry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastinvdpo.data import write_pairs
from fastinvdpo.errors import InvalidInput
from fastinvdpo.trainer import TrainConfig, precompute, train
from fastinvdpo.trainer.batches import BatchBuilder, PairEncoder
from fastinvdpo.trainer.opening import open_dataset, open_model
from fastinvdpo.trainer.order import DrawOrder
from tests.models import tiny as models
from tests.trainer import tiny
from tests.trainer.test_cache import refuse
from tests.trainer.test_files import flip

PAIRS = 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures of several sizes; three captions."""
    root, rng = tmp_path_factory.mktemp("sd"), np.random.default_rng(0)
    models.sd_pipeline().save_pretrained(root / "sd", safe_serialization=True)
    models.sdxl_pipeline().save_pretrained(root / "sdxl", safe_serialization=True)
    rows = []
    for i in range(PAIRS):
        sizes = [(16, 16 + 2 * i, 3), (18 + i, 16, 3)]
        first, second = (Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes)
        rows.append(
            {"jpg_0": first, "jpg_1": second, "label_0": 1, "label_1": 0, "caption": "abc"[i % 3] * (1 + i % 3)}
        )
    write_pairs(root / "pairs.parquet", rows)
    return root


def _config(root: Path, output: Path, model: str, method: str, /, **sections: Any) -> TrainConfig:
    values = tiny.mapping(
        root,
        method,
        model={"family": "stable-diffusion", "path": str(root / model), **sections.pop("model", {})},
        data={"resolution": 16},
        training={"steps": 3},
        optimizer={"epsilon": 1e3, "learning_rate": 1.0, "max_grad_norm": None},
        output={"directory": str(output), "log_every": 1},
    )
    return TrainConfig.from_mapping({**values, **sections})


@pytest.mark.parametrize(("model", "method"), [("sd", "diffusion-dpo"), ("sdxl", "inversion-dpo")])
def test_training_from_the_cache_loads_neither_vae_nor_text_encoder(
    pictures: Path, tmp_path: Path, model: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = {"cache": {"path": str(tmp_path / "cache")}}
    spot = train(_config(pictures, tmp_path / "spot", model, method), progress=False)
    stored = precompute(_config(pictures, tmp_path / "run", model, method, **cached), progress=False)
    assert stored.index.first["caption"][-1] == 3
    assert ("geometry.time_ids" in stored.stored["image"]) == (model == "sdxl")
    with monkeypatch.context() as patched:
        for part in (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer):
            patched.setattr(part, "from_pretrained", refuse)
        result = train(_config(pictures, tmp_path / "run", model, method, **cached), progress=False)
    # Text encoder and VAE saw other batches, where they may round otherwise.
    for row, expected in zip(result.history, spot.history, strict=True):
        for name in ("loss", "policy_mse_winner", "policy_mse_loser", "gradient_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3), name
    one, other = (DiffusionPipeline.from_pretrained(run.model_directory) for run in (result, spot))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if (module := getattr(other, part, None)) is not None:
            tiny.assert_same(dict(getattr(one, part).state_dict()), dict(module.state_dict()))
    assert one.tokenizer("a bc").input_ids == other.tokenizer("a bc").input_ids
    index = [json.loads((run.model_directory / "model_index.json").read_text()) for run in (result, spot)]
    index[1].pop("_name_or_path", None)
    assert index[0] == index[1]


def test_sdxl_geometry_belongs_to_the_image(pictures: Path, tmp_path: Path) -> None:
    config = _config(pictures, tmp_path, "sdxl", "inpo", cache={"path": str(tmp_path / "cache"), "dtype": "bf16"})
    stored = precompute(config, progress=False)
    sizes = [size for i in range(PAIRS) for size in ((16, 16 + 2 * i), (18 + i, 16))]
    pairs = [stored.fetch(i, i) for i in range(PAIRS)]
    ids = torch.stack([side["geometry.time_ids"] for pair in pairs for side in pair.sides])
    assert ids.dtype == torch.float32
    assert ids[:, :2].tolist() == [[float(height), float(width)] for height, width in sizes]
    assert set(stored.stored["caption"]) == set(stored.unconditional) == {"encoder_hidden_states", "text_embeds"}
    assert all(float(tensor.abs().max()) == 0 for tensor in stored.unconditional.values())  # force_zeros


def test_sampled_latents_are_the_same_from_the_cache_and_at_every_visit(pictures: Path, tmp_path: Path) -> None:
    """Eighteen draws of five pairs, in batches of three; a picture's sample depends on nothing else."""
    sampled = {"resolution": 16, "latents": "sampled"}
    values = _config(pictures, tmp_path, "sd", "inpo", cache={"path": str(tmp_path / "cache")}).as_dict()
    values["data"] |= sampled
    config = TrainConfig.from_mapping(values)
    order, at_once = DrawOrder(PAIRS, 0, 3, 1), {"with_unconditional": False}
    dataset, model = open_dataset(config), open_model(config)
    sampled_pairs = PairEncoder(model, dataset, sampled_latents=True, cache_gib=0.0)
    means, samples, cached = (
        BatchBuilder(pairs, model.device, order, **at_once)
        for pairs in (PairEncoder(model, dataset), sampled_pairs, precompute(config, progress=False))
    )
    for start in range(0, 18, 3):
        draws = range(start, start + 3)
        latents = samples.build(draws).latents
        torch.testing.assert_close(cached.build(draws).latents, latents, rtol=1e-4, atol=1e-5)
        away = (latents - means.build(draws).latents).flatten(1).abs().amax(1)
        assert (away > 1e-2).all(), away
    values["data"]["latents"] = "mean"
    with pytest.raises(InvalidInput, match=r"different are data\.latents"):
        precompute(TrainConfig.from_mapping(values), progress=False)


def test_every_part_that_matters_is_in_the_key(pictures: Path, tmp_path: Path) -> None:
    """One bit of one weight. InPO's cache does not depend on the UNet, which is its policy."""
    root = Path(shutil.copytree(pictures, tmp_path / "root"))

    def fill(method: str, **model: Any) -> None:
        cache = {"path": str(tmp_path / method)}
        precompute(_config(root, tmp_path / "run", "sd", method, model=model, cache=cache), progress=False)

    for method in ("inpo", "inversion-dpo"):
        fill(method)
    other = models.unet()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    other.save_pretrained(tmp_path / "unet", safe_serialization=True)
    with pytest.raises(InvalidInput, match=r"different are model unet \(sha256"):
        fill("inversion-dpo", unet_init=str(tmp_path / "unet"))
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (root / "sd" / part).glob("*.safetensors")
        bit = 8 * (file.stat().st_size - 3)
        flip(file, bit)
        if part == "unet":
            fill("inpo")
        else:
            with pytest.raises(
                InvalidInput, match=rf"different are model {part} \(sha256:\w+… there, sha256:\w+… here"
            ):
                fill("inpo")
        flip(file, bit)
