"""What every model family offers to the trainer and the evaluation, and the loader that chooses the family."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import invalid

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data.transforms import ImageGeometry

# family name -> (module, class); modules are imported when asked for, since they need diffusers.
_FAMILIES = {
    "digits": ("fastinvdpo.models.digits", "DigitsModel"),
    "stable-diffusion": ("fastinvdpo.models.stable_diffusion", "StableDiffusionModel"),
    "stable-diffusion-3": ("fastinvdpo.models.stable_diffusion_3", "StableDiffusion3Model"),
    "flux": ("fastinvdpo.models.flux", "FluxModel"),
}
# Pipeline class in a checkpoint's model_index.json -> family.
_PIPELINES = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion",
    "StableDiffusionXLImg2ImgPipeline": "stable-diffusion",  # the SDXL refiner
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "FluxPipeline": "flux",
}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Names shared by diffusers' attention blocks; the projections that LoRA papers adapt.
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class DiffusionModel(ABC):
    """A trainable denoising network with the frozen parts that surround it.

    Attributes:
        family: name that :func:`load_model` knows.
        network: the denoiser; the only part that training changes.
        schedule: the noise schedule of the checkpoint, float64.
        scheduler_config: the checkpoint's scheduler configuration, as saved again by :meth:`save`.
        default_lora_targets: module names LoRA adapts when the configuration names none.
        latent_shape: ``(C, h, w)`` of one latent at the model's own resolution.
        image_size: ``(height, width)`` in pixels at the model's own resolution.
        network_folder: the name of the network in a checkpoint, ``unet`` or ``transformer``.
        unquantized: makes the network as it was before its weights were quantised; None where they are not.
    """

    family: str
    network_folder: str = "unet"
    network: nn.Module
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    default_lora_targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    latent_shape: tuple[int, ...]
    image_size: tuple[int, int]
    unquantized: Callable[[], nn.Module] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the network; encoded latents and prompts are returned there."""
        return next(self.network.parameters()).device

    def frozen_modules(self) -> tuple[nn.Module, ...]:
        """The parts that are never trained (text encoders, VAE); empty where there are none."""
        return ()

    def to(self, device: torch.device | str) -> DiffusionModel:
        """Move the network and the frozen parts; dtypes stay as they are."""
        for module in (self.network, *self.frozen_modules()):
            module.to(device)
        return self

    @abstractmethod
    def encode_images(self, images: Sequence[Image], posterior: Tensor | None = None) -> Tensor:
        """Latents ``(n, C, h, w)``, float32, without gradient.

        Args:
            posterior: number of the sample to take from each image's posterior, int64 ``(n,)`` on the host: equal
                numbers take equal noise. None: its mean. No matter to families without a VAE.

        Raises:
            InvalidInput: unusable sizes.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> list[Image]:
        """Pictures of latents ``(n, C, h, w)``. Raises ``InvalidInput`` for another shape or non-finite values."""

    @abstractmethod
    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """Conditioning of ``n`` prompts: every tensor has leading dimension ``n``; ``""`` is the unconditional prompt.

        ``geometry`` holds original size and crop of the image each prompt belongs to; families that are not
        conditioned on it ignore it, and SDXL uses its own resolution where it is missing.
        """

    def encode_geometry(self, geometry: Sequence[ImageGeometry]) -> dict[str, Tensor]:
        """The tensors of :meth:`encode_prompts` that follow from the geometry alone, float32; empty where none do."""
        return {}

    @abstractmethod
    def predict(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Output of ``network`` at latents ``(n, C, h, w)`` and timesteps ``(n,)``; same shape as the latents.

        ``network`` is the policy, the frozen reference, or a wrapped form of either.
        """

    @abstractmethod
    def save(self, directory: str | Path, network: nn.Module | None = None) -> None:
        """Write the whole model, with ``network`` in place of its own where given, as ``load_model`` reads it."""

    def save_network(self, directory: str | Path, network: nn.Module) -> None:
        """Write ``network`` alone, into the folder it has in a checkpoint; ``unet_init`` reads that."""
        plain: Any = saveable_network(network)
        plain.save_pretrained(Path(directory) / self.network_folder, safe_serialization=True)

    def save_lora(self, directory: str | Path, network: nn.Module) -> None:
        """Write the adapters inside ``network`` in the family's own format, where it has one."""
        return


