"""Checkpoints: everything a run needs to continue bit for bit, in directories that are complete or absent.

Layout of ``checkpoints/step-00000500/``::

    trainable.safetensors   the trained weights (the adapter alone with LoRA)
    ema.safetensors         their moving averages, with training.ema_decay
    reference.safetensors   the reference, where it follows the policy (its adapter alone with LoRA)
    state.pt                torch.save of plain types: optimizer, schedule, scaler, random generators, metric sums
    meta.json               step, configuration, digests of data and base model, versions, size and digest of every file
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.atomic import atomic_directory, discard
from fastinvdpo.config.explain import explain
from fastinvdpo.config.sections import RunSections, known_keys
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import Digests, differences, sealed, unsealed
from fastinvdpo.methods import METHODS
from fastinvdpo.trainer.contents import compared

_NAME = re.compile(r"step-\d{8,}")  # and not a copy that somebody made
_META = "meta.json"
_WEIGHTS = ("trainable", "ema", "reference")
FILES = (*(f"{name}.safetensors" for name in _WEIGHTS), "state.pt", _META)
_LIBRARIES = ("torch", "numpy", "accelerate", "diffusers", "transformers", "peft", "safetensors")
_VERIFIED = Digests()  # files that this process has written or read
_VERIFIED.settled_ns = 0  # nobody writes into a checkpoint
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
    reference: dict[str, Tensor] | None = None


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``folder/step-N`` atomically, and delete what is older than the newest ``keep`` undamaged ones up to it."""
    safetensors = require("safetensors.torch", extra="train", purpose="writing checkpoints")
    target = folder / f"step-{step:08d}"
    with atomic_directory(target, FILES.__contains__) as temporary:
        for name in _WEIGHTS:
            if (tensors := getattr(checkpoint, name)) is not None:
                safetensors.save_file(_on_host(tensors), temporary / f"{name}.safetensors")
        with (temporary / "state.pt").open("wb") as file:  # a failed write keeps its cause
            torch.save(checkpoint.state, file)
        paths = sorted(temporary.iterdir())
        files = {path.name: path.stat().st_size for path in paths}
        found = {"step": step, "versions": versions(), "files": files, "digests": _digests(paths)}
        (temporary / _META).write_text(json.dumps(sealed({**checkpoint.meta, **found}), indent=2) + "\n")
    kept = 0
    for path in reversed([path for path in _checkpoints(folder) if path.name <= target.name]):
        if kept == keep:
            discard(path, FILES.__contains__)
        else:
            kept += _damage(path) is None
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """The undamaged checkpoints of a run, oldest first."""
    return [path for path in _checkpoints(folder) if _damage(path) is None]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the host. Raises ``InvalidInput`` when it is missing, incomplete or damaged."""
    safetensors = require("safetensors.torch", extra="train", purpose="reading checkpoints")
    problem = _damage(path)
    if problem is not None:
        raise invalid("resume", str(path), problem, "name another checkpoints/step-N directory of the run")
    meta = unsealed(path / _META)
    files = {name: path / f"{name}.safetensors" for name in _WEIGHTS if f"{name}.safetensors" in meta["files"]}
    weights = {name: safetensors.load_file(file) for name, file in files.items()}
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(weights["trainable"], weights.get("ema"), state, meta, weights.get("reference"))


def find_checkpoint(resume: str | Path, folder: Path) -> Path | None:
    """The checkpoint to continue from, or None to start.

    Args:
        resume: ``"auto"`` takes the newest undamaged one of ``folder``, with a warning for every newer one, ``"never"``
            none, anything else is the path of one.

    Raises:
        InvalidInput: ``"never"`` although the folder has checkpoints, which a new run would mix with its own; only
            damaged ones.
    """
    if resume not in ("auto", "never"):
        return Path(resume)
    present = _checkpoints(folder)
    if present and resume == "never":
        remedy = "choose another output.directory, delete that one, or resume"
        raise invalid("resume", "never", f"{folder} holds checkpoints of an earlier run", remedy)
    for path in reversed(present):
        problem = _damage(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is not used: {problem}", stacklevel=2)
    if present:
        remedy = "delete them to start again"
        raise invalid("resume", "auto", f"all {len(present)} checkpoints in {folder} are damaged", remedy)
    return None


def check_same_run(
    meta: Mapping[str, Any], config: Mapping[str, Any], run: Mapping[str, Any], contents: Mapping[str, Any]
) -> None:
    """Raise ``InvalidInput`` naming everything in which a checkpoint and the run that would continue it differ; warn
    about contents that cannot be compared.

    Args:
        meta: the checkpoint's meta.json.
        config: the resolved configuration now.
        run: derived quantities that must agree as well, such as the effective batch and the number of pairs.
        contents: digests of what the run is made of; paths need not agree where these do.
    """
    there, here, unknown, free = compared(meta.get("contents", {}), contents)
    if "contents" not in meta:  # of an earlier version
        there, here, unknown, free = {}, {}, list(contents), []
    before, now = _with_defaults(meta["config"]), _flat(config)
    # A rate that falls towards the last step would have been another one from the start.
    constant = str(now.get("optimizer.lr_scheduler", "constant")).startswith("constant")
    free += [key for key in _FREE if constant or key != "training.steps"]
    bound = ({key: value for key, value in flat.items() if not key.startswith(tuple(free))} for flat in (before, now))
    told = {key: meta["run"].get(key) for key in run}
    different = [*differences(there, here), *sorted(differences(*bound)), *differences(told, run)]
    if different:
        raise InvalidInput(
            f"resume: the checkpoint of step {meta['step']} belongs to another run; different are "
            f"{', '.join(different)}. Remedy: restore those, or choose another output.directory."
        )
    if unknown:
        why = "the checkpoint is of an earlier version" if "contents" not in meta else "one of the two has no digest"
        listed = ", ".join(unknown)
        warnings.warn(f"resume: could not be compared with the checkpoint ({why}): {listed}", stacklevel=2)


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


def _checkpoints(folder: Path) -> list[Path]:
    """Neither copies under other names, nor what a user left in deleted ones."""
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(path for path in named if any((path / name).exists() for name in FILES))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint. Files are read for this, once in a process."""
    try:
        meta = unsealed(path / _META)
        files, digests = dict(meta["files"]), dict(meta.get("digests", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {_META} cannot be read ({type(error).__name__}: {error})"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    found = _digests([path / name for name in digests])
    changed = [name for name, digest in digests.items() if found[name] != digest]
    return f"the content of {' and '.join(changed)} is no longer what was written" if changed else None


def _digests(paths: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor() as threads:
        return dict(zip([path.name for path in paths], threads.map(_VERIFIED.one, paths), strict=True))


def _with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration, flat; keys that were added since have their defaults, keys that are gone are kept."""
    known = {name: section for name, section in stored.items() if name in known_keys(())}
    for name, section in known.items():
        if isinstance(section, Mapping):
            own = (str(section["name"]),) if name == "method" and section.get("name") in METHODS else ()
            keys = known_keys((name, *own))
            known[name] = {key: value for key, value in section.items() if key in keys}
    try:
        return _flat(stored) | _flat(RunSections.model_validate(known).model_dump(mode="python"))
    except ValidationError as error:
        problem = f"resume: the configuration in the checkpoint is of another version: {explain(error, known_keys)}"
        raise InvalidInput(problem) from None


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
