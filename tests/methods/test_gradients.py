"""Every way to compute a method's gradient gives that of the published formula, differentiated term by term: an oracle
in plain PyTorch that evaluates one sample at a time and shares no code with them but the trajectory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinvdpo.diffusion.schedule import inversion_levels
from fastinvdpo.methods import VARIANTS, ChainObjective, PairBatch, SingleTimestepObjective, build_objective
from fastinvdpo.methods.streaming import LossTerms
from tests.cases import pairwise
from tests.methods.problems import LEVELS, SCHEDULE, Small, chain_objective, networks, pairs, relative, select

pytestmark = pytest.mark.filterwarnings("ignore:variant 'distance")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
BETA, GUIDANCE, SEED = 20.0, 2.0, 3
PAIRS = 3


def guided(network: Small, batch: PairBatch, row: int, latent: Tensor, level: int) -> Tensor:
    """``ε_uncond + g·(ε_cond − ε_uncond)``, each from a call of its own."""
    assert batch.unconditional is not None
    time = torch.tensor([level])
    with_prompt, without = (
        network(latent[None], time, {"prompt": told["prompt"][row : row + 1]})[0]
        for told in (batch.conditioning, batch.unconditional)
    )
    return without + GUIDANCE * (with_prompt - without)


def oracle(method: ChainObjective, batch: PairBatch, chain: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of Inversion-DPO's loss and its margins ``(B,)``, for an epsilon model: one graph over all calls."""
    policy, reference = networks(batch.latents.dtype)
    levels = inversion_levels(SCHEDULE, LEVELS).tolist()
    positions, weights = method._sample_positions(batch, SEED)  # which positions: test_objectives.py
    margins = []
    for pair in range(batch.pairs):
        margin = torch.zeros((), dtype=batch.latents.dtype)
        for position, weight in zip(positions[pair].tolist(), weights[pair].tolist(), strict=True):
            level = levels[position]
            alpha_bar = float(SCHEDULE.alpha_bar(torch.tensor([level]))[0])
            for row, sign in ((pair, 1.0), (pair + batch.pairs, -1.0)):
                latent = chain[row, position]
                p = guided(policy, batch, row, latent, level)
                with torch.no_grad():
                    r = guided(reference, batch, row, latent, level)
                if method.method.scores_distance:
                    margin = margin + sign * BETA / 2 * weight / (2 * alpha_bar) * (p - r).square().mean()
                    continue
                clean = batch.latents[row]
                target = (latent - alpha_bar**0.5 * clean) / (1 - alpha_bar) ** 0.5
                if method.method.variant == "step":
                    target = chain[row, position + LEVELS]
                score = (p - target).square().mean() - (r - target).square().mean()
                margin = margin - sign * BETA / 2 * weight * score
        margins.append(margin)
    loss = torch.nn.functional.softplus(-torch.stack(margins)).mean()
    loss.backward()
    return policy.gradient(), torch.stack(margins).detach()


def split(batch: PairBatch, count: int) -> Iterator[PairBatch]:
    """Micro-batches of ``count`` pairs."""
    for start in range(0, batch.pairs, count):
        yield select(batch, list(range(start, start + count)))


def refuse(*arguments: Any) -> Any:
    raise AssertionError("the reference made a forward pass although its predictions are there")


# Less than one guided prediction, one, a part of a pair (20 in all), a pair and a part that is not made, everything.
SIZES: list[int | None] = [1, 3, 8, 27, None]


def stream(
    method: ChainObjective, policy: Small, reference: Any, batch: PairBatch, passes: int, max_batch: int | None
) -> LossTerms:
    trained = list(policy.parameters())
    return method.stream(policy, reference, batch, seed=SEED, max_batch=max_batch, passes=passes, parameters=trained)


@pytest.mark.parametrize(("variant", "sampled", "dtype"), pairwise(VARIANTS, [None, 2], TOLERANCE))
def test_inversion_dpo(variant: str, sampled: int | None, dtype: torch.dtype) -> None:
    """Called as a whole, streamed in one pass and in two, from the cache and without, in one batch and accumulated."""
    options = {"timesteps_per_step": sampled, "beta": BETA, "guidance_scale": GUIDANCE}
    method, batch = chain_objective(variant, **options), pairs(PAIRS)
    expected, margins = oracle(method, batch, method._reference(*networks(), batch)[0])
    assert float(expected.norm()) > 1e-4 and float(margins.abs().min()) > 1e-6

    batch = pairs(PAIRS, dtype)
    reference = networks(dtype)[1]
    prompts = (batch.conditioning, batch.unconditional)
    givens: list[tuple[PairBatch, Any]] = [(batch, reference)]
    if method.method.reference_chain:
        chain = method.reference_trajectory(reference, batch.latents, *prompts)
        stored = method.reference_predictions(reference, chain, *prompts)
        cached = dataclasses.replace(batch, trajectory=chain)
        givens += [(cached, reference), (dataclasses.replace(cached, reference_pred=stored), refuse)]
    ways = [(None, None), *itertools.product((1, 2), SIZES)]
    for number, (passes, max_batch), micro in pairwise(range(len(givens)), ways, (PAIRS, 1)):
        given, network = givens[number]
        policy, results = networks(dtype)[0], []
        for part in split(given, micro):
            if passes is None:
                results.append(method(policy, network, part, seed=SEED))
                (results[-1].loss * micro / PAIRS).backward()
                continue
            terms = stream(method, policy, network, part, passes, max_batch)
            for call in range(terms.calls):
                (terms.term(call) * micro / PAIRS).backward()
            results.append(terms.result)
        where = (number, passes, max_batch, micro)
        assert policy.gradient().dtype == dtype
        assert relative(policy.gradient(), expected) < TOLERANCE[dtype], where
        assert relative(torch.cat([result.margin for result in results]), margins) < TOLERANCE[dtype], where
        loss = torch.stack([result.loss for result in results]).mean()
        assert relative(loss, torch.nn.functional.softplus(-margins).mean()) < TOLERANCE[dtype], where
        for result in results:
            assert result.policy_mse.shape == result.reference_mse.shape == (2 * micro, sampled or LEVELS)


