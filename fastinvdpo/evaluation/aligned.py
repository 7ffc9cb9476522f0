"""What a training left behind, opened beside its base model: a whole model, a network, or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models import checkpoint_files, load_model
from fastinvdpo.models.base import part_files

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel

_NETWORKS = ("unet", "transformer")
_PEFT, _DIFFUSERS = "adapter_config.json", "pytorch_lora_weights.safetensors"


def open_aligned(
    family: str, base: str | Path, aligned: str | Path, *, dtype: torch.dtype = torch.float32
) -> DiffusionModel:
    """The aligned model, on the host.

    ``aligned`` is a directory or hub id of a whole model, a directory with the network alone, or an adapter for
    ``base`` in peft's format (``adapter_config.json``) or diffusers' (``pytorch_lora_weights.safetensors``), which is
    merged into the network's weights.

    Raises:
        InvalidInput: none of these, or one that does not fit ``base``.
    """
    kind = _kind(aligned)
    if kind == "model":
        return load_model(family, aligned, dtype=dtype)
    if kind == "network":
        return load_model(family, base, unet_init=aligned, dtype=dtype)
    model = load_model(family, base, dtype=dtype)
    try:
        _merge_adapter(model, Path(aligned), kind)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        problem = f"does not fit {base} ({error})"
        raise invalid("aligned", str(aligned), problem, "name the model that it was trained on as base") from error
    return model


def aligned_files(family: str, base: str | Path, aligned: str | Path) -> dict[str, list[Path]]:
    """The files of ``aligned`` that :func:`open_aligned` reads, by part."""
    kind = _kind(aligned)
    if kind == "model":
        return checkpoint_files(family, aligned)
    if kind == "network":
        files = checkpoint_files(family, base, unet_init=aligned)
        return {part: files[part] for part in _NETWORKS if part in files}
    return {"adapter": part_files(Path(aligned))}


def _kind(aligned: str | Path) -> Literal["model", "network", "peft", "diffusers"]:
    folder = Path(aligned)
    if (folder / _PEFT).is_file():
        return "peft"
    if (folder / _DIFFUSERS).is_file():
        return "diffusers"
    whole = (folder / "model_index.json").is_file() or (folder / "scheduler").is_dir()
    if folder.is_dir() and not whole and any((folder / part).exists() for part in (*_NETWORKS, "config.json")):
        return "network"
    return "model"  # also a hub id, and what is nothing, which load_model tells about


def _merge_adapter(model: DiffusionModel, folder: Path, kind: str) -> None:
    if kind == "peft":
        peft = require("peft", extra="train", purpose="reading a LoRA adapter")
        model.network = peft.PeftModel.from_pretrained(model.network, str(folder)).merge_and_unload()
        return
    pipeline: Any = getattr(model, "pipeline", None)
    if pipeline is None:
        remedy = "name the adapter in peft's format, or the whole model"
        raise invalid("aligned", str(folder), f"the family {model.family} has no adapters in diffusers' format", remedy)
    # Without the name, diffusers 0.36 refuses where it may not ask the hub, though this is a directory.
    pipeline.load_lora_weights(str(folder), weight_name=_DIFFUSERS)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
