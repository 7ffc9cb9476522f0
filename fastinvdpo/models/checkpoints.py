"""Where a Stable Diffusion checkpoint comes from: a diffusers directory or a hub id, always as safetensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.models.base import cast_weights, part_files

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# What training needs only to encode pictures and prompts.
_FROZEN_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_NOT_FOUND = "give a directory in diffusers' format or the id of a hub repository that holds safetensors files"
# Configuration entries that must agree for one UNet to take the place of another.
_UNET_INTERFACE = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "class_embed_type",
)


def location(argument: str, path: str | Path) -> str:
    """The path or hub id as diffusers wants it. Raises ``InvalidInput`` for a single file or a missing path."""
    text = str(path)
    if Path(text).is_dir():
        return text
    if Path(text).is_file():
        remedy = "convert it with diffusers' from_single_file and save_pretrained, and name that directory"
        raise invalid(argument, text, "is a single file, not a diffusers directory", remedy)
    if not _HUB_ID.fullmatch(text):
        raise invalid(argument, text, "does not exist", _NOT_FOUND)
    return text


def load_pipeline(
    path: str | Path,
    *,
    unet_init: str | Path | None,
    vae: str | Path | None,
    revision: str | None,
    variant: str | None,
    dtype: torch.dtype,
    frozen_parts: bool = True,
) -> Any:
    """The diffusers pipeline of SD 1.x, 2.x or SDXL with every part but the safety checker, on the CPU.

    The VAE is read in float32 (SDXL's overflows in float16), everything else as ``dtype``. Without ``frozen_parts`` the
    VAE, text encoders and tokenizers are None.
    """
    diffusers = require("diffusers", extra="train", purpose="loading a Stable Diffusion model")
    require("transformers", extra="train", purpose="loading a Stable Diffusion model")
    source = location("model.path", path)
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        remedy = f"{_NOT_FOUND}; a model of the demo is of the family digits"
        raise invalid("model.path", source, "holds no model_index.json", remedy)
    with readable_errors("model.path", source):
        index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    name = index.get("_class_name")
    if name not in _PIPELINES:
        raise invalid("model.path", source, f"is a {name}", f"this family is for {' and '.join(_PIPELINES)}")
    replaced: dict[str, Any] = {}
    if name == "StableDiffusionPipeline":
        replaced = {"safety_checker": None, "requires_safety_checker": False}
    if not frozen_parts:
        replaced |= {part: None for part in _FROZEN_PARTS if part in index}
    if unet_init is not None:
        replaced["unet"] = load_part(diffusers.UNet2DConditionModel, "model.unet_init", unet_init, "unet")
        with readable_errors("model.path", source):
            wanted = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet", revision=revision)
        _check_interface(unet_init, replaced["unet"].config, wanted)
    if vae is not None:
        replaced["vae"] = load_part(diffusers.AutoencoderKL, "model.vae", vae, "vae")
    with readable_errors("model.path", source):
        pipeline = getattr(diffusers, name).from_pretrained(
            source, revision=revision, variant=variant, use_safetensors=True, **replaced
        )
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            cast_weights(module, torch.float32 if part == "vae" else dtype)
    return pipeline


def vae_config(path: str | Path, revision: str | None) -> dict[str, Any]:
    """The configuration of a checkpoint's VAE, without its weights."""
    diffusers = require("diffusers", extra="train", purpose="loading a Stable Diffusion model")
    source = location("model.path", path)
    with readable_errors("model.path", source):
        config: dict[str, Any] = diffusers.AutoencoderKL.load_config(source, subfolder="vae", revision=revision)
    return {"latent_channels": 4, "block_out_channels": (64,), **config}


def local_folder(path: str | Path, revision: str | None, variant: str | None) -> Path:
    """The directory of a checkpoint; one of the hub is downloaded if need be."""
    source = location("model.path", path)
    if Path(source).is_dir():
        return Path(source)
    diffusers = require("diffusers", extra="train", purpose="loading a Stable Diffusion model")
    with readable_errors("model.path", source):
        return Path(
            diffusers.DiffusionPipeline.download(source, revision=revision, variant=variant, use_safetensors=True)
        )


def pipeline_files(
    path: str | Path, unet_init: str | Path | None, revision: str | None, variant: str | None
) -> dict[str, list[Path]]:
    """The files of every part of a pipeline; those of ``unet_init`` stand for the UNet where it is given."""
    root = local_folder(path, revision, variant)
    index = root / "model_index.json"
    if not index.is_file():
        raise invalid("model.path", str(path), "holds no model_index.json", _NOT_FOUND)
    parts = [part for part in (*_FROZEN_PARTS, "unet", "scheduler") if (root / part).is_dir()]
    files = {part: part_files(root / part) for part in parts}
    if unet_init is not None:
        own = local_folder(unet_init, None, None)
        files["unet"] = part_files(own / "unet" if (own / "unet").is_dir() else own)
    return {**files, "model_index": [index]}


def copy_other_parts(root: Path, directory: Path) -> None:
    """Copy a checkpoint without UNet and safety checker, as a pipeline that was loaded whole would save it."""
    index = json.loads((root / "model_index.json").read_text())
    if index.pop("safety_checker", None) is not None:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for part in (part for part, kind in index.items() if isinstance(kind, list) and part != "unet"):
        if (root / part).is_dir():
            # model.fp16.safetensors and the like are variants, which are not read.
            kept = [file for file in part_files(root / part) if not re.search(r"\.[^.]+\.safetensors$", file.name)]
            (directory / part).mkdir(parents=True, exist_ok=True)
            for file in kept:
                shutil.copyfile(file, directory / part / file.name)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_part(kind: Any, argument: str, path: str | Path, subfolder: str) -> nn.Module:
    """One model from ``path/subfolder``, or from ``path`` itself when the repository holds nothing else."""
    source = location(argument, path)
    if Path(source).is_dir():
        folder = subfolder if (Path(source) / subfolder).is_dir() else None
        with readable_errors(argument, source):
            return _from_pretrained(kind, source, folder)
    try:
        with readable_errors(argument, source):
            return _from_pretrained(kind, source, subfolder)
    except InvalidInput:
        with readable_errors(argument, source):
            return _from_pretrained(kind, source, None)


def _from_pretrained(kind: Any, source: str, subfolder: str | None) -> nn.Module:
    module: nn.Module = kind.from_pretrained(source, subfolder=subfolder, use_safetensors=True)
    return module


def _check_interface(unet_init: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in _UNET_INTERFACE:
        if found.get(name) != wanted.get(name) and name in wanted:
            problem = f"its {name} is {found.get(name)}, that of the base model's UNet {wanted.get(name)}"
            raise invalid("model.unet_init", str(unet_init), problem, "use a UNet of the same model generation")


@contextmanager
def readable_errors(argument: str, source: str) -> Iterator[None]:
    """Turn what diffusers and the hub client raise for unusable repositories into ``InvalidInput``."""
    try:
        yield
    except InvalidInput:
        raise
    except (OSError, ValueError) as error:
        raise invalid(argument, source, f"cannot be loaded ({error})", _NOT_FOUND) from error
