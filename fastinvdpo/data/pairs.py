"""Preference pairs: which image won, the caption, the scores; images decoded when they are needed."""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastinvdpo.data.broken import BrokenRow, BrokenRows, DataSummary, broken, read_ahead
from fastinvdpo.data.images import decode, decode_mask, most_of, probe
from fastinvdpo.data.rows import PAIRS, SCORES, SOURCE, TIE, PairSource
from fastinvdpo.data.sources import open_source
from fastinvdpo.data.transforms import Buckets, Decisions, ImageGeometry, Size, decide, scaled, transform
from fastinvdpo.data.videos import decode_video, probe_video
from fastinvdpo.errors import InvalidInput, invalid


class Side(NamedTuple):
    """An image as a model sees it, its original size and crop, and its key, the SHA-256 of encoded bytes, caption, mask
    and (where one was applied) transform; its mask, 8-bit gray, cut as the image, where masks are read; where it is
    known, what it was generated from: the initial latent, float32 ``(C, h, w)``, or the seed of that; of a video all
    ``frames``, of which ``image`` is the first.
    """

    image: Image.Image
    geometry: ImageGeometry
    key: str
    mask: Image.Image | None = None
    noise: np.ndarray | int | None = None
    frames: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Pair:
    """One preference: two images of the same caption, ``winner`` and ``loser``.

    Attributes:
        sides: winner and loser; ``winner_geometry``, ``winner_key``, ``winner_mask`` and those of the loser are theirs.
        row: row in the file(s), counted over all shards.
        scores: preference scores of the two images (``winner_score``, ``loser_score``), where the file has them.
        tie: neither won; the first image stands for the winner.
        liked: of a single image.
        source: what both images were edited from, where source images are read; cut as they are.
    """

    sides: tuple[Side, ...]
    caption: str
    row: int
    scores: tuple[float, float] | None = None
    tie: bool = False
    liked: bool | None = None
    source: Side | None = None

    winner = property(lambda self: self.sides[0].image)
    winner_geometry = property(lambda self: self.sides[0].geometry)
    winner_key = property(lambda self: self.sides[0].key)
    winner_mask = property(lambda self: self.sides[0].mask)
    winner_score = property(lambda self: self.scores and self.scores[0])
    loser = property(lambda self: self.sides[1].image)
    loser_geometry = property(lambda self: self.sides[1].geometry)
    loser_key = property(lambda self: self.sides[1].key)
    loser_mask = property(lambda self: self.sides[1].mask)
    loser_score = property(lambda self: self.scores and self.scores[1])
    noises = property(lambda self: (self.sides[0].noise, self.sides[1].noise))

    @property
    def judged(self) -> tuple[Any, ...]:
        """What is known of the preference beside who won."""
        return (*(self.scores or (None, None)), self.tie) if self.liked is None else (self.liked,)


@dataclass(frozen=True, slots=True)
class PairEntry:
    """What is known of a pair, or of an image that was liked or not, without decoding.

    Attributes:
        winner: the side that won, or stands for the winner of a tie; of a single image its own side.
        scores: those of winner and loser, where the file has them.
        keys: SHA-256 of encoded bytes, caption and mask, of winner and loser; equal for equal images of one caption.
        liked: of a single image.
        source_key: SHA-256 of the encoded source, where source images are read; ``keys`` follow from it, too.
    """

    row: int
    winner: int
    tie: bool
    caption: str
    scores: tuple[float, float] | None
    keys: tuple[str, ...] = ()
    liked: bool | None = None
    source_key: str = ""


