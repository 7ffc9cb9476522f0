"""The gradients of two processes are those of one process with the same pairs: every method, with and without LoRA.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from tests.models import tiny as models
from tests.trainer import ranks, tiny
from tests.trainer.forked import Server

pytestmark = pytest.mark.xdist_group("shared gradients")  # the runs in two processes are made once

STREAMING: dict[str, dict[str, Any]] = {
    "diffusion-dpo": {},
    "inpo": {},
    "smpo": {"max_batch": 3},
    "inversion-dpo": {"max_batch": 8, "gradient_passes": 2},
    "inversion-dpo one pass": {"max_batch": 8, "gradient_passes": 1},
    "diffusion-dpo dynamic": {},
    "diffusion-dpo balanced": {},
    "diffusion-dpo moving": {},
    "diffusion-dpo liked": {},
}
MOVING = {"name": "linear-dpo", "reference": "ema", "reference_decay": 0.5}
# With a mean over the pairs of a micro-batch on all processes, or a reference that all of them move.
OPTIONS: dict[str, dict[str, Any]] = {
    "diffusion-dpo dynamic": {"name": "alpha-dpo", "alpha": 0.7, "dynamic": True},
    "diffusion-dpo balanced": {"auto_beta": 0.2, "beta": 1e6},
    "diffusion-dpo moving": MOVING,
    "diffusion-dpo liked": {"name": "kto"},
}
NAMES = [f"{name}{suffix}" for name, suffix in itertools.product(STREAMING, ("", " lora"))]
# What the machine did, not the training.
TIMED = {"seconds", "pairs_per_second", "flops_per_second", "mfu", "peak_memory_bytes"}
PAIRS, STEPS, GLOBAL_BATCH, ACCUMULATION = 7, 2, 4, 2


def mapping(root: Path, name: str, folder: str, processes: int, **sections: Any) -> dict[str, Any]:
    """Two steps of four pairs, from a data set of seven; adapters start off zero, so that both factors learn.

    ``sd3`` in the name takes a transformer.
    """
    streaming, lora = name.removesuffix(" lora").removesuffix(" sd3"), name.endswith(" lora")
    model: dict[str, Any] = {"lora": {"rank": 2} if lora else None, "init_perturbation": 0.02}
    data: dict[str, Any] = {"path": str(root / "seven.parquet"), "form": "pairs"}
    if " sd3" in name:
        model |= {"family": "stable-diffusion-3", "path": str(root / "sd3"), "max_sequence_length": 10}
        data["resolution"] = 16
    training = {
        "steps": STEPS,
        "batch_size": GLOBAL_BATCH // ACCUMULATION // processes,
        "gradient_accumulation_steps": ACCUMULATION,
        **STREAMING[streaming],
        **sections.pop("training", {}),
    }
    return tiny.mapping(
        root,
        streaming.split()[0],
        method=OPTIONS.get(streaming, {}),
        model=model,
        data=data,
        training=training,
        # Below any gradient here: all are clipped.
        optimizer={"max_grad_norm": 1e-3, "lr_scheduler": "constant", "warmup_steps": 0},
        output={"directory": str(root / folder / name), "log_every": 1, "checkpoint_every": STEPS},
        **sections,
    )


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def root(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(template, tmp_path_factory.mktemp("ranks") / "root"))
    tiny.write_data(root / "seven.parquet", pairs=PAIRS)
    models.sd3_pipeline().save_pretrained(root / "sd3", safe_serialization=True)
    return root


@pytest.fixture(scope="module")
def together(root: Path, forks: Server) -> dict[str, list[ranks.Kept]]:
    runs = {name: mapping(root, name, "together", 2) for name in NAMES}
    runs["float32"] = _quantized(root, "together", 2)
    return ranks.in_processes(forks, runs, root / "kept")


def _quantized(root: Path, folder: str, processes: int) -> dict[str, Any]:
    run = mapping(root, "diffusion-dpo lora", folder, processes)
    run["model"]["quantization"] = "nf4"
    run["output"]["directory"] += "-nf4"
    return run


def check_equal(both: list[ranks.Kept], alone: ranks.Kept) -> None:
    """Gradients of every step before and after clipping, metrics, network evaluations and the weights that are left."""
    for rank in both:
        assert len(rank.gradients) == len(alone.gradients) == STEPS
        for gradient, expected in zip(rank.gradients, alone.gradients, strict=True):
            for ours, theirs in zip(gradient, expected, strict=True):
                assert relative(ours, theirs) < 1e-9
            assert float(expected[0].norm()) > 10 * float(expected[1].norm()) > 0  # clipping did something
    result, expected_result = both[0].result, alone.result
    assert result is not None and expected_result is not None and both[1].result is not None, both[0].error
    assert both[1].result.history == []
    for row, wanted in zip(result.history, expected_result.history, strict=True):
        for name in set(row) - TIMED:
            assert row[name] == pytest.approx(wanted[name], rel=1e-9, abs=1e-12), name
    assert result.network_evaluations == expected_result.network_evaluations
    ours, theirs = map(ranks.weights, (both[0], alone))
    assert ours.keys() == theirs.keys()
    assert both[0].moved > 1e-4
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_gradient_of_one(root: Path, together: dict[str, list[ranks.Kept]], name: str) -> None:
    alone = ranks.run_kept(mapping(root, name, "alone", 1))
    check_equal(together[name], alone)
    if name.startswith(("inpo", "smpo")):
        # Processes invert on their own: some pairs arrive earlier, and nobody waits for the others' calls.
        one, other = (kept.inversion_calls for kept in together[name])
        assert one != other


def test_adapters_on_quantized_weights_have_the_gradient_of_one_process(
    root: Path, together: dict[str, list[ranks.Kept]]
) -> None:
    """In float32, in which weights are made whole: at β = 500 the rounding of predictions, 1e-6, moves what scales the
    gradient by up to 1e-3.
    """
    alone = ranks.run_kept(_quantized(root, "alone", 1), StableDiffusionModel)
    for kept in together["float32"]:
        assert len(kept.gradients) == len(alone.gradients) == STEPS, kept.error
        for gradient, expected in zip(kept.gradients, alone.gradients, strict=True):
            assert relative(gradient[0], expected[0]) < 1e-3
            assert float(expected[0].norm()) > 0
