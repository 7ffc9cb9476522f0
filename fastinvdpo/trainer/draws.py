"""Which pair is drawn when. The order depends on the seed alone, so nothing about it has to be stored or restored.

A run is one sequence of draws, numbered from 0. Draw ``d`` takes pair ``permutation(seed, d // n)[d % n]`` of a set of
``n`` pairs; optimiser step ``s`` uses draws ``s·G … (s + 1)·G − 1`` with the effective batch ``G``. How those are dealt
to processes and micro-batches changes neither the pairs of a step nor their random numbers, which are keyed by the
draw.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from fastinvdpo.errors import invalid


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of the pairs in one epoch, int64 ``(count,)``."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class DrawOrder:
    """Deals the draws of a run to processes and micro-batches.

    Args:
        pairs: number of pairs in the data set.
        seed: seed of the run.
        batch_size: pairs per micro-batch and process.
        accumulation: micro-batches per optimiser step.
        processes, rank: how many processes share a step, and which one this is.
    """

    def __init__(
        self, pairs: int, seed: int, batch_size: int, accumulation: int, processes: int = 1, rank: int = 0
    ) -> None:
        if pairs < 1:
            raise invalid("pairs", pairs, "is an empty data set", "provide at least one pair")
        self.pairs, self.seed, self.batch_size, self.accumulation = pairs, seed, batch_size, accumulation
        self.processes, self.rank = processes, rank
        self.effective_batch = batch_size * accumulation * processes

    def micro_batch(self, step: int, micro: int) -> range:
        """Draws of one micro-batch of this process; ``step`` counts from 0."""
        start = step * self.effective_batch + (micro * self.processes + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def pair_index(self, draw: int) -> int:
        """Index in the data set of the pair that a draw takes."""
        epoch, position = divmod(draw, self.pairs)
        return int(permutation(self.seed, epoch, self.pairs)[position])


def drops_caption(seed: int, draw: int, probability: float) -> bool:
    """Whether a draw trains without its caption, on both sides: a hash of (seed, draw), as for the draw's flip."""
    if probability == 0:
        return False
    digest = hashlib.sha256(f"fastinvdpo.caption_dropout/{seed}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < probability * 2.0**64
