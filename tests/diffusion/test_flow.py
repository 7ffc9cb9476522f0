"""Flow matching: σ levels, Euler steps in both directions, targets, timesteps, and the methods on top."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinvdpo.diffusion.inversion import invert, plan_inversion
from fastinvdpo.diffusion.prompt import Prompt
from fastinvdpo.diffusion.schedule import (
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
from fastinvdpo.methods import PairBatch, build_objective
from tests.cases import toy_network

LEVELS = st.integers(-1, 999)
STATIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = {**STATIC, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def sd3() -> NoiseSchedule:
    return NoiseSchedule.from_config(STATIC)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(pairs: int = 2, seed: int = 0, **more: torch.Tensor) -> PairBatch:
    told = {"prompt": randn(2 * pairs, 1, seed=seed + 1)}
    return PairBatch(randn(2 * pairs, 4, 4, 4, seed=seed), told, torch.arange(pairs), {"prompt": 0 * told["prompt"]},
                     scores=torch.linspace(0.2, 0.3, 2 * pairs).flip(0))  # fmt: skip


# The schedule


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_are_those_of_diffusers(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
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
    theirs = FlowMatchEulerDiscreteScheduler.from_config({**DYNAMIC, "time_shift_type": kind})
    sigmas = torch.linspace(1.0, 1 / 20, 20, dtype=torch.float64).tolist()
    theirs.set_timesteps(sigmas=sigmas, mu=calculate_shift(length))
    schedule = NoiseSchedule.from_config({**DYNAMIC, "time_shift_type": kind}, image_seq_len=length)
    grid = inversion_levels(schedule, 20)
    torch.testing.assert_close(schedule.rates(grid)[1].float(), theirs.sigmas[:-1].flip(0), rtol=1e-6, atol=0)
    assert int(grid[-1]) == 999


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**STATIC, "invert_sigmas": True}, "invert_sigmas"),
        ({**STATIC, "shift": 0.0}, "shift"),
        ({**DYNAMIC}, "image_seq_len = None"),
        ({"prediction_type": "flow"}, "sigmas"),
    ],
)
def test_schedules_that_cannot_be_read(config: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        NoiseSchedule.from_config(config)


# One step


@given(LEVELS, LEVELS, st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_a_step_and_its_return_cancel(source: int, target: int, seed: int) -> None:
    """With the same outputs: Euler steps of opposite size."""
    latents, output = randn(2, 1, 8, seed=seed)
    there, back = (torch.tensor([source]), torch.tensor([target])), (torch.tensor([target]), torch.tensor([source]))
    (a, b), (c, d) = affine_coefficients(sd3(), *there), affine_coefficients(sd3(), *back)
    torch.testing.assert_close(c * (a * latents + b * output) + d * output, latents, rtol=0, atol=1e-14)
    assert float(a) == float(c) == 1.0


def test_a_step_is_that_of_diffusers() -> None:
    """To the rounding of their float32 latents (|x| < 4) and coefficients (σ up to 1)."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = [1.0, 0.5, 0.25]
    scheduler.set_timesteps(sigmas=sigmas)
    schedule, levels = sd3(), torch.tensor([999, 499, 249, -1])
    latents, outputs = randn(2, 1, 8).float(), randn(3, 2, 1, 8, seed=1).float()
    theirs = ours = latents
    for k, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(outputs[k], timestep, theirs, return_dict=False)[0]
        a, b = affine_coefficients(schedule, levels[k : k + 1], levels[k + 1 : k + 2])
        ours = (a * ours + b * outputs[k]).float()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * (k + 1) * torch.finfo(torch.float32).eps)


