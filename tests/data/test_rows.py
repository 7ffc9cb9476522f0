"""The normalizer: every way to name a winner is read by value or refused, and nothing that disagrees is settled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastinvdpo.data import PairDataset
from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.rows import TIE, caption_of, in_schema, labels_of, scores_of, winner_of
from fastinvdpo.errors import InvalidInput
from tests.data.test_pairs import row, shades, store

IMAGES = {"image_0": "a.png", "image_1": "b.png"}


def where(*names: str) -> str:
    return f"row 3, {names}"


def side(stored: dict[str, Any], names: dict[str, str] | None = None) -> int:
    return winner_of(in_schema(stored, "line 1", names or {}), where, names or {})


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
        {},
    ],
)
def test_what_names_no_winner_or_two_is_a_malformed_label(fields: dict[str, Any]) -> None:
    with pytest.raises(BrokenRow, match="Remedy") as caught:
        side(IMAGES | fields)
    assert caught.value.cause == "malformed label"


def test_what_stands_for_the_images_and_what_counts_beside_it() -> None:
    found = in_schema({"winner": "b.png", "loser": "a.png", "prompt": "p"}, "line 1", {})
    assert (found["jpg_0"], found["jpg_1"], found["caption"]) == ("b.png", "a.png", "p")
    assert winner_of(found, where, {}) == 0
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
    assert labels_of({"label_0": 0.25}) == (0.25, 0.75)
    assert labels_of({"label_1": True}) == (0.0, 1.0)
    assert labels_of({"label_0": None, "label_1": 1}) == (None, 1.0)


def test_captions_are_text_and_scores_are_finite_numbers() -> None:
    assert caption_of({"caption": "\ufeffun café 🐈"}, where) == "un café 🐈", "without the byte order mark"
    for caption in ("a cat \ud83d", "c\0a\0t\0", "\x1b$BG-\x1b(B", None, 7):
        with pytest.raises(BrokenRow) as caught:
            caption_of({"caption": caption}, where)
        assert caught.value.cause == ("malformed caption" if isinstance(caption, str) else "missing caption")
    assert scores_of({"score_0": 1, "score_1": -2.5}, where) == (1.0, -2.5)
    for bad in ({"score_0": 1.0}, {"score_0": 1.0, "score_1": float("inf")}, {"score_0": "1", "score_1": 1}):
        with pytest.raises(BrokenRow, match="is not a finite number"):
            scores_of(bad, where)


def test_tables_name_the_winner_in_the_same_ways(tmp_path: Path) -> None:
    stored = {name: value for name, value in row().items() if not name.startswith("label")}
    for fields in ({"label": 1}, {"winner": "jpg_1"}, {"label_0": 0.0}, {"label_1": 1}, {"loser": 0.0}):
        assert shades(PairDataset(store(tmp_path / "p.parquet", [stored | fields]))) == [(100, 0)]
    with pytest.raises(InvalidInput, match=r"row 0, columns 'label_0' and 'label_1' = .*contradict one another"):
        PairDataset(store(tmp_path / "p.parquet", [row(winner=1)]))
    with pytest.raises(InvalidInput, match=r"has no column 'label_0'; .*data.columns, as in \{label_0: YOUR_COLUMN\}"):
        PairDataset(store(tmp_path / "p.parquet", [stored]))
