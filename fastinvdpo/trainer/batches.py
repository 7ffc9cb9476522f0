"""Which pair is drawn when, and the batch on the device that some sample indices make, from pairs that are encoded on
the way or from those of a cache.

The order depends on the seed alone, so nothing about it has to be stored or restored. A run is one sequence of draws,
numbered from 0; the number is the sample index. Draw ``d`` takes pair ``order[d % n]`` of epoch ``d // n`` of ``n``
draws. Optimizer step ``s`` uses draws ``s·G … (s + 1)·G − 1`` with the effective batch ``G``. How those are dealt to
processes and micro-batches changes neither the pairs of a step nor their random numbers, which are keyed by the draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.methods import PairBatch
from fastinvdpo.methods.flow_dpo import latent_mask
from fastinvdpo.models.base import pixels_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data import Pair
    from fastinvdpo.data.transforms import ImageGeometry
    from fastinvdpo.models import DiffusionModel

Tensors = dict[str, Tensor]
_GEOMETRY = "geometry."


class EpochOrder:
    """Every pair once, in any order. ``length``: draws of an epoch; other orders may visit some pairs twice."""

    def __init__(self, pairs: int) -> None:
        self.length = pairs

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Indices of the pairs of one epoch, int64 ``(length,)``."""
        return rng.permutation(self.length)


class ByWindow(EpochOrder):
    """Every pair once; groups in any order, and pairs in any order within so many consecutive groups: of data that is
    read by groups, no more than one window need be in memory.
    """

    def __init__(self, groups: Sequence[Sequence[int]], groups_per_window: int) -> None:
        self._groups = [np.asarray(group, dtype=np.int64) for group in groups]
        self._per_window = groups_per_window
        super().__init__(sum(map(len, groups)))

    def order(self, rng: np.random.Generator) -> np.ndarray:
        groups = [self._groups[number] for number in rng.permutation(len(self._groups))]
        windows = [groups[start : start + self._per_window] for start in range(0, len(groups), self._per_window)]
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in windows])