@given(st.integers(0, 999), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_target_is_noise_minus_clean(level: int, seed: int) -> None:
    clean, noise = randn(2, 1, 8, seed=seed).unsqueeze(1).unbind()
    levels, schedule = torch.tensor([level]), sd3()
    sigma = 3 * (level + 1) / 1000 / (1 + 2 * (level + 1) / 1000)
    noisy = add_noise(schedule, clean, noise, levels)
    torch.testing.assert_close(noisy, (1 - sigma) * clean + sigma * noise, rtol=0, atol=1e-14)
    target = prediction_target(schedule, clean, noise, levels)
    torch.testing.assert_close(target, noise - clean, rtol=0, atol=0)
    # Recovering divides by σ, at least 0.003.
    torch.testing.assert_close(recover_noise(schedule, noisy, clean, levels), noise, rtol=0, atol=1e-11)
    for got, wanted in zip(predicted_clean_and_noise(schedule, noisy, target, levels), (clean, noise), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_ancestral_variance_is_that_of_the_posterior() -> None:
    """From its definition: of ``x_g`` given ``x_0`` and ``x_{g'} = (a'/a)·x_g + √(b'² − (a'/a)²b²)·z``, by conditioning
    the joint normal of ``(x_g, x_{g'})``; nothing is left to draw at the clean end.
    """
    schedule = sd3()
    lower, upper = torch.tensor([-1, 10, 499, 990]), torch.tensor([40, 300, 999, 999])
    (a, b), (a_up, b_up) = schedule.rates(lower), schedule.rates(upper)
    covariance = (a_up / a) * b**2
    expected = b**2 - covariance**2 / b_up**2
    got = ancestral_variance(schedule, lower, upper)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    assert float(got[0]) == 0.0 and bool((got[1:] > 0).all())


# Inversion


@pytest.mark.parametrize("steps", [1, 7, 10, 1000])
def test_the_grid_ends_at_pure_noise(steps: int) -> None:
    grid = inversion_levels(sd3(), steps)
    assert int(grid[-1]) == 999 and len(grid) == steps and bool((grid.diff() > 0).all())


def test_inversion_of_a_straight_flow_finds_its_noise() -> None:
    """A network that knows the noise ``ε`` of every clean latent sends each along the line to it, exactly."""
    schedule, clean, noise = sd3(), randn(5, 4, 2, 2), randn(5, 4, 2, 2, seed=1)
    levels = torch.tensor([0, 17, 400, 730, 999])
    told = {"velocity": noise - clean}
    seen: list[torch.Tensor] = []

    def network(latents: torch.Tensor, times: torch.Tensor, told: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(times)
        return told["velocity"]

    plan = plan_inversion(schedule, levels, 10)
    ended = invert(network, schedule, clean, plan, Prompt(told))  # type: ignore[arg-type]
    torch.testing.assert_close(ended, add_noise(schedule, clean, noise, levels), rtol=0, atol=1e-13)
    torch.testing.assert_close(recover_noise(schedule, ended, clean, levels), noise, rtol=0, atol=1e-10)
    assert sum(len(times) for times in seen) == int(plan.steps.sum()) == 1 + 1 + 5 + 8 + 10


# Methods


METHODS = {
    "diffusion-dpo": {},
    "inpo": {"num_inference_steps": 4},
    "smpo": {"num_inference_steps": 3},
    "inversion-dpo": {"num_inference_steps": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_target_of_every_method_is_a_velocity(method: str) -> None:
    """``noise − x_0`` for the noise that makes the noisy latent of ``x_0``, at its level: ``(x_t − x_0)/σ``."""
    objective, pairs = build_objective(method, sd3(), beta=1.0, **METHODS[method]), batch()
    out = objective(toy_network(), toy_network(0.6), pairs, seed=3)
    sigma = sd3().rates(out.timesteps)[1].reshape(*out.timesteps.shape, 1, 1, 1)
    clean = pairs.latents if out.timesteps.ndim == 1 else pairs.latents.unsqueeze(1)
    assert out.target is not None
    torch.testing.assert_close(out.target, (out.noisy_latents - clean) / sigma, rtol=1e-9, atol=1e-9)


def test_flow_dpo_is_its_formula() -> None:
    """Flow-DPO (arXiv 2501.13918, equation 5 with constant β): velocities in place of noises."""
    pairs, schedule = batch(3), sd3()
    policy, reference = toy_network(), toy_network(0.6)
    out = build_objective("diffusion-dpo", schedule, beta=50.0)(policy, reference, pairs, seed=1)
    error = [
        (network(out.noisy_latents, out.timesteps, pairs.conditioning) - out.target).square().flatten(1).mean(1)
        for network in (policy, reference)
    ]
    winner, loser = (error[0] - error[1]).chunk(2)
    expected = -torch.nn.functional.logsigmoid(-25.0 * (winner - loser)).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-12)
    first, second = out.noisy_latents.chunk(2)
    clean_first, clean_second = pairs.latents.chunk(2)
    sigma = schedule.rates(out.timesteps)[1][:3].view(-1, 1, 1, 1)
    # One noise for both sides.
    torch.testing.assert_close(first - second, (1 - sigma) * (clean_first - clean_second), rtol=0, atol=1e-13)


def test_the_step_variant_targets_the_velocity_that_was_used() -> None:
    used: list[torch.Tensor] = []

    def reference(latents: torch.Tensor, times: torch.Tensor, told: dict[str, torch.Tensor]) -> torch.Tensor:
        used.append(toy_network()(latents, times, told))
        return used[-1]

    objective = build_objective(
        "inversion-dpo", sd3(), beta=1.0, num_inference_steps=3, variant="step", guidance_scale=1.0
    )
    out = objective(toy_network(0.6), reference, batch(), seed=0)
    assert out.target is not None
    torch.testing.assert_close(out.target, torch.stack(used[:3], dim=1), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("inversion-dpo", {"variant": "distance"}, "variant = 'distance'"),
        ("inversion-dpo", {"variant": "distance-policy"}, "variant = 'distance-policy'"),
        ("inpo", {"compat": "released"}, "compat = 'released'"),
        ("diffusion-dpo", {"compat": "released"}, "compat = 'released'"),
    ],
)
def test_what_has_no_meaning_is_refused(method: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"{message}.*flow"):
        build_objective(method, sd3(), beta=1.0, **options)  # type: ignore[arg-type]
