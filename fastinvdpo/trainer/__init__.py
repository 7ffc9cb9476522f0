"""Training: configuration, one loop for all methods, checkpoints that resume bit for bit."""

from fastinvdpo._extras import require

for _package in ("numpy", "pydantic", "safetensors", "yaml"):
    require(_package, extra="train", purpose="training")

from fastinvdpo.config import TrainConfig, load_config, presets, to_yaml
from fastinvdpo.trainer.cache_writing import precompute
from fastinvdpo.trainer.callbacks import Callback, TrainResult
from fastinvdpo.trainer.run import train
from fastinvdpo.trainer.trainer import PreferenceTrainer

__all__ = [
    "Callback",
    "PreferenceTrainer",
    "TrainConfig",
    "TrainResult",
    "load_config",
    "precompute",
    "presets",
    "to_yaml",
    "train",
]
