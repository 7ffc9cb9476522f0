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
from fastinvdpo.trainer.checkpoint import load_checkpoint
from tests.trainer import tiny
from tests.trainer.forked import Server
from tests.trainer.test_files import flip


def train_counted(runs: list[dict[str, Any]], fatal: int) -> None:
    """Kills its process at the n-th prediction of a network, or trains to the end, as often as it is asked."""
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

    # Two predictions per micro-batch: number 19 is the policy's in the second micro-batch of step 5.
    assert forks.call(train_counted, [run("killed")], 19).status == -signal.SIGKILL
    assert [path.name for path in tiny.complete_checkpoints(workspace / "killed" / "checkpoints")] == [
        "step-00000002",
        "step-00000004",
    ]
    assert not (workspace / "killed" / "model").exists()
    done = forks.call(train_counted, [run("killed"), run("whole")], 0)
    assert done.status == 0, done.said

    killed, whole = (
        load_checkpoint(workspace / name / "checkpoints" / "step-00000006") for name in ("killed", "whole")
    )
    before = load_checkpoint(workspace / "killed" / "checkpoints" / "step-00000004")
    assert killed.ema is not None
    assert whole.ema is not None
    _assert_same(killed.trainable, whole.trainable)
    _assert_same(killed.ema, whole.ema)
    _assert_same(killed.state, whole.state)
    assert any(not torch.equal(before.trainable[name], value) for name, value in whole.trainable.items())
    files = ["model/unet/diffusion_pytorch_model.safetensors"] + ["adapter/adapter_model.safetensors"] * (
        lora is not None
    )
    for file in files:
        _assert_same(load_file(workspace / "killed" / file), load_file(workspace / "whole" / file))
    # With EMA, what it averages is written as well.
    assert "`model-raw` (the network alone)" in (workspace / "whole" / "model" / "README.md").read_text()
    raw = workspace / "whole" / "model-raw" / "unet" / "diffusion_pytorch_model.safetensors"
    if lora is None:
        _assert_same(load_file(raw), whole.trainable)
        _assert_same(load_file(workspace / "whole" / files[0]), whole.ema)
    else:
        found = load_file(workspace / "whole" / "adapter-raw" / "adapter_model.safetensors")
        assert sorted(map(_sum, found.values())) == sorted(map(_sum, whole.trainable.values()))
        assert raw.is_file()
    assert _history(workspace / "killed", [1, 3, 6]) == _history(workspace / "whole", [1, 3, 6])


def _assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            _assert_same(a, b)
    else:
        assert one == other


def _sum(tensor: torch.Tensor) -> float:
    return float(tensor.double().sum())


def _history(directory: Path, steps: list[int]) -> list[dict[str, Any]]:
    """The logged rows without what is of this attempt alone, as its times are."""
    rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps
    costs = ("seconds", "pairs_per_second", "flops_per_second", "mfu", "peak_memory_bytes", "model_flops_per_pair")
    return [
        {key: value for key, value in row.items() if key not in costs and not key.startswith("evaluations_per_pair")}
        for row in rows
    ]


def test_more_steps_and_another_micro_batch_continue_a_run(workspace: Path) -> None:
    config = tiny.config(workspace, training={"steps": 2, "batch_size": 4, "gradient_accumulation_steps": 1})
    assert train(config, progress=False).steps == 2
    more = tiny.config(workspace, training={"steps": 4, "batch_size": 2, "gradient_accumulation_steps": 2})
    result = train(more, progress=False)
    assert [row["step"] for row in result.history] == [1, 2, 4]
    assert result.network_evaluations == 4 * 4 * 2 * 2
    elsewhere = {"directory": str(workspace / "once")}
    once = tiny.config(workspace, training={"steps": 4, "batch_size": 4}, output=elsewhere)
    train(once, progress=False)
    # Adam divides by the size of the gradient, so that rounding of one part in 1e7 becomes a part of a step of 1e-3.
    for name, value in tiny.weights(workspace / "once").items():
        torch.testing.assert_close(tiny.weights(workspace / "run")[name], value, rtol=0, atol=2e-4)


