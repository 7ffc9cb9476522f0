"""``fastinvdpo precompute``: fill a cache with everything that does not depend on the policy.

For every pair latents and embeddings; for Inversion-DPO also the reference's trajectories, targets and predictions, and
with ``cache.draws`` what the reference predicts at K draws of every pair. Where the policy inverts, it changes at every
step, and there is nothing more to store.

A cache serves a run exactly when all entries of its key agree. The pairs enter with digests of what they hold, files of
the model with the SHA-256 of their content. Where nothing of the reference is stored, neither UNet nor noise schedule
enters: they change nothing.

Shards are computed in fixed batches of their own, so their content does not depend on which process makes them, nor on
how often the work was interrupted. Draws are made last, from the shards of all pairs, as a run would make them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.atomic import clean_folder
from fastinvdpo.config import TrainConfig
from fastinvdpo.data import LikedDataset, PairDataset
from fastinvdpo.data.broken import REPORT, write_report
from fastinvdpo.data.content import content_of
from fastinvdpo.diffusion.prompt import chunked
from fastinvdpo.errors import invalid
from fastinvdpo.io import Digests, check_same, key_hash, plain, read_object
from fastinvdpo.methods import ChainObjective, SingleTimestepObjective
from fastinvdpo.models import checkpoint_files
from fastinvdpo.models.base import SOURCE_LATENTS, Origin
from fastinvdpo.models.loading import check_options, family_class
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import batches, opening
from fastinvdpo.trainer.batches import EMPTY, BatchBuilder, EncodedPair, Tensors, embed, encode_sides
from fastinvdpo.trainer.cache import (
    INDEX,
    KINDS,
    MANIFEST,
    PAIRS_PER_SHARD,
    UNCONDITIONAL,
    Manifest,
    PairCache,
    PairIndex,
    checksum,
    reference_key,
    shard_path,
    stored_metadata,
    write_tensors,
)
from fastinvdpo.trainer.checkpoint import frozen_contents
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.order import DrawOrder, EpochOrder
from fastinvdpo.trainer.performance import arrange, decide, require_extras, speed_up

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 3  # 1: images as they are stored, not as a viewer shows them; 2: without checksums
_LOGGER = logging.getLogger("fastinvdpo.trainer")


def precompute(config: TrainConfig, *, progress: bool = True) -> PairCache:
    """Compute the shards that ``config.cache.path`` lacks, and open the cache. A complete one costs nothing but its
    check; several processes share the work.

    Raises:
        InvalidInput: no ``cache.path``; the directory holds what was computed from something else, naming what differs;
            another process is writing there; or data, model and configuration do not fit together.
    """
    config = opening.with_launcher(config)
    if config.cache.path is None:
        raise invalid("cache.path", None, "names no directory to store into", "set it, as in cache.path=runs/cache")
    require_extras(config)
    directory = Path(config.cache.path)
    manifest = Manifest.read(directory)
    digests = Digests(manifest.files if manifest else None)
    key = _key(config, digests)
    if manifest is not None:
        check_same("cache.path", directory, manifest.key, key)
    if manifest is None or not manifest.complete(directory):
        known = manifest is not None or "hash" in stored_metadata(directory / INDEX)
        manifest = manifest or Manifest(key, key_hash(key), PAIRS_PER_SHARD)
        unfinished = replace(manifest, sizes=None, draw_sizes=[], files=digests.remembered)
        _complete(config, directory, unfinished, known, progress)
        manifest = Manifest.read(directory)
        assert manifest is not None
    else:
        clean_folder(directory)
    cache = PairCache(directory, manifest)
    opening.check_pairs(config, cache)
    return cache


def _complete(config: TrainConfig, directory: Path, manifest: Manifest, known: bool, progress: bool) -> None:
    """Write what is missing; ``known``: the directory is a cache, also without the mark of one."""
    accelerator = opening.open_accelerator(config)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    reads, main = [config.model.path, config.data.path], accelerator.is_main_process
    opened = OutputDirectory(directory, "cache.path", earlier=lambda _: known, reads=reads) if main else nullcontext()
    with opened as output:
        if output is not None:
            patterns = [f"{of}-??????.safetensors" for of in KINDS]
            output.claim(*REPORT, files=(MANIFEST, INDEX, UNCONDITIONAL, *patterns, ".lock"))
        dataset = opening.open_dataset(config)
        if output is not None:
            manifest.write(directory)
            write_report(dataset.summary, dataset.broken, output)
            if stored_metadata(directory / INDEX).get("hash") != manifest.hash:
                write_tensors(directory / INDEX, _index(dataset, manifest.pairs_per_shard), hash=manifest.hash)
        accelerator.wait_for_everyone()
        shards = _Shards(config, manifest, dataset, accelerator)
        stores = ["pairs", *(["draws"] if config.cache.draws else [])]
        for of in stores:
            _fill(shards, of, accelerator, progress)
            accelerator.wait_for_everyone()
        if main:
            files = {of: list(shards.paths(of).values()) for of in stores}
            replace(
                manifest,
                sizes=[file.stat().st_size for file in files["pairs"]],
                draw_sizes=[file.stat().st_size for file in files.get("draws", ())],
                network_evaluations=sum(
                    stored_metadata(file)["network_evaluations"] for of in stores for file in files[of]
                ),
                digests={name: Digests().one(directory / name) for name in (INDEX, UNCONDITIONAL, *REPORT)},
                frozen=shards.frozen,
            ).write(directory)
    accelerator.wait_for_everyone()


def _key(config: TrainConfig, digests: Digests) -> dict[str, Any]:
    """Everything that changes what is stored for ``config``, as plain types by the name of the configuration's key; of
    ``data.path`` and ``model.path`` the content found there. Raises ``InvalidInput`` where there is none.
    """
    model, data, reference = config.model, config.data, reference_key(config)
    held = "draws" if config.cache.draws else "trajectories, reference predictions"
    encoding = ("ties", "resolution", "relabel_by_score", "max_broken", "latents")

    def given(*names: str) -> dict[str, Any]:
        """Settings that are not null, so that caches from before there were these settings still serve."""
        return {f"model.{name}": value for name in names if (value := getattr(model, name)) is not None}

    family = opening.family_of(config)
    source = opening.open_data_source(data).with_sources(family_class(family).edits)
    source.resolve((*source.form.images, "caption"))
    opening.warn_of_masks(source)
    if source.remote:
        source.files()  # raises
    check_options(family, {"frames": data.frames})
    replaced = {name: getattr(model, name) for name in Origin._fields[1:]}
    files = checkpoint_files(family, model.path, **replaced)
    network = "unet" if "unet" in files else "transformer"
    key: dict[str, Any] = {
        "format": FORMAT,
        "contents": "latents, embeddings"
        + (f", {held}" if reference else "")
        + (", noise" if config.method.needs_noise else ""),
        "cache.dtype": config.cache.dtype,
        **content_of(source, digests),
        **{f"data.{name}": getattr(data, name) for name in encoding},
        **({"data.form": f"{data.form}, image by image"} if config.method.unpaired else {}),
        **({"data.frames": data.frames} if data.frames else {}),
        "model.family": family,
        "model.variant": model.variant,
        **{f"model {part}": digests.of(paths) for part, paths in files.items() if part not in (network, "scheduler")},
        **given("max_sequence_length"),
    }
    if reference:
        (schedule,) = [file for file in files["scheduler"] if file.name == "scheduler_config.json"]
        settings = read_object(schedule, "model.path")
        key |= {
            f"model {network}": digests.of(files[network]),
            **given("zero_terminal_snr", "guidance_embedding"),
            **{f"scheduler {name}": value for name, value in settings.items() if not name.startswith("_")},
            **reference,
            "training.mixed_precision": config.training.mixed_precision,
            "model.reference_dtype": model.reference_dtype,
            **given("quantization", "reference_quantization"),
        }
    return plain(key)


def _index(dataset: PairDataset | LikedDataset, pairs_per_shard: int) -> Tensors:
    """Number the distinct images and captions in the order of their first occurrence."""
    numbers: dict[str, dict[Any, int]] = {"image": {}, "caption": {}}
    first: dict[str, list[int]] = {"image": [], "caption": []}
    images, captions, rows, scores, ties, liked = [], [], [], [], [], list[bool]()
    for i in range(len(dataset)):
        if i % pairs_per_shard == 0:
            for kind, known in numbers.items():
                first[kind].append(len(known))
        entry = dataset.entry(i)
        known = numbers["image"]
        images.append([known.setdefault(key, len(known)) for key in entry.keys])
        told = entry.caption, entry.source_key
        captions.append(numbers["caption"].setdefault(told, len(numbers["caption"])))
        rows.append(entry.row)
        ties.append(entry.tie)
        if entry.scores is not None:
            scores.append(entry.scores)
        if entry.liked is not None:
            liked.append(entry.liked)
    stored = {"images": images, "captions": captions, "rows": rows}
    stored |= {f"first_{kind}": [*first[kind], len(known)] for kind, known in numbers.items()}
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in stored.items()}
    if scores:
        tensors["scores"] = torch.tensor(scores, dtype=torch.float64)
    if any(ties):
        tensors["ties"] = torch.tensor(ties)
    if liked:
        tensors["liked"] = torch.tensor(liked)
    return tensors


def _fill(shards: _Shards, of: str, accelerator: Accelerator, progress: bool) -> None:
    """Write the shards that are missing; process ``r`` of ``n`` takes those whose number is ``r`` modulo ``n``."""
    paths, evaluations = shards.paths(of), shards.networks.evaluations
    missing = [shard for shard, path in paths.items() if stored_metadata(path).get("hash") != shards.hash]
    own = [shard for shard in missing if shard % accelerator.num_processes == accelerator.process_index]
    _LOGGER.info("%s: computing %d of %d shards of %s", shards.directory, len(missing), len(paths), of)
    tqdm = require("tqdm.auto", extra="train", purpose="the progress bar").tqdm
    hidden = not (progress and accelerator.is_local_main_process)
    make = shards.make_draws() if of == "draws" else shards.make_pairs
    for shard in tqdm(own, desc=f"precomputing {of}", unit="shard", disable=hidden):
        before = evaluations["without_gradient"]
        tensors = make(shard)
        spent = evaluations["without_gradient"] - before
        checksums = {kind: [checksum(record) for record in _records(tensors, kind)] for kind in KINDS[of]}
        write_tensors(paths[shard], tensors, hash=shards.hash, network_evaluations=spent, crc32=checksums)


def _records(tensors: Tensors, kind: str) -> Iterator[Tensors]:
    """The images, captions or draws of a shard, one by one."""
    own = {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}
    for place in range(len(next(iter(own.values()), ()))):
        yield {name: tensor[place] for name, tensor in own.items()}


class _AsStored(PairCache):
    """Pairs whose sides stay where they are: a tie is swapped when it is visited, with what is stored of its sides."""

    def fetch(self, index: int, draw: int) -> EncodedPair:
        return replace(super().fetch(index, draw), tie=False)


class _Shards:
    """Computes the tensors of a shard; see cache.py for their names. The embedding of the empty prompt is written.

    ``frozen``: digests of the model's frozen parts, on the first process.
    """

    def __init__(
        self, config: TrainConfig, manifest: Manifest, dataset: PairDataset | LikedDataset, accelerator: Accelerator
    ) -> None:
        self._config, self._manifest, self._dataset = config, manifest, dataset
        self.directory, self.hash = Path(str(config.cache.path)), manifest.hash
        self._index, self._dtype = PairIndex(self.directory), opening.DTYPES[config.cache.dtype]
        self._model = model = opening.open_model(config)
        self.frozen = frozen_contents(model) if accelerator.is_main_process else {}
        switches = decide(config, model.network, accelerator)
        model.to(accelerator.device)
        self.networks = Networks(
            model,
            lora=None,
            gradient_checkpointing=False,
            reference="self",
            reference_dtype=opening.reference_dtype(config),
            reference_quantization=config.model.reference_quantization,
            offload=config.model.offload,
        )
        arrange(self.networks, switches)
        speed_up(self.networks, switches)
        self.networks.accelerator = accelerator
        self._reference = chunked(self.networks.reference, config.training.max_batch)
        self._unconditional = self._as_stored(batches.empty_conditioning(model))
        if accelerator.is_main_process and stored_metadata(self.directory / UNCONDITIONAL).get("hash") != self.hash:
            write_tensors(self.directory / UNCONDITIONAL, self._unconditional, hash=self.hash)

    def paths(self, of: str) -> dict[int, Path]:
        """The files of all shards, of ``"pairs"`` or of ``"draws"``."""
        return {shard: shard_path(self.directory, shard, of) for shard in range(self._index.shards)}

    def make_pairs(self, shard: int) -> Tensors:
        """The images and captions that occur first in the pairs of a shard."""
        sides, captions = self._new(shard)
        parts: defaultdict[str, list[Tensor]] = defaultdict(list)
        size = 2 * (self._config.cache.batch_size or self._config.training.batch_size)
        for start in range(0, len(captions), size):
            pairs, seen = captions[start : start + size], self._dataset
            sources = [seen.pair(i, draw=i).source for i in pairs] if self._model.edits else []
            embedded = embed(self._model, [seen.caption(i) for i in pairs], sources)
            for name, tensor in self._as_stored(embedded).items():
                parts[f"caption.{name}"].append(tensor)
        for start in range(0, len(sides), size):
            for name, tensor in self._images(sides[start : start + size]).items():
                parts[f"image.{name}"].append(tensor.cpu())
        return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}

    def make_draws(self) -> Callable[[int], Tensors]:
        """From a shard to the draws of its pairs, in the batches that a run with their numbers as sample indices would
        make of the stored pairs.
        """
        config, method, draws = self._config, self._config.method, self._config.cache.draws or 0
        seed, pairs = config.training.seed, _AsStored(self.directory, self._manifest)
        if method.awaits_score_range:
            method = method.with_score_range(1.0)  # a weight, and no draw, follows from it
        objective = method.objective(self._model.schedule)
        assert isinstance(objective, SingleTimestepObjective)
        per_shard = self._manifest.pairs_per_shard * draws
        size = min(config.cache.batch_size or config.training.batch_size, per_shard)
        every = EpochOrder(len(pairs) * draws, lambda _: np.arange(len(pairs) * draws) // draws)
        builder = BatchBuilder(
            pairs,
            self._model.device,
            DrawOrder(len(pairs), seed, size, 1, epochs=every),
            with_unconditional=method.guided,
            caption_dropout=config.data.caption_dropout,
        )

        def make(shard: int) -> Tensors:
            parts: defaultdict[str, list[Tensor]] = defaultdict(list)
            end = min((shard + 1) * per_shard, every.length)
            for start in range(shard * per_shard, end, size):
                stop = min(start + size, end)
                # The last batch is filled up with draws before it: a network may round otherwise in a smaller one.
                batch = builder.build(range(max(0, stop - size), stop))
                stored = objective.store_draws(self._reference, batch, seed=seed, dtype=self._dtype)
                for name in ("trajectory", "reference_pred"):
                    if (tensor := getattr(stored, name)) is not None:
                        parts[f"draw.{name}"].append(torch.stack(tensor.cpu().chunk(2), dim=1)[start - stop :])
            return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}

        return make

    def _new(self, shard: int) -> tuple[list[tuple[int, int]], list[int]]:
        """The (pair, side) of every image that occurs first in this shard, and a pair of each caption likewise."""
        index, start = self._index, shard * self._manifest.pairs_per_shard
        pairs = range(start, min(start + self._manifest.pairs_per_shard, len(index)))
        sides = {int(index.images[pair, side]): (pair, side) for pair in reversed(pairs)
                 for side in reversed(range(index.images.shape[1]))}  # fmt: skip
        captions = {int(index.captions[pair]): pair for pair in pairs}
        new = {kind: range(*first[shard : shard + 2]) for kind, first in index.first.items()}
        return [sides[number] for number in new["image"]], [captions[number] for number in new["caption"]]

    def _images(self, sides: Sequence[tuple[int, int]]) -> Tensors:
        config, numbers = self._config, sorted({pair for pair, _ in sides})
        with ThreadPoolExecutor(max(1, config.training.num_workers)) as threads:  # decoding leaves the interpreter lock
            pairs = dict(zip(numbers, threads.map(lambda i: self._dataset.pair(i, draw=i), numbers), strict=True))
        seen = [pairs[i].sides[side] for i, side in sides]
        stored = encode_sides(self._model, seen, sampled=config.data.latents == "sampled")
        if config.cache.draws is not None or config.method.reference_chain is None:
            return stored
        objective = config.method.objective(self._model.schedule)
        assert isinstance(objective, ChainObjective)
        numbers = [int(self._index.captions[i]) for i, _ in sides]
        distinct = {number: pairs[i] for number, (i, _) in zip(numbers, sides, strict=True)}
        which = torch.tensor([list(distinct).index(number) for number in numbers])
        # What is stored is rounded before it is used, so that training sees exactly what the reference saw.
        told = [(pair.caption, pair.source) for pair in distinct.values()]
        embedded = self._as_stored(embed(self._model, *zip(*told, strict=True)))
        stacked = {name: tensor[which] for name, tensor in embedded.items()}
        given = {name: tensor for name, tensor in stacked.items() if not name.startswith(EMPTY)}
        empty = {name: batches.own_empty(name, stacked) for name in given}
        empty |= {name: tensor.expand(len(sides), *tensor.shape[1:]) for name, tensor in self._unconditional.items()}
        latents = stored["latents"]
        prompts = [
            {name: _as(tensor.to(latents.device), torch.float32) for name, tensor in part.items()}
            | batches.geometry_of(stored)
            for part in (given, empty)
        ]
        chain = objective.reference_trajectory(self._reference, latents, *prompts).to(self._dtype)
        predictions = objective.reference_predictions(self._reference, chain.to(latents.dtype), *prompts)
        return {**stored, "trajectory": chain, "reference_pred": predictions.to(self._dtype)}

    def _as_stored(self, embedded: Tensors) -> Tensors:
        """A conditioning on the host."""
        kinds = {SOURCE_LATENTS: torch.float32}
        return {name: _as(tensor.cpu(), kinds.get(name, self._dtype)) for name, tensor in embedded.items()}


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``dtype``; whole numbers, such as masks, stay what they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
