"""What every model family offers to the trainer and the evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.diffusion.schedule import NoiseSchedule, inversion_levels
from fastinvdpo.errors import invalid

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data.transforms import ImageGeometry

# Names shared by diffusers' attention blocks; the projections that LoRA papers adapt.
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
Own = TypeVar("Own", bound="TrainedModel")
SOURCE_LATENTS = "source_latents"
_PART_FILES = (".json", ".txt", ".model", ".jinja", ".safetensors")


class Origin(NamedTuple):
    """A checkpoint, and the network and VAE that take the places of its own where they were named. ``config``: of a
    single file, a directory in diffusers' format that says what it holds.
    """

    path: str | Path
    unet_init: str | Path | None = None
    vae: str | Path | None = None
    revision: str | None = None
    variant: str | None = None
    config: str | Path | None = None

    @classmethod
    def of(cls, path: str | Path | Origin) -> Origin:
        return path if isinstance(path, Origin) else cls(path)


class TrainedModel(ABC):
    """A trainable network with the frozen parts that surround it: what the trainer uses of every model.

    Attributes:
        family: name in the table of families (:mod:`fastinvdpo.models.loading`). options: its further arguments that
            the family has.
        network: the only part that training changes, where :meth:`trained` says so.
        network_folder: its name in a checkpoint, ``unet`` or ``transformer``.
        schedule: the noise schedule of a diffusion model, float64; None: it is none.
        default_lora_targets: module names LoRA adapts when the configuration names none.
        edits: whether a source image is part of the conditioning (:meth:`encode_sources`); prompt_sees_source: also of
            that of :meth:`encode_prompts`, as its argument ``sources``, for the empty prompt too.
        origin: the checkpoint that it was loaded from; None for a network at hand.
        unquantized: makes the network as it was before its weights were quantized; None where they are not.
    """

    family: str
    options: ClassVar[tuple[str, ...]] = ()
    network_folder: str = "unet"
    network: nn.Module
    schedule: NoiseSchedule | None
    default_lora_targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    edits = False
    prompt_sees_source = False
    origin: Origin | None = None
    unquantized: Callable[[], nn.Module] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the network; encoded latents and prompts are returned there."""
        return next(self.network.parameters()).device

    def frozen_modules(self) -> tuple[nn.Module, ...]:
        """The parts that are never trained (text encoders, VAE); empty where there are none."""
        return ()

    def trained(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of ``network``, by name, that full fine-tuning changes: all of them, or a part."""
        return dict(network.named_parameters())

    def to(self: Own, device: torch.device | str) -> Own:
        """Move the network and the frozen parts; dtypes stay as they are."""
        for module in (self.network, *self.frozen_modules()):
            module.to(device)
        return self

    @abstractmethod
    def encode_images(self, images: Sequence[Any], posterior: Tensor | None = None) -> Tensor:
        """Latents ``(n, C, h, w)`` of PIL images, float32, without gradient; of videos, lists of ``frames`` images,
        ``(n, C, frames, h, w)``. Raises ``InvalidInput`` for unusable sizes.

        ``posterior``: number of the sample to take from each image's posterior, int64 ``(n,)`` on the host: equal
        numbers take equal noise. None: its mean. No matter to families without a VAE.
        """

    @abstractmethod
    def encode_prompts(
        self, prompts: Sequence[str], *, geometry: Sequence[ImageGeometry] | None = None
    ) -> dict[str, Tensor]:
        """Conditioning of ``n`` prompts: every tensor has leading dimension ``n``; ``""`` is the unconditional prompt.

        ``geometry`` holds original size and crop of the image each prompt belongs to; families that are not
        conditioned on it ignore it, and SDXL uses its own resolution where it is missing.
        """

    def encode_sources(self, sources: Sequence[Image]) -> dict[str, Tensor]:
        """The tensors of the conditioning that follow from source images of one size, ``(n, …)``, without gradient:
        ``source_latents``. Raises ``InvalidInput`` for a family that edits none.
        """
        problem = f"means nothing for the family {self.family}, which edits no images"
        raise invalid("sources", len(sources), problem, "leave them out")

    def encode_geometry(self, geometry: Sequence[ImageGeometry]) -> dict[str, Tensor]:
        """The tensors of :meth:`encode_prompts` that follow from the geometry alone, float32; empty where none do."""
        return {}

    def encode_small(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Conditioning that follows from small ones of the images themselves; empty where there is no cascade."""
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
        """Write the whole model, with ``network`` in place of its own where given, as it is loaded."""

    def save_network(self, directory: str | Path, network: nn.Module) -> None:
        """Write ``network`` alone, into the folder it has in a checkpoint; ``unet_init`` reads that."""
        plain: Any = saveable_network(network)
        plain.save_pretrained(Path(directory) / self.network_folder, safe_serialization=True)

    def save_lora(self, directory: str | Path, network: nn.Module, formats: Sequence[str] = ("diffusers",)) -> None:
        """Write the adapters inside ``network`` in formats of other tools, where the family has them."""
        return


class DiffusionModel(TrainedModel):
    """A trainable denoising network with the frozen parts that surround it.

    Attributes:
        family, options, network, …: as of :class:`TrainedModel`; ``load_model`` knows the family.
        schedule: the noise schedule of the checkpoint, float64.
        sampling_schedule: the one that the checkpoint is sampled by, whatever it is trained with.
        scheduler_config: the checkpoint's scheduler configuration, as saved again by :meth:`save`.
        latent_shape: ``(C, h, w)`` of one latent at the model's own resolution; of videos ``(C, frames, h, w)``.
        image_size: ``(height, width)`` in pixels at the model's own resolution.
        own_guidance: the guidance scale that the checkpoint's own pipeline samples with by default.
        guidance_embedded: whether the guidance scale is an input of the network, in the place of a second call.
        refines: whether it starts from images alone, never from pure noise.
        frames: how many images a latent stands for; more than one are a video.
    """

    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    latent_shape: tuple[int, ...]
    image_size: tuple[int, int]
    own_guidance: float = 7.5
    guidance_embedded = False
    refines = False
    frames = 1

    @property
    def sampling_schedule(self) -> NoiseSchedule:
        return self.schedule

    @classmethod
    def guidance_by_default(
        cls, index: Mapping[str, Any], scheduler: Mapping[str, Any], network: Mapping[str, Any]
    ) -> float:
        """``own_guidance`` of a checkpoint, by its model_index.json and the configurations of two of its parts."""
        return cls.own_guidance

    def guidance(self, scale: float | None) -> tuple[float, float | None]:
        """``(scale of classifier-free guidance, guidance as an input of the network)`` for a ``guidance_scale`` as the
        checkpoint's own pipeline takes it: up to 1 there is none. Raises ``InvalidInput`` for one that means nothing.
        """
        return max(check_guidance(self.own_guidance if scale is None else scale), 1.0), None

    def guided(self, outputs: list[Tensor], weights: list[float]) -> tuple[list[Tensor], list[float]]:
        """Outputs and weights of ``evaluate``, as the checkpoint's own pipeline makes a guided prediction of them."""
        return outputs, weights

    def sampling_levels(self, num_inference_steps: int) -> Tensor:
        """The levels at which the checkpoint's scheduler calls the network, descending: int64, or for flow matching
        float64.
        """
        return inversion_levels(self.schedule, num_inference_steps).flip(0)

    def solver(self, num_inference_steps: int) -> Any | None:
        """The checkpoint's own scheduler, ready for the first of so many steps, where samples take its steps between
        ``sampling_levels``; None: they take those of DDIM, or Euler's.
        """
        return None

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> list[Image]:
        """Images of latents ``(n, C, h, w)``; of videos the ``frames`` of the first, then those of the next. Raises
        ``InvalidInput`` for another shape or non-finite values.
        """

    def translated_lora(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter with diffusers' names, of one with the names of a model's original code."""
        return tensors


def part_files(folder: Path) -> list[Path]:
    """Configuration, vocabulary, chat template and safetensors files of one part, in the order of their names."""
    return sorted(file for file in folder.rglob("*") if file.suffix in _PART_FILES)


def check_guidance(scale: float) -> float:
    """The scale. Raises ``InvalidInput`` unless it is finite and not negative."""
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
        raise invalid("guidance_scale", scale, "is not a finite number of at least 0", "pass 1 for no guidance")
    return scale


def check_frames(frames: int, argument: str = "data.frames") -> int:
    """The number. Raises ``InvalidInput`` unless it is 4k + 1: the VAE of Wan takes one frame, then four each."""
    if type(frames) is not int or frames < 1 or frames % 4 != 1:
        near = 1 if type(frames) is not int or frames < 1 else frames - (frames - 1) % 4
        problem = "is not 4k + 1 frames, as the VAE for videos takes them"
        raise invalid(argument, frames, problem, f"use {near} or {near + 4}")
    return frames


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


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``InvalidInput`` unless ``latents`` are finite, floating point, and of the channels and as many dimensions
    as a latent of ``shape``.
    """
    if latents.ndim != 1 + len(shape) or latents.shape[1] != shape[0] or not latents.is_floating_point():
        found = f"{tuple(latents.shape)} {latents.dtype}"
        wanted = f"(n, {shape[0]}, {'frames, ' if len(shape) == 4 else ''}h, w)"
        raise invalid("latents", found, "has the wrong shape or dtype", f"pass floating-point {wanted}")
    if not bool(torch.isfinite(latents).all()):
        raise invalid("latents", f"{tuple(latents.shape)}", "holds NaN or infinity", "look at how they were made")


def pixels_of(images: Sequence[Image], mode: str) -> Tensor:
    """``(n, C, height, width)`` float32 in [-1, 1] of images of one size, in PIL's mode ``L`` or ``RGB``."""

    def pixels(image: Image) -> Tensor:
        flat = torch.frombuffer(bytearray(image.convert(mode).tobytes()), dtype=torch.uint8)
        return flat.reshape(image.height, image.width, len(mode)).permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0

    return torch.stack([pixels(image) for image in images])


def images_of(pixels: Tensor) -> list[Image]:
    """Images of uint8 ``(n, C, height, width)``, gray with one channel."""
    pil = require("PIL.Image", extra="train", purpose="writing images")
    mode, size = "L" if pixels.shape[1] == 1 else "RGB", (pixels.shape[3], pixels.shape[2])
    return [pil.frombytes(mode, size, one.permute(1, 2, 0).numpy().tobytes()) for one in pixels.cpu()]


def cast_inputs(
    network: nn.Module, latents: Tensor, conditioning: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents and conditioning in the storage type of the network.

    Objectives keep latents in float32; a network kept in bf16 does not accept them as they are. Raises ``InvalidInput``
    where the conditioning lacks one of the named tensors.
    """
    for name in names:
        if name not in conditioning:
            found = sorted(conditioning)
            raise invalid("conditioning", found, f"lacks {name!r}", "build it with the model's encode_prompts")
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), latents.dtype)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in conditioning.items()}
    return latents.to(dtype), cast


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside wrappers that keep it as ``.module`` (DistributedDataParallel) or ``._orig_mod`` (compile)."""
    while True:
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def saveable_network(network: nn.Module) -> nn.Module:
    """The unwrapped network. Raises ``InvalidInput`` if adapters are still separate or weights quantized: what was
    written could not be loaded.
    """
    plain = unwrap(network)
    problem, remedy = "", ""
    if any(".lora_" in name for name, _ in plain.named_parameters()):
        problem, remedy = "holds LoRA layers that are not merged", "merge the adapter, then save"
    elif any(hasattr(module, "dequantized") for module in plain.modules()):
        problem, remedy = "holds quantized weights", "save what unquantized() gives, with the adapter merged"
    if problem:
        raise invalid("network", type(plain).__name__, problem, remedy)
    return plain
