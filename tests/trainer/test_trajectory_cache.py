"""Cached reference trajectories: as computed on the spot, used again when they fit and computed again when not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastinvdpo.models import load_model
from fastinvdpo.trainer import TrainResult, train
from fastinvdpo.trainer import trajectory_cache as cache_module
from fastinvdpo.trainer.loop import Reporter
from fastinvdpo.trainer.networks import perturb
from tests.trainer import tiny

LEVELS, IMAGES = 3, 20


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the run told its user."""
    messages: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda self, message: messages.append(message))
    return messages


def _train(root: Path, steps: int = 4, **changes: Any) -> TrainResult:
    training = {"cache_trajectories": True, "steps": steps, **changes.pop("training", {})}
    return train(tiny.config(root, "inversion-dpo", training=training, **changes), progress=False)


def _weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.model_directory / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("variant", ["endpoint", "step", "distance"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.filterwarnings("ignore:variant 'distance':UserWarning")
def test_cached_equals_computed_on_the_spot(workspace: Path, variant: str, guidance: float) -> None:
    changes: dict[str, Any] = {
        "method": {"variant": variant, "guidance_scale": guidance},
        "model": {"init_perturbation": 0.05 if variant == "distance" else 0.0},
        # Far from Adam's sign-like first steps, so that rounding in a trajectory stays rounding in the weights.
        "optimizer": {"epsilon": 1e3, "learning_rate": 1.0, "max_grad_norm": None},
    }
    cached = _train(workspace, **changes)
    elsewhere = {"directory": str(workspace / "spot")}
    spot = _train(workspace, training={"cache_trajectories": False}, output=elsewhere, **changes)
    for row, expected in zip(cached.history, spot.history, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    base = tiny.unet().state_dict()
    assert any(not torch.equal(value, base[name]) for name, value in _weights(cached).items())
    for name, value in _weights(cached).items():
        torch.testing.assert_close(value, _weights(spot)[name], rtol=1e-4, atol=1e-5)


def test_each_image_is_inverted_once(workspace: Path) -> None:
    # Four steps of two pairs, two sides, one policy and one reference call at each level and side of the guidance.
    result = _train(workspace)
    assert result.network_evaluations == IMAGES * LEVELS * 2 + 4 * 2 * 2 * LEVELS * 2 * 2


def test_a_fitting_cache_is_used_again(workspace: Path, said: list[str]) -> None:
    first = _train(workspace)
    written = (workspace / "run" / "trajectories" / "000000.safetensors").stat().st_mtime_ns
    resumed = _train(workspace, steps=6)
    assert (workspace / "run" / "trajectories" / "000000.safetensors").stat().st_mtime_ns == written
    assert resumed.network_evaluations - first.network_evaluations == 2 * 2 * 2 * LEVELS * 2 * 2
    assert said[0].startswith("Inverting 20 images once")
    assert said[1].startswith("Using the 20 cached trajectories")


@pytest.mark.parametrize("change", ["weights", "data", "guidance", "damage", "schedule"])
def test_a_cache_that_does_not_fit_is_computed_again(workspace: Path, said: list[str], change: str) -> None:
    _train(workspace)
    shard = workspace / "run" / "trajectories" / "000000.safetensors"
    before = load_file(shard)["trajectory"].clone()  # a copy: the tensor is mapped from the file
    (workspace / "run" / "checkpoints").rename(workspace / "old checkpoints")
    method: dict[str, Any] = {}
    if change == "weights":
        model = load_model("digits", workspace / "model")
        perturb(model.network, 0.1, seed=0)
        model.save(workspace / "model")
    elif change == "data":
        tiny.write_data(workspace / "pairs.parquet", pairs=11)
    elif change == "guidance":
        method = {"guidance_scale": 3.0}
    elif change == "damage":
        shard.write_bytes(b"not a tensor")
    else:
        config = workspace / "model" / "scheduler" / "scheduler_config.json"
        config.write_text(config.read_text().replace("0.012", "0.02"))
    said.clear()
    _train(workspace, method=method)
    assert said[0].startswith("The cached trajectories belong to another model, data set or inversion")
    after = load_file(shard)["trajectory"]
    assert after.shape[0] == IMAGES + 2 * (change == "data")
    assert torch.equal(after[: len(before)], before) == (change in ("data", "damage"))


def test_options_of_the_loss_alone_keep_the_cache(workspace: Path, said: list[str]) -> None:
    _train(workspace)
    (workspace / "run" / "checkpoints").rename(workspace / "old checkpoints")
    _train(workspace, method={"beta": 7.0, "utility": "hinge", "timesteps_per_step": 2})
    assert said[1].startswith("Using the 20 cached trajectories")


def test_only_missing_shards_are_computed(workspace: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_IMAGES", 8)
    first = _train(workspace)
    shards = workspace / "run" / "trajectories"
    assert sorted(path.name for path in shards.iterdir()) == [f"{i:06d}.safetensors" for i in range(3)]
    kept = load_file(shards / "000001.safetensors")["trajectory"].clone()
    (shards / "000001.safetensors").unlink()
    (workspace / "run" / "checkpoints").rename(workspace / "old checkpoints")
    second = _train(workspace)
    assert torch.equal(load_file(shards / "000001.safetensors")["trajectory"], kept)
    assert first.network_evaluations - second.network_evaluations == (IMAGES - 8) * LEVELS * 2
    for name, value in _weights(first).items():
        assert torch.equal(value, _weights(second)[name])


def test_a_shard_of_somebody_else_is_not_trusted(workspace: Path) -> None:
    _train(workspace)
    shard = workspace / "run" / "trajectories" / "000000.safetensors"
    before = load_file(shard)["trajectory"].clone()
    save_file({"trajectory": torch.zeros_like(before)}, shard)
    (workspace / "run" / "checkpoints").rename(workspace / "old checkpoints")
    _train(workspace)
    assert torch.equal(load_file(shard)["trajectory"], before)
