"""Checkpoints: everything a run needs to continue bit for bit, in directories that are complete or absent.

Layout of ``checkpoints/step-00000500/``::

    trainable.safetensors   the trained weights (the adapter alone with LoRA)
    ema.safetensors         their moving averages, with training.ema_decay
    reference.safetensors   the reference, where it follows the policy (its adapter alone with LoRA)
    state.pt                torch.save of plain types: optimizer, schedule, scaler, random generators, metric sums
    meta.json               step, configuration, digests of data and base model, versions, size and digest of every file

A run is what it was made of: pairs and base model are compared by content, whatever their paths.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastinvdpo.atomic import atomic_directory, discard
from fastinvdpo.config.explain import explain
from fastinvdpo.config.sections import RunSections, known_keys
from fastinvdpo.data.content import content_at_hand, content_of
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import DIGEST, Digests, differences, key_hash, sealed, unsealed
from fastinvdpo.methods import ALL_METHODS
from fastinvdpo.trainer.cache import PairCache

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config import TrainConfig
    from fastinvdpo.models.base import TrainedModel

_NAME = re.compile(r"step-\d{8,}")  # and not a copy that somebody made
_META = "meta.json"
_WEIGHTS = ("trainable", "ema", "reference")
FILES = (*(f"{name}.safetensors" for name in _WEIGHTS), "state.pt", _META)
_LIBRARIES = ("fastinvdpo", "torch", "numpy", "accelerate", "diffusers", "transformers", "peft", "safetensors")
_VERIFIED = Digests()  # files that this process has written or read
_VERIFIED.settled_ns = 0  # nobody writes into a checkpoint
# Keys that may differ between a checkpoint and the run that continues it. Batch size and accumulation are compared by
# their product.
_FREE = (
    *("training.steps", "training.num_workers", "training.gradient_checkpointing", "training.batch_size"),
    *("training.gradient_accumulation_steps", "training.max_batch", "training.gradient_passes"),
    *("data.cache_gib", "cache.path", "cache.batch_size", "model.offload", "performance.", "evaluation", "output."),
)
# Keys of the configuration that say where something is, and what is there; they count where that is not known.
_PLACES = {
    "data": ("path", "format", "columns", "split", "revision", "subset", "image_root", "rank_pairs"),
    "model": ("path", "family", "unet_init", "vae", "revision", "variant", "config"),
}
# Settings of a VAE that its latents depend on besides its weights.
_SETTINGS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. ``state`` and ``meta`` are plain dictionaries, tensors in ``state`` are on the host."""

    trainable: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]
    meta: dict[str, Any]
    reference: dict[str, Tensor] | None = None


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``folder/step-N`` atomically, then :func:`discard_older`."""
    target = folder / f"step-{step:08d}"
    with atomic_directory(target, FILES.__contains__) as temporary:
        for name in _WEIGHTS:
            if (tensors := getattr(checkpoint, name)) is not None:
                on_host = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
                safetensors.torch.save_file(on_host, temporary / f"{name}.safetensors")
        with (temporary / "state.pt").open("wb") as file:  # a failed write keeps its cause
            torch.save(checkpoint.state, file)
        paths = sorted(temporary.iterdir())
        files = {path.name: path.stat().st_size for path in paths}
        found = {"step": step, "versions": versions(), "files": files, "digests": _digests(paths)}
        (temporary / _META).write_text(json.dumps(sealed({**checkpoint.meta, **found}), indent=2) + "\n")
    discard_older(target, keep)
    return target


def discard_older(newest: Path, keep: int) -> None:
    """Delete the checkpoints beside ``newest`` that are older than the newest ``keep`` undamaged ones up to it."""
    kept = 0
    for path in reversed([path for path in _checkpoints(newest.parent) if path.name <= newest.name]):
        if kept == keep:
            discard(path, FILES.__contains__)
        else:
            kept += _damage(path) is None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the host. Raises ``InvalidInput`` when it is missing, incomplete or damaged."""
    if (problem := _damage(path)) is not None:
        raise invalid("resume", str(path), problem, "name another checkpoints/step-N directory of the run")
    meta = unsealed(path / _META)
    files = {name: path / f"{name}.safetensors" for name in _WEIGHTS if f"{name}.safetensors" in meta["files"]}
    weights = {name: safetensors.torch.load_file(file) for name, file in files.items()}
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(weights["trainable"], weights.get("ema"), state, meta, weights.get("reference"))


