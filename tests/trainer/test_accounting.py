"""What a step is said to cost, against numbers computed by hand; the size of a forward pass, and how a gradient is
streamed, on which the weights do not depend.
"""

from __future__ import annotations

import math
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
from fastinvdpo.trainer import TrainResult, accounting
from fastinvdpo.trainer.accounting import (
    Costs,
    forward_flops,
    gradient_factor,
    gradient_passes,
    peak_flops,
    saved_bytes,
)
from fastinvdpo.trainer.networks import Networks
from tests.trainer import tiny

CPU = torch.device("cpu")
LEVELS, BATCH, STEPS, GUIDED = 3, 2, 2, 2
EVALUATIONS = STEPS * BATCH * 2 * LEVELS * GUIDED


class Attention(nn.Module):
    """A 3 x 3 convolution from 4 to 6 channels, attention of 2 heads over the pixels, a layer back to 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = self.first(latents).flatten(2).transpose(1, 2)
        heads = tokens.unflatten(2, (2, 3)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return self.last(torch.nn.functional.silu(mixed.transpose(1, 2).flatten(2)))


def by_hand(samples: int, side: int) -> int:
    pixels = side * side
    convolution, attention, linear = pixels * 4 * 6 * 9, 2 * pixels * pixels * 6, pixels * 6 * 4
    return 2 * samples * (convolution + attention + linear)


@pytest.mark.parametrize(("samples", "side"), [(3, 8), (2, 16)])
def test_forward_flops(samples: int, side: int) -> None:
    """Of what is compiled too, which is counted uncompiled; and not those of a backward pass."""
    network, latents = Attention(), torch.randn(samples, 4, side, side)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("compiled while counting")

    compiled = torch.compile(network, backend=refuse)
    with torch.no_grad():
        assert forward_flops(lambda: network(latents)) == by_hand(samples, side)
    for each in (network, compiled):
        assert forward_flops(lambda each=each: each(latents)) == by_hand(samples, side)


def test_a_gradient_is_two_forwards_more() -> None:
    assert gradient_factor(lora=False, gradient_checkpointing=False) == 3
    assert gradient_factor(lora=False, gradient_checkpointing=True) == 4
    assert gradient_factor(lora=True, gradient_checkpointing=False) == 2
    # So does PyTorch's counter see it, where the latents have a gradient too.
    layer, latents = nn.Linear(6, 4), torch.randn(5, 6, requires_grad=True)
    assert forward_flops(lambda: layer(latents).sum().backward()) == 3 * 2 * 5 * 6 * 4


def test_a_row() -> None:
    costs = Costs(with_gradient=30.0, without_gradient=10.0, peak=1000.0)
    row = costs.row({"with_gradient": 8, "without_gradient": 20}, pairs=4, seconds=2.0, devices=2)
    assert row == {
        "evaluations_per_pair_with_gradient": 2.0,
        "evaluations_per_pair_without_gradient": 5.0,
        "model_flops_per_pair": (8 * 30 + 20 * 10) / 4,
        "pairs_per_second": 2.0,
        "flops_per_second": 220.0,
        "mfu": 220.0 / 2000,
    }


def test_the_peak_is_that_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight products that take 4, 3, 2, 2, … ticks of the clock: the fastest counts."""
    ticks = [4, 3, *[2] * 6]
    clock = iter([time for tick in ticks for time in (0.0, float(tick))])
    monkeypatch.setattr(accounting.time, "perf_counter", lambda: next(clock))
    before = torch.get_rng_state()
    assert peak_flops(CPU, torch.float32, size=10) == 2 * 10**3 / 2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call of a network had."""
    found: list[int] = []
    predict = Networks._predict

    def watched(self: Networks, caller: str, *arguments: Any) -> Any:
        found.append(arguments[1].shape[0])
        return predict(self, caller, *arguments)

    monkeypatch.setattr(Networks, "_predict", watched)
    return found


def test_the_probes_of_cost_and_size_leave_nothing_behind(workspace: Path, calls: list[int]) -> None:
    model = load_model("stable-diffusion", workspace / "model")
    networks = Networks(model, lora=None, gradient_checkpointing=False)
    objective = build_objective("inversion-dpo", model.schedule, num_inference_steps=LEVELS)
    prompts = model.encode_prompts(["a one"] * 2)
    batch = PairBatch(torch.randn(2, 4, 8, 8), prompts, torch.arange(1), prompts)
    costs = accounting.measure_costs(networks, batch, tiny.config(workspace).training)
    assert costs.without_gradient == flops_of_one(workspace) and costs.with_gradient == 3 * costs.without_gradient
    size = accounting.choose_max_batch(networks, objective, batch, accelerate.Accelerator(cpu=True), passes=1)
    one = batch.latents[:1].clone(), torch.tensor([500]), {name: value[:1].clone() for name, value in prompts.items()}
    expected = saved_bytes(lambda: networks.probe(*one), networks.policy_module)
    assert size == min(accounting.LARGEST, accounting.HOST_BUDGET // expected)
    assert networks.evaluations == {"with_gradient": 0, "without_gradient": 0} and not calls
    assert all(parameter.grad is None for parameter in networks.policy_module.parameters())


def flops_of_one(workspace: Path) -> float:
    model = load_model("stable-diffusion", workspace / "model")
    told = model.encode_prompts(["a one"])
    with torch.no_grad():
        return forward_flops(lambda: model.predict(model.network, torch.zeros(1, 4, 8, 8), torch.zeros(1).long(), told))


KINDS = [(None, False, 3), (None, True, 4), ({"rank": 2}, False, 2)]


@pytest.mark.parametrize(("lora", "checkpointing", "factor"), KINDS)
def test_every_logged_row_tells_the_costs(workspace: Path, lora: Any, checkpointing: bool, factor: int) -> None:
    """Inversion-DPO of 3 levels with guidance: 12 evaluations a pair with gradient; the reference inverts and scores.

    (All levels of a pair fit into one call, so the policy computes nothing without gradient.)
    """
    training = {"steps": 3, "batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
    rows = tiny.trained(workspace, "run", "inversion-dpo", training=training, model={"lora": lora}).history
    forward = flops_of_one(workspace)
    for row in rows:
        assert row["evaluations_per_pair_with_gradient"] == 12
        assert row["evaluations_per_pair_without_gradient"] == 24
        counted = row["model_flops_per_pair"]
        assert counted == pytest.approx((12 * factor + 24) * forward, rel=0.1 if lora else 1e-12)
        assert row["flops_per_second"] == pytest.approx(counted * row["pairs_per_second"])
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / peak_flops(CPU, torch.float32))
        assert row["peak_memory_bytes"] > 0
        assert all(math.isfinite(value) for value in row.values())


def test_intervals_of_several_steps_and_methods_that_cost_differently(workspace: Path) -> None:
    """InPO inverts every pair to its own level: the rows of a run add up to its evaluations."""
    result = tiny.trained(workspace, "run", "inpo", training={"steps": 5}, output={"log_every": 3})
    pairs = [1 * 2, 2 * 2, 2 * 2]  # steps 1, 3 and 5
    assert [row["step"] for row in result.history] == [1, 3, 5]
    for kind in ("with_gradient", "without_gradient"):
        per_pair = [row[f"evaluations_per_pair_{kind}"] for row in result.history]
        total = sum(count * evaluations for count, evaluations in zip(pairs, per_pair, strict=True))
        assert total == pytest.approx(result.history[-1][f"network_evaluations_{kind}"])
    assert [row["evaluations_per_pair_with_gradient"] for row in result.history] == [2, 2, 2]


# How a gradient is streamed


# Far from Adam's sign-like first steps, so that rounding in a gradient stays rounding in the weights.
LINEAR = {"epsilon": 1e3, "learning_rate": 1.0, "warmup_steps": 0}


def streamed(root: Path, folder: str, training: dict[str, Any], **sections: Any) -> TrainResult:
    training = {"steps": STEPS, "batch_size": BATCH, **training}
    logged = {"log_every": 1}
    return tiny.trained(root, folder, "inversion-dpo", training=training, optimizer=LINEAR, output=logged, **sections)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_weights_do_not_depend_on_the_calls(workspace: Path, lora: dict[str, Any] | None) -> None:
    """Also not with accumulation and clipping, whose norm is that of the whole gradient."""
    model = {"lora": lora, "init_perturbation": 0.2}
    whole = streamed(workspace, "whole", {"max_batch": 1000}, model=model)
    assert whole.history[-1]["network_evaluations_with_gradient"] == EVALUATIONS
    moved = tiny.moved(tiny.weights(whole))
    assert moved > 0
    for passes in (1, 2):
        split = {"batch_size": 1, "gradient_accumulation_steps": 2} if passes == 1 else {}
        found = streamed(workspace, str(passes), {"max_batch": 4, "gradient_passes": passes, **split}, model=model)
        for row, expected in zip(found.history, whole.history, strict=True):
            for key in ("loss", "margin", "policy_mse_winner", "reference_mse_loser", "gradient_norm"):
                # A margin is 250 times differences of errors of about 0.1, each rounded to 1e-8.
                rounding = 2e-5 if key == "margin" else 0.0
                assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=rounding), key
        for name, value in tiny.weights(found).items():
            torch.testing.assert_close(value, tiny.weights(whole)[name], rtol=0, atol=1e-3 * moved)
        row = found.history[-1]
        assert row["network_evaluations_with_gradient"] == EVALUATIONS
        # The reference inverts and scores; with two passes the policy scores once more.
        assert row["network_evaluations_without_gradient"] == (passes + 1) * EVALUATIONS


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
        training = {"max_batch": 4, "gradient_passes": passes, "gradient_accumulation_steps": 2}
        streamed(workspace, str(passes), training)
        assert exchanging == [STEPS]
        assert len(calls) == STEPS * 2 * BATCH * LEVELS


def test_no_number_counts_the_bytes_of_one_sample(
    workspace: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the budget, half the call; the measurement itself is no evaluation."""
    monkeypatch.setattr(accounting, "HOST_BUDGET", 0)
    smallest = streamed(workspace, "smallest", {})
    assert max(calls) == 1 and len(calls) == smallest.network_evaluations
    calls.clear()
    monkeypatch.setattr(accounting, "HOST_BUDGET", 2**40)
    whole = streamed(workspace, "whole", {})
    assert max(calls) == EVALUATIONS // STEPS
    assert whole.history[-1]["network_evaluations_with_gradient"] == EVALUATIONS


def test_other_methods_keep_to_a_given_size(workspace: Path, calls: list[int]) -> None:
    results = []
    for size in (None, 3):
        calls.clear()
        training = {"max_batch": size, "steps": 1}
        results.append(tiny.trained(workspace, str(size), "smpo", training=training, optimizer=LINEAR))
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
