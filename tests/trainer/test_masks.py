"""Training on masked data: what is black moves no weight, and a cache, a resume and a real VAE see the same masks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastinvdpo.data import PairDataset, open_source, write_pairs
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.trainer import PreferenceTrainer, TrainConfig, train
from fastinvdpo.trainer.batches import BatchBuilder, DrawOrder, PairEncoder
from tests.models import tiny as tiny_models
from tests.trainer import tiny


def write_masked(path: Path, *, pairs: int = 10, side: int = 8, shared: bool = False) -> Path:
    """Masks are white here and there, and in the last column, but black in the first three eighths of all columns."""
    rng = np.random.default_rng(1)
    rows = []
    for i in range(pairs):
        images = [Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)) for _ in range(2)]
        masks = 255 * rng.integers(0, 2, (2, side, side), dtype=np.uint8)
        masks[:, :, -1], masks[:, :, : 3 * side // 8] = 255, 0
        named = {"mask": masks[0]} if shared else {"mask_0": masks[0], "mask_1": masks[1]}
        labels = {"label_0": i % 2, "label_1": 1 - i % 2, "caption": f"a {tiny.WORDS[i % 4]}"}
        scores = {"score_0": 0.01 * i, "score_1": 0.05}
        rows.append(
            {"jpg_0": images[0], "jpg_1": images[1], **labels, **scores}
            | {name: Image.fromarray(mask) for name, mask in named.items()}
        )
    write_pairs(path, rows)
    return path


@pytest.fixture
def masked(workspace: Path) -> Path:
    write_masked(workspace / "pairs.parquet")
    return workspace


MASKS = {"masks": True}


class Pixelwise(ModelMixin, ConfigMixin):
    """Every pixel is scaled by a weight of its own."""

    @register_to_config
    def __init__(self, side: int = 8) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1, side, side), 0.5))

    def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.scale * sample,)


@pytest.mark.parametrize("method", ["diffusion-dpo", "inversion-dpo"])
def test_no_weight_moves_for_what_is_black(masked: Path, method: str) -> None:
    pairs = PairDataset(open_source(masked / "pairs.parquet").with_masks())
    for given, moved in ((pairs, False), (PairDataset(masked / "pairs.parquet"), True)):
        model = StableDiffusionModel(tiny_models.pixel_pipeline())
        model.network = Pixelwise()
        optimizer = {"learning_rate": 1e-2, "weight_decay": 0.0, "warmup_steps": 0}
        sections: dict[str, Any] = {"optimizer": optimizer, "training": {"steps": 3, "batch_size": 2}}
        sections["output"] = {"directory": str(masked / f"run-{moved}"), "pipeline": False, "tensorboard": False}
        section = {**tiny.METHODS[method], "beta": 500.0}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = PreferenceTrainer(model, section, given, sections, progress=False).train()
        unread = [str(one.message) for one in told if "data.masks" in str(one.message)]
        assert (len(unread) == 1 and "mask_0 and mask_1" in unread[0]) if moved else not unread
        scale = tiny.weights(result)["scale"][0]
        assert (scale[:, :3] != 0.5).all() if moved else (scale[:, :3] == 0.5).all()
        assert (scale[:, -1] != 0.5).all()


def test_a_masked_chain_from_the_cache_is_the_same_up_to_rounding(masked: Path, small_shards: None) -> None:
    """Other batches round it otherwise. Where nothing is inverted, and resumed: tests/trainer/test_same_bits.py."""
    smooth = {"epsilon": 1e3, "learning_rate": 1.0, "max_grad_norm": None}
    sections: dict[str, Any] = {"data": MASKS, "optimizer": smooth, "training": {"steps": 4}}
    whole = tiny.trained(masked, "whole", "inversion-dpo", **sections)
    cached = tiny.trained(masked, "cached", "inversion-dpo", **sections, cache={"path": str(masked / "cache")})
    stored = load_file(masked / "cache" / "pairs-000000.safetensors")["image.mask"]
    assert stored.shape == (6, 1, 8, 8) and not stored[..., :3].any() and stored.dtype == torch.float32
    for name, weight in tiny.weights(cached).items():
        torch.testing.assert_close(weight, tiny.weights(whole)[name], rtol=1e-4, atol=1e-5)
    assert tiny.moved(tiny.weights(whole)) > 0


def test_masks_of_another_set_are_another_run_and_another_cache(masked: Path) -> None:
    cache = {"path": str(masked / "cache")}
    tiny.trained(masked, "run", data=MASKS, training={"steps": 2})
    tiny.trained(masked, "cached", data=MASKS, training={"steps": 2}, cache=cache)
    with pytest.raises(InvalidInput, match=r"resume: .*data\.masks"):
        tiny.trained(masked, "run", training={"steps": 4})
    with pytest.raises(InvalidInput, match="data masks"), pytest.warns(UserWarning, match="data.masks is false"):
        tiny.trained(masked, "cached", training={"steps": 4}, cache=cache)
    # One mask for both sides where there were two: no image, caption or label has changed.
    write_masked(masked / "pairs.parquet", shared=True)
    for folder, options in (("run", {}), ("cached", {"cache": cache})):
        with pytest.raises(InvalidInput, match="data masks"):
            tiny.trained(masked, folder, data=MASKS, training={"steps": 4}, **options)


def test_equal_images_with_other_masks_are_stored_apart(workspace: Path) -> None:
    image, rng = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)), np.random.default_rng(0)
    masks = [Image.fromarray(rng.integers(1, 256, (8, 8), dtype=np.uint8)) for _ in range(3)]
    sides = [(0, 1), (1, 2), (2, 0), (0, 1)]
    rows = [
        {"jpg_0": image, "jpg_1": image, "label_0": 1, "label_1": 0, "caption": "a"}
        | {"mask_0": masks[a], "mask_1": masks[b]}
        for a, b in sides
    ]
    write_pairs(workspace / "pairs.parquet", rows)
    cache = {"path": str(workspace / "cache")}
    cached = tiny.trained(workspace, "cached", data=MASKS, cache=cache)
    spot = tiny.trained(workspace, "spot", data=MASKS)
    assert len(load_file(workspace / "cache" / "pairs-000000.safetensors")["image.mask"]) == 3
    tiny.assert_same(tiny.weights(cached), tiny.weights(spot))


def test_a_latents_mask_is_the_mean_over_its_area(tmp_path: Path) -> None:
    tiny_models.sd_pipeline().save_pretrained(tmp_path / "sd", safe_serialization=True)
    path = write_masked(tmp_path / "pairs.parquet", pairs=2, side=16)
    model = load_model("stable-diffusion", tmp_path / "sd")
    pairs = PairDataset(open_source(path).with_masks(), ties="keep")
    builder = BatchBuilder(PairEncoder(model, pairs), model.device, DrawOrder(2, 0, 2, 1), with_unconditional=False)
    batch, order = builder.build(range(2)), [builder.row(draw) for draw in range(2)]
    assert batch.mask is not None
    h, w = batch.latents.shape[2:]
    masks = [pairs[i].winner_mask for i in order] + [pairs[i].loser_mask for i in order]
    pixels = torch.stack([torch.from_numpy(np.array(mask)) for mask in masks]).double() / 255
    means = pixels.view(4, 1, h, 16 // h, w, 16 // w).mean((3, 5))
    assert h < 16 and ((means > 0) & (means < 1)).any()
    torch.testing.assert_close(batch.mask.double(), means, rtol=0, atol=1e-6)


def test_what_cannot_be_masked_is_refused(masked: Path) -> None:
    config = TrainConfig.from_mapping(tiny.mapping(masked))
    pairs = PairDataset(open_source(masked / "pairs.parquet").with_masks())
    with pytest.raises(InvalidInput, match=r"data\.masks = False: .*which have masks"):
        tiny.train_model(config, load_model("stable-diffusion", masked / "model"), pairs)
    tiny.write_data(masked / "pairs.parquet")
    with pytest.raises(InvalidInput, match=r"data\.masks = True: .* has no masks"):
        train(tiny.config(masked, data=MASKS), progress=False)