def test_a_finished_run_is_returned_as_it_is(workspace: Path) -> None:
    config = tiny.config(workspace)
    first = train(config, progress=False)
    again = train(config, progress=False)
    assert again.steps == first.steps == 6
    assert again.network_evaluations == first.network_evaluations
    assert again.history == first.history


def test_another_run_is_refused_by_name(workspace: Path) -> None:
    """Another configuration, a directory that should be empty, another data set."""
    config = tiny.config(workspace, training={"steps": 2})
    train(config, resume="never", progress=False)
    changes: dict[str, dict[str, Any]] = {
        "method": {"beta": 400.0},
        "optimizer": {"learning_rate": 1e-4},
        "model": {"lora": {"rank": 2}},
        "training": {"steps": 6, "batch_size": 3},
    }
    with pytest.raises(InvalidInput) as caught:
        train(tiny.config(workspace, **changes), progress=False)
    message = str(caught.value)
    for part in (
        "method.beta (500.0 there, 400.0 here)",
        "optimizer.learning_rate (0.001 there, 0.0001 here)",
        "model.lora (None there, absent here)",
        "model.lora.rank (absent there, 2 here)",
        "effective batch (2 there, 3 here)",
    ):
        assert part in message
    assert "training.steps" not in message and "training.batch_size" not in message
    with pytest.raises(InvalidInput, match=r"resume = 'never': .*holds checkpoints"):
        train(config, resume="never", progress=False)
    tiny.write_data(workspace / "pairs.parquet", pairs=12)
    with pytest.raises(InvalidInput, match=r"pairs in the data set \(10 there, 12 here\)"):
        train(tiny.config(workspace), progress=False)


def test_the_length_of_a_falling_rate_is_part_of_the_run(workspace: Path) -> None:
    falling = {"lr_scheduler": "cosine"}
    train(tiny.config(workspace, training={"steps": 2}, optimizer=falling), progress=False)
    with pytest.raises(InvalidInput, match=r"different are training\.steps \(2 there, 4 here\)\. Remedy"):
        train(tiny.config(workspace, training={"steps": 4}, optimizer=falling), progress=False)


def test_auto_takes_the_newest_undamaged_checkpoint(workspace: Path) -> None:
    config = tiny.config(workspace)
    train(config, progress=False)
    checkpoints = workspace / "run" / "checkpoints"
    final = load_checkpoint(checkpoints / "step-00000006").trainable
    with (checkpoints / "step-00000006" / "state.pt").open("r+b") as file:
        file.truncate(100)
    (checkpoints / ".fastinvdpo-abcdefgh.tmp" / "new").mkdir(parents=True)
    (checkpoints / ".fastinvdpo-abcdefgh.tmp" / "lock").touch()
    with pytest.warns(UserWarning, match=r"step-00000006 is not used: state\.pt has 100 bytes"):
        train(config, progress=False)
    _assert_same(load_checkpoint(checkpoints / "step-00000006").trainable, final)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]
    for path in checkpoints.iterdir():
        (path / "meta.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"meta\.json cannot be read"),
        pytest.raises(InvalidInput, match=r"all 2 checkpoints in .* are damaged"),
    ):
        train(config, progress=False)


def test_a_named_checkpoint_is_continued_and_a_wrong_name_refused(workspace: Path) -> None:
    train(tiny.config(workspace), progress=False)
    checkpoint = workspace / "run" / "checkpoints" / "step-00000004"
    branch = tiny.config(workspace, output={"directory": str(workspace / "branch")})
    damaged = shutil.copytree(checkpoint, workspace / "damaged")
    flip(damaged / "state.pt", 9000)
    with pytest.raises(InvalidInput, match=r"resume = .*damaged': the content of state\.pt is no longer what"):
        train(branch, resume=damaged, progress=False)
    train(branch, resume=checkpoint, progress=False)
    _assert_same(tiny.weights(workspace / "branch"), tiny.weights(workspace / "run"))
    with pytest.raises(InvalidInput, match=r"resume = .*nothing.*meta\.json cannot be read"):
        train(branch, resume=str(workspace / "nothing"), progress=False)
