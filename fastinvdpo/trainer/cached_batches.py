"""From draws to a batch on the device, read from a cache: no picture is decoded and nothing is encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastinvdpo.methods import PairBatch
from fastinvdpo.trainer.batches import Tensors, to_device
from fastinvdpo.trainer.cache import PairCache
from fastinvdpo.trainer.draws import DrawOrder, drops_caption, swaps_tie

_GEOMETRY = "geometry."


class CachedBatches:
    """Builds the :class:`PairBatch` of a list of draws, as :class:`fastinvdpo.trainer.batches.BatchBuilder` does.

    Args:
        with_unconditional: also give the empty prompt (guidance needs it).
        caption_dropout: share of draws whose caption is replaced by the empty prompt, on both sides.
        num_workers: above zero, a thread reads the next batch during this one.
    """

    def __init__(
        self,
        cache: PairCache,
        device: torch.device,
        order: DrawOrder,
        *,
        with_unconditional: bool,
        caption_dropout: float = 0.0,
        num_workers: int = 0,
    ) -> None:
        self._cache, self._device, self._order = cache, device, order
        self._with_unconditional, self._caption_dropout = with_unconditional, caption_dropout
        self._unconditional = {name: _as_float32(t).to(device) for name, t in cache.unconditional.items()}
        self._thread = ThreadPoolExecutor(1, "read") if num_workers else None

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def batches(self, requests: Iterable[range]) -> Iterator[PairBatch]:
        """One batch per range of draws."""
        if self._thread is None:
            yield from map(self.build, requests)
            return
        ahead: deque[tuple[range, Future[Tensors]]] = deque()
        for draws in requests:
            ahead.append((draws, self._thread.submit(self._read, draws)))
            if len(ahead) == 2:
                yield self._on_device(*_result(ahead.popleft()))
        while ahead:
            yield self._on_device(*_result(ahead.popleft()))

    def build(self, draws: range) -> PairBatch:
        """The batch of these draws."""
        return self._on_device(draws, self._read(draws))

    def row(self, draw: int) -> int:
        """Row in the data file of the pair that a draw takes."""
        return int(self._cache.index.rows[self._order.pair_index(draw)])

    def _read(self, draws: range) -> Tensors:
        """What is stored for the images and captions of some draws, on the host; images are [winners; losers]."""
        index = self._cache.index
        pairs = [self._order.pair_index(draw) for draw in draws]
        swapped = torch.tensor(
            [bool(index.ties[i]) and swaps_tie(self._order.seed, d) for i, d in zip(pairs, draws, strict=True)]
        )
        images = _ordered(index.images[pairs], swapped).tolist()
        captions = index.captions[pairs].tolist()
        tensors = {f"image.{name}": self._cache.lookup("image", name, images) for name in self._cache.image_tensors}
        for name in self._cache.caption_tensors:
            tensors[f"caption.{name}"] = self._cache.lookup("caption", name, captions)
        if index.scores is not None:
            tensors["scores"] = _ordered(index.scores[pairs], swapped).to(torch.float32)
        return tensors

    def _on_device(self, draws: range, host: Mapping[str, Tensor]) -> PairBatch:
        # Widened on the device: half as many bytes travel there.
        stored = {name: to_device(tensor, self._device) for name, tensor in host.items()}
        dropped = [drops_caption(self._order.seed, draw, self._caption_dropout) for draw in draws]
        geometry = {
            name.removeprefix(f"image.{_GEOMETRY}"): tensor
            for name, tensor in stored.items()
            if name.startswith(f"image.{_GEOMETRY}")
        }
        conditioning, unconditional = dict(geometry), dict(geometry)
        for name, empty in self._unconditional.items():
            captions = _as_float32(stored[f"caption.{name}"])
            if any(dropped):
                mask = torch.tensor(dropped).reshape(-1, *[1] * (captions.ndim - 1)).to(self._device)
                captions = torch.where(mask, empty, captions)
            conditioning[name] = torch.cat([captions, captions])
            unconditional[name] = empty.expand(2 * len(draws), *empty.shape[1:])
        return PairBatch(
            latents=stored["image.latents"],
            conditioning=conditioning,
            sample_index=torch.arange(draws.start, draws.stop),
            unconditional=unconditional if self._with_unconditional else None,
            scores=stored.get("scores"),
            trajectory=stored.get("image.trajectory"),
            reference_pred=stored.get("image.reference_pred"),
        )


def _ordered(sides: Tensor, swapped: Tensor) -> Tensor:
    """``(B, 2)``, winner and loser, as ``(2B,)`` [winners; losers], with some pairs the other way round."""
    return torch.where(swapped[:, None], sides.flip(1), sides).T.flatten()


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _result(reading: tuple[range, Future[Tensors]]) -> tuple[range, Tensors]:
    return reading[0], reading[1].result()
