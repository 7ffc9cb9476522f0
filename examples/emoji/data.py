"""The shipped images, two designers' drawings of every emoji, and preference pairs of them."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastinvdpo._extras import require
from fastinvdpo.data.writing import encode_png

IMAGES = Path(__file__).with_name("emoji.parquet")
DESIGNERS = ("twemoji", "noto")
HELD_OUT = 300
PREFERENCES = ("noto", "twemoji", "vivid", "prompt")


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


def saturation(images: np.ndarray) -> np.ndarray:
    """Mean over the pixels of the largest minus the smallest of red, green and blue, 0 to 1, for ``(n, h, w, 3)``."""
    found: np.ndarray = (images.max(-1).astype(np.float64) - images.min(-1)).mean((1, 2)) / 255
    return found


def make_pairs(emoji: Emoji, preference: str, seed: int, *, shuffle: bool = False) -> list[dict]:
    """One preference pair an emoji, as rows of the schema jpg_0, jpg_1, label_0, label_1, caption, score_0, score_1.

    ``noto``, ``twemoji`` and ``vivid`` compare the two drawings, the last by :func:`saturation`; ``prompt`` a drawing
    with the same designer's of another emoji. Which side wins is random as well, so that neither column is always the
    winner. ``shuffle`` is the control experiment: the pairs stay, and a coin decides which side is called the winner.
    """
    random = np.random.RandomState(seed)
    rows = []
    for place, name in enumerate(emoji.names):
        drawings, scores = emoji.images[:, place], np.array([0.0, 1.0])
        if preference == "prompt":
            other = (place + random.randint(1, len(emoji))) % len(emoji)
            drawings = emoji.images[random.randint(2), [other, place]]
        elif preference == "twemoji":
            scores = scores[::-1]
        elif preference == "vivid":
            scores = saturation(drawings)
        if scores[0] == scores[1]:
            continue
        order = random.permutation(2)
        scores = scores[random.permutation(2)] if shuffle else scores[order]
        row: dict[str, Any] = {"caption": name}
        for side in range(2):
            row[f"jpg_{side}"] = encode_png(Image.fromarray(drawings[order[side]]))
            row |= {f"label_{side}": float(scores[side] > scores[1 - side]), f"score_{side}": float(scores[side])}
        rows.append(row)
    return rows
