"""``fastinvdpo precompute``: fill a cache with everything that does not depend on the policy.

For every pair latents and embeddings; for Inversion-DPO also the reference's trajectories, targets and predictions.
InPO and SmPO invert with the policy, which changes at every step, so there is nothing more of them to store.

Shards are computed in fixed batches of their own, so their content does not depend on which process makes them, nor on
how often the work was interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.config import TrainConfig
from fastinvdpo.data.broken import REPORT, write_report
from fastinvdpo.diffusion.prompt import chunked
from fastinvdpo.errors import invalid
from fastinvdpo.io import Digests, check_same, key_hash
from fastinvdpo.methods import ChainObjective
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer.batches import Tensors, embed, encode
from fastinvdpo.trainer.cache import (
    INDEX,
    MANIFEST,
    PAIRS_PER_SHARD,
    UNCONDITIONAL,
    Manifest,
    PairCache,
    PairIndex,
    checksum,
    shard_path,
    stored_metadata,
    write_tensors,
)
from fastinvdpo.trainer.cache_key import cache_key
from fastinvdpo.trainer.contents import frozen_contents
from fastinvdpo.trainer.launch import with_launcher
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.opening import DTYPES, check_dataset, open_accelerator, open_dataset, open_model
from fastinvdpo.trainer.performance import arrange, decide, require_extras, set_tf32, speed_up

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.data import PairDataset
    from fastinvdpo.models import DiffusionModel

_LOGGER = logging.getLogger("fastinvdpo.trainer")


def precompute(config: TrainConfig, *, progress: bool = True) -> PairCache:
    """Compute the shards that ``config.cache.path`` lacks, and open the cache. A complete one costs nothing but its
    check; several processes share the work.

    Raises:
        InvalidInput: no ``cache.path``; the directory holds what was computed from something else, naming what differs;
            another process is writing there; or data, model and configuration do not fit together.
    """
    config = with_launcher(config)
    if config.cache.path is None:
        raise invalid("cache.path", None, "names no directory to store into", "set it, as in cache.path=runs/cache")
    require_extras(config)
    directory = Path(config.cache.path)
    manifest = Manifest.read(directory)
    digests = Digests(manifest.files if manifest else None)
    key = cache_key(config, digests)
    if manifest is not None:
        check_same("cache.path", directory, manifest.key, key)
        if manifest.complete(directory):
            return _opened(config, directory, manifest)
    known = manifest is not None or "hash" in stored_metadata(directory / INDEX)
    manifest = manifest or Manifest(key, key_hash(key), PAIRS_PER_SHARD)
    manifest = replace(manifest, sizes=None, files=digests.remembered)
    accelerator = open_accelerator(config)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    reads, main = [config.model.path, config.data.path], accelerator.is_main_process
    with (
        OutputDirectory(directory, "cache.path", earlier=lambda _: known, reads=reads)
        if main
        else nullcontext() as output
    ):
        if output is not None:
            output.claim(*REPORT, files=(MANIFEST, INDEX, UNCONDITIONAL, "pairs-??????.safetensors", ".lock"))
        dataset = open_dataset(config)
        if output is not None:
            manifest.write(directory)
            write_report(dataset.summary, dataset.broken, output)
            if stored_metadata(directory / INDEX).get("hash") != manifest.hash:
                write_tensors(directory / INDEX, _index(dataset, manifest.pairs_per_shard), hash=manifest.hash)
        accelerator.wait_for_everyone()
        frozen = _fill(config, manifest, dataset, accelerator, progress=progress)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _completed(replace(manifest, frozen=frozen), directory).write(directory)
    accelerator.wait_for_everyone()
    finished = Manifest.read(directory)
    assert finished is not None
    return _opened(config, directory, finished)


def _opened(config: TrainConfig, directory: Path, manifest: Manifest) -> PairCache:
    cache = PairCache(directory, manifest)
    check_dataset(config, cache)
    return cache


def _completed(manifest: Manifest, directory: Path) -> Manifest:
    files = [shard_path(directory, shard) for shard in range(PairIndex.read(directory).shards)]
    evaluations = sum(stored_metadata(file)["network_evaluations"] for file in files)
    digests = {name: Digests().one(directory / name) for name in (INDEX, UNCONDITIONAL, *REPORT)}
    sizes = [file.stat().st_size for file in files]
    return replace(manifest, sizes=sizes, network_evaluations=evaluations, digests=digests)


def _index(dataset: PairDataset, pairs_per_shard: int) -> Tensors:
    """Number the distinct images and captions in the order of their first occurrence."""
    numbers: dict[str, dict[str, int]] = {"image": {}, "caption": {}}
    first: dict[str, list[int]] = {"image": [], "caption": []}
    images, captions, rows, scores, ties = [], [], [], [], []
    for i in range(len(dataset)):
        if i % pairs_per_shard == 0:
            for kind, known in numbers.items():
                first[kind].append(len(known))
        entry = dataset.entry(i)
        known = numbers["image"]
        images.append([known.setdefault(key, len(known)) for key in (entry.winner_key, entry.loser_key)])
        captions.append(numbers["caption"].setdefault(entry.caption, len(numbers["caption"])))
        rows.append(entry.row)
        ties.append(entry.tie)
        if entry.scores is not None:
            scores.append(entry.scores)
    stored = {"images": images, "captions": captions, "rows": rows}
    stored |= {f"first_{kind}": [*first[kind], len(known)] for kind, known in numbers.items()}
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in stored.items()}
    if scores:
        tensors["scores"] = torch.tensor(scores, dtype=torch.float64)
    if any(ties):
        tensors["ties"] = torch.tensor(ties)
    return tensors


def _fill(
    config: TrainConfig, manifest: Manifest, dataset: PairDataset, accelerator: Accelerator, *, progress: bool
) -> dict[str, Any]:
    """Write the shards that are missing; process ``r`` of ``n`` takes those whose number is ``r`` modulo ``n``.

    Returns:
        digests of the model's frozen parts.
    """
    directory = Path(str(config.cache.path))
    index = PairIndex.read(directory)
    paths = {shard: shard_path(directory, shard) for shard in range(index.shards)}
    missing = [shard for shard in paths if stored_metadata(paths[shard]).get("hash") != manifest.hash]
    own = [shard for shard in missing if shard % accelerator.num_processes == accelerator.process_index]
    _LOGGER.info("%s: computing %d of %d shards (%d pairs)", directory, len(missing), len(paths), len(index))
    model = open_model(config)
    frozen = frozen_contents(model) if accelerator.is_main_process else {}
    maker = _ShardMaker(config, model, dataset, index, manifest.pairs_per_shard, accelerator)
    if accelerator.is_main_process and stored_metadata(directory / UNCONDITIONAL).get("hash") != manifest.hash:
        write_tensors(directory / UNCONDITIONAL, maker.unconditional, hash=manifest.hash)
    tqdm = require("tqdm.auto", extra="train", purpose="the progress bar").tqdm
    hidden = not (progress and accelerator.is_local_main_process)
    for shard in tqdm(own, desc="precomputing", unit="shard", disable=hidden):
        before = maker.networks.evaluations["without_gradient"]
        tensors = maker.make(shard)
        evaluations = maker.networks.evaluations["without_gradient"] - before
        checksums = {kind: [checksum(record) for record in _records(tensors, kind)] for kind in ("image", "caption")}
        write_tensors(paths[shard], tensors, hash=manifest.hash, network_evaluations=evaluations, crc32=checksums)
    return frozen


def _records(tensors: Tensors, kind: str) -> Iterator[Tensors]:
    """The images or captions of a shard, one by one."""
    own = {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}
    for place in range(len(next(iter(own.values()), ()))):
        yield {name: tensor[place] for name, tensor in own.items()}


class _ShardMaker:
    """Computes the tensors of a shard; see cache.py for their names."""

    def __init__(
        self,
        config: TrainConfig,
        model: DiffusionModel,
        dataset: PairDataset,
        index: PairIndex,
        pairs_per_shard: int,
        accelerator: Accelerator,
    ) -> None:
        self._model, self._dataset, self._index, self._pairs_per_shard = model, dataset, index, pairs_per_shard
        self._dtype, self._sampled = DTYPES[config.cache.dtype], config.data.latents == "sampled"
        self._chunk = 2 * (config.cache.batch_size or config.training.batch_size)
        self._workers, self._max_batch = config.training.num_workers, config.training.max_batch
        performance = decide(config, model.network, accelerator)
        set_tf32(performance, accelerator.device)
        model.to(accelerator.device)
        self._objective: ChainObjective | None = None
        if config.method.reference_chain is not None:
            objective = config.method.objective(model.schedule)
            assert isinstance(objective, ChainObjective)
            self._objective = objective
        dtype = None if config.model.reference_dtype is None else DTYPES[config.model.reference_dtype]
        self.networks = Networks(
            model,
            lora=None,
            gradient_checkpointing=False,
            reference="self",
            reference_dtype=dtype,
            reference_quantization=config.model.reference_quantization,
        )
        arrange(self.networks, performance)
        speed_up(self.networks, performance)
        self.networks.use_precision(accelerator)
        self.unconditional = self._embed([""])

    def make(self, shard: int) -> Tensors:
        sides, captions = self._new(shard)
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(captions), self._chunk):
            for name, tensor in self._embed(captions[start : start + self._chunk]).items():
                parts.setdefault(f"caption.{name}", []).append(tensor)
        for start in range(0, len(sides), self._chunk):
            for name, tensor in self._images(sides[start : start + self._chunk]).items():
                parts.setdefault(f"image.{name}", []).append(tensor.cpu())
        return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}

    def _new(self, shard: int) -> tuple[list[tuple[int, int]], list[str]]:
        """The (pair, side) of every image that occurs first in this shard, in the order of their numbers; the captions
        likewise.
        """
        index, start = self._index, shard * self._pairs_per_shard
        pairs = range(start, min(start + self._pairs_per_shard, len(index)))
        sides: dict[int, tuple[int, int]] = {}
        captions: dict[int, str] = {}
        for pair in pairs:
            for side in (0, 1):
                sides.setdefault(int(index.images[pair, side]), (pair, side))
            captions.setdefault(int(index.captions[pair]), self._dataset.caption(pair))
        new_image, new_caption = index.first["image"][shard], index.first["caption"][shard]
        return (
            [sides[number] for number in sorted(sides) if number >= new_image],
            [captions[number] for number in sorted(captions) if number >= new_caption],
        )

    def _images(self, sides: Sequence[tuple[int, int]]) -> Tensors:
        numbers = sorted({pair for pair, _ in sides})
        with ThreadPoolExecutor(max(1, self._workers)) as threads:  # decoding leaves the interpreter lock
            pairs = dict(zip(numbers, threads.map(lambda i: self._dataset.pair(i, draw=i), numbers), strict=True))
        pictures = [pairs[i].loser if side else pairs[i].winner for i, side in sides]
        shapes = [pairs[i].loser_geometry if side else pairs[i].winner_geometry for i, side in sides]
        keys = [pairs[i].loser_key if side else pairs[i].winner_key for i, side in sides]
        latents = encode(self._model, pictures, keys if self._sampled else None)
        geometry = self._model.encode_geometry(shapes)
        stored = {"latents": latents, **{f"geometry.{name}": tensor for name, tensor in geometry.items()}}
        if self._objective is None:
            return stored
        captions = [pairs[i].caption for i, _ in sides]
        distinct = list(dict.fromkeys(captions))
        embedded, device = self._embed(distinct), latents.device
        which = torch.tensor([distinct.index(caption) for caption in captions])
        # What is stored is rounded before it is used, so that training sees exactly what the reference saw.
        conditional = {name: t[which].to(device, torch.float32) for name, t in embedded.items()} | geometry
        empty = {
            name: t.to(device, torch.float32).expand(len(sides), *t.shape[1:]) for name, t in self.unconditional.items()
        } | geometry
        reference = chunked(self.networks.reference, self._max_batch)
        chain = self._objective.reference_trajectory(reference, latents, conditional, empty).to(self._dtype)
        predictions = self._objective.reference_predictions(reference, chain.to(latents.dtype), conditional, empty)
        return {**stored, "trajectory": chain, "reference_pred": predictions.to(self._dtype)}

    def _embed(self, captions: list[str]) -> Tensors:
        """The part of the conditioning that follows from the captions, as stored, on the host."""
        return {name: tensor.to("cpu", self._dtype) for name, tensor in embed(self._model, captions).items()}
