"""Policy and reference: none, one that stays the base model bit for bit, or one that follows the policy."""

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
from fastinvdpo.methods import Follows
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import adapters_disabled, merged_copy, perturb
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.trainer import PreferenceTrainer, TrainConfig, precompute, train
from fastinvdpo.trainer.dry_run import count_evaluations
from fastinvdpo.trainer.networks import MovingReference, Networks
from fastinvdpo.trainer.opening import open_dataset, open_model
from tests.trainer import tiny

LORA = LoraSection(rank=2, alpha=4.0)
full_and_lora = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture
def model(workspace: Path) -> StableDiffusionModel:
    loaded = load_model("stable-diffusion", workspace / "model")
    assert isinstance(loaded, StableDiffusionModel)
    return loaded


@pytest.fixture
def inputs(model: StableDiffusionModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.randn(3, 4, 8, 8), torch.tensor([1, 400, 900]), model.encode_prompts(["a one", "a two", ""])


def _shake(network: nn.Module) -> None:
    """Give every trainable weight another value."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@full_and_lora
def test_reference_is_the_base_model_bit_for_bit(
    model: StableDiffusionModel, inputs: Any, lora: LoraSection | None
) -> None:
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
    adapters = [".lora_A." in name or ".lora_B." in name for name in networks.trainable()]
    assert adapters and all(adapters) == any(adapters) == (lora is not None)


def test_a_reference_in_bf16_is_the_rounded_base_model(model: StableDiffusionModel, inputs: Any) -> None:
    with torch.no_grad():
        rounded = copy.deepcopy(model.network.eval()).to(torch.bfloat16)
        expected = model.predict(rounded, *inputs).float()
    weights = {name: value.clone() for name, value in model.network.state_dict().items()}
    networks = Networks(model, lora=None, gradient_checkpointing=False, reference_dtype=torch.bfloat16)
    assert networks.reference_module is not None
    kinds = {(parameter.dtype, parameter.requires_grad) for parameter in networks.reference_module.parameters()}
    assert kinds == {(torch.bfloat16, False)}
    reference = networks.reference(*inputs)
    assert reference.dtype == torch.float32
    assert torch.equal(reference, expected)
    for name, parameter in networks.policy_module.named_parameters():  # the policy is untouched
        assert parameter.requires_grad
        assert torch.equal(parameter, weights[name])
    _shake(networks.policy_module)
    assert torch.equal(networks.reference(*inputs), expected)


def test_adapters_are_back_after_an_exception(model: StableDiffusionModel, inputs: Any) -> None:
    networks = Networks(model, lora=LORA, gradient_checkpointing=False)
    _shake(networks.policy_module)
    trainable = sorted(networks.trainable())
    adapted = networks.policy(*inputs).detach()
    with pytest.raises(RuntimeError, match="in the middle"), adapters_disabled(networks.policy_module):
        assert not torch.equal(networks.policy(*inputs), adapted)
        raise RuntimeError("in the middle")
    assert torch.equal(networks.policy(*inputs), adapted)
    assert sorted(networks.trainable()) == trainable
    with pytest.raises(RuntimeError):  # three channels do not fit the network
        networks.reference(torch.randn(3, 3, 8, 8), *inputs[1:])
    assert torch.equal(networks.policy(*inputs), adapted)


def test_the_reference_call_keeps_the_gradient_of_an_earlier_policy_call(
    model: StableDiffusionModel, inputs: Any
) -> None:
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


def test_gradient_checkpointing_needs_a_network_that_can(model: StableDiffusionModel) -> None:
    model.network = nn.Linear(2, 2)
    with pytest.raises(InvalidInput, match=r"training\.gradient_checkpointing = True: Linear does not support it"):
        Networks(model, lora=None, gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["to_q", "to_z"], r"= 'to_z': names no module.*to_q"), (["norm1"], r"= \['norm1'\]: cannot carry adapters")],
)
def test_bad_lora_targets(model: StableDiffusionModel, targets: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Networks(model, lora=LoraSection(target_modules=targets), gradient_checkpointing=False)


@pytest.mark.parametrize("targets", [None, ["to_q", "conv1", "proj_in"]], ids=["attention", "convolutions"])
def test_merged_copy_predicts_what_the_adapter_does(
    model: StableDiffusionModel, inputs: Any, targets: list[str] | None
) -> None:
    networks = Networks(model, lora=LORA.model_copy(update={"target_modules": targets}), gradient_checkpointing=False)
    _shake(networks.policy_module)
    before = {name: value.clone() for name, value in networks.policy_module.state_dict().items()}
    merged = merged_copy(networks.policy_module)
    assert merged.state_dict().keys() == tiny.unet().state_dict().keys()
    torch.testing.assert_close(model.predict(merged, *inputs), networks.policy(*inputs).detach(), rtol=1e-4, atol=1e-4)
    for name, value in networks.policy_module.state_dict().items():
        assert torch.equal(value, before[name])


def test_perturbation_has_its_size_and_depends_on_the_seed_alone(workspace: Path) -> None:
    before, weights = tiny.unet().state_dict(), []
    for seed in (1, 1, 2):
        network = load_model("stable-diffusion", workspace / "model").network
        perturb(network, 0.01, seed=seed)
        weights.append(network.state_dict())
    tiny.assert_same(weights[0], weights[1])
    for name, value in weights[0].items():
        if value.numel() >= 500:
            change, size = (value - before[name]).double(), before[name].double().square().mean().sqrt()
            assert not torch.equal(value, weights[2][name])
            assert math.isclose(float(change.square().mean().sqrt() / size), 0.01, rel_tol=0.1)


def test_perturbation_of_lora_moves_each_layer_by_that_much(model: StableDiffusionModel, inputs: Any) -> None:
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


# A reference that follows the policy


MOVING = {"name": "linear-dpo", "beta": 500.0, "reference": "ema", "reference_decay": 0.5}


def config(root: Path, method: dict[str, Any], lora: LoraSection | None = None, **sections: Any) -> TrainConfig:
    values = tiny.mapping(root, model={"lora": lora and lora.model_dump()}, **sections)
    return TrainConfig.from_mapping({**values, "method": method})


@full_and_lora
def test_the_reference_is_the_average_of_the_weights_after_every_step(
    workspace: Path, lora: LoraSection | None
) -> None:
    each = {"checkpoint_every": 1, "keep_checkpoints": 9}
    method = {**MOVING, "reference_every": 2}
    train(config(workspace, method, lora, training={"steps": 4}, output=each), progress=False)
    first = tiny.stored(workspace / "run", 1)
    average = first.reference  # what training starts from
    assert average is not None
    if lora is None:
        base = dict(load_model("stable-diffusion", workspace / "model").network.named_parameters())
        assert all(torch.equal(base[name], value) for name, value in average.items())
    for step in range(2, 5):
        now = tiny.stored(workspace / "run", step)
        assert now.reference is not None
        if step % 2 == 0:
            average = {name: torch.lerp(value, now.trainable[name], 0.5) for name, value in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(now.reference[name], value, rtol=1e-6, atol=1e-8)


def _moved(model: StableDiffusionModel, lora: LoraSection | None, follows: Follows) -> tuple[Networks, MovingReference]:
    networks = Networks(model, lora=lora, gradient_checkpointing=False, reference="moving")
    moving = MovingReference(networks, follows)
    _shake(networks.policy_module)
    return networks, moving


@full_and_lora
def test_a_moving_reference_predicts_with_its_own_weights(
    model: StableDiffusionModel, inputs: Any, lora: LoraSection | None
) -> None:
    networks, moving = _moved(model, lora, Follows(0.0, 2))
    alone = torch.autograd.grad(networks.policy(*inputs).square().mean(), list(networks.trainable().values()))
    policy = networks.policy(*inputs)
    moving.update()
    start = networks.reference(*inputs)
    assert (start - policy).abs().max() > 1e-3
    assert not start.requires_grad
    # A call of the reference leaves the graph of the policy as it was.
    tiny.assert_same(alone, torch.autograd.grad(policy.square().mean(), list(networks.trainable().values())))
    moving.update()
    with torch.no_grad():
        assert torch.equal(networks.reference(*inputs), networks.policy(*inputs))


@full_and_lora
def test_the_average_of_weights_in_half_precision_is_float32(
    model: StableDiffusionModel, inputs: Any, lora: LoraSection | None
) -> None:
    model.network.to(torch.bfloat16)
    networks, moving = _moved(model, lora, Follows(0.999, 1))
    start = {name: average.clone() for name, average in moving.averages.items()}
    for _ in range(50):
        moving.update()
    weights = networks.reference_adapters or dict(networks.reference_module.named_parameters())  # type: ignore[union-attr]
    for name, average in moving.averages.items():
        assert average.dtype == torch.float32
        policy = networks.trainable()[name].detach().float()
        torch.testing.assert_close(average - policy, 0.999**50 * (start[name] - policy), rtol=1e-3, atol=1e-5)
        assert torch.equal(weights[name], average.to(weights[name].dtype))
    assert networks.reference(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16


# No reference


@full_and_lora
def test_a_method_without_a_reference_keeps_and_evaluates_none(
    workspace: Path, lora: LoraSection | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(workspace, {"name": "mapo", "beta": 0.1}, lora, training={"steps": 2})
    trainer = PreferenceTrainer(open_model(run), run.method, open_dataset(run), run, progress=False)

    monkeypatch.setattr(Networks, "reference", lambda *arguments: pytest.fail("a prediction of a reference"))
    result = trainer.train()
    networks = trainer.state.networks
    assert networks.reference_module is None and not networks.reference_adapters
    assert networks.evaluations == {"with_gradient": 8, "without_gradient": 0}
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="keeps none"):
        networks.reference(torch.zeros(1, 4, 8, 8), torch.tensor([1]), {})
    assert result.network_evaluations == 8
    counted = count_evaluations(run)
    assert (counted.with_gradient, counted.without_gradient) == (2, 0)


def test_predictions_stored_for_another_method_do_not_take_the_place_of_the_reference(workspace: Path) -> None:
    chain = tiny.config(workspace, "inversion-dpo", cache={"path": str(workspace / "cache")})
    cache = precompute(chain, progress=False)
    assert cache.has_reference
    for folder, pairs in (("cached", cache), ("plain", None)):
        output = {"directory": str(workspace / folder)}
        run = config(workspace, {**MOVING, "reference_decay": 0.9}, training={"steps": 2}, output=output)
        tiny.train_model(run, open_model(run), pairs or open_dataset(run))
    tiny.assert_same(tiny.weights(workspace / "cached"), tiny.weights(workspace / "plain"))
