"""Masks beside images: read from every format, cut as their images are, and refused where they mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastinvdpo.data import Buckets, PairDataset, open_source
from fastinvdpo.data.content import content_at_hand, content_of
from fastinvdpo.data.rows import IMAGES
from fastinvdpo.errors import InvalidInput
from fastinvdpo.io import Digests
from tests.data.test_pairs import encoded, image, row, store
from tests.data.test_sources import FORMATS, _own_cache, parquet  # noqa: F401

SIZE = (8, 8)


def opened(path: Path, columns: dict[str, str] | None = None, **options: Any) -> PairDataset:
    return PairDataset(open_source(path, columns=columns).with_masks(), **options)


def own(number: int, **changes: Any) -> dict[str, Any]:
    """A row whose masks are its images."""
    found = row(number, **changes)
    return found | {"mask_0": found["jpg_0"], "mask_1": found["jpg_1"]}


def rows(shared: bool) -> list[dict[str, Any]]:
    return [row(i, i % 2) | {"mask": encoded(image(i))} if shared else own(i, label=i % 2) for i in range(3)]


@pytest.mark.parametrize("shared", [True, False], ids=["one mask", "two masks"])
@pytest.mark.parametrize("kind", FORMATS)
def test_masks_are_read_from_every_format_and_follow_the_sides(tmp_path: Path, kind: str, shared: bool) -> None:
    (tmp_path / "set").mkdir()
    path = FORMATS[kind][0](tmp_path / "set", rows(shared))
    pairs = opened(path)
    assert pairs.has_masks and len(pairs) == 3
    for i, pair in enumerate(pairs):
        assert pair.winner.getpixel((0, 0)) == (i if i % 2 else i + 100)
        first = image(i).tobytes()
        expected = [first, first] if shared else [pair.winner.tobytes(), pair.loser.tobytes()]
        assert [mask.tobytes() for mask in (pair.winner_mask, pair.loser_mask)] == expected
    without = PairDataset(path)
    assert not without.has_masks and without[0].winner_mask is None
    assert without[0].winner_key != pairs[0].winner_key and without.entry(0).keys[1] != pairs.entry(0).keys[1]


CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "flips": {"random_flip": True},
    "smaller, flips, crops": {"resolution": 12, "random_flip": True, "center_crop": False},
    "larger": {"resolution": 24},
    "buckets": {"resolution": Buckets(16, 4, 2.0), "random_flip": True},
}


@pytest.mark.parametrize("name", CUTS)
def test_a_mask_is_cut_as_its_image(tmp_path: Path, name: str) -> None:
    rows = [own(0) | {key: encoded(image(40, (24, 16))) for key in ("jpg_0", "mask_0", "jpg_1", "mask_1")}]
    pairs = opened(store(tmp_path / "pairs.parquet", rows), **CUTS[name])
    drawn = [pairs.pair(0, draw) for draw in range(8)]
    for pair in drawn:
        assert pair.winner_mask.tobytes() == pair.winner.tobytes() and pair.loser_mask.tobytes() == pair.loser.tobytes()
    assert len({pair.winner.tobytes() for pair in drawn}) > 1 or "flips" not in name


def corner(size: tuple[int, int] = SIZE) -> Image.Image:
    """White in the last column alone."""
    found = Image.new("L", size)
    found.paste(255, (size[0] - 1, 0, size[0], size[1]))
    return found


BROKEN: dict[str, tuple[Callable[[], Any], str, str]] = {
    "none": (lambda: None, "missing image", "holds no encoded image bytes"),
    "no image": (lambda: b"text", "corrupt image", "is not an intact image"),
    "black": (lambda: encoded(Image.new("L", SIZE)), "malformed mask", "'0 to 0': is black, so that nothing counts"),
    "zeros and ones": (lambda: encoded(Image.new("L", SIZE, 1)), "malformed mask", "'0 to 1': is black"),
    "another size": (lambda: encoded(image(9, (4, 8))), "malformed mask", r"\(8, 4\): is not the size of its image"),
    "colors": (lambda: encoded(Image.new("RGB", SIZE, (255, 0, 0))), "malformed mask", "'RGB': has colors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mask_that_means_nothing_makes_a_broken_row(tmp_path: Path, name: str) -> None:
    make, cause, problem = BROKEN[name]
    rows = [row(i) | {"weight": encoded(image(50).convert("RGB")) if i else make()} for i in range(3)]
    path = store(tmp_path / "pairs.parquet", rows[1:] + rows[:1])
    with pytest.raises(InvalidInput, match=f"row 2, column 'weight' = .*{problem}"):
        opened(path, {"mask": "weight"})
    with pytest.warns(UserWarning, match=rf"left out 1 broken rows \[2\] \(1 {cause}\)"):
        assert len(opened(path, {"mask": "weight"}, max_broken=1)) == 2


def test_a_mask_outside_the_crop_makes_a_broken_row_where_the_crop_is_the_same_at_every_visit(tmp_path: Path) -> None:
    wide = {name: encoded(image(3, (24, 8))) for name in IMAGES}
    path = store(tmp_path / "pairs.parquet", [row(0) | wide | {"mask": encoded(corner((24, 8)))}])
    with pytest.raises(InvalidInput, match=r"'mask' = \(8, 24\): is black in the crop to 8, so that nothing counts"):
        opened(path, resolution=8)
    assert opened(path, resolution=8, center_crop=False).pair(0, draw=0).winner_mask is not None
    assert PairDataset(path, resolution=8)[0].winner_mask is None


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({}, "has no masks"),
        ({"mask_1": b"x"}, "has mask_1. Remedy"),
        ({"mask": b"x", "mask_0": b"x"}, "mask and mask_0"),
    ],
)
def test_masks_that_are_not_there_for_both_sides_are_refused(
    tmp_path: Path, more: dict[str, bytes], problem: str
) -> None:
    path = store(tmp_path / "pairs.parquet", [row(0) | more])
    with pytest.raises(InvalidInput, match=rf"data\.masks = True: .*{problem}"):
        opened(path)
    assert len(PairDataset(path)) == 1
    source = open_source(parquet(tmp_path, rows(shared=True))).with_masks()
    assert PairDataset(source).has_masks and not PairDataset(source.with_masks(False)).has_masks


def test_masks_are_part_of_what_pairs_hold(tmp_path: Path) -> None:
    path = parquet(tmp_path, rows(shared=True))

    def content(masks: bool) -> dict[str, Any]:
        source = open_source(path).with_masks(masks)
        source.resolve((*IMAGES, "caption"))
        return content_of(source, Digests())

    first, plain = content(True), content(False)
    assert {**plain, "data masks": first["data masks"]} == first
    at_hand = content_at_hand(opened(path))
    store(path, [row(i, i % 2) | {"mask": encoded(image(i + 1))} for i in range(3)])
    assert content(False) == plain and content(True) == first | {"data masks": content(True)["data masks"]} != first
    assert content_at_hand(opened(path)) != at_hand
