"""Masks: each loss is that of errors scaled by the root of the mask, and what is masked out has no gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import METHODS, PairBatch, build_objective
from fastinvdpo.methods.single_timestep import SingleTimestepMethod
from tests.cases import predictions
from tests.diffusion.test_schedule import sd3
from tests.methods.problems import LEVELS, REFERENCE, SCHEDULE, pairs

PAIRS, SHAPE = 4, (4, 4, 4)
OPTIONS: dict[str, dict[str, Any]] = {
    "inpo": {"num_inference_steps": 4},
    "smpo": {"num_inference_steps": 3},
    "sdpo": {"anchor": 0.3, "sft_weight": 0.7},
    "poly-dpo": {"auto_beta": 0.2},
    "inversion-dpo": {"num_inference_steps": LEVELS, "guidance_scale": 2.0},
}
SINGLE = [name for name, method in METHODS.items() if issubclass(method, SingleTimestepMethod)]
CHAINS = [{"variant": name} for name in ("endpoint", "step", "distance")] + [{"timesteps_per_step": 2}]
CASES = [*((name, {}) for name in SINGLE), *(("inversion-dpo", chain) for chain in CHAINS)]
pytestmark = pytest.mark.filterwarnings("ignore:variant 'distance")


def a_mask() -> Tensor:
    """Of each sample, in [0, 1]; the first row and the last column count in none."""
    mask = torch.rand(2 * PAIRS, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = mask * (mask > 0.3)
    mask[:, :, 0], mask[..., -1] = 0, 0
    return mask


@pytest.mark.parametrize("name", SINGLE)
def test_a_masked_loss_is_that_of_scaled_errors(name: str) -> None:
    """Of ``τ + √k·(p − τ)`` and ``τ + √k·(r − τ)``, whose errors and products are those that the mask weighs."""
    method, root = METHODS[name](**{"beta": 20.0, **OPTIONS.get(name, {})}), a_mask().sqrt()
    assert isinstance(method, SingleTimestepMethod)
    policy, reference, target = predictions(PAIRS, SHAPE, gap=0.1)
    weight = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    found = []
    for mask in (root.square(), None):
        leaf = policy.clone().requires_grad_()
        p, r = (leaf, reference) if mask is not None else (target + root * (x - target) for x in (leaf, reference))
        result = method.loss(
            p, r if method.needs_reference else None, target, weight, mask=mask, auto_beta=method.new_auto_beta()
        )
        found.append([*vars(result).values(), *torch.autograd.grad(result.loss + result.margin.sum(), leaf)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    outside = (root == 0).expand_as(policy)
    assert not found[0][-1][outside].any() and (found[0][-1][~outside] != 0).any()


class Pixelwise:
    """A policy whose prediction at a pixel depends on a weight of that pixel."""

    def __init__(self) -> None:
        self.weight = (1 + 0.02 * torch.rand(SHAPE, dtype=torch.float64)).requires_grad_()

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return self.weight * REFERENCE(latents, timesteps, conditioning)


def masked(mask: Tensor | None) -> PairBatch:
    return dataclasses.replace(pairs(PAIRS), mask=mask)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_is_masked_out_has_no_gradient(name: str, options: dict[str, Any]) -> None:
    schedule = sd3() if name == "pnapo" else SCHEDULE
    objective = build_objective(name, schedule, **{"beta": 20.0, **OPTIONS.get(name, {}), **options})
    policy, mask = Pixelwise(), a_mask()
    out = objective(policy, REFERENCE, masked(mask), seed=3)
    (gradient,) = torch.autograd.grad(out.loss, policy.weight)
    inside = (mask > 0).any(0).expand(SHAPE)
    assert not gradient[~inside].any() and (gradient[inside] != 0).all()
    objective = build_objective(name, schedule, **{"beta": 20.0, **OPTIONS.get(name, {}), **options})
    streamed = objective.backward(policy, REFERENCE, masked(mask), seed=3, max_batch=3, parameters=[policy.weight])
    torch.testing.assert_close(policy.weight.grad, gradient, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(streamed.loss, out.loss)


@pytest.mark.parametrize("name", ["diffusion-dpo", "inversion-dpo"])
def test_masks_that_mean_nothing_are_refused(name: str) -> None:
    released = build_objective(name, SCHEDULE, compat="released")
    with pytest.raises(InvalidInput, match=r"compat = 'released': reproduces code that has no masks"):
        released(Pixelwise(), REFERENCE, masked(a_mask()), seed=0)
    with pytest.raises(InvalidInput, match=r"batch\.mask\.shape = \(4, 1, 4, 4\)"):
        build_objective(name, SCHEDULE)(Pixelwise(), REFERENCE, masked(a_mask()[:PAIRS]), seed=0)
