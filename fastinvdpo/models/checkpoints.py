"""Checkpoints: where they come from, a diffusers directory, a hub id or a single file (single_file.py), and their
weights, always as safetensors.

Every tensor of a part finds its place, or loading fails with the file and the names.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import read_object
from fastinvdpo.models.base import Origin, part_files

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
NOT_FOUND = "give a directory in diffusers' format or the id of a hub repository that holds safetensors files"
_FILE = re.compile(r"(?P<stem>[^.]+?)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.safetensors")
# What torch.compile, FSDP and activation checkpointing put into names, and what stands before all names of a network
# that was saved inside of something.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("module.", "base_model.model.", "state_dict.", "model.", "ema_model.", "ema.")
NETWORKS = ("unet", "transformer")
# What training needs only to encode images and prompts.
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_FROZEN_PARTS = (*ENCODERS, "processor", "tokenizer", "tokenizer_2", "tokenizer_3")
# What the names of a part's tensors begin with in a single file.
_IN_FILE = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model.", "text_encoders.clip_g."),
    "T5EncoderModel": ("text_encoders.t5xxl.",),
}
# Configuration entries that must agree for one UNet or transformer to take the place of another.
_INTERFACE = (
    *("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "class_embed_type"),
    *("projection_class_embeddings_input_dim", "patch_size", "joint_attention_dim", "pooled_projection_dim"),
    "guidance_embeds",
)


def single_file(origin: Origin) -> Path | None:
    """The file that a checkpoint is; None for a directory or hub id. Raises ``InvalidInput`` for one that is no
    safetensors file, or what does not belong to it.
    """
    path, is_file = Path(origin.path), Path(origin.path).is_file()
    if is_file and path.suffix != ".safetensors":
        raise invalid("model.path", str(path), "is no .safetensors file", NOT_FOUND)
    if path.suffix == ".safetensors" and not path.exists():
        raise invalid("model.path", str(path), "does not exist", NOT_FOUND)
    for name in ("revision", "variant") if is_file else ("config",):
        if (value := getattr(origin, name)) is not None:
            problem = f"means nothing for {'a single file' if is_file else 'a directory or hub id'}, as model.path is"
            raise invalid(f"model.{name}", str(value), problem, "set it to null")
    remedy = "of the same kind of model; weights there count only for parts that the file lacks"
    if is_file and origin.config is None:
        problem = "is a single file, and nothing says what it holds"
        raise invalid(
            "model.path", str(path), problem, f"name in model.config a directory in diffusers' format {remedy}"
        )
    if is_file and not Path(str(origin.config)).is_dir():
        raise invalid("model.config", str(origin.config), "is no directory", f"name one in diffusers' format {remedy}")
    return path if is_file else None


def described(origin: Origin) -> str:
    """The directory or hub id that says what parts a checkpoint has."""
    return location("model.path", origin.path) if single_file(origin) is None else str(origin.config)


def location(argument: str, path: str | Path) -> str:
    """The path or hub id as diffusers wants it. Raises ``InvalidInput`` for a single file or a missing path."""
    text = str(path)
    if Path(text).is_dir():
        return text
    if Path(text).is_file():
        remedy = "convert it with diffusers' from_single_file and save_pretrained, and name that directory"
        raise invalid(argument, text, "is a single file, not a diffusers directory", remedy)
    if not _HUB_ID.fullmatch(text):
        raise invalid(argument, text, "does not exist", NOT_FOUND)
    return text


def model_index(origin: Origin, names: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a checkpoint's model_index.json. Raises ``InvalidInput`` where there is none, or it is of another
    pipeline class than ``names``, if there are any.
    """
    source = described(origin)
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        argument = "model.path" if origin.config is None else "model.config"
        raise invalid(argument, source, "holds no model_index.json", NOT_FOUND)
    with readable_errors("model.path", source):
        index: dict[str, Any] = _diffusers().DiffusionPipeline.load_config(source, revision=origin.revision)
    if names and (name := index.get("_class_name")) not in names:
        remedy = f"this family is for {' and '.join(names)}; model.family auto chooses by the checkpoint"
        raise invalid("model.path", source, f"is a {name}", remedy)
    return index


