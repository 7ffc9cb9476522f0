"""Checkpoints: everything a run needs to continue bit for bit, in directories that are complete or absent.

Layout of ``checkpoints/step-00000500/``::

    trainable.safetensors   the trained weights (the adapter alone with LoRA)
    ema.safetensors         their moving averages, with training.ema_decay
    state.pt                optimizer, schedule, gradient scaler, random number generators, metric sums (torch.save of
    plain types) meta.json               step, configuration, library versions, data position, and size of every file
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import atomic_directory, differences, discard

_PREFIX = "step-"
_META = "meta.json"
_LIBRARIES = ("torch", "numpy", "accelerate", "diffusers", "transformers", "peft", "safetensors")
# Keys that may differ between a checkpoint and the run that continues it. Batch size and accumulation are compared by
# their product.
_FREE = (
    "training.steps",
    "training.num_workers",
    "training.gradient_checkpointing",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.max_batch",
    "training.gradient_passes",
    "data.cache_gib",
    "cache.path",
    "cache.batch_size",
    "performance.",
    "evaluation",
    "output.",
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. ``state`` and ``meta`` are plain dictionaries, tensors in ``state`` are on the host."""

    trainable: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]
    meta: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``folder/step-N`` atomically, then delete all but the newest ``keep``."""
    safetensors = require("safetensors.torch", extra="train", purpose="writing checkpoints")
    target = folder / f"{_PREFIX}{step:08d}"
    with atomic_directory(target) as temporary:
        safetensors.save_file(_on_host(checkpoint.trainable), temporary / "trainable.safetensors")
        if checkpoint.ema is not None:
            safetensors.save_file(_on_host(checkpoint.ema), temporary / "ema.safetensors")
        torch.save(checkpoint.state, temporary / "state.pt")
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
        meta = {**checkpoint.meta, "step": step, "versions": versions(), "files": files}
        (temporary / _META).write_text(json.dumps(meta, indent=2) + "\n")
    for old in complete_checkpoints(folder)[:-keep]:
        discard(old)
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """The usable checkpoints of a run, oldest first; a damaged one is left out with a warning."""
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(_PREFIX):
            continue
        problem = _damage(path)
        if problem is None:
            found.append(path)
        else:
            warnings.warn(f"checkpoint {path} is not used: {problem}", stacklevel=2)
    return found


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the host. Raises ``InvalidInput`` when it is missing, incomplete or damaged."""
    safetensors = require("safetensors.torch", extra="train", purpose="reading checkpoints")
    problem = _damage(path)
    if problem is not None:
        raise invalid("resume", str(path), problem, "name a checkpoints/step-N directory of a run")
    meta = json.loads((path / _META).read_text())
    trainable = safetensors.load_file(path / "trainable.safetensors")
    ema = safetensors.load_file(path / "ema.safetensors") if "ema.safetensors" in meta["files"] else None
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(trainable, ema, state, meta)


def find_checkpoint(resume: str | Path, folder: Path) -> Path | None:
    """The checkpoint to continue from, or None to start.

    Args:
        resume: ``"auto"`` takes the newest complete one of ``folder``, ``"never"`` none, anything else is the path of
            one.

    Raises:
        InvalidInput: ``"never"`` although the folder has checkpoints, which a new run would mix with its own; only
            damaged ones.
    """
    if resume not in ("auto", "never"):
        return Path(resume)
    present = [path for path in folder.iterdir() if path.name.startswith(_PREFIX)] if folder.is_dir() else []
    if not present:
        return None
    if resume == "never":
        remedy = "choose another output.directory, delete that one, or resume"
        raise invalid("resume", "never", f"{folder} holds checkpoints of an earlier run", remedy)
    complete = complete_checkpoints(folder)
    if not complete:
        remedy = "delete them to start again"
        raise invalid("resume", "auto", f"all {len(present)} checkpoints in {folder} are damaged", remedy)
    return complete[-1]


def check_same_run(meta: Mapping[str, Any], config: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise ``InvalidInput`` naming every key in which a checkpoint and the run that would continue it differ.

    Args:
        meta: the checkpoint's meta.json.
        config: the resolved configuration now.
        run: derived quantities that must agree as well, such as the effective batch and the number of pairs.
    """
    before, now = _flat(meta["config"]), _flat(config)
    # A rate that falls towards the last step would have been another one from the start.
    constant = str(now.get("optimizer.lr_scheduler", "constant")).startswith("constant")
    free = _FREE if constant else tuple(key for key in _FREE if key != "training.steps")
    bound = ({key: value for key, value in flat.items() if not key.startswith(free)} for flat in (before, now))
    different = sorted(differences(*bound))
    for key, value in run.items():
        if meta["run"].get(key) != value:
            different.append(f"{key} ({meta['run'].get(key)} there, {value} here)")
    if different:
        raise InvalidInput(
            f"resume: the checkpoint of step {meta['step']} belongs to another configuration; different are "
            f"{', '.join(different)}. Remedy: restore those values, or choose another output.directory."
        )


def check_versions(meta: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    """Tell about libraries that changed since the checkpoint: the run continues, its last bits may differ."""
    now = versions()
    changed = [f"{name} {old} → {now.get(name)}" for name, old in meta["versions"].items() if now.get(name) != old]
    if changed:
        tell(f"Other versions than the checkpoint's: {', '.join(changed)}; results may differ in the last bits.")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that take part in training; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _damage(path: Path) -> str | None:
    try:
        files = json.loads((path / _META).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {_META} cannot be read ({type(error).__name__}: {error})"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    return None


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
