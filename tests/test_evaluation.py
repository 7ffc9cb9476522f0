"""Sampling and statistics, each against an independent computation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastinvdpo._examples.digits.base import SCHEDULER, WEIGHTS
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation import metrics
from fastinvdpo.evaluation.sampling import STREAM_SAMPLING, sample
from fastinvdpo.models import DiffusionModel, load_model
from fastinvdpo.models.digits import DigitsModel
from fastinvdpo.ops import philox

PROMPTS = ["a handwritten three", "a handwritten seven", "", "a handwritten zero", "a handwritten one"]


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return load_model("digits", WEIGHTS / "clean")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampling_equals_diffusers_ddim(model: DiffusionModel, guidance_scale: float) -> None:
    from diffusers import DDIMScheduler

    ours = sample(model, model.network, PROMPTS, num_inference_steps=10, guidance_scale=guidance_scale, seed=4)
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(10)
    latents = philox.normal(4, STREAM_SAMPLING, torch.arange(len(PROMPTS)), model.latent_shape)
    conditional, unconditional = model.encode_prompts(PROMPTS), model.encode_prompts([""] * len(PROMPTS))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            times = timestep.expand(len(PROMPTS))
            noise = model.predict(model.network, latents, times, conditional)
            if guidance_scale != 1:
                empty = model.predict(model.network, latents, times, unconditional)
                noise = empty + guidance_scale * (noise - empty)
            latents = scheduler.step(noise, timestep, latents).prev_sample
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_the_batch(model: DiffusionModel) -> None:
    whole = sample(model, model.network, PROMPTS, num_inference_steps=4, seed=1)
    split = sample(model, model.network, PROMPTS, num_inference_steps=4, seed=1, batch_size=2)
    torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-5)
    other = sample(model, model.network, PROMPTS, num_inference_steps=4, seed=2)
    assert (whole - other).abs().mean() > 0.1


class Oracle(nn.Module):
    """Predicts what leads to one known image, in any prediction type, and counts the samples of its forward passes."""

    def __init__(self, schedule: Any, clean: Tensor, fail: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.schedule, self.clean, self.fail = schedule, clean, fail
        self.seen: list[int] = []

    def forward(self, latents: Tensor, timesteps: Tensor, **options: Any) -> tuple[Tensor]:
        if self.fail or self.training:
            raise RuntimeError("a forward pass while failing or in training mode")
        self.seen.append(len(latents))
        signal, noise = (rate.float().view(-1, 1, 1, 1) for rate in self.schedule.rates(timesteps))
        epsilon = (latents - signal * self.clean) / noise
        if self.schedule.prediction_type == "epsilon":
            return (epsilon,)
        if self.schedule.prediction_type == "v_prediction":
            return (signal * epsilon - noise * self.clean,)
        return (self.clean.expand_as(latents),)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_an_oracle_is_followed_to_its_image(prediction_type: str) -> None:
    configuration = {**SCHEDULER, "prediction_type": prediction_type, "set_alpha_to_one": True}
    clean = torch.linspace(-1, 1, 64).view(1, 8, 8)
    model = DigitsModel(nn.Identity(), configuration)
    oracle = Oracle(model.schedule, clean).eval()
    model.network = oracle
    sampled = sample(model, oracle, PROMPTS, num_inference_steps=7, guidance_scale=2.0, batch_size=3)
    torch.testing.assert_close(sampled, clean.expand(5, 1, 8, 8), rtol=1e-5, atol=2e-5)
    assert sum(oracle.seen) == 5 * 7 * 2


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_even_after_an_error(training: bool) -> None:
    model = DigitsModel(nn.Identity(), SCHEDULER)
    for fail in (False, True):
        model.network = Oracle(model.schedule, torch.zeros(1, 8, 8), fail).train(training)
        with pytest.raises(RuntimeError) if fail else nullcontext():
            sample(model, model.network, PROMPTS, num_inference_steps=2)
        assert model.network.training is training


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prompts", []),
        ("batch_size", 0),
        ("num_inference_steps", 0),
        ("guidance_scale", -1.0),
        ("guidance_scale", float("nan")),
    ],
)
def test_bad_sampling_arguments(model: DiffusionModel, argument: str, value: Any) -> None:
    arguments = {"prompts": PROMPTS, argument: value}
    with pytest.raises(InvalidInput, match=argument):
        sample(model, model.network, **arguments)


@pytest.mark.parametrize(("wins", "trials"), [(0, 7), (7, 7), (300, 300), (1, 300), (150, 300), (271, 300)])
def test_wilson_interval_equals_scipy(wins: int, trials: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(wins, trials).proportion_ci(0.95, method="wilson")
    found = metrics.wilson_interval(wins, trials)
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.mean == wins / trials
    assert 0 <= found.ci_low <= found.mean <= found.ci_high <= 1


def test_win_rate_counts_ties_half_and_is_antisymmetric() -> None:
    before, after = [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 4.0]
    there, back = metrics.win_rate(after, before), metrics.win_rate(before, after)
    assert there.mean == (2 + 0.5) / 4
    assert tuple(there) == pytest.approx((1 - back.mean, 1 - back.ci_high, 1 - back.ci_low))
    found = metrics.statistics(base=before, aligned=after)
    assert (found["wins"], found["ties"], found["losses"], found["win_rate"]) == (2, 1, 1, there._asdict())
    assert found["base"] == {"mean": 1.5, "median": 1.5} and found["aligned"] == {"mean": 1.75, "median": 1.0}


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: metrics.wilson_interval(3, 0), "successes"),
        (lambda: metrics.wilson_interval(4, 3), "successes"),
        (lambda: metrics.win_rate([1.0, 2.0], [1.0]), "after"),
        (lambda: metrics.win_rate([], []), "after"),
        (lambda: metrics.win_rate([float("nan")], [1.0]), "after"),
    ],
)
def test_bad_statistics(call: Any, argument: str) -> None:
    with pytest.raises(InvalidInput, match=argument):
        call()
