"""Images with captions, and nobody's judgement: rows that hold nothing else, or the images that rows prefer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastinvdpo.data.likes import LikedImage
from fastinvdpo.data.pairs import PairDataset, PairEntry
from fastinvdpo.data.rows import LIKES, PAIRS, PairSource
from fastinvdpo.errors import invalid


class CaptionedDataset(PairDataset):
    """Images with captions: rows of an image and its caption (``open_source(path, form="images")``, what a path means
    here), or the winners of pairs, or the liked ones of images that were judged.

    Arguments and errors are those of :class:`fastinvdpo.data.PairDataset`.
    """

    unpaired = captioned = True
    _form, _drawn = "images", LikedImage

    def __init__(self, source: str | Path | PairSource, **options: Any) -> None:
        super().__init__(source, **options)
        self.summary = replace(self.summary, captioned=True)

    def _read_rows(self, by_score: bool, ties: str) -> tuple[list[PairEntry], int]:
        if self.source.masks:
            raise invalid("data.masks", True, "means nothing for images by themselves", "set it to false")
        if self.source.form is PAIRS:
            kept, dropped = super()._read_rows(by_score, ties)
            return [replace(entry, scores=None, tie=False) for entry in kept], dropped
        if by_score:
            problem = "compares two images, and a row has one"
            raise invalid("data.relabel_by_score", True, problem, "set it to false, or data.form to pairs")

        def read(row: int) -> PairEntry | None:
            stored = self.source.record(row)
            wanted = self.source.form is not LIKES or stored.liked()
            return PairEntry(row, 0, False, caption=stored.caption(), scores=None) if wanted else None

        return self._readable(read), 0
