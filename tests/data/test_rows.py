"""The normalizer: every way to name a winner is read by value or refused, and nothing that disagrees is settled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastinvdpo.data import PairDataset
from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.records import RecordSource, in_schema
from fastinvdpo.data.rows import LIKES, PAIRS, TIE, Form, Row
from fastinvdpo.errors import InvalidInput
from tests.data.test_pairs import row, shades, store

IMAGES = {"image_0": "a.png", "image_1": "b.png"}


def read(stored: dict[str, Any], names: dict[str, str] | None = None, form: Form = PAIRS) -> Row:
    """A row as a line of a listing gives it."""
    values = in_schema(stored, "line 1", names or {}, None, form)
    return RecordSource("pairs.jsonl", "folder", names or {}, [("line 1", values)], [], form=form).record(0)


def side(stored: dict[str, Any], names: dict[str, str] | None = None) -> int:
    return read(stored, names).winner()


@pytest.mark.parametrize(
    ("fields", "winner"),
    [
        *[({"winner": value}, 1) for value in (1, "1", "b.png", "image_1", "jpg_1")],
        *[({"label": value}, 0) for value in (0, 0.0, "0", "a.png", "image_0")],
        *[({"loser": value}, 1) for value in (0, "a.png", "image_0")],
        *[({key: value}, TIE) for key in ("winner", "loser", "label") for value in ("tie", 0.5)],
        ({"winner": "b.png", "loser": "a.png", "label": 1, "label_0": 0.25}, 1),
        ({"label_0": 1}, 0),
        ({"label_1": 1.0}, 1),
        ({"label_0": 0.5}, TIE),
        ({"label_0": 0.3, "label_1": 0.7}, 1),
    ],
)
def test_a_winner_is_read_by_value(fields: dict[str, Any], winner: int) -> None:
    assert side(IMAGES | fields) == winner


@pytest.mark.parametrize(
    "fields",
    [
        *[{key: value} for key in ("winner", "loser", "label") for value in (2, -1, True, None, "c.png", [], 10**400)],
        *[{"label_0": value} for value in ("1", None, float("nan"), 2, -0.5, 10**400)],
        {"label_0": 1, "label_1": 1},
        {"winner": 1, "label": 0},
        {"winner": 1, "loser": 1},
        {"label_0": 1, "winner": "b.png"},
        {"label_1": 0.5, "label": 1},
        {"chosen": "b.png"},
        *[{"liked": value} for value in (None, 2, -1, 0.5, "yes", "", [], float("nan"))],
        {"liked": 1, "label": 0},
        {"liked": True, "label": None},
        {"liked": 1, "label": "image_0"},
        {},
    ],
)
def test_what_says_nothing_or_two_things_is_a_malformed_label(fields: dict[str, Any]) -> None:
    row = read(fields, form=LIKES) if "liked" in fields else read(IMAGES | fields)
    for way in (row.liked,) if "liked" in fields else (row.winner, read({}, form=LIKES).liked):
        with pytest.raises(BrokenRow, match="Remedy") as caught:
            way()
        assert caught.value.cause == "malformed label"


@pytest.mark.parametrize("key", ["liked", "label"])
@pytest.mark.parametrize("value", [1, True, 1.0, "1", "true", "True", "like", "liked"])
def test_a_like_is_read_by_value(key: str, value: Any) -> None:
    opposite = {"1": "0", "true": "false", "True": "False", "like": "dislike", "liked": "disliked"}
    dislike = opposite[value] if isinstance(value, str) else type(value)(0)
    for fields, liked in (({key: value}, True), ({key: dislike}, False), ({"liked": value, "label": 1}, True)):
        assert read(fields, form=LIKES).liked() is liked
    assert read({"mine": 1, "label": 0, "liked": 0}, {"liked": "mine"}, LIKES).liked(), "a mapped label counts alone"


def test_what_stands_for_the_images_and_what_counts_beside_it() -> None:
    found = read({"winner": "b.png", "loser": "a.png", "prompt": "p"})
    assert (found.values["jpg_0"], found.values["jpg_1"], found.caption()) == ("b.png", "a.png", "p")
    assert found.winner() == 0
    refused = {
        "contradict one another": {"winner": "b.png", "loser": "a.png", "label": 1},
        "names neither image": {"image_0": "a.png", "image_1": "a.png", "winner": "a.png"},
        "names both images": {"image_0": "1", "image_1": "0", "winner": "1"},
    }
    for problem, fields in refused.items():
        with pytest.raises(BrokenRow, match=problem):
            side(fields)
    names = {"label_0": "mine", "jpg_0": "left", "jpg_1": "right"}
    assert side({"left": "a", "right": "b", "mine": 0, "winner": "left", "label_0": 1}, names) == 1, "mapped ones alone"
    assert side({"left": "a", "right": "b", "winner": "right"}, {"jpg_0": "left", "jpg_1": "right"}) == 1


def test_the_other_label_follows() -> None:
    assert read({"label_0": 0.25}).labels() == (0.25, 0.75)
    assert read({"label_1": True}).labels() == (0.0, 1.0)
    assert read({"label_0": None, "label_1": 1}).labels() == (None, 1.0)


def test_captions_are_text_and_scores_are_finite_numbers() -> None:
    assert read({"caption": "\ufeffun café 🐈"}).caption() == "un café 🐈", "without the byte order mark"
    for caption in ("a cat \ud83d", "c\0a\0t\0", "\x1b$BG-\x1b(B", None, 7):
        with pytest.raises(BrokenRow) as caught:
            read({"caption": caption}).caption()
        assert caught.value.cause == ("malformed caption" if isinstance(caption, str) else "missing caption")
    assert read({"score_0": 1, "score_1": -2.5}).scores() == (1.0, -2.5)
    for bad in ({"score_0": 1.0}, {"score_0": 1.0, "score_1": float("inf")}, {"score_0": "1", "score_1": 1}):
        with pytest.raises(BrokenRow, match="is not a finite number"):
            read(bad).scores()


def test_tables_name_the_winner_in_the_same_ways(tmp_path: Path) -> None:
    stored = {name: value for name, value in row().items() if not name.startswith("label")}
    for fields in ({"label": 1}, {"winner": "jpg_1"}, {"label_0": 0.0}, {"label_1": 1}, {"loser": 0.0}):
        assert shades(PairDataset(store(tmp_path / "p.parquet", [stored | fields]))) == [(100, 0)]
    with pytest.raises(InvalidInput, match=r"row 0, columns 'label_0' and 'label_1' = .*contradict one another"):
        PairDataset(store(tmp_path / "p.parquet", [row(winner=1)]))
    with pytest.raises(InvalidInput, match=r"has no column 'label_0'; .*data.columns, as in \{label_0: YOUR_COLUMN\}"):
        PairDataset(store(tmp_path / "p.parquet", [stored]))
