"""Which pair is drawn when, and what a coin decides about a draw.

The order depends on the seed alone, so nothing about it has to be stored or restored. A run is one sequence of draws,
numbered from 0; the number is the sample index. Draw ``d`` takes pair ``order[d % n]`` of epoch ``d // n`` of ``n``
draws. Optimizer step ``s`` uses draws ``s·G … (s + 1)·G − 1`` with the effective batch ``G``. How those are dealt to
processes and micro-batches changes neither the pairs of a step nor their random numbers, which are keyed by the draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fastinvdpo.errors import invalid


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


class ByLabel(EpochOrder):
    """As many draws as there are images; a coin decides of each whether it takes a liked one, with probability
    ``share``. Of either label every image is drawn once before one comes again in the epoch.
    """

    def __init__(self, liked: Sequence[bool], share: float) -> None:
        self._members, self._share = [np.flatnonzero(np.asarray(liked) == label) for label in (False, True)], share
        for label, needed in (("disliked", share < 1), ("liked", share > 0)):
            if needed and not len(self._members[label == "liked"]):
                problem = f"needs {label} images, and the data have none"
                raise invalid("method.like_share", share, problem, "set it to null, or to the share that there is")
        super().__init__(len(liked))

    def order(self, rng: np.random.Generator) -> np.ndarray:
        liked, found = rng.random(self.length) < self._share, np.empty(self.length, dtype=np.int64)
        for label, members in enumerate(self._members):
            places = np.flatnonzero(liked == label)
            rounds = [rng.permutation(members) for _ in range(-(-len(places) // max(1, len(members))))]
            found[places] = np.concatenate([*rounds, members[:0]])[: len(places)]
        return found


def epoch_order(dataset: Any, batch_size: int, like_share: float | None = None) -> EpochOrder:
    """The order that a data set asks for: labels in shares, buckets, groups that are read together, or none in
    particular.
    """
    if like_share is not None:
        return ByLabel(dataset.liked, like_share)
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
