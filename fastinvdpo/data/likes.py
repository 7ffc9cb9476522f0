"""Images that were liked or disliked, each by itself: of rows that say so, or of pairs, whose winners are likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastinvdpo.data.broken import read_ahead
from fastinvdpo.data.pairs import Pair, PairDataset, PairEntry, content_key
from fastinvdpo.data.rows import PAIRS, PairSource
from fastinvdpo.data.transforms import Size
from fastinvdpo.errors import invalid


class LikedImage(Pair):
    """One image of a caption, ``side``, liked or not."""

    side = property(lambda self: self.sides[0])


class LikedDataset(PairDataset):
    """Images that were liked or disliked, for Diffusion-KTO: rows of one image (``open_source(path, form="likes")``,
    what a path means here), or of pairs, whose winners are liked and whose losers are disliked.

    An image of a caption counts once, by its bytes; it is liked where any row likes it, as published. Arguments and
    errors are those of :class:`fastinvdpo.data.PairDataset`, without kept ties and streaming, which does not look at
    images before they are drawn.

    Attributes:
        liked: of every image. summary: counts them, and those that another row dislikes (``both``).
    """

    unpaired = True
    _form, _drawn = "likes", LikedImage

    def __init__(self, source: str | Path | PairSource, **options: Any) -> None:
        super().__init__(source, **options)
        self.summary = replace(self.summary, liked=sum(self.liked), both=self.both)

    def _read_rows(self, by_score: bool, ties: str) -> tuple[list[PairEntry], int]:
        if self.source.streaming:
            problem = "does not look at images before they are drawn, and one that several rows judge counts once"
            raise invalid("data.streaming", True, problem, "set it to false")
        if self.source.sources:
            remedy = "choose a method that trains on pairs"
            raise invalid("data.form", "likes", "has no source images, and model.family edits those", remedy)
        if self.source.masks:
            raise invalid("data.masks", True, "means nothing for images by themselves", "set it to false")
        if self.source.form is PAIRS:
            if ties == "keep":
                raise invalid("data.ties", ties, "keeps pairs that like neither image", "set it to drop or error")
            return super()._read_rows(by_score, ties)
        if by_score:
            problem = "compares two images, and a row has one"
            raise invalid("data.relabel_by_score", True, problem, "set it to false, or data.form to pairs")

        def read(row: int) -> PairEntry:
            stored = self.source.record(row)
            return PairEntry(row, 0, False, liked=stored.liked(), caption=stored.caption(), scores=None)

        return self._readable(read), 0

    def _check_images(self, pairs: list[PairEntry]) -> tuple[list[PairEntry], Size | None]:
        rows, size = super()._check_images(pairs)
        images, buckets = list[PairEntry](), list[int]()
        for i, row in enumerate(rows):
            for side in range(len(self.source.form.images)):
                liked = side == row.winner if row.liked is None else row.liked
                images.append(replace(row, winner=side, scores=None, liked=liked))
                buckets += self.bucket_of[i : i + 1]
        votes: dict[Any, list[int]] = {}  # the images that are one, by their places
        for place, identity in enumerate(self._identities(images)):
            votes.setdefault(identity, []).append(place)
        self.bucket_of = [buckets[same[0]] for same in votes.values() if buckets]
        opinions = [{images[place].liked for place in same} for same in votes.values()]
        self.liked, self.both = [True in found for found in opinions], sum(len(found) > 1 for found in opinions)
        kept = zip(votes.values(), self.liked, strict=True)
        return [replace(images[same[0]], liked=liked) for same, liked in kept], size

    def _identities(self, images: list[PairEntry]) -> list[Any]:
        """What is equal for equal images of one caption; bytes are hashed where another image has as many."""

        def read(rows: Iterable[int], digest: Callable[[memoryview, str], Any]) -> dict[int, Any]:
            def one(i: int) -> Any:
                return digest(self.source.image(images[i].row, images[i].winner), images[i].caption)

            return dict(read_ahead(one, rows))

        sizes = read(range(len(images)), lambda data, caption: (len(data), caption))
        equal = Counter(sizes.values())
        several = [i for i, size in sizes.items() if equal[size] > 1]
        return list((sizes | read(several, lambda data, caption: content_key(data, caption).digest())).values())
