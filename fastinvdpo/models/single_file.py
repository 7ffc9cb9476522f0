"""Single-file checkpoints: the ``.safetensors`` files of SD 1.x, SDXL, SD3 and FLUX.1 that other tools read.

Each part is read by diffusers' own loader of such files, which leaves out what it does not know, and empty what it does
not find. Here both are errors: the loader is first given numbers in the place of tensors, which costs no memory and
shows what becomes of each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models.base import Origin
from fastinvdpo.models.checkpoints import (
    check_names,
    described,
    held_parts,
    model_index,
    part_class,
    readable_errors,
    single_file,
    tensor_shapes,
)

# The types of diffusers' infer_diffusers_model_type, and the word that starts the name of their pipeline class. It says
# v1 of what it does not recognize, too, which is left to the names of the tensors.
_KINDS = {
    **{"v1": "", "xl_base": "StableDiffusionXL", "xl_refiner": "StableDiffusionXL", "sd3": "StableDiffusion3"},
    **{"sd35_medium": "StableDiffusion3", "sd35_large": "StableDiffusion3", "flux-dev": "Flux", "flux-schnell": "Flux"},
}
# What published files hold beside the weights of a pipeline: averages, tables of the noise schedule, and CLIP's; SD3's
# projection of its first encoder is the identity, which the loader puts there.
_NO_WEIGHTS = re.compile(
    r"text_encoders\.clip_l\.transformer\.text_projection\.weight|model_ema\..*|denoiser\..*|"
    r"(.*\.)?(position_ids|logit_scale)|betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|"
    r"logvar|global_step"
)


class _InPlace(TorchFunctionMode):
    """Inside, what is loaded is neither copied nor converted, and a parameter that gets nothing stays empty."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and len(args[0]) == 1:
            return args[0][0]
        unchanged = func in (Tensor.contiguous, Tensor.clone, Tensor.to)
        made = unchanged and isinstance(args[0], nn.Parameter) and not args[0].is_meta
        return args[0] if unchanged and not made else func(*args, **(kwargs or {}))


def load_parts(
    origin: Origin, names: Sequence[str], denoiser: str, *, dtype: torch.dtype, frozen_parts: bool = True
) -> dict[str, nn.Module] | None:
    """The parts of a pipeline whose weights a single file holds, on the CPU; None where a checkpoint is none.

    Arguments are those of ``load_pipeline``. Raises ``InvalidInput`` for another kind of file than its configuration,
    and for tensors that are missing, unknown, or of another shape.
    """
    file = single_file(origin)
    if file is None:
        return None
    source, index, shapes = described(origin), model_index(origin, names), tensor_shapes("model.path", [file])
    numbers = dict(enumerate(shapes, start=2))  # the loader puts 0 and 1 where a file has nothing
    numbered = {name: torch.tensor(float(number)).expand(shapes[name]) for number, name in numbers.items()}
    utilities = require("diffusers.loaders.single_file_utils", extra="train", purpose="loading a single file")
    kind = utilities.infer_diffusers_model_type(numbered)
    if kind not in _KINDS or not str(index["_class_name"]).startswith(_KINDS[kind]):
        problem = f"is a file of the type {kind}, which is not that of {source}, a {index['_class_name']}"
        remedy = "name a file of SD 1.x, SDXL, SD3 or FLUX.1, and in model.config a directory of the same kind"
        raise invalid("model.path", str(file), problem, remedy)
    taken = dict[str, set[str]]()
    for part in held_parts(file, index):
        with _InPlace():
            weights = _load(file, source, index, part, numbered, torch.float32).state_dict()
        check_names("model.path", file, [name for name, weight in weights.items() if weight.is_meta])
        values = {int(weight[(0,) * weight.ndim]) for weight in weights.values()}
        taken[part] = {numbers[number] for number in values if number in numbers}
    unknown = shapes.keys() - set[str]().union(*taken.values())
    check_names("model.path", file, unexpected=[name for name in unknown if not _NO_WEIGHTS.fullmatch(name)])
    replaced, found = {denoiser: origin.unet_init, "vae": origin.vae}, dict[str, nn.Module]()
    for part in (part for part in taken if (frozen_parts or part == denoiser) and replaced.get(part) is None):
        # The loader tells kinds of files by names of other parts, which stay numbers.
        tensors = {**numbered, **_tensors(file, taken[part])}
        found[part] = _load(file, source, index, part, tensors, torch.float32 if part == "vae" else dtype)
    return found


def _tensors(file: Path, names: set[str]) -> dict[str, Tensor]:
    safetensors = require("safetensors", extra="train", purpose="reading weights")
    with safetensors.safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def _load(
    file: Path, source: str, index: Mapping[str, Any], part: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """One part, as the ``from_single_file`` of diffusers' pipelines makes it of the tensors of a file."""
    diffusers = require("diffusers", extra="train", purpose="loading a single file")
    loader = require("diffusers.loaders.single_file", extra="train", purpose="loading a single file")
    part_class(source, index, part)  # raises
    library, name = index[part]
    try:
        with readable_errors("model.path", f"{file}, {part}"):
            module: Any = loader.load_single_file_sub_model(
                library_name=library,
                class_name=name,
                name=part,
                checkpoint=dict(tensors),
                pipelines=diffusers.pipelines,
                is_pipeline_module=False,
                cached_model_config_path=source,
                local_files_only=True,
                torch_dtype=dtype,
            )
    except (LookupError, loader.SingleFileComponentError) as error:  # of converters that count on a tensor
        problem = f"holds no {name} of the configuration in {source}: {error}"
        raise invalid("model.path", str(file), problem, "name a file with all weights of the model") from error
    if library == "transformers":
        module.tie_weights()  # T5's embedding, which a file may hold under one of its two names
    stored = {weight.dtype for weight in module.parameters()}
    return (module if stored <= {dtype} else module.to(dtype)).eval()