def families() -> tuple[str, ...]:
    """Names that :func:`load_model` accepts as ``family``, beside ``"auto"``."""
    return tuple(_FAMILIES)


def resolve_family(family: str, path: str | Path, revision: str | None = None) -> str:
    """``family``, or for ``"auto"`` the one that the checkpoint is of, told from its model_index.json.

    A directory without one, but with a UNet and a scheduler, is a model of the demo. Raises ``InvalidInput`` where
    nothing can be told.
    """
    if not str(path or "").strip():
        raise invalid("model.path", path, "is empty", "name a directory or a hub id")
    if family != "auto":
        if family not in _FAMILIES:
            known = f"choose auto, or one of {', '.join(_FAMILIES)}"
            raise invalid("model.family", family, "is not a known model family", known)
        return family
    from fastinvdpo.models.checkpoints import pipeline_class

    name = pipeline_class(path, revision)
    if name is None:
        if (Path(path) / "scheduler" / "scheduler_config.json").is_file():
            return "digits"
        remedy = "give a directory in diffusers' format or the id of a hub repository that holds safetensors files"
        raise invalid("model.path", str(path), "holds no model_index.json", remedy)
    if name not in _PIPELINES:
        raise invalid("model.path", str(path), f"is a {name}", f"supported are {', '.join(_PIPELINES)}")
    return _PIPELINES[name]


def family_class(family: str) -> Any:
    """The class of a family. Raises ``MissingExtra`` where a package that it needs is not installed."""
    module_name, class_name = _FAMILIES[family]
    return getattr(importlib.import_module(module_name), class_name)


def load_model(
    family: str,
    path: str | Path,
    *,
    unet_init: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    frozen_parts: bool = True,
    **options: Any,
) -> DiffusionModel:
    """Load a model of the named family.

    Args:
        family: one of :func:`families`, or ``"auto"``: told from the checkpoint.
        path: directory of the model, or for all but ``digits`` also a Hugging Face hub id.
        unet_init: directory or hub id with other weights of the UNet or transformer to start from (a supervised
            fine-tuned UNet, say).
        revision: branch, tag or commit on the hub.
        variant: file variant such as ``"fp16"``.
        dtype: storage type of network and text encoders; a VAE and the noise schedule never go below float32.
        frozen_parts: False leaves text encoders and VAE on the disk: the model predicts and saves, and cannot encode
            or decode.
        options: further arguments of some families; None is as if it were not given. ``vae``: path or hub id of another
            VAE. ``zero_terminal_snr`` (SD, SDXL): rescale the noise schedule to end in pure noise, or leave it.
            ``resolution`` (SD3, FLUX): side of the images in pixels, which FLUX's noise schedule depends on;
            ``max_sequence_length`` (SD3, FLUX): T5's tokens; ``guidance_embedding`` (FLUX).

    Raises:
        InvalidInput: unknown family, missing files, a checkpoint of another kind, or an option it does not have.
        MissingExtra: diffusers or transformers is not installed.
    """
    family = resolve_family(family, path, revision)
    if dtype not in _DTYPES:
        raise invalid("dtype", dtype, "is not a floating-point type models are kept in", f"use one of {_DTYPES}")
    loader = family_class(family)
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in ("vae", *loader.options) or family == "digits":
            problem, known = f"means nothing for a model of the family {family}", ", ".join(loader.options)
            raise invalid(f"model.{name}", given[name], problem, f"set it to null; options here: {known or 'none'}")
    model: DiffusionModel = loader.load(
        path,
        unet_init=unet_init,
        revision=revision,
        variant=variant,
        dtype=dtype,
        frozen_parts=frozen_parts,
        **given,
    )
    return model


