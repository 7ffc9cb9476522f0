"""Invert images to noise and sample them back: how well a model's own DDIM path is followed in both directions.

Inversion (DDIM, arXiv 2010.02502, section 4.3; ReNoise, arXiv 2403.14602) is what inversion-based preference
optimization rests on: where the reconstruction is poor, the latents it trains on are not those the model would have
sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, Resampling
from safetensors.torch import save_file
from torch import Tensor

from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.images import decode, file_bytes
from fastinvdpo.data.pairs import PairDataset
from fastinvdpo.data.sources import files_of
from fastinvdpo.data.transforms import Decisions, transform
from fastinvdpo.diffusion.inversion import InversionPlan, InversionSettings, invert, plan_levels
from fastinvdpo.diffusion.prompt import Conditioning
from fastinvdpo.errors import invalid
from fastinvdpo.evaluation.page import grid
from fastinvdpo.evaluation.sampling import check_whole, descending_levels, encode_prompt
from fastinvdpo.models import load_model
from fastinvdpo.models.base import DiffusionModel, Origin, check_guidance, check_images, check_prompts
from fastinvdpo.output import OutputDirectory

_TILE = 128  # smallest side of an image in the overview, in pixels
_INPUTS = "pass image files, or one parquet file or directory of parquet shards"
_LATENTS, _OVERVIEW, _REPORT = "latents.safetensors", "invert.png", "report.json"
_COLUMNS = ("original", "inverted noise", "reconstruction")


@dataclass(frozen=True)
class InversionResult:
    """What :func:`invert_images` found for ``n`` images.

    Attributes:
        clean_latents, latents, reconstructed_latents: float32 ``(n, C, h, w)``: the encoded images, the noise that they
            were inverted to, and what sampling from that noise gives.
        originals, reconstructions: images, in the color mode of the model.
        network_evaluations: samples that passed the network.
    """

    clean_latents: Tensor
    latents: Tensor
    reconstructed_latents: Tensor
    prompts: list[str]
    originals: list[Image]
    reconstructions: list[Image]
    network_evaluations: int

    @property
    def latent_mse(self) -> Tensor:
        """``(n,)`` mean squared error of the latents; the error of inversion alone."""
        return (self.reconstructed_latents - self.clean_latents).square().flatten(1).mean(1).cpu()

    @property
    def mse(self) -> Tensor:
        """``(n,)`` mean squared error of the pixels on a scale of 0 to 1; the VAE's own error is part of it."""
        first, second = (
            torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
            for images in (self.originals, self.reconstructions)
        )
        return ((first.double() - second.double()) / 255.0).square().mean(1)

    @property
    def psnr(self) -> Tensor:
        """``(n,)`` ``-10 log10(mse)`` in dB, infinite for equal images."""
        return -10.0 * self.mse.log10()