def held_parts(file: Path, index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline whose weights a single file holds."""
    names, found = tensor_shapes("model.path", [file]), [part for part in NETWORKS if part in index]
    for part in (part for part in ENCODERS if index.get(part, (None,))[0] is not None):
        prefixes = _IN_FILE.get(index[part][1]) or _IN_FILE.get(part, ())
        found += [part] if any(name.startswith(prefixes) for name in names) else []
    return found


def load_pipeline(
    origin: Origin,
    names: Sequence[str],
    denoiser: str,
    *,
    dtype: torch.dtype,
    frozen_parts: bool = True,
    loaded: Mapping[str, nn.Module] | None = None,
) -> Any:
    """The diffusers pipeline with every part but the safety checker, on the CPU; ``loaded``: parts at hand.

    The VAE is read in float32 (SDXL's overflows in float16), everything else as ``dtype``. Without ``frozen_parts`` the
    VAE, text encoders and tokenizers are None. ``names``: pipeline classes that belong to the family. ``denoiser``: the
    part that is trained, ``"unet"`` or ``"transformer"``.
    """
    source, index = described(origin), model_index(origin, names)
    name = str(index["_class_name"])
    given: dict[str, Any] = {}
    if "safety_checker" in index or name == "StableDiffusionPipeline":
        given = {"safety_checker": None, "requires_safety_checker": False}
    # Left out by who saved it, T5 of SD3 for example; some pipelines do not load unless that is said.
    absent = [part for part in _FROZEN_PARTS if part in index and index[part][0] is None]
    given |= {part: None for part in (absent if frozen_parts else _FROZEN_PARTS) if part in index}
    others = {denoiser: ("model.unet_init", origin.unet_init), "vae": ("model.vae", origin.vae)}
    replaced = {part: other for part, other in others.items() if other[1] is not None and part not in given}
    root = local_folder(origin, (*given, *replaced))
    parts = [part for part in (denoiser, *ENCODERS) if part in index and part not in given]
    if origin.variant is not None and not any(
        weight_files("model.path", root / part, origin.variant)[1] for part in parts if part not in replaced
    ):
        raise invalid("model.variant", origin.variant, f"is no variant that {source} has", "set it to null")
    given |= loaded or {}
    for part in (part for part in parts if part not in given):
        argument, other = replaced.get(part, ("model.path" if loaded is None else "model.config", None))
        folder = root / part if other is None else part_folder(argument, other, part)
        variant = origin.variant if other is None else None
        kept = torch.float32 if part == "vae" else dtype
        given[part] = load_module(part_class(source, index, part), argument, folder, part, variant, kept)
    if origin.unet_init is not None:
        with readable_errors("model.path", source):
            wanted = type(given[denoiser]).load_config(source, subfolder=denoiser, revision=origin.revision)
        found = given[denoiser].config
        for key in (key for key in _INTERFACE if key in wanted and found.get(key) != wanted[key]):
            problem = f"its {key} is {found.get(key)}, that of the base model's own {wanted[key]}"
            raise invalid("model.unet_init", str(origin.unet_init), problem, "use one of the same model generation")
    with readable_errors("model.path", source):
        return getattr(_diffusers(), name).from_pretrained(root, trust_remote_code=False, **given)


def _diffusers() -> Any:
    return require("diffusers", extra="train", purpose="loading a diffusion model")


def part_class(source: str, index: Mapping[str, Any], part: str) -> Any:
    library, name = index.get(part) or (None, None)
    kind = None
    if library in ("diffusers", "transformers"):
        kind = getattr(require(library, extra="train", purpose="loading a diffusion model"), str(name), None)
    if kind is None:
        raise invalid("model.path", source, f"names a {part} that {library} does not know, {name}", NOT_FOUND)
    return kind


def vae_config(origin: Origin) -> dict[str, Any]:
    """The configuration of a checkpoint's VAE, without its weights."""
    if origin.vae is not None:
        config = read_object(part_folder("model.vae", origin.vae, "vae") / "config.json", "model.vae")
    else:
        source = described(origin)
        with readable_errors("model.path", source):
            config = _diffusers().AutoencoderKL.load_config(source, subfolder="vae", revision=origin.revision)
    return {"latent_channels": 4, "block_out_channels": (64,), **config}


def local_folder(origin: Origin, without: Sequence[str] = ()) -> Path:
    """The directory of a checkpoint; one of the hub is downloaded if need be, ``without`` some of its parts."""
    source = described(origin)
    if Path(source).is_dir():
        return Path(source)
    options = {"revision": origin.revision, "variant": origin.variant, "use_safetensors": True}
    with readable_errors("model.path", source):
        return Path(_diffusers().DiffusionPipeline.download(source, **options, **dict.fromkeys(without)))


def pipeline_files(origin: Origin, denoiser: str) -> dict[str, list[Path]]:
    """The files of every part of a pipeline; those of ``unet_init`` stand for the denoiser, and those of another VAE
    for the VAE, where they are given.
    """
    index, root, file = model_index(origin), local_folder(origin), single_file(origin)
    parts = [part for part in (*_FROZEN_PARTS, denoiser, "scheduler") if (root / part).is_dir()]
    files = {part: part_files(root / part) for part in parts}
    if file is not None:
        for part in held_parts(file, index):
            files[part] = [file, *(path for path in files.get(part, ()) if path.suffix != ".safetensors")]
    others = (("model.unet_init", denoiser, origin.unet_init), ("model.vae", "vae", origin.vae))
    for argument, part, other in others:
        if other is not None:
            files[part] = part_files(part_folder(argument, other, part))
    return {**files, "model_index": [root / "model_index.json"]}


def copy_other_parts(origin: Origin, directory: Path, denoiser: str) -> bool:
    """Copy a checkpoint without denoiser and safety checker, as a pipeline that was loaded whole would save it.

    False, and nothing is written, where its weights are a variant or in a single file: those must be loaded.
    """
    if single_file(origin) is not None:
        return False
    root = local_folder(origin, (denoiser,))
    index = read_object(root / "model_index.json", "model.path")
    if index.pop("safety_checker", None) is not None:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    parts = [part for part, kind in index.items() if isinstance(kind, list) and part != denoiser]
    folders = {part: root / part for part in parts if (root / part).is_dir()}
    if origin.vae is not None:
        folders["vae"] = part_folder("model.vae", origin.vae, "vae")
    copied = {
        part: [file for file in part_files(folder) if file.suffix != ".safetensors"] for part, folder in folders.items()
    }
    for part in ENCODERS:
        if part in folders:
            files, variant = weight_files("model.path", folders[part], origin.variant)
            if variant is not None:
                return False
            copied[part] += files
    for part, files in copied.items():
        (directory / part).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, directory / part / file.name)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return True


def part_folder(argument: str, path: str | Path, part: str) -> Path:
    """Where a repository holds a part: in a folder of that name, or at the top. From the hub only that is fetched."""
    source = location(argument, path)
    root = Path(source)
    if not root.is_dir():
        hub = require("huggingface_hub", extra="train", purpose="loading a diffusion model")
        names = ("config.json", "diffusion_*.safetensors*")
        kept = [f"{folder}{name}" for folder in (f"{part}/", "") for name in names]
        with readable_errors(argument, source):
            root = Path(hub.snapshot_download(source, allow_patterns=kept))
    return root / part if (root / part).is_dir() else root


def weight_files(argument: str, folder: Path, variant: str | None) -> tuple[list[Path], str | None]:
    """The safetensors files of a part, and the variant they are.

    Those of ``variant`` where the part has it, else the plain ones, as diffusers' pipelines choose; without a named
    variant the only one that there is. Raises ``InvalidInput`` where there are none, or several variants to choose
    from.
    """
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        match = _FILE.fullmatch(file.name)
        if match is not None and match["stem"].split("-")[0] in ("diffusion_pytorch_model", "model"):
            found.setdefault(match["variant"], []).append(file)
    chosen = variant if variant in found else None if None in found else variant
    if variant is None and None not in found and len(found) == 1:
        (chosen,) = found
    if chosen in found:
        return found[chosen], chosen
    others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".ckpt", ".pt", ".msgpack"))
    problem = f"cannot be loaded ({folder} holds no safetensors weights{f', only {others}' if others else ''})"
    if not found:
        raise invalid(argument, str(folder), problem, NOT_FOUND)
    names = ", ".join(str(name) for name in found)
    problem = f"cannot be loaded ({folder} holds weights as the variants {names}, not {variant or 'plain ones'})"
    raise invalid(argument, str(folder), problem, "name one of them: model.variant, or --variant of a command")


