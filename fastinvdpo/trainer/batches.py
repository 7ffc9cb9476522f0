"""From draws to a batch on the device: decode and encode.

Latents and prompt embeddings that are the same at every visit are kept in host memory, up to ``data.cache_gib``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastinvdpo.methods import PairBatch
from fastinvdpo.trainer.draws import DrawOrder, drops_caption, swaps_tie

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.data import ImageGeometry, Pair
    from fastinvdpo.models import DiffusionModel

Tensors = dict[str, Tensor]


class Pairs(Protocol):
    """What the trainer asks of a data set; ``fastinvdpo.data.PairDataset`` is one."""

    random_flip: bool
    center_crop: bool

    @property
    def has_scores(self) -> bool: ...
    def __len__(self) -> int: ...
    def pair(self, i: int, draw: int) -> Pair: ...


@dataclass(frozen=True)
class Side:
    """One image of a pair after encoding; ``latents`` is ``(C, h, w)``."""

    latents: Tensor
    geometry: ImageGeometry | None
    score: float | None


@dataclass(frozen=True)
class EncodedPair:
    winner: Side
    loser: Side
    caption: str
    row: int
    tie: bool = False

    def on_host(self) -> EncodedPair:
        """A copy whose latents are in host memory of their own, not views of a batch."""
        sides = [replace(side, latents=_host_copy(side.latents)) for side in (self.winner, self.loser)]
        return replace(self, winner=sides[0], loser=sides[1])

    def swapped(self) -> EncodedPair:
        return replace(self, winner=self.loser, loser=self.winner)


class Budget:
    """Host memory that the caches share; once it is spent, new entries are not kept."""

    def __init__(self, gib: float) -> None:
        self.left = int(gib * 2**30)

    def spend(self, nbytes: int) -> bool:
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True


class BatchBuilder:
    """Builds the :class:`PairBatch` of a list of draws.

    Args:
        with_unconditional: also embed the empty prompt (guidance needs it).
        caption_dropout: share of draws whose caption is replaced by the empty prompt, on both sides.
        sampled_latents: samples of the VAE's posterior instead of its mean.
        cache_gib: host memory for latents and embeddings, in GiB.
        num_workers: threads that decode images ahead of time (decoding leaves the interpreter lock).
    """

    def __init__(
        self,
        model: DiffusionModel,
        dataset: Pairs,
        order: DrawOrder,
        *,
        with_unconditional: bool,
        caption_dropout: float = 0.0,
        sampled_latents: bool = False,
        cache_gib: float = 2.0,
        num_workers: int = 0,
    ) -> None:
        self._model, self._dataset, self._order = model, dataset, order
        self._with_unconditional, self._caption_dropout = with_unconditional, caption_dropout
        self._sampled = sampled_latents
        self._keep_pairs = dataset.center_crop and not dataset.random_flip
        self._budget = Budget(cache_gib)
        self._pairs: dict[int, EncodedPair] = {}
        self._embeddings: dict[Hashable, Tensors] = {}
        self._threads = ThreadPoolExecutor(num_workers, "decode") if num_workers else None

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def batches(self, requests: Iterable[range]) -> Iterator[PairBatch]:
        """One batch per range of draws; with worker threads, images of the next batch are decoded during this one."""
        ahead: deque[tuple[range, dict[int, Future[Pair]]]] = deque()
        for draws in requests:
            ahead.append((draws, self._start_decoding(draws)))
            if self._threads is not None and len(ahead) < 2:
                continue
            yield self._build(*ahead.popleft())
        while ahead:
            yield self._build(*ahead.popleft())

    def build(self, draws: range) -> PairBatch:
        """The batch of these draws."""
        return self._build(draws, {})

    def row(self, draw: int) -> int:
        """Row in the data file of the pair that a draw takes."""
        return self._encode([(draw, self._order.pair_index(draw))], {})[0].row

    def embed(self, prompts: Sequence[str], geometry: Sequence[ImageGeometry | None]) -> Tensors:
        """Conditioning of ``n`` prompts on the device, each distinct (prompt, geometry) encoded once."""
        keys = list(zip(prompts, geometry, strict=True))
        found = {key: self._embeddings[key] for key in keys if key in self._embeddings}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if missing:
            shapes = [shape for _, shape in missing if shape is not None]
            encoded = self._model.encode_prompts(
                [prompt for prompt, _ in missing], geometry=shapes if len(shapes) == len(missing) else None
            )
            for i, key in enumerate(missing):
                found[key] = {name: tensor[i] for name, tensor in encoded.items()}
                if self._budget.spend(sum(tensor.nbytes for tensor in found[key].values())):
                    self._embeddings[key] = {name: _host_copy(tensor) for name, tensor in found[key].items()}
        device = self._model.device
        return {name: _stack([found[key][name] for key in keys], device) for name in found[keys[0]]}

    def _start_decoding(self, draws: range) -> dict[int, Future[Pair]]:
        if self._threads is None:
            return {}
        indices = {draw: self._order.pair_index(draw) for draw in draws}
        return {
            draw: self._threads.submit(self._dataset.pair, index, draw)
            for draw, index in indices.items()
            if index not in self._pairs
        }

    def _encode(self, draws: Sequence[tuple[int, int]], decoding: dict[int, Future[Pair]]) -> list[EncodedPair]:
        """The pairs of some draws, each given with its index in the data set; from the cache where they are kept."""
        found = {draw: self._pairs[index] for draw, index in draws if index in self._pairs}
        missing = [(draw, index) for draw, index in draws if draw not in found]
        if missing:
            pairs = [
                decoding[draw].result() if draw in decoding else self._dataset.pair(index, draw)
                for draw, index in missing
            ]
            images = [image for pair in pairs for image in (pair.winner, pair.loser)]
            keys = [key for pair in pairs for key in (pair.winner_key, pair.loser_key)]
            latents = encode(self._model, images, keys if self._sampled else None)
            for (draw, index), pair, both in zip(missing, pairs, latents.unflatten(0, (-1, 2)), strict=True):
                found[draw] = EncodedPair(
                    Side(both[0], pair.winner_geometry, pair.winner_score),
                    Side(both[1], pair.loser_geometry, pair.loser_score),
                    pair.caption,
                    pair.row,
                    pair.tie,
                )
                if self._keep_pairs and index not in self._pairs and self._budget.spend(both.nbytes):
                    self._pairs[index] = found[draw].on_host()
        return [found[draw] for draw, _ in draws]

    def _build(self, draws: range, decoding: dict[int, Future[Pair]]) -> PairBatch:
        pairs = self._encode([(draw, self._order.pair_index(draw)) for draw in draws], decoding)
        seed = self._order.seed
        pairs = [
            pair.swapped() if pair.tie and swaps_tie(seed, draw) else pair
            for draw, pair in zip(draws, pairs, strict=True)
        ]
        sides = [pair.winner for pair in pairs] + [pair.loser for pair in pairs]
        captions = [
            "" if drops_caption(seed, draw, self._caption_dropout) else pair.caption
            for draw, pair in zip(draws, pairs, strict=True)
        ]
        geometry = [side.geometry for side in sides]
        device = self._model.device
        conditioning = self.embed(captions * 2, geometry)
        unconditional = self.embed([""] * len(sides), geometry) if self._with_unconditional else None
        latents = _stack([side.latents for side in sides], device)
        scores = torch.tensor([side.score for side in sides], dtype=latents.dtype) if self._dataset.has_scores else None
        return PairBatch(
            latents=latents,
            conditioning=conditioning,
            sample_index=torch.arange(draws.start, draws.stop),
            unconditional=unconditional,
            scores=None if scores is None else to_device(scores, device),
        )


def encode(model: DiffusionModel, images: Sequence[Image], keys: Sequence[str] | None) -> Tensor:
    """Latents of images: means, or with the images' keys (SHA-256, in hexadecimal) samples, one and the same for each
    key.
    """
    if keys is None:
        return model.encode_images(images)
    return model.encode_images(images, torch.tensor([int(key[:15], 16) for key in keys]))  # 60 bits


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def _stack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """One tensor on the device from tensors that are on the host (cached) or already on the device (new)."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return to_device(torch.stack(list(tensors)), device)
    return torch.stack([to_device(tensor, device) for tensor in tensors])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on the device; from the host to a GPU without waiting for it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from pinned memory the host need not wait
