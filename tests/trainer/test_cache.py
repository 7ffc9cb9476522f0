"""The cache: training from it is training without it, from less. What is the same bit for bit: test_same_bits.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastinvdpo.data import PairDataset, write_pairs
from fastinvdpo.methods import ChainObjective
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import perturb
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.trainer import TrainConfig, TrainResult, cache, precompute, train
from fastinvdpo.trainer.batches import BatchBuilder
from fastinvdpo.trainer.cache import PairCache
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.order import DrawOrder
from tests.trainer import tiny

LEVELS, PAIRS, IMAGES, CAPTIONS, GUIDED = 3, 10, 20, 4, 2


def mapping(root: Path, method: str = "inversion-dpo", /, **sections: Any) -> dict[str, Any]:
    """The tiny configuration with a cache in ``root/cache``."""
    sections["cache"] = {"path": str(root / "cache"), **sections.get("cache", {})}
    sections["output"] = {"log_every": 1, **sections.get("output", {})}
    return tiny.mapping(root, method, **sections)


def config_of(root: Path, method: str = "inversion-dpo", /, **sections: Any) -> TrainConfig:
    return TrainConfig.from_mapping(mapping(root, method, **sections))


def both(root: Path, method: str = "inversion-dpo", /, **sections: Any) -> tuple[TrainResult, TrainResult]:
    """The same run from the cache and without."""
    cached = train(config_of(root, method, **sections), progress=False)
    sections["cache"], sections["output"] = {"path": None}, {"directory": str(root / "spot")}
    return cached, train(config_of(root, method, **sections), progress=False)


def shards(root: Path) -> list[Path]:
    return sorted((root / "cache").glob("pairs-*"))


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("training from the cache computed this")


# Far from Adam's sign-like first steps, so that rounding in a prediction stays rounding in the weights.
SMOOTH = {"epsilon": 1e3, "learning_rate": 1.0, "max_grad_norm": None}
PERTURBED = {"init_perturbation": 0.05}
ROUNDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "step": ({"variant": "step", "guidance_scale": 2.0}, {}),
    "unguided": ({"variant": "distance-policy", "guidance_scale": 1.0}, PERTURBED),
    "sampled levels, lora": ({"timesteps_per_step": 2}, {"lora": {"rank": 2}}),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.filterwarnings("ignore:variant 'distance:UserWarning")
def test_inversion_dpo_from_the_cache_differs_by_rounding(workspace: Path, name: str, small_shards: None) -> None:
    """The reference computes in other batches than in training, where a network may round otherwise."""
    method, model = ROUNDED[name]
    cached, spot = both(workspace, method=method, model=model, optimizer=SMOOTH, training={"steps": 4})
    for row, expected in zip(cached.history, spot.history, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    spot_weights = tiny.weights(spot)
    for key, value in tiny.weights(cached).items():
        torch.testing.assert_close(value, spot_weights[key], rtol=1e-4, atol=1e-5)
    assert tiny.moved(spot_weights) > 0


def objective_and_networks(config: TrainConfig, model: Any) -> tuple[ChainObjective, Networks]:
    """With a policy that is no longer the reference."""
    objective = config.method.objective(model.schedule)
    assert isinstance(objective, ChainObjective)
    networks = Networks(model, lora=None, gradient_checkpointing=False)
    perturb(networks.policy_module, 0.02, seed=0)
    return objective, networks


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("endpoint", torch.float32), ("step", torch.float64), ("distance", torch.float32), ("distance", torch.float64)],
)
@pytest.mark.filterwarnings("ignore:variant 'distance:UserWarning")
def test_the_gradient_from_the_cache_is_the_plain_one(workspace: Path, variant: str, dtype: torch.dtype) -> None:
    """In float32 from the files, in float64 with the same tensors computed in float64."""
    perturbation = 0.05 if variant == "distance" else 0.0
    config = config_of(workspace, method={"variant": variant}, model={"init_perturbation": perturbation})
    stored, model = precompute(config, progress=False), load_model("stable-diffusion", workspace / "model", dtype=dtype)
    objective, networks = objective_and_networks(config, model)
    batch = BatchBuilder(stored, model.device, DrawOrder(PAIRS, 0, 4, 1), with_unconditional=True).build(range(4))
    wide = {
        name: {k: v.to(dtype) for k, v in getattr(batch, name).items()} for name in ("conditioning", "unconditional")
    }
    plain = replace(batch, latents=batch.latents.to(dtype), **wide, trajectory=None, reference_pred=None)
    if dtype == torch.float64:
        inputs = (plain.conditioning, plain.unconditional)
        chain = objective.reference_trajectory(networks.reference, plain.latents, *inputs)
        predictions = objective.reference_predictions(networks.reference, chain, *inputs)
        batch = replace(plain, trajectory=chain, reference_pred=predictions)
    gradients = []
    for reference, given in ((refuse, batch), (networks.reference, plain)):
        networks.policy_module.zero_grad()
        objective(networks.policy, reference, given, seed=0).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in networks.trainable().values() if p.grad is not None]))
    cached, expected = gradients
    assert expected.abs().max() > 0
    assert (cached - expected).norm() <= (1e-9 if dtype == torch.float64 else 1e-4) * expected.norm()


def test_bf16_rounds_what_is_stored_and_nothing_else(workspace: Path) -> None:
    """Storing a reference prediction r as r(1 + δ), |δ| ≤ 2⁻⁸, moves a score m((p − r)(p + r − 2τ)) by at most
    m(2|r − τ||δr| + (δr)²). The trajectory is rounded before the reference predicts there, so that it adds nothing.
    """
    config = config_of(workspace, cache={"dtype": "bf16"})
    stored = precompute(config, progress=False)
    assert {name: value.dtype for name, value in load_file(shards(workspace)[0]).items()} == {
        "image.latents": torch.float32,
        "image.trajectory": torch.bfloat16,
        "image.reference_pred": torch.bfloat16,
        "caption.encoder_hidden_states": torch.bfloat16,
    }
    model = load_model("stable-diffusion", workspace / "model")
    objective, networks = objective_and_networks(config, model)
    builder = BatchBuilder(stored, model.device, DrawOrder(PAIRS, 0, PAIRS, 1), with_unconditional=True)
    batch = builder.build(range(PAIRS))
    with torch.no_grad():
        rounded = objective(networks.policy, networks.reference, batch, seed=0)
        exact = objective(networks.policy, networks.reference, replace(batch, reference_pred=None), seed=0)
    assert exact.target is not None
    error = 2.0**-8 * exact.reference_pred.abs()
    bound = (2 * (exact.reference_pred - exact.target).abs() * error + error**2).flatten(2).mean((1, 2))
    allowed = 500.0 / 2 * (bound[:PAIRS] + bound[PAIRS:])
    difference = (rounded.margin - exact.margin).abs()
    assert (difference <= allowed + 1e-4).all()
    assert difference.max() > 0


def test_mixed_precision_and_a_bf16_reference(workspace: Path) -> None:
    training, model = {"mixed_precision": "bf16", "steps": 2}, {"reference_dtype": "bf16"}
    cached, spot = both(workspace, cache={"dtype": "bf16"}, training=training, model=model, optimizer=SMOOTH)
    # bf16 predictions carry 8 bits, as what is stored does.
    assert cached.history[0]["reference_mse_winner"] == pytest.approx(spot.history[0]["reference_mse_winner"], rel=2e-2)
    assert cached.history[-1]["gradient_norm"] == pytest.approx(spot.history[-1]["gradient_norm"], rel=0.2)


# --- from less ---


def test_training_from_a_complete_cache_touches_nothing_else(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = precompute(config_of(workspace), progress=False)
    assert before.network_evaluations == IMAGES * LEVELS * GUIDED * 2  # inverted, then evaluated along the chain
    for place, name in (
        (StableDiffusionModel, "encode_images"),
        (StableDiffusionModel, "encode_prompts"),
        (PairDataset, "__init__"),
    ):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr(Networks, "reference", refuse)
    monkeypatch.setattr("fastinvdpo.trainer.networks.frozen_copy", refuse)
    result = train(config_of(workspace), progress=False)
    policy = 6 * 2 * 2 * LEVELS * GUIDED
    assert result.history[-1]["network_evaluations_with_gradient"] == policy
    assert result.history[-1]["network_evaluations_without_gradient"] == 0
    assert result.network_evaluations == policy + before.network_evaluations
    assert load_model("stable-diffusion", result.model_directory)


def test_equal_images_and_captions_are_stored_once(workspace: Path, small_shards: None) -> None:
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(4)]
    rows = [
        {"jpg_0": images[a], "jpg_1": images[b], "label_0": 1, "label_1": 0, "caption": caption}
        for a, b, caption in [(0, 1, "a"), (1, 2, "a"), (2, 0, "a"), (0, 3, "a"), (0, 1, "b"), (3, 3, "b"), (1, 0, "a")]
    ]
    write_pairs(workspace / "pairs.parquet", rows)
    cached, spot = both(workspace, optimizer=SMOOTH, training={"steps": 7})
    for row, expected in zip(cached.history, spot.history, strict=True):
        for name in ("policy_mse_winner", "policy_mse_loser"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
    stored = precompute(config_of(workspace), progress=False)
    assert stored.index.images.tolist() == [[0, 1], [1, 2], [2, 0], [0, 3], [4, 5], [6, 6], [1, 0]]
    assert stored.index.captions.tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert stored.index.first == {"image": [0, 3, 7, 7], "caption": [0, 1, 2, 2]}
    assert stored.network_evaluations == 7 * LEVELS * GUIDED * 2


def test_only_the_rows_that_are_drawn_are_read(
    workspace: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = precompute(config_of(workspace), progress=False)
    everything = torch.cat([load_file(path)["image.trajectory"] for path in shards(workspace)])
    numbers, opened = [19, 0, 7, 7, 12], list[int]()
    monkeypatch.setattr(cache, "_OPEN_SHARDS", 1)
    one_open = PairCache(workspace / "cache", cache.Manifest.read(workspace / "cache"))  # type: ignore[arg-type]
    original = one_open._open
    monkeypatch.setattr(one_open, "_shard", lambda of, shard: opened.append(shard) or original(of, shard))
    for reader in (stored, one_open):
        found = torch.stack([reader._read("image", number)["trajectory"] for number in numbers])
        assert torch.equal(found, everything[numbers])
    assert opened == [3, 0, 1, 1, 2]
