"""Which pair is drawn when. The order depends on the seed alone, so nothing about it has to be stored or restored.

A run is one sequence of draws, numbered from 0. Draw ``d`` takes pair ``permutation(seed, d // n)[d % n]`` of a set of
``n`` pairs, unless buckets or streaming ask for an order of their own, which follows from seed and epoch too; optimizer
step ``s`` uses draws ``s·G … (s + 1)·G − 1`` with the effective batch ``G``. How those are dealt to processes
and micro-batches changes neither the pairs of a step nor their random numbers, which are keyed by the draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from fastinvdpo.errors import invalid


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of the pairs in one epoch, int64 ``(count,)``."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class EpochOrder(Protocol):
    """The order of one epoch; ``length`` draws, which may visit some pairs twice."""

    length: int

    def order(self, seed: int, epoch: int) -> np.ndarray: ...


class Shuffled:
    """Every pair once, in any order."""

    def __init__(self, pairs: int) -> None:
        self.length = pairs

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return permutation(seed, epoch, self.length)


class ByWindow:
    """Every pair once; groups in any order, and pairs in any order within so many consecutive groups.

    For data that is read by groups: no more than one window of it need be in memory.
    """

    def __init__(self, groups: Sequence[Sequence[int]], groups_per_window: int) -> None:
        self._groups = [np.asarray(group, dtype=np.int64) for group in groups]
        self._per_window = groups_per_window
        self.length = sum(map(len, groups))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return _kept(self, seed, epoch)

    def compute(self, rng: np.random.Generator) -> np.ndarray:
        groups = [self._groups[number] for number in rng.permutation(len(self._groups))]
        windows = [groups[start : start + self._per_window] for start in range(0, len(groups), self._per_window)]
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in windows])


class ByBucket:
    """Batches of one bucket each, in any order. Every pair is drawn; where a bucket's pairs do not fill its last batch,
    some of the same bucket are drawn a second time in the epoch.
    """

    def __init__(self, bucket_of: Sequence[int], batch_size: int) -> None:
        numbers = np.asarray(bucket_of, dtype=np.int64)
        self._members = [np.flatnonzero(numbers == bucket) for bucket in np.unique(numbers)]
        self._batch_size = batch_size
        self.length = sum(-(-len(members) // batch_size) * batch_size for members in self._members)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return _kept(self, seed, epoch)

    def compute(self, rng: np.random.Generator) -> np.ndarray:
        size, batches = self._batch_size, []
        for members in self._members:
            filled = np.resize(rng.permutation(members), -(-len(members) // size) * size)  # repeats from the start
            batches.append(filled.reshape(-1, size))
        return rng.permutation(np.concatenate(batches)).reshape(-1)


@lru_cache(maxsize=4)
def _kept(order: ByWindow | ByBucket, seed: int, epoch: int) -> np.ndarray:
    return order.compute(np.random.default_rng([seed, epoch]))


def epoch_order(dataset: Any, batch_size: int) -> EpochOrder:
    """The order that a data set asks for: buckets, groups that are read together, or none in particular."""
    if getattr(dataset, "bucket_of", None):
        return ByBucket(dataset.bucket_of, batch_size)
    groups = dataset.groups() if hasattr(dataset, "groups") else None
    if groups:
        return ByWindow(groups, dataset.source.groups_per_window)
    return Shuffled(len(dataset))


class DrawOrder:
    """Deals the draws of a run to processes and micro-batches.

    Args:
        pairs: number of pairs in the data set.
        seed: seed of the run.
        batch_size: pairs per micro-batch and process.
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
        self.pairs, self.seed, self.batch_size, self.accumulation = pairs, seed, batch_size, accumulation
        self.processes, self.rank = processes, rank
        self.epochs: EpochOrder = epochs or Shuffled(pairs)
        self.effective_batch = batch_size * accumulation * processes

    def micro_batch(self, step: int, micro: int) -> range:
        """Draws of one micro-batch of this process; ``step`` counts from 0."""
        start = step * self.effective_batch + (micro * self.processes + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def pair_index(self, draw: int) -> int:
        """Index in the data set of the pair that a draw takes."""
        epoch, position = divmod(draw, self.epochs.length)
        return int(self.epochs.order(self.seed, epoch)[position])


def drops_caption(seed: int, draw: int, probability: float) -> bool:
    """Whether a draw trains without its caption, on both sides: a hash of (seed, draw), as for the draw's flip."""
    if probability == 0:
        return False
    digest = hashlib.sha256(f"fastinvdpo.caption_dropout/{seed}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < probability * 2.0**64


def swaps_tie(seed: int, draw: int) -> bool:
    """Whether a draw of a tied pair takes the second image for the winner: a fair coin, a hash of (seed, draw).

    Over the draws the loss of a tie is then ``½[u(z) + u(−z)]``, that of a preference of one half.
    """
    return hashlib.sha256(f"fastinvdpo.ties/{seed}/{draw}".encode()).digest()[0] < 128
