"""One adapter per model family: load a checkpoint, encode images and prompts, predict, save."""

from fastinvdpo.models.base import DiffusionModel
from fastinvdpo.models.loading import checkpoint_files, families, load_model, own_guidance, resolve_family

__all__ = ["DiffusionModel", "checkpoint_files", "families", "load_model", "own_guidance", "resolve_family"]
