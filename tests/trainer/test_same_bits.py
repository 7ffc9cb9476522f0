"""Stopped and resumed, or from a cache: a run ends with the bits of an uninterrupted one, whatever it trains with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastinvdpo.data import write_pairs
from fastinvdpo.errors import InvalidInput
from tests.models import tiny as tiny_models
from tests.trainer import tiny
from tests.trainer.test_likes import write_likes
from tests.trainer.test_masks import write_masked
from tests.trainer.test_optimizers import needs_bitsandbytes
from tests.trainer.test_resume import history

LORA = {"lora": {"rank": 2}}
MOVING = {"name": "linear-dpo", "reference": "ema", "reference_decay": 0.5, "reference_every": 3}
KTO = {"name": "kto", "beta": 200.0}


def in_groups(root: Path) -> dict[str, Any]:
    """Groups of three rows, read one after the other."""
    pq.write_table(pq.read_table(root / "pairs.parquet"), root / "pairs.parquet", row_group_size=3)
    return {"data": {"streaming": True, "shuffle_buffer": 4, "resolution": 8}}


def in_buckets(root: Path) -> dict[str, Any]:
    """Wide, high and square pairs, for Stable Diffusion."""
    rng, rows = np.random.default_rng(3), []
    for i in range(9):
        height, width = [(16, 32), (32, 16), (16, 16)][i % 3]
        both = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(2)]
        rows.append({"jpg_0": both[0], "jpg_1": both[1], "label_0": 1.0, "label_1": 0.0, "caption": "a dog"})
    write_pairs(root / "pairs.parquet", rows)
    tiny_models.sd_pipeline().save_pretrained(root / "sd", safe_serialization=True)
    data = {"resolution": 16, "buckets": {"multiple": 8, "max_aspect": 2.0}}
    return {"model": {"family": "stable-diffusion", "path": str(root / "sd")}, "data": data}


def masked(root: Path) -> dict[str, Any]:
    write_masked(root / "pairs.parquet")
    return {"data": {"masks": True}}


def likes(root: Path) -> dict[str, Any]:
    """Single images; the share of liked ones is drawn."""
    data = {"path": str(write_likes(root / "likes.parquet")), "caption_dropout": 0.3}
    return {"data": data, "method": KTO, "training": {"batch_size": 3, "gradient_accumulation_steps": 2}}


def keeps_its_batch(root: Path, last: dict[str, Any]) -> None:
    training = {"steps": 5, "batch_size": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(InvalidInput, match="pairs in a batch of one bucket"):
        tiny.trained(root, "stopped", **in_buckets(root), training=training)


def beta_fell(root: Path, last: dict[str, Any]) -> None:
    assert 1e3 < last["beta"] < 1e6


def reference_moved(root: Path, last: dict[str, Any]) -> None:
    before, after = (tiny.stored(root / "whole", step).reference for step in (2, 4))
    assert before is not None and after is not None
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


def moments_have_8_bits(root: Path, last: dict[str, Any]) -> None:
    """bitsandbytes wraps what it quantized once more, and leaves tensors below 4096 elements alone."""
    states = tiny.stored(root / "whole", 4).state["optimizer"]["state"].values()
    inner = [next((value for value in state.values() if isinstance(value, dict)), state) for state in states]
    assert {state["state1"].dtype for state in inner} == {torch.uint8, torch.float32}


RESUMED: dict[str, tuple[str, Any, Callable[[Path, dict[str, Any]], None] | None]] = {
    "mapo": ("diffusion-dpo", {"method": {"name": "mapo", "beta": 0.1}}, None),
    "moving reference": ("diffusion-dpo", {"method": MOVING}, reference_moved),
    "moving reference, lora": ("diffusion-dpo", {"method": MOVING, "model": LORA}, reference_moved),
    "alpha-dpo, lora": ("diffusion-dpo", {"method": {"name": "alpha-dpo", "dynamic": True}, "model": LORA}, None),
    "auto beta": ("inpo", {"method": {"beta": 1e6, "auto_beta": 0.2}}, beta_fell),
    "adafactor, lora": ("diffusion-dpo", {"optimizer": {"name": "adafactor"}, "model": LORA}, None),
    "adafactor, channels_last": (
        "diffusion-dpo", {"optimizer": {"name": "adafactor"}, "performance": {"channels_last": True}}, None,
    ),
    "adamw8bit": ("diffusion-dpo", {"optimizer": {"name": "adamw8bit"}}, moments_have_8_bits),
    "quantized, average": (
        "diffusion-dpo", {"model": {**LORA, "quantization": "nf4"}, "training": {"ema_decay": 0.5}}, None,
    ),
    "masks": ("inversion-dpo", masked, None),
    "groups": ("diffusion-dpo", in_groups, None),
    "buckets": ("diffusion-dpo", in_buckets, keeps_its_batch),
    "likes": ("diffusion-dpo", likes, None),
}  # fmt: skip
MARKS = {"adamw8bit": [needs_bitsandbytes]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in RESUMED])
def test_stopped_and_resumed(workspace: Path, name: str) -> None:
    """Weights, reference, averages, optimizer, generators and what was logged. An average every three steps is due
    between the checkpoint and the end, and not at either.
    """
    method, sections, check = RESUMED[name]
    sections = sections(workspace) if callable(sections) else sections
    for folder, steps in (("stopped", 2), ("stopped", 4), ("whole", 4)):
        training = {**sections.get("training", {}), "steps": steps}
        result = tiny.trained(workspace, folder, method, **{**sections, "training": training})
    one, other = (tiny.stored(workspace / folder, 4) for folder in ("stopped", "whole"))
    for part in ("trainable", "ema", "reference", "state"):
        tiny.assert_same(getattr(one, part), getattr(other, part))
    tiny.assert_same(tiny.weights(workspace / "stopped"), tiny.weights(result))
    assert history(workspace / "stopped", [1, 2, 4]) == history(workspace / "whole", [1, 2, 4])
    before = tiny.stored(result.directory, 2)
    assert any(not torch.equal(value, before.trainable[key]) for key, value in other.trainable.items())
    if check is not None:
        check(workspace, result.history[-1])


CACHED: dict[str, tuple[str, Any]] = {
    **{method: (method, {"data": {"caption_dropout": 0.3}}) for method in ("diffusion-dpo", "inpo", "smpo")},
    "masks": ("diffusion-dpo", masked),
    "likes": ("diffusion-dpo", likes),
}


@pytest.mark.parametrize("name", CACHED)
def test_from_a_cache(workspace: Path, name: str, small_shards: None) -> None:
    """Of what does not depend on the policy; tests/trainer/test_cache.py has what the reference computed."""
    method, sections = CACHED[name]
    sections = sections(workspace) if callable(sections) else sections
    sections = {**sections, "training": {"batch_size": 2, "gradient_accumulation_steps": 2, "steps": 4}}
    runs = [
        tiny.trained(workspace, folder, method, cache={"path": path}, output={"log_every": 1}, **sections)
        for folder, path in (("cached", str(workspace / "cache")), ("spot", None))
    ]
    cached, spot = (tiny.weights(run) for run in runs)
    tiny.assert_same(cached, spot)
    assert [row["loss"] for row in runs[0].history] == [row["loss"] for row in runs[1].history]
    assert runs[0].network_evaluations == runs[1].network_evaluations and runs[0].data == runs[1].data
    assert tiny.moved(spot) > 0
