"""Two processes that share the weights (FSDP2) compute what one process does, and either continues the other's run.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from fastinvdpo.errors import InvalidInput
from fastinvdpo.trainer.opening import check_launch
from tests.trainer import ranks, tiny
from tests.trainer.forked import Server
from tests.trainer.shared_gradients import MOVING, STEPS, check_equal, mapping, root

__all__ = ["root"]  # a fixture

pytestmark = pytest.mark.xdist_group("sharded")  # the runs in two processes are made once

# Inverted by the policy, by the reference with its adapters off, and not at all; the gradient in one part and in many.
NAMES = ["diffusion-dpo", "inpo", "smpo lora", "inversion-dpo", "inversion-dpo lora", "inpo sd3", "smpo sd3 lora"]
AVERAGED = ("diffusion-dpo", "inversion-dpo lora")
EMA = {"ema_decay": 0.5, "gradient_checkpointing": True}


def _runs(root: Path, folder: str, processes: int) -> dict[str, dict[str, Any]]:
    runs = {name: mapping(root, name, folder, processes, training=EMA if name in AVERAGED else {}) for name in NAMES}
    runs["bf16 float32"] = tiny.mapping(
        root,
        "inpo",
        training={"mixed_precision": "bf16", "steps": 2, "batch_size": 2 // processes},
        output={"directory": str(root / folder / "bf16"), "log_every": 1},
    )
    return runs


def _resumed(root: Path, folder: str, steps: int, processes: int) -> dict[str, Any]:
    run = mapping(root, "smpo", folder, processes, training={"ema_decay": 0.5})
    run["training"]["steps"] = steps
    return run


@pytest.fixture(scope="module")
def sharded(root: Path, forks: Server) -> dict[str, list[ranks.Kept]]:
    runs = _runs(root, "sharded", 2)
    ranks.run_kept(_resumed(root, "from one", 1, 1))
    runs["to shards"] = _resumed(root, "from one", 2, 2)
    runs["to one"] = _resumed(root, "from shards", 1, 2)
    runs["broken"] = mapping(root, "inpo", "broken", 2)
    return ranks.in_processes(forks, runs, root / "sharded-kept", "fsdp")


@pytest.mark.parametrize("name", NAMES)
def test_shards_have_the_gradient_of_one_process(root: Path, sharded: dict[str, list[ranks.Kept]], name: str) -> None:
    family = ranks.DoubleTransformer if " sd3" in name else ranks.DoubleModel
    alone = ranks.run_kept(_runs(root, "unsharded", 1)[name], family)
    check_equal(sharded[name], alone)
    if name.startswith(("inpo", "smpo")):
        one, other = (kept.inversion_calls for kept in sharded[name])
        assert one != other
    ours, theirs = (tiny.stored(root / folder / name, STEPS) for folder in ("sharded", "unsharded"))
    for stored, expected in ((ours.trainable, theirs.trainable), (ours.ema or {}, theirs.ema or {})):
        assert stored.keys() == expected.keys()
        for key, value in stored.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11)
    moments, wanted = ours.state["optimizer"]["state"], theirs.state["optimizer"]["state"]
    assert moments.keys() == wanted.keys()
    for index, entry in moments.items():
        for key, value in entry.items():
            torch.testing.assert_close(value, wanted[index][key], rtol=1e-6, atol=1e-12)


def test_policy_and_reference_agree_in_bf16(sharded: dict[str, list[ranks.Kept]]) -> None:
    """Which they would not if the policy's weights alone were rounded on their way."""
    result = sharded["bf16 float32"][0].result
    assert result is not None
    first = result.history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0


def test_shards_and_one_process_continue_each_other(root: Path, sharded: dict[str, list[ranks.Kept]]) -> None:
    whole = ranks.weights(ranks.run_kept(_resumed(root, "whole", 2, 1)))
    from_shards = ranks.run_kept(_resumed(root, "from shards", 2, 1))
    for kept in (from_shards, sharded["to shards"][0]):
        assert len(kept.gradients) == 1  # the step that was left
        for name, value in ranks.weights(kept).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-11)


def test_a_loss_that_is_not_finite_ends_all_processes(sharded: dict[str, list[ranks.Kept]]) -> None:
    """The process that met it asks the network again, alone, to tell what it was."""
    first, other = (kept.error for kept in sharded["broken"])
    assert "The loss of step 1 is not finite" in first and "first in the latents of the winner" in first
    assert "not finite" in other


SUPPORTED = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_offload": None}


@pytest.mark.parametrize(
    ("kind", "plugin", "sections", "message"),
    [
        ("DEEPSPEED", {}, {}, "distributed_type = 'DEEPSPEED'"),
        ("FSDP", {"fsdp_version": 1}, {}, "fsdp_version = 1"),
        ("FSDP", {"activation_checkpointing": True}, {}, "fsdp_activation_checkpointing = True"),
        ("FSDP", {"cpu_offload": CPUOffloadPolicy()}, {}, "fsdp_offload_params = True"),
        ("FSDP", {}, {"optimizer": {"name": "adamw8bit"}}, "optimizer.name = 'adamw8bit'"),
        ("FSDP", {}, {"optimizer": {"name": "adafactor"}}, "optimizer.name = 'adafactor'"),
        ("FSDP", {}, {"model": {"lora": {"rank": 2}, "quantization": "nf4"}}, "model.quantization = 'nf4'"),
        ("FSDP", {}, {"method": {"compat": "released"}}, "method.compat = 'released'"),
        ("FSDP", {}, {"method": MOVING}, "method.reference = 'ema'"),
        ("FSDP", {}, {"method": {"name": "inversion-dpo"}}, "training.max_batch = None"),
    ],
)
def test_what_is_not_supported_says_so(
    tmp_path: Path, kind: str, plugin: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**SUPPORTED, **plugin}))
    accelerator: Any = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), state=state)
    name = "diffusion-dpo" if "name" in sections.get("method", {}) else "inpo"
    with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
        check_launch(tiny.config(tmp_path, name, **sections), accelerator)
    assert "Remedy: " in str(caught.value)


def test_what_is_supported_does_not(tmp_path: Path) -> None:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**SUPPORTED))
    for kind in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
        accelerator: Any = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), state=state)
        check_launch(tiny.config(tmp_path, "inpo"), accelerator)
