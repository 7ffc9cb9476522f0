"""Flip and crop: one decision for both images of a pair, made by seed and sample index alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageOps

from fastinvdpo.data import PairDataset
from fastinvdpo.data.transforms import Decisions, decide, transform
from tests.data.test_pairs import encoded, image, row, store


def test_without_options_images_stay_as_they_are(tmp_path: Path) -> None:
    pairs = PairDataset(store(tmp_path / "p.parquet", [row(0)]))
    for draw in range(5):
        assert pairs.pair(0, draw).winner.tobytes() == image(0).tobytes()


def test_both_sides_are_mirrored_together(tmp_path: Path) -> None:
    pairs = PairDataset(store(tmp_path / "p.parquet", [row(0)]), random_flip=True, seed=4)
    flips = []
    for draw in range(200):
        pair = pairs.pair(0, draw)
        looks = [
            side.tobytes() == ImageOps.mirror(image(shade)).tobytes()
            for side, shade in ((pair.winner, 0), (pair.loser, 100))
        ]
        assert looks[0] == looks[1]
        flips.append(looks[0])
    assert 70 < sum(flips) < 130
    again = [pairs.pair(0, draw).winner.tobytes() for draw in range(200)]
    assert [look == ImageOps.mirror(image(0)).tobytes() for look in again] == flips


def test_decisions_depend_on_seed_and_draw_only() -> None:
    def choices(seed: int, draw: int) -> Decisions:
        return decide(seed, draw, random_flip=True, center_crop=False)

    assert choices(1, 2) == choices(1, 2)
    assert len({choices(seed, draw) for seed in range(10) for draw in range(10)}) == 100
    assert decide(1, 2, random_flip=False, center_crop=True) == Decisions()
    shares = [share for draw in range(300) for share in (choices(0, draw).vertical, choices(0, draw).horizontal)]
    assert all(0 <= share < 1 for share in shares)
    assert abs(sum(shares) / len(shares) - 0.5) < 0.05


def test_crops_of_equal_sizes_are_the_same_window(tmp_path: Path) -> None:
    wide = {"jpg_0": encoded(image(0, (20, 8))), "jpg_1": encoded(image(100, (20, 8)))}
    pairs = PairDataset(
        store(tmp_path / "p.parquet", [row(0, **wide)]), resolution=8, center_crop=False, random_flip=True
    )
    lefts = set()
    for draw in range(100):
        pair = pairs.pair(0, draw)
        assert pair.winner.size == pair.loser.size == (8, 8)
        assert pair.winner_geometry == pair.loser_geometry
        assert pair.winner_geometry.original_size == (8, 20)
        assert pair.winner_geometry.target_size == (8, 8)
        top, left = pair.winner_geometry.crop_top_left
        flipped = pair.winner.getpixel((0, 0)) > pair.winner.getpixel((1, 0))
        for side, shade in ((pair.winner, 0), (pair.loser, 100)):
            whole = image(shade, (20, 8))
            whole = ImageOps.mirror(whole) if flipped else whole
            assert side.tobytes() == whole.crop((left, top, left + 8, top + 8)).tobytes()
        lefts.add(left)
    assert lefts == set(range(13)), "every place of the window occurs"


def test_center_crop_takes_the_middle() -> None:
    cropped, geometry = transform(image(0, (20, 8)), 8, Decisions())
    assert geometry.crop_top_left == (0, 6)
    assert cropped.tobytes() == image(0, (20, 8)).crop((6, 0, 14, 8)).tobytes()


@pytest.mark.parametrize("size", [(30, 17), (17, 30), (8, 8), (5, 6), (16, 16)])
def test_any_size_comes_out_square(size: tuple[int, int]) -> None:
    for decisions in (Decisions(), Decisions(True, 0.999999, 0.0), Decisions(False, 0.0, 0.999999)):
        result, geometry = transform(image(0, size), 8, decisions)
        assert result.size == (8, 8)
        assert geometry.original_size == (size[1], size[0])
        assert min(geometry.crop_top_left) >= 0


def test_sizes_may_differ_when_a_resolution_is_set(tmp_path: Path) -> None:
    sizes = {"jpg_0": encoded(Image.new("RGB", (40, 30))), "jpg_1": encoded(Image.new("RGB", (16, 24)))}
    pair = PairDataset(store(tmp_path / "p.parquet", [row(0, **sizes)]), resolution=8)[0]
    assert pair.winner.size == pair.loser.size == (8, 8)
    assert pair.winner_geometry.original_size == (30, 40)
    assert pair.loser_geometry.original_size == (24, 16)
