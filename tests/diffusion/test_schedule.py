"""Schedules, levels and affine coefficients, of diffusion and of flow matching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinvdpo.diffusion.schedule import (
    FLOW,
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

diffusers = pytest.importorskip("diffusers", reason="compares with diffusers: pip install '.[train]'")

LEVELS = st.integers(0, 999)
TYPES = st.sampled_from((*PREDICTION_TYPES, FLOW))
STATIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = {**STATIC, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def sd3() -> NoiseSchedule:
    return NoiseSchedule.from_config(STATIC)


def schedule_of(prediction_type: str) -> tuple[NoiseSchedule, float]:
    """A schedule, and the tolerance of what divides by its rates: those of diffusion go down to 0.07."""
    return (sd3(), 1e-14) if prediction_type == FLOW else (sd_schedule(prediction_type=prediction_type), 1e-9)


def rates_of(schedule: NoiseSchedule, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the signal and the noise count at a level, from formulas of their own."""
    if schedule.prediction_type == FLOW:
        share = torch.tensor((level + 1) / 1000, dtype=torch.float64)
        sigma = 3 * share / (1 + 2 * share)
        return 1 - sigma, sigma
    alpha_bar = schedule.alphas_cumprod[level]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(LEVELS, LEVELS, TYPES)
@settings(max_examples=200, deadline=None)
def test_a_step_moves_along_the_predicted_line(source: int, target: int, prediction_type: str) -> None:
    """``x_t = √ᾱ_t·x̂_0 + √(1−ᾱ_t)·ε̂`` (DDIM, equation 12 at η = 0), or ``(1 − σ_t)·x̂_0 + σ_t·ε̂``."""
    schedule, tolerance = schedule_of(prediction_type)
    latents, output = randn(2, 1, 8, seed=source)
    (a_s, b_s), (a_t, b_t) = rates_of(schedule, source), rates_of(schedule, target)
    clean, noise = {
        "epsilon": lambda: ((latents - b_s * output) / a_s, output),
        "v_prediction": lambda: (a_s * latents - b_s * output, a_s * output + b_s * latents),
        "sample": lambda: (output, (latents - a_s * output) / b_s),
        FLOW: lambda: (latents - b_s * output, latents + a_s * output),
    }[prediction_type]()
    a, b = affine_coefficients(schedule, torch.tensor([source]), torch.tensor([target]))
    torch.testing.assert_close(a * latents + b * output, a_t * clean + b_t * noise, rtol=tolerance, atol=tolerance)


