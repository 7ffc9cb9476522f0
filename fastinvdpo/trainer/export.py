"""The result of a run: the trained model in its family's own format, with LoRA the adapter beside it, the model card of
both, and their upload to the Hugging Face hub (``output.push_to_hub``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastinvdpo._extras import require
from fastinvdpo.config import TrainConfig
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import DIGEST, key_hash
from fastinvdpo.models import kohya
from fastinvdpo.models.adapters import DIFFUSERS_FILE, merged_copy, merged_into, save_adapter
from fastinvdpo.models.base import TrainedModel
from fastinvdpo.models.checkpoints import part_folder
from fastinvdpo.trainer.callbacks import Callback, Place, Run, TrainResult
from fastinvdpo.trainer.checkpoint import versions
from fastinvdpo.trainer.networks import EMA, Networks

_LOADED = {  # by what a family's results are loaded, where it is not diffusers
    "digits": 'load_model("digits", DIRECTORY)',
    "mars": 'mars.MarsPipeline.load("DIRECTORY/model")',
}


def export_model(
    model: TrainedModel,
    networks: Networks,
    ema: EMA | None,
    place: Place | None,
    *,
    pipeline: bool = True,
    formats: Sequence[str] = ("diffusers",),
    card: str = "",
    suffix: str = "",
) -> None:
    """Write the directory ``model``, which ``load_model`` reads.

    With EMA the averaged weights are written. With LoRA the model has the adapter merged into its weights, and
    ``adapter`` holds it in peft's format and those of ``formats``. Where the network is quantized, the weights are
    those from before. With FSDP2 all processes must call it, and the one that has a ``place`` gets the whole weights.

    Args:
        pipeline: False writes the trained network alone, which ``unet_init`` and diffusers read.
        card: the text of README.md in both. suffix: to the names of both.
    """
    with nullcontext() if ema is None else ema.applied():
        shards = networks.shards
        network = networks.policy_module if shards is None else shards.whole_module(here=place is not None)
        if network is None or place is None:
            return
        if networks.lora:
            with place(f"adapter{suffix}") as temporary:
                save_adapter(network, temporary, model.origin)
                model.save_lora(temporary, network, formats)
                (temporary / "README.md").write_text(card, encoding="utf-8")
            network = merged_copy(network) if model.unquantized is None else merged_into(model.unquantized(), network)
        with place(f"model{suffix}") as temporary:
            if pipeline:
                model.save(temporary, network=network)
            else:
                model.save_network(temporary, network)
            (temporary / "README.md").write_text(card, encoding="utf-8")


def model_card(
    config: TrainConfig,
    model: TrainedModel,
    history: Sequence[Mapping[str, Any]],
    sections: Sequence[str],
    step: int,
    pairs: int,
    attempts: Sequence[Mapping[str, Any]],
) -> str:
    """The text of README.md: from what, on what and how the model was trained, and the numbers of the run.

    Args:
        history: the logged rows until ``step``; the last one is shown. sections: further ones.
        step: optimizer steps that made the model; pairs: in the data set.
        attempts: what the steps from ``after`` on were made of, in their order: paths, and digests by part.
    """
    hub = require("huggingface_hub", extra="train", purpose="writing a model card")
    yaml = require("yaml", extra="train", purpose="writing a model card")
    base, method = config.model.path, config.method.name
    on_hub = {} if Path(base).exists() else {"base_model": base}
    library, tag = ("fastinvdpo", "autoregressive") if config.method.of_tokens else ("diffusers", "diffusion")
    aligned = not config.method.captioned
    tags = [tag, *(["dpo"] if aligned else []), method]
    data = hub.ModelCardData(library_name=library, tags=tags, **on_hub)
    last = history[-1] if history else {}
    rows = [f"| {name} | {value:.6g} |" for name, value in last.items() if isinstance(value, (int, float))]
    installed = [f"{name} {found}" for name, found in versions().items() if found is not None]
    notes = []
    if (decay := config.training.ema_decay) is not None:
        notes.append(
            f"`model` and `adapter` hold averages of the weights over the steps (EMA, decay up to {decay}), "
            "`model-raw` (the network alone) and `adapter-raw` in the output directory the weights after the last step."
        )
    if (kind := config.model.quantization) is not None:
        notes.append(
            f"The adapter was trained on the base model with its linear layers in {kind}. `model` is the base model as "
            "it was, with the adapter merged."
        )
    if (draws := config.cache.draws) is not None:
        notes.append(
            f"Every visit of a pair took one of {draws} draws (timestep, noise) that were fixed before the first step "
            "and stored with the reference's predictions."
        )
    content = {name: value for name, value in attempts[-1].items() if name.startswith("data ")}
    what = "images" if config.method.unpaired else "pairs"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(base).name}, {'aligned' if aligned else 'trained'} by {method}",
        f"`{base}` (family {model.family}) after {step} steps of {method} with fastinvdpo.",
        f"## How to load it\n\n{_usage(config, model)}",
        *notes,
        f"## Data\n\n{pairs} {what} from `{config.data.path}`. Content: {DIGEST}{key_hash(content)}",
        f"## What it was made of\n\n{_made_of(attempts, step)}",
        *sections,
        "## Last logged step\n\n" + ("\n".join(["| | |", "|---|---|", *rows]) if rows else "No step was logged."),
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(config.as_dict(), sort_keys=False)}```",
        f"## Versions\n\n{', '.join(installed)}",
    ]
    return str(hub.ModelCard("\n\n".join(parts) + "\n"))


def _made_of(attempts: Sequence[Mapping[str, Any]], step: int) -> str:
    """A table of paths and contents, with a column for each part of the run."""
    ends = [attempt["after"] for attempt in attempts[1:]] + [step]
    names = list(dict.fromkeys(name for attempt in attempts for name in attempt if name != "after"))
    heads = [f"steps {attempt['after'] + 1} to {end}" for attempt, end in zip(attempts, ends, strict=True)]
    rows = [[name, *(f"`{attempt.get(name, 'not recorded')}`" for attempt in attempts)] for name in names]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [["", *heads], ["---"] * (len(heads) + 1), *rows])


def _usage(config: TrainConfig, model: TrainedModel) -> str:
    if model.family in _LOADED:
        return f"`fastinvdpo.models.{_LOADED[model.family]}`"
    kind, folder, source, lines = type(model.network).__name__, model.network_folder, config.model, list[str]()
    options = {"revision": source.revision, "variant": source.variant, "config": source.config}
    opener = "DiffusionPipeline.from_pretrained"
    if source.config is not None:
        opener = f"{type(getattr(model, 'pipeline', None)).__name__}.from_single_file"
    base = f'"{source.path}"' + "".join(f', {name}="{value}"' for name, value in options.items() if value is not None)
    other = source.unet_init if source.lora is not None else None
    imported = ["DiffusionPipeline", *([kind] if other is not None or not config.output.pipeline else [])]

    def with_network(path: str, *, inside: bool) -> None:
        below = f', subfolder="{folder}"' if inside else ""
        lines.append(f'{folder} = {kind}.from_pretrained("{path}"{below})')
        lines.append(f"pipe = {opener}({base}, {folder}={folder})")

    if config.output.pipeline:
        lines.append('pipe = DiffusionPipeline.from_pretrained("DIRECTORY/model")')
    else:
        with_network("DIRECTORY/model", inside=True)
    if source.lora is not None:
        lines += ["", "# or the adapter on the base model, which can be scaled and switched off"]
        if other is None:
            lines.append(f"pipe = {opener}({base})")
        else:
            with_network(other, inside=part_folder("model.unet_init", other, folder).name == folder)
        file = DIFFUSERS_FILE if "diffusers" in config.output.formats else kohya.FILE
        lines.append(f'pipe.load_lora_weights("DIRECTORY/adapter", weight_name="{file}")')
        if "kohya" in config.output.formats:
            lines.append(f"# DIRECTORY/adapter/{kohya.FILE} goes into the folder for LoRA of ComfyUI or Forge")
    names = [name for name in (*imported, opener.split(".")[0]) if any(f"{name}." in line for line in lines)]
    return "\n".join(["```python", f"from diffusers import {', '.join(dict.fromkeys(names))}", "", *lines, "```"])


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
