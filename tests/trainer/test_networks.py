"""Policy and reference: the reference stays the base model, bit for bit, whatever happens to the policy."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastinvdpo.config.sections import LoraSection
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import adapters_disabled, merged_copy, perturb
from fastinvdpo.models.digits import DigitsModel
from fastinvdpo.trainer.networks import Networks
from tests.trainer import tiny

LORA = LoraSection(rank=2, alpha=4.0)


@pytest.fixture
def model(workspace: Path) -> DigitsModel:
    loaded = load_model("digits", workspace / "model")
    assert isinstance(loaded, DigitsModel)
    return loaded


@pytest.fixture
def inputs(model: DigitsModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.randn(3, 1, 8, 8), torch.tensor([1, 400, 900]), model.encode_prompts(["a one", "a two", ""])


def _shake(network: nn.Module) -> None:
    """Give every trainable weight another value."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_reference_is_the_base_model_bit_for_bit(model: DigitsModel, inputs: Any, lora: LoraSection | None) -> None:
    with torch.no_grad():
        base = model.predict(model.network.eval(), *inputs)
    networks = Networks(model, lora=lora, gradient_checkpointing=False)
    assert torch.equal(networks.policy(*inputs), base)  # LoRA starts at zero
    _shake(networks.policy_module)
    assert torch.equal(networks.reference(*inputs), base)
    policy = networks.policy(*inputs)
    assert policy.requires_grad
    assert not networks.reference(*inputs).requires_grad
    assert (policy - base).abs().max() > 1e-3
    assert networks.evaluations == {"with_gradient": 6, "without_gradient": 6}


def test_a_reference_in_bf16_is_the_rounded_base_model(model: DigitsModel, inputs: Any) -> None:
    with torch.no_grad():
        rounded = copy.deepcopy(model.network.eval()).to(torch.bfloat16)
        expected = model.predict(rounded, *inputs).float()
    weights = {name: value.clone() for name, value in model.network.state_dict().items()}
    networks = Networks(model, lora=None, gradient_checkpointing=False, reference_dtype=torch.bfloat16)
    assert networks.reference_module is not None
    assert {parameter.dtype for parameter in networks.reference_module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in networks.reference_module.parameters())
    reference = networks.reference(*inputs)
    assert reference.dtype == torch.float32
    assert torch.equal(reference, expected)
    for name, parameter in networks.policy_module.named_parameters():  # the policy is untouched
        assert parameter.requires_grad
        assert torch.equal(parameter, weights[name])
    _shake(networks.policy_module)
    assert torch.equal(networks.reference(*inputs), expected)


def test_adapters_are_back_after_an_exception(model: DigitsModel, inputs: Any) -> None:
    networks = Networks(model, lora=LORA, gradient_checkpointing=False)
    _shake(networks.policy_module)
    trainable = sorted(networks.trainable())
    adapted = networks.policy(*inputs).detach()
    with pytest.raises(RuntimeError, match="in the middle"), adapters_disabled(networks.policy_module):
        assert not torch.equal(networks.policy(*inputs), adapted)
        raise RuntimeError("in the middle")
    assert torch.equal(networks.policy(*inputs), adapted)
    assert sorted(networks.trainable()) == trainable
    with pytest.raises(RuntimeError):  # four channels do not fit the network
        networks.reference(torch.randn(3, 4, 8, 8), *inputs[1:])
    assert torch.equal(networks.policy(*inputs), adapted)


def test_only_adapters_are_trainable_with_lora(model: DigitsModel) -> None:
    networks = Networks(model, lora=LORA, gradient_checkpointing=False)
    names = list(networks.trainable())
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


def test_the_reference_call_keeps_the_gradient_of_an_earlier_policy_call(model: DigitsModel, inputs: Any) -> None:
    networks = Networks(model, lora=LORA, gradient_checkpointing=False)
    _shake(networks.policy_module)

    def gradient(with_reference: bool) -> list[Tensor]:
        loss = networks.policy(*inputs).square().mean()
        if with_reference:
            networks.reference(*inputs)
        return list(torch.autograd.grad(loss, list(networks.trainable().values())))

    for alone, beside in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(alone, beside)
        assert torch.isfinite(alone).all()


def test_gradient_checkpointing_needs_a_network_that_can(model: DigitsModel) -> None:
    model.network = nn.Linear(2, 2)
    with pytest.raises(InvalidInput, match=r"training\.gradient_checkpointing = True: Linear does not support it"):
        Networks(model, lora=None, gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["to_q", "to_z"], r"= 'to_z': names no module.*to_q"), (["norm1"], r"= \['norm1'\]: cannot carry adapters")],
)
def test_bad_lora_targets(model: DigitsModel, targets: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Networks(model, lora=LoraSection(target_modules=targets), gradient_checkpointing=False)


@pytest.mark.parametrize("targets", [None, ["to_q", "conv1", "proj_in"]], ids=["attention", "convolutions"])
def test_merged_copy_predicts_what_the_adapter_does(model: DigitsModel, inputs: Any, targets: list[str] | None) -> None:
    networks = Networks(model, lora=LORA.model_copy(update={"target_modules": targets}), gradient_checkpointing=False)
    _shake(networks.policy_module)
    before = {name: value.clone() for name, value in networks.policy_module.state_dict().items()}
    merged = merged_copy(networks.policy_module)
    assert merged.state_dict().keys() == tiny.unet().state_dict().keys()
    torch.testing.assert_close(model.predict(merged, *inputs), networks.policy(*inputs).detach(), rtol=1e-4, atol=1e-4)
    for name, value in networks.policy_module.state_dict().items():
        assert torch.equal(value, before[name])


def test_perturbation_has_the_size_asked_for(model: DigitsModel) -> None:
    network = model.network
    before = copy.deepcopy(network.state_dict())
    perturb(network, 0.01, seed=3)
    for name, value in network.state_dict().items():
        if value.numel() < 500:
            continue
        change = (value - before[name]).double()
        size = before[name].double().square().mean().sqrt()
        assert math.isclose(float(change.square().mean().sqrt() / size), 0.01, rel_tol=0.1)


def test_perturbation_of_lora_moves_each_layer_by_that_much(model: DigitsModel, inputs: Any) -> None:
    networks = Networks(model, lora=LoraSection(rank=8, alpha=4.0), gradient_checkpointing=False)
    perturb(networks.policy_module, 0.01, seed=3)
    merged, base = merged_copy(networks.policy_module).state_dict(), tiny.unet().state_dict()
    ratios = [
        float((merged[name] - base[name]).square().mean().sqrt() / base[name].square().mean().sqrt())
        for name in base
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    ]
    assert len(ratios) >= 8
    assert all(0.005 < ratio < 0.02 for ratio in ratios)
    assert math.isclose(sum(ratios) / len(ratios), 0.01, rel_tol=0.2)
    assert not torch.equal(networks.policy(*inputs), networks.reference(*inputs))


def test_perturbation_depends_on_the_seed_alone(workspace: Path) -> None:
    weights = []
    for seed in (1, 1, 2):
        network = load_model("digits", workspace / "model").network
        perturb(network, 0.1, seed=seed)
        weights.append(next(network.parameters()).detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
