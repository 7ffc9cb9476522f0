"""MARS in the trainer: its data, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastinvdpo.data import CaptionedDataset, LikedDataset, PairDataset, open_source
from fastinvdpo.errors import InvalidInput, NonFiniteLoss
from fastinvdpo.methods import METHODS, TOKEN_METHODS, MarsDPO, MarsStage1, PairBatch, TokenMethod
from fastinvdpo.models import load_model
from fastinvdpo.models.mars import MarsPipeline
from fastinvdpo.trainer import PreferenceTrainer, TrainConfig, load_config
from fastinvdpo.trainer.dry_run import count_evaluations
from tests.data.test_pairs import encoded, store
from tests.trainer.test_mars import _none, batch, mapping, root, run

__all__ = ["root"]  # a fixture


def test_captioned_images_come_from_rows_of_their_own_from_winners_and_from_likes(root: Path, tmp_path: Path) -> None:
    own = CaptionedDataset(root / "images.parquet")
    winners = CaptionedDataset(open_source(root / "pairs.parquet"))
    drawn = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)]
    likes = [{"image": encoded(image), "liked": i % 2, "caption": "a"} for i, image in enumerate(drawn)]
    liked = CaptionedDataset(open_source(store(tmp_path / "likes.parquet", likes), form="likes"))
    assert [len(own), len(winners), len(liked)] == [4, 4, 2] and [pair.row for pair in liked] == [1, 3]
    for one, other in zip(own, winners, strict=True):
        assert one.caption == other.caption and one.sides[0].image.tobytes() == other.sides[0].image.tobytes()
        assert one.liked is None and len(other.sides) == 1 and other.scores is None
    assert str(own.summary) == "4 rows: 4 images"
    listing = [{"image": f"{i}.png", "caption": "a"} for i in range(2)]
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listing))
    assert len(CaptionedDataset(open_source(tmp_path, form="images", format="folder"))) == 2


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("method.name = 'diffusion-dpo'", "diffusion-dpo", {}),
    ("method.name = 'mars-dpo'", "mars-dpo", {"model": {"family": "stable-diffusion"}}),
    ("cache.path", "mars-stage1", {"cache": {"path": "cache"}}),
    ("model.lora", "mars-stage1", {"model": {"lora": {"rank": 2}}}),
    ("model.reference_dtype", "mars-dpo", {"model": {"reference_dtype": "bf16"}}),
    ("data.latents", "mars-stage1", {"data": {"latents": "sampled"}}),
    ("data.form", "mars-dpo", {"data": {"form": "images"}}),
    ("data.form", "kto", {"model": {"family": "digits"}, "data": {"form": "images"}}),
    ("method.caption_share", "mars-stage1", {"method": {"caption_share": 1.5}}),
    ("method.beta", "mars-stage2", {"method": {"beta": 1.0}}),
    ("method.reduction", "mars-dpo", {"method": {"reduction": "max"}}),
    ("method.utility", "mars-dpo", {"method": {"utility": "cubic"}}),
    ("evaluation", "mars-dpo", {"evaluation": {"prompts": "p.txt", "scorers": ["x"]}}),
]


@pytest.mark.parametrize(("key", "method", "sections"), REFUSED, ids=[key for key, _, _ in REFUSED])
def test_what_does_not_go_together_is_refused_by_its_key(
    root: Path, tmp_path: Path, key: str, method: str, sections: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput, match="Remedy: ") as caught:
        TrainConfig.from_mapping(mapping(root, tmp_path, method, **sections))
    assert str(caught.value).startswith(key), str(caught.value)


OPENED: list[tuple[str, str, dict[str, Any]]] = [
    ("model.low_resolution = None", "mars-stage3", {}),
    ("model.low_resolution = 8", "mars-stage2", {"model": {"low_resolution": 8}}),
    ("model.low_resolution = 16", "mars-stage3", {"model": {"low_resolution": 16}}),
    ("model.low_resolution = 6", "mars-stage3", {"model": {"low_resolution": 6}}),
    ("model.vae = None", "mars-stage1", {"model": {"vae": None}}),
    ("model.variant", "mars-stage1", {"model": {"variant": "fp16"}}),
    ("model.zero_terminal_snr", "mars-stage1", {"model": {"zero_terminal_snr": True}}),
    ("images[0].size", "mars-stage1", {"data": {"resolution": 10}}),
    ("performance.attention", "mars-stage1", {"performance": {"attention": "sdpa"}}),
]


@pytest.mark.parametrize(("key", "method", "sections"), OPENED, ids=[key for key, _, _ in OPENED])
def test_what_the_files_contradict_is_refused_by_its_key(
    root: Path, tmp_path: Path, key: str, method: str, sections: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput, match="Remedy: ") as caught:
        run(root, tmp_path / "run", method, **sections)
    assert str(caught.value).startswith(key), str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


def test_models_methods_and_data_of_the_other_kind_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    model, config = MarsPipeline.load(root / "new"), {"output": {"directory": str(tmp_path / "run")}}
    pairs, images = PairDataset(root / "pairs.parquet"), CaptionedDataset(root / "images.parquet")
    liked = LikedDataset(open_source(root / "pairs.parquet"))
    wrong: list[tuple[str, Any]] = [("diffusion-dpo", pairs), ("mars-stage1", pairs), ("mars-stage1", liked)]
    for name, data in wrong:
        with pytest.raises(InvalidInput, match=rf"^method.name = '{name}'"):
            PreferenceTrainer(model, {"name": name}, data, config, progress=False)
    with pytest.raises(InvalidInput, match=r"^data.form = 'images': has no pairs"):
        PreferenceTrainer(model, {"name": "mars-dpo"}, images, config, progress=False)
    with pytest.raises(InvalidInput, match=r"^method.name = 'mars-dpo': trains models of image tokens"):
        MarsDPO().objective(METHODS)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"^method.name = 'inpo': trains diffusion models"):
        METHODS["inpo"]().objective(None)  # type: ignore[call-arg]
    with pytest.raises(InvalidInput, match=r"^model.family = 'mars': is no diffusion model"):
        load_model("auto", root / "new")
    for wrong in ({"latents": torch.zeros(4, 6)}, {"sample_index": torch.arange(3)}):
        given = PairBatch(**{**vars(batch(model)), **wrong})
        with pytest.raises(InvalidInput, match=r"^batch\.latents"):
            MarsStage1().objective(None)(_none, _none, given, seed=0)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_row(root: Path, tmp_path: Path) -> None:
    model = MarsPipeline.load(root / "new")
    with torch.no_grad():
        model.network.visual_head[0] = torch.nan
    config = TrainConfig.from_mapping(mapping(root, tmp_path / "run"))
    images = CaptionedDataset(root / "images.parquet")
    with pytest.raises(NonFiniteLoss, match=r"image in data row \d \(draw \d\), in the log-probabilities of its"):
        PreferenceTrainer(model, config.method, images, config, progress=False).train()


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_a_preset_and_a_dry_run_know_the_method(root: Path, tmp_path: Path, method: str) -> None:
    config = TrainConfig.from_mapping(mapping(root, tmp_path, method))
    assert isinstance(config.method, TokenMethod)
    expected = (2.0, 2.0) if method == "mars-dpo" else (1.0, 0.0)
    assert count_evaluations(config)[:2] == expected
    if method != "mars-dpo":
        preset = load_config(overrides=["data.path=images"], preset=method)
        assert preset.optimizer.weight_decay == 0.1 and preset.optimizer.learning_rate == 1e-4
        assert preset.data.caption_dropout == 0.1 and preset.optimizer.lr_scheduler == "cosine"
        assert preset.data.form == "images" and preset.model.family == "mars"