def single_timestep(name: str, **options: Any) -> SingleTimestepObjective:
    built = build_objective(name, SCHEDULE, beta=BETA, **options)
    assert isinstance(built, SingleTimestepObjective)
    return built


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["diffusion-dpo", "inpo", "smpo"])
def test_methods_of_one_timestep(name: str, dtype: torch.dtype) -> None:
    """Forward passes of any size, batches of one shape, and accumulation."""
    inverts = name != "diffusion-dpo"
    steps = {"num_inference_steps": LEVELS} if inverts else {}
    method, batch = single_timestep(name, **steps), pairs(PAIRS)
    policy, reference = networks()
    out = method(policy, reference, batch, seed=SEED)
    assert inverts is False or len(set(out.timesteps.tolist())) == PAIRS  # ragged
    target, weight = out.target, torch.ones(PAIRS, dtype=torch.float64)
    assert target is not None
    if method.method.needs_scores:
        weight = method.method.pair_weight(batch)  # type: ignore[assignment]
    losses = []
    for pair in range(PAIRS):
        margin = torch.zeros((), dtype=torch.float64)
        for row, sign in ((pair, 1.0), (pair + PAIRS, -1.0)):
            told = {"prompt": batch.conditioning["prompt"][row : row + 1]}
            asked = (out.noisy_latents[row : row + 1], out.timesteps[row : row + 1], told)
            p, r, aim = policy(*asked)[0], reference(*asked)[0], target[row]
            margin = margin - sign * BETA / 2 * weight[pair] * ((p - aim).square() - (r - aim).square()).mean()
        losses.append(torch.nn.functional.softplus(-margin))
    torch.stack(losses).mean().backward()
    expected = policy.gradient()
    assert float(expected.norm()) > 1e-4

    given = pairs(PAIRS, dtype)
    shapes: list[dict[str, bool]] = [{}, {"static_shapes": True}] if inverts else [{}]
    modes = [(shape, size, micro) for shape in shapes for size in (1, 4, None) for micro in (PAIRS, 1)]
    for shape, max_batch, micro in modes:
        policy, reference = networks(dtype)
        for part in split(given, micro):
            method = single_timestep(name, **steps, **shape)
            parts = method.stream(policy, reference, part, seed=SEED, max_batch=max_batch)
            assert parts.calls == 1
            (parts.term(0) * micro / PAIRS).backward()
        difference = relative(policy.gradient(), expected)
        assert difference < TOLERANCE[dtype], (shape, max_batch, micro)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("variant", ["endpoint", "step"])
def test_predictions_stored_in_bf16_move_the_gradient_no_further_than_their_rounding(variant: str, passes: int) -> None:
    """A stored prediction r(1 + δ), |δ| ≤ 2⁻⁸, enters the gradient (1/B)·Σ_i u'(z_i)·∇z_i through the margins alone:
    ∇z_i holds policy and target. It moves a score by at most e = m(2|r − τ||δr| + (δr)²), a margin by (β/2)·Σ_k w_k·e,
    and u', whose slope is at most 1/4, by a quarter of that; hence |Δ∇| ≤ (1/B)·Σ_i (1/4)·(β/2)·Σ_k w_k·e_ik·|∇z_i|.
    Both gradients are taken along the stored trajectory.
    """
    method, batch = chain_objective(variant, beta=BETA), pairs(PAIRS)
    _, reference = networks()
    prompts = (batch.conditioning, batch.unconditional)
    chain = method.reference_trajectory(reference, batch.latents, *prompts).bfloat16()
    stored = method.reference_predictions(reference, chain.double(), *prompts).bfloat16()
    on_chain = dataclasses.replace(batch, trajectory=chain)

    policy = networks()[0]
    exact = method(policy, reference, on_chain, seed=SEED)
    exact.loss.backward()
    expected = policy.gradient()
    assert exact.target is not None
    moved = 2.0**-8 * exact.reference_pred.abs()
    score = (2 * (exact.reference_pred - exact.target).abs() * moved + moved**2).flatten(2).mean((1, 2))
    margin = BETA / 2 * (score[:PAIRS] + score[PAIRS:])
    per_pair = []
    for pair in range(PAIRS):
        policy = networks()[0]
        method(policy, reference, on_chain, seed=SEED).margin[pair].backward()
        per_pair.append(policy.gradient().norm())
    allowed = float((margin / 4 * torch.stack(per_pair)).sum() / PAIRS)

    cached = dataclasses.replace(on_chain, reference_pred=stored)
    for max_batch in (3, 8, None):
        policy = networks()[0]
        options = {"max_batch": max_batch, "passes": passes, "parameters": list(policy.parameters())}
        method.backward(policy, refuse, cached, seed=SEED, **options)
        difference = float((policy.gradient() - expected).norm())
        # The bound says something: it is far below the gradient. And the rounding is there: it is not zero.
        assert 1e-9 * float(expected.norm()) < difference <= allowed < 0.1 * float(expected.norm())
