"""A base model beside the one that was aligned from it: images of the same prompts and noise, scored.

Layout of the output directory::

    settings.json             what the images depend on: prompts, settings, contents of both models
    base/00000.png, aligned/  an image for each prompt, lossless, by its place in the list
    evaluation.json           scores and their statistics
    report.html               the same for a person, in one file
"""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastinvdpo._extras import require
from fastinvdpo.atomic import atomic_file, make_directory
from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.images import decode, file_bytes
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.evaluation.metrics import statistics
from fastinvdpo.evaluation.page import report_page
from fastinvdpo.evaluation.sampling import Sampling, sample_images
from fastinvdpo.evaluation.scorers import Scorer, check_scorers, in_batches
from fastinvdpo.io import Digests, as_json, check_same, has_key, key_hash, plain, read_object, sealed, unsealed
from fastinvdpo.models import DiffusionModel, checkpoint_files, load_model, own_guidance, resolve_family
from fastinvdpo.models.adapter_files import adapter_file, merge_adapter, read_adapter, trained_on
from fastinvdpo.models.base import Origin, check_guidance, check_prompts, part_files
from fastinvdpo.models.checkpoints import ENCODERS
from fastinvdpo.models.weights import NETWORKS, weight_files
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer.opening import DTYPES

SIDES = ("base", "aligned")
SUMMARY, PAGE, _SETTINGS = "evaluation.json", "report.html", "settings.json"
_PROMPTS = "content of the prompts"


