"""What a step is said to cost, against numbers computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from fastinvdpo.methods import PairBatch
from fastinvdpo.models import load_model
from fastinvdpo.models.digits import DigitsModel
from fastinvdpo.trainer import accounting, train
from fastinvdpo.trainer.accounting import Costs, forward_flops, gradient_factor, peak_flops, peak_memory
from fastinvdpo.trainer.networks import Networks
from tests.trainer import tiny

CPU = torch.device("cpu")


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
    network, latents = Attention(), torch.randn(samples, 4, side, side)
    with torch.no_grad():
        assert forward_flops(lambda: network(latents)) == by_hand(samples, side)
    # The same with gradient: the backward is not part of a call.
    assert forward_flops(lambda: network(latents)) == by_hand(samples, side)


def test_compiled_networks_are_counted_uncompiled() -> None:
    network, latents = Attention(), torch.randn(1, 4, 8, 8)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("compiled while counting")

    compiled = torch.compile(network, backend=refuse)
    assert forward_flops(lambda: compiled(latents)) == by_hand(1, 8)


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


def test_the_peak_memory_of_the_process_covers_what_was_held() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    held = torch.ones(8 * 2**20)
    assert peak_memory(accelerator) > held.nbytes
    before = peak_memory(accelerator)
    more = torch.ones(64 * 2**20)
    assert peak_memory(accelerator) >= max(before, more.nbytes)


def flops_of_one(workspace: Path) -> float:
    model = load_model("digits", workspace / "model")
    told = model.encode_prompts(["a one"])
    with torch.no_grad():
        return forward_flops(lambda: model.predict(model.network, torch.zeros(1, 1, 8, 8), torch.zeros(1).long(), told))


KINDS = [(None, False, 3), (None, True, 4), ({"rank": 2}, False, 2)]


@pytest.mark.parametrize(("lora", "checkpointing", "factor"), KINDS)
def test_every_logged_row_tells_the_costs(workspace: Path, lora: Any, checkpointing: bool, factor: int) -> None:
    """Inversion-DPO of 3 levels with guidance: 12 evaluations a pair with gradient; the reference inverts and scores.

    (All levels of a pair fit into one call, so the policy is asked nothing without gradient.)
    """
    training = {"steps": 3, "batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
    config = tiny.config(workspace, "inversion-dpo", training=training, model={"lora": lora})
    rows = train(config, progress=False).history
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
    config = tiny.config(workspace, "inpo", training={"steps": 5, "batch_size": 2}, output={"log_every": 3})
    result = train(config, progress=False)
    pairs = [1 * 2, 2 * 2, 2 * 2]  # steps 1, 3 and 5
    assert [row["step"] for row in result.history] == [1, 3, 5]
    for kind in ("with_gradient", "without_gradient"):
        per_pair = [row[f"evaluations_per_pair_{kind}"] for row in result.history]
        total = sum(count * evaluations for count, evaluations in zip(pairs, per_pair, strict=True))
        assert total == pytest.approx(result.history[-1][f"network_evaluations_{kind}"])
    assert [row["evaluations_per_pair_with_gradient"] for row in result.history] == [2, 2, 2]


def test_counting_is_no_evaluation_and_leaves_no_gradient(workspace: Path) -> None:
    model = load_model("digits", workspace / "model")
    assert isinstance(model, DigitsModel)
    networks = Networks(model, lora=None, gradient_checkpointing=False)
    batch = PairBatch(torch.randn(2, 1, 8, 8), model.encode_prompts(["a one"] * 2), torch.arange(1))
    training = tiny.config(workspace).training
    costs = accounting.measure_costs(networks, batch, training)
    assert costs.without_gradient == flops_of_one(workspace) and costs.with_gradient == 3 * costs.without_gradient
    assert networks.evaluations == {"with_gradient": 0, "without_gradient": 0}
    assert all(parameter.grad is None for parameter in networks.policy_module.parameters())
