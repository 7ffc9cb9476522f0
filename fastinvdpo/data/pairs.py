"""Preference pairs from parquet: which image won, the caption, the scores; images decoded when asked for."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinvdpo.data.images import decode, image_bytes, probe
from fastinvdpo.data.tables import open_table, parquet_files, resolve_columns
from fastinvdpo.data.transforms import Decisions, ImageGeometry, decide, transform
from fastinvdpo.errors import InvalidInput, invalid

if TYPE_CHECKING:
    from PIL.Image import Image

_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Pair:
    """One preference: two pictures of the same caption.

    Attributes:
        winner_score, loser_score: preference scores of the two images, where the file has them.
        row: row in the file(s), counted over all shards.
        winner_key, loser_key: SHA-256 of encoded bytes, caption and (where one was applied) transform, as cache keys.
        winner_geometry, loser_geometry: original size and crop, for models conditioned on them.
    """

    winner: Image
    loser: Image
    caption: str
    winner_score: float | None
    loser_score: float | None
    row: int
    winner_key: str
    loser_key: str
    winner_geometry: ImageGeometry
    loser_geometry: ImageGeometry


@dataclass(frozen=True)
class PairEntry:
    """What is known of a pair without decoding its images.

    Attributes:
        winner_key, loser_key: SHA-256 of encoded bytes and caption; equal for equal images of one caption.
        scores: those of winner and loser, where the file has them.
    """

    row: int
    caption: str
    winner_key: str
    loser_key: str
    scores: tuple[float, float] | None


class PairDataset:
    """Preference pairs of one parquet file or a directory of shards.

    Columns: ``jpg_0, jpg_1`` (encoded image bytes, any format PIL reads), ``label_0, label_1`` (1/0, 0/1, probabilities
    that sum to 1, or 0.5/0.5 for a tie), ``caption``, and optionally ``score_0, score_1``. Other names are mapped with
    ``columns={"jpg_0": "image_a"}``. Labels, captions, scores and image headers of all rows are checked when the set is
    opened; the pictures themselves are decoded when a pair is asked for.

    Args:
        ties: ``"drop"`` (counted in ``dropped_ties``) or ``"error"``.
        resolution: shorter side in pixels after resizing, and side of the square crop; ``None`` keeps the images,
            which then must all have one size.
        random_flip, center_crop: mirror half of the draws; crop the middle instead of a random place.
        relabel_by_score: the winner is the image with the higher score, equal scores are the ties, and labels are not
            read (SmPO-Diffusion, arXiv 2506.02698).
        seed: seed of flips and crops.
        max_broken: how many rows with broken images may be left out (their numbers are in ``broken_rows``, with a
            warning). Above zero every image is decoded once when the set is opened. Zero: a broken image is an error.

    Raises:
        InvalidInput: naming row and column of the value that cannot be used, or the option.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        columns: Mapping[str, str] | None = None,
        ties: str = "drop",
        resolution: int | None = None,
        random_flip: bool = False,
        center_crop: bool = True,
        relabel_by_score: bool = False,
        seed: int = 0,
        max_broken: int = 0,
    ) -> None:
        _check_options(ties, resolution, max_broken)
        self.path = Path(path)
        self.resolution, self.random_flip, self.center_crop = resolution, random_flip, center_crop
        self.relabel_by_score, self.seed, self.max_broken = relabel_by_score, seed, max_broken
        self._files = parquet_files(path)
        labels, scores = ("label_0", "label_1"), ("score_0", "score_1")
        required = ("jpg_0", "jpg_1", "caption", *(scores if relabel_by_score else labels))
        self._columns = resolve_columns(self._files, columns or {}, required, () if relabel_by_score else scores)
        self._table: Any = None
        self._captions = _captions(self._column("caption"), self._columns["caption"])
        if not self._captions:
            raise invalid("data.path", str(path), "holds no rows", "write at least one pair")
        self._scores = self._read_scores()
        self._winners = self._read_winners()
        self._rows, self.dropped_ties = self._without_ties(ties)
        self.broken_rows: list[int] = []
        self._check_images()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Pair:
        return self.pair(i, draw=i)

    def pair(self, i: int, draw: int) -> Pair:
        """Pair ``i`` as draw number ``draw`` sees it: flip and crop follow from ``(seed, draw)``, equal on both sides.

        Raises:
            InvalidInput: ``i`` out of range, or image data that turns out to be broken.
        """
        if not 0 <= i < len(self._rows):
            raise IndexError(f"pair {i} of a set of {len(self._rows)} pairs")
        row = self._rows[i]
        winner = self._winners[row]
        caption = self._captions[row]
        decisions = decide(self.seed, draw, random_flip=self.random_flip, center_crop=self.center_crop)
        sides = [self._side(row, side, caption, decisions) for side in (winner, 1 - winner)]
        scores = (None, None) if self._scores is None else (self._scores[winner][row], self._scores[1 - winner][row])
        (won, won_at, won_key), (lost, lost_at, lost_key) = sides
        return Pair(won, lost, caption, scores[0], scores[1], row, won_key, lost_key, won_at, lost_at)

    def entry(self, i: int) -> PairEntry:
        """Row, caption, keys and scores of pair ``i``; reads the images' bytes and decodes nothing."""
        row = self._rows[i]
        winner, caption = self._winners[row], self._captions[row]
        keys = [self._content_key(row, side, caption).hexdigest() for side in (winner, 1 - winner)]
        scores = None if self._scores is None else (self._scores[winner][row], self._scores[1 - winner][row])
        return PairEntry(row, caption, keys[0], keys[1], scores)

    def caption(self, i: int) -> str:
        """Caption of pair ``i``."""
        return self._captions[self._rows[i]]

    @property
    def has_scores(self) -> bool:
        """Whether pairs carry preference scores."""
        return self._scores is not None

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the files themselves: a memory-mapped set must not be copied through a pipe.
        return {**self.__dict__, "_table": None}

    def _column(self, name: str) -> Any:
        if self._table is None:
            self._table = open_table(self._files, self._columns)
        return self._table.column(name)

    def _side(self, row: int, side: int, caption: str, decisions: Decisions) -> tuple[Image, ImageGeometry, str]:
        name = f"jpg_{side}"
        data = image_bytes(self._column(name)[row], row, self._columns[name])
        image, geometry = transform(decode(data, row, self._columns[name]), self.resolution, decisions)
        key = self._content_key(row, side, caption)
        if self.resolution is not None or decisions.flip:
            key.update(repr((self.resolution, decisions.flip, geometry)).encode())
        return image, geometry, key.hexdigest()

    def _content_key(self, row: int, side: int, caption: str) -> Any:
        name = f"jpg_{side}"
        key = hashlib.sha256(image_bytes(self._column(name)[row], row, self._columns[name]))
        key.update(b"\0" + caption.encode())
        return key

    def _read_scores(self) -> tuple[list[float], list[float]] | None:
        stored = [name for name in ("score_0", "score_1") if name in self._columns]
        if len(stored) == 1:
            other = "score_1" if stored == ["score_0"] else "score_0"
            raise invalid("data.columns", stored, f"{other!r} is missing beside it", "store both scores or neither")
        if not stored:
            return None
        first, second = (_numbers(self._column(name), self._columns[name]) for name in stored)
        return first, second

    def _read_winners(self) -> list[int]:
        """Per row 0 or 1, the side that won, or -1 for a tie."""
        if self.relabel_by_score:
            assert self._scores is not None  # required columns above
            return [-1 if a == b else int(b > a) for a, b in zip(*self._scores, strict=True)]
        name_0, name_1 = self._columns["label_0"], self._columns["label_1"]
        labels_0, labels_1 = _numbers(self._column("label_0"), name_0), _numbers(self._column("label_1"), name_1)
        winners = []
        for row, (a, b) in enumerate(zip(labels_0, labels_1, strict=True)):
            for name, value in ((name_0, a), (name_1, b)):
                if not 0.0 <= value <= 1.0:
                    raise invalid(f"row {row}, column {name!r}", value, "is not in [0, 1]", _LABEL_REMEDY)
            if abs(a + b - 1.0) > _SUM_TOLERANCE:
                shown = (a, b)
                raise invalid(f"row {row}, columns {name_0!r} and {name_1!r}", shown, "do not sum to 1", _LABEL_REMEDY)
            winners.append(-1 if abs(a - b) <= _SUM_TOLERANCE else int(b > a))
        return winners

    def _without_ties(self, ties: str) -> tuple[list[int], int]:
        rows = [row for row, winner in enumerate(self._winners) if winner >= 0]
        tied = len(self._winners) - len(rows)
        if tied and ties == "error":
            row = self._winners.index(-1)
            raise invalid(
                "data.ties", ties, f"{tied} pairs are ties, the first in row {row}", "set data.ties to 'drop'"
            )
        if not rows:
            raise invalid("data.path", str(self.path), f"all {tied} pairs are ties", "provide pairs with a winner")
        return rows, tied

    def _check_images(self) -> None:
        """Leave out up to ``max_broken`` broken rows; without a resolution, require one size throughout."""
        kept: list[int] = []
        size: tuple[int, int] | None = None
        for row in self._rows:
            try:
                sizes = [self._probe(row, name) for name in ("jpg_0", "jpg_1")]
            except InvalidInput as error:
                self.broken_rows.append(row)
                if self.max_broken == 0:
                    raise
                if len(self.broken_rows) > self.max_broken:
                    problem = f"more rows than that are broken: {self.broken_rows}; the last: {error}"
                    raise invalid("data.max_broken", self.max_broken, problem, "repair the file") from error
                continue
            kept.append(row)
            for name, found in zip(("jpg_0", "jpg_1"), sizes, strict=True):
                size = size or found
                if self.resolution is None and found != size:
                    where = f"row {row}, column {self._columns[name]!r}"
                    problem = f"(height, width) differs from {size} before it"
                    raise invalid(where, found, problem, "set data.resolution, so that images are resized and cropped")
        if not kept:
            raise invalid("data.path", str(self.path), "every row holds a broken image", "repair the file")
        if self.broken_rows:
            warnings.warn(f"{self.path}: left out {len(self.broken_rows)} broken rows {self.broken_rows}", stacklevel=3)
        self._rows = kept
        self.image_size: tuple[int, int] | None = size if self.resolution is None else (self.resolution,) * 2

    def _probe(self, row: int, name: str) -> tuple[int, int]:
        column = self._columns[name]
        data = image_bytes(self._column(name)[row], row, column)
        if self.max_broken == 0:
            return probe(data, row, column)
        image = decode(data, row, column)
        return image.height, image.width


_LABEL_REMEDY = "store 1/0 or 0/1 for a winner, 0.5/0.5 for a tie"


def _check_options(ties: str, resolution: int | None, max_broken: int) -> None:
    if ties not in ("drop", "error"):
        raise invalid("data.ties", ties, "is not a way to treat ties", "use 'drop' or 'error'")
    if resolution is not None and (isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1):
        raise invalid("data.resolution", resolution, "is not a positive whole number", "give pixels, such as 512")
    if isinstance(max_broken, bool) or not isinstance(max_broken, int) or max_broken < 0:
        raise invalid("data.max_broken", max_broken, "is not a count", "use 0 or more")


def _captions(column: Any, name: str) -> list[str]:
    captions = column.to_pylist()
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise invalid(f"row {row}, column {name!r}", caption, "is not a string", "store text; '' means no prompt")
    return captions


def _numbers(column: Any, name: str) -> list[float]:
    values = column.to_pylist()
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise invalid(f"row {row}, column {name!r}", value, "is not a finite number", "store a number in every row")
    return [float(value) for value in values]
