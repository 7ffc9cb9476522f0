"""The batch on the device that some sample indices make, from pairs that are encoded on the way or from those of a
cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.methods import PairBatch
from fastinvdpo.methods.flow_dpo import latent_mask
from fastinvdpo.models.base import pixels_of
from fastinvdpo.trainer.order import DrawOrder, drops_caption, swaps_tie

if TYPE_CHECKING:
    from fastinvdpo.data import LikedImage, Pair
    from fastinvdpo.data.pairs import Side
    from fastinvdpo.models.base import TrainedModel

Tensors = dict[str, Tensor]
_GEOMETRY = "geometry."
# Of the empty prompt, beside a caption: where it follows from the source image, too.
EMPTY = "empty."


@dataclass(frozen=True)
class EncodedPair:
    """One pair, or one image, as tensors of a single sample, on the host or already on the device.

    Attributes:
        sides: winner and loser, or the image: ``latents`` ``(C, h, w)``, of a video ``(C, frames, h, w)``, or codes
            ``(N,)``; ``geometry.NAME``: the conditioning that follows from size and crop (SDXL) or from a small image
            (MARS); of data with masks ``mask`` ``(1, h, w)`` or ``(1, 1, h, w)``; from a cache that holds them also
            ``trajectory`` and ``reference_pred``.
        caption: the conditioning that follows from caption and source image; ``empty.NAME``: what differs of it with
            the empty prompt, for models whose prompts see the source.
        tie: neither won; the first image stands for the winner.
        liked: of a single image.
        stored_draw: the number, among all pairs', of the stored draw that ``trajectory`` and ``reference_pred`` are of.
    """

    sides: tuple[Tensors, ...]
    caption: Tensors
    scores: tuple[float, float] | None
    row: int
    tie: bool = False
    liked: bool | None = None
    stored_draw: int | None = None


class EncodedPairs(Protocol):
    """A data set of encoded pairs. ``unconditional``: the conditioning of the empty prompt, every tensor ``(1, …)``, as
    far as it does not follow from a source image.
    """

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
    def pair(self, i: int, draw: int) -> Pair | LikedImage: ...


class PairEncoder:
    """Encodes pairs when they are drawn; what is the same at every visit is kept in host memory.

    Args:
        sampled_latents: samples of the VAE's posterior instead of its mean.
        cache_gib: host memory for latents and embeddings, in GiB; once it is spent, new entries are not kept.
    """

    def __init__(
        self, model: TrainedModel, pairs: Pairs, *, sampled_latents: bool = False, cache_gib: float = 2.0
    ) -> None:
        self._model, self._dataset, self._sampled = model, pairs, sampled_latents
        self._keeps_pairs = pairs.center_crop and not pairs.random_flip
        self._left = int(cache_gib * 2**30)
        self._pairs: dict[int, EncodedPair] = {}
        self._captions: dict[tuple[str, str | None], Tensors] = {}
        self.unconditional = empty_conditioning(model)

    def fetch(self, index: int, draw: int) -> tuple[int, EncodedPair | Pair | LikedImage]:
        return index, self._pairs[index] if index in self._pairs else self._dataset.pair(index, draw)

    def encode(self, fetched: Sequence[tuple[int, EncodedPair | Pair | LikedImage]]) -> list[EncodedPair]:
        found = iter(self._encode([pair for _, pair in fetched if not isinstance(pair, EncodedPair)]))
        encoded = [pair if isinstance(pair, EncodedPair) else next(found) for _, pair in fetched]
        for (index, _), pair in zip(fetched, encoded, strict=True):
            if self._keeps_pairs and index not in self._pairs and self._spend(*pair.sides):
                self._pairs[index] = replace(pair, sides=tuple(map(_host_copy, pair.sides)))
        return encoded

    def _encode(self, pairs: Sequence[Pair | LikedImage]) -> list[EncodedPair]:
        if not pairs:
            return []
        stacked = encode_sides(self._model, [side for pair in pairs for side in pair.sides], sampled=self._sampled)
        sides = iter([dict(zip(stacked, values, strict=True)) for values in zip(*stacked.values(), strict=True)])
        captions = self._embed([(pair.caption, pair.source) for pair in pairs])
        return [
            EncodedPair(tuple(islice(sides, len(pair.sides))), caption, pair.scores, pair.row, pair.tie, pair.liked)
            for pair, caption in zip(pairs, captions, strict=True)
        ]

    def _embed(self, captions: Sequence[tuple[str, Side | None]]) -> list[Tensors]:
        """The conditioning of captions with their source images, each distinct one encoded once."""
        keys = [(caption, None if source is None else source.key) for caption, source in captions]
        found = {key: self._captions[key] for key in keys if key in self._captions}
        missing = {key: one for key, one in zip(keys, captions, strict=True) if key not in found}
        if missing:
            encoded = embed(self._model, *zip(*missing.values(), strict=True))
            for i, key in enumerate(missing):
                found[key] = {name: tensor[i] for name, tensor in encoded.items()}
                if self._spend(found[key]):
                    self._captions[key] = _host_copy(found[key])
        return [found[key] for key in keys]

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
        both = [pair.sides[::-1] if swap else pair.sides for pair, swap in zip(pairs, swapped, strict=True)]
        sides = list(chain(*zip(*both, strict=True)))
        stacked = {name: self._stack([side[name] for side in sides]) for name in sides[0]}
        # What a stored draw saw is what it was stored with.
        keys = [draw if pair.stored_draw is None else pair.stored_draw for draw, pair in zip(draws, pairs, strict=True)]
        dropped = [drops_caption(seed, key, self._caption_dropout) for key in keys]
        conditioning, unconditional = geometry_of(stacked), geometry_of(stacked)
        for name in (name for name in pairs[0].caption if not name.startswith(EMPTY)):
            shared = self._pairs.unconditional.get(name)
            empty = [own_empty(name, pair.caption) if shared is None else shared[0] for pair in pairs]
            told = zip(pairs, empty, dropped, strict=True)
            captions = [without if drop else pair.caption[name] for pair, without, drop in told]
            tensor = _widened(self._stack(captions))  # widened on the device: half as many bytes travel there
            conditioning[name] = torch.cat([tensor] * len(both[0]))
            if shared is None:
                unconditional[name] = torch.cat([_widened(self._stack(empty))] * len(both[0]))
            else:
                unconditional[name] = _widened(_to_device(shared, self._device)).expand(len(sides), *shared.shape[1:])
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
            noise=stacked.get("noise"),
            seeds=None if "seed" not in stacked else stacked["seed"][:, 0],
            step=draws.start // self._order.effective_batch,
            liked=None if pairs[0].liked is None else torch.tensor([bool(one.liked) for one in pairs]).to(self._device),
        )

    def _scores(self, pairs: Sequence[EncodedPair], swapped: Sequence[bool], dtype: torch.dtype) -> Tensor | None:
        known = [pair.scores for pair in pairs if pair.scores is not None]
        if len(known) < len(pairs):
            return None
        ordered = [scores[::-1] if swap else scores for scores, swap in zip(known, swapped, strict=True)]
        dtype = dtype if dtype.is_floating_point else torch.float32
        return _to_device(torch.tensor(ordered, dtype=torch.float64).T.flatten().to(dtype), self._device)

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor on the device from tensors that are on the host (kept) or already on the device (new)."""
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return _to_device(torch.stack(list(tensors)), self._device)
        return torch.stack([_to_device(tensor, self._device) for tensor in tensors])


