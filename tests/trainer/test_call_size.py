"""Streaming in the trainer: the size of a call, the passes, and that the weights do not depend on either."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import PairBatch, build_objective
from fastinvdpo.models import load_model
from fastinvdpo.trainer import TrainResult, call_size, train
from fastinvdpo.trainer.call_size import gradient_passes, saved_bytes, size_by_doubling, size_for_budget
from fastinvdpo.trainer.networks import Networks
from tests.trainer import tiny

LEVELS, BATCH, STEPS, GUIDED = 3, 2, 2, 2
EVALUATIONS = STEPS * BATCH * 2 * LEVELS * GUIDED
# Far from Adam's sign-like first steps, so that rounding in a gradient stays rounding in the weights.
LINEAR = {"epsilon": 1e3, "learning_rate": 1.0, "warmup_steps": 0}


def _train(root: Path, name: str, training: dict[str, Any], **changes: Any) -> TrainResult:
    output = {"directory": str(root / name), "log_every": 1}
    training = {"steps": STEPS, "batch_size": BATCH, **training}
    return train(
        tiny.config(root, "inversion-dpo", training=training, optimizer=LINEAR, output=output, **changes),
        progress=False,
    )


def _weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.model_directory / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_weights_do_not_depend_on_the_calls(workspace: Path, lora: dict[str, Any] | None) -> None:
    """Also not with accumulation and clipping, whose norm is that of the whole gradient."""
    model = {"lora": lora, "init_perturbation": 0.05}
    whole = _train(workspace, "whole", {"max_batch": 1000}, model=model)
    assert whole.history[-1]["network_evaluations_with_gradient"] == EVALUATIONS
    start = tiny.unet().state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in _weights(whole).items())
    assert moved > 0
    for passes in (1, 2):
        split = {"batch_size": 1, "gradient_accumulation_steps": 2} if passes == 1 else {}
        streamed = _train(workspace, str(passes), {"max_batch": 4, "gradient_passes": passes, **split}, model=model)
        for row, expected in zip(streamed.history, whole.history, strict=True):
            for key in ("loss", "margin", "policy_mse_winner", "reference_mse_loser", "gradient_norm"):
                assert row[key] == pytest.approx(expected[key], rel=1e-3), key
        for name, value in _weights(streamed).items():
            torch.testing.assert_close(value, _weights(whole)[name], rtol=0, atol=1e-3 * moved)
        row = streamed.history[-1]
        assert row["network_evaluations_with_gradient"] == EVALUATIONS
        # The reference inverts and scores; with two passes the policy scores once more.
        assert row["network_evaluations_without_gradient"] == (passes + 1) * EVALUATIONS


@pytest.mark.parametrize("passes", [1, 2])
def test_mixed_precision(workspace: Path, passes: int) -> None:
    precision = {"mixed_precision": "bf16"}
    whole = _train(workspace, "whole", {"max_batch": 1000, **precision})
    streamed = _train(workspace, "streamed", {"max_batch": 2, "gradient_passes": passes, **precision})
    # The same products rounded to bfloat16, in sums of another order.
    assert streamed.history[0]["gradient_norm"] == pytest.approx(whole.history[0]["gradient_norm"], rel=0.02)


def test_processes_would_exchange_gradients_once_per_step(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, exchanging = [0], [0]
    backward = accelerate.Accelerator.backward

    @contextmanager
    def no_sync(self: Any, model: nn.Module) -> Any:
        alone[0] += 1
        yield
        alone[0] -= 1

    def counted(self: Any, loss: torch.Tensor, **options: Any) -> None:
        exchanging[0] += not alone[0]
        calls.append(float(loss.detach()))
        backward(self, loss, **options)

    monkeypatch.setattr(accelerate.Accelerator, "no_sync", no_sync)
    monkeypatch.setattr(accelerate.Accelerator, "backward", counted)
    for passes in (1, 2):
        calls: list[float] = []
        exchanging[0] = 0
        _train(
            workspace,
            str(passes),
            {"max_batch": 4, "gradient_passes": passes, "gradient_accumulation_steps": 2},
        )
        assert exchanging == [STEPS]
        assert len(calls) == STEPS * 2 * BATCH * LEVELS


def test_no_number_counts_the_bytes_of_one_sample(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the budget, half the call; the measurement itself is no evaluation."""
    calls: list[int] = []
    predict = Networks._predict

    def watched(self: Networks, kind: str, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1].shape[0])
        return predict(self, kind, *arguments, **options)

    monkeypatch.setattr(Networks, "_predict", watched)
    monkeypatch.setattr(call_size, "HOST_BUDGET", 0)
    smallest = _train(workspace, "smallest", {})
    # Beside it one call that counts FLOPs.
    assert max(calls) == 1 and len(calls) == 2 + smallest.network_evaluations
    calls.clear()
    monkeypatch.setattr(call_size, "HOST_BUDGET", 2**40)
    whole = _train(workspace, "whole", {})
    assert max(calls) == EVALUATIONS // STEPS
    assert whole.history[-1]["network_evaluations_with_gradient"] == EVALUATIONS


