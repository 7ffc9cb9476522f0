"""Flow matching: inversion along straight lines, and the methods on top."""

from __future__ import annotations

import pytest
import torch

from fastinvdpo.diffusion.inversion import invert, plan_inversion
from fastinvdpo.diffusion.prompt import Prompt
from fastinvdpo.diffusion.schedule import add_noise, recover_noise
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import build_objective
from tests.cases import toy_network
from tests.diffusion.test_schedule import randn, sd3
from tests.methods.problems import pairs


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


STEPS = {"num_inference_steps": 4}
METHODS = {"diffusion-dpo": {}, "inpo": STEPS, "smpo": STEPS, "inversion-dpo": STEPS}


@pytest.mark.parametrize("method", METHODS)
def test_the_target_of_every_method_is_a_velocity(method: str) -> None:
    """``noise − x_0`` for the noise that makes the noisy latent of ``x_0``, at its level: ``(x_t − x_0)/σ``."""
    objective, batch = build_objective(method, sd3(), beta=1.0, **METHODS[method]), pairs(2)
    out = objective(toy_network(), toy_network(0.6), batch, seed=3)
    sigma = sd3().rates(out.timesteps)[1].reshape(*out.timesteps.shape, 1, 1, 1)
    clean = batch.latents if out.timesteps.ndim == 1 else batch.latents.unsqueeze(1)
    assert out.target is not None
    torch.testing.assert_close(out.target, (out.noisy_latents - clean) / sigma, rtol=1e-9, atol=1e-9)


def test_flow_dpo_is_its_formula() -> None:
    """Flow-DPO (arXiv 2501.13918, equation 5 with constant β): velocities in place of noises."""
    batch, schedule = pairs(3), sd3()
    policy, reference = toy_network(), toy_network(0.6)
    out = build_objective("diffusion-dpo", schedule, beta=50.0)(policy, reference, batch, seed=1)
    error = [
        (network(out.noisy_latents, out.timesteps, batch.conditioning) - out.target).square().flatten(1).mean(1)
        for network in (policy, reference)
    ]
    winner, loser = (error[0] - error[1]).chunk(2)
    expected = -torch.nn.functional.logsigmoid(-25.0 * (winner - loser)).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-12)
    first, second = out.noisy_latents.chunk(2)
    clean_first, clean_second = batch.latents.chunk(2)
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
    out = objective(toy_network(0.6), reference, pairs(2), seed=0)
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
