"""Two processes that share a step compute what one process does, and either continues the other's run: forked, with a
cache that both fill, and through the command line under the launchers that people use.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastinvdpo.trainer import TrainConfig, cache_writing, train
from tests.layout import ROOT
from tests.trainer import tiny
from tests.trainer.forked import Server

LAUNCHERS = {
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "{port}"),
    ),
    "torchrun": ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "{port}"),
}
# Far from Adam's sign-like first steps, so that the order of a sum over processes stays rounding.
SMOOTH = {"epsilon": 1.0, "warmup_steps": 1, "max_grad_norm": None}


def small_shards(run: dict[str, Any]) -> None:
    cache_writing.PAIRS_PER_SHARD = 3
    train(TrainConfig.from_mapping(run), progress=False)


@pytest.mark.parametrize(("method", "draws"), [("inversion-dpo", None), ("diffusion-dpo", 3)])
@pytest.mark.usefixtures("small_shards")
def test_two_processes_equal_one(workspace: Path, forks: Server, method: str, draws: int | None) -> None:
    """The gradient of every method, in one pass and two: shared_gradients.py."""

    # With draws one pair at once: a margin at policy = reference is rounded as what was stored, and 0.
    batch = 1 if draws else 2

    def run(name: str, steps: int, batch: int, accumulation: int) -> dict[str, Any]:
        return tiny.mapping(
            workspace,
            method,
            model={"lora": {"rank": 2}},
            training={"steps": steps, "max_batch": 4, "batch_size": batch, "gradient_accumulation_steps": accumulation},
            optimizer={**SMOOTH, "learning_rate": 0.1},
            output={"directory": str(workspace / name), "log_every": 1},
            # Two processes share the work of theirs; one pair at once in both, so that they hold the same bits.
            cache={"path": str(workspace / f"{name}-cache"), "batch_size": 1, "draws": draws},
        )

    alone = train(TrainConfig.from_mapping(run("alone", 4, batch, 4 // batch)), progress=False)
    forks.together(small_shards, run("together", 2, 1, 2))
    files = {path.name for path in (workspace / "alone-cache").glob("*.safetensors")}
    assert len(files) == 2 + 4 + (4 if draws else 0)  # index, unconditional, shards of pairs and of draws
    for name in files:
        assert (workspace / "together-cache" / name).read_bytes() == (workspace / "alone-cache" / name).read_bytes()
    together = train(TrainConfig.from_mapping(run("together", 4, batch, 4 // batch)), progress=False)
    # Each row holds the metrics of all processes, and the evaluations of both count.
    keys = ("step", "loss", "margin", "policy_mse_winner", "gradient_norm", "network_evaluations_with_gradient")
    for row, expected in zip(together.history, alone.history, strict=True):
        one, other = (torch.tensor([values[key] for key in keys], dtype=torch.float64) for values in (row, expected))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert together.network_evaluations == alone.network_evaluations
    moved = tiny.moved(tiny.weights(alone))
    for name, value in tiny.weights(together).items():
        torch.testing.assert_close(value, tiny.weights(alone)[name], rtol=0, atol=1e-3 * moved)


def mapping(root: Path, name: str) -> dict[str, Any]:
    return tiny.mapping(
        root,
        "inpo",
        training={"steps": 2, "batch_size": 2},
        optimizer={**SMOOTH, "learning_rate": 0.01},
        output={"directory": str(root / name), "log_every": 1},
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_launched_processes_equal_one(workspace: Path, launcher: str) -> None:
    alone = train(TrainConfig.from_mapping(mapping(workspace, "alone")), progress=False)
    file = workspace / "run.yaml"
    file.write_text(yaml.safe_dump(mapping(workspace, "together")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [word.format(port=port) for word in LAUNCHERS[launcher]]
    # An override, as on any command line: one pair for each process.
    command = [sys.executable, "-m", *words, "-m", "fastinvdpo", "train", str(file), "training.batch_size=1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps in") == 1  # one process speaks
    expected, found = tiny.weights(alone), tiny.weights(workspace / "together")
    assert tiny.moved(expected) > 1e-3
    for name, value in found.items():
        assert float((value - expected[name]).abs().max()) < 1e-6