@torch.no_grad()
def invert_images(
    model: DiffusionModel,
    images: Sequence[Image],
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    renoise_iterations: int = 0,
    batch_size: int = 8,
) -> InversionResult:
    """Invert images along the levels of the checkpoint's scheduler to the last one, and sample back down.

    Args:
        images: ``n`` images of one size that the model accepts.
        prompts: one prompt for each image, or a single one for all of them.
        num_inference_steps: N, from 1 to the schedule's number of levels; the error falls as N grows.
        guidance_scale: used in both directions, with the meaning of :func:`~fastinvdpo.evaluation.sampling.sample`;
            None: none, and for FLUX.1-dev its pipeline's.
        renoise_iterations: K of ReNoise for the way up.
        batch_size: images that pass the network at once.

    Raises:
        InvalidInput: an argument out of range, as many prompts as fit neither case, or unusable images.
    """
    check_images(images)
    if model.edits:
        problem = "edits a source image, which an inversion here does not have"
        raise invalid("model.family", model.family, problem, "invert images of a text-to-image model")
    _check_numbers(num_inference_steps, guidance_scale, renoise_iterations, batch_size)
    texts = _one_per_image(prompts, len(images))
    guidance_scale = _guidance(model, guidance_scale)
    # Before any image is encoded, for their checks.
    levels = descending_levels(model, num_inference_steps).round().long().unique()
    model.guidance(guidance_scale)
    climbing = InversionSettings(renoise_iterations=renoise_iterations)
    descending = InversionSettings(model_time="source")
    evaluations = 0

    def network(latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        nonlocal evaluations
        evaluations += len(latents)
        return model.predict(model.network, latents, timesteps, conditioning)

    was_training = model.network.training
    model.network.eval()
    try:
        parts = []
        for start in range(0, len(images), batch_size):
            clean = model.encode_images(images[start : start + batch_size])
            prompt = encode_prompt(model, texts[start : start + batch_size], guidance_scale)
            up = plan_levels(levels, len(clean))
            noise = invert(network, model.sampling_schedule, clean, up, prompt, climbing)
            # The way back is the same plan reversed, with the network at the level it leaves, which on the way up was
            # the level it went to: both directions use the same model times.
            source, target = up.target.flip(1), up.source.flip(1)
            down = InversionPlan(source, target, up.steps, target, source)
            parts.append((clean, noise, invert(network, model.sampling_schedule, noise, down, prompt, descending)))
    finally:
        model.network.train(was_training)
    clean, latents, reconstructed = (torch.cat(column) for column in zip(*parts, strict=True))
    reconstructions = model.decode_latents(reconstructed)
    originals = [image.convert(new.mode) for image, new in zip(images, reconstructions, strict=True)]
    return InversionResult(clean, latents, reconstructed, texts, originals, reconstructions, evaluations)


def overview(model: DiffusionModel, result: InversionResult) -> Image:
    """One row an image: original, inverted noise (decoded as if it were an image), reconstruction."""
    rows = zip(result.originals, model.decode_latents(result.latents), result.reconstructions, strict=True)
    width, height = result.originals[0].size
    scale = max(1, math.ceil(_TILE / min(width, height)))
    # Whole pixels stay whole: a small image must not look smooth.
    tiles = [image.resize((width * scale, height * scale), Resampling.NEAREST) for row in rows for image in row]
    return grid(tiles, len(_COLUMNS), _COLUMNS, gap=8)


def run_invert(
    family: str,
    path: str | Path | Origin,
    inputs: Sequence[str | Path],
    *,
    output: str | Path,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    renoise_iterations: int = 0,
    batch_size: int = 8,
    max_images: int = 16,
) -> dict[str, Any]:
    """Invert image files, or the images of a pair set, and write what came out into the directory ``output``.

    Written are ``latents.safetensors`` (``clean``, ``inverted``, ``reconstructed``), ``invert.png`` and
    ``report.json``, whose content is returned. Images are resized to the model's resolution and cropped in the middle.

    Args:
        family, path: the model, as for :func:`fastinvdpo.models.load_model`.
        inputs: image files, or a single parquet file or directory of shards; the first ``max_images`` are used.
        prompts: one for all images or one each; without them captions of the pair set, or the empty prompt.

    Raises:
        InvalidInput: any argument that cannot be used; image files are read before the model is loaded.
    """
    _check_numbers(num_inference_steps, guidance_scale, renoise_iterations, batch_size, max_images)
    where = Origin.of(path).path
    with OutputDirectory(output, reads=[where, *inputs]) as place:
        place.claim(_LATENTS, _OVERVIEW, _REPORT)
        pair_set = _pair_set(inputs)
        named = [] if pair_set else _open_files(inputs[:max_images])
        texts = None if prompts is None else check_prompts(prompts)
        if texts is not None and not pair_set:
            texts = _one_per_image(texts, len(named))
        model = load_model(family, path)
        if torch.cuda.is_available():
            model.to("cuda")
        settings: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": _guidance(model, guidance_scale),
            "renoise_iterations": renoise_iterations,
        }
        side, captions = min(model.image_size), [""]
        if pair_set:
            dataset = PairDataset(pair_set, resolution=side)
            pairs = [dataset[i] for i in range(min(len(dataset), math.ceil(max_images / 2)))]
            both = [(pair, name) for pair in pairs for name in ("winner", "loser")][:max_images]
            named = [(f"row {pair.row}, {name}", getattr(pair, name)) for pair, name in both]
            captions = [pair.caption for pair, _ in both]
        images = [transform(image, side, Decisions())[0] for _, image in named]
        result = invert_images(model, images, texts or captions, batch_size=batch_size, **settings)
        columns = (result.latent_mse.tolist(), result.mse.tolist(), result.psnr.tolist())
        report = {
            "model": {"family": model.family, "path": str(where), "prediction_type": model.schedule.prediction_type},
            **settings,
            "network_evaluations": result.network_evaluations,
            "mean": {"latent_mse": float(result.latent_mse.mean()), "mse": float(result.mse.mean())},
            "images": [
                # JSON has no infinity: an image that came back unchanged has no PSNR.
                {"image": name, "prompt": text, "latent_mse": latent, "mse": mse, "psnr": None if mse == 0 else psnr}
                for (name, _), text, latent, mse, psnr in zip(named, result.prompts, *columns, strict=True)
            ],
        }
        latents = (result.clean_latents, result.latents, result.reconstructed_latents)
        stored = dict(zip(("clean", "inverted", "reconstructed"), latents, strict=True))
        with place.file(_LATENTS) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in stored.items()}, partial)
        with place.file(_OVERVIEW) as partial:
            overview(model, result).save(partial, "PNG")
        place.write(_REPORT, report)
    return report


def _guidance(model: DiffusionModel, scale: float | None) -> float:
    if scale is None:
        return model.own_guidance if model.guidance_embedded else 1.0
    return scale


def _one_per_image(prompts: Sequence[str], count: int) -> list[str]:
    texts = check_prompts(prompts)
    if len(texts) not in (1, count):
        problem = f"are {len(texts)} for {count} images"
        raise invalid("prompts", texts, problem, "pass one for each image, or a single one")
    return texts * count if len(texts) == 1 else texts


def _check_numbers(steps: int, guidance: float | None, renoise: int, batch_size: int, max_images: int = 1) -> None:
    check_whole(1, num_inference_steps=steps, batch_size=batch_size, max_images=max_images)
    check_whole(0, renoise_iterations=renoise)
    if guidance is not None:
        check_guidance(guidance)


def _open_files(files: Sequence[str | Path]) -> list[tuple[str, Image]]:
    """``[(name, image)]``; every file must be an image."""
    images = []
    for number, file in enumerate(files):
        try:
            images.append((str(file), decode(file_bytes(Path(file), str(file)), str(file))))
        except BrokenRow as error:
            problem = str(error).partition(". Remedy:")[0]
            raise invalid(f"inputs[{number}]", str(file), f"is not a readable image ({problem})", _INPUTS) from error
    return images


def _pair_set(inputs: Sequence[str | Path]) -> Path | None:
    """The parquet file or directory named by ``inputs``, or ``None`` when they are image files."""
    if isinstance(inputs, str | Path) or len(inputs) == 0:
        raise invalid("inputs", inputs, "is not a list with at least one path", _INPUTS)
    sets = [Path(path) for path in inputs if Path(path).suffix == ".parquet" or Path(path).is_dir()]
    if sets and len(inputs) > 1:
        raise invalid("inputs", [str(path) for path in inputs], "mixes a pair set with other paths", _INPUTS)
    if sets:
        files_of(sets[0], ".parquet", "train")
    return sets[0] if sets else None
