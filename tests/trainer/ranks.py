"""Training runs whose gradients are kept, in this process or in several that share every step.

Several runs share one process group, so that starting up is paid once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastinvdpo.errors import NonFiniteLoss
from fastinvdpo.models.base import Origin
from fastinvdpo.models.flow import StableDiffusion3Model
from fastinvdpo.models.pipeline import PipelineModel
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.trainer import TrainConfig, TrainResult, opening
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.opening import open_accelerator
from tests.trainer.forked import Server
from tests.trainer.tiny import train_model


class _Double(PipelineModel):
    """Everything in float64."""

    def encode_images(self, images: Sequence[Any], posterior: Tensor | None = None) -> Tensor:
        return super().encode_images(images, posterior).double()

    def encode_prompts(self, prompts: Sequence[str], **geometry: Any) -> dict[str, Tensor]:
        return {name: value.double() for name, value in super().encode_prompts(prompts, **geometry).items()}


class DoubleModel(_Double, StableDiffusionModel):
    """With a UNet."""


class DoubleTransformer(_Double, StableDiffusion3Model):
    """With a transformer."""


class BrokenModel(DoubleModel):
    """Gives latents that are not finite to the first of several processes."""

    def encode_images(self, images: Sequence[Any], posterior: Tensor | None = None) -> Tensor:
        return super().encode_images(images, posterior) * (torch.nan if os.environ.get("RANK") == "0" else 1.0)


@dataclass
class Kept:
    """What a run did in one process.

    Attributes:
        result: None for a run that ended in ``error``, a loss that is not finite.
        gradients: of every step, ``(2, parameters)``: before clipping and after it.
        inversion_calls: network calls without gradient in every step.
        moved: how far a weight of the model that was written has moved from the base model's at most.
    """

    result: TrainResult | None = None
    error: str = ""
    gradients: list[Tensor] = field(default_factory=list)
    inversion_calls: list[int] = field(default_factory=list)
    moved: float = 0.0


def run_kept(run: dict[str, Any], family: type[PipelineModel] = DoubleModel) -> Kept:
    """Train as ``run`` says."""
    config = TrainConfig.from_mapping(run)
    dtype = torch.float64 if issubclass(family, _Double) else torch.float32
    options = {"resolution": config.data.resolution, "max_sequence_length": config.model.max_sequence_length}
    given = {name: value for name, value in options.items() if value is not None}
    model = family.load(Origin.of(config.model.path), dtype=dtype, **given)
    kept, made = Kept(), [0]
    start = {name: value.clone() for name, value in model.network.state_dict().items()}
    clip, policy = accelerate.Accelerator.clip_grad_norm_, Networks.policy

    def counted(self: Networks, *arguments: Any) -> Tensor:
        made[0] += not torch.is_grad_enabled()
        return policy(self, *arguments)

    def clipped(self: accelerate.Accelerator, parameters: Any, *arguments: Any, **options: Any) -> Any:
        parameters = list(parameters)
        before = flat_gradient(parameters)
        norm = clip(self, parameters, *arguments, **options)
        kept.gradients.append(torch.stack([before, flat_gradient(parameters)]))
        kept.inversion_calls.append(made[0] - sum(kept.inversion_calls))
        return norm

    with (
        mock.patch.object(accelerate.Accelerator, "clip_grad_norm_", clipped),
        mock.patch.object(Networks, "policy", counted),
    ):
        try:
            kept.result = train_model(config, model, opening.open_dataset(config))
        except NonFiniteLoss as error:
            kept.error = str(error)
            return kept
    if os.environ.get("RANK", "0") == "0":
        kept.moved = max(float((value - start[name]).abs().max()) for name, value in weights(kept).items())
    return kept


def weights(kept: Kept) -> dict[str, Tensor]:
    """Of the model that a run wrote."""
    assert kept.result is not None, kept.error
    folder = next(path for name in ("unet", "transformer") if (path := kept.result.model_directory / name).is_dir())
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def flat_gradient(parameters: list[torch.nn.Parameter]) -> Tensor:
    """All gradients in one vector, whole also where they are kept in shards; a parameter without counts as zero."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([(part.full_tensor() if isinstance(part, DTensor) else part).flatten() for part in parts])


def in_processes(forks: Server, runs: dict[str, dict[str, Any]], folder: Path, *options: str) -> dict[str, list[Kept]]:
    """Make the runs in two processes; what each of them kept, by name."""
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps(runs))
    forks.together(main, str(folder), *options)
    return {name: [torch.load(folder / f"{name}-{r}.pt", weights_only=False) for r in range(2)] for name in runs}


def open_sharding_accelerator(config: TrainConfig) -> accelerate.Accelerator:
    """accelerate turns FSDP on for GPUs alone; everything below that works on a CPU as well."""
    accelerator, mixed_precision = open_accelerator(config), config.training.mixed_precision
    accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", cpu_ram_efficient_loading=True
    )
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    if mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(mixed_precision)
    return accelerator


# By a word in the name of a run.
FAMILIES: dict[str, type[PipelineModel]] = {
    "float32": StableDiffusionModel,
    "broken": BrokenModel,
    "sd3": DoubleTransformer,
}


def main(folder: str, *options: str) -> None:
    """One process of :func:`in_processes`. Option ``fsdp``: with the weights in shards."""
    where, rank = Path(folder), os.environ["RANK"]
    if "fsdp" in options:
        opening.open_accelerator = open_sharding_accelerator
    for name, run in json.loads((where / "runs.json").read_text()).items():
        family = next((model for word, model in FAMILIES.items() if word in name), DoubleModel)
        torch.save(run_kept(run, family), where / f"{name}-{rank}.pt")
