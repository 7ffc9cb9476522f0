"""Schedules, levels and affine coefficients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinvdpo.diffusion.schedule import (
    PREDICTION_TYPES,
    NoiseSchedule,
    add_noise,
    affine_coefficients,
    ancestral_variance,
    inversion_levels,
    predicted_clean_and_noise,
    prediction_target,
    recover_noise,
)
from fastinvdpo.errors import InvalidInput
from tests.cases import SD_SCHEDULER, sd_schedule

LEVELS = st.integers(0, 999)


def step(
    schedule: NoiseSchedule, latents: torch.Tensor, output: torch.Tensor, source: int, target: int
) -> torch.Tensor:
    a, b = affine_coefficients(schedule, torch.tensor([source]), torch.tensor([target]))
    return a * latents + b * output


@given(LEVELS, LEVELS, st.sampled_from(PREDICTION_TYPES))
@settings(max_examples=200, deadline=None)
def test_a_step_moves_along_the_predicted_line(source: int, target: int, prediction_type: str) -> None:
    """``x_t = √ᾱ_t·x̂_0 + √(1−ᾱ_t)·ε̂`` (DDIM, equation 12 at η = 0), from a formula of its own."""
    schedule = sd_schedule(prediction_type=prediction_type)
    latents, output = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(source), dtype=torch.float64)
    a_s, a_t = schedule.alphas_cumprod[source], schedule.alphas_cumprod[target]
    if prediction_type == "epsilon":
        clean, noise = (latents - (1 - a_s).sqrt() * output) / a_s.sqrt(), output
    elif prediction_type == "v_prediction":
        clean = a_s.sqrt() * latents - (1 - a_s).sqrt() * output
        noise = a_s.sqrt() * output + (1 - a_s).sqrt() * latents
    else:
        clean, noise = output, (latents - a_s.sqrt() * output) / (1 - a_s).sqrt()
    expected = a_t.sqrt() * clean + (1 - a_t).sqrt() * noise
    torch.testing.assert_close(step(schedule, latents, output, source, target), expected, rtol=1e-9, atol=1e-9)


@given(LEVELS, st.sampled_from(PREDICTION_TYPES))
@settings(max_examples=50, deadline=None)
def test_target_stands_for_the_noise_it_was_made_from(level: int, prediction_type: str) -> None:
    schedule, levels = sd_schedule(prediction_type=prediction_type), torch.tensor([level])
    clean, noise = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(level), dtype=torch.float64)
    noisy = add_noise(schedule, clean, noise, levels)
    target = prediction_target(schedule, clean, noise, levels)
    for ours, expected in zip(predicted_clean_and_noise(schedule, noisy, target, levels), (clean, noise), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(recover_noise(schedule, noisy, clean, levels), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ],
)
def test_schedules_of_diffusers(config: dict) -> None:
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers: pip install '.[train]'")
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.double()
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)
    if "rescale_betas_zero_snr" not in config and config.get("beta_schedule") != "squaredcos_cap_v2":
        assert torch.equal(NoiseSchedule.from_config(config, released_precision=True).alphas_cumprod, theirs)


def test_grid_and_clean_end() -> None:
    assert inversion_levels(sd_schedule(), 5).tolist() == [1, 201, 401, 601, 801]
    assert inversion_levels(sd_schedule(steps_offset=0), 4).tolist() == [0, 250, 500, 750]
    assert int(inversion_levels(sd_schedule(), 1000).max()) == 999
    clean = torch.tensor([-1])
    assert torch.equal(sd_schedule().alpha_bar(clean), sd_schedule().alphas_cumprod[:1])
    assert float(sd_schedule(set_alpha_to_one=True).alpha_bar(clean)) == 1


def test_released_precision_rounds_the_table() -> None:
    released = sd_schedule().released()
    assert released.released_precision and torch.equal(
        released.alphas_cumprod, released.alphas_cumprod.float().double()
    )
    torch.testing.assert_close(released.alphas_cumprod, sd_schedule().alphas_cumprod, rtol=1e-5, atol=0)
    a, _ = affine_coefficients(released, torch.tensor([101]), torch.tensor([201]))
    alpha = released.alphas_cumprod.float()
    root = (alpha[201].double().sqrt().float().double(), alpha[101].double().sqrt().float().double())
    assert float(a) == float(root[0] / root[1])


def test_ancestral_variance() -> None:
    schedule = sd_schedule()
    lower, upper = torch.tensor([-1, 100, 500]), torch.tensor([1, 200, 500])
    variance = ancestral_variance(schedule, lower, upper)
    a, b = schedule.alphas_cumprod[100], schedule.alphas_cumprod[200]
    torch.testing.assert_close(variance[1], (1 - a) / (1 - b) * (1 - b / a))
    assert float(variance[2]) == 0 and (variance[:2] > 0).all()


FOREIGN = {
    "EDM": {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0},
    "Playground": {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_schedule": "karras"},
    "cosine EDM": {"_class_name": "CosineDPMSolverMultistepScheduler"},
    "consistency": {"_class_name": "CMStochasticIterativeScheduler"},
    "unknown": {"_class_name": "SomebodysScheduler", **SD_SCHEDULER},
    "continuous times": {**SD_SCHEDULER, "_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
    "own sigmas": {**SD_SCHEDULER, "_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0},
    "flow by sigmas": {**SD_SCHEDULER, "_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
    "thresholding": {**SD_SCHEDULER, "_class_name": "DDIMScheduler", "thresholding": True},
    "nameless EDM": {"sigma_data": 0.5, "sigma_min": 0.002},
}


@pytest.mark.parametrize("config", FOREIGN.values(), ids=FOREIGN)
def test_foreign_noise_is_refused_by_name(config: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=r"scheduler.* = .*(not known here|not computed here)"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("name", ["DDIM", "LCM", "DPMSolverMultistep", "UniPCMultistep", "PNDM", "EulerDiscrete"])
def test_every_way_to_sample_the_same_betas_has_the_same_noise(name: str) -> None:
    found = NoiseSchedule.from_config({**SD_SCHEDULER, "_class_name": f"{name}Scheduler", "use_karras_sigmas": True})
    assert torch.equal(found.alphas_cumprod, NoiseSchedule.from_config(SD_SCHEDULER).alphas_cumprod)
