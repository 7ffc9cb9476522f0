"""Invariants of training: what a step computes does not depend on how its pairs are dealt out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastinvdpo.data import PairDataset
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods.streaming import WholeLoss
from fastinvdpo.models import load_model
from fastinvdpo.models.base import Origin
from fastinvdpo.trainer import trainer as loop_module
from tests.trainer import tiny
from tests.trainer.ranks import DoubleModel


@pytest.mark.parametrize("method", tiny.METHODS)
def test_micro_batches_equal_one_batch_in_float64(workspace: Path, method: str) -> None:
    results = []
    for batch, accumulation in ((4, 1), (1, 4)):
        model = DoubleModel.load(Origin(workspace / "model"), dtype=torch.float64)
        training = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "steps": 4}
        output = {"directory": str(workspace / f"run-{batch}")}
        config = tiny.config(workspace, method, data={"caption_dropout": 0.3}, training=training, output=output)
        results.append(tiny.train_model(config, model, PairDataset(workspace / "pairs.parquet")))
    one, first = tiny.weights(results[0]), results[0].history[0]
    assert tiny.moved(one) > 1e-4
    # Policy = reference.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == 0 and first["implicit_accuracy"] == 0.5 and first["gradient_norm"] > 0
    for side in ("winner", "loser"):
        assert first[f"policy_mse_{side}"] == first[f"reference_mse_{side}"] > 0
    assert results[1].network_evaluations == results[0].network_evaluations
    for name, value in tiny.weights(results[1]).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, one[name], rtol=1e-9, atol=1e-11)
    for row, expected in zip(results[1].history, results[0].history, strict=True):
        for name in ("loss", "gradient_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-9)


def test_clipping_bounds_the_step_but_not_the_reported_norm(workspace: Path) -> None:
    norms, start = [], tiny.unet().state_dict()
    for limit in (1e-3, None):
        optimizer = {"max_grad_norm": limit, "warmup_steps": 0, "epsilon": 1.0, "learning_rate": 1.0}
        result = tiny.trained(workspace, str(limit), optimizer=optimizer, training={"steps": 1})
        norms.append(result.history[0]["gradient_norm"])
        changes = [value - start[key] * 0.99 for key, value in tiny.weights(result).items()]
        # Adam with epsilon far above the gradient moves by lr·g, after weight decay by one per cent.
        assert (math.sqrt(sum(float(change.square().sum()) for change in changes)) < 2e-3) == (limit is not None)
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] > 1


def test_ema_is_what_is_written(workspace: Path) -> None:
    decay, steps = 0.5, 3
    training, output = {"steps": steps, "ema_decay": decay}, {"checkpoint_every": 1, "keep_checkpoints": steps}
    result = tiny.trained(workspace, training=training, optimizer={"warmup_steps": 0}, output=output)
    expected = {name: value.clone() for name, value in tiny.unet().state_dict().items()}
    for step in range(1, steps + 1):
        weights = tiny.stored(result.directory, step).trainable
        grown = 0.0 if step == 1 else min(decay, step / (9 + step))
        for name, value in weights.items():
            expected[name] = grown * expected[name] + (1 - grown) * value
    for name, value in tiny.weights(result).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, weights[name]) or torch.equal(weights[name], tiny.unet().state_dict()[name])


def test_options_that_change_no_bit(workspace: Path) -> None:
    dropout = {"caption_dropout": 0.3}
    expected = tiny.weights(tiny.trained(workspace, data=dropout))
    for folder, sections in {
        "workers": {"training": {"num_workers": 2}},
        "no cache": {"data": {"cache_gib": 0.0}},
        "checkpointing": {"training": {"gradient_checkpointing": True}},
    }.items():
        data = {**dropout, **sections.pop("data", {})}
        tiny.assert_same(tiny.weights(tiny.trained(workspace, folder, data=data, **sections)), expected)


def test_bf16_stays_near_float32_and_keeps_float32_weights(workspace: Path) -> None:
    plain = tiny.trained(workspace).history[0]
    result = tiny.trained(workspace, "bf16", training={"mixed_precision": "bf16"})
    first = result.history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["policy_mse_winner"] == pytest.approx(plain["policy_mse_winner"], rel=2e-2)
    assert first["policy_mse_winner"] != plain["policy_mse_winner"]
    assert {value.dtype for value in tiny.weights(result).values()} == {torch.float32}
    load_model("stable-diffusion", result.model_directory)


def test_history_and_tensorboard_hold_every_metric(workspace: Path) -> None:
    """With the rates of a warm-up of four steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tiny.trained(workspace, optimizer={"warmup_steps": 4}, output={"tensorboard": True})
    rows = [json.loads(line) for line in (result.directory / "history.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.0, 0.25e-3, 0.75e-3, 1e-3])
    events = EventAccumulator(str(result.directory / "tensorboard" / "fastinvdpo"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in rows[0] if name != "step"}
    assert set(rows[0]) == {
        "step", "loss", "margin", "implicit_accuracy", "policy_mse_winner", "policy_mse_loser", "reference_mse_winner",
        "reference_mse_loser", "gradient_norm", "learning_rate", "network_evaluations_with_gradient",
        "network_evaluations_without_gradient", "evaluations_per_pair_with_gradient",
        "evaluations_per_pair_without_gradient", "model_flops_per_pair", "pairs_per_second", "flops_per_second", "mfu",
        "peak_memory_bytes", "seconds",
    }  # fmt: skip
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows]


class ScalarReads(TorchDispatchMode):
    """Counts the numbers that the host fetched from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_number_from_the_device(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the number of the first draw, a host tensor, once per micro-batch."""
    reads: list[int] = []
    step = loop_module.training_step

    def counted(state: Any, objective: Any, *arguments: Any, **options: Any) -> None:
        # The objective computes on the host where to invert to; that is not what is counted here.
        def uncounted(*inputs: Any, **keywords: Any) -> Any:
            before = counter.count
            output = objective(*inputs, **keywords)
            counter.count = before
            return output

        @dataclasses.dataclass(frozen=True)
        class Uncounted:
            gather: Any = None

            def stream(self, policy: Any, reference: Any, batch: Any, *, seed: int, **_: Any) -> WholeLoss:
                return WholeLoss(lambda: uncounted(policy, reference, batch, seed=seed))

        with ScalarReads() as counter:
            step(state, Uncounted(), *arguments, **options)
        reads.append(counter.count)

    monkeypatch.setattr(loop_module, "training_step", counted)
    tiny.trained(workspace, training={"gradient_accumulation_steps": 2, "ema_decay": 0.9})
    assert reads == [2] * 6


def test_smpo_needs_scores_before_the_model_is_loaded(workspace: Path) -> None:
    tiny.write_data(workspace / "pairs.parquet", scores=False)
    with pytest.raises(InvalidInput, match=r"method\.name = 'smpo': weighs pairs by scores, and .* has none"):
        tiny.trained(workspace, "run", "smpo", model={"path": str(workspace / "no model here")})
