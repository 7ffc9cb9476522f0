"""The shipped images: two designers' drawings of every emoji."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastinvdpo._extras import require

IMAGES = Path(__file__).with_name("emoji.parquet")
DESIGNERS = ("twemoji", "noto")
HELD_OUT = 300


@dataclass(frozen=True)
class Emoji:
    """n emoji: their captions, and the drawings of both designers, uint8 ``(2, n, 32, 32, 3)`` as in DESIGNERS."""

    names: list[str]
    categories: list[str]
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def take(self, places: np.ndarray) -> Emoji:
        """Those at ``places``, int64 ``(m,)``, in that order."""
        return Emoji(
            [self.names[place] for place in places],
            [self.categories[place] for place in places],
            self.images[:, places],
        )


@functools.cache
def split() -> tuple[np.ndarray, np.ndarray]:
    """Places of the emoji for training, and of the 300 held-out ones; the same everywhere (legacy NumPy)."""
    order = np.random.RandomState(0).permutation(len(load_emoji()))
    return order[HELD_OUT:], order[:HELD_OUT]


@functools.cache
def load_emoji(path: Path = IMAGES) -> Emoji:
    """All emoji of a parquet file that make_data wrote, in its order."""
    table = require("pyarrow.parquet", extra="train", purpose="reading the emoji").read_table(path)
    rows = table.to_pylist()
    drawn = {(row["designer"], row["name"]): row for row in rows}
    names = list(dict.fromkeys(row["name"] for row in rows))
    images = [[_pixels(drawn[designer, name]["image"]) for name in names] for designer in DESIGNERS]
    return Emoji(names, [drawn[DESIGNERS[0], name]["category"] for name in names], np.array(images))


def _pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
