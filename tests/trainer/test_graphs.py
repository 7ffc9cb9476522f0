"""Replayed calls, with a recorder that runs the function again where a GPU would replay its kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastinvdpo.config.sections import LoraSection
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import adapters_disabled
from fastinvdpo.trainer import performance
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.performance import GraphedCalls

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


@pytest.fixture
def recorded() -> list[Tensor]:
    """Outputs of the recordings so far."""
    return []


@pytest.fixture
def record(recorded: list[Tensor]) -> Recorder:
    def record(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        with torch.no_grad():
            recorded.append(torch.full_like(function(), torch.nan))  # recording computes nothing
        output = recorded[-1]

        def replay() -> None:
            with torch.no_grad():
                output.copy_(function())

        return output, replay

    return record


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2, alpha=4.0)], ids=["copy", "lora"])
def test_policy_and_reference_are_those_without_graphs(
    workspace: Path, record: Recorder, recorded: list[Tensor], lora: LoraSection | None
) -> None:
    """Also after an update in place, and with other inputs of known shapes; calls with gradient stay as they are."""
    model = load_model("digits", workspace / "model")
    networks = Networks(model, lora=lora, gradient_checkpointing=False)
    networks.graphs = GraphedCalls(record)
    told = model.encode_prompts(["a one", "a two", ""])
    reference: Tensor | None = None
    for update in range(3):
        with torch.no_grad():
            for parameter in networks.trainable().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        latents, times = torch.randn(3, 1, 8, 8), torch.tensor([update, 400, 900])
        given = (latents, times, {name: tensor.roll(update, 0) for name, tensor in told.items()})
        with torch.no_grad():
            before = dict(networks.evaluations)
            policy, reference = networks.policy(*given), networks.reference(*given)
            assert networks.evaluations == {**before, "without_gradient": before["without_gradient"] + 6}
            assert torch.equal(policy, model.predict(networks.policy_module, *given))
            if networks.reference_module is not None:
                assert torch.equal(reference, model.predict(networks.reference_module, *given))
            else:
                with adapters_disabled(networks.policy_module):
                    assert torch.equal(reference, model.predict(networks.policy_module, *given))
        assert not torch.equal(policy, reference)
        assert networks.policy(*given).requires_grad
    assert len(recorded) == 2  # one of the policy, one of the reference


def test_a_shape_of_its_own_is_a_graph_of_its_own(record: Recorder, recorded: list[Tensor]) -> None:
    calls = GraphedCalls(record)

    def predict(latents: Tensor, timesteps: Tensor, conditioning: object) -> Tensor:
        return latents * timesteps.reshape(-1, 1)

    for rows in (2, 3, 2, 3):
        latents, times = torch.randn(rows, 5), torch.arange(rows)
        assert torch.equal(calls("policy", predict, latents, times, {}), latents * times.reshape(-1, 1))
    assert [output.shape[0] for output in recorded] == [2, 3]
    calls("policy", predict, torch.randn(2, 5), torch.tensor([0.5, 1.0]), {})  # another dtype
    calls("policy", predict, torch.randn(2, 5), torch.arange(2), {"text": torch.ones(2)})
    calls("reference", predict, torch.randn(2, 5), torch.arange(2), {})
    assert len(recorded) == 5


def test_an_answer_outlives_the_next_replay_and_expanded_inputs_are_read(record: Recorder) -> None:
    calls = GraphedCalls(record)

    def predict(latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return latents + conditioning["text"]

    text = torch.tensor([[2.0]]).expand(3, 1)
    first = calls("policy", predict, torch.ones(3, 1), torch.ones(3), {"text": text})
    second = calls("policy", predict, torch.zeros(3, 1), torch.ones(3), {"text": text})
    assert first.flatten().tolist() == [3.0] * 3
    assert second.flatten().tolist() == [2.0] * 3


def test_beyond_the_largest_number_calls_go_without_a_graph(
    record: Recorder, recorded: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performance, "LARGEST_NUMBER", 2)
    calls = GraphedCalls(record)
    for rows in (1, 2):
        calls("policy", lambda latents, *_: 2 * latents, torch.ones(rows), torch.ones(rows), {})
    with pytest.warns(UserWarning, match="more than 2 shapes"):
        answer = calls("policy", lambda latents, *_: 2 * latents, torch.ones(3), torch.ones(3), {})
    assert answer.tolist() == [2.0, 2.0, 2.0]
    assert len(recorded) == 2
