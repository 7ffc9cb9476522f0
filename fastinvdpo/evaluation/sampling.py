"""Deterministic sampling (DDIM, arXiv 2010.02502, eta = 0), so that two networks are compared from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from fastinvdpo.config.sections import EvaluationSection
from fastinvdpo.data.transforms import Decisions, transform
from fastinvdpo.diffusion.prompt import Prompt, evaluate, weighted_sum
from fastinvdpo.diffusion.schedule import affine_coefficients, stack_coefficients
from fastinvdpo.errors import invalid
from fastinvdpo.models.base import DiffusionModel
from fastinvdpo.ops import affine_step, philox

# Keeps the initial noise apart from the random streams of training under the same seed.
STREAM_SAMPLING = 1 << 20


@dataclass(frozen=True)
class Sampling:
    """How images are sampled: DDIM steps, guidance (1 is none; None: as the base's own pipeline), the seed of the
    noise, and how a network computes.

    ``batch_size`` changes speed and last bits alone. ``dtype``: storage type of network and text encoders, ``fp32`` or
    ``bf16``. ``noise``: keep the initial latents beside the images. ``resolution`` (flow matching): side of the images;
    None: the checkpoint's own size. ``frames``: of a video (Wan).
    """

    num_inference_steps: int = 25
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 8
    dtype: str = "fp32"
    noise: bool = False
    resolution: int | None = None
    frames: int = 1

    @property
    def size(self) -> dict[str, Any]:
        """The options of a model that makes such images."""
        return {"resolution": self.resolution, "frames": None if self.frames == 1 else self.frames}


def sample_images(
    model: DiffusionModel,
    network: nn.Module,
    prompts: Sequence[str],
    places: Sequence[int],
    settings: Sampling | EvaluationSection,
    sources: Sequence[Image] | None = None,
) -> list[Image]:
    """The images that ``network`` makes of some prompts of a list, which stand at ``places`` of it, and of their source
    images where the model edits; of videos all ``model.frames`` of the first, then those of the next.
    """
    names = ("num_inference_steps", "guidance_scale", "seed", "batch_size")
    options = {name: getattr(settings, name) for name in names}
    return model.decode_latents(sample(model, network, prompts, places=places, sources=sources, **options))


@torch.no_grad()
def sample(
    model: DiffusionModel,
    network: nn.Module,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 100,
    places: Sequence[int] | None = None,
    sources: Sequence[Image] | None = None,
) -> Tensor:
    """Latents ``(n, *model.latent_shape)``, float32, that ``network`` samples for ``n`` prompts.

    Steps go down the levels of the checkpoint's own scheduler, from standard normal noise at the top one to the clean
    end, and are those of ``model.solver``, where it has one. The noise of a prompt depends on ``seed`` and its place in
    the list alone, not on the batch it travels in; ``places`` says which those are when ``prompts`` are a part of that
    list. ``guidance_scale`` means what it does to the checkpoint's pipeline, whose default it has when None:
    ``ε_uncond + g·(ε_cond − ε_uncond)`` with twice the network evaluations, none up to 1; for FLUX.1-dev an input of
    the network. ``sources``: of models that edit one image a prompt, which is resized and cropped in the middle to the
    size of the model's images.

    Raises InvalidInput for no prompts, another number of places, a step count, batch size or guidance scale that means
    nothing, or a model that does not start from noise.
    """
    if len(prompts) == 0:
        raise invalid("prompts", list(prompts), "is empty", "pass at least one prompt")
    check_whole(1, batch_size=batch_size)
    numbers = list(range(len(prompts)) if places is None else places)
    if len(numbers) != len(prompts):
        raise invalid("places", len(numbers), f"are not those of {len(prompts)} prompts", "pass one for each")
    check_sampling(model, num_inference_steps, guidance_scale)
    check_sources(model, None if sources is None else len(sources), len(prompts))
    levels = descending_levels(model, num_inference_steps)
    was_training = network.training
    network.eval()
    try:
        parts = []
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            seen = [] if sources is None else sources[batch]
            edited = [transform(source, model.image_size, Decisions())[0] for source in seen]
            prompt = encode_prompt(model, prompts[batch], guidance_scale, edited if model.edits else None)
            noise = initial_noise(model, seed, numbers[batch])
            parts.append(_descend(model, network, noise, prompt, levels, model.solver(num_inference_steps)))
    finally:
        network.train(was_training)
    return torch.cat(parts)


def initial_noise(model: DiffusionModel, seed: int, places: Sequence[int]) -> Tensor:
    """The latents ``(n, *model.latent_shape)``, float32, that the prompts at some places of a list are sampled from."""
    index = torch.tensor(places, device=model.device)
    return philox.normal(seed, STREAM_SAMPLING, index, model.latent_shape)


def check_whole(least: int, **numbers: Any) -> None:
    """Raise ``InvalidInput`` where a number, by its name, is no whole one of at least ``least``."""
    for name, value in numbers.items():
        if type(value) is not int or value < least:
            raise invalid(name, value, f"is not a whole number of at least {least}", f"pass {least} or more")


def check_sampling(model: DiffusionModel, num_inference_steps: int, guidance_scale: float | None) -> None:
    """Raise ``InvalidInput`` where the model cannot sample images like that."""
    if model.refines:
        path = None if model.origin is None else str(model.origin.path)
        problem = "is a refiner, which starts from another model's images and not from noise"
        remedy = "sample with base and refiner in diffusers, and use fastinvdpo score"
        raise invalid("model.path", path, problem, remedy)
    model.guidance(guidance_scale)
    descending_levels(model, num_inference_steps)


def check_sources(model: DiffusionModel | type[DiffusionModel], sources: int | None, prompts: int) -> None:
    """Raise ``InvalidInput`` unless as many source images are given as the model edits: None or one a prompt."""
    if sources != (prompts if model.edits else None):
        problem = f"are not the source images of {prompts} prompts, which the family {model.family} edits"
        problem = problem if model.edits else f"mean nothing for the family {model.family}, which edits no images"
        raise invalid("sources", sources, problem, "pass one a prompt to models that edit, None to the others")


def descending_levels(model: DiffusionModel, num_inference_steps: int) -> Tensor:
    """``model.sampling_levels``. Raises ``InvalidInput`` where the network cannot leave the first of them."""
    levels, schedule = model.sampling_levels(num_inference_steps), model.sampling_schedule
    if schedule.prediction_type == "epsilon" and float(schedule.rates(levels[:1])[0]) == 0:
        problem = "leaves no signal at the last level, from which a network that predicts noise cannot start"
        raise invalid("scheduler.rescale_betas_zero_snr", True, problem, "set it to false, or use v_prediction")
    return levels


def encode_prompt(
    model: DiffusionModel,
    prompts: Sequence[str],
    guidance_scale: float | None,
    sources: Sequence[Image] | None = None,
) -> Prompt:
    """The encoded captions with what a guidance scale means to the model: the empty caption beside them, or an input
    of the network; of models that edit, with source images.
    """
    check_sources(model, None if sources is None else len(sources), len(prompts))
    scale, embedded = model.guidance(guidance_scale)
    seen: dict[str, Any] = {"sources": sources} if model.prompt_sees_source else {}
    behind = {} if sources is None else model.encode_sources(sources)
    conditioning = model.encode_prompts(prompts, **seen) | behind
    if embedded is not None:
        conditioning["guidance"] = torch.full((len(prompts),), embedded, device=model.device)
    empty = None if scale == 1 else model.encode_prompts([""] * len(prompts), **seen) | behind
    return Prompt(conditioning, empty, scale)


def _descend(
    model: DiffusionModel, network: nn.Module, latents: Tensor, prompt: Prompt, levels: Tensor, solver: Any | None
) -> Tensor:
    """Walk the descending ``levels`` and one step more, to the clean end (level -1)."""

    def predict(latents: Tensor, timesteps: Tensor, conditioning: object) -> Tensor:
        return model.predict(network, latents, timesteps, conditioning)  # type: ignore[arg-type]

    below = torch.cat([levels[1:], levels.new_tensor([-1])])
    for step, (source, target) in enumerate(zip(levels, below, strict=True)):
        timesteps = source.expand(len(latents))
        outputs, weights = model.guided(*evaluate(predict, latents, timesteps.to(latents.device), prompt))
        if solver is not None:
            prediction = weighted_sum(outputs, weights).to(latents.dtype)
            latents = solver.step(prediction, solver.timesteps[step], latents, return_dict=False)[0]
            continue
        kept, scale = affine_coefficients(model.sampling_schedule, timesteps, target.expand(len(latents)))
        columns = [kept, *(scale * weight for weight in weights)]
        latents = affine_step(latents, outputs, stack_coefficients(latents, *columns))
    return latents
