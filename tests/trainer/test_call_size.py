"""Streaming in the trainer: the size of a call, the passes, and that the weights do not depend on either."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import PairBatch, build_objective
from fastinvdpo.models import load_model
from fastinvdpo.trainer import TrainResult, accounting, train
from fastinvdpo.trainer.accounting import gradient_passes, saved_bytes
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


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_weights_do_not_depend_on_the_calls(workspace: Path, lora: dict[str, Any] | None) -> None:
    """Also not with accumulation and clipping, whose norm is that of the whole gradient."""
    model = {"lora": lora, "init_perturbation": 0.05}
    whole = _train(workspace, "whole", {"max_batch": 1000}, model=model)
    assert whole.history[-1]["network_evaluations_with_gradient"] == EVALUATIONS
    start = tiny.unet().state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in tiny.weights(whole).items())
    assert moved > 0
    for passes in (1, 2):
        split = {"batch_size": 1, "gradient_accumulation_steps": 2} if passes == 1 else {}
        streamed = _train(workspace, str(passes), {"max_batch": 4, "gradient_passes": passes, **split}, model=model)
        for row, expected in zip(streamed.history, whole.history, strict=True):
            for key in ("loss", "margin", "policy_mse_winner", "reference_mse_loser", "gradient_norm"):
                assert row[key] == pytest.approx(expected[key], rel=1e-3), key
        for name, value in tiny.weights(streamed).items():
            torch.testing.assert_close(value, tiny.weights(whole)[name], rtol=0, atol=1e-3 * moved)
        row = streamed.history[-1]
        assert row["network_evaluations_with_gradient"] == EVALUATIONS
        # The reference inverts and scores; with two passes the policy scores once more.
        assert row["network_evaluations_without_gradient"] == (passes + 1) * EVALUATIONS


def test_mixed_precision(workspace: Path) -> None:
    precision = {"mixed_precision": "bf16"}
    whole = _train(workspace, "whole", {"max_batch": 1000, **precision}).history[0]
    for passes in (1, 2):
        streamed = _train(workspace, str(passes), {"max_batch": 2, "gradient_passes": passes, **precision}).history[0]
        # The same products rounded to bfloat16, in sums of another order.
        assert streamed["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=0.02)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call of a network had."""
    found: list[int] = []
    predict = Networks._predict

    def watched(self: Networks, kind: str, *arguments: Any, **options: Any) -> Any:
        found.append(arguments[1].shape[0])
        return predict(self, kind, *arguments, **options)

    monkeypatch.setattr(Networks, "_predict", watched)
    return found


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


def test_no_number_counts_the_bytes_of_one_sample(
    workspace: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the budget, half the call; the measurement itself is no evaluation."""
    monkeypatch.setattr(accounting, "HOST_BUDGET", 0)
    smallest = _train(workspace, "smallest", {})
    assert max(calls) == 1 and len(calls) == smallest.network_evaluations
    calls.clear()
    monkeypatch.setattr(accounting, "HOST_BUDGET", 2**40)
    whole = _train(workspace, "whole", {})
    assert max(calls) == EVALUATIONS // STEPS
    assert whole.history[-1]["network_evaluations_with_gradient"] == EVALUATIONS


def test_other_methods_keep_to_a_given_size(workspace: Path, calls: list[int]) -> None:
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


@pytest.mark.parametrize(("limit", "found"), [(10**9, accounting.LARGEST), (100, 64), (8, 8), (0, 1)])
def test_the_largest_call_that_does_not_run_out_of_memory(limit: int, found: int) -> None:
    tried: list[int] = []

    def attempt(samples: int) -> None:
        tried.append(samples)
        if samples > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert accounting.largest_that_fits(attempt) == found
    assert tried == sorted(tried, reverse=True) and tried[0] == accounting.LARGEST

    def broken(samples: int) -> None:
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        accounting.largest_that_fits(broken)


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
    size = accounting.choose_max_batch(networks, objective, batch, accelerator, passes=1)
    one = batch.latents[:1].clone(), torch.tensor([500]), {name: value[:1].clone() for name, value in told.items()}
    expected = saved_bytes(lambda: networks.probe(*one), networks.policy_module)
    assert size == min(accounting.LARGEST, accounting.HOST_BUDGET // expected)
    assert networks.evaluations == {"with_gradient": 0, "without_gradient": 0}
    assert all(parameter.grad is None for parameter in networks.policy_module.parameters())