@given(LEVELS, TYPES)
@settings(max_examples=100, deadline=None)
def test_target_stands_for_the_noise_it_was_made_from(level: int, prediction_type: str) -> None:
    schedule, tolerance = schedule_of(prediction_type)
    clean, noise = randn(2, 1, 8, seed=level).unsqueeze(1).unbind()
    levels, (a, b) = torch.tensor([level]), rates_of(schedule, level)
    noisy = add_noise(schedule, clean, noise, levels)
    torch.testing.assert_close(noisy, a * clean + b * noise, rtol=0, atol=1e-14)
    target = prediction_target(schedule, clean, noise, levels)
    if prediction_type == FLOW:
        torch.testing.assert_close(target, noise - clean, rtol=0, atol=0)
    for ours, expected in zip(predicted_clean_and_noise(schedule, noisy, target, levels), (clean, noise), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    recovered = recover_noise(schedule, noisy, clean, levels)  # divides by σ, of a flow at least 0.003
    torch.testing.assert_close(recovered, noise, rtol=0, atol=max(tolerance, 1e-11))


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
def test_schedules_of_diffusers(config: dict[str, Any]) -> None:
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.double()
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)
    if "rescale_betas_zero_snr" not in config and config.get("beta_schedule") != "squaredcos_cap_v2":
        assert torch.equal(NoiseSchedule.from_config(config, released_precision=True).alphas_cumprod, theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flows_of_diffusers(shift: float) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_config({**STATIC, "shift": shift})
    assert schedule.prediction_type == "flow" and schedule.num_train_timesteps == 1000
    levels = torch.arange(1000)
    signal, noise = schedule.rates(levels)
    # Theirs is float32: a few roundings of numbers up to 1, and of times up to 1000.
    torch.testing.assert_close(noise.float(), theirs.sigmas.flip(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.model_times(levels), theirs.timesteps.flip(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(signal + noise, torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-15)
    clean = schedule.rates(torch.tensor([-1]))
    assert [float(value) for value in clean] == [1.0, 0.0] and float(noise[-1]) == 1.0


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_dynamic_shift_follows_the_length_of_the_image(kind: str, length: int) -> None:
    """The grid of N steps is the one FluxPipeline asks its scheduler for."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config({**DYNAMIC, "time_shift_type": kind})
    sigmas = torch.linspace(1.0, 1 / 20, 20, dtype=torch.float64).tolist()
    theirs.set_timesteps(sigmas=sigmas, mu=calculate_shift(length))
    schedule = NoiseSchedule.from_config({**DYNAMIC, "time_shift_type": kind}, image_seq_len=length)
    grid = inversion_levels(schedule, 20)
    torch.testing.assert_close(schedule.rates(grid)[1].float(), theirs.sigmas[:-1].flip(0), rtol=1e-6, atol=0)
    assert int(grid[-1]) == 999


def test_a_step_of_a_flow_is_that_of_diffusers() -> None:
    """To the rounding of their float32 latents (|x| < 4) and coefficients (σ up to 1)."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    schedule, levels = sd3(), torch.tensor([999, 499, 249, -1])
    latents, outputs = randn(2, 1, 8).float(), randn(3, 2, 1, 8, seed=1).float()
    theirs = ours = latents
    for k, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(outputs[k], timestep, theirs, return_dict=False)[0]
        a, b = affine_coefficients(schedule, levels[k : k + 1], levels[k + 1 : k + 2])
        ours = (a * ours + b * outputs[k]).float()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * (k + 1) * torch.finfo(torch.float32).eps)


def test_grid_and_clean_end() -> None:
    assert inversion_levels(sd_schedule(), 5).tolist() == [1, 201, 401, 601, 801]
    assert inversion_levels(sd_schedule(steps_offset=0), 4).tolist() == [0, 250, 500, 750]
    assert int(inversion_levels(sd_schedule(), 1000).max()) == 999
    for steps in (1, 7, 10, 1000):  # of a flow it ends at pure noise
        grid = inversion_levels(sd3(), steps)
        assert int(grid[-1]) == 999 and len(grid) == steps and bool((grid.diff() > 0).all())
    clean = torch.tensor([-1])
    assert torch.equal(sd_schedule().alpha_bar(clean), sd_schedule().alphas_cumprod[:1])
    assert float(sd_schedule(set_alpha_to_one=True).alpha_bar(clean)) == 1


def test_released_precision_rounds_the_table() -> None:
    released = sd_schedule().released()
    rounded = released.alphas_cumprod.float()
    assert released.released_precision and torch.equal(released.alphas_cumprod, rounded.double())
    torch.testing.assert_close(released.alphas_cumprod, sd_schedule().alphas_cumprod, rtol=1e-5, atol=0)
    a, _ = affine_coefficients(released, torch.tensor([101]), torch.tensor([201]))
    root = (rounded[201].double().sqrt().float().double(), rounded[101].double().sqrt().float().double())
    assert float(a) == float(root[0] / root[1])


def test_ancestral_variance() -> None:
    """Of a flow from its definition: of ``x_g`` given ``x_0`` and ``x_{g'} = (a'/a)·x_g + √(b'² − (a'/a)²b²)·z``, by
    conditioning the joint normal of ``(x_g, x_{g'})``; nothing is left to draw at the clean end.
    """
    schedule = sd_schedule()
    variance = ancestral_variance(schedule, torch.tensor([-1, 100, 500]), torch.tensor([1, 200, 500]))
    a, b = schedule.alphas_cumprod[100], schedule.alphas_cumprod[200]
    torch.testing.assert_close(variance[1], (1 - a) / (1 - b) * (1 - b / a))
    assert float(variance[2]) == 0 and (variance[:2] > 0).all()
    lower, upper = torch.tensor([-1, 10, 499, 990]), torch.tensor([40, 300, 999, 999])
    (a, b), (a_up, b_up) = sd3().rates(lower), sd3().rates(upper)
    covariance = (a_up / a) * b**2
    variance = ancestral_variance(sd3(), lower, upper)
    torch.testing.assert_close(variance, b**2 - covariance**2 / b_up**2, rtol=1e-12, atol=1e-15)
    assert float(variance[0]) == 0.0 and bool((variance[1:] > 0).all())


NOT_COMPUTED = r"scheduler.* = .*(not known here|not computed here)"
EULER = {**SD_SCHEDULER, "_class_name": "EulerDiscreteScheduler"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "EDM": ({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}, NOT_COMPUTED),
    "Playground": ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_schedule": "karras"}, NOT_COMPUTED),
    "cosine EDM": ({"_class_name": "CosineDPMSolverMultistepScheduler"}, NOT_COMPUTED),
    "consistency": ({"_class_name": "CMStochasticIterativeScheduler"}, NOT_COMPUTED),
    "unknown": ({"_class_name": "SomebodysScheduler", **SD_SCHEDULER}, NOT_COMPUTED),
    "continuous times": ({**EULER, "timestep_type": "continuous"}, NOT_COMPUTED),
    "own sigmas": ({**EULER, "sigma_max": 700.0}, NOT_COMPUTED),
    "flow by sigmas": ({**EULER, "_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, NOT_COMPUTED),
    "thresholding": ({**EULER, "_class_name": "DDIMScheduler", "thresholding": True}, NOT_COMPUTED),
    "nameless EDM": ({"sigma_data": 0.5, "sigma_min": 0.002}, NOT_COMPUTED),
    "inverted flow": ({**STATIC, "invert_sigmas": True}, "invert_sigmas"),
    "shift of zero": ({**STATIC, "shift": 0.0}, "shift"),
    "unknown length": (DYNAMIC, "image_seq_len = None"),
    "flow of betas": ({"prediction_type": "flow"}, "sigmas"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_noise_that_is_not_computed_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("name", ["DDIM", "LCM", "DPMSolverMultistep", "UniPCMultistep", "PNDM", "EulerDiscrete"])
def test_every_way_to_sample_the_same_betas_has_the_same_noise(name: str) -> None:
    found = NoiseSchedule.from_config({**SD_SCHEDULER, "_class_name": f"{name}Scheduler", "use_karras_sigmas": True})
    assert torch.equal(found.alphas_cumprod, NoiseSchedule.from_config(SD_SCHEDULER).alphas_cumprod)
