"""A MARS checkpoint: the visual expert alone, and which language model it belongs to."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastinvdpo._extras import require
from fastinvdpo.atomic import atomic_directory
from fastinvdpo.errors import invalid
from fastinvdpo.io import as_json, read_object
from fastinvdpo.models.checkpoints import check_names, tensor_shapes
from fastinvdpo.models.mars.model import MarsConfig, MarsModel

WEIGHTS, DESCRIPTION = "visual_expert.safetensors", "mars.json"
_SAMPLE = 1024  # numbers of each parameter that tell one language model from another


def load_mars(
    path: str | Path,
    config: MarsConfig | None = None,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> MarsModel:
    """A MARS model: from its checkpoint, or with ``config`` a new one on a language model.

    Args:
        path: the directory of :func:`save_mars`; with ``config`` a directory or hub id of the language model.
        base: where the language model of a checkpoint lies now; None: where the checkpoint says.
        dtype: of all weights.
        options: ``revision`` and ``gguf_file`` of a new model's language model, as ``from_pretrained`` takes them; a
            checkpoint remembers them.

    Raises:
        InvalidInput: the checkpoint is not one, or its language model is another than the one it was trained on.
    """
    if config is not None:
        return _on("path", path, config, dtype, options)
    if unknown := sorted(options):
        raise invalid(unknown[0], options[unknown[0]], "stands in the checkpoint", "leave it out, or pass config")
    root = Path(path)
    found = read_object(root / DESCRIPTION, "path")
    if missing := [key for key in ("base", "options", "config", "fingerprint") if key not in found]:
        raise invalid("path", str(root / DESCRIPTION), f"lacks {', '.join(missing)}", "name a MARS checkpoint")
    if base is None and found["base"] is None:
        raise invalid("base", None, "the checkpoint does not say where its language model lies", "pass base")
    model = _on("base", base or found["base"], MarsConfig(**found["config"]), dtype, {} if base else found["options"])
    if fingerprint(model) != found["fingerprint"]:
        problem = "is another language model than the one that the visual expert was trained on"
        raise invalid("base", str(base or found["base"]), problem, "pass the base that the checkpoint was saved with")
    safetensors = require("safetensors.torch", extra="train", purpose="loading a MARS model")
    stored, own = tensor_shapes("path", [root / WEIGHTS]), model.visual_parameters()
    mismatched = [name for name in stored.keys() & own.keys() if stored[name] != tuple(own[name].shape)]
    check_names("path", root / WEIGHTS, own.keys() - stored.keys(), stored.keys() - own.keys(), mismatched)
    tensors = safetensors.load_file(root / WEIGHTS)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return model


def save_mars(model: MarsModel, directory: str | Path) -> None:
    """Write the visual expert, and the name of the language model, which is not written: ``load_mars`` reads it."""
    safetensors = require("safetensors.torch", extra="train", purpose="saving a MARS model")
    origin = model.origin or {"base": None, "options": {}}
    description = {**origin, "config": asdict(model.config), "fingerprint": fingerprint(model)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.visual_parameters().items()}
    with atomic_directory(Path(directory), lambda name: name in (WEIGHTS, DESCRIPTION)) as folder:
        safetensors.save_file(tensors, folder / WEIGHTS)
        (folder / DESCRIPTION).write_text(as_json(DESCRIPTION, description))


def fingerprint(model: MarsModel) -> str:
    """SHA-256 of a sample of every frozen weight, the same for every dtype that holds bfloat16."""
    digest, own = hashlib.sha256(), model.visual_parameters()
    for name, value in model.named_parameters():
        if name not in own:
            flat = value.detach().flatten()
            sample = flat[:: max(1, len(flat) // _SAMPLE)].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(f"{name} {tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _on(argument: str, base: str | Path, config: MarsConfig, dtype: torch.dtype, options: dict[str, Any]) -> MarsModel:
    transformers = require("transformers", extra="train", purpose="loading a language model")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        decoder = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **given)
    except (OSError, ValueError) as error:
        remedy = "give the directory or hub id of a language model"
        raise invalid(argument, str(base), f"cannot be loaded ({error})", remedy) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, **given)
    except (OSError, ValueError):  # a language model without one: texts are given as ids
        tokenizer = None
    return MarsModel(decoder.eval(), config, tokenizer, {"base": str(base), "options": given})
