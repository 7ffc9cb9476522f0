"""Which reference a method has in training: none, a frozen one, or one that follows the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinvdpo.config.sections import LoraSection
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import Follows
from fastinvdpo.models import load_model
from fastinvdpo.models.digits import DigitsModel
from fastinvdpo.trainer import PreferenceTrainer, TrainConfig, train
from fastinvdpo.trainer.averages import MovingReference
from fastinvdpo.trainer.cache_writing import precompute
from fastinvdpo.trainer.checkpoint import Checkpoint, load_checkpoint
from fastinvdpo.trainer.dry_run import count_evaluations
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.opening import open_dataset, open_model
from tests.trainer import tiny
from tests.trainer.test_resume import _assert_same as assert_same

MOVING = {"name": "linear-dpo", "beta": 500.0, "reference": "ema", "reference_decay": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "mapo": {"name": "mapo", "beta": 0.1},
    "linear-dpo": {**MOVING, "reference_every": 3},
    "alpha-dpo": {"name": "alpha-dpo", "beta": 500.0, "dynamic": True},
    "auto-beta": {"name": "inpo", "beta": 1e6, "num_inference_steps": 3, "auto_beta": 0.2},
}
LORA = {"rank": 2, "alpha": 2.0}


def config(root: Path, method: dict[str, Any], lora: dict[str, Any] | None = None, **sections: Any) -> TrainConfig:
    values = tiny.mapping(root, model={"lora": lora}, **sections)
    return TrainConfig.from_mapping({**values, "method": method})


def stored(directory: Path, step: int) -> Checkpoint:
    return load_checkpoint(directory / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_trains_and_resumes_bit_for_bit(workspace: Path, name: str, lora: dict[str, Any] | None) -> None:
    """An average every three steps is due between the checkpoint and the end, and not at either."""
    settings, ends = SETTINGS[name], []
    for folder, resume in (("whole", "never"), ("resumed", workspace / "whole" / "checkpoints" / "step-00000002")):
        directory = workspace / folder
        run = config(workspace, settings, lora, training={"steps": 4}, output={"directory": str(directory)})
        train(run, resume=resume, progress=False)
        ends.append(stored(directory, 4))
    for part in ("trainable", "reference", "state"):
        assert_same(getattr(ends[0], part), getattr(ends[1], part))
    before = stored(workspace / "whole", 2)
    assert any(not torch.equal(before.trainable[key], value) for key, value in ends[0].trainable.items())
    assert (ends[0].reference is not None) == ("reference" in settings)
    if before.reference is not None and ends[0].reference is not None:
        assert any(not torch.equal(before.reference[key], value) for key, value in ends[0].reference.items())
    if "auto_beta" in settings:
        row = json.loads((workspace / "whole" / "history.jsonl").read_text().splitlines()[-1])
        assert 1e3 < row["beta"] < 1e6


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_reference_is_the_average_of_the_weights_after_every_step(
    workspace: Path, lora: dict[str, Any] | None
) -> None:
    each = {"checkpoint_every": 1, "keep_checkpoints": 9}
    method = {**MOVING, "reference_every": 2}
    train(config(workspace, method, lora, training={"steps": 4}, output=each), progress=False)
    first = stored(workspace / "run", 1)
    average = first.reference  # what training starts from
    assert average is not None
    if lora is None:
        base = dict(load_model("digits", workspace / "model").network.named_parameters())
        assert all(torch.equal(base[name], value) for name, value in average.items())
    for step in range(2, 5):
        now = stored(workspace / "run", step)
        assert now.reference is not None
        if step % 2 == 0:
            average = {name: torch.lerp(value, now.trainable[name], 0.5) for name, value in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(now.reference[name], value, rtol=1e-6, atol=1e-8)


@pytest.fixture
def model(workspace: Path) -> DigitsModel:
    loaded = load_model("digits", workspace / "model")
    assert isinstance(loaded, DigitsModel)
    return loaded


def _moved(model: DigitsModel, lora: LoraSection | None, follows: Follows) -> tuple[Networks, MovingReference]:
    networks = Networks(model, lora=lora, gradient_checkpointing=False, reference="moving")
    moving = MovingReference(networks, follows)
    with torch.no_grad():
        for parameter in networks.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return networks, moving


def _inputs(model: DigitsModel, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.randn(2, 1, 8, 8, dtype=dtype), torch.tensor([1, 900]), model.encode_prompts(["a one", "a two"])


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2, alpha=4.0)], ids=["full", "lora"])
def test_a_moving_reference_predicts_with_its_own_weights(model: DigitsModel, lora: LoraSection | None) -> None:
    networks, moving = _moved(model, lora, Follows(0.0, 2))
    inputs = _inputs(model)
    policy = networks.policy(*inputs)
    alone = torch.autograd.grad(policy.square().mean(), list(networks.trainable().values()))
    policy = networks.policy(*inputs)
    moving.update()
    start = networks.reference(*inputs)
    assert (start - policy).abs().max() > 1e-3
    assert not start.requires_grad
    for one, other in zip(
        alone, torch.autograd.grad(policy.square().mean(), list(networks.trainable().values())), strict=True
    ):
        assert torch.equal(one, other)  # a call of the reference leaves the graph of the policy as it was
    moving.update()
    with torch.no_grad():
        assert torch.equal(networks.reference(*inputs), networks.policy(*inputs))


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2, alpha=4.0)], ids=["full", "lora"])
def test_the_average_of_weights_in_half_precision_is_float32(model: DigitsModel, lora: LoraSection | None) -> None:
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
    assert networks.reference(*_inputs(model, torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"reference_dtype": "bf16"}, r"model.reference_dtype = 'bf16': stands still"),
        ({"reference_quantization": "int8"}, r"model.reference_quantization = 'int8': stands still"),
    ],
)
def test_a_rounded_reference_cannot_follow(workspace: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        TrainConfig.from_mapping({**tiny.mapping(workspace, model=section), "method": MOVING})


# No reference


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_method_without_a_reference_keeps_and_evaluates_none(
    workspace: Path, lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(workspace, SETTINGS["mapo"], lora, training={"steps": 2})
    trainer = PreferenceTrainer(open_model(run), run.method, open_dataset(run), run, progress=False)

    def never(*arguments: Any) -> None:
        raise AssertionError("a reference was asked")

    monkeypatch.setattr(Networks, "reference", never)
    result = trainer.train()
    networks = trainer.state.networks
    assert networks.reference_module is None and not networks.reference_adapters
    assert networks.evaluations == {"with_gradient": 8, "without_gradient": 0}
    assert result.network_evaluations == 8
    counted = count_evaluations(run)
    assert (counted.with_gradient, counted.without_gradient) == (2, 0)


@pytest.mark.parametrize("section", [{"reference_dtype": "fp32"}, {"reference_quantization": "nf4"}])
def test_settings_of_a_reference_that_is_not_there_are_refused(workspace: Path, section: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="has no meaning with method mapo"):
        TrainConfig.from_mapping({**tiny.mapping(workspace, model=section), "method": SETTINGS["mapo"]})


def test_predictions_stored_for_another_method_do_not_take_the_place_of_the_reference(workspace: Path) -> None:
    chain = tiny.config(workspace, "inversion-dpo", cache={"path": str(workspace / "cache")})
    cache = precompute(chain, progress=False)
    assert cache.has_reference
    for folder, pairs in (("cached", cache), ("plain", None)):
        output = {"directory": str(workspace / folder)}
        run = config(workspace, {**MOVING, "reference_decay": 0.9}, training={"steps": 2}, output=output)
        tiny.train_model(run, open_model(run), pairs or open_dataset(run))
    assert_same(tiny.weights(workspace / "cached"), tiny.weights(workspace / "plain"))
