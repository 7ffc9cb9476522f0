"""Resize, crop and flip of a pair's images, with the same decisions and the same target on both sides."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from PIL import Image

from fastinvdpo.data.broken import broken
from fastinvdpo.data.images import MOST_PIXELS
from fastinvdpo.errors import invalid

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class ImageGeometry:
    """The conditioning of SDXL on an image's size, in pixels, each ``(vertical, horizontal)``: the size as stored, the
    corner of the crop in the resized image, and the size as fed to the model.
    """

    original_size: Size
    crop_top_left: Size
    target_size: Size


@dataclass(frozen=True)
class Buckets:
    """Aspect-ratio buckets: sizes of about one area, so that images of any shape are cropped little.

    The area of every bucket is at most that of the square. A batch holds one bucket, and so does a pair.

    Args:
        resolution: side of the square bucket in pixels, a multiple of ``multiple``.
        multiple: sides are multiples of this.
        max_aspect: longer side over shorter side, at most.
    """

    resolution: int
    multiple: int = 64
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        if self.resolution % self.multiple:
            problem = f"is not a multiple of data.buckets.multiple = {self.multiple}"
            raise invalid("data.resolution", self.resolution, problem, "choose one that is, such as 512 or 1024")
        if self.max_aspect < 1:
            raise invalid("data.buckets.max_aspect", self.max_aspect, "is below 1", "give 2.0, say")

    @property
    def sizes(self) -> list[Size]:
        """``(height, width)`` of every bucket, from the widest to the highest."""
        area, unit = self.resolution**2, self.multiple
        found = set()
        for short in range(unit, self.resolution + 1, unit):
            long = area // (short * unit) * unit
            if long <= short * self.max_aspect:
                found |= {(short, long), (long, short)}
        return sorted(found, key=lambda size: size[0] / size[1])

    def choose(self, first: Size, second: Size) -> int:
        """Number of the bucket of a pair whose images have the sizes ``first`` and ``second``.

        The bucket whose aspect ratio is nearest, as a factor, to the geometric mean of the two; of two equally near
        ones the wider. Where they differ in shape, both lose about equally much to the crop.
        """
        wanted = (math.log(first[0] / first[1]) + math.log(second[0] / second[1])) / 2
        distances = [abs(math.log(height / width) - wanted) for height, width in self.sizes]
        return distances.index(min(distances))


@dataclass(frozen=True)
class Decisions:
    """The random choices of one sample index: mirrored or not, and the crop's place as shares of the free room."""

    flip: bool = False
    vertical: float = 0.5
    horizontal: float = 0.5


def decide(seed: int, index: int, *, random_flip: bool, center_crop: bool) -> Decisions:
    """Choices for a sample index; a hash of ``(seed, index)``, so no process or order of access matters."""
    digest = hashlib.sha256(f"fastinvdpo.transforms/{seed}/{index}".encode()).digest()
    shares = [int.from_bytes(digest[8 * k : 8 * k + 8], "big") / 2.0**64 for k in range(3)]
    flip = random_flip and shares[0] < 0.5
    return Decisions(flip) if center_crop else Decisions(flip, shares[1], shares[2])


def scaled(size: Size, target: Size, where: str) -> Size:
    """The size of an image of ``size`` when it just covers ``target``. Raises ``BrokenRow`` where that is too large: a
    strip of 1 x 10,000 pixels would have 2.6 billion at 512.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    height, width = (max(round(side * scale), least) for side, least in zip(size, target, strict=True))
    if height * width > max(MOST_PIXELS, target[0] * target[1]):
        problem = f"(height, width) becomes {(height, width)} at data.resolution, more than {MOST_PIXELS:,} pixels"
        raise broken("corrupt image", where, size, problem, "crop it, or remove the row")
    return height, width


def transform(
    image: Image.Image, resolution: int | Size | None, decisions: Decisions, where: str = "image"
) -> tuple[Image.Image, ImageGeometry]:
    """Resize (bilinear) until the image just covers the target, flip, crop; without a resolution only the flip.

    ``resolution`` is the side of a square, or ``(height, width)``. The crop is taken after the flip, so its place
    refers to the image as the model sees it.
    """
    original = (image.height, image.width)
    target = (resolution, resolution) if isinstance(resolution, int) else resolution
    if target is not None:
        height, width = scaled(original, target, where)
        if (height, width) != original:
            image = image.resize((width, height), resample=Image.Resampling.BILINEAR)
    if decisions.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top = left = 0
    if target is not None and (image.height, image.width) != target:
        # One of room + 1 possible offsets; the share 0.5 is the middle.
        rooms = ((image.height - target[0], decisions.vertical), (image.width - target[1], decisions.horizontal))
        top, left = (min(int(share * (room + 1)), room) for room, share in rooms)
        image = image.crop((left, top, left + target[1], top + target[0]))
    return image, ImageGeometry(original, (top, left), (image.height, image.width))
