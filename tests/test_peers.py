"""The released steps of ``benchmarks/peers`` against the recorded runs of the released codes.

Bounds are those of tests/golden/README.md, as in ``test_conformance.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers.common import scaled_linear
from tests.cases import load_golden
from tests.methods.test_conformance import RUNS, conditioning, network, relative, scheduler_config, unet

PEERS = [name for name in RUNS if not name.endswith("d020")]  # the peers follow today's diffusers


@pytest.mark.parametrize("name", PEERS)
def test_loss_and_gradient_of_the_released_codes(name: str) -> None:
    tensors, settings = load_golden(name)
    method, bound = RUNS[name]
    family = "sdxl" if method == "inversion-dpo" else "sd15"
    policy, reference = (unet(family, role, torch.float64) for role in ("policy", "ref"))
    policy.zero_grad()
    told, config = conditioning(tensors, torch.float64), scheduler_config(settings)
    pairs = tensors["in.latents_win"].shape[0]
    noise = tensors.get("in.eta_noise")
    if method == "diffusion-dpo":
        noise = tensors["in.noise"][:pairs]
    inputs = peers.Inputs(
        torch.cat([tensors["in.latents_win"], tensors["in.latents_lose"]]).double(),
        told,
        {key: value if key == "time_ids" else torch.zeros_like(value) for key, value in told.items()},
        tensors["in.timesteps"][:pairs] if "in.timesteps" in tensors else None,
        None if noise is None else noise.double(),
        tensors["in.probs"].double() if "in.probs" in tensors else None,
    )
    options = {
        "num_inference_steps": settings.get("ninv") or settings.get("num_inference_steps"),
        "guidance_scale": settings.get("guidance_scale"),
    }
    options = {key: value for key, value in options.items() if value is not None}
    released = peers.Settings(scaled_linear(), settings["beta_dpo"], config.get("steps_offset", 0), **options)
    calls: list[tuple[bool, int]] = []

    def counted(inner):
        def call(latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
            calls.append((torch.is_grad_enabled(), latents.shape[0]))
            return inner(latents, timesteps, conditioning)

        return call

    loss = peers.STEPS[method](counted(network(policy)), counted(network(reference)), inputs, released)
    ours, recorded = [], []
    for key, parameter in policy.named_parameters():
        expected = tensors.get(f"grad.{key}")
        if parameter.grad is None:
            assert expected is None or not expected.any(), key
            continue
        ours.append(parameter.grad.flatten().double())
        recorded.append(expected.flatten().double())
    assert len(ours) >= settings["grad_tensors"] - 5
    assert relative(loss, tensors["out.loss"].squeeze()) < bound
    assert relative(torch.cat(ours), torch.cat(recorded)) < bound
    # As many calls, of as many samples, as were recorded.
    with_gradient = sum(gradient for gradient, _ in calls)
    assert {samples for _, samples in calls} == {settings["call_batch"]}
    if "policy_calls_grad" in settings:
        assert with_gradient == settings["policy_calls_grad"]
        assert len(calls) - with_gradient == settings["policy_calls_nograd"] + settings["ref_calls"]
    else:
        assert (with_gradient, len(calls) - with_gradient) == (settings["policy_calls"], settings["ref_calls"])
