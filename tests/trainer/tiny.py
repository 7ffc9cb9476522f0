"""A small Stable Diffusion and a small set of pairs, on disk, and configurations that use them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from fastinvdpo.data import write_pairs
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.trainer import PreferenceTrainer, TrainConfig, TrainResult, train
from fastinvdpo.trainer.checkpoint import Checkpoint, load_checkpoint
from tests.models import tiny

write_model = tiny.write_model
WORDS = ("zero", "one", "two", "three")


def unet() -> UNet2DConditionModel:
    """That of :func:`write_model`."""
    return tiny.pixel_pipeline().unet


def write_data(path: Path, *, pairs: int = 10, scores: bool = True) -> Path:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(pairs):
        images = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(2)]
        row: dict[str, Any] = {
            "jpg_0": images[0],
            "jpg_1": images[1],
            "label_0": i % 2,
            "label_1": 1 - i % 2,
            "caption": f"a {WORDS[i % len(WORDS)]}",
        }
        if scores:
            row |= {"score_0": 0.2 + 0.01 * i, "score_1": 0.25}
        rows.append(row)
    write_pairs(path, rows)
    return path


METHODS: dict[str, dict[str, Any]] = {
    "diffusion-dpo": {"name": "diffusion-dpo"},
    "inpo": {"name": "inpo", "num_inference_steps": 3},
    "smpo": {"name": "smpo", "num_inference_steps": 2},
    "inversion-dpo": {"name": "inversion-dpo", "num_inference_steps": 3},
}


def mapping(root: Path, name: str = "diffusion-dpo", /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration of six steps of two pairs on the files in ``root``; ``sections`` are merged into it."""
    base: dict[str, dict[str, Any]] = {
        "method": {**METHODS[name], "beta": 500.0},
        "model": {"family": "stable-diffusion", "path": str(root / "model")},
        "data": {"path": str(root / "pairs.parquet")},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "training": {"steps": 6, "batch_size": 2},
        "output": {"directory": str(root / "run"), "checkpoint_every": 2, "log_every": 2, "tensorboard": False},
    }
    return {section: {**base.get(section, {}), **sections.get(section, {})} for section in {**base, **sections}}


def config(root: Path, name: str = "diffusion-dpo", /, **sections: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_mapping(mapping(root, name, **sections))


def trained(root: Path, folder: str = "run", name: str = "diffusion-dpo", /, **sections: Any) -> TrainResult:
    """A run into ``root / folder``."""
    output = {"directory": str(root / folder), **sections.pop("output", {})}
    return train(config(root, name, output=output, **sections), progress=False)


def train_model(config: TrainConfig, model: Any, pairs: Any, **options: Any) -> TrainResult:
    """Train a model and pairs at hand."""
    return PreferenceTrainer(model, config.method, pairs, config, **{"progress": False, **options}).train()


def weights(run: TrainResult | Path) -> dict[str, torch.Tensor]:
    """Of the model that a run wrote; of a run by its directory."""
    directory = run if isinstance(run, Path) else run.directory
    return load_file(directory / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def stored(directory: Path, step: int = 6) -> Checkpoint:
    """The checkpoint of a run after a step."""
    return load_checkpoint(directory / "checkpoints" / f"step-{step:08d}")


def assert_same(one: Any, other: Any) -> None:
    """Equal types and values, bit for bit, of nested containers."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def moved(weights: dict[str, torch.Tensor]) -> float:
    """How far a weight has moved from the base model at most."""
    start = unet().state_dict()
    return max(float((value - start[name]).abs().max()) for name, value in weights.items())


class CountedPredictions:
    """Counts the predictions of models from now on, and kills this process when ``count`` reaches ``fatal``."""

    def __init__(self, fatal: int) -> None:
        self.count = 0
        predict = StableDiffusionModel.predict

        def counted(model: StableDiffusionModel, *arguments: Any) -> Any:
            self.count += 1
            if self.count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return predict(model, *arguments)

        StableDiffusionModel.predict = counted  # type: ignore[method-assign]
