"""Real images for the demo: scikit-learn's 1,797 handwritten digits, three preferences over them, and pairs of them.

The scans are 8x8 gray images of 17 levels; they ship with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastinvdpo._examples.pairs import check_preference, pair_row
from fastinvdpo._extras import require
from fastinvdpo.data.writing import encode_png
from fastinvdpo.errors import invalid

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 300
PREFERENCES = ("slant", "bold", "digit")


@dataclass(frozen=True)
class Digits:
    """A set of scans: ``images`` uint8 (n, 8, 8), white ink (255) on black paper, and ``labels`` int64 (n,), 0 to 9."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def prompts(self) -> list[str]:
        """What each image shows, in words."""
        return [prompt_of(label) for label in self.labels]


def prompt_of(digit: int) -> str:
    """The caption of a digit: ``prompt_of(3) == "a handwritten three"``."""
    return f"a handwritten {NAMES[digit]}"


def load_splits() -> tuple[Digits, Digits]:
    """The 1,497 training and the 300 held-out scans; the same split on every machine (a legacy NumPy permutation)."""
    bunch = require("sklearn.datasets", extra="train", purpose="the demo's digits").load_digits()
    images = np.floor(bunch.images * 255 / 16 + 0.5).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(labels))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def slant(images: np.ndarray) -> np.ndarray:
    """How far each image (n, 8, 8) leans to the right: columns per row going up, from second moments of the ink.

    With ink as mass and rows counted downwards, this is ``-mu_11 / mu_02``, the slope of the regression of column
    on row; 0 for upright strokes and for an image that has no vertical extent.
    """
    ink = np.asarray(images, dtype=np.float64) / 255
    rows, columns = np.mgrid[: ink.shape[1], : ink.shape[2]].astype(np.float64)
    mass = np.maximum(ink.sum((1, 2)), 1e-12)[:, None, None]
    y = rows - (ink * rows).sum((1, 2), keepdims=True) / mass
    x = columns - (ink * columns).sum((1, 2), keepdims=True) / mass
    covariance, variance = (ink * x * y).sum((1, 2)), (ink * y * y).sum((1, 2))
    return np.where(variance > 1e-6, -covariance / np.maximum(variance, 1e-6), 0.0)


def boldness(images: np.ndarray) -> np.ndarray:
    """Share of the page that is ink, 0 to 1, for images (n, 8, 8)."""
    return np.asarray(images, dtype=np.float64).mean((1, 2)) / 255


def scores(preference: str, images: np.ndarray, labels: np.ndarray, prompted: np.ndarray) -> np.ndarray:
    """Graded score of images under a preference; ``digit`` gives 1 where the label is the prompted digit, else 0."""
    check_preference(preference, PREFERENCES)
    if preference == "slant":
        return slant(images)
    if preference == "bold":
        return boldness(images)
    return (np.asarray(labels) == np.asarray(prompted)).astype(np.float64)


def make_pairs(digits: Digits, preference: str, count: int, seed: int, *, shuffle: bool = False) -> list[dict]:
    """Draw ``count`` preference pairs as rows of the schema jpg_0, jpg_1, label_0, label_1, caption, score_0, score_1.

    ``slant`` and ``bold`` compare two scans of one digit; ``digit`` a scan of the prompted digit with one of
    another digit. Which side wins is random as well, so that neither column is always the winner. ``shuffle`` is the
    control experiment: the images and the multiset of score differences stay, and a coin decides which side is
    called the winner.
    """
    check_preference(preference, PREFERENCES)
    if count < 1:
        raise invalid("count", count, "must be positive", "pass 1 or more")
    random = np.random.RandomState(seed)
    rows: list[dict] = []
    while len(rows) < count:
        first = random.randint(len(digits.labels))
        digit = digits.labels[first]
        same = digits.labels == digit
        candidates = np.flatnonzero(~same if preference == "digit" else same)
        pair = np.array([first, random.choice(candidates)])[random.permutation(2)]
        score = scores(preference, digits.images[pair], digits.labels[pair], digit)
        if score[0] == score[1]:
            continue
        if shuffle:
            score = score[random.permutation(2)]
        images = [encode_png(Image.fromarray(image)) for image in digits.images[pair]]
        rows.append(pair_row(images, score.tolist(), prompt_of(digit)))
    return rows