def parse_sampling(options: Sequence[str]) -> Sampling:
    """The settings in ``key=value`` strings. Raises ``InvalidInput`` for another key, or a value that is no number."""
    kinds = {name: float if value is None else type(value) for name, value in asdict(Sampling()).items()}
    found: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in kinds:
            raise invalid("option", option, "is not known", f"write key=value with one of {', '.join(kinds)}")
        try:
            found[name] = kinds[name](value)
        except ValueError:
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

    Returns:
        What ``evaluation.json`` holds: for each scorer mean and median of both sides, the share of prompts whose
        aligned image scores higher, a tie counted half, with its 95 % interval, and the scores of every image; in
        ``notes`` what else the two sides differ in.

    Raises:
        InvalidInput: an argument that cannot be used; ``output`` holds images of other settings or models.
    """
    sampling = Sampling() if sampling is None else sampling
    before, after = Origin.of(base), Origin.of(aligned)
    family = resolve_family(family, before.path, before.revision)
    texts, scorers = check_prompts(prompts), check_scorers(scorers)
    _check(sampling, shown)
    reads = [before.path, after.path]
    with OutputDirectory(output, earlier=lambda path: has_key(path / _SETTINGS, _PROMPTS), reads=reads) as place:
        place.claim(SUMMARY, PAGE, files=(_SETTINGS, *(f"{side}/*.png" for side in SIDES)))
        files = {"base": checkpoint_files(family, before), "aligned": aligned_files(family, before, after)}
        if sampling.guidance_scale is None:
            sampling = replace(sampling, guidance_scale=own_guidance(family, files["base"]))
        _check_settings(place.path / _SETTINGS, _key(files, texts, family, sampling))
        notes, dtype = _notes(before, after, files), DTYPES[sampling.dtype]
        openers: dict[str, Callable[[], DiffusionModel]] = {
            "base": lambda: load_model(family, before, dtype=dtype),
            "aligned": lambda: open_aligned(family, before, after, dtype=dtype),
        }
        for side in SIDES:
            _sample_missing(openers[side], place.path / side, texts, sampling)
            gc.collect()  # two models need not fit into memory together
        scores = {scorer.name: {side: _score(scorer, place.path / side, texts) for side in SIDES} for scorer in scorers}
        summary = {
            "base": str(before.path),
            "aligned": str(after.path),
            "notes": notes,
            "family": family,
            "prompts": len(texts),
            **asdict(sampling),
            "scorers": {
                scorer.name: {**statistics(**scores[scorer.name]), "key": dict(getattr(scorer, "key", {}))}
                for scorer in scorers
            },
            "samples": [
                {
                    "prompt": text,
                    **{side: f"{side}/{_file_name(number)}" for side in SIDES},
                    "scores": {name: {side: both[side][number] for side in SIDES} for name, both in scores.items()},
                }
                for number, text in enumerate(texts)
            ],
        }
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


def open_aligned(family: str, base: Origin, aligned: Origin, *, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """The aligned model, on the host.

    ``aligned`` is a directory or hub id of a whole model, a directory with the network alone, or an adapter for
    ``base``, as :func:`~fastinvdpo.models.adapter_files.read_adapter` reads it, which is merged into the network's
    weights: into those that it was trained on, where it says that they are not ``base``'s own.

    Raises:
        InvalidInput: none of these, or one that does not fit ``base``.
    """
    model, file = load_model(family, _beneath(base, aligned), dtype=dtype), adapter_file(aligned.path)
    if file is not None:
        merge_adapter(model.network, read_adapter(file, model.network, model.translated_lora))
    return model


def aligned_files(family: str, base: Origin, aligned: Origin) -> dict[str, list[Path]]:
    """The files that :func:`open_aligned` reads, by part."""
    files, file = checkpoint_files(family, _beneath(base, aligned)), adapter_file(aligned.path)
    return files if file is None else {**files, "adapter": part_files(file.parent)}


def _beneath(base: Origin, aligned: Origin) -> Origin:
    """The checkpoint that the aligned side is loaded from, before an adapter is merged."""
    file, folder = adapter_file(aligned.path), Path(aligned.path)
    if file is not None:
        return base._replace(unet_init=trained_on(file).get("unet_init", base.unet_init))
    whole = (folder / "model_index.json").is_file() or (folder / "scheduler").is_dir()
    if folder.is_dir() and not whole and any((folder / part).exists() for part in (*NETWORKS, "config.json")):
        return base._replace(unet_init=aligned.path)
    return aligned  # also a hub id, and a place where nothing is, which load_model refuses


def _notes(base: Origin, aligned: Origin, files: dict[str, dict[str, list[Path]]]) -> list[str]:
    """What a reader of a comparison must know: sides that differ in more than training, or in nothing at all.

    ``files``: of both sides, by part.
    """
    notes = []
    file, ours, theirs = adapter_file(aligned.path), files["base"], files["aligned"]
    network = next(part for part in NETWORKS if part in ours)
    variants = (base.variant, aligned.variant)
    if file is None and _same_weights(ours[network], theirs[network], variants):
        notes.append("Both sides have the same network: the comparison is of a model with itself.")
    if file is not None:
        trained = trained_on(file)
        if not _any_change(file):
            notes.append("The adapter changes nothing: its factors are zero.")
        if "unet_init" in trained:
            notes.append(f"The adapter stands on the weights that it was trained on, {trained['unet_init']}.")
        here = Path(base.path).resolve() if Path(base.path).exists() else base.path
        if trained.get("path", str(here)) != str(here):
            notes.append(f"The adapter was trained on {trained['path']}, not on {base.path}.")
    for part in sorted(ours.keys() & theirs.keys()):
        if part == "scheduler":
            one, other = (_schedule(found) for found in (ours[part], theirs[part]))
            different = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
            if different:
                notes.append(f"Each side is sampled by its own schedule; they differ in {', '.join(different)}.")
        elif part in ENCODERS and not _same_weights(ours[part], theirs[part], variants):
            notes.append(f"The sides have different weights of {part}: what it changes is not the alignment's.")
    return notes


def _any_change(adapter: Path) -> bool:
    second = re.compile(r".*(lora_B|lora_up|lora\.up)")
    return any(bool(tensor.any()) for name, tensor in load_file(adapter).items() if second.match(name))


def _same_weights(one: list[Path], other: list[Path], variants: tuple[str | None, str | None]) -> bool:
    """Whether files hold the same numbers; precision, names of files and configurations aside."""
    places: list[dict[str, Any]] = []
    for files, variant in zip((one, other), variants, strict=True):
        chosen, _ = weight_files("model.path", files[0].parent, variant)
        opened = [safe_open(file, "pt") for file in chosen]
        places.append({name: file for file in opened for name in file.keys()})  # noqa: SIM118
    first, second = places
    return first.keys() == second.keys() and all(
        torch.equal(first[name].get_tensor(name).float(), second[name].get_tensor(name).float()) for name in first
    )


def _schedule(files: list[Path]) -> dict[str, Any]:
    """A scheduler's configuration with its class's defaults."""
    diffusers = require("diffusers", extra="train", purpose="comparing schedules")
    found = read_object(next(file for file in files if file.name == "scheduler_config.json"), "model.path")
    kind = getattr(diffusers, str(found.get("_class_name")), None)
    whole = found if kind is None else {**kind.from_config(found).config, "class": kind.__name__}
    return {name: value for name, value in whole.items() if not name.startswith("_")}


def _check(sampling: Sampling, shown: int) -> None:
    values = {**asdict(sampling), "shown": shown}
    for name, least in {"num_inference_steps": 1, "batch_size": 1, "seed": 0, "shown": 0}.items():
        if values[name] < least:
            raise invalid(name, values[name], f"is below {least}", f"pass {least} or more")
    if sampling.guidance_scale is not None:
        check_guidance(sampling.guidance_scale)
    if sampling.dtype not in DTYPES:
        raise invalid("dtype", sampling.dtype, "is not known", f"choose one of {', '.join(DTYPES)}")


def _key(
    files: dict[str, dict[str, list[Path]]], prompts: list[str], family: str, sampling: Sampling
) -> dict[str, Any]:
    digests = Digests()
    key = {
        "format": 1,
        "family": family,
        "prompts": len(prompts),
        _PROMPTS: key_hash({"prompts": prompts}),
        **{name: value for name, value in asdict(sampling).items() if name != "batch_size"},
        **{f"{side} {part}": digests.of(found) for side in SIDES for part, found in files[side].items()},
    }
    return plain(key)


def _check_settings(file: Path, key: dict[str, Any]) -> None:
    """Note what the images depend on, or raise when the directory holds those of something else."""
    if not file.is_file():
        with atomic_file(file) as partial:
            partial.write_text(as_json(_SETTINGS, sealed(key)), "utf-8")
        return
    try:
        stored = unsealed(file)
    except (OSError, ValueError) as error:
        problem = f"its {_SETTINGS} cannot be read ({error})"
        raise invalid("output", str(file.parent), problem, "delete that directory, or name another") from None
    check_same("output", file.parent, stored, key)


def _sample_missing(
    open_model: Callable[[], DiffusionModel], folder: Path, prompts: Sequence[str], sampling: Sampling
) -> None:
    """Sample the images that ``folder`` lacks, in whole batches: another batch gives other last bits."""
    make_directory(folder)
    batches = [
        range(start, min(start + sampling.batch_size, len(prompts)))
        for start in range(0, len(prompts), sampling.batch_size)
    ]
    missing = [places for places in batches if not all(_is_whole(folder / _file_name(place)) for place in places)]
    if not missing:
        return
    model = open_model()
    if torch.cuda.is_available():
        model.to("cuda")
    for places in missing:
        images = sample_images(model, model.network, [prompts[place] for place in places], places, sampling)
        for place, image in zip(places, images, strict=True):
            with atomic_file(folder / _file_name(place)) as partial:
                image.save(partial, format="PNG")


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_image(path)
    except InvalidInput:
        warnings.warn(f"{path} is damaged, and sampled again with its batch", stacklevel=2)
        return False
    return True


def _score(scorer: Scorer, folder: Path, prompts: Sequence[str]) -> list[float]:
    scores: list[float] = []
    for start in range(0, len(prompts), scorer.batch_size):  # not all images in memory
        texts = prompts[start : start + scorer.batch_size]
        images = [read_image(folder / _file_name(start + place)) for place in range(len(texts))]
        scores += in_batches(scorer, images, texts).tolist()
    return scores


def _file_name(place: int) -> str:
    return f"{place:05d}.png"
