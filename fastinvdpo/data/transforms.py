"""Resize, crop and flip of a pair's images, with the same decisions and the same target on both sides."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastinvdpo._extras import require
from fastinvdpo.data.broken import broken
from fastinvdpo.data.images import MOST_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageGeometry:
    """The conditioning of SDXL on an image's size, in pixels, each ``(vertical, horizontal)``.

    Attributes:
        original_size: ``(height, width)`` as stored.
        crop_top_left: ``(top, left)`` of the crop in the resized image.
        target_size: ``(height, width)`` as fed to the model.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


@dataclass(frozen=True)
class Decisions:
    """The random choices of one sample index: mirrored or not, and the crop's place as shares of the free room."""

    flip: bool = False
    vertical: float = 0.5
    horizontal: float = 0.5


def decide(seed: int, draw: int, *, random_flip: bool, center_crop: bool) -> Decisions:
    """Choices for the sample index ``draw``; a hash of ``(seed, draw)``, so no process or order of access matters."""
    digest = hashlib.sha256(f"fastinvdpo.transforms/{seed}/{draw}".encode()).digest()
    shares = [int.from_bytes(digest[8 * k : 8 * k + 8], "big") / 2.0**64 for k in range(3)]
    flip = random_flip and shares[0] < 0.5
    return Decisions(flip) if center_crop else Decisions(flip, shares[1], shares[2])


def scaled(size: tuple[int, int], target: tuple[int, int], where: str) -> tuple[int, int]:
    """``(height, width)`` of an image of ``size`` when it just covers ``target``. Raises ``BrokenRow`` where that is
    too large: a strip of 1 x 10,000 pixels would have 2.6 billion at 512.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    height, width = (max(round(side * scale), least) for side, least in zip(size, target, strict=True))
    if height * width > max(MOST_PIXELS, target[0] * target[1]):
        problem = f"(height, width) becomes {(height, width)} at data.resolution, more than {MOST_PIXELS:,} pixels"
        raise broken("corrupt image", where, size, problem, "crop it, or remove the row")
    return height, width


def transform(
    image: Image, resolution: int | tuple[int, int] | None, decisions: Decisions, where: str = "image"
) -> tuple[Image, ImageGeometry]:
    """Resize (bilinear) until the image just covers the target, flip, crop; without a resolution only the flip.

    ``resolution`` is the side of a square, or ``(height, width)``. The crop is taken after the flip, so its place
    refers to the image as the model sees it.
    """
    pil = require("PIL.Image", extra="train", purpose="resizing and cropping images")
    original = (image.height, image.width)
    target = (resolution, resolution) if isinstance(resolution, int) else resolution
    if target is not None:
        height, width = scaled(original, target, where)
        if (height, width) != original:
            image = image.resize((width, height), resample=pil.Resampling.BILINEAR)
    if decisions.flip:
        image = image.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
    top = left = 0
    if target is not None and (image.height, image.width) != target:
        top = _offset(image.height - target[0], decisions.vertical)
        left = _offset(image.width - target[1], decisions.horizontal)
        image = image.crop((left, top, left + target[1], top + target[0]))
    return image, ImageGeometry(original, (top, left), (image.height, image.width))


def _offset(room: int, share: float) -> int:
    """Offset among the ``room + 1`` possible ones; share 0.5 is the middle."""
    return min(int(share * (room + 1)), room)
