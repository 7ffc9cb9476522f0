"""Pairs of images that carry what they were generated from: each one's initial latent, or its seed."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastinvdpo.data.broken import BrokenRow, broken, caught
from fastinvdpo.data.pairs import PairDataset, PairEntry, Side
from fastinvdpo.data.rows import NOISES, SEEDS
from fastinvdpo.data.transforms import Decisions, Size
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

    def entry(self, i: int) -> PairEntry:
        found = super().entry(i)
        noises = [self._noise(found, side) for side in self._sides(found)]
        shown = (repr(noise if isinstance(noise, int) else noise.tobytes()).encode() for noise in noises)
        keys = (f"{key} {hashlib.sha256(noise).hexdigest()}" for key, noise in zip(found.keys, shown, strict=True))
        return replace(found, keys=tuple(keys))

    def _side(self, kept: PairEntry, side: int, target: int | Size | None, decisions: Decisions) -> Side:
        return super()._side(kept, side, target, decisions)._replace(noise=self._noise(kept, side))

    def _check_images(self, pairs: list[PairEntry]) -> tuple[list[PairEntry], Size | None]:
        stored, path = self.source.stored, self.source.path
        self._by_seed = not set(NOISES) <= stored
        if self._by_seed and not set(SEEDS) <= stored:
            remedy = "store noise_0 and noise_1, or seed_0 and seed_1, or name yours in data.columns"
            raise invalid("data.path", path, "does not say what noise its images were generated from", remedy)
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
            noise = caught(self._noise, pair, 0), caught(self._noise, pair, 1)
            if error := next((found for found in noise if isinstance(found, BrokenRow)), None):
                self.broken.add(pair.row, self.source.place(pair.row), error)
            else:
                checked.append(pair)
        if not checked:
            raise invalid("data.path", path, f"every row is broken: {self.broken.shown()}", "repair the file")
        return checked, size

    def _noise(self, pair: PairEntry, side: int) -> Any:
        if self._by_seed:
            return self.source.record(pair.row).seeds()[side]
        data, where = self.source.encoded(pair.row, NOISES[side]), self.source.where(pair.row, NOISES[side])
        return _latent(data, where, ("C", "h", "w") if self.source.frames is None else ("C", "frames", "h", "w"))


def _latent(data: memoryview, where: str, names: Sequence[str]) -> np.ndarray:
    """float32, with dimensions of these names, of a .npy file. Raises ``BrokenRow`` for anything else, however large it
    claims to be.
    """
    axes = f"({', '.join(names)})"
    remedy = f"store numpy.save of the initial latent, {axes} in float16 or float32"
    shown: object = f"{len(data)} bytes"
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
        shown, shape = f"{shape} {dtype}", shape[1:] if len(shape) == len(names) + 1 and shape[0] == 1 else shape
        if len(shape) != len(names) or min(shape) < 1 or dtype.kind != "f":
            raise ValueError(f"it is no {axes} of floating-point numbers")
        found = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    except (ValueError, EOFError, SyntaxError, OverflowError) as error:
        raise broken("malformed noise", where, shown, f"cannot be read as .npy ({error})", remedy) from None
    if not np.isfinite(found).all():
        raise broken("malformed noise", where, shown, "holds NaN or infinity", remedy)
    return found.astype(np.float32).reshape(shape, order="F" if by_columns else "C")
