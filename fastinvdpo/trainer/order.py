"""Which pair is drawn when, and what a coin decides about a draw.

The order depends on the seed alone, so nothing about it has to be stored or restored. A run is one sequence of draws,
numbered from 0; the number is the sample index. Draw ``d`` takes pair ``order[d % n]`` of epoch ``d // n`` of ``n``
draws. Optimizer step ``s`` uses draws ``s·G … (s + 1)·G − 1`` with the effective batch ``G``. How those are dealt to
processes and micro-batches changes neither the pairs of a step nor their random numbers, which are keyed by the draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastinvdpo.errors import invalid


class EpochOrder(NamedTuple):
    """The pairs of an epoch.

    Attributes:
        length: draws of an epoch; some orders visit some pairs twice.
        order: from a generator to the indices of their pairs, int64 ``(length,)``.
    """

    length: int
    order: Callable[[np.random.Generator], np.ndarray]


def by_window(groups: Sequence[Sequence[int]], groups_per_window: int) -> EpochOrder:
    """Every pair once; groups in any order, and pairs in any order within so many consecutive groups: of data that is
    read by groups, no more than one window need be in memory.
    """
    arrays = [np.asarray(group, dtype=np.int64) for group in groups]

    def order(rng: np.random.Generator) -> np.ndarray:
        shuffled = [arrays[number] for number in rng.permutation(len(arrays))]
        windows = [shuffled[start : start + groups_per_window] for start in range(0, len(shuffled), groups_per_window)]
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in windows])

    return EpochOrder(sum(map(len, groups)), order)


def by_bucket(bucket_of: Sequence[int], batch_size: int) -> EpochOrder:
    """Batches of one bucket each, in any order. Every pair is drawn; where a bucket's pairs do not fill its last batch,
    some of the same bucket are drawn a second time in the epoch.
    """
    numbers = np.asarray(bucket_of, dtype=np.int64)
    buckets = [np.flatnonzero(numbers == bucket) for bucket in np.unique(numbers)]
    filled = [-(-len(members) // batch_size) * batch_size for members in buckets]

    def order(rng: np.random.Generator) -> np.ndarray:
        draws = [np.resize(rng.permutation(members), size) for members, size in zip(buckets, filled, strict=True)]
        return rng.permutation(np.concatenate(draws).reshape(-1, batch_size)).reshape(-1)

    return EpochOrder(sum(filled), order)


def by_label(liked: Sequence[bool], share: float) -> EpochOrder:
    """As many draws as there are images; a coin decides of each whether it takes a liked one, with probability
    ``share``. Of either label every image is drawn once before one comes again in the epoch.
    """
    labels = np.asarray(liked)
    for name, label, needed in (("disliked", False, share < 1), ("liked", True, share > 0)):
        if needed and not (labels == label).any():
            problem = f"needs {name} images, and the data have none"
            raise invalid("method.like_share", share, problem, "set it to null, or to the share that there is")

    def order(rng: np.random.Generator) -> np.ndarray:
        takes_liked, found = rng.random(len(labels)) < share, np.empty(len(labels), dtype=np.int64)
        for label in (False, True):
            members, places = np.flatnonzero(labels == label), np.flatnonzero(takes_liked == label)
            rounds = [rng.permutation(members) for _ in range(-(-len(places) // max(1, len(members))))]
            found[places] = np.concatenate([*rounds, members[:0]])[: len(places)]
        return found

    return EpochOrder(len(labels), order)


def epoch_order(dataset: Any, batch_size: int, like_share: float | None = None) -> EpochOrder | None:
    """The order that a data set asks for: labels in shares, buckets, groups that are read together; None for any."""
    if like_share is not None:
        return by_label(dataset.liked, like_share)
    if getattr(dataset, "bucket_of", None):
        return by_bucket(dataset.bucket_of, batch_size)
    groups = dataset.groups() if hasattr(dataset, "groups") else None
    return by_window(groups, dataset.source.groups_per_window) if groups else None


class DrawOrder:
    """Deals the draws of a run to processes and micro-batches.

    Args:
        pairs: their number. batch_size: those of a micro-batch and process.
        accumulation: micro-batches per optimizer step.
        processes, rank: how many processes share a step, and which one this is.
        epochs: the order of the pairs within an epoch; when None every pair once, in any order.
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
        self.pairs, self.seed = pairs, seed
        self.effective_batch = batch_size * accumulation * processes
        self._batch_size, self._processes, self._rank = batch_size, processes, rank
        self._length, order = epochs or EpochOrder(pairs, lambda rng: rng.permutation(pairs))
        self._epoch = lru_cache(maxsize=2)(lambda epoch: order(np.random.default_rng([seed, epoch])))

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
