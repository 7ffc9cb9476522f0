"""Preference pairs: which image wins, what a pair carries, and every kind of bad file."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastinvdpo.data import PairDataset, write_pairs
from fastinvdpo.errors import InvalidInput


def image(shade: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A gray ramp of its own for every shade, so that flips and crops show."""
    width, height = size
    return Image.frombytes("L", size, bytes((shade + 3 * x + 5 * y) % 256 for y in range(height) for x in range(width)))


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def row(number: int = 0, label: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Image 0 is ``image(number)``, image 1 is ``image(number + 100)``; ``label`` is that of image 0."""
    images = {"jpg_0": encoded(image(number)), "jpg_1": encoded(image(number + 100))}
    return {**images, "label_0": label, "label_1": 1.0 - label, "caption": f"caption {number}", **changes}


def store(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file with whatever the rows hold, unchecked."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def shades(pairs: PairDataset) -> list[tuple[Any, Any]]:
    """The first pixels of winner and loser."""
    return [(pair.winner.getpixel((0, 0)), pair.loser.getpixel((0, 0))) for pair in pairs]


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return lambda *rows: store(tmp_path / "pairs.parquet", list(rows))


def test_labels_decide_the_winner_and_ties_are_dropped_and_counted(write: Write) -> None:
    # A tie with a broken image does not matter.
    rows = [row(0, 1), row(1, 0, caption=""), row(2, 0.5, jpg_0=b"text"), row(3, 0.7), row(4, 0.25), row(5, 0.5)]
    path = write(*rows)
    pairs = PairDataset(path)
    assert shades(pairs) == [(0, 100), (101, 1), (3, 103), (104, 4)]
    assert [pair.caption for pair in pairs] == ["caption 0", "", "caption 3", "caption 4"]
    assert [pair.row for pair in pairs] == [0, 1, 3, 4]
    assert (pairs.dropped_ties, pairs.image_size) == (2, (8, 8))
    assert pairs[0].winner_score is None and not pairs.has_scores
    with pytest.raises(InvalidInput, match=r"data\.ties = 'error': 2 pairs are ties, the first in row 2"):
        PairDataset(path, ties="error")
    for index in (-1, 4):
        with pytest.raises(IndexError, match="a set of 4 pairs"):
            pairs[index]


def test_scores_travel_with_their_images_and_may_decide_the_winner(write: Write) -> None:
    scores = [(0.2, 0.9), (0.5, 0.1), (0.3, 0.3)]
    labels = (1, 0.5, 0)
    path = write(*(row(i, labels[i], score_0=a, score_1=b) for i, (a, b) in enumerate(scores)))
    pairs = PairDataset(path, ties="keep")
    assert [(pair.winner_score, pair.loser_score) for pair in pairs] == scores
    pairs = PairDataset(path, relabel_by_score=True)
    assert shades(pairs) == [(100, 0), (1, 101)]
    assert [(pair.winner_score, pair.loser_score) for pair in pairs] == [(0.9, 0.2), (0.5, 0.1)]
    assert pairs.dropped_ties == 1, "equal scores are the ties"


def test_keys_name_bytes_caption_and_transform(write: Write) -> None:
    same = row(0)
    path = write(same, {**same, "caption": "other"}, row(0, 0))
    pairs = PairDataset(path)
    assert pairs[0].winner_key == hashlib.sha256(same["jpg_0"] + b"\0caption 0").hexdigest()
    assert pairs[0].loser_key == pairs[2].winner_key
    assert pairs[0].winner_key != pairs[1].winner_key
    flipped = PairDataset(path, random_flip=True)
    assert len({(pair.winner.tobytes(), pair.winner_key) for pair in (flipped.pair(0, draw=i) for i in range(20))}) == 2


def test_columns_can_be_mapped_and_of_two_for_one_thing_a_user_names_the_one_that_counts(write: Write) -> None:
    path = write(row(1, prompt="another"))
    with pytest.raises(InvalidInput, match=r"two columns for caption: caption and prompt. .*columns.caption=caption"):
        PairDataset(path)
    for key, caption in {"caption": "caption 1", "prompt": "another"}.items():
        assert PairDataset(path, columns={"caption": key}).caption(0) == caption
    mine = {"jpg_0": "left", "jpg_1": "right", "caption": "prompt", "score_0": "s0", "score_1": "s1"}
    renamed = {mine.get(name, name): value for name, value in row(0, score_0=1.0, score_1=2.0).items()}
    pairs = PairDataset(write({**renamed, "jpg_0": b"not this one", "extra": 7}), columns=mine)
    assert (pairs[0].winner.getpixel((0, 0)), pairs[0].loser_score) == (0, 2.0)
    cells = {"jpg_0": {"bytes": encoded(image(7)), "path": None}, "jpg_1": {"bytes": encoded(image(9)), "path": "x"}}
    assert shades(PairDataset(write(row(0, **cells)))) == [(7, 9)], "columns of datasets' Image feature"


def test_shards_are_one_set_and_large_ones_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for shard in (1, 0):
        store(tmp_path / "set" / f"part-{shard}.parquet", [row(10 * shard + i, i % 2) for i in range(3)])
    (tmp_path / "set" / "README.md").write_text("not a shard")
    small = PairDataset(tmp_path / "set")
    assert [pair.caption for pair in small] == [f"caption {n}" for n in (0, 1, 2, 10, 11, 12)]
    assert [pair.row for pair in small] == list(range(6))
    monkeypatch.setattr("fastinvdpo.data.tables.IN_MEMORY_BYTES", 0)
    large = PairDataset(tmp_path / "set")
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert [pair.winner_key for pair in large] == [pair.winner_key for pair in small]


def test_a_copy_in_another_process_reads_the_files_itself(write: Write) -> None:
    pairs = PairDataset(write(*(row(i % 100) for i in range(300))), random_flip=True)
    sent = pickle.dumps(pairs)
    assert encoded(image(0)) not in sent
    assert pickle.loads(sent).pair(7, draw=5).winner.tobytes() == pairs.pair(7, draw=5).winner.tobytes()


def test_broken_images_are_left_out_up_to_the_allowed_number_and_pairs_of_one_image_are_counted(write: Write) -> None:
    with pytest.warns(UserWarning, match="2 pairs have one image on both sides, the first in row 1"):
        same = {"jpg_0": encoded(image(9)), "jpg_1": encoded(image(9))}
        assert len(PairDataset(write(row(0), row(1, **same), row(2, **same)))) == 3
    damaged = bytearray(row(1)["jpg_1"])
    damaged[len(damaged) // 2] ^= 0xFF  # header and end are intact: only decoding finds this
    path = write(row(0), row(1, jpg_1=bytes(damaged)), row(2), row(3, jpg_0=b"text"), row(4))
    with pytest.warns(UserWarning, match=r"left out 2 broken rows \[1, 3\]"):
        pairs = PairDataset(path, max_broken=2)
    assert sorted(pairs.broken.found) == [1, 3]
    assert [pair.row for pair in pairs] == [0, 2, 4]
    with pytest.raises(InvalidInput, match=r"data.max_broken = 1: more rows than that are broken: \[1, 3\]"):
        PairDataset(path, max_broken=1)
    pairs = PairDataset(write(row(0), row(1, jpg_1=bytes(damaged))))
    assert pairs[0].row == 0
    with pytest.raises(InvalidInput, match=r"row 1, column 'jpg_1' = .*is not an intact image"):
        pairs[1]
    with pytest.raises(InvalidInput, match=r"every row that is no tie is broken: \[0\] \(1 corrupt image\)"):
        PairDataset(write(row(0, jpg_0=b"text")), max_broken=1)


TRUNCATED = encoded(image(0))[:-20]
JPEG = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
BAD_ROWS = {
    "label above one": ({"label_0": 2.0, "label_1": -1.0}, r"row 1, column 'label_0' = 2.0: is not in \[0, 1\]"),
    "labels sum to two": ({"label_1": 1.0}, r"columns 'label_0' and 'label_1' = \(1.0, 1.0\): do not sum to 1"),
    "label missing": ({"label_0": None}, r"row 1, column 'label_0' = None: is not a finite number"),
    "caption missing": ({"caption": None}, r"row 1, column 'caption' = None: is not a string"),
    "image missing": ({"jpg_0": None}, r"row 1, column 'jpg_0' = None: holds no encoded image bytes"),
    "image empty": ({"jpg_1": b""}, r"row 1, column 'jpg_1'.*holds no encoded image bytes"),
    "image is text": ({"jpg_1": b"hello"}, r"row 1, column 'jpg_1' = '5 bytes.*is not an intact image"),
    "image cut off": ({"jpg_0": TRUNCATED}, r"row 1, column 'jpg_0'.*is not an intact image"),
    "photo cut off": ({"jpg_0": JPEG[: len(JPEG) // 2]}, r"row 1, column 'jpg_0'.*is not an intact image"),
    "image of another size": ({"jpg_1": encoded(image(0, (9, 8)))}, r"row 1, column 'jpg_1' = \(8, 9\).*resolution"),
    **{f"score of {bad}": ({"score_1": bad}, r"row 1, column 'score_1' = .*is not a finite number")
       for bad in (float("nan"), float("inf"), None)},
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(write: Write, changes: dict[str, Any], message: str) -> None:
    scores = {"score_0": 0.0, "score_1": 1.0} if "score_1" in changes else {}
    path = write(row(0, **scores), row(1, **{**scores, **changes}))
    for by_score in (False, True)[: 1 + bool(scores)]:
        with pytest.raises(InvalidInput, match=message) as caught:
            PairDataset(path, relabel_by_score=by_score)
        assert "Remedy: " in str(caught.value)


BAD_TABLES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a number for a caption": ({"caption": 7}, {}, r"row 0, column 'caption' = 7: is not a string"),
    "text for a label": ({"label_0": "1"}, {}, r"row 0, column 'label_0' = '1': is not a finite number"),
    "a path for an image": ({"jpg_0": "cat.jpg"}, {}, r"row 0, column 'jpg_0' = 'cat.jpg': holds no encoded image"),
    "no pair has that": ({}, {"columns": {"picture": "jpg_0"}}, "maps 'picture', which no row of pairs has"),
    "no such column": ({}, {"columns": {"score_0": "a", "score_1": "b"}}, "has no column 'a'"),
    "no scores": ({}, {"relabel_by_score": True}, "has no column 'score_0'"),
    "one score": ({"score_0": 1.0}, {}, r"\['score_0'\]: has no other side"),
    **{f"no {column}": ({column: ...}, {}, rf"has no column '{column}'; its columns are \[.*\].*data.columns")
       for column in ("jpg_0", "jpg_1", "caption")},
    "ties alone": ({"label_0": 0.5, "label_1": 0.5}, {}, "all 1 pairs are ties"),
    **{f"{key} = {bad}": ({}, {key: bad}, f"data.{key} = {bad!r}") for key, bad in (
        ("ties", "ignore"), ("resolution", 0), ("resolution", 8.0), ("resolution", True), ("max_broken", -1),
        ("max_broken", 1.5), ("max_broken", True))},
}  # fmt: skip


@pytest.mark.parametrize(("changes", "options", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables_and_options(write: Write, changes: dict[str, Any], options: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        PairDataset(write({name: value for name, value in row(0, **changes).items() if value is not ...}), **options)


def test_paths_that_hold_no_pairs(tmp_path: Path) -> None:
    whole = store(tmp_path / "whole", [row(0)]).read_bytes()
    (tmp_path / "text.parquet").write_text("not parquet")
    (tmp_path / "truncated.parquet").write_bytes(whole[:-50])
    pq.write_table(pa.Table.from_pylist([row(0)]).slice(0, 0), tmp_path / "empty.parquet")
    (tmp_path / "nothing").mkdir()
    unreadable = dict.fromkeys(("text.parquet", "truncated.parquet"), "is not a readable parquet file")
    missing = {
        "missing.parquet": r"missing.parquet': does not exist",
        "nothing": r"is a directory without \*.parquet, ",
    }
    for name, problem in {**unreadable, **missing, "empty.parquet": "holds no rows"}.items():
        with pytest.raises(InvalidInput, match=rf"data.path = .*{problem}"):
            PairDataset(tmp_path / name)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"caption": ...}, r"b.parquet': has no column 'caption'"),
        ({"label_0": "yes"}, "row 1, column 'label_0' = 'yes': is not a finite number"),
        ({"jpg_0": 7}, "cannot be read as one table"),
        ({"score_0": 1.0, "score_1": 0.0}, r"b.parquet': has the column of 'score_0', unlike other files"),
    ],
)
def test_shards_must_agree(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    store(tmp_path / "a.parquet", [row(0)])
    store(tmp_path / "b.parquet", [{name: value for name, value in row(0, **second).items() if value is not ...}])
    with pytest.raises(InvalidInput, match=message):
        PairDataset(tmp_path)


def test_writing_encodes_images_without_loss_streams_rows_and_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pairs.parquet"
    rows = (row(i % 50, i % 2, score_0=float(i), score_1=0.5, jpg_0=image(i % 50)) for i in range(2500))
    assert write_pairs(path, rows) == 2500
    assert [file.name for file in path.parent.iterdir()] == ["pairs.parquet"]
    stored = pq.ParquetFile(path)
    names = ["jpg_0", "jpg_1", "label_0", "label_1", "caption", "score_0", "score_1"]
    assert stored.schema_arrow.names == names and stored.num_row_groups == 3
    pairs = PairDataset(path)
    assert pairs[2].loser.tobytes() == image(2).tobytes() and pairs[2499].caption == "caption 49"
    assert [pairs[i].winner_score for i in range(5)] == [0.5, 1.0, 0.5, 3.0, 0.5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no pairs"),
        ([row(0), {"jpg_0": b"x"}], r"rows\[1\].*lacks \['caption', 'jpg_1', 'label_0', 'label_1'\]"),
        ([row(0), row(1, score_0=1.0, score_1=2.0)], r"rows\[1\].*has unknown \['score_0', 'score_1'\]"),
        ([row(0, caption=None)], r"rows\[0\]\['caption'\] = None: is not a string"),
        ([row(0, jpg_1="a.png")], r"rows\[0\]\['jpg_1'\] = 'str': is no image"),
        ([row(0, label_0=float("nan"))], r"rows\[0\]\['label_0'\] = nan: is not a finite number"),
    ],
)
def test_bad_rows_leave_no_file_behind_and_keep_the_one_before(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    for before in ([], [row(0)]):
        if before:
            write_pairs(tmp_path / "pairs.parquet", before)
        with pytest.raises(InvalidInput, match=message):
            write_pairs(tmp_path / "pairs.parquet", rows)
        assert len(list(tmp_path.iterdir())) == len(before)
    assert len(PairDataset(tmp_path / "pairs.parquet")) == 1
