"""What a training left behind, opened beside its base model: a whole model, a network, or an adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastinvdpo._extras import require
from fastinvdpo.io import read_object
from fastinvdpo.models import DiffusionModel, checkpoint_files, load_model
from fastinvdpo.models.adapters import adapter_file, merge_adapter, read_adapter, trained_on
from fastinvdpo.models.base import Origin, part_files
from fastinvdpo.models.checkpoints import ENCODERS, NETWORKS, weight_files


def open_aligned(
    family: str,
    base: str | Path | Origin,
    aligned: str | Path | Origin,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> DiffusionModel:
    """The aligned model, on the host; ``options`` of :func:`~fastinvdpo.models.load_model`.

    ``aligned`` is a directory or hub id of a whole model, a directory with the network alone, or an adapter for
    ``base``, as :func:`~fastinvdpo.models.adapters.read_adapter` reads it, which is merged into the network's
    weights: into those that it was trained on, where it says that they are not ``base``'s own.

    Raises:
        InvalidInput: none of these, or one that does not fit ``base``.
    """
    base, aligned = Origin.of(base), Origin.of(aligned)
    model, file = load_model(family, _beneath(base, aligned), dtype=dtype, **options), adapter_file(aligned.path)
    if file is not None:
        merge_adapter(model.network, read_adapter(file, model.network, model.translated_lora))
    return model


def aligned_files(family: str, base: Origin, aligned: Origin) -> dict[str, list[Path]]:
    """The files that :func:`open_aligned` reads, by part."""
    files, file = checkpoint_files(family, _beneath(base, aligned)), adapter_file(aligned.path)
    return files if file is None else {**files, "adapter": part_files(file.parent)}


def _beneath(base: Origin, aligned: Origin) -> Origin:
    """The checkpoint that the aligned side is loaded from, before an adapter is merged."""
    file, folder = adapter_file(aligned.path), Path(aligned.path)
    if file is not None:
        return base._replace(unet_init=trained_on(file).get("unet_init", base.unet_init))
    whole = (folder / "model_index.json").is_file() or (folder / "scheduler").is_dir()
    if folder.is_dir() and not whole and any((folder / part).exists() for part in (*NETWORKS, "config.json")):
        return base._replace(unet_init=aligned.path)
    return aligned  # also a hub id, and a place where nothing is, which load_model refuses


def differences_of(base: Origin, aligned: Origin, files: dict[str, dict[str, list[Path]]]) -> list[str]:
    """What a reader of a comparison must know: sides that differ in more than training, or in nothing at all.

    ``files``: of both sides, by part.
    """
    notes = []
    file, ours, theirs = adapter_file(aligned.path), files["base"], files["aligned"]
    network = next(part for part in NETWORKS if part in ours)
    variants = (base.variant, aligned.variant)
    whole = base.config is None and aligned.config is None  # single files have other names of tensors
    if file is None and whole and _same_weights(ours[network], theirs[network], variants):
        notes.append("Both sides have the same network: the comparison is of a model with itself.")
    if file is not None:
        trained = trained_on(file)
        if not _any_change(file):
            notes.append("The adapter changes nothing: its factors are zero.")
        if "unet_init" in trained:
            notes.append(f"The adapter stands on the weights that it was trained on, {trained['unet_init']}.")
        here = Path(base.path).resolve() if Path(base.path).exists() else base.path
        if trained.get("path", str(here)) != str(here):
            notes.append(f"The adapter was trained on {trained['path']}, not on {base.path}.")
    for part in sorted(ours.keys() & theirs.keys()):
        if part == "scheduler":
            one, other = (_schedule(found) for found in (ours[part], theirs[part]))
            different = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
            if different:
                notes.append(f"Each side is sampled by its own schedule; they differ in {', '.join(different)}.")
        elif part in ENCODERS and whole and not _same_weights(ours[part], theirs[part], variants):
            notes.append(f"The sides have different weights of {part}: what it changes is not the alignment's.")
    return notes


def _any_change(adapter: Path) -> bool:
    second = re.compile(r".*(lora_B|lora_up|lora\.up)")
    return any(bool(tensor.any()) for name, tensor in load_file(adapter).items() if second.match(name))


def _same_weights(one: list[Path], other: list[Path], variants: tuple[str | None, str | None]) -> bool:
    """Whether files hold the same numbers; precision, names of files and configurations aside."""
    places: list[dict[str, Any]] = []
    for files, variant in zip((one, other), variants, strict=True):
        chosen, _ = weight_files("model.path", files[0].parent, variant)
        opened = [safe_open(file, "pt") for file in chosen]
        places.append({name: file for file in opened for name in file.keys()})  # noqa: SIM118
    first, second = places
    return first.keys() == second.keys() and all(
        torch.equal(first[name].get_tensor(name).float(), second[name].get_tensor(name).float()) for name in first
    )


def _schedule(files: list[Path]) -> dict[str, Any]:
    """A scheduler's configuration with its class's defaults."""
    diffusers = require("diffusers", extra="train", purpose="comparing schedules")
    found = read_object(next(file for file in files if file.name == "scheduler_config.json"), "model.path")
    kind = getattr(diffusers, str(found.get("_class_name")), None)
    whole = found if kind is None else {**kind.from_config(found).config, "class": kind.__name__}
    return {name: value for name, value in whole.items() if not name.startswith("_")}
