"""The trainer uses the fused ops by default, and they give the training curve of the reference.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastinvdpo.ops import native
from fastinvdpo.ops.affine_step import schema as step_op
from fastinvdpo.ops.dispatch import VARIABLE
from fastinvdpo.ops.preference_loss import schema as loss_op
from fastinvdpo.trainer import train
from tests.trainer import tiny

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

STEPS = 50
# A loss is no more exact than the network: a prediction that is off by a rounding moves it by about β times that,
# whatever computes it. At the demo's β of 1000, moving one weight by its last bit moves the losses by up to 2e-5
# (one backend, four pairs a step); the difference of two backends can be seen below that, with a weaker tie.
BETA = 50.0
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and pairs."""
    root = tmp_path_factory.mktemp("curves")
    tiny.write_model(root / "model")
    tiny.write_data(root / "pairs.parquet", pairs=100)
    return root


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the kernels that run, as ``"preference_loss forward native"``."""
    counted: Counter[str] = Counter()

    def counting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            counted[name] += 1
            return kernel(*arguments)

        return run

    for op in (loss_op, step_op):
        for direction, table in (("forward", op._FORWARD), ("backward", op._BACKWARD)):
            for backend, kernel in table.items():
                monkeypatch.setitem(table, backend, counting(f"{op.NAME} {direction} {backend}", kernel))
    return counted


def curve(root: Path, directory: Path, method: str, learning_rate: float = 2e-5) -> list[float]:
    """The loss of every step of a short training."""
    config = tiny.config(
        root,
        method,
        method={"beta": BETA},
        optimizer={"learning_rate": learning_rate, "weight_decay": 0.0, "warmup_steps": 5},
        training={"steps": STEPS, "batch_size": 4},
        output={"directory": str(directory), "log_every": 1, "checkpoint_every": STEPS},
    )
    return [row["loss"] for row in train(config, resume="never", progress=False).history]


def distance(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of a step's loss."""
    assert len(losses) == len(others) == STEPS
    return max(abs(loss - other) / abs(other) for loss, other in zip(losses, others, strict=True))


@pytest.mark.parametrize("method", ["diffusion-dpo", "inpo"])
def test_the_fused_ops_give_the_training_curve_of_the_reference(
    method: str, root: Path, calls: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = ("preference_loss forward", "preference_loss backward", "affine_step forward")  # noising, inversion
    by_default = curve(root, tmp_path / "default", method)
    assert set(calls) == {f"{kernel} native" for kernel in kernels}
    assert min(calls.values()) >= STEPS

    calls.clear()
    monkeypatch.setenv(VARIABLE, "reference")
    by_reference = curve(root, tmp_path / "reference", method)
    assert set(calls) == {f"{kernel} reference" for kernel in kernels}
    assert distance(by_default, by_reference) <= TOLERANCE
    assert max(abs(loss - math.log(2)) for loss in by_reference) > 0.05  # something was learned


def test_the_tolerance_tells_trainings_apart(root: Path, tmp_path: Path) -> None:
    """A learning rate that is off by a hundredth makes another curve."""
    one, other = (curve(root, tmp_path / str(rate), "diffusion-dpo", rate) for rate in (2e-5, 2.02e-5))
    assert distance(one, other) > 10 * TOLERANCE
