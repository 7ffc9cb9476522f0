"""The streamed gradient of a whole chain, in fewer bytes: utilities, precision, cost. Its modes: test_gradients.py."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import InversionDPO, PairBatch
from fastinvdpo.ops.preference_loss import UTILITIES
from tests.cases import sd_schedule
from tests.methods.problems import LEVELS, SCHEDULE, Small, chain_objective, networks, pairs, relative

pytestmark = pytest.mark.filterwarnings("ignore:variant 'distance")
PAIRS, GUIDED = 3, 2


@pytest.mark.parametrize(
    ("utility", "prediction_type"), [*((u, "epsilon") for u in UTILITIES), ("ipo", "v_prediction"), ("cdpo", "sample")]
)
def test_every_utility(utility: str, prediction_type: str) -> None:
    smoothing = 0.1 if UTILITIES[utility].smoothed else 0.0
    method = chain_objective(utility=utility, label_smoothing=smoothing, guidance_scale=1.0, beta=2.0)
    method = dataclasses.replace(method, schedule=sd_schedule(prediction_type=prediction_type))
    policy, reference = networks()
    output = method(policy, reference, pairs(PAIRS), seed=3)
    output.loss.backward()
    expected = policy.gradient()
    assert float(expected.norm()) > 1e-4
    for passes in (1, 2):
        policy, trained = networks()[0], {"passes": passes}
        trained["parameters"] = list(policy.parameters())  # type: ignore[assignment]
        result = method.backward(policy, reference, pairs(PAIRS), seed=3, max_batch=3, **trained)
        assert relative(policy.gradient(), expected) < 1e-9
        for name in ("loss", "margin", "policy_mse", "reference_mse"):
            ours = getattr(result, name)
            torch.testing.assert_close(ours, getattr(output, name).detach(), rtol=1e-9, atol=1e-12)
            assert not ours.requires_grad


@pytest.mark.parametrize("passes", [1, 2])
def test_a_prediction_may_have_less_precision_than_the_latents(passes: int) -> None:
    method, batch = chain_objective(), pairs(PAIRS, torch.float32)

    def rounded(network: Small) -> Any:
        return lambda latents, times, told: network(latents, times, told).bfloat16()

    policy, reference = networks(torch.float32)
    output = method(rounded(policy), reference, batch, seed=3)
    output.loss.backward()
    expected = policy.gradient()
    policy, reference = networks(torch.float32)
    trained = list(policy.parameters())
    options = {"max_batch": 4, "passes": passes, "parameters": trained}
    result = method.backward(rounded(policy), reference, batch, seed=3, **options)
    torch.testing.assert_close(result.margin, output.margin.detach(), rtol=1e-4, atol=1e-5)
    assert relative(policy.gradient(), expected) < 0.01  # gradients pass through bfloat16: 2⁻⁸ each, times the slope


def test_unused_parameters_keep_their_gradient() -> None:
    method, batch = chain_objective(), pairs(PAIRS)
    policy, reference = networks()
    idle, with_one = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with_one.grad = torch.ones(2)
    trained = [*policy.parameters(), idle, with_one]
    method.backward(policy, reference, batch, seed=3, max_batch=2, passes=1, parameters=trained)
    assert idle.grad is None and with_one.grad.tolist() == [1, 1]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("variant", ["endpoint", "cached endpoint", "distance-policy"])
def test_forward_passes_are_no_larger_than_asked_and_no_more_than_needed(variant: str, passes: int) -> None:
    cached, variant = variant.startswith("cached"), variant.removeprefix("cached ")
    method, inverting, batch = chain_objective(variant), 1 if variant == "distance-policy" else 0, pairs(PAIRS)
    if cached:
        prompts = (batch.conditioning, batch.unconditional)
        chain = method.reference_trajectory(networks()[1], batch.latents, *prompts)
        batch = dataclasses.replace(batch, trajectory=chain)
    everything = PAIRS * LEVELS * 2 * GUIDED
    for max_batch in (1, 2, 6, 8, 19, 20, 45, 60, None):
        policy, reference = networks()
        options = {"max_batch": max_batch, "passes": passes, "parameters": list(policy.parameters())}
        method.backward(policy, reference, batch, seed=3, **options)
        assert max(samples for _, samples in policy.calls + reference.calls) <= (max_batch or everything)
        assert policy.evaluations(True) == everything
        whole_pairs = max_batch is None or max_batch >= 2 * LEVELS * GUIDED
        first_pass = 0 if passes == 1 or whole_pairs else everything
        assert policy.evaluations(False) == first_pass + inverting * everything
        assert reference.evaluations(False) == everything * (1 + (not inverting and not cached))
        calls = [samples for gradient, samples in policy.calls if gradient]
        if max_batch in (8, None):
            assert len(calls) == {None: 1, 8: 9 if passes == 1 else 8}[max_batch]


def test_policy_equal_to_reference_gives_ln_2_to_the_last_bit() -> None:
    policy, reference = Small(0), Small(0).requires_grad_(False)
    for passes in (1, 2):
        options = {"max_batch": 4, "passes": passes, "parameters": list(policy.parameters())}
        result = chain_objective().backward(policy, reference, pairs(PAIRS), seed=0, **options)
        assert float(result.loss) == math.log(2) and not result.margin.any()


class Live:
    """Bytes that autograd holds for backward passes, now and at most. A tensor saved twice counts once."""

    def __init__(self, network: nn.Module) -> None:
        self.peak, self._held, self._bytes = 0, {}, 0
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._weights:
            return tensor
        self._bytes += 0 if self._held.get(key) else storage.nbytes()
        self._held[key] = self._held.get(key, 0) + 1
        self.peak = max(self.peak, self._bytes)
        holder = _Holder(tensor)
        weakref.finalize(holder, self._drop, key, storage.nbytes())
        return holder

    def unpack(self, packed: Any) -> Tensor:
        return packed.tensor if isinstance(packed, _Holder) else packed

    def _drop(self, key: int, size: int) -> None:
        self._held[key] -= 1
        self._bytes -= 0 if self._held[key] else size


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(levels: int, **options: Any) -> int:
    method, batch = chain_objective(num_inference_steps=levels), pairs(1)
    policy, reference = networks()
    live = Live(policy)
    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
        if options:
            method.backward(policy, reference, batch, seed=3, parameters=list(policy.parameters()), **options)
        else:
            method(policy, reference, batch, seed=3).loss.backward()
    assert live.peak > 0
    return live.peak


@pytest.mark.parametrize(("max_batch", "passes"), [(2, 1), (8, 2)])
def test_saved_activations_do_not_grow_with_the_trajectory(max_batch: int, passes: int) -> None:
    short, long = (saved_bytes(levels, max_batch=max_batch, passes=passes) for levels in (20, 80))
    assert long < 1.1 * short
    # The control: the whole graph grows with it, and is that many times larger.
    whole = saved_bytes(20)
    assert saved_bytes(80) > 3.5 * whole
    # (Not quite: a streamed term also keeps a copy of its prediction, which next to this network is not small.)
    assert whole > 0.7 * (2 * 20 * GUIDED / max_batch) * short


def test_a_sampled_loss_is_biased_and_its_margin_is_not() -> None:
    """What the docs say of timesteps_per_step: by about u''(z)·Var/2, upwards."""
    method = InversionDPO(beta=300.0, num_inference_steps=6, guidance_scale=1.0).objective(SCHEDULE)
    policy, reference = networks()
    one = pairs(1)
    draws = 1500
    many = PairBatch(
        latents=one.latents.repeat_interleave(draws, 0),
        conditioning={"prompt": one.conditioning["prompt"].repeat_interleave(draws)},
        sample_index=torch.arange(draws),
    )
    with torch.no_grad():
        full = method(policy, reference, one, seed=0)
        sampled = dataclasses.replace(method.method, timesteps_per_step=1).objective(SCHEDULE)(
            policy, reference, many, seed=0
        )
    z, margins = float(full.margin), sampled.margin
    assert abs(float(margins.mean()) - z) < 4 * float(margins.std()) / math.sqrt(draws)
    losses = torch.nn.functional.softplus(-margins)
    bias, error = float(losses.mean() - full.loss), float(losses.std()) / math.sqrt(draws)
    curvature = math.exp(-z) / (1 + math.exp(-z)) ** 2
    assert bias > 4 * error
    assert bias == pytest.approx(curvature * float(margins.var()) / 2, rel=0.5)


def test_a_margin_that_is_not_finite_reaches_the_gradient() -> None:
    """Where hinge is flat its slope is zero, and would hide an infinite margin."""
    method, batch = chain_objective(utility="hinge"), pairs(1)
    for passes in (1, 2):
        policy, reference = networks()

        def broken(latents: Tensor, timesteps: Tensor, conditioning: Any, inner: Small = reference) -> Tensor:
            prediction = inner(latents, timesteps, conditioning)
            return torch.where((timesteps == 201).view(-1, 1, 1, 1), math.inf, prediction)

        cached = dataclasses.replace(batch, trajectory=torch.zeros(2, LEVELS, 4, 4, 4, dtype=torch.float64))
        trained = list(policy.parameters())
        result = method.backward(policy, broken, cached, seed=3, max_batch=2, passes=passes, parameters=trained)
        assert not torch.isfinite(result.margin).any()
        assert not torch.isfinite(policy.gradient()).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch = 0"),
        ({"max_batch": True}, "max_batch = True"),
        ({"max_batch": 2.0}, "max_batch = 2.0"),
        ({"passes": 3}, "passes = 3"),
        ({"passes": 1, "max_batch": 2}, "parameters = .*one pass scales their gradients"),
    ],
)
def test_bad_inputs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        chain_objective().stream(*networks(), pairs(PAIRS), seed=0, **options)
    assert "Remedy: " in str(caught.value)
