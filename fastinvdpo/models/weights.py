"""Weights of one part of a checkpoint: every tensor finds its place, or loading fails with the file and the names."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, invalid

NOT_FOUND = "give a directory in diffusers' format or the id of a hub repository that holds safetensors files"
_FILE = re.compile(r"(?P<stem>[^.]+?)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.safetensors")
# What torch.compile, FSDP and activation checkpointing put into names, and what stands before all names of a network
# that was saved inside of something.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("module.", "base_model.model.", "state_dict.", "model.", "ema_model.", "ema.")
NETWORKS = ("unet", "transformer")
_PARTS = {*NETWORKS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
_MISFITS = ("missing", "unexpected", "mismatched")
_SHOWN = 3  # names in a message


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
    if part in {name.split(".")[0] for name in plain.values()} <= _PARTS:
        return {n: name.removeprefix(f"{part}.") for n, name in plain.items() if name.startswith(f"{part}.")}
    return plain


def load_module(kind: Any, argument: str, folder: Path, part: str, variant: str | None = None) -> nn.Module:
    """The model of class ``kind`` (diffusers, transformers) in ``folder``, a directory with its configuration.

    Names that wrappers changed are translated for UNet and transformer, which trainings save, and for no other part.

    Raises:
        InvalidInput: no weights, a damaged file, or weights that are not exactly those of the model.
    """
    if not (folder / "config.json").is_file():
        raise invalid(argument, str(folder), "holds no config.json", NOT_FOUND)
    files, variant = weight_files(argument, folder, variant)
    with _readable(argument, files, folder, part) as place, readable_errors(argument, str(folder)):
        module, info = kind.from_pretrained(place, variant=variant, use_safetensors=True, output_loading_info=True)
    check_loaded(argument, files[0], info)
    loaded: nn.Module = module.eval()
    return loaded


def check_loaded(argument: str, file: Path, info: Mapping[str, Any]) -> None:
    """:func:`check_names` for what ``from_pretrained`` tells with ``output_loading_info``."""
    # Tables of positions, which versions of transformers stored and others make, are no weights.
    told = [[n for n in info[f"{what}_keys"] if not str(n).endswith("position_ids")] for what in _MISFITS]
    check_names(argument, file, *told)


def check_names(
    argument: str,
    file: Path,
    missing: Iterable[Any] = (),
    unexpected: Iterable[Any] = (),
    mismatched: Iterable[Any] = (),
) -> None:
    """Raise ``InvalidInput`` with the file and the first names, unless all three are empty."""
    kinds = {"lacks": missing, "has unknown": unexpected, "has tensors of another shape:": mismatched}
    told = [f"{verb} {listed(names)}" for verb, names in kinds.items() if names]
    if told:
        remedy = "use the weights that belong to this model's configuration, under their own names"
        raise invalid(argument, str(file), f"does not fit the model: it {'; it '.join(told)}", remedy)


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
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
