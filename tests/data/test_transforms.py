"""Flip, crop and buckets: one decision for both images of a pair, made by seed and sample index alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageOps

from fastinvdpo.data import Buckets, ImageGeometry, PairDataset
from fastinvdpo.data.transforms import Decisions, transform
from fastinvdpo.errors import InvalidInput
from tests.data.test_pairs import encoded, image, row, store


def test_both_sides_are_mirrored_together(tmp_path: Path) -> None:
    path = store(tmp_path / "p.parquet", [row(0)])
    assert {PairDataset(path).pair(0, index).winner.tobytes() for index in range(5)} == {image(0).tobytes()}
    mirrored = [ImageOps.mirror(image(shade)).tobytes() for shade in (0, 100)]

    def flips(seed: int) -> list[list[bool]]:
        pairs = PairDataset(path, random_flip=True, seed=seed)
        read = (pairs.pair(0, index) for index in range(200))
        return [[pair.winner.tobytes() == mirrored[0], pair.loser.tobytes() == mirrored[1]] for pair in read]

    found = flips(4)
    assert all(won == lost for won, lost in found) and 70 < sum(won for won, _ in found) < 130
    assert flips(4) == found != flips(5)


def test_crops_of_equal_sizes_are_the_same_window(tmp_path: Path) -> None:
    wide = {"jpg_0": encoded(image(0, (20, 8))), "jpg_1": encoded(image(100, (20, 8)))}
    path = store(tmp_path / "p.parquet", [row(0, **wide)])
    pairs = PairDataset(path, resolution=8, center_crop=False, random_flip=True)
    lefts = set()
    for pair in (pairs.pair(0, index) for index in range(100)):
        geometry, (top, left) = pair.winner_geometry, pair.winner_geometry.crop_top_left
        assert geometry == pair.loser_geometry == ImageGeometry((8, 20), (top, left), (8, 8))
        flipped = pair.winner.getpixel((0, 0)) > pair.winner.getpixel((1, 0))
        for side, shade in ((pair.winner, 0), (pair.loser, 100)):
            whole = image(shade, (20, 8))
            whole = ImageOps.mirror(whole) if flipped else whole
            assert side.tobytes() == whole.crop((left, top, left + 8, top + 8)).tobytes()
        lefts.add(left)
    assert lefts == set(range(13)), "every place of the window occurs"
    cropped, geometry = transform(image(0, (20, 8)), 8, Decisions())
    assert geometry.crop_top_left == (0, 6), "the middle"
    assert cropped.tobytes() == image(0, (20, 8)).crop((6, 0, 14, 8)).tobytes()


@pytest.mark.parametrize("size", [(30, 17), (17, 30), (8, 8), (5, 6), (16, 16)])
def test_any_size_comes_out_square(size: tuple[int, int]) -> None:
    for decisions in (Decisions(), Decisions(True, 0.999999, 0.0), Decisions(False, 0.0, 0.999999)):
        result, geometry = transform(image(0, size), 8, decisions)
        assert (result.size, geometry.original_size) == ((8, 8), size[::-1]) and min(geometry.crop_top_left) >= 0


@given(st.integers(2, 16), st.sampled_from([8, 32, 64]), st.floats(1.0, 4.0))
def test_buckets_have_the_area_of_the_square_and_sides_of_multiples(
    units: int, multiple: int, max_aspect: float
) -> None:
    side = units * multiple
    sizes = Buckets(side, multiple, max_aspect).sizes
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes) and {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == 0 == width % multiple
        # The longer side is rounded down to a multiple: less than one multiple of it is missing.
        assert side**2 - multiple * min(height, width) < height * width <= side**2
        assert max(height, width) <= min(height, width) * max_aspect


@given(st.tuples(*[st.integers(10, 4000)] * 4))
def test_a_pair_takes_the_nearest_bucket_whatever_the_order(sides: tuple[int, int, int, int]) -> None:
    buckets = Buckets(512)
    first, second = sides[:2], sides[2:]
    chosen = buckets.choose(first, second)
    assert chosen == buckets.choose(second, first)
    wanted = math.log(first[0] / first[1]) / 2 + math.log(second[0] / second[1]) / 2
    distance = [abs(math.log(h / w) - wanted) for h, w in buckets.sizes]
    assert distance[chosen] <= min(distance) + 1e-12


def test_winner_and_loser_share_a_bucket(tmp_path: Path) -> None:
    sizes = [((32, 16), (32, 16)), ((16, 32), (18, 30)), ((16, 16), (17, 16)), ((32, 16), (16, 32))]
    rows = [row(i, jpg_0=encoded(image(i, a)), jpg_1=encoded(image(i, b))) for i, (a, b) in enumerate(sizes)]
    dataset = PairDataset(store(tmp_path / "p.parquet", rows), resolution=Buckets(16, 4), center_crop=False)
    for pair in dataset:
        assert pair.winner.size == pair.loser.size
        assert pair.winner_geometry.target_size == pair.loser_geometry.target_size == pair.winner.size[::-1]
    assert [pair.winner.size for pair in dataset] == [(20, 12), (12, 20), (16, 16), (16, 16)]
    assert dataset[0].winner_geometry.original_size == (16, 32)


def test_the_buckets_of_sdxl_and_bad_ones() -> None:
    assert {(1024, 1024), (832, 1216), (1152, 896)} <= set(Buckets(1024).sizes)
    with pytest.raises(InvalidInput, match=r"data.resolution = 500: is not a multiple"):
        Buckets(500)
    with pytest.raises(InvalidInput, match=r"data.buckets.max_aspect = 0.5"):
        Buckets(512, max_aspect=0.5)
