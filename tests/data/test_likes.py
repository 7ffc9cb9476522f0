"""Images that were liked or disliked: every way to say so is read by value or refused, and an image counts once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastinvdpo.data import LikedDataset, PairDataset, open_source
from fastinvdpo.data.content import content_of
from fastinvdpo.data.inspecting import inspect_pairs
from fastinvdpo.data.rows import WrongForm
from fastinvdpo.errors import InvalidInput
from fastinvdpo.io import Digests
from fastinvdpo.output import OutputDirectory
from tests.data.test_pairs import encoded, image, row, store
from tests.data.test_sources import folder, webdataset


def likes(*labels: Any, **changes: Any) -> list[dict[str, Any]]:
    """Images of their own shades and captions."""
    return [
        {"image": encoded(image(i)), "liked": label, "caption": f"caption {i}", **changes}
        for i, label in enumerate(labels)
    ]


def shades(data: LikedDataset) -> dict[Any, bool]:
    return {one.side.image.getpixel((0, 0)): one.liked for one in data}


def test_tables_folders_and_shards_hold_the_same_images(tmp_path: Path) -> None:
    rows = likes(1, 0, 1)
    told = [{"image": one["image"], "label": bool(one["liked"]), "prompt": one["caption"]} for one in rows]
    for kind in (folder, webdataset):
        (tmp_path / kind.__name__).mkdir()
        kind(tmp_path / kind.__name__, told)
    table = store(tmp_path / "likes.parquet", rows)
    contents = []
    for path in (table, *(tmp_path / name for name in ("folder", "folder/likes.jsonl", "webdataset"))):
        source = open_source(path, form="likes")
        data = LikedDataset(source)
        assert shades(data) == {0: True, 1: False, 2: True} and data.liked == [True, False, True]
        assert [one.caption for one in data] == [one["caption"] for one in rows]
        assert str(data.summary) == "3 rows: 3 images, 2 liked"
        contents.append(content_of(source, Digests()))
    assert all(found == contents[0] for found in contents) and "data likes" in contents[0]


def test_an_image_of_a_caption_counts_once_and_is_liked_where_any_row_likes_it(tmp_path: Path) -> None:
    one, other = encoded(image(1)), encoded(image(2))
    judged = [(one, 0, "a"), (one, 1, "a"), (one, 0, "b"), (other, 1, "a"), (other, 1, "a"), (one, 0, "a")]
    rows = [{"image": data, "liked": liked, "caption": caption} for data, liked, caption in judged]
    data = LikedDataset(store(tmp_path / "likes.parquet", rows))
    found = [(one.row, one.caption, one.liked) for one in data]
    assert found == [(0, "a", True), (2, "b", False), (3, "a", True)]
    assert str(data.summary) == "6 rows: 3 images, 2 liked (1 also disliked)"
    assert data.entry(0).keys != data.entry(1).keys and data[0].side.key == data.entry(0).keys[0]


def test_of_pairs_winners_are_liked_and_losers_disliked(tmp_path: Path) -> None:
    rows = [row(0, 1), row(1, 0), row(2, 0.5), row(0, 1)]
    rows.append({**row(3, 1), "jpg_1": rows[0]["jpg_0"], "caption": "caption 0"})  # the first winner loses here
    path = store(tmp_path / "pairs.parquet", rows)
    data = LikedDataset(open_source(path))
    assert shades(data) == {0: True, 100: False, 1: False, 101: True, 3: True}
    assert (len(data), data.dropped_ties, data.summary.liked, data.summary.both) == (5, 1, 3, 1)
    assert len(PairDataset(path)) == 4
    with OutputDirectory(tmp_path / "out") as place:
        place.claim("pairs.png", "data.json", "broken.jsonl")
        assert "liked     3 (1 also disliked)\ndisliked  2" in inspect_pairs(data, place)
    assert json.loads((tmp_path / "out" / "data.json").read_text())["both"] == 1
    with pytest.raises(InvalidInput, match=r"^data.ties = 'keep': keeps pairs that like neither image"):
        LikedDataset(open_source(path), ties="keep")
    with pytest.raises(InvalidInput, match=r"^data.streaming = True: does not look at images before"):
        LikedDataset(open_source(path, streaming=True))


def test_broken_rows_are_counted_and_transforms_apply(tmp_path: Path) -> None:
    rows = [*likes(1, 0, 1), *likes(2), *likes(1, caption=None), {**likes(0)[0], "image": b"no image"}]
    path = store(tmp_path / "likes.parquet", rows)
    with pytest.raises(InvalidInput, match="column 'liked' = 2: says neither"):
        LikedDataset(path)
    with pytest.warns(UserWarning, match="left out 3 broken rows"):
        data = LikedDataset(path, max_broken=0.5, random_flip=True, resolution=4)
    assert data.summary.broken == {"malformed label": 1, "missing caption": 1, "corrupt image": 1}
    assert len(data) == 3 and data[0].side.image.size == (4, 4)
    assert len({data.pair(0, draw).side.key for draw in range(20)}) == 2
    with pytest.raises(IndexError, match="of a set of 3"):
        data[3]


def test_rows_of_the_other_form_are_told_by_name(tmp_path: Path) -> None:
    pairs, single = store(tmp_path / "pairs.parquet", [row()]), store(tmp_path / "likes.parquet", likes(1))
    bare = store(tmp_path / "bare.parquet", [{"image": encoded(image(0)), "caption": "a"}])
    ranked = tmp_path / "ranked.json"
    ranked.write_text(json.dumps([{"prompt": "a", "image_path": ["0.png", "1.png"], "rank": [1, 2]}]))
    for name in ("pairs", "likes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_text("{}")
    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (WrongForm, r"has no column 'image'; .*set data.form to pairs, or name yours", lambda: LikedDataset(pairs)),
        (WrongForm, r"has no column 'jpg_0'; .*set data.form to likes, or name yours", lambda: PairDataset(single)),
        (WrongForm, r"no likes.jsonl\. .*what a row is with data.form", lambda: LikedDataset(tmp_path / "pairs")),
        (WrongForm, r"holds no pairs.jsonl", lambda: PairDataset(tmp_path / "likes")),
        (InvalidInput, r"has no column 'liked'; .*store 1 or 0 in liked or label", lambda: LikedDataset(bare)),
        (InvalidInput, "data.format = 'hpd': ranks images", lambda: open_source(ranked, form="likes")),
        (InvalidInput, "by_score = True: compares two", lambda: LikedDataset(single, relabel_by_score=True)),
        (InvalidInput, "data.form = 'rows'", lambda: open_source(single, form="rows")),
        (InvalidInput, "no row of likes has", lambda: open_source(single, form="likes", columns={"jpg_0": "x"})),
        (TypeError, "no argument 'revisoin'", lambda: open_source(single, revisoin="main")),
    ]
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
