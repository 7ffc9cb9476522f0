"""From a family's name, or a checkpoint alone, to its model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastinvdpo._extras import require
from fastinvdpo.errors import MissingExtra, invalid
from fastinvdpo.io import read_object
from fastinvdpo.models.base import DiffusionModel, Origin
from fastinvdpo.models.checkpoints import model_index
from fastinvdpo.output import MARK

# family name -> (module, class); modules are imported when needed, since they need diffusers.
_FAMILIES = {
    "digits": ("fastinvdpo._examples.digits", "DigitsModel"),
    "stable-diffusion": ("fastinvdpo.models.stable_diffusion", "StableDiffusionModel"),
    "stable-diffusion-3": ("fastinvdpo.models.flow", "StableDiffusion3Model"),
    "flux": ("fastinvdpo.models.flow", "FluxModel"),
    "flux-kontext": ("fastinvdpo.models.editing", "FluxKontextModel"),
    "flux2-klein": ("fastinvdpo.models.flux2", "Flux2KleinModel"),
    "qwen-image": ("fastinvdpo.models.qwen_image", "QwenImageModel"),
    "qwen-image-edit": ("fastinvdpo.models.editing", "QwenImageEditModel"),
    "z-image": ("fastinvdpo.models.z_image", "ZImageModel"),
    "wan": ("fastinvdpo.models.wan", "WanModel"),
    "mars": ("fastinvdpo.models.mars.pipeline", "MarsPipeline"),
}
MARS = "mars"  # no diffusion model
FLOW_FAMILIES = tuple(name for name in _FAMILIES if name not in ("digits", "stable-diffusion", MARS))
# Pipeline class in a checkpoint's model_index.json -> family.
_PIPELINES = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion",
    "StableDiffusionXLImg2ImgPipeline": "stable-diffusion",  # the SDXL refiner
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "flux-kontext",
    "Flux2KleinPipeline": "flux2-klein",
    "QwenImagePipeline": "qwen-image",
    "QwenImageEditPipeline": "qwen-image-edit",
    "QwenImageEditPlusPipeline": "qwen-image-edit",
    "ZImagePipeline": "z-image",
    "WanPipeline": "wan",
}
# Since when diffusers has a family as it is used here, where that is later than the oldest that is supported.
_SINCE = {"flux2-klein": "0.37", "qwen-image": "0.37", "qwen-image-edit": "0.37"}
_RESULTS = ("model", "adapter", "best/model", "best/adapter")  # what a run saves for others
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def families() -> tuple[str, ...]:
    """Names of the families, beside ``"auto"``. :func:`load_model` accepts all but ``"mars"``, the trainer all."""
    return tuple(_FAMILIES)


def resolve_family(family: str, path: str | Path | Origin, revision: str | None = None) -> str:
    """``family``, or for ``"auto"`` the one that the checkpoint is of, inferred from its model_index.json, that of
    ``Origin.config`` for a single file.

    A directory without one, but with a UNet and a scheduler, is of ``digits``, one with mars.json of ``mars``. Raises
    ``InvalidInput`` where nothing can be inferred.
    """
    origin = Origin.of(path)
    if not str(origin.path or "").strip():
        raise invalid("model.path", origin.path, "is empty", "name a directory or a hub id")
    if family != "auto":
        if family not in _FAMILIES:
            known = f"choose auto, or one of {', '.join(_FAMILIES)}"
            raise invalid("model.family", family, "is not a known model family", known)
        return family
    root = Path(origin.path)
    if (root / "mars.json").is_file():
        return MARS
    if (root / "scheduler" / "scheduler_config.json").is_file() and not (root / "model_index.json").is_file():
        return "digits"
    name = model_index(origin if revision is None else origin._replace(revision=revision)).get("_class_name")
    if name not in _PIPELINES:
        raise invalid("model.path", str(origin.path), f"is a {name}", f"supported are {', '.join(_PIPELINES)}")
    return _PIPELINES[name]


def family_class(family: str) -> Any:
    """The class of a family. Raises ``MissingExtra`` where a package that it needs is not installed, or too old."""
    if since := _SINCE.get(family):
        found = require("diffusers", extra="train", purpose=f"a model of the family {family}").__version__
        if [int(part) for part in found.split(".")[:2]] < [int(part) for part in since.split(".")]:
            needed = f"the family {family} needs diffusers {since} or later, and {found} is installed"
            raise MissingExtra(f"{needed}. Remedy: pip install 'diffusers>={since}'.")
    module_name, class_name = _FAMILIES[family]
    return getattr(importlib.import_module(module_name), class_name)


def load_model(
    family: str,
    path: str | Path | Origin,
    *,
    dtype: torch.dtype = torch.float32,
    frozen_parts: bool = True,
    **options: Any,
) -> DiffusionModel:
    """Load a model of the named family. Weights fit the configuration exactly, or the load fails.

    Args:
        family: one of :func:`families`, or ``"auto"``: inferred from the checkpoint.
        path: directory of the model, or for all but ``digits`` also a Hugging Face hub id, or a single ``.safetensors``
            file of SD 1.x, SDXL, SD3 or FLUX.1.
        dtype: storage type of network and text encoders; a VAE and the noise schedule never go below float32.
        frozen_parts: False leaves text encoders and VAE on the disk: the model predicts and saves, and cannot encode
            or decode.
        options: None is as if it were not given. ``unet_init``: directory or hub id with other weights of the UNet or
            transformer to start from (a supervised fine-tuned UNet, say). ``revision``: branch, tag or commit on the
            hub. ``variant``: file variant such as ``"fp16"``. ``config``: directory in diffusers' format that says what
            a single file holds. Some families also know ``vae``: path or hub id of another VAE; ``zero_terminal_snr``
            (SD, SDXL): rescale the noise schedule to end in pure noise, or leave it; ``resolution`` (flow matching):
            side of the images in pixels, which some noise schedules depend on; ``max_sequence_length`` (flow matching):
            tokens of a prompt, of SD3 and FLUX.1 T5's; ``guidance_embedding`` (FLUX.1); ``frames`` (Wan): of a video.

    Raises:
        InvalidInput: unknown family, missing files, a checkpoint of another kind, or an option it does not have.
        MissingExtra: diffusers or transformers is not installed.
    """
    model: DiffusionModel = load_any(
        _diffusion(family, _origin(path, options)[0]), path, dtype, frozen_parts, **options
    )
    return model


def load_any(
    family: str,
    path: str | Path | Origin,
    dtype: torch.dtype = torch.float32,
    frozen_parts: bool = True,
    **options: Any,
) -> Any:
    """:func:`load_model` for every family, a ``TrainedModel``. Options of ``mars``: ``vae``, the VQ tokenizer,
    ``max_sequence_length`` and ``low_resolution``.
    """
    origin, given = _origin(path, options)
    family = resolve_family(family, origin)
    if dtype not in _DTYPES:
        raise invalid("dtype", dtype, "is not a floating-point type models are kept in", f"use one of {_DTYPES}")
    check_options(family, {"vae": origin.vae, **given})
    return family_class(family).load(origin, dtype=dtype, frozen_parts=frozen_parts, **given)


def check_options(family: str, options: Mapping[str, Any]) -> None:
    """Raise ``InvalidInput`` for an option, other than None, that the family does not have."""
    known = family_class(family).options
    for name, value in options.items():
        if value is not None and name not in known:
            section = "data" if name in ("frames", "resolution") else "model"
            problem, remedy = f"means nothing for a model of the family {family}", ", ".join(known) or "none"
            raise invalid(f"{section}.{name}", value, problem, f"set it to null; options here: {remedy}")


def checkpoint_files(family: str, path: str | Path | Origin, **options: Any) -> dict[str, list[Path]]:
    """The files that :func:`load_model` reads, by part: ``unet``, ``scheduler``, ``vae``, ``text_encoder``, …

    Weights in other formats than safetensors are left out. Files of a hub repository are downloaded if need be.
    Raises ``InvalidInput`` where nothing is found.
    """
    origin, _ = _origin(path, options)
    files: dict[str, list[Path]] = family_class(_diffusion(family, origin)).files(origin)
    return files


def own_guidance(family: str, files: Mapping[str, Sequence[Path]]) -> float:
    """The guidance scale that a checkpoint's own pipeline samples with by default, by :func:`checkpoint_files`."""
    kind = family_class(family)

    def read(part: str, name: str) -> dict[str, Any]:
        return next((read_object(file, "model.path") for file in files.get(part, ()) if file.name == name), {})

    index = read("model_index", "model_index.json")
    scheduler, network = read("scheduler", "scheduler_config.json"), read(kind.network_folder, "config.json")
    scale: float = kind.guidance_by_default(index, scheduler, network)
    return scale


def _diffusion(family: str, origin: Origin) -> str:
    """The family. Raises ``InvalidInput`` where it is none of diffusion models."""
    found = resolve_family(family, origin)
    if found == MARS:
        problem = "is no diffusion model, which this needs"
        raise invalid("model.family", found, problem, "train it, or use fastinvdpo.models.mars, as docs/mars.md shows")
    return found


def _origin(path: str | Path | Origin, options: Mapping[str, Any]) -> tuple[Origin, dict[str, Any]]:
    """The checkpoint, and the options that do not belong to it."""
    given = {name: value for name, value in options.items() if value is not None}
    own = {name: given.pop(name) for name in Origin._fields if name in given}
    origin = Origin.of(path)._replace(**own)
    run = Path(origin.path)
    results = [str(run / name) for name in _RESULTS if (run / name).is_dir()]
    if results and (run / MARK).is_file() and not (run / "scheduler").is_dir():
        raise invalid("model.path", str(run), "is the output directory of a run", f"name {' or '.join(results)}")
    return origin, given
