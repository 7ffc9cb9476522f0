"""The draws of a cache: noisy latents of every pair and what the reference predicts there, K times."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastinvdpo.config import TrainConfig
from fastinvdpo.diffusion.prompt import chunked
from fastinvdpo.methods import SingleTimestepObjective
from fastinvdpo.models import DiffusionModel
from fastinvdpo.trainer import opening
from fastinvdpo.trainer.batches import BatchBuilder, EncodedPair, Tensors
from fastinvdpo.trainer.cache import Manifest, PairCache, PairIndex
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.order import DrawOrder, EpochOrder

if TYPE_CHECKING:
    from accelerate import Accelerator


class _EveryDraw(EpochOrder):
    """The draws of all pairs by their number: each pair as often as it has draws."""

    def __init__(self, pairs: int, draws: int) -> None:
        super().__init__(pairs * draws)
        self._draws = draws

    def order(self, rng: np.random.Generator) -> np.ndarray:
        return np.arange(self.length) // self._draws


class _AsStored(PairCache):
    """Pairs whose sides stay where they are: a tie is swapped when it is visited, with what is stored of its sides."""

    def fetch(self, index: int, draw: int) -> EncodedPair:
        return replace(super().fetch(index, draw), tie=False)


class DrawMaker:
    """Computes the draws of a shard, from the batches that a run with their numbers as sample indices would make."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        networks: Networks,
        model: DiffusionModel,
        accelerator: Accelerator,
    ) -> None:
        method, seed, draws = config.method, config.training.seed, config.cache.draws or 0
        if method.awaits_score_range:
            method = method.with_score_range(1.0)  # a weight, and no draw, follows from it
        objective = method.objective(model.schedule)
        assert isinstance(objective, SingleTimestepObjective)
        self._objective, self._dtype, self._seed = objective, opening.DTYPES[config.cache.dtype], seed
        self._reference = chunked(networks.reference, config.training.max_batch)
        self._size = min(config.cache.batch_size or config.training.batch_size, manifest.pairs_per_shard * draws)
        pairs = _AsStored(Path(str(config.cache.path)), manifest)
        self._first = PairIndex(pairs.directory, manifest.pairs_per_shard, draws).first["draw"]
        self._builder = BatchBuilder(
            pairs,
            accelerator.device,
            DrawOrder(len(pairs), seed, self._size, 1, epochs=_EveryDraw(len(pairs), draws)),
            with_unconditional=method.guided,
            caption_dropout=config.data.caption_dropout,
        )

    def make(self, shard: int) -> Tensors:
        parts: defaultdict[str, list[Tensor]] = defaultdict(list)
        begin, end = self._first[shard : shard + 2]
        for start in range(begin, end, self._size):
            stop = min(start + self._size, end)
            # The last batch is filled up with draws before it: a network may round otherwise in a smaller one.
            batch = self._builder.build(range(max(0, stop - self._size), stop))
            stored = self._objective.store_draws(self._reference, batch, seed=self._seed, dtype=self._dtype)
            for name in ("trajectory", "reference_pred"):
                if (tensor := getattr(stored, name)) is not None:
                    parts[f"draw.{name}"].append(torch.stack(tensor.cpu().chunk(2), dim=1)[start - stop :])
        return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
