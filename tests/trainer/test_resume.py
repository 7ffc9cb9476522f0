"""A run killed with SIGKILL in the middle of a step and resumed ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastinvdpo.errors import InvalidInput
from fastinvdpo.trainer import TrainConfig, train
from tests.trainer import tiny
from tests.trainer.forked import Server
from tests.trainer.test_files import flip
from tests.trainer.tiny import assert_same as _assert_same


def train_counted(runs: list[dict[str, Any]], fatal: int) -> None:
    """Kills its process at the n-th prediction of a network, or trains each run to the end."""
    tiny.CountedPredictions(fatal)
    for run in runs:
        train(TrainConfig.from_mapping(run), progress=False)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2.0}], ids=["full", "lora"])
def test_killed_and_resumed_equals_uninterrupted(workspace: Path, forks: Server, lora: dict[str, Any] | None) -> None:
    # Two micro-batches a step, caption dropout, EMA, a log interval that a checkpoint cuts in two.
    def run(name: str) -> dict[str, Any]:
        return tiny.mapping(
            workspace,
            model={"lora": lora},
            data={"caption_dropout": 0.3},
            training={"gradient_accumulation_steps": 2, "ema_decay": 0.9},
            optimizer={"lr_scheduler": "constant_with_warmup"},
            output={"directory": str(workspace / name), "log_every": 3},
        )

    killed, whole = workspace / "killed", workspace / "whole"
    # Two predictions per micro-batch: number 19 is the policy's in the second micro-batch of step 5.
    assert forks.call(train_counted, [run("killed")], 19).status == -signal.SIGKILL
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert not (killed / "model").exists()
    done = forks.call(train_counted, [run("killed"), run("whole")], 0)
    assert done.status == 0, done.said

    ends, before = [tiny.stored(killed), tiny.stored(whole)], tiny.stored(killed, 4)
    assert ends[1].ema is not None
    for part in ("trainable", "ema", "state"):
        _assert_same(getattr(ends[0], part), getattr(ends[1], part))
    assert any(not torch.equal(before.trainable[name], value) for name, value in ends[1].trainable.items())
    _assert_same(tiny.weights(killed), tiny.weights(whole))
    # With EMA, what it averages is written as well.
    assert "`model-raw` (the network alone)" in (whole / "model" / "README.md").read_text()
    raw = whole / "model-raw" / "unet" / "diffusion_pytorch_model.safetensors"
    if lora is None:
        _assert_same(load_file(raw), ends[1].trainable)
        _assert_same(tiny.weights(whole), ends[1].ema)
    else:
        adapter = "adapter/adapter_model.safetensors"
        _assert_same(load_file(killed / adapter), load_file(whole / adapter))
        found = load_file(whole / "adapter-raw" / "adapter_model.safetensors")
        assert sorted(map(_sum, found.values())) == sorted(map(_sum, ends[1].trainable.values()))
        assert raw.is_file()
    assert history(killed, [1, 3, 6]) == history(whole, [1, 3, 6])


def _sum(tensor: torch.Tensor) -> float:
    return float(tensor.double().sum())


def history(directory: Path, steps: list[int]) -> list[dict[str, Any]]:
    """The logged rows without what is of this attempt alone, as its times are."""
    rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps
    costs = ("seconds", "pairs_per_second", "flops_per_second", "mfu", "peak_memory_bytes", "model_flops_per_pair")
    return [
        {key: value for key, value in row.items() if key not in costs and not key.startswith("evaluations_per_pair")}
        for row in rows
    ]


def test_more_steps_and_another_micro_batch_continue_a_run(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert tiny.trained(workspace, training={"steps": 2, "batch_size": 4}).steps == 2
    more = {"steps": 4, "batch_size": 2, "gradient_accumulation_steps": 2}
    result = tiny.trained(workspace, training=more)
    assert [row["step"] for row in result.history] == [1, 2, 4]
    assert result.network_evaluations == 4 * 4 * 2 * 2
    once = tiny.weights(tiny.trained(workspace, "once", training={"steps": 4, "batch_size": 4}))
    # Adam divides by the size of the gradient, so that rounding of one part in 1e7 becomes a part of a step of 1e-3.
    for name, value in once.items():
        torch.testing.assert_close(tiny.weights(result)[name], value, rtol=0, atol=2e-4)
    with pytest.raises(InvalidInput, match=r"training.steps = 3: has been passed: .*step-00000004 is of step 4"):
        tiny.trained(workspace, training={**more, "steps": 3})
    changed = "history.jsonl is not what the checkpoint's run had logged"
    with caplog.at_level("INFO"):
        again = tiny.trained(workspace, training=more)  # a finished run is returned as it is
        assert "Resuming after step 4" in caplog.text and changed not in caplog.text
    assert (again.steps, again.network_evaluations) == (result.steps, result.network_evaluations)
    assert again.history == result.history
    # Killed before it deleted what its last checkpoint replaces.
    kept = workspace / "run" / "checkpoints"
    shutil.copytree(kept / "step-00000004", kept / "step-00000002", dirs_exist_ok=True)
    tiny.trained(workspace, training=more, output={"keep_checkpoints": 1})
    assert [path.name for path in kept.iterdir()] == ["step-00000004"]
    logged = workspace / "run" / "history.jsonl"
    logged.write_text(logged.read_text().replace('"loss": 0.', '"loss": 1.', 1))
    with caplog.at_level("INFO"):
        tiny.trained(workspace, training=more)
    assert changed in caplog.text


def test_another_run_is_refused_by_name(workspace: Path) -> None:
    """Another configuration, a directory that should be empty, another data set, another length of a falling rate."""
    config = tiny.config(workspace, training={"steps": 2}, optimizer={"lr_scheduler": "cosine"})
    train(config, resume="never", progress=False)
    changes: dict[str, dict[str, Any]] = {
        "method": {"beta": 400.0},
        "optimizer": {"learning_rate": 1e-4, "lr_scheduler": "cosine"},
        "model": {"lora": {"rank": 2}},
        "training": {"steps": 2, "batch_size": 3, "gradient_checkpointing": True},
    }
    with pytest.raises(InvalidInput) as caught:
        tiny.trained(workspace, **changes)
    message = str(caught.value)
    for part in (
        "method.beta (500.0 there, 400.0 here)",
        "optimizer.learning_rate (0.001 there, 0.0001 here)",
        "model.lora (None there, absent here)",
        "model.lora.rank (absent there, 2 here)",
        "effective batch (2 there, 3 here)",
    ):
        assert part in message
    assert "training." not in message
    with pytest.raises(InvalidInput, match=r"different are training\.steps \(2 there, 4 here\)\. Remedy"):
        tiny.trained(workspace, training={"steps": 4}, optimizer={"lr_scheduler": "cosine"})
    with pytest.raises(InvalidInput, match=r"resume = 'never': .*holds checkpoints"):
        train(config, resume="never", progress=False)
    tiny.write_data(workspace / "pairs.parquet", pairs=12)
    with pytest.raises(InvalidInput, match=r"pairs in the data set \(10 there, 12 here\)"):
        train(config, progress=False)


def test_a_checkpoint_that_is_named_is_continued_or_refused(workspace: Path) -> None:
    """Damaged ones: tests/trainer/test_files.py."""
    checkpoints = tiny.trained(workspace).directory / "checkpoints"
    branch = tiny.config(workspace, output={"directory": str(workspace / "branch")})
    damaged = shutil.copytree(checkpoints / "step-00000004", workspace / "damaged")
    flip(damaged / "state.pt", 9000)
    with pytest.raises(InvalidInput, match=r"resume = .*damaged': the content of state\.pt is no longer what"):
        train(branch, resume=damaged, progress=False)
    train(branch, resume=checkpoints / "step-00000004", progress=False)
    _assert_same(tiny.weights(workspace / "branch"), tiny.weights(workspace / "run"))
    with pytest.raises(InvalidInput, match=r"resume = .*nothing.*meta\.json cannot be read"):
        train(branch, resume=str(workspace / "nothing"), progress=False)