def tensor_shapes(argument: str, files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of the headers alone. Raises ``InvalidInput`` for a damaged file."""
    safetensors = require("safetensors", extra="train", purpose="reading weights")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            problem = f"is no whole safetensors file ({error})"
            raise invalid(argument, str(file), problem, "download or write it again") from error
    return shapes


def plain_names(names: Iterable[str], part: str | None = None) -> dict[str, str]:
    """Stored name -> name without what wrappers add; of the tensors of a whole pipeline those of ``part`` alone."""
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    while prefix := next((p for p in _OUTER if plain and all(name.startswith(p) for name in plain.values())), None):
        plain = {stored: name.removeprefix(prefix) for stored, name in plain.items()}
    if part in {name.split(".")[0] for name in plain.values()} <= {*NETWORKS, *ENCODERS}:
        return {n: name.removeprefix(f"{part}.") for n, name in plain.items() if name.startswith(f"{part}.")}
    return plain


def load_module(
    kind: Any, argument: str, folder: Path, part: str, variant: str | None, dtype: torch.dtype
) -> nn.Module:
    """The model of class ``kind`` (diffusers, transformers) in ``folder``, a directory with its configuration.

    Names that wrappers changed are translated for UNet and transformer, which trainings save, and for no other part.
    Raises ``InvalidInput`` for no weights, a damaged file, or weights that are not exactly those of the model.
    """
    if not (folder / "config.json").is_file():
        raise invalid(argument, str(folder), "holds no config.json", NOT_FOUND)
    files, variant = weight_files(argument, folder, variant)
    with _readable(argument, files, folder, part) as place, readable_errors(argument, str(folder)):
        module, info = kind.from_pretrained(place, variant=variant, use_safetensors=True, output_loading_info=True)
    check_loaded(argument, files[0], info)
    loaded: nn.Module = module.eval()
    # The keyword that names a dtype while loading differs between versions of diffusers; ``to`` warns for some models.
    stored = {parameter.dtype for parameter in loaded.parameters() if parameter.is_floating_point()}
    return loaded if stored <= {dtype} else loaded.to(dtype)


def check_loaded(argument: str, file: Path, info: Mapping[str, Any]) -> None:
    """:func:`check_names` for what ``from_pretrained`` returns with ``output_loading_info``."""
    # Tables of positions, which versions of transformers stored and others make, are no weights.
    kinds = ("missing", "unexpected", "mismatched")
    found = [[n for n in info[f"{kind}_keys"] if not str(n).endswith("position_ids")] for kind in kinds]
    check_names(argument, file, *found)


def check_names(
    argument: str,
    file: Path,
    missing: Iterable[Any] = (),
    unexpected: Iterable[Any] = (),
    mismatched: Iterable[Any] = (),
) -> None:
    """Raise ``InvalidInput`` with the file and the first names, unless all three are empty."""
    kinds = {"lacks": missing, "has unknown": unexpected, "has tensors of another shape:": mismatched}
    problems = [f"{verb} {listed(names)}" for verb, names in kinds.items() if names]
    if problems:
        remedy = "use the weights that belong to this model's configuration, under their own names"
        raise invalid(argument, str(file), f"does not fit the model: it {'; it '.join(problems)}", remedy)


@contextmanager
def readable_errors(argument: str, source: str) -> Iterator[None]:
    """Turn what diffusers, transformers and the hub client raise for unusable repositories into ``InvalidInput``."""
    try:
        yield
    except InvalidInput:
        raise
    except (OSError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise invalid(argument, source, f"cannot be loaded ({error})", NOT_FOUND) from error


@contextmanager
def _readable(argument: str, files: Sequence[Path], folder: Path, part: str) -> Iterator[Path]:
    """The folder, or for as long as it takes a copy of it with plain names."""
    stored = tensor_shapes(argument, files)
    plain = plain_names(stored, part)
    if part not in NETWORKS or all(name == plain.get(name) for name in stored):
        yield folder
        return
    safetensors = require("safetensors.torch", extra="train", purpose="loading a diffusion model")
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copyfile(folder / "config.json", Path(temporary, "config.json"))
        weights: dict[str, Tensor] = {}
        for file in files:
            weights |= {plain[n]: tensor for n, tensor in safetensors.load_file(file).items() if n in plain}
        name = _FILE.fullmatch(files[0].name)
        assert name is not None
        ending = "" if name["variant"] is None else f".{name['variant']}"
        target = Path(temporary, f"{name['stem'].split('-')[0]}{ending}.safetensors")
        safetensors.save_file(weights, target, metadata={"format": "pt"})
        yield Path(temporary)


def listed(names: Iterable[Any]) -> str:
    """The first names, in order."""
    shown = sorted(str(name[0] if isinstance(name, tuple) else name) for name in names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
