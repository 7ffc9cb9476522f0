"""Draws whose reference predictions are stored: the loss and gradient of the same draws, without the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastinvdpo.methods import METHODS, PairBatch, SingleTimestepObjective, build_objective
from tests.diffusion.test_schedule import sd3
from tests.methods import problems

REFERENCE_INVERTS = {"inverter": "reference", "num_inference_steps": 4}
METHODS_AND_OPTIONS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "diffusion-dpo": ("diffusion-dpo", {"timesteps": {"range": [100, 899]}}, problems.SCHEDULE),
    "flow": ("diffusion-dpo", {}, sd3()),
    "released": ("diffusion-dpo", {"compat": "released"}, problems.SCHEDULE),
    "anchored": ("diffusion-dpo", {"anchor": 0.5, "sft_weight": 0.1}, problems.SCHEDULE),
    "inpo": ("inpo", REFERENCE_INVERTS, problems.SCHEDULE),
    "inpo-flow": ("inpo", REFERENCE_INVERTS, sd3()),
    "pnapo": ("pnapo", {}, sd3()),
    "smpo": ("smpo", REFERENCE_INVERTS, problems.SCHEDULE),
    **{name: (name, {}, problems.SCHEDULE) for name in ("sdpo", "dmpo", "dspo", "alpha-dpo", "poly-dpo", "snpo")},
    "linear-dpo": ("linear-dpo", {}, problems.SCHEDULE),
}


def refuse(*arguments: Any) -> Any:
    raise AssertionError("the reference made a forward pass")


def build(name: str) -> SingleTimestepObjective:
    method, options, schedule = METHODS_AND_OPTIONS[name]
    objective = build_objective(method, schedule, **options)
    assert isinstance(objective, SingleTimestepObjective)
    return objective


def stored_batch(objective: SingleTimestepObjective, reference: Any, dtype: torch.dtype) -> tuple[PairBatch, PairBatch]:
    """A batch of four draws, with what a cache stores of them as ``dtype`` and without, at other sample indices."""
    keyed = dataclasses.replace(problems.pairs(), sample_index=torch.tensor([9, 4, 2**40, 7]))
    stored = objective.store_draws(reference, keyed, seed=3, dtype=dtype)
    assert stored.reference_pred is not None and stored.reference_pred.dtype == dtype
    assert (stored.trajectory is not None) == objective.method.policy_inverts
    return dataclasses.replace(stored, sample_index=problems.pairs().sample_index), keyed


@pytest.mark.parametrize("name", METHODS_AND_OPTIONS)
def test_loss_and_gradient_from_stored_draws_are_those_of_the_draws_bit_for_bit(name: str) -> None:
    """Two evaluations with gradient a pair, and none without."""
    objective, (policy, reference) = build(name), problems.networks()
    stored, plain = stored_batch(objective, reference, torch.float64)
    expected = objective(policy, reference, plain, seed=3)
    expected.loss.backward()
    gradient = policy.gradient().clone()
    policy.zero_grad()
    policy.calls.clear()
    result = objective.backward(policy, refuse, stored, seed=3)
    assert torch.equal(result.loss, expected.loss) and torch.equal(result.margin, expected.margin)
    assert torch.equal(policy.gradient(), gradient) and float(gradient.abs().max()) > 0
    assert (policy.evaluations(True), policy.evaluations(False)) == (2 * 4, 0)
    # The sample index of a batch keys nothing once its draws are stored.
    other = dataclasses.replace(stored, sample_index=stored.sample_index + 1)
    assert torch.equal(objective(policy, refuse, other, seed=3).loss, expected.loss)


@pytest.mark.parametrize("name", ["diffusion-dpo", "inpo"])
def test_what_is_rounded_is_rounded_before_the_reference_predicts(name: str) -> None:
    """Noisy latents in bfloat16 move policy, reference and target alike; only the prediction's rounding is left."""
    objective, (policy, reference) = build(name), problems.networks()
    stored, _ = stored_batch(objective, reference, torch.bfloat16)
    with torch.no_grad():
        rounded = objective(policy, refuse, stored, seed=3)
        exact = objective(policy, reference, dataclasses.replace(stored, reference_pred=None), seed=3)
    assert torch.equal(rounded.noisy_latents, exact.noisy_latents) and torch.equal(rounded.policy_mse, exact.policy_mse)
    error = (rounded.reference_pred - exact.reference_pred).abs()
    assert (error <= 2.0**-8 * exact.reference_pred.abs()).all() and float(error.max()) > 0


def test_methods_say_what_their_stored_draws_depend_on() -> None:
    """None where the policy, or a reference that moves, has a part in them."""
    found = {name: method().reference_draws for name, method in METHODS.items()}
    assert {name for name, options in found.items() if options is None} == {
        "inpo",
        "smpo",
        "inversion-dpo",
        "mapo",
        "kto",
    }
    assert METHODS["linear-dpo"](reference="ema").reference_draws is None  # type: ignore[call-arg]
    shared = {"timesteps.range", "timesteps.values", "timesteps.density", "timesteps.logit_mean"}
    shared |= {"timesteps.logit_std", "compat"}
    assert set(found["diffusion-dpo"] or ()) == shared
    # One store serves all losses on the same noising.
    assert all(found[name] == found["diffusion-dpo"] for name in ("sdpo", "dmpo", "dspo", "alpha-dpo", "linear-dpo"))
    assert set(found["snpo"] or ()) == shared | {"swap_probability"}
    inverting = shared | {"name", "num_inference_steps", "model_time"}
    for name, own in (("inpo", "eta"), ("smpo", "renoise_iterations")):
        options = METHODS[name](inverter="reference").reference_draws  # type: ignore[call-arg]
        assert set(options or ()) == inverting | {own}
