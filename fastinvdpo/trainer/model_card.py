"""The model card, README.md beside a result: from what, on what and how it was trained, and the numbers of the run."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput
from fastinvdpo.trainer.cache import Manifest
from fastinvdpo.trainer.cache_key import Digests
from fastinvdpo.trainer.config import TrainConfig

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel

_PACKAGES = ("fastinvdpo", "torch", "diffusers", "transformers", "peft")


def model_card(
    config: TrainConfig,
    model: DiffusionModel,
    history: Sequence[Mapping[str, Any]],
    *,
    step: int,
    pairs: int,
    digest: str,
    evaluation: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of the card.

    Args:
        history: the logged rows until ``step``; the last one is shown.
        step: optimiser steps that made the model.
        pairs: number of pairs in the data set.
        digest: what :func:`data_digest` gave.
        evaluation: rows of evaluation/history.jsonl; those of the base and of ``step`` are shown, where both are there.
    """
    yaml = require("yaml", extra="train", purpose="writing a model card")
    base, method = config.model.path, config.method.name
    front = {"library_name": "diffusers", "tags": ["diffusion", "dpo", method]}
    if not Path(base).exists():
        front["base_model"] = base
    last = history[-1] if history else {}
    numbers = {name: value for name, value in last.items() if isinstance(value, (int, float))}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {Path(base).name}, aligned by {method}",
        f"`{base}` (family {model.family}) after {step} steps of {method} with fastinvdpo.",
        f"## How to load it\n\n{_usage(config, model)}",
        *_quantization(config),
        f"## Data\n\n{pairs} pairs from `{config.data.path}`. Content: {digest}",
        *_scores(config, evaluation, step),
        f"## Last logged step\n\n{_table(numbers)}",
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(config.as_dict(), sort_keys=False)}```",
        f"## Versions\n\n{', '.join(_versions())}",
    ]
    return "\n\n".join(sections) + "\n"


def data_digest(source: Any, cache: Path | None = None) -> str:
    """SHA-256 over the files that the pairs follow from, or why there is none.

    Args:
        source: the data set's ``PairSource``, if it has one.
        cache: directory of the cache that was trained from; it knows the digest already.
    """
    if cache is not None and (manifest := Manifest.read(cache)) is not None:
        return str(manifest.key.get("data content", "not recorded"))
    if source is None:
        return "not hashed (pairs given in memory)"
    try:
        return Digests().of(source.files())
    except (InvalidInput, OSError) as error:
        return f"not hashed ({error})"


def _usage(config: TrainConfig, model: DiffusionModel) -> str:
    if model.family == "digits":
        return '`fastinvdpo.models.load_model("digits", DIRECTORY)`'
    lines = ["from diffusers import DiffusionPipeline", ""]
    if config.output.pipeline:
        lines.append('pipe = DiffusionPipeline.from_pretrained("DIRECTORY/model")')
    else:
        kind = type(model.network).__name__
        lines[0] += f", {kind}"
        folder = model.network_folder
        lines.append(f'{folder} = {kind}.from_pretrained("DIRECTORY/model", subfolder="{folder}")')
        lines.append(f'pipe = DiffusionPipeline.from_pretrained("{config.model.path}", {folder}={folder})')
    if config.model.lora is not None:
        lines += ["", "# or the adapter on the base model, which can be scaled and switched off"]
        lines.append(f'pipe = DiffusionPipeline.from_pretrained("{config.model.path}")')
        lines.append('pipe.load_lora_weights("DIRECTORY/adapter", weight_name="pytorch_lora_weights.safetensors")')
    return "```python\n" + "\n".join(lines) + "\n```"


def _quantization(config: TrainConfig) -> list[str]:
    kind = config.model.quantization
    below = f"The adapter was trained on the base model with its linear layers in {kind}."
    return [] if kind is None else [f"{below} `model` is the base model as it was, with the adapter merged."]


def _scores(config: TrainConfig, rows: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    """The section with the scores of samples, if there is one."""
    found = {row["step"]: row for row in rows}
    if config.evaluation is None or not {0, step} <= found.keys():
        return []
    of = config.evaluation
    told = (
        f"Up to {of.samples} prompts of `{of.prompts}`, drawn by both models from the same noise in "
        f"{of.num_inference_steps} steps with guidance {of.guidance_scale:g} and seed {of.seed}."
    )
    names = [name for name in found[step] if name != "step"]
    lines = ["| | base | this model |", "|---|---|---|"]
    lines += [f"| {name} | {found[0][name]:.6g} | {found[step][name]:.6g} |" for name in names]
    return [f"## Evaluation\n\n{told}\n\n" + "\n".join(lines)]


def _table(numbers: Mapping[str, float]) -> str:
    if not numbers:
        return "No step was logged."
    rows = [f"| {name} | {value:.6g} |" for name, value in numbers.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
