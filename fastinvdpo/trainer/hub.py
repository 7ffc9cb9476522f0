"""The model card beside a result, and its upload to the Hugging Face hub (``output.push_to_hub``)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinvdpo._extras import require
from fastinvdpo.config import TrainConfig
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import DIGEST, key_hash
from fastinvdpo.models.checkpoints import part_folder
from fastinvdpo.trainer.callbacks import Callback, Run, TrainResult

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel

_PACKAGES = ("fastinvdpo", "torch", "diffusers", "transformers", "peft")


def model_card(
    config: TrainConfig,
    model: DiffusionModel,
    history: Sequence[Mapping[str, Any]],
    sections: Sequence[str],
    step: int,
    pairs: int,
    attempts: Sequence[Mapping[str, Any]],
) -> str:
    """The text of README.md: from what, on what and how the model was trained, and the numbers of the run.

    Args:
        history: the logged rows until ``step``; the last one is shown.
        sections: further sections.
        step: optimizer steps that made the model; pairs: in the data set.
        attempts: what the steps from ``after`` on were made of, in their order: paths, and digests by part.
    """
    hub = require("huggingface_hub", extra="train", purpose="writing a model card")
    yaml = require("yaml", extra="train", purpose="writing a model card")
    base, method = config.model.path, config.method.name
    on_hub = {} if Path(base).exists() else {"base_model": base}
    data = hub.ModelCardData(library_name="diffusers", tags=["diffusion", "dpo", method], **on_hub)
    last = history[-1] if history else {}
    rows = [f"| {name} | {value:.6g} |" for name, value in last.items() if isinstance(value, (int, float))]
    versions = [f"{name} {found}" for name in _PACKAGES if (found := version(name)) is not None]
    content = {name: value for name, value in attempts[-1].items() if name.startswith("data ")}
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(base).name}, aligned by {method}",
        f"`{base}` (family {model.family}) after {step} steps of {method} with fastinvdpo.",
        f"## How to load it\n\n{_usage(config, model)}",
        *_averages(config),
        *_quantization(config),
        f"## Data\n\n{pairs} pairs from `{config.data.path}`. Content: {DIGEST}{key_hash(content)}",
        f"## What it was made of\n\n{_made_of(attempts, step)}",
        *sections,
        "## Last logged step\n\n" + ("\n".join(["| | |", "|---|---|", *rows]) if rows else "No step was logged."),
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(config.as_dict(), sort_keys=False)}```",
        f"## Versions\n\n{', '.join(versions)}",
    ]
    return str(hub.ModelCard("\n\n".join(parts) + "\n"))


def _made_of(attempts: Sequence[Mapping[str, Any]], step: int) -> str:
    """A table of paths and contents, with a column for each part of the run."""
    ends = [attempt["after"] for attempt in attempts[1:]] + [step]
    names = list(dict.fromkeys(name for attempt in attempts for name in attempt if name != "after"))
    told = [f"steps {attempt['after'] + 1} to {end}" for attempt, end in zip(attempts, ends, strict=True)]
    rows = [[name, *(f"`{attempt.get(name, 'not recorded')}`" for attempt in attempts)] for name in names]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [["", *told], ["---"] * (len(told) + 1), *rows])


def version(package: str) -> str | None:
    """The installed version; None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Publishing(Callback):
    """Uploads ``model``, and an adapter into the folder ``adapter``, to the repository ``output.push_to_hub``."""

    def __init__(self, config: TrainConfig) -> None:
        assert config.output.push_to_hub is not None
        self._config, self._repository = config, config.output.push_to_hub
        self._hub = require("huggingface_hub", extra="train", purpose="output.push_to_hub")

    def on_init(self, trainer: Run) -> None:
        try:
            self._hub.utils.validate_repo_id(self._repository)
        except ValueError as error:
            raise self._error(f"is not the name of a repository ({error})", "write OWNER/NAME") from error
        if self._hub.get_token() is None:
            remedy = "log in with `hf auth login`, or set HF_TOKEN"
            raise self._error("needs an account, and none is logged in", remedy)

    def on_end(self, trainer: Run, result: TrainResult) -> None:
        """Raises ``InvalidInput`` when the hub refuses; the files stay."""
        if not trainer.accelerator.is_main_process:
            return
        api, directory, output = self._hub.HfApi(), trainer.directory, self._config.output
        try:
            address = api.create_repo(self._repository, private=output.hub_private, exist_ok=True, repo_type="model")
            for folder, place in (("model", None), ("adapter", "adapter")):
                if (directory / folder).is_dir():
                    api.upload_folder(
                        repo_id=self._repository,
                        folder_path=str(directory / folder),
                        path_in_repo=place,
                        commit_message=f"{folder} of a run of {self._config.method.name}",
                        repo_type="model",
                    )
        except (OSError, ValueError) as error:
            remedy = f"the run is complete; upload it with `hf upload {self._repository} {directory / 'model'}`"
            raise self._error(f"was refused ({error})", remedy) from error
        trainer.say(f"Uploaded to {address}.")

    def _error(self, problem: str, remedy: str) -> InvalidInput:
        return invalid("output.push_to_hub", self._repository, problem, remedy)


def _usage(config: TrainConfig, model: DiffusionModel) -> str:
    if model.family == "digits":
        return '`fastinvdpo.models.load_model("digits", DIRECTORY)`'
    kind, folder, lora = type(model.network).__name__, model.network_folder, config.model.lora is not None
    imported, lines = ["DiffusionPipeline"], ["", ""]
    base = {name: getattr(config.model, name) for name in ("path", "revision", "variant")}

    def pipeline(**parts: str) -> str:
        options = "".join(f', {name}="{value}"' for name, value in base.items() if name != "path" and value is not None)
        given = "".join(f", {name}={value}" for name, value in parts.items())
        return f'pipe = DiffusionPipeline.from_pretrained("{base["path"]}"{options}{given})'

    def network(path: str, inside: bool) -> dict[str, str]:
        """Says how to load the network at ``path``, or below it; gives the part for a pipeline."""
        below = f', subfolder="{folder}"' if inside else ""
        lines.append(f'{folder} = {kind}.from_pretrained("{path}"{below})')
        imported[1:] = [kind]
        return {folder: folder}

    if config.output.pipeline:
        lines.append('pipe = DiffusionPipeline.from_pretrained("DIRECTORY/model")')
    else:
        lines.append(pipeline(**network("DIRECTORY/model", inside=True)))
    if lora:
        lines += ["", "# or the adapter on the base model, which can be scaled and switched off"]
        other = config.model.unet_init
        inside = other is not None and part_folder("model.unet_init", other, folder).name == folder
        lines.append(pipeline(**({} if other is None else network(other, inside))))
        lines.append('pipe.load_lora_weights("DIRECTORY/adapter", weight_name="pytorch_lora_weights.safetensors")')
    lines[0] = f"from diffusers import {', '.join(imported)}"
    return "```python\n" + "\n".join(lines) + "\n```"


def _averages(config: TrainConfig) -> list[str]:
    decay = config.training.ema_decay
    told = f"`model` and `adapter` hold averages of the weights over the steps (EMA, decay up to {decay}), `model-raw`"
    raw = "(the network alone) and `adapter-raw` in the output directory the weights after the last step."
    return [] if decay is None else [f"{told} {raw}"]


def _quantization(config: TrainConfig) -> list[str]:
    kind = config.model.quantization
    below = f"The adapter was trained on the base model with its linear layers in {kind}."
    return [] if kind is None else [f"{below} `model` is the base model as it was, with the adapter merged."]
