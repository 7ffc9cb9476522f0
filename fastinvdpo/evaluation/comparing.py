"""A base model beside the one that was aligned from it: images of the same prompts and noise, scored.

Layout of the output directory::

    settings.json             what the images depend on: prompts, settings, contents of both models
    base/00000.png, aligned/  an image for each prompt, lossless, by its place in the list; of a video its frames, as
                              00000-000.png, 00000-001.png, …
    noise/00000.npy           the initial latent of both, with the setting noise=true
    evaluation.json           scores and their statistics
    report.html               the same for a person, in one file
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from fastinvdpo.atomic import atomic_file, make_directory
from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.images import decode, file_bytes
from fastinvdpo.data.writing import npy_bytes
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.evaluation.aligned import aligned_files, differences_of, open_aligned
from fastinvdpo.evaluation.metrics import statistics
from fastinvdpo.evaluation.page import report_page
from fastinvdpo.evaluation.prompts import digest_of
from fastinvdpo.evaluation.sampling import Sampling, check_sources, check_whole, initial_noise, sample_images
from fastinvdpo.evaluation.scorers import Scorer, check_scorers, in_batches, mean_of_frames
from fastinvdpo.io import Digests, as_json, check_same, has_key, key_hash, plain, sealed, unsealed
from fastinvdpo.models import DiffusionModel, checkpoint_files, load_model, own_guidance, resolve_family
from fastinvdpo.models.base import Origin, check_frames, check_guidance, check_prompts
from fastinvdpo.models.loading import check_options, family_class
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer.opening import DTYPES

SIDES = ("base", "aligned")
SUMMARY, PAGE, _SETTINGS = "evaluation.json", "report.html", "settings.json"
_PROMPTS, _NOISE = "content of the prompts", "noise"
_SWITCH = {"true": True, "false": False}


def parse_sampling(options: Sequence[str]) -> Sampling:
    """The settings in ``key=value`` strings. Raises ``InvalidInput`` for another key, or a value that is no number."""
    kinds = {name: type(value) for name, value in asdict(Sampling()).items()}
    kinds |= {"guidance_scale": float, "resolution": int}
    found: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in kinds:
            raise invalid("option", option, "is not known", f"write key=value with one of {', '.join(kinds)}")
        try:
            found[name] = _SWITCH[value] if kinds[name] is bool else kinds[name](value)
        except (ValueError, KeyError):
            raise invalid(name, value, "is no number of its kind", f"write, say, {Sampling()!r}") from None
    return Sampling(**found)


def compare(
    base: str | Path | Origin,
    aligned: str | Path | Origin,
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    output: str | Path,
    *,
    family: str = "auto",
    sampling: Sampling | None = None,
    shown: int = 24,
    sources: Sequence[Image] | None = None,
) -> dict[str, Any]:
    """Sample every prompt with both models from the same noise, score the images, and write what came out.

    Images that an earlier call has sampled are kept, whole batches at a time, so that an interrupted evaluation
    continues and ends with the same images; scores are computed again.

    Args:
        base: directory or hub id of the model before alignment; an ``Origin`` names revision and variant too.
        aligned: the model after it: a whole model, its network alone (``unet/``, ``transformer/``), or an adapter for
            ``base``.
        scorers: higher is better; the names must differ.
        output: directory to write, see above.
        shown: pairs of images in the report, the first so many.
        sources: of models that edit, an image for each prompt; see :func:`fastinvdpo.evaluation.prompts.load_sources`.

    Returns:
        What ``evaluation.json`` holds: for each scorer mean and median of both sides, the share of prompts whose
        aligned image scores higher, a tie counted half, with its 95 % interval, and the scores of every image; in
        ``notes`` what else the two sides differ in.

    Raises:
        InvalidInput: an argument that cannot be used; ``output`` holds images of other settings or models.
    """
    sampling = Sampling() if sampling is None else sampling
    before, after = Origin.of(base), Origin.of(aligned)
    family = resolve_family(family, before)
    texts, scorers = check_prompts(prompts), check_scorers(scorers)
    check_whole(1, num_inference_steps=sampling.num_inference_steps, batch_size=sampling.batch_size)
    check_frames(sampling.frames, "frames")
    check_options(family, sampling.size)
    check_whole(0, seed=sampling.seed, shown=shown)
    check_sources(family_class(family), None if sources is None else len(sources), len(texts))
    if sampling.guidance_scale is not None:
        check_guidance(sampling.guidance_scale)
    if sampling.dtype not in DTYPES:
        raise invalid("dtype", sampling.dtype, "is not known", f"choose one of {', '.join(DTYPES)}")
    reads = [before.path, after.path]
    with OutputDirectory(output, earlier=lambda path: has_key(path / _SETTINGS, _PROMPTS), reads=reads) as place:
        place.claim(SUMMARY, PAGE, files=(_SETTINGS, *(f"{side}/*.png" for side in SIDES), f"{_NOISE}/*.npy"))
        files = {"base": checkpoint_files(family, before), "aligned": aligned_files(family, before, after)}
        if sampling.guidance_scale is None:
            sampling = replace(sampling, guidance_scale=own_guidance(family, files["base"]))
        _check_settings(place.path / _SETTINGS, _key(files, texts, family, sampling, sources))
        notes, dtype = differences_of(before, after, files), DTYPES[sampling.dtype]
        opened = partial(load_model, family, before, dtype=dtype, **sampling.size)
        _sample_missing(opened, place.path / "base", texts, sampling, sources)
        gc.collect()  # two models need not fit into memory together
        opened = partial(open_aligned, family, before, after, dtype=dtype, **sampling.size)
        _sample_missing(opened, place.path / "aligned", texts, sampling, sources)
        gc.collect()
        scores = {
            scorer.name: {side: _score(scorer, place.path / side, texts, sampling.frames) for side in SIDES}
            for scorer in scorers
        }
        results = {
            scorer.name: {**statistics(**scores[scorer.name]), "key": dict(getattr(scorer, "key", {}))}
            for scorer in scorers
        }
        samples = [
            {
                "prompt": text,
                **{side: f"{side}/{_files(number, sampling.frames)[0]}" for side in SIDES},
                **({_NOISE: f"{_NOISE}/{_file_name(number, 'npy')}"} if sampling.noise else {}),
                "scores": {name: {side: both[side][number] for side in SIDES} for name, both in scores.items()},
            }
            for number, text in enumerate(texts)
        ]
        summary: dict[str, Any] = {"base": str(before.path), "aligned": str(after.path), "notes": notes}
        summary |= {"family": family, "prompts": len(texts), **asdict(sampling)}
        summary |= {"scorers": results, "samples": samples}
        place.write(SUMMARY, summary)
        place.write(PAGE, report_page(summary, place.path, shown=shown))
    return summary


def read_image(path: Path) -> Image:
    """An image from a file, its checksums verified."""
    try:
        return decode(file_bytes(path, str(path)), str(path))
    except BrokenRow as error:
        problem = f"cannot be read ({error})"
        raise invalid("output", str(path), problem, "delete it to have it sampled again") from error


def _key(
    files: dict[str, dict[str, list[Path]]],
    prompts: list[str],
    family: str,
    sampling: Sampling,
    sources: Sequence[Image] | None,
) -> dict[str, Any]:
    digests = Digests()
    key = {
        "format": 1,
        "family": family,
        "prompts": len(prompts),
        _PROMPTS: key_hash({"prompts": prompts}),
        **{
            name: value
            for name, value in asdict(sampling).items()
            if name not in ("batch_size", _NOISE, *sampling.size)
        },
        **{name: value for name, value in sampling.size.items() if value is not None},
        **({} if sources is None else {"content of the sources": digest_of(sources)}),
        **{f"{side} {part}": digests.of(found) for side in SIDES for part, found in files[side].items()},
    }
    return plain(key)


def _check_settings(file: Path, key: dict[str, Any]) -> None:
    """Note what the images depend on, or raise when the directory holds those of something else."""
    if not file.is_file():
        with atomic_file(file) as temporary:
            temporary.write_text(as_json(_SETTINGS, sealed(key)), "utf-8")
        return
    try:
        stored = unsealed(file)
    except (OSError, ValueError) as error:
        problem = f"its {_SETTINGS} cannot be read ({error})"
        raise invalid("output", str(file.parent), problem, "delete that directory, or name another") from None
    check_same("output", file.parent, stored, key)


def _sample_missing(
    open_model: Callable[[], DiffusionModel],
    folder: Path,
    prompts: Sequence[str],
    sampling: Sampling,
    sources: Sequence[Image] | None,
) -> None:
    """Sample the images that ``folder`` lacks, in whole batches: another batch gives other last bits."""
    noise, model = make_directory(folder).parent / _NOISE, None
    for start in range(0, len(prompts), sampling.batch_size):
        places = range(start, min(start + sampling.batch_size, len(prompts)))
        files = {noise / _file_name(place, "npy") for place in places} if sampling.noise else set[Path]()
        shown = [folder / name for place in places for name in _files(place, sampling.frames)]
        if all(file.is_file() for file in files) and all(map(_is_whole, shown)):
            continue
        if model is None:
            model = open_model()
            if torch.cuda.is_available():
                model.to("cuda")
        seen = None if sources is None else [sources[place] for place in places]
        images = sample_images(model, model.network, [prompts[place] for place in places], places, sampling, seen)
        for file, image in zip(shown, images, strict=True):
            with atomic_file(file) as temporary:
                image.save(temporary, format="PNG")
        if sampling.noise:
            make_directory(noise)
            for place, latent in zip(places, initial_noise(model, sampling.seed, places).cpu().numpy(), strict=True):
                with atomic_file(noise / _file_name(place, "npy")) as temporary:
                    temporary.write_bytes(npy_bytes(latent))


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_image(path)
    except InvalidInput:
        warnings.warn(f"{path} is damaged, and sampled again with its batch", stacklevel=2)
        return False
    return True


def _score(scorer: Scorer, folder: Path, prompts: Sequence[str], frames: int) -> list[float]:
    scores: list[float] = []
    shown = [(folder / name, text) for place, text in enumerate(prompts) for name in _files(place, frames)]
    for start in range(0, len(shown), scorer.batch_size):  # not all images in memory
        files, texts = zip(*shown[start : start + scorer.batch_size], strict=True)
        scores += in_batches(scorer, [read_image(file) for file in files], texts).tolist()
    return mean_of_frames(scores, frames)


def _files(place: int, frames: int) -> list[str]:
    """The names of the image, or of the frames, of a prompt."""
    return [_file_name(place)] if frames == 1 else [f"{place:05d}-{frame:03d}.png" for frame in range(frames)]


def _file_name(place: int, kind: str = "png") -> str:
    return f"{place:05d}.{kind}"