def encode_sides(model: TrainedModel, sides: Sequence[Side], *, sampled: bool) -> Tensors:
    """``latents`` of images, what follows from their shapes (``geometry.NAME``), of masks the mean over a latent's area
    (``mask``), and where it is known, what they were generated from: ``noise`` as the latents, or ``seed`` int64
    ``(n, 1)``. Every tensor ``(n, …)``. ``sampled``: a sample of the posterior, one for each key, instead of means.
    """
    samples = (torch.tensor([int(side.key[:15], 16) for side in sides]),) if sampled else ()  # 60 bits
    shapes = model.encode_geometry([side.geometry for side in sides])
    images = [side.frames or side.image for side in sides]
    shapes |= model.encode_small(images)
    latents = model.encode_images(images, *samples)
    found = {"latents": latents, **{f"{_GEOMETRY}{name}": tensor for name, tensor in shapes.items()}}
    if masks := [side.mask for side in sides if side.mask is not None]:
        mask = latent_mask(pixels_of(masks, "L"), (latents.shape[-2], latents.shape[-1])).to(latents.device)
        found["mask"] = mask if latents.ndim == 4 else mask.unsqueeze(2)  # one mask for all frames
    noises = [noise for side in sides if (noise := side.noise) is not None]
    if noises and isinstance(noises[0], int):
        found["seed"] = torch.tensor(noises).unsqueeze(1)
    elif noises:
        for noise in noises:
            if noise.shape != latents.shape[1:]:  # type: ignore[union-attr]
                problem = f"has another shape than the model's latents of that image, {tuple(latents.shape[1:])}"
                remedy = "store the noise as the pipeline draws it, before FLUX packs it, and take images as they are"
                raise invalid("noise.shape", noise.shape, problem, remedy)  # type: ignore[union-attr]
        found["noise"] = torch.from_numpy(np.stack(noises)).to(latents)
    return found


def geometry_of(tensors: Tensors) -> Tensors:
    """The conditioning that follows from size and crop."""
    return {name.removeprefix(_GEOMETRY): t for name, t in tensors.items() if name.startswith(_GEOMETRY)}


def embed(model: TrainedModel, captions: Sequence[str], sources: Sequence[Side | None] = ()) -> Tensors:
    """The part of the conditioning that follows from the captions and, for a model that edits, their source images,
    with ``empty.NAME`` as of :class:`EncodedPair`, every tensor ``(n, …)``; each caption is encoded by itself, so that
    its embedding does not depend on the others, not even in the last bit.
    """
    shaped = model.encode_geometry([])
    encoded = []
    for caption, source in zip_longest(captions, sources):
        images = [source.image] if source is not None else []
        seen: dict[str, Any] = {"sources": images} if model.prompt_sees_source else {}
        own = model.encode_prompts([caption], **seen)
        if seen:
            empty = model.encode_prompts([""], **seen)
            own |= {f"{EMPTY}{name}": tensor for name, tensor in empty.items()}
        encoded.append(own | (model.encode_sources(images) if images else {}))
    return {name: torch.cat([one[name] for one in encoded]) for name in encoded[0] if name not in shaped}


def empty_conditioning(model: TrainedModel) -> Tensors:
    """What of :func:`embed` of the empty prompt is the same for all pairs, ``(1, …)``."""
    return {} if model.prompt_sees_source else embed(model, [""])


def own_empty(name: str, caption: Tensors) -> Tensor:
    """A tensor of the empty prompt's conditioning with the source image of a caption."""
    return caption.get(f"{EMPTY}{name}", caption[name])


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
