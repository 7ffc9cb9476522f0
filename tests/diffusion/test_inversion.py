"""Inversion of ragged batches: levels, network evaluations, noise, guidance."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from fastinvdpo.diffusion.inversion import (
    InversionSettings,
    inversion_steps,
    invert,
    plan_grid,
    plan_inversion,
    plan_released,
)
from fastinvdpo.diffusion.prompt import Prompt, predict, weighted_sum
from fastinvdpo.diffusion.schedule import affine_coefficients, ancestral_variance, recover_noise
from tests.cases import pairwise, sd_schedule, toy_network

SCHEDULE = sd_schedule()


def batch(n: int, seed: int = 0) -> tuple[Tensor, Prompt]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(n, 4, 8, 8, generator=generator, dtype=torch.float64)
    told = {"prompt": torch.randn(n, generator=generator, dtype=torch.float64)}
    return latents, Prompt(told, {"prompt": torch.zeros(n, dtype=torch.float64)})


class Counting:
    """A network that remembers how many samples it was asked for, at which times, and where their prompts lay."""

    def __init__(self) -> None:
        self.network, self.samples, self.times, self.prompts = toy_network(), 0, [], []

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        self.samples += latents.shape[0]
        self.times.append(timesteps.tolist())
        self.prompts.append(conditioning["prompt"].data_ptr())
        return self.network(latents, timesteps, conditioning)


def test_plan_ends_exactly_at_every_level() -> None:
    levels = torch.tensor([0, 1, 2, 100, 101, 102, 417, 901, 950, 999])
    plan = plan_inversion(SCHEDULE, levels, 10)
    grid = [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    for row, level in enumerate(levels.tolist()):
        visited = [g for g in grid if g < level] + [level]
        assert int(plan.steps[row]) == len(visited)
        assert plan.target[row, : len(visited)].tolist() == visited
        assert plan.source[row, : len(visited)].tolist() == [-1, *visited[:-1]]


def test_every_sample_costs_its_own_steps_and_leaves_from_the_end_of_the_batch() -> None:
    """The longest way goes first, so that nothing is gathered again when a sample has arrived."""
    levels = torch.tensor([0, 1, 150, 150, 999, 417])
    latents, prompt = batch(6)
    plan = plan_inversion(SCHEDULE, levels, 10)
    assert int(plan.steps.sum()) == 1 + 1 + 3 + 3 + 11 + 6
    network, renoised = Counting(), Counting()
    invert(network, SCHEDULE, latents, plan, prompt)
    invert(renoised, SCHEDULE, latents, plan, prompt, InversionSettings(renoise_iterations=1))
    assert network.samples == int(plan.steps.sum()) == renoised.samples / 2
    assert [len(times) for times in network.times] == [6, 4, 4, 2, 2, 2, 1, 1, 1, 1, 1]
    assert network.times[2] == [201, 201, 150, 150] and len(set(network.prompts)) == 1


KINDS_OF_STEPS = [
    InversionSettings(),
    InversionSettings(eta=0.3, seed=5),
    InversionSettings(renoise_iterations=2),
    InversionSettings(eta=0.2, renoise_iterations=1, model_time="source"),
]


@pytest.mark.parametrize(
    ("settings", "given_noise"), list(zip(KINDS_OF_STEPS, (False, True, False, False), strict=True))
)
def test_static_shapes_change_the_cost_alone(settings: InversionSettings, given_noise: bool) -> None:
    levels = torch.tensor([700, 3, 250, 999, 0])
    latents, prompt = batch(5)
    prompt = Prompt(prompt.conditional, prompt.unconditional, 2.0)
    plan = plan_inversion(SCHEDULE, levels, 10)
    noise = torch.randn(11, 5, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results, networks = [], []
    for static in (False, True):
        networks.append(Counting())
        chosen = dataclasses.replace(settings, static_shapes=static)
        results.append(
            invert(networks[-1], SCHEDULE, latents, plan, prompt, chosen, noise=noise if given_noise else None)
        )
    assert torch.equal(*results)
    evaluations = 2 * (1 + settings.renoise_iterations)
    assert networks[0].samples == evaluations * int(plan.steps.sum())
    assert networks[1].samples == evaluations * 5 * 11
    assert {len(times) for times in networks[1].times} == {10}


@pytest.mark.parametrize("static_shapes", [False, True])
def test_every_step_shows_the_whole_batch_in_its_own_order(static_shapes: bool) -> None:
    levels = torch.tensor([150, 3, 999])
    latents, prompt = batch(3)
    plan, settings = plan_inversion(SCHEDULE, levels, 10), InversionSettings(static_shapes=static_shapes)
    network, before = toy_network(), latents
    for position, step in enumerate(inversion_steps(network, SCHEDULE, latents, plan, prompt, settings)):
        made = [row for row in range(3) if plan.steps[row] > position]
        assert step.rows.tolist() == ([0, 1, 2] if static_shapes else sorted(made, key=lambda row: -plan.steps[row]))
        assert torch.equal(step.source, before[step.rows])
        changed = (step.latents != before).flatten(1).any(1).nonzero().squeeze(1).tolist()
        assert changed == made
        before = step.latents


@pytest.mark.parametrize(("settings", "guidance_scale"), list(zip(KINDS_OF_STEPS, [1.0, 2.0] * 2, strict=True)))
def test_a_batch_equals_its_samples_one_by_one(settings: InversionSettings, guidance_scale: float) -> None:
    levels, index = torch.tensor([700, 3, 250, 999, 0]), torch.tensor([40, 41, 7, 8, 9])
    latents, prompt = batch(5)
    prompt = Prompt(prompt.conditional, prompt.unconditional, guidance_scale)
    network = toy_network()
    plan = plan_inversion(SCHEDULE, levels, 10)
    together = invert(network, SCHEDULE, latents, plan, prompt, settings, noise_index=index)
    for row in range(5):
        one = torch.tensor([row])
        given = (latents[one], plan_inversion(SCHEDULE, levels[one], 10), prompt.select(one), settings)
        assert torch.equal(invert(network, SCHEDULE, *given, noise_index=index[one]), together[one])


def test_recovered_noise_holds_the_true_noise() -> None:
    """A network that knows the noise, a pair at level 50: the share of the noise that the recovered target holds.

    The corrected inversion keeps all but what the clean end at ᾱ_0 stands for; the released one, which stops at level
    1, loses most.
    """
    clean, noise = torch.randn(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    told, levels = Prompt({"prompt": torch.zeros(1)}), torch.tensor([50])
    both = torch.stack([clean.flatten(), noise.flatten()], dim=1)

    def share(plan_of) -> float:
        x = invert(lambda x, t, c: noise, SCHEDULE, clean, plan_of(SCHEDULE, levels, 10), told)
        recovered = recover_noise(SCHEDULE, x, clean, levels)
        return float(torch.linalg.lstsq(both, recovered.flatten().unsqueeze(1)).solution[1])

    signal, deviation = SCHEDULE.rates(torch.tensor([-1, 1, 50]))
    corrected = float((deviation[2] - signal[2] * deviation[0] / signal[0]) / deviation[2])
    released = float((deviation[1] - signal[1] * deviation[0] / signal[0]) / deviation[2])
    assert share(plan_inversion) == pytest.approx(corrected) and corrected > 0.85
    assert share(plan_released) == pytest.approx(released) and released < 0.1


def test_weighted_sum() -> None:
    outputs = [torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(11)]
    weights = torch.randn(11, dtype=torch.float64)
    expected = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
    ours = weighted_sum(outputs, weights.tolist())
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    for weight, output in zip(weights, outputs, strict=True):
        torch.testing.assert_close(output.grad, weight.expand_as(output))
    assert weighted_sum(outputs[:1], [1.0]) is outputs[0]


def test_guidance() -> None:
    latents, prompt = batch(3)
    times, network = torch.tensor([5, 500, 900]), Counting()
    unconditional = network.network(latents, times, prompt.unconditional)
    conditional = network.network(latents, times, prompt.conditional)
    guided = predict(network, latents, times, Prompt(prompt.conditional, prompt.unconditional, 3.0))
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional))
    assert network.samples == 6 and len(network.times) == 1
    assert torch.equal(predict(network, latents, times, Prompt(prompt.conditional)), conditional)


def test_model_time() -> None:
    latents, prompt = batch(1)
    for name, expected in (("destination", [[1], [251], [300]]), ("source", [[0], [1], [251]])):
        network = Counting()
        plan = plan_inversion(SCHEDULE, torch.tensor([300]), 4)
        invert(network, SCHEDULE, latents, plan, prompt, InversionSettings(model_time=name))
        assert network.times == expected


def test_renoise_averages_all_predictions() -> None:
    latents, prompt = batch(2)
    network, plan = toy_network(), plan_grid(SCHEDULE, 2, 3)
    walk = inversion_steps(network, SCHEDULE, latents, plan, prompt, InversionSettings(renoise_iterations=2))
    first = next(iter(walk))
    a, b = (value.view(-1, 1, 1, 1) for value in affine_coefficients(SCHEDULE, plan.source[:, 0], plan.target[:, 0]))
    time, outputs, x = plan.target[:, 0], [], latents
    for _ in range(3):
        outputs.append(network(x, time, prompt.conditional))
        x = a * latents + b * sum(outputs) / len(outputs)
    torch.testing.assert_close(first.latents, x)


@pytest.mark.parametrize(("levels", "renoise", "eta"), pairwise([[700, 700], [10, 700]], [0, 2], [0.0, 0.5]))
def test_a_trajectory_holds_the_latents_after_every_step(levels: list[int], renoise: int, eta: float) -> None:
    latents, prompt = batch(2)
    latents, before = latents.float(), latents.float()
    plan = plan_inversion(SCHEDULE, torch.tensor(levels), 4)
    settings = InversionSettings(eta=eta, renoise_iterations=renoise, seed=3)
    kept = torch.full((2, plan.target.shape[1] + 1, *latents.shape[1:]), torch.nan)
    arguments = (toy_network(), SCHEDULE, latents, plan, prompt, settings)
    plain = list(inversion_steps(*arguments))
    walked = list(inversion_steps(*arguments, trajectory=kept[:, 1:]))
    assert torch.equal(kept[:, 1:], torch.stack([step.latents for step in plain], dim=1)) and kept[:, 0].isnan().all()
    # Whatever was yielded stays as it was.
    assert torch.equal(latents, before)
    for one, two in zip(plain, walked, strict=True):
        assert torch.equal(one.latents, two.latents) and torch.equal(one.source, two.source)
    for earlier, later in itertools.pairwise(walked):
        assert torch.equal(later.source, earlier.latents[later.rows])


def test_step_noise_has_the_variance_of_the_interval_it_crossed() -> None:
    clean = torch.zeros(2, 4, 32, 32, dtype=torch.float64)
    told = Prompt({"prompt": torch.zeros(2)})
    plan = plan_inversion(SCHEDULE, torch.tensor([1, 1]), 10)
    settings, index = InversionSettings(eta=0.5, seed=1), torch.tensor([3, 3])
    x = invert(lambda x, t, c: torch.zeros_like(x), SCHEDULE, clean, plan, told, settings, noise_index=index)
    deviation = 0.5 * float(ancestral_variance(SCHEDULE, torch.tensor([-1]), torch.tensor([1])).sqrt())
    assert float(x[0].std()) == pytest.approx(deviation, rel=0.05)
    assert torch.equal(x[0], x[1])


def test_no_gradient_flows_through_an_inversion() -> None:
    latents, prompt = batch(2)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    network = toy_network()
    plan = plan_grid(SCHEDULE, 2, 2)
    x = invert(lambda x, t, c: weight * network(x, t, c), SCHEDULE, latents, plan, prompt)
    assert not x.requires_grad and torch.is_grad_enabled()