class PairDataset:
    """Preference pairs of a source: parquet, a folder, ranked images, webdataset shards, a ``datasets`` repository.

    docs/guides/data.md has the formats. Labels, captions, scores and (unless the source streams) image headers of all
    rows are checked when the set is opened; the images themselves are decoded when a pair is read.

    Args:
        source: what :func:`fastinvdpo.data.open_source` gave, or a path for it with ``columns``; with masks
            ``open_source(path).with_masks()``, of videos ``open_source(path).with_frames(17)``.
        ties: ``"drop"``, ``"keep"`` (``Pair.tie`` is set) or ``"error"``; all are counted.
        resolution: shorter side in pixels after resizing, and side of the square crop; or :class:`Buckets`, among which
            the shape of each pair chooses. ``None`` keeps the images, which then must all have one size.
        random_flip, center_crop: mirror half of the samples; crop the middle instead of a random place.
        relabel_by_score: the winner is the image with the higher score, equal scores are the ties, and labels are not
            read (SmPO-Diffusion, arXiv 2506.02698).
        seed: seed of flips and crops.
        max_broken: how many rows that cannot be used may be left out, as a count or as a share below 1 of all rows;
            they are listed in ``broken``, with a warning. Above zero every image is decoded once when the set is
            opened. Zero: the first one is an error.

    Attributes:
        summary: what became of every row. broken: the rows that were left out.
        has_scores, has_masks, has_sources: whether pairs carry preference scores, masks, and source images.
        image_sizes: how many images have which ``(height, width)``; empty where they were not looked at.
        bucket_of, bucket_sizes: with buckets, the number of every pair's bucket, and the buckets' sizes.

    Raises:
        InvalidInput: naming row and column of the value that cannot be used, or the option.
    """

    unpaired = False
    """Whether an entry is one image."""
    captioned = False
    """Whether nobody judged it."""
    has_noise = False
    """Whether it is known what images were generated from."""
    _form, _drawn = "pairs", Pair  # what the rows at a path are, and what is drawn

    def __init__(
        self,
        source: str | Path | PairSource,
        *,
        columns: Mapping[str, str] | None = None,
        ties: str = "drop",
        resolution: int | Buckets | None = None,
        random_flip: bool = False,
        center_crop: bool = True,
        relabel_by_score: bool = False,
        seed: int = 0,
        max_broken: int | float = 0,
    ) -> None:
        _check_options(ties, resolution, max_broken)
        if not isinstance(source, PairSource):
            source = open_source(source, form=self._form, columns=columns)
        self.source, self.seed, self._frames = source, seed, source.frames
        self.resolution, self.random_flip, self.center_crop = resolution, random_flip, center_crop
        form, path, total = source.form, source.path, len(source)
        needed = SCORES if relabel_by_score and form is PAIRS else form.labels[:1]
        scored = sorted(source.resolve((*form.images, "caption", *needed)) & set(SCORES))
        if len(scored) == 1:
            raise invalid("data.columns", scored, "has no other side beside it", "store both scores or neither")
        self.has_scores, self.has_masks = bool(scored), source.mask_names is not None
        self.has_sources = bool(source.sources)
        if not total:
            raise invalid("data.path", path, "holds no rows", "write at least one")
        self.broken = BrokenRows(max_broken, total)
        self.bucket_sizes: list[Size] = resolution.sizes if isinstance(resolution, Buckets) else []
        self.bucket_of: list[int] = []
        self.image_sizes: Counter[Size] = Counter()
        self._alike: list[int] = []
        kept, self.dropped_ties = self._read_rows(relabel_by_score, ties)
        self._kept, self.image_size = self._check_images(kept)
        if self._alike:
            shown = f"{len(self._alike)} pairs have one image on both sides, the first in row {min(self._alike)}"
            warnings.warn(f"{path}: {shown}; there is nothing to learn from them", stacklevel=2)
        found = self.dropped_ties + sum(pair.tie for pair in self._kept), ties == "keep"
        self.summary = DataSummary(path, source.format, total, len(self), *found, self.broken.counts())
        if self.broken.found:
            left_out = f"left out {len(self.broken.found)} broken rows {self.broken.shown()}"
            warnings.warn(f"{path}: {left_out}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> Pair:
        return self.pair(i, draw=i)

    def pair(self, i: int, draw: int) -> Pair:
        """Pair ``i`` at the sample index ``draw``: flip and crop follow from ``(seed, draw)``, equal on both sides.

        Raises:
            IndexError: ``i`` out of range. InvalidInput: image data that turns out to be broken.
        """
        if not 0 <= i < len(self._kept):
            raise IndexError(f"pair {i} of a set of {len(self._kept)} pairs")
        kept = self._kept[i]
        target = self.bucket_sizes[self.bucket_of[i]] if self.bucket_of else self.resolution
        assert not isinstance(target, Buckets)  # then there are bucket numbers
        decisions = decide(self.seed, draw, random_flip=self.random_flip, center_crop=self.center_crop)
        sides = tuple(self._side(kept, side, target, decisions) for side in self._sides(kept))
        source = self._seen(kept, SOURCE, target, decisions) if self.has_sources else None
        return self._drawn(sides, kept.caption, kept.row, kept.scores, kept.tie, kept.liked, source)

    def entry(self, i: int) -> PairEntry:
        """Row, caption, keys and scores of pair ``i``; reads the images' bytes and decodes nothing."""
        kept, read = self._kept[i], self.source
        found = [(read.image(kept.row, side), read.mask(kept.row, side)) for side in self._sides(kept)]
        keys = [content_key(data, kept.caption, mask) for data, mask in found]
        if not self.has_sources:
            return replace(kept, keys=tuple(key.hexdigest() for key in keys))
        source = hashlib.sha256(read.encoded(kept.row, SOURCE)).hexdigest()
        for key in keys:
            key.update(source.encode())
        return replace(kept, keys=tuple(key.hexdigest() for key in keys), source_key=source)

    def caption(self, i: int) -> str:
        return self._kept[i].caption

    def scores(self) -> list[tuple[float, float]] | None:
        """Scores of winner and loser of all pairs, None where the data has none."""
        return [pair.scores for pair in self._kept if pair.scores is not None] if self.has_scores else None

    def groups(self) -> list[list[int]] | None:
        """Pairs that are read together, where the source reads groups of rows; None where it reads single rows."""
        sizes = self.source.groups()
        if sizes is None:
            return None
        found: list[list[int]] = [[] for _ in sizes]
        ends = list(accumulate(sizes))
        for i, pair in enumerate(self._kept):
            found[bisect_right(ends, pair.row)].append(i)
        return [group for group in found if group]

    def _sides(self, kept: PairEntry) -> tuple[int, ...]:
        """The images of an entry, by their numbers in the row."""
        return (kept.winner,) if self.unpaired else (kept.winner, 1 - kept.winner)

    def _side(self, kept: PairEntry, side: int, target: int | Size | None, decisions: Decisions) -> Side:
        encoded = self.source.mask(kept.row, side)
        found = self._seen(kept, self.source.form.images[side], target, decisions, encoded)
        mask = self._mask(encoded, kept.row, side, found.geometry.original_size, target, decisions)
        return found._replace(mask=mask)

    def _seen(
        self,
        kept: PairEntry,
        name: str,
        target: int | Size | None,
        decisions: Decisions,
        mask: memoryview | None = None,
    ) -> Side:
        """An image of a row without its mask, which its key follows from."""
        data, where = self.source.encoded(kept.row, name), self.source.where(kept.row, name)
        shown = [decode(data, where)] if self._frames is None else decode_video(data, where, self._frames)
        seen = [transform(one, target, decisions, where) for one in shown]
        image, geometry = seen[0]
        if target is None and geometry.target_size != self.image_size:
            raise _another_size(where, geometry.target_size, self.image_size)
        key = content_key(data, kept.caption, mask)
        if target is not None or decisions.flip:
            key.update(repr((target, decisions.flip, geometry)).encode())
        frames = () if self._frames is None else tuple(one for one, _ in seen)
        return Side(image, geometry, key.hexdigest(), frames=frames)

    def _mask(
        self, data: memoryview | None, row: int, side: int, size: Size, target: int | Size | None, decisions: Decisions
    ) -> Image.Image | None:
        """The mask of an image of ``size``, cut as the image is; None where masks are not read."""
        if data is None or self.source.mask_names is None:
            return None
        where = self.source.where(row, self.source.mask_names[side])
        mask, _ = transform(decode_mask(data, where, size), target, decisions, where)
        if self.center_crop and most_of(mask) == 0:  # a crop elsewhere may miss it now and then
            problem = f"is black in the crop to {target}, so that nothing counts"
            raise broken("malformed mask", where, size, problem, "crop image and mask yourself, or leave the row out")
        return mask

    def _read_rows(self, by_score: bool, ties: str) -> tuple[list[PairEntry], int]:
        """The rows whose images are wanted, and how many ties were dropped."""
        dropped: list[int] = []

        def read(row: int) -> PairEntry | None:
            stored = self.source.record(row)
            scores = stored.scores() if self.has_scores else None
            if by_score and scores is not None:  # required columns
                winner = TIE if scores[0] == scores[1] else int(scores[1] > scores[0])
            else:
                winner = stored.winner()
            if winner == TIE and ties != "keep":
                dropped.append(row)
                return None
            ordered = scores[::-1] if scores is not None and winner == 1 else scores
            return PairEntry(row, max(winner, 0), winner == TIE, stored.caption(), ordered)

        kept = self._readable(read)
        if dropped and ties == "error":
            problem = f"{len(dropped)} pairs are ties, the first in row {dropped[0]}"
            raise invalid("data.ties", ties, problem, "set data.ties to 'drop'")
        if len(dropped) == len(self.source):
            problem = f"all {len(dropped)} pairs are ties"
            raise invalid("data.path", self.source.path, problem, "provide pairs with a winner")
        return kept, len(dropped)

    def _readable(self, read: Callable[[int], PairEntry | None]) -> list[PairEntry]:
        """What ``read`` makes of the rows, without those that are broken, which are counted, or None."""
        kept = []
        for row in range(len(self.source)):
            try:
                if (entry := read(row)) is not None:
                    kept.append(entry)
            except BrokenRow as error:
                self.broken.add(row, self.source.place(row), error)
        return kept

    def _check_images(self, pairs: list[PairEntry]) -> tuple[list[PairEntry], Size | None]:
        """The pairs whose images are there, and the size of all images; assigns the buckets."""
        whole, target = self.broken.allowed != 0, self.resolution
        size = (target, target) if isinstance(target, int) else None
        if pairs and self.source.streaming and not whole and not isinstance(target, Buckets):
            return pairs, size or self._sizes(True, pairs[0].row)[0]
        kept: list[PairEntry] = []
        found = read_ahead(partial(self._sizes, whole), [pair.row for pair in pairs], 4 if whole else 1)
        for pair, (row, sizes) in zip(pairs, found, strict=True):
            if isinstance(sizes, BrokenRow):
                self.broken.add(row, self.source.place(row), sizes)
                continue
            kept.append(pair)
            self.image_sizes.update(sizes)
            if isinstance(target, Buckets):
                self.bucket_of.append(target.choose(sizes[0], sizes[-1]))
            elif target is None:
                size = size or sizes[0]
                if set(sizes) != {size}:
                    side = int(sizes[0] == size)
                    raise _another_size(self.source.where(row, self.source.form.images[side]), sizes[side], size)
        if not kept:
            problem = f"every row that is no tie is broken: {self.broken.shown()}"
            raise invalid("data.path", self.source.path, problem, "repair the file")
        return kept, size

    def _size(self, data: memoryview, where: str, whole: bool) -> Size:
        if self._frames is None:
            return decode(data, where).size[::-1] if whole else probe(data, where)
        if whole:
            return decode_video(data, where, self._frames)[0].size[::-1]
        return probe_video(data, where, self._frames)

    def _sizes(self, whole: bool, row: int) -> list[Size]:
        """The sizes of the images of a row; ``whole`` decodes them, otherwise the headers are read."""
        read, names = self.source, (*self.source.form.images, *((SOURCE,) if self.has_sources else ()))
        images = [(read.encoded(row, name), read.where(row, name)) for name in names]
        if len(read.form.images) == 2 and images[0][0] == images[1][0]:
            self._alike.append(row)
        sizes = [self._size(*image, whole) for image in images]
        target = self.resolution
        if isinstance(target, int):
            for size, (_, where) in zip(sizes, images, strict=True):
                scaled(size, (target, target), where)
        if self.has_sources and (source := sizes.pop()) != sizes[0] and target is None:
            raise _another_size(images[-1][1], source, sizes[0])
        if self.has_masks:  # small when encoded, and often wrong: they are always looked at
            cut = target.sizes[target.choose(*sizes)] if isinstance(target, Buckets) else target
            for side, size in enumerate(sizes):
                self._mask(read.mask(row, side), row, side, size, cut, Decisions())
        return sizes


def content_key(data: memoryview, caption: str, mask: memoryview | None = None) -> Any:
    """SHA-256 of the encoded bytes, caption and mask."""
    key = hashlib.sha256(data)
    key.update(b"\0" + caption.encode())
    if mask is not None:
        key.update(b"\0" + hashlib.sha256(mask).digest())
    return key


def _another_size(where: str, found: Size, size: Size | None) -> InvalidInput:
    problem = f"(height, width) differs from {size} before it"
    return invalid(where, found, problem, "set data.resolution, so that images are resized and cropped")


def _check_options(ties: str, resolution: Any, max_broken: Any) -> None:
    if ties not in ("drop", "keep", "error"):
        raise invalid("data.ties", ties, "is not a way to treat ties", "use 'drop', 'keep' or 'error'")
    whole = isinstance(resolution, int) and not isinstance(resolution, bool) and resolution >= 1
    if not (resolution is None or whole or isinstance(resolution, Buckets)):
        raise invalid("data.resolution", resolution, "is not a positive whole number", "give pixels, such as 512")
    share = isinstance(max_broken, float) and 0 <= max_broken < 1
    if not share and (type(max_broken) is not int or max_broken < 0):
        problem = "is neither a count nor a share below 1"
        raise invalid("data.max_broken", max_broken, problem, "use 0, a count such as 10, or a share such as 0.01")
