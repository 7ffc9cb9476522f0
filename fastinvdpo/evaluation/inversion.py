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
from PIL import ImageDraw
from PIL.Image import Image, Resampling
from PIL.Image import new as new_image
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
from fastinvdpo.evaluation.sampling import descending_levels, encode_prompt
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
        latent_mse: ``(n,)`` mean squared error of the latents; the error of inversion alone.
        mse: ``(n,)`` mean squared error of the pixels on a scale of 0 to 1; the VAE's own error is part of it.
        psnr: ``(n,)`` ``-10 log10(mse)`` in dB, infinite for equal images.
        network_evaluations: samples that passed the network.
    """

    clean_latents: Tensor
    latents: Tensor
    reconstructed_latents: Tensor
    prompts: list[str]
    originals: list[Image]
    reconstructions: list[Image]
    latent_mse: Tensor
    mse: Tensor
    psnr: Tensor
    network_evaluations: int


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
    _check_numbers(num_inference_steps, guidance_scale, renoise_iterations, batch_size)
    texts = _one_per_image(prompts, len(images))
    guidance_scale = _guidance(model, guidance_scale)
    # Before any image is encoded, for their checks.
    levels = descending_levels(model, num_inference_steps).round().long().unique()
    model.guidance(guidance_scale)
    settings = InversionSettings(renoise_iterations=renoise_iterations)
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
            noise = invert(network, model.sampling_schedule, clean, up, prompt, settings)
            # The way back is the same plan reversed, with the network at the level it leaves, which on the way up was
            # the level it went to: both directions use the same model times.
            source, target, lower, upper = (
                column.flip(1) for column in (up.target, up.source, up.noise_lower, up.noise_upper)
            )
            down = InversionPlan(source, target, up.steps, lower, upper)
            back = InversionSettings(model_time="source")
            parts.append((clean, noise, invert(network, model.sampling_schedule, noise, down, prompt, back)))
    finally:
        model.network.train(was_training)
    clean, latents, reconstructed = (torch.cat(column) for column in zip(*parts, strict=True))
    reconstructions = model.decode_latents(reconstructed)
    originals = [image.convert(new.mode) for image, new in zip(images, reconstructions, strict=True)]
    mse = torch.stack([_pixel_mse(*both) for both in zip(originals, reconstructions, strict=True)])
    return InversionResult(
        clean_latents=clean,
        latents=latents,
        reconstructed_latents=reconstructed,
        prompts=texts,
        originals=originals,
        reconstructions=reconstructions,
        latent_mse=(reconstructed - clean).square().flatten(1).mean(1).cpu(),
        mse=mse,
        psnr=-10.0 * mse.log10(),
        network_evaluations=evaluations,
    )


def overview(model: DiffusionModel, result: InversionResult) -> Image:
    """One row an image: original, inverted noise (decoded as if it were an image), reconstruction."""
    rows = list(zip(result.originals, model.decode_latents(result.latents), result.reconstructions, strict=True))
    width, height = rows[0][0].size
    scale = max(1, math.ceil(_TILE / min(width, height)))
    width, height, margin, header = width * scale, height * scale, 8, 20
    size = (len(_COLUMNS) * (width + margin) + margin, header + len(rows) * (height + margin) + margin)
    sheet = new_image("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(_COLUMNS):
        left = margin + column * (width + margin)
        draw.text((left, margin // 2), title, fill="black")
        for line, row in enumerate(rows):
            # Whole pixels stay whole: a small image must not look smooth.
            tile = row[column].convert("RGB").resize((width, height), Resampling.NEAREST)
            sheet.paste(tile, (left, header + margin + line * (height + margin)))
    return sheet


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
        guidance_scale = _guidance(model, guidance_scale)
        side, captions = min(model.image_size), [""]
        if pair_set:
            named, captions = _of_pair_set(pair_set, side, max_images)
        result = invert_images(
            model,
            [transform(image, side, Decisions())[0] for _, image in named],
            captions if texts is None else texts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            renoise_iterations=renoise_iterations,
            batch_size=batch_size,
        )
        columns = (result.latent_mse.tolist(), result.mse.tolist(), result.psnr.tolist())
        report = {
            "model": {"family": model.family, "path": str(where), "prediction_type": model.schedule.prediction_type},
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "renoise_iterations": renoise_iterations,
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


def _check_numbers(
    num_inference_steps: int,
    guidance_scale: float | None,
    renoise_iterations: int,
    batch_size: int,
    max_images: int = 1,
) -> None:
    for name, value, least in (
        ("num_inference_steps", num_inference_steps, 1),
        ("renoise_iterations", renoise_iterations, 0),
        ("batch_size", batch_size, 1),
        ("max_images", max_images, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise invalid(name, value, f"is not a whole number of at least {least}", f"pass {least} or more")
    if guidance_scale is not None:
        check_guidance(guidance_scale)


def _pixel_mse(first: Image, second: Image) -> Tensor:
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in (first, second)]
    return ((pixels[0].double() - pixels[1].double()) / 255.0).square().mean()


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


def _of_pair_set(path: Path, side: int, max_images: int) -> tuple[list[tuple[str, Image]], list[str]]:
    """``([(name, image)], captions)``: winner and loser of the first pairs."""
    dataset = PairDataset(path, resolution=side)
    named: list[tuple[str, Image]] = []
    captions: list[str] = []
    for i in range(min(len(dataset), math.ceil(max_images / 2))):
        pair = dataset[i]
        named += [(f"row {pair.row}, winner", pair.winner), (f"row {pair.row}, loser", pair.loser)]
        captions += [pair.caption] * 2
    return named[:max_images], captions[:max_images]
