"""A method owns its options: one class is the constructor, the configuration section, and what the trainer asks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinvdpo import NoiseSchedule
from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.diffusion.schedule import add_noise
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import KTO, METHODS, PNAPO, DiffusionDPO, Draws, InPO, InversionDPO, Method, PairBatch, SmPO
from fastinvdpo.methods.single_timestep import SingleTimestepMethod
from fastinvdpo.trainer import TrainConfig, load_config, to_yaml, train
from tests.cases import sd_schedule
from tests.trainer import tiny

OPTIONS: dict[str, dict[str, Any]] = {
    "diffusion-dpo": {"beta": 7.0, "utility": "cdpo", "label_smoothing": 0.1, "timesteps": {"values": [3, 5]}},
    "inpo": {"num_inference_steps": 4, "eta": 0.0, "static_shapes": True, "timesteps": {"range": [0, 199]}},
    "smpo": {"renoise_iterations": 2, "score_range": "auto", "preference_scale": 3.0, "model_time": "source"},
    "inversion-dpo": {"variant": "step", "guidance_scale": 1.0, "timesteps_per_step": 2},
    "sdpo": {"safeguard": 0.6, "compat": "released"},
    "dmpo": {"alpha": 0.1, "safeguard": 0.9},
    "dspo": {"variant": "sdxl", "beta": 5000.0},
    "linear-dpo": {"eta": 0.0, "beta": 500.0},
    "alpha-dpo": {"alpha": 2.0, "dynamic": True},
    "poly-dpo": {"alpha": -0.5, "anchor": 1.0},
    "snpo": {"loser_share": 0.5, "error_scale": 10.0, "swap_probability": 0.1},
    "mapo": {"snr": 2.0, "sft_weight": 0.5},
    "pnapo": {"score_scale": 10.0, "decay_start": 10, "decay_end": 20, "seed_dtype": "bf16"},
    "kto": {"halo": "loss_averse", "baseline": "balanced", "like_share": None, "timesteps": {"values": [3, 5]}},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_makes_what_the_constructor_makes(name: str, tmp_path: Path) -> None:
    values = tiny.mapping(tmp_path)
    values["method"] = {"name": name, **OPTIONS[name]}
    config = TrainConfig.from_mapping(values)
    method = METHODS[name](**OPTIONS[name])
    assert config.method == method
    values["method"] = method  # a method itself will do, in a notebook
    assert TrainConfig.from_mapping(values) == config
    assert config.as_dict()["method"] == {"name": name, **dataclasses.asdict(method)}
    assert json.loads(json.dumps(config.as_dict())) == config.as_dict()  # as a checkpoint stores it
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_is_out_of_range_is_refused_alike(name: str, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"beta": 0.0},
        {"utility": "logistic"},
        {"utility": "cdpo"},
        {"label_smoothing": 0.2},
    ]
    if hasattr(METHODS[name], "num_inference_steps"):
        wrong.append({"num_inference_steps": 0})
    for options in wrong:
        with pytest.raises(InvalidInput) as ours:
            METHODS[name](**options)
        values = tiny.mapping(tmp_path)
        values["method"] = {"name": name, **options}
        with pytest.raises(InvalidInput) as read:
            TrainConfig.from_mapping(values)
        assert str(read.value) == f"method.{ours.value}"


def test_the_released_chain_is_the_default_with_compat() -> None:
    assert InversionDPO().variant == "endpoint" and InversionDPO(compat="released").variant == "distance"
    with pytest.raises(InvalidInput, match=r"^variant = 'endpoint': is not what the released code computes"):
        InversionDPO(variant="endpoint", compat="released")


PROPERTIES: dict[str, Callable[[Method], object]] = {
    "single images": lambda method: method.unpaired,
    "needs noise": lambda method: method.needs_noise,
    "needs scores": lambda method: method.needs_scores,
    "policy inverts": lambda method: method.policy_inverts,
    "whole chain": lambda method: method.whole_chain,
    "guided": lambda method: method.guided,
    "fixed shapes": lambda method: method.fixed_shapes,
    "zero gradient at the reference": lambda method: method.zero_gradient_at_reference,
    "reference's chain": lambda method: method.reference_chain is not None,
    "awaits a score range": lambda method: method.awaits_score_range,
}


@pytest.mark.parametrize(
    ("method", "holds"),
    [
        (DiffusionDPO(), {"fixed shapes"}),
        (KTO(), {"single images", "fixed shapes"}),
        (PNAPO(), {"needs noise", "needs scores", "fixed shapes"}),
        (InPO(), {"policy inverts"}),
        (InPO(static_shapes=True), {"policy inverts", "fixed shapes"}),
        (SmPO(), {"needs scores", "policy inverts"}),
        (SmPO(score_range="auto"), {"needs scores", "policy inverts", "awaits a score range"}),
        (InversionDPO(), {"whole chain", "guided", "fixed shapes", "reference's chain"}),
        (InversionDPO(guidance_scale=1.0), {"whole chain", "fixed shapes", "reference's chain"}),
        (
            InversionDPO(variant="distance-policy"),
            {"whole chain", "guided", "fixed shapes", "zero gradient at the reference"},
        ),
    ],
)
def test_what_the_trainer_asks_of_a_method(method: Method, holds: set[str]) -> None:
    assert {name for name, read in PROPERTIES.items() if read(method)} == holds


def test_a_score_range_is_fitted_once() -> None:
    with pytest.raises(InvalidInput, match=r"^score_range = 'auto': is read with the data"):
        SmPO(score_range="auto").objective(sd_schedule())
    assert SmPO(score_range="auto").with_score_range(0.25) == SmPO(score_range=0.25)
    assert SmPO(score_range=0.2).with_score_range(0.25) == SmPO(score_range=0.2)


# How to add a method: a file such as the following class, a line in METHODS, a preset.


@dataclass(frozen=True, kw_only=True)
class Toy(SingleTimestepMethod):
    """Diffusion-DPO whose noise is the same for every pair, times ``loudness``."""

    name = "toy"

    beta: float = 100.0
    loudness: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.loudness > 0:
            raise InvalidInput(f"loudness = {self.loudness}: must be positive. Remedy: use 1.")

    def trajectory(
        self, schedule: NoiseSchedule, network: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        noise = torch.full_like(batch.latents, self.loudness)
        return add_noise(schedule, batch.latents, noise, timesteps), noise


def test_a_method_of_somebody_else_is_configured_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", Toy)
    (tmp_path / "model").mkdir()
    tiny.write_model(tmp_path / "model")
    tiny.write_data(tmp_path / "pairs.parquet")
    values = tiny.mapping(tmp_path)
    values["method"] = {"name": "toy", "loudness": 2}
    config = TrainConfig.from_mapping(values)
    assert config.method == Toy(loudness=2.0)
    result = train(config, progress=False)
    assert result.steps == 6
    losses = [row["loss"] for row in result.history]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
    for options, message in (
        ({"loudness": 0.0}, r"method\.loudness = 0\.0: must be positive"),
        ({"loudnes": 1.0}, r"method\.loudnes = 1\.0: .*did you mean method\.loudness\?"),
        ({"eta": 0.1}, r"method\.eta = 0\.1: is an option of another method, not of 'toy'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            TrainConfig.from_mapping({**values, "method": {"name": "toy", **options}})
