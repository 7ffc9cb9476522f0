"""LoRA adapters: inside a network (put in, switched off, merged) and as files.

Files are written so that every reader gets the trained change. Read are peft's format, diffusers' of today and before,
and kohya's with its ``.alpha`` tensors; every tensor finds its layer, or reading fails with the file and the names.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.io import read_object
from fastinvdpo.models.base import Origin
from fastinvdpo.models.checkpoints import NETWORKS, check_names, listed, plain_names, tensor_shapes
from fastinvdpo.models.quantization import whole_weight

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE, _PEFT_SETTINGS, _BASE = "adapter_model.safetensors", "adapter_config.json", "base_model.json"
# Written whatever their values: what readers ask for. peft 0.18 knows all of them.
_ALWAYS = frozenset((
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias", "fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights",
    "rank_pattern", "alpha_pattern",
))  # fmt: skip
# Who wrote the file and how it computed, not what the adapter is.
_NEVER = frozenset(("peft_version", "runtime_config"))
_TENSOR = re.compile(
    r"(?P<layer>.+?)[._]((?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))(\.default(_\d+)?)?\.weight|(?P<scaled>.+?)([._]lora\.down\.weight)?\.alpha"
)
# Other values mean another change than the product of both factors, or other weights that it is added to.
_PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_UNSUPPORTED = {
    "changes text encoders": re.compile(r"(text_encoder|lora_te|te\d?[._])"),
    "is a DoRA": re.compile(r".*(lora_magnitude_vector|dora_scale)"),
    "is a LoHa, LoKr, OFT or the like": re.compile(r".*(hada_|lokr_|oft_|boft|ia3_|lora_mid|\.diff(_b)?$)"),
}
# By layer the two factors of the change, and what stands before their product.
Adapter: TypeAlias = dict[str, tuple[Tensor, Tensor, float]]


def add_lora(network: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Put LoRA layers on the named modules of ``network`` in place; only they are trainable afterwards.

    Raises ``InvalidInput`` where a target names no module, or one that cannot carry an adapter.
    """
    peft = require("peft", extra="train", purpose="training with LoRA")
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names if name and not name[-1].isdigit()})
            problem = "names no module of the network"
            raise invalid("model.lora.target_modules", target, problem, f"choose among {leaves}")
    network.requires_grad_(False)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    try:
        peft.inject_adapter_in_model(settings, network)
    except ValueError as error:
        problem = f"cannot carry adapters ({error})"
        raise invalid("model.lora.target_modules", targets, problem, "name linear or convolution layers") from error


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Inside, ``network`` computes what it did without adapters; afterwards they are back, also after an error."""
    layers = [layer for _, layer in _adapter_layers(network)]
    # Not enable_adapters(), which also changes what is trainable: under FSDP2 of other tensors before than after.
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_copy(network: nn.Module) -> nn.Module:
    """A copy of a network with adapters, in which they are folded into ordinary weights."""
    merged = copy.deepcopy(network)
    for name, layer in _adapter_layers(merged):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(False)


@torch.no_grad()
def merged_into(base: nn.Module, network: nn.Module) -> nn.Module:
    """``base``, a network without adapters, with those of ``network`` folded into its weights in place.

    The layers of both have the same names, and may have other weights: those below the adapters may be quantized.
    """
    for name, layer in _adapter_layers(network):
        weight: Any = base.get_submodule(name).weight
        for adapter in layer.active_adapters:
            weight += layer.get_delta_weight(adapter).to(weight)
    return base.requires_grad_(False)


@torch.no_grad()
def perturb(network: nn.Module, scale: float, seed: int) -> None:
    """Move the trainable weights by random amounts of relative size ``scale``, so that policy ≠ reference.

    Full fine-tuning: every tensor W gains ``scale·rms(W)·z``. LoRA, whose product B·A starts at zero: B is random, and
    so large that its update has ``scale`` times the root mean square of its layer's weight.
    """
    generator = torch.Generator().manual_seed(seed)
    if not any(".lora_" in name for name, _ in network.named_parameters()):
        for parameter in (one for one in network.parameters() if one.requires_grad):
            parameter.add_(_normal_like(parameter, generator), alpha=scale * _rms(parameter))
        return
    for _, layer in _adapter_layers(network):
        for name, up in layer.lora_B.items():
            # Entries of B·A: rank·var(B)·mean(A²) is their variance.
            size = layer.scaling[name] * math.sqrt(layer.r[name]) * _rms(layer.lora_A[name].weight)
            wanted = scale * _rms(whole_weight(layer.get_base_layer()))
            up.weight.add_(_normal_like(up.weight, generator), alpha=wanted / size)


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device, tensor.dtype)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _adapter_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """``(name, layer)`` of every layer that carries adapters."""
    tuners = require("peft.tuners.tuners_utils", extra="train", purpose="training with LoRA")
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, tuners.BaseTunerLayer)]


def adapter_contents(network: nn.Module, origin: Origin | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the adapter inside ``network``, and its settings for inference as JSON can hold them.

    The scale alpha/rank is multiplied into the second factor, and alpha is the rank: readers of the tensors alone see
    the change that was trained. peft's own ``to_dict`` has every field that the installed version knows, and diffusers
    raises a TypeError on one that the reader's peft does not. Here a field beyond the common ones stands only where it
    is not at its default.
    """
    peft = require("peft", extra="train", purpose="saving a LoRA adapter")
    layers: Any = network
    config = layers.peft_config["default"]
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in _ALWAYS or (field.name not in _NEVER and value != default):
            settings[field.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
    settings |= {"peft_type": str(config.peft_type.value), "inference_mode": True, "lora_alpha": config.r}
    if origin is not None:
        base = _base_of(origin)
        settings["base_model_name_or_path"] = base.get("unet_init", base["path"])
        settings |= {"revision": base["revision"]} if "revision" in base else {}
    tensors = {}
    for name, tensor in peft.get_peft_model_state_dict(network).items():
        scale = config.lora_alpha / config.r if ".lora_B" in name else 1.0
        tensors[name] = (tensor.detach().cpu() * scale).contiguous()
    return tensors, settings


def save_adapter(network: nn.Module, directory: Path, origin: Origin | None = None) -> None:
    """Write the adapter as ``peft.PeftModel.from_pretrained(unet, directory)`` reads it, and what it was trained on."""
    safetensors = require("safetensors.torch", extra="train", purpose="saving a LoRA adapter")
    directory.mkdir(parents=True, exist_ok=True)
    tensors, settings = adapter_contents(network, origin)
    for name, content in {_PEFT_SETTINGS: settings, **({} if origin is None else {_BASE: _base_of(origin)})}.items():
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # PeftModel keeps the network below two wrappers, and its files carry that prefix.
    renamed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    safetensors.save_file(renamed, directory / _PEFT_FILE, metadata={"format": "pt"})


def order_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file, which safetensors writes in any order, in that of their names: a file has
    the same bytes each time it is written.
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= size  # the same names and values; spaces fill the header up
        stream.seek(8)
        stream.write(ordered.ljust(size))


def _base_of(origin: Origin) -> dict[str, str]:
    """What names the weights of a checkpoint: its entries that are given, directories as absolute paths."""
    given = {name: str(value) for name, value in origin._asdict().items() if value is not None}
    return {name: str(Path(value).resolve()) if Path(value).exists() else value for name, value in given.items()}


def trained_on(file: Path) -> dict[str, str]:
    """What names the weights that an adapter was trained on; empty where nothing does."""
    beside = file.with_name(_BASE)
    return read_object(beside, "aligned") if beside.is_file() else {}


def adapter_file(path: str | Path) -> Path | None:
    """The weights of the adapter at ``path``, a file or its directory; None where that is none. Pickles are refused."""
    place = Path(path)
    if place.is_file() and place.suffix == ".safetensors":
        return place
    for name in (_PEFT_FILE, DIFFUSERS_FILE):
        if (place / name).is_file():
            return place / name
    pickled = [(place / name).with_suffix(".bin") for name in (_PEFT_FILE, DIFFUSERS_FILE)]
    if (place.is_file() and place.suffix in (".bin", ".pt", ".ckpt", ".pth")) or any(f.is_file() for f in pickled):
        remedy = "convert it with safetensors.torch.save_file, and name that file or its directory"
        raise invalid("aligned", str(path), "is stored as pickles, which can execute code", remedy)
    if place.is_dir() and not {"config.json", "model_index.json", *NETWORKS} & {f.name for f in place.iterdir()}:
        files = sorted(place.glob("*.safetensors"))
        return files[0] if len(files) == 1 else None
    return None


def read_adapter(
    file: Path, network: nn.Module, translated: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Adapter:
    """The adapter in ``file``, by the layers of ``network``.

    ``translated`` gives the tensors under diffusers' names, where their own fit no layer. Raises ``InvalidInput`` for a
    kind of adapter that is not known, or a tensor that fits no layer.
    """
    safetensors = require("safetensors", extra="train", purpose="reading a LoRA adapter")
    tensor_shapes("aligned", [file])
    with safetensors.safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        settings = _settings(file, opened.metadata() or {})
    for key, values in _PLAIN.items():
        if settings is not None and settings.get(key, values[0]) not in values:
            remedy = "name the whole model with it merged, or convert it to an ordinary LoRA with peft"
            raise invalid("aligned", str(file), f"has {key} {settings[key]!r}, which is not read", remedy)
    for problem, names in _UNSUPPORTED.items():
        found = [name for name in tensors if names.match(name)]
        if found:
            remedy = "name the whole model with it merged, or an ordinary LoRA of UNet or transformer"
            raise invalid("aligned", str(file), f"{problem} ({listed(found)}), which is not read", remedy)
    layers = dict(_places(network))
    factors, unknown = _factors(tensors, layers)
    if unknown:
        try:
            factors, unknown = _factors(translated(tensors), layers)
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            problem = f"has tensors of no known format, {listed(unknown)} ({error})"
            raise invalid("aligned", str(file), problem, "convert it to diffusers' or peft's format") from error
    incomplete = [layer for layer, parts in factors.items() if not {"down", "up"} <= parts.keys()]
    check_names("aligned", file, [f"half of {layer}" for layer in incomplete], unknown, [])
    if not factors:
        raise invalid("aligned", str(file), "holds no tensors", "name the file of an adapter")
    adapter: Adapter = {}
    for layer, parts in factors.items():
        down, up = parts["down"].float(), parts["up"].float()
        weight: Any = network.get_submodule(layer).weight
        inner, outer = down.flatten(1).shape, up.flatten(1).shape
        if outer[1] != inner[0] or outer[0] != weight.shape[0] or outer[0] * inner[1] != weight.numel():
            shapes = f"{tuple(up.shape)} times {tuple(down.shape)}, the layer {tuple(weight.shape)}"
            problem = f"does not fit the base model: {layer} is {shapes}"
            raise invalid("aligned", str(file), problem, "name the model that it was trained on as base")
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        try:
            adapter[layer] = (down, up, _scale(layer, len(down), alpha, settings))
        except (TypeError, ValueError, AttributeError, re.error) as error:
            remedy = "write the adapter again, or correct them"
            raise invalid("aligned", str(file), f"has unusable settings of alpha ({error})", remedy) from error
    return adapter


@torch.no_grad()
def merge_adapter(network: nn.Module, adapter: Adapter) -> None:
    """Add the change to the weights of ``network`` in place."""
    for layer, (down, up, scale) in adapter.items():
        weight: Any = network.get_submodule(layer).weight
        change = scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        weight.copy_(weight.float() + change.to(weight.device))


def _factors(
    tensors: Mapping[str, Tensor], layers: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """``layer -> down, up and alpha``, and the stored names that fit no layer."""
    factors: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for stored, name in plain_names(tensors).items():
        match = _TENSOR.fullmatch(name)
        raw = "" if match is None else (match["layer"] or match["scaled"]).replace(".processor.", ".")
        inside = next((raw.removeprefix(f"{part}.") for part in NETWORKS if raw.startswith(f"{part}.")), raw)
        if match is None or inside not in layers:
            unknown.append(stored)
        else:
            role = "down" if match["down"] else "up" if match["up"] else "alpha"
            factors.setdefault(layers[inside], {})[role] = tensors[stored]
    return factors, unknown


def _places(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Names by which files know a layer -> its name: kohya writes underscores, older diffusers ``to_out``."""
    for name, module in network.named_modules():
        if getattr(module, "weight", None) is not None:
            yield name, name
            yield from ((f"lora_{part}_{name.replace('.', '_')}", name) for part in NETWORKS)
            if name.endswith(".to_out.0"):
                yield name.removesuffix(".0"), name


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Those of peft, from beside the file or, as diffusers writes them, in it; None where there are none."""
    if file.name == _PEFT_FILE:
        beside = file.with_name(_PEFT_SETTINGS)
        if not beside.is_file():
            raise invalid("aligned", str(file), f"has no {_PEFT_SETTINGS} beside it", "name a whole adapter")
        return read_object(beside, "aligned")
    try:
        inside: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        problem = f"has damaged settings ({error})"
        raise invalid("aligned", str(file), problem, "write the adapter again") from error
    return {name.partition(".")[2]: value for name, value in inside.items() if name.startswith(NETWORKS)} or None


def _scale(layer: str, rank: int, alpha: float | None, settings: Mapping[str, Any] | None) -> float:
    """What peft multiplies the product of both factors by; a tensor ``alpha`` goes before settings."""
    if alpha is not None or settings is None:
        return 1.0 if alpha is None else alpha / rank
    patterns = settings.get("alpha_pattern") or {}
    own = (value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    alpha = float(next(own, settings.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