class ByBucket(EpochOrder):
    """Batches of one bucket each, in any order. Every pair is drawn; where a bucket's pairs do not fill its last batch,
    some of the same bucket are drawn a second time in the epoch.
    """

    def __init__(self, bucket_of: Sequence[int], batch_size: int) -> None:
        numbers = np.asarray(bucket_of, dtype=np.int64)
        self._members = [np.flatnonzero(numbers == bucket) for bucket in np.unique(numbers)]
        self._batch_size = batch_size
        super().__init__(sum(map(self._filled, self._members)))

    def _filled(self, members: np.ndarray) -> int:
        return -(-len(members) // self._batch_size) * self._batch_size

    def order(self, rng: np.random.Generator) -> np.ndarray:
        filled = [np.resize(rng.permutation(members), self._filled(members)) for members in self._members]
        return rng.permutation(np.concatenate(filled).reshape(-1, self._batch_size)).reshape(-1)


def epoch_order(dataset: Any, batch_size: int) -> EpochOrder:
    """The order that a data set asks for: buckets, groups that are read together, or none in particular."""
    if getattr(dataset, "bucket_of", None):
        return ByBucket(dataset.bucket_of, batch_size)
    if groups := dataset.groups() if hasattr(dataset, "groups") else None:
        return ByWindow(groups, dataset.source.groups_per_window)
    return EpochOrder(len(dataset))


class DrawOrder:
    """Deals the draws of a run to processes and micro-batches.

    Args:
        pairs: their number. batch_size: those of a micro-batch and process.
        accumulation: micro-batches per optimizer step.
        processes, rank: how many processes share a step, and which one this is.
        epochs: the order of the pairs within an epoch; any order when None.
    """

    def __init__(
        self,
        pairs: int,
        seed: int,
        batch_size: int,
        accumulation: int,
        processes: int = 1,
        rank: int = 0,
        *,
        epochs: EpochOrder | None = None,
    ) -> None:
        if pairs < 1:
            raise invalid("pairs", pairs, "is an empty data set", "provide at least one pair")
        epochs = epochs or EpochOrder(pairs)
        self.pairs, self.seed = pairs, seed
        self.effective_batch = batch_size * accumulation * processes
        self._batch_size, self._processes, self._rank = batch_size, processes, rank
        self._length = epochs.length
        self._epoch = lru_cache(maxsize=2)(lambda epoch: epochs.order(np.random.default_rng([seed, epoch])))

    def micro_batch(self, step: int, micro: int) -> range:
        """Draws of one micro-batch of this process; ``step`` counts from 0."""
        start = step * self.effective_batch + (micro * self._processes + self._rank) * self._batch_size
        return range(start, start + self._batch_size)

    def pair_index(self, draw: int) -> int:
        """Index in the data set of the pair that a draw takes."""
        epoch, position = divmod(draw, self._length)
        return int(self._epoch(epoch)[position])


def drops_caption(seed: int, draw: int, probability: float) -> bool:
    """Whether a draw trains without its caption, on both sides."""
    return _happens("caption_dropout", seed, draw, probability)


def swaps_tie(seed: int, draw: int) -> bool:
    """Whether a draw of a tied pair takes the second image for the winner: a fair coin. Over the draws the loss of a
    tie is then ``½[u(z) + u(−z)]``, that of a preference of one half.
    """
    return _happens("ties", seed, draw, 0.5)


def _happens(event: str, seed: int, draw: int, probability: float) -> bool:
    """A hash of seed and draw decides, as for the flip of a draw's images."""
    digest = hashlib.sha256(f"fastinvdpo.{event}/{seed}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < probability * 2.0**64


@dataclass(frozen=True)
class EncodedPair:
    """One pair as tensors of a single sample, on the host or already on the device.

    Attributes:
        winner, loser: ``latents`` ``(C, h, w)``; ``geometry.NAME``: the conditioning that follows from size and crop
            (SDXL); ``mask`` ``(1, h, w)`` of data with masks; from a cache that holds them also ``trajectory`` and
            ``reference_pred``.
        caption: the conditioning that follows from the caption.
        tie: neither won; the first image stands for the winner.
        stored_draw: the number, among all pairs', of the stored draw that ``trajectory`` and ``reference_pred`` are of.
    """

    winner: Tensors
    loser: Tensors
    caption: Tensors
    scores: tuple[float, float] | None
    row: int
    tie: bool = False
    stored_draw: int | None = None


class EncodedPairs(Protocol):
    """A data set of encoded pairs. ``unconditional``: the conditioning of the empty prompt, every tensor ``(1, …)``."""

    unconditional: Tensors

    def fetch(self, index: int, draw: int) -> Any:
        """What :meth:`encode` needs of a pair, on the host: images decoded, or stored tensors read. Threads call it."""

    def encode(self, fetched: Sequence[Any]) -> list[EncodedPair]: ...


class Pairs(Protocol):
    """A data set of images, as the trainer uses it; ``fastinvdpo.data.PairDataset`` is one."""

    random_flip: bool
    center_crop: bool

    @property
    def has_scores(self) -> bool: ...
    def __len__(self) -> int: ...
    def pair(self, i: int, draw: int) -> Pair: ...


class PairEncoder:
    """Encodes pairs when they are drawn; what is the same at every visit is kept in host memory.

    Args:
        sampled_latents: samples of the VAE's posterior instead of its mean.
        cache_gib: host memory for latents and embeddings, in GiB; once it is spent, new entries are not kept.
    """

    def __init__(
        self, model: DiffusionModel, pairs: Pairs, *, sampled_latents: bool = False, cache_gib: float = 2.0
    ) -> None:
        self._model, self._dataset, self._sampled = model, pairs, sampled_latents
        self._keeps_pairs = pairs.center_crop and not pairs.random_flip
        self._left = int(cache_gib * 2**30)
        self._pairs: dict[int, EncodedPair] = {}
        self._captions: dict[str, Tensors] = {}
        self.unconditional = {name: tensor[None] for name, tensor in self._embed([""])[0].items()}

    def fetch(self, index: int, draw: int) -> tuple[int, EncodedPair | Pair]:
        return index, self._pairs[index] if index in self._pairs else self._dataset.pair(index, draw)

    def encode(self, fetched: Sequence[tuple[int, EncodedPair | Pair]]) -> list[EncodedPair]:
        found = iter(self._encode([pair for _, pair in fetched if not isinstance(pair, EncodedPair)]))
        encoded = [pair if isinstance(pair, EncodedPair) else next(found) for _, pair in fetched]
        for (index, _), pair in zip(fetched, encoded, strict=True):
            if self._keeps_pairs and index not in self._pairs and self._spend(pair.winner, pair.loser):
                self._pairs[index] = replace(pair, winner=_host_copy(pair.winner), loser=_host_copy(pair.loser))
        return encoded

    def _encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        if not pairs:
            return []
        images = [image for pair in pairs for image in (pair.winner, pair.loser)]
        keys = [key for pair in pairs for key in (pair.winner_key, pair.loser_key)]
        shapes = [shape for pair in pairs for shape in (pair.winner_geometry, pair.loser_geometry)]
        masks = [mask for pair in pairs for mask in (pair.winner_mask, pair.loser_mask)]
        stacked = encode_images(self._model, images, shapes, keys if self._sampled else None, masks)
        sides = [{name: tensor[i] for name, tensor in stacked.items()} for i in range(len(images))]
        captions = self._embed([pair.caption for pair in pairs])
        encoded = []
        for pair, winner, loser, caption in zip(pairs, sides[::2], sides[1::2], captions, strict=True):
            scored = pair.winner_score is not None and pair.loser_score is not None
            scores = (pair.winner_score, pair.loser_score) if scored else None
            encoded.append(EncodedPair(winner, loser, caption, scores, pair.row, pair.tie))  # type: ignore[arg-type]
        return encoded

    def _embed(self, captions: Sequence[str]) -> list[Tensors]:
        """The conditioning of captions, each distinct one encoded once."""
        found = {caption: self._captions[caption] for caption in captions if caption in self._captions}
        if missing := [caption for caption in dict.fromkeys(captions) if caption not in found]:
            encoded = embed(self._model, missing)
            for i, caption in enumerate(missing):
                found[caption] = {name: tensor[i] for name, tensor in encoded.items()}
                if self._spend(found[caption]):
                    self._captions[caption] = _host_copy(found[caption])
        return [found[caption] for caption in captions]

    def _spend(self, *kept: Tensors) -> bool:
        nbytes = sum(tensor.nbytes for tensors in kept for tensor in tensors.values())
        fits = nbytes <= self._left
        self._left -= nbytes * fits
        return fits


class BatchBuilder:
    """Builds the :class:`PairBatch` of some sample indices.

    Args:
        with_unconditional: also give the empty prompt (guidance needs it).
        caption_dropout: share of samples whose caption is replaced by the empty prompt, on both sides.
        num_workers: threads that fetch pairs ahead of time (decoding and reading leave the interpreter lock).
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        device: torch.device,
        order: DrawOrder,
        *,
        with_unconditional: bool,
        caption_dropout: float = 0.0,
        num_workers: int = 0,
    ) -> None:
        self._pairs, self._device, self._order = pairs, device, order
        self._with_unconditional, self._caption_dropout = with_unconditional, caption_dropout
        self._threads = ThreadPoolExecutor(num_workers, "fetch") if num_workers else None

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def batches(self, requests: Iterable[range]) -> Iterator[PairBatch]:
        """One batch per range of sample indices; with threads, the next batch is fetched during this one."""
        if self._threads is None:
            yield from map(self.build, requests)
            return
        ahead: tuple[range, Iterator[Any]] | None = None
        for draws in chain(requests, [None]):
            following = None if draws is None else (draws, self._threads.map(self._fetch, draws))
            if ahead is not None:
                yield self._build(*ahead)
            ahead = following

    def build(self, draws: range) -> PairBatch:
        """The batch of these sample indices."""
        return self._build(draws, map(self._fetch, draws))

    def row(self, draw: int) -> int:
        """Row in the data of the pair that a sample index takes."""
        return self._pairs.encode([self._fetch(draw)])[0].row

    def _fetch(self, draw: int) -> Any:
        return self._pairs.fetch(self._order.pair_index(draw), draw)

    def _build(self, draws: range, fetched: Iterator[Any]) -> PairBatch:
        pairs, seed = self._pairs.encode(list(fetched)), self._order.seed
        swapped = [pair.tie and swaps_tie(seed, draw) for draw, pair in zip(draws, pairs, strict=True)]
        swaps = list(zip(pairs, swapped, strict=True))
        sides = [pair.loser if swap else pair.winner for pair, swap in swaps]
        sides += [pair.winner if swap else pair.loser for pair, swap in swaps]
        stacked = {name: self._stack([side[name] for side in sides]) for name in sides[0]}
        # What a stored draw saw is what it was stored with.
        keys = [draw if pair.stored_draw is None else pair.stored_draw for draw, pair in zip(draws, pairs, strict=True)]
        dropped = [drops_caption(seed, key, self._caption_dropout) for key in keys]
        conditioning, unconditional = geometry_of(stacked), geometry_of(stacked)
        for name, empty in self._pairs.unconditional.items():
            captions = [empty[0] if drop else pair.caption[name] for pair, drop in zip(pairs, dropped, strict=True)]
            tensor = _widened(self._stack(captions))  # widened on the device: half as many bytes travel there
            conditioning[name] = torch.cat([tensor, tensor])
            unconditional[name] = _widened(_to_device(empty, self._device)).expand(len(sides), *empty.shape[1:])
        return PairBatch(
            latents=stacked["latents"],
            conditioning=conditioning,
            sample_index=torch.arange(draws.start, draws.stop),
            unconditional=unconditional if self._with_unconditional else None,
            scores=self._scores(pairs, swapped, stacked["latents"].dtype),
            trajectory=stacked.get("trajectory"),
            reference_pred=stacked.get("reference_pred"),
            stored_draw=None if pairs[0].stored_draw is None else torch.tensor(keys),
            mask=stacked.get("mask"),
        )

    def _scores(self, pairs: Sequence[EncodedPair], swapped: Sequence[bool], dtype: torch.dtype) -> Tensor | None:
        known = [pair.scores for pair in pairs if pair.scores is not None]
        if len(known) < len(pairs):
            return None
        ordered = [scores[::-1] if swap else scores for scores, swap in zip(known, swapped, strict=True)]
        return _to_device(torch.tensor(ordered, dtype=torch.float64).T.flatten().to(dtype), self._device)

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor on the device from tensors that are on the host (kept) or already on the device (new)."""
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return _to_device(torch.stack(list(tensors)), self._device)
        return torch.stack([_to_device(tensor, self._device) for tensor in tensors])


def encode_images(
    model: DiffusionModel,
    images: Sequence[Image],
    shapes: Sequence[ImageGeometry],
    keys: Sequence[str] | None,
    masks: Sequence[Image | None] = (),
) -> Tensors:
    """``latents`` of images, what follows from their ``shapes``, ``geometry.NAME``, and of ``masks`` ``mask``, the mean
    over a latent's area; every tensor ``(n, …)``. ``keys``: SHA-256 of the images, in hexadecimal: a sample of the
    posterior, one for each key. None: means.
    """
    samples = () if keys is None else (torch.tensor([int(key[:15], 16) for key in keys]),)  # 60 bits
    encoded = {f"{_GEOMETRY}{name}": tensor for name, tensor in model.encode_geometry(shapes).items()}
    encoded["latents"] = latents = model.encode_images(images, *samples)
    if given := [mask for mask in masks if mask is not None]:
        encoded["mask"] = latent_mask(pixels_of(given, "L"), (latents.shape[2], latents.shape[3])).to(latents.device)
    return encoded


def geometry_of(tensors: Tensors) -> Tensors:
    """The conditioning that follows from size and crop."""
    return {name.removeprefix(_GEOMETRY): t for name, t in tensors.items() if name.startswith(_GEOMETRY)}


def embed(model: DiffusionModel, captions: Sequence[str]) -> Tensors:
    """The part of the conditioning that follows from the captions, every tensor ``(n, …)``."""
    shaped = model.encode_geometry([])
    return {name: tensor for name, tensor in model.encode_prompts(captions).items() if name not in shaped}


def _host_copy(tensors: Mapping[str, Tensor]) -> Tensors:
    """In host memory of their own, not views of a batch."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on the device; from pinned memory of the host to a GPU without waiting for it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