def checkpoint_files(
    family: str,
    path: str | Path,
    *,
    unet_init: str | Path | None = None,
    vae: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> dict[str, list[Path]]:
    """The files that :func:`load_model` reads, by part: ``unet``, ``scheduler``, ``vae``, ``text_encoder``, …

    Weights in other formats than safetensors are left out. Files of a hub repository are downloaded if need be.
    Raises ``InvalidInput`` where nothing is found.
    """
    kind = family_class(resolve_family(family, path, revision))
    others = {} if vae is None else {"vae": vae}
    files: dict[str, list[Path]] = kind.files(path, unet_init=unet_init, revision=revision, variant=variant, **others)
    return files


def part_files(folder: Path) -> list[Path]:
    """Configuration, vocabulary and safetensors files of one part, in the order of their names."""
    return sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".txt", ".model", ".safetensors"))


def check_images(images: Sequence[Image]) -> None:
    """Raise ``InvalidInput`` unless ``images`` is a non-empty sequence of PIL images."""
    if len(images) == 0:
        raise invalid("images", list(images), "is empty", "pass at least one PIL image")
    for i, image in enumerate(images):
        if not hasattr(image, "convert"):
            raise invalid(f"images[{i}]", image, "is not a PIL image", "open it with PIL.Image.open")


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. Raises ``InvalidInput`` for one bare string, an empty list or a non-string."""
    if isinstance(prompts, str):
        raise invalid("prompts", prompts, "is one string", "pass a list of strings")
    if len(prompts) == 0:
        raise invalid("prompts", list(prompts), "is empty", "pass at least one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise invalid(f"prompts[{i}]", prompt, "is not a string", 'pass text; "" is the unconditional prompt')
    return list(prompts)


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise ``InvalidInput`` unless ``latents`` is a finite floating-point ``(n, channels, h, w)``."""
    if latents.ndim != 4 or latents.shape[1] != channels or not latents.is_floating_point():
        shape = f"{tuple(latents.shape)} {latents.dtype}"
        raise invalid("latents", shape, "has the wrong shape or dtype", f"pass floating-point (n, {channels}, h, w)")
    if not bool(torch.isfinite(latents).all()):
        raise invalid("latents", f"{tuple(latents.shape)}", "holds NaN or infinity", "look at how they were made")


def cast_inputs(
    network: nn.Module, latents: Tensor, conditioning: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents and conditioning in the storage type of the network.

    Objectives keep latents in float32; a network kept in bf16 does not accept them as they are.
    """
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), latents.dtype)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in conditioning.items()}
    return latents.to(dtype), cast


def cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` with its weights as ``dtype``.

    Used after loading, because the keyword that asks for a dtype while loading differs between versions of diffusers.
    """
    stored = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return module if stored <= {dtype} else module.to(dtype)


def check_conditioning(conditioning: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise ``InvalidInput`` when the conditioning lacks one of the named tensors."""
    for name in names:
        if name not in conditioning:
            found = sorted(conditioning)
            raise invalid("conditioning", found, f"lacks {name!r}", "build it with the model's encode_prompts")


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside wrappers that keep it as ``.module`` (DistributedDataParallel) or ``._orig_mod`` (compile)."""
    while True:
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def saveable_network(network: nn.Module) -> nn.Module:
    """The unwrapped network. Raises ``InvalidInput`` if adapters are still separate or weights quantised: what was
    written could not be loaded.
    """
    plain = unwrap(network)
    if any(".lora_" in name for name, _ in plain.named_parameters()):
        raise invalid(
            "network", type(plain).__name__, "holds LoRA layers that are not merged", "merge the adapter, then save"
        )
    if not all(parameter.is_floating_point() for parameter in plain.parameters()):
        remedy = "save what unquantized() gives, with the adapter merged"
        raise invalid("network", type(plain).__name__, "holds quantised weights", remedy)
    return plain
