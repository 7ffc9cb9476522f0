"""Two processes that share a step compute what one process does, and either continues the other's run.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastinvdpo.trainer import TrainConfig, cache_writing, train
from tests.trainer import tiny
from tests.trainer.forked import Server


def small_shards(run: dict[str, Any]) -> None:
    cache_writing.PAIRS_PER_SHARD = 3
    train(TrainConfig.from_mapping(run), progress=False)


def test_two_processes_equal_one(workspace: Path, forks: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache that both fill. The gradient of every method, in one pass and two: shared_gradients.py."""
    monkeypatch.setattr(cache_writing, "PAIRS_PER_SHARD", 3)

    def run(name: str, steps: int, batch: int) -> dict[str, Any]:
        run = tiny.mapping(
            workspace,
            "inversion-dpo",
            model={"lora": {"rank": 2}},
            training={"steps": steps, "batch_size": batch, "gradient_accumulation_steps": 2, "max_batch": 4},
            # Far from Adam's sign-like first steps, so that the order of a sum over processes stays rounding.
            optimizer={"epsilon": 1.0, "learning_rate": 0.1, "warmup_steps": 1, "max_grad_norm": None},
            output={"directory": str(workspace / name), "log_every": 1},
        )
        # Two processes share the work of theirs; one pair at once in both, so that they hold the same bits.
        return {**run, "cache": {"path": str(workspace / f"{name}-cache"), "batch_size": 1}}

    alone = train(TrainConfig.from_mapping(run("alone", 4, 2)), progress=False)
    forks.together(small_shards, run("together", 2, 1))
    files = {path.name for path in (workspace / "alone-cache").glob("*.safetensors")}
    assert len(files) == 2 + 4  # index, unconditional, shards
    for name in files:
        assert (workspace / "together-cache" / name).read_bytes() == (workspace / "alone-cache" / name).read_bytes()
    together = train(TrainConfig.from_mapping(run("together", 4, 2)), progress=False)
    # Each row holds the metrics of all processes, and the evaluations of both count.
    keys = ("step", "loss", "margin", "policy_mse_winner", "gradient_norm", "network_evaluations_with_gradient")
    for row, expected in zip(together.history, alone.history, strict=True):
        one, other = (torch.tensor([values[key] for key in keys], dtype=torch.float64) for values in (row, expected))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert together.network_evaluations == alone.network_evaluations
    start = tiny.unet().state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in tiny.weights(alone).items())
    for name, value in tiny.weights(together).items():
        torch.testing.assert_close(value, tiny.weights(alone)[name], rtol=0, atol=1e-3 * moved)
