"""The command line under the launchers that people use: two processes end with the weights of one.

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
import yaml

from fastinvdpo.trainer import TrainConfig, train
from tests.trainer import tiny

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "{port}"),
    ),
    "torchrun": ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "{port}"),
}


def mapping(root: Path, name: str, batch: int) -> dict[str, Any]:
    return tiny.mapping(
        root,
        "inpo",
        training={"steps": 2, "batch_size": batch},
        # Far from Adam's sign-like first steps, so that the order of a sum over processes stays rounding.
        optimizer={"epsilon": 1.0, "learning_rate": 0.01, "warmup_steps": 1, "max_grad_norm": None},
        output={"directory": str(root / name), "log_every": 1, "tensorboard": False},
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_launched_processes_equal_one(workspace: Path, launcher: str) -> None:
    alone = train(TrainConfig.from_mapping(mapping(workspace, "alone", 2)), progress=False)
    file = workspace / "run.yaml"
    file.write_text(yaml.safe_dump(mapping(workspace, "together", 2)))
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
    start = tiny.unet().state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in expected.items())
    assert moved > 1e-3
    for name, value in found.items():
        assert float((value - expected[name]).abs().max()) < 1e-6
