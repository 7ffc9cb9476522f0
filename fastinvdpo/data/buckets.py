"""Aspect-ratio buckets: sizes of about one area, so that images of any shape are cropped little.

The area of every bucket is at most that of the square, and its sides are multiples of one number. A batch holds one
bucket, and so does a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastinvdpo.errors import invalid

Size = tuple[int, int]


@dataclass(frozen=True)
class Buckets:
    """The sizes that images are resized and cropped to.

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
        """Number of the bucket of a pair whose images are ``(height, width)`` = ``first`` and ``second``.

        The bucket whose aspect ratio is nearest, as a factor, to the geometric mean of the two; of two equally near
        ones the wider. Where they differ in shape, both lose about equally much to the crop.
        """
        wanted = (math.log(first[0] / first[1]) + math.log(second[0] / second[1])) / 2
        distances = [abs(math.log(height / width) - wanted) for height, width in self.sizes]
        return distances.index(min(distances))
