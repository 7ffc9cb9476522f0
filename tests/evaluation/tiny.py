"""Two tiny pipelines, one brighter than the other, and a scorer that can be computed by hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.models import tiny

PROMPTS = [f"a {word}" for word in ("zero", "one", "two", "three", "four", "five", "six")]


def write_models(root: Path) -> tuple[Path, Path]:
    """``(base, brighter)``: a network that finds less noise in one channel, with which the decoder is brighter."""
    base = tiny.write_model(root / "model")
    return base, write_network(root / "brighter", base)


def write_network(directory: Path, base: Path, shift: float = -1.0) -> Path:
    from fastinvdpo.models import load_model

    model = load_model("auto", base, frozen_parts=False)
    with torch.no_grad():
        model.network.conv_out.bias[2].add_(shift)  # type: ignore[union-attr, operator]
    shutil.copytree(base, directory)
    model.save_network(directory, model.network)
    return directory


def brightness(images: Sequence[Any], captions: Sequence[str]) -> list[float]:
    return [float(np.asarray(image.convert("L"), dtype=np.float64).mean()) for image in images]


def recomputed(root: Path, side: str, count: int = len(PROMPTS)) -> np.ndarray:
    """The brightness of the pictures that an evaluation left in ``root``."""
    pictures = [Image.open(root / side / f"{place:05d}.png") for place in range(count)]
    return np.array(brightness(pictures, PROMPTS), np.float32).astype(np.float64)  # as a scorer's scores
