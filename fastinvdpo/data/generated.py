"""Pairs of images that carry what they were generated from: each one's initial latent, or its seed."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fastinvdpo.data.broken import BrokenRow, broken
from fastinvdpo.data.pairs import Pair, PairDataset, PairEntry
from fastinvdpo.data.rows import NOISES, SEEDS, seeds_of
from fastinvdpo.data.transforms import Size
from fastinvdpo.errors import invalid


class GeneratedDataset(PairDataset):
    """:class:`PairDataset` of rows with ``noise_0`` and ``noise_1``, the initial latent of each image as the bytes of a
    .npy file (in folders the path of one), or with ``seed_0`` and ``seed_1``; where both are stored the noise counts.
    ``Pair.noises`` has them.

    An image that is mirrored, cropped or resized is not the one that the noise gives, so that images must have the size
    of ``resolution`` and are taken as they are.

    Raises:
        InvalidInput: as :class:`PairDataset`, or rows without noise, or images that would be transformed.
    """

    has_noise = True

    def pair(self, i: int, draw: int) -> Pair:
        return replace(super().pair(i, draw), noises=self._noises(self._kept[i]))

    def entry(self, i: int) -> PairEntry:
        found = super().entry(i)
        noises = [noise if isinstance(noise, int) else noise.tobytes() for noise in self._noises(found)]
        suffixes = [hashlib.sha256(repr(noise).encode()).hexdigest() for noise in noises]
        return replace(found, keys=tuple(f"{key} {noise}" for key, noise in zip(found.keys, suffixes, strict=True)))

    def _check_images(self, pairs: list[PairEntry]) -> tuple[list[PairEntry], Size | None]:
        stored = self.source.stored
        self._by_seed = not set(NOISES) <= stored
        if self._by_seed and not set(SEEDS) <= stored:
            remedy = "store noise_0 and noise_1, or seed_0 and seed_1, or name yours in data.columns"
            raise invalid(
                "data.path", self.source.path, "does not say what noise its images were generated from", remedy
            )
        if self.random_flip:
            problem = "mirrors an image, and no noise gives the mirrored one"
            raise invalid("data.random_flip", True, problem, "set it to false")
        kept, size = super()._check_images(pairs)
        if set(self.image_sizes) != {size}:
            sizes = sorted(self.image_sizes) or "not looked at (data.streaming)"
            problem = f"resizes or crops images, and no noise gives the result; their (height, width) are {sizes}"
            raise invalid("data.resolution", self.resolution, problem, "set it to the size that all images have")
        checked = []
        for pair in kept:
            try:
                self._noises(pair)
                checked.append(pair)
            except BrokenRow as error:
                self.broken.add(pair.row, self.source.place(pair.row), error)
        if not checked:
            raise invalid(
                "data.path", self.source.path, f"every row is broken: {self.broken.shown()}", "repair the file"
            )
        return checked, size

    def _noises(self, pair: PairEntry) -> Any:
        """Of winner and loser."""
        where = partial(self.source.where, pair.row)
        if self._by_seed:
            found: Any = seeds_of(self.source.record(pair.row), where)
        else:
            found = tuple(_latent(self.source.noise(pair.row, side), where(name)) for side, name in enumerate(NOISES))
        return found if pair.winner == 0 else found[::-1]


def _latent(data: memoryview, where: str) -> np.ndarray:
    """float32 ``(C, h, w)`` of a .npy file. Raises ``BrokenRow`` for anything else, however large it claims to be."""
    remedy = "store numpy.save of the initial latent, (C, h, w) in float16 or float32"
    shown: object = f"{len(data)} bytes"
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
        shown, shape = f"{shape} {dtype}", shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
        if len(shape) != 3 or min(shape) < 1 or dtype.kind != "f":
            raise ValueError("it is no (C, h, w) of floating-point numbers")
        found = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    except (ValueError, EOFError, SyntaxError, OverflowError) as error:
        raise broken("malformed noise", where, shown, f"cannot be read as .npy ({error})", remedy) from None
    if not np.isfinite(found).all():
        raise broken("malformed noise", where, shown, "holds NaN or infinity", remedy)
    return found.astype(np.float32).reshape(shape, order="F" if by_columns else "C")