def find_checkpoint(resume: str | Path, folder: Path) -> Path | None:
    """The checkpoint to continue from, or None to start.

    ``resume``: ``"auto"`` takes the newest undamaged one of ``folder``, with a warning for every newer one, ``"never"``
    none, anything else is the path of one. Raises ``InvalidInput`` for ``"never"`` although the folder has checkpoints,
    which a new run would mix with its own, and where all are damaged.
    """
    if resume not in ("auto", "never"):
        return Path(resume)
    present = _checkpoints(folder)
    if present and resume == "never":
        remedy = "choose another output.directory, delete that one, or resume"
        raise invalid("resume", "never", f"{folder} holds checkpoints of an earlier run", remedy)
    for path in reversed(present):
        if (problem := _damage(path)) is None:
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
        meta: the checkpoint's meta.json. config: the resolved configuration now.
        run: derived quantities that must agree as well, such as the effective batch and the number of pairs.
        contents: digests of what the run is made of; paths need not agree where these do.
    """
    earlier, stored = "contents" not in meta, meta.get("contents", {})
    names = dict.fromkeys([*stored, *contents])
    unknown = [name for name in names if earlier or "not hashed" in f"{stored.get(name)} {contents.get(name)}"]
    there, here = ({name: side[name] for name in side if name not in unknown} for side in (stored, contents))
    before, now = _with_defaults(meta["config"]), _flat(config)
    # A rate that falls towards the last step would have been another one from the start.
    constant = str(now.get("optimizer.lr_scheduler", "constant")).startswith("constant")
    free = [key for key in _FREE if constant or key != "training.steps"]
    for kind, keys in _PLACES.items():
        own = [name for name in names if name.startswith(f"{kind} ")]
        if own and all(name in there and there[name] == here.get(name) for name in own):
            free += [f"{kind}.{key}" for key in keys]
    bound = ({key: value for key, value in flat.items() if not key.startswith(tuple(free))} for flat in (before, now))
    derived = {key: meta["run"].get(key) for key in run}
    different = [*differences(there, here), *sorted(differences(*bound)), *differences(derived, run)]
    if different:
        raise InvalidInput(
            f"resume: the checkpoint of step {meta['step']} belongs to another run; different are "
            f"{', '.join(different)}. Remedy: restore those, or choose another output.directory."
        )
    if unknown:
        why = "the checkpoint is of an earlier version" if earlier else "one of the two has no digest"
        problem = f"could not be compared with the checkpoint ({why}): {', '.join(unknown)}"
        warnings.warn(f"resume: {problem}", stacklevel=2)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``name old → new`` for every entry that changed since the checkpoint; empty where none did."""
    return ", ".join(f"{name} {old} → {now.get(name)}" for name, old in before.items() if now.get(name) != old)


def versions() -> dict[str, str | None]:
    """Versions of Python and of what takes part in training; None where one is not installed."""
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
            own = (str(section["name"]),) if name == "method" and section.get("name") in ALL_METHODS else ()
            known[name] = {key: section[key] for key in section if key in known_keys((name, *own))}
    try:
        return _flat(stored) | _flat(RunSections.model_validate(known).model_dump(mode="python"))
    except ValidationError as error:
        problem = f"resume: the configuration in the checkpoint is of another version: {explain(error, known_keys)}"
        raise InvalidInput(problem) from None


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def contents_of(
    config: TrainConfig, model: TrainedModel, pairs: Any, accelerator: Accelerator, remembered: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Digests of pairs and model, made by the first process for all; and what need not be read again the next time,
    which is then ``remembered``. Images are left out without ``output.data_hash``.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        digests, source = Digests(remembered), getattr(pairs, "source", None)
        if isinstance(pairs, PairCache):
            of_pairs = pairs.contents
        elif source is None:
            of_pairs = content_at_hand(pairs)
        else:
            of_pairs = content_of(source, digests, images=config.output.data_hash)
        found = [{**of_pairs, **_of_model(model)}, digests.remembered]
    broadcast_object_list(found)
    return found[0], found[1]


def attempts(meta: Mapping[str, Any], config: TrainConfig, contents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each part of a run saw, as the checkpoint tells and for the steps ``after`` it; ``meta`` of a new run is
    empty.
    """
    before: list[dict[str, Any]] = meta.get("attempts", [{"after": 0}] if meta else [])
    now = {"data.path": config.data.path, "model.path": config.model.path, **contents}
    same = bool(before) and {**before[-1], "after": 0} == {**now, "after": 0}
    return before if same else [*before, {"after": meta.get("step", 0), **now}]


def _of_model(model: TrainedModel) -> dict[str, Any]:
    """Digests of the network as it is now, of the noise schedule, and of the frozen parts that are loaded."""
    schedule = model.schedule
    found = {"model family": model.family, "model network": _of_tensors(model.network.state_dict())}
    if schedule is None:
        return found | frozen_contents(model)
    levels = {"alphas": schedule.alphas_cumprod, "sigmas": schedule.sigmas}
    kinds = [schedule.prediction_type, schedule.steps_offset, schedule.set_alpha_to_one]
    return found | {"model schedule": _of_tensors(levels, kinds)} | frozen_contents(model)


def frozen_contents(model: TrainedModel) -> dict[str, Any]:
    """Digests of text encoders, tokenizers and VAE, by their classes."""
    found: dict[str, Any] = {}
    seen: Counter[str] = Counter()
    components: Mapping[str, Any] = getattr(getattr(model, "pipeline", model), "components", {})
    tokenizers = [part for part in components.values() if hasattr(part, "get_vocab")]
    for part in (*model.frozen_modules(), *tokenizers):
        name = type(part).__name__
        seen[name] += 1
        if isinstance(part, nn.Module):
            config: Any = getattr(part, "config", None) or {}
            digest = _of_tensors(part.state_dict(), [getattr(config, key, None) for key in _SETTINGS])
        else:
            digest = DIGEST + key_hash(part.get_vocab())
        found[f"model {name}{'' if seen[name] == 1 else f' {seen[name]}'}"] = digest
    return found


def _of_tensors(tensors: Mapping[str, Any], settings: Sequence[Any] = ()) -> str:
    """Of names, types, shapes and values."""

    def one(name: str) -> str:
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            return f"{name} {tensor!r}"
        plain = tensor.detach().to("cpu").contiguous()
        digest = hashlib.sha256(plain.flatten().view(torch.uint8).numpy().data).hexdigest()
        return f"{name} {plain.dtype} {tuple(plain.shape)} {digest}"

    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter lock
        lines = [*threads.map(one, tensors), repr(list(settings))]
    return DIGEST + hashlib.sha256("\n".join(lines).encode()).hexdigest()