def test_other_methods_keep_to_a_given_size(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    predict = Networks._predict

    def watched(self: Networks, kind: str, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1].shape[0])
        return predict(self, kind, *arguments, **options)

    monkeypatch.setattr(Networks, "_predict", watched)
    results = []
    for size in (None, 3):
        calls.clear()
        output = {"directory": str(workspace / str(size))}
        changes = {"training": {"max_batch": size, "steps": 1}, "optimizer": LINEAR, "output": output}
        results.append(train(tiny.config(workspace, "smpo", **changes), progress=False))
        assert max(calls) == (size or 2 * BATCH)
    one, other = (result.history[-1] for result in results)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert results[0].network_evaluations == results[1].network_evaluations


def test_saved_bytes_are_those_of_the_graph() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    for samples in (1, 5):
        inputs = torch.randn(samples, 8)
        # The input of each layer; tanh keeps its output, which is the second layer's input. Weights do not count.
        assert saved_bytes(lambda inputs=inputs: network(inputs), network) == samples * 4 * (8 + 16)


def test_size_for_budget() -> None:
    assert size_for_budget(10, 95) == 9
    assert size_for_budget(10, 5) == 1
    assert size_for_budget(0, 5) == 5
    assert size_for_budget(1, 10**9) == call_size.LARGEST


def test_size_by_doubling() -> None:
    tried: list[int] = []

    def linear(limit: int = 10**9) -> Any:
        def peak(samples: int) -> int | None:
            tried.append(samples)
            return None if samples > limit else 100 + 10 * samples

        return peak

    assert size_by_doubling(linear(), 100 + 10 * 32) == 16  # 32 is not tried: twice the bytes of 16 would be too many
    assert tried == [1, 2, 4, 8, 16]
    assert size_by_doubling(linear(), 10**9) == call_size.LARGEST
    assert size_by_doubling(linear(limit=4), 10**9) == 4  # out of memory at 8
    assert size_by_doubling(linear(limit=0), 10**9) == 1
    assert size_by_doubling(linear(), 50) == 1
    assert size_by_doubling(lambda samples: samples**3, 8**3 - 1) == 4  # grows faster than expected


def test_passes(workspace: Path) -> None:
    def passes(kind: str = "NO", lora: bool = False, **training: Any) -> int:
        model = {"lora": {"rank": 2} if lora else None}
        return gradient_passes(tiny.config(workspace, "inversion-dpo", model=model, training=training), kind)

    assert passes() == 2
    assert passes(lora=True) == 1
    assert passes(batch_size=1) == 1
    assert passes(batch_size=1, gradient_accumulation_steps=2) == 2
    assert passes(gradient_passes=1) == 1
    assert passes(lora=True, gradient_passes=2) == 2
    assert passes("FSDP", lora=True) == 2
    with pytest.raises(InvalidInput, match="gradient_passes = 1: cannot scale the gradients that FSDP keeps"):
        passes("FSDP", gradient_passes=1)


def test_the_probe_leaves_nothing_behind(workspace: Path) -> None:
    model = load_model("digits", workspace / "model")
    networks = Networks(model, lora=None, gradient_checkpointing=False)
    objective = build_objective("inversion-dpo", model.schedule, num_inference_steps=LEVELS)
    told = model.encode_prompts(["a one"] * 2)
    batch = PairBatch(torch.randn(2, 1, 8, 8), told, torch.arange(1), told)
    accelerator = accelerate.Accelerator(cpu=True)
    size = call_size.choose_max_batch(networks, objective, batch, accelerator, passes=1)
    one = batch.latents[:1].clone(), torch.tensor([500]), {name: value[:1].clone() for name, value in told.items()}
    expected = saved_bytes(lambda: networks.probe(*one), networks.policy_module)
    assert size == min(call_size.LARGEST, call_size.HOST_BUDGET // expected)
    assert networks.evaluations == {"with_gradient": 0, "without_gradient": 0}
    assert all(parameter.grad is None for parameter in networks.policy_module.parameters())
