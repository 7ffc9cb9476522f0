"""The methods: their draws, symmetries, and the variants of Inversion-DPO."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from fastinvdpo.diffusion.schedule import PREDICTION_TYPES, affine_coefficients, recover_noise
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import Draws, SmPO, build_objective
from fastinvdpo.methods.base import STREAM_TIMESTEP
from fastinvdpo.ops import philox
from tests.cases import sd_schedule
from tests.methods.problems import PAIRED, REFERENCE, SCHEDULE, Policy, chain_objective, networks, pairs, select

SMALL = {
    "inpo": {"num_inference_steps": 4},
    "smpo": {"num_inference_steps": 3},
    "inversion-dpo": {"num_inference_steps": 5},
}
pytestmark = pytest.mark.filterwarnings("ignore:variant 'distance")


@pytest.mark.parametrize(
    ("method", "prediction_type"), [*zip(PAIRED, itertools.cycle(PREDICTION_TYPES)), ("inpo", "epsilon")]
)
def test_a_batch_equals_its_pairs_one_by_one(method: str, prediction_type: str) -> None:
    schedule = sd_schedule(prediction_type=prediction_type)
    objective, batch = build_objective(method, schedule, beta=50.0, **SMALL.get(method, {})), pairs()
    policy = Policy()
    together = objective(policy, REFERENCE, batch, seed=3)
    together.loss.backward()
    gradient, policy.weight.grad = policy.weight.grad, None
    assert len({tuple(row) for row in together.timesteps.view(8, -1)[:4].tolist()}) == (
        1 if method == "inversion-dpo" else 4
    )
    for pair in range(4):
        alone = objective(policy, REFERENCE, select(batch, [pair]), seed=3)
        (alone.loss / 4).backward()
        torch.testing.assert_close(alone.margin, together.margin[pair : pair + 1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(alone.noisy_latents[0], together.noisy_latents[pair])
    torch.testing.assert_close(policy.weight.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [name for name in PAIRED if name != "snpo"])  # whose loser is bounded
def test_swapping_the_sides_flips_the_margin(method: str) -> None:
    options = {**SMALL[method], "eta": 0.0} if method == "inpo" else SMALL.get(method, {})
    objective, batch = build_objective(method, SCHEDULE, beta=50.0, **options), pairs()
    swapped = dataclasses.replace(batch, latents=batch.latents.roll(4, 0))  # not the scores, which SmPO weighs by
    there, back = (objective(Policy(), REFERENCE, side, seed=3).margin for side in (batch, swapped))
    torch.testing.assert_close(there, -back, rtol=1e-9, atol=1e-12)
    assert (there != 0).all()


@pytest.mark.parametrize("method", [name for name in PAIRED if name != "mapo"])  # which has no reference
def test_policy_equal_to_reference(method: str) -> None:
    """Loss ln 2 to the last bit where it is −log σ, and a gradient that is not zero."""
    objective, policy = build_objective(method, SCHEDULE, **SMALL.get(method, {})), Policy(gap=0.0)
    output = objective(policy, REFERENCE, pairs(), seed=0)
    assert not output.margin.any()
    assert objective.method.utility not in ("sigmoid", "snpo") or float(output.loss.detach()) == math.log(2)
    output.loss.backward()
    assert policy.weight.grad.norm() > 1e-3


@pytest.mark.parametrize("variant", ["distance", "distance-policy"])
def test_distance_has_no_gradient_where_policy_is_reference(variant: str) -> None:
    policy = Policy(gap=0.0)
    with pytest.warns(UserWarning, match="does not distinguish a move towards the winners"):
        objective = build_objective("inversion-dpo", SCHEDULE, variant=variant, num_inference_steps=5)
    output = objective(policy, REFERENCE, pairs(), seed=0)
    assert float(output.loss.detach()) == math.log(2)
    output.loss.backward()
    assert not policy.weight.grad.any()


def test_distance_cannot_tell_a_move_from_its_opposite() -> None:
    """To leading order z is even in the displacement of the policy; `endpoint` is odd."""
    for variant, sign in (("distance", 1), ("endpoint", -1)):
        objective = chain_objective(variant, guidance_scale=1.0)
        forth, back = (objective(Policy(gap), REFERENCE, pairs(), seed=0).margin for gap in (1e-5, -1e-5))
        torch.testing.assert_close(forth, sign * back, rtol=1e-2, atol=0)


def test_step_variant_vanishes_on_a_fine_chain() -> None:
    """Exact inversion makes the reference perfect on its own trajectory, so its error against `step`'s targets falls
    with N.
    """
    errors = []
    for steps in (5, 50):
        objective = chain_objective("step", num_inference_steps=steps, guidance_scale=1.0)
        errors.append(float(objective(Policy(), REFERENCE, pairs(), seed=0).reference_mse[:, 1:].mean()))
    assert errors[1] < errors[0] / 10


def test_step_target_is_the_output_the_inversion_used() -> None:
    batch = pairs()
    output = chain_objective("step", num_inference_steps=4, guidance_scale=1.0)(Policy(), REFERENCE, batch, seed=0)
    levels = torch.tensor([-1, 1, 251, 501, 751])
    states = torch.cat([batch.latents.unsqueeze(1), output.noisy_latents], dim=1)
    for k in range(4):
        a, b = affine_coefficients(SCHEDULE, levels[k], levels[k + 1])
        torch.testing.assert_close(states[:, k + 1], a * states[:, k] + b * output.target[:, k])


def test_endpoint_target_is_the_noise_from_the_clean_latent() -> None:
    objective, batch = chain_objective(num_inference_steps=3), pairs()
    output = objective(Policy(), REFERENCE, batch, seed=0)
    for k, level in enumerate([1, 334, 667]):
        expected = recover_noise(SCHEDULE, output.noisy_latents[:, k], batch.latents, torch.full((8,), level))
        torch.testing.assert_close(output.target[:, k], expected)


def test_sampled_positions_cover_an_uneven_chain_evenly() -> None:
    """One from each half; their margin is unbiased (test_streaming.py)."""
    objective = chain_objective(timesteps_per_step=2)
    batch = dataclasses.replace(pairs(1), sample_index=torch.arange(20_000), latents=torch.zeros(40_000, 1))
    positions, weight = objective._sample_positions(batch, seed=1)
    assert (positions[:, 0] <= 2).all() and (positions[:, 1] >= 2).all()
    share = torch.bincount(positions.flatten(), minlength=5).double() / 20_000
    torch.testing.assert_close(share, torch.full((5,), 0.4, dtype=torch.float64), rtol=0, atol=0.02)
    assert (weight == 0.5).all()


def test_timesteps_are_drawn_by_the_number_of_the_draw() -> None:
    objective, batch = build_objective("diffusion-dpo", SCHEDULE), pairs()
    output = objective(Policy(), REFERENCE, batch, seed=9)
    assert torch.equal(output.timesteps[:4], philox.integers(9, STREAM_TIMESTEP, batch.sample_index, 1000))
    assert torch.equal(output.timesteps[:4], output.timesteps[4:])
    again = objective(Policy(), REFERENCE, dataclasses.replace(batch, sample_index=batch.sample_index + 1), seed=9)
    assert torch.equal(output.timesteps[1:4], again.timesteps[:3])
    other = objective(Policy(), REFERENCE, batch, seed=10)
    assert not torch.equal(output.timesteps, other.timesteps)


def test_diffusion_dpo_shares_the_noise_of_a_pair() -> None:
    output = build_objective("diffusion-dpo", SCHEDULE)(Policy(), REFERENCE, pairs(), seed=0)
    assert torch.equal(output.target[:4], output.target[4:]) and not torch.equal(output.target[0], output.target[1])


def test_inpo_draws_noise_for_each_side() -> None:
    objective = build_objective("inpo", SCHEDULE, eta=1.0, num_inference_steps=4)
    batch = pairs()
    same = dataclasses.replace(batch, latents=batch.latents[:4].repeat(2, 1, 1, 1))
    output = objective(Policy(), REFERENCE, same, seed=0, draws=Draws(timesteps=torch.full((4,), 500)))
    assert not torch.equal(output.noisy_latents[:4], output.noisy_latents[4:])


@pytest.mark.parametrize("name", ["inpo", "smpo"])
def test_the_reference_may_invert(name: str) -> None:
    """The latents are then those of the reference, and the policy makes one forward pass, with gradient."""
    (policy, reference), batch = networks(), pairs()
    output = build_objective(name, SCHEDULE, inverter="reference", **SMALL[name])(policy, reference, batch, seed=2)
    assert (policy.evaluations(True), policy.evaluations(False)) == (8, 0)
    swapped = build_objective(name, SCHEDULE, **SMALL[name])(reference, policy, batch, seed=2)
    for found in ("noisy_latents", "target"):
        assert torch.equal(getattr(output, found), getattr(swapped, found))
    assert torch.equal(output.policy_pred, swapped.reference_pred)
    assert torch.equal(output.reference_pred, swapped.policy_pred)
    with pytest.raises(InvalidInput, match=r"^inverter = 'student': is not known"):
        build_objective(name, SCHEDULE, inverter="student")
    with pytest.raises(InvalidInput, match=r"^inverter = 'reference': is not what was released"):
        build_objective(name, SCHEDULE, inverter="reference", compat="released")


def test_smpo_weighs_a_tie_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = build_objective("smpo", SCHEDULE, num_inference_steps=3, beta=50.0), pairs()
    tied = objective(Policy(), REFERENCE, dataclasses.replace(batch, scores=torch.ones(8)), seed=0)
    assert not tied.margin.any()
    plain = objective(Policy(), REFERENCE, batch, seed=0).margin
    winner, loser = batch.scores.chunk(2)
    rho = 10 * (2 * torch.sigmoid((winner - loser) / 0.16658) - 1)
    monkeypatch.setattr(SmPO, "pair_weight", lambda self, batch: None)
    unweighted = objective(Policy(), REFERENCE, batch, seed=0).margin
    torch.testing.assert_close(plain, rho * unweighted)


def test_released_inversion_takes_the_first_pair_level_for_all() -> None:
    """What the compatibility mode reproduces and the default corrects."""
    draws, batch = Draws(timesteps=torch.tensor([450, 50, 999, 1])), pairs()
    released = build_objective("inpo", SCHEDULE, compat="released", eta=0.0, num_inference_steps=4)
    alone = released(Policy(), REFERENCE, select(batch, [1]), seed=0, draws=Draws(timesteps=torch.tensor([450])))
    together = released(Policy(), REFERENCE, batch, seed=0, draws=draws)
    torch.testing.assert_close(together.noisy_latents[1], alone.noisy_latents[0])
    assert together.timesteps.tolist()[:4] == [450, 50, 999, 1]
