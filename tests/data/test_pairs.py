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
from fastinvdpo.data import tables as tables_module
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
    own = {
        "jpg_0": encoded(image(number)),
        "jpg_1": encoded(image(number + 100)),
        "label_0": label,
        "label_1": 1.0 - label,
        "caption": f"caption {number}",
    }
    return {**own, **changes}


def store(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file with whatever the rows hold, unchecked."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return lambda *rows: store(tmp_path / "pairs.parquet", list(rows))


def test_labels_decide_the_winner(write: Write) -> None:
    pairs = PairDataset(write(row(0, 1), row(1, 0), row(2, 0.7), row(3, 0.25)))
    shades = [(pair.winner.getpixel((0, 0)), pair.loser.getpixel((0, 0))) for pair in pairs]
    assert shades == [(0, 100), (101, 1), (2, 102), (103, 3)]
    assert [pair.caption for pair in pairs] == [f"caption {i}" for i in range(4)]
    assert [pair.row for pair in pairs] == [0, 1, 2, 3]
    assert pairs[0].winner_score is None and not pairs.has_scores
    assert pairs.image_size == (8, 8)


def test_other_labels_empty_captions_and_broken_ties(write: Write) -> None:
    whole = {**row(0, caption=""), "label_0": 0, "label_1": 1}, {**row(1), "label_0": 1, "label_1": 0}
    pairs = PairDataset(write(*whole))
    assert [(pair.winner.getpixel((0, 0)), pair.caption) for pair in pairs] == [(100, ""), (1, "caption 1")]
    # A tie with a broken image does not matter.
    assert len(PairDataset(write(row(0), row(1, 0.5, jpg_0=b"text")))) == 1


def test_ties_are_dropped_and_counted(write: Write) -> None:
    path = write(row(0, 0.5), row(1, 1), row(2, 0.5), row(3, 0))
    pairs = PairDataset(path)
    assert (len(pairs), pairs.dropped_ties) == (2, 2)
    assert [pair.row for pair in pairs] == [1, 3]
    with pytest.raises(InvalidInput, match=r"data\.ties = 'error': 2 pairs are ties, the first in row 0"):
        PairDataset(path, ties="error")


def test_scores_travel_with_their_images(write: Write) -> None:
    pairs = PairDataset(write(row(0, 1, score_0=0.2, score_1=0.9), row(1, 0, score_0=3, score_1=4)))
    assert [(pair.winner_score, pair.loser_score) for pair in pairs] == [(0.2, 0.9), (4.0, 3.0)]


def test_relabeling_by_score_ignores_the_labels(write: Write) -> None:
    path = write(
        row(0, 1, score_0=0.2, score_1=0.9),
        row(1, 0.5, score_0=0.5, score_1=0.1),
        row(2, 1, score_0=0.3, score_1=0.3),
    )
    pairs = PairDataset(path, relabel_by_score=True)
    assert [pair.winner.getpixel((0, 0)) for pair in pairs] == [100, 1]
    assert [(pair.winner_score, pair.loser_score) for pair in pairs] == [(0.9, 0.2), (0.5, 0.1)]
    assert pairs.dropped_ties == 1, "equal scores are the ties"


def test_keys_name_bytes_and_caption(write: Write) -> None:
    same = row(0)
    pairs = PairDataset(write(same, {**same, "caption": "other"}, row(0, 0)))
    assert pairs[0].winner_key == hashlib.sha256(same["jpg_0"] + b"\0caption 0").hexdigest()
    assert pairs[0].loser_key == pairs[2].winner_key
    assert pairs[0].winner_key != pairs[1].winner_key


def test_keys_tell_transformed_images_apart(write: Write) -> None:
    pairs = PairDataset(write(row(0)), random_flip=True)
    by_look = {(pair.winner.tobytes(), pair.winner_key) for pair in (pairs.pair(0, draw) for draw in range(20))}
    assert len(by_look) == 2


def test_shards_of_a_directory_are_one_set(tmp_path: Path) -> None:
    for shard in (1, 0):
        store(tmp_path / f"part-{shard}.parquet", [row(10 * shard + i) for i in range(3)])
    (tmp_path / "README.md").write_text("not a shard")
    pairs = PairDataset(tmp_path)
    assert [pair.caption for pair in pairs] == [f"caption {n}" for n in (0, 1, 2, 10, 11, 12)]
    assert [pair.row for pair in pairs] == list(range(6))


def test_columns_can_be_mapped(write: Write) -> None:
    mine = {"jpg_0": "left", "jpg_1": "right", "caption": "prompt", "score_0": "s0", "score_1": "s1"}
    renamed = {mine.get(name, name): value for name, value in row(0, score_0=1.0, score_1=2.0).items()}
    pairs = PairDataset(write({**renamed, "jpg_0": b"not this one", "extra": 7}), columns=mine)
    assert pairs[0].winner.getpixel((0, 0)) == 0
    assert pairs[0].loser_score == 2.0


def test_image_feature_structs_and_other_formats(write: Write) -> None:
    cells = {"jpg_0": {"bytes": encoded(image(7)), "path": None}, "jpg_1": {"bytes": encoded(image(9)), "path": "x"}}
    assert PairDataset(write(row(0, **cells)))[0].winner.getpixel((0, 0)) == 7
    jpeg = encoded(Image.new("RGB", (8, 8), (200, 10, 10)), "JPEG")
    palette = encoded(image(0).convert("P"), "PNG")
    pair = PairDataset(write(row(0, jpg_0=jpeg, jpg_1=palette)))[0]
    assert (pair.winner.mode, pair.loser.mode) == ("RGB", "RGB")


def test_large_sets_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for shard in range(2):
        store(tmp_path / "set" / f"{shard}.parquet", [row(10 * shard + i, i % 2) for i in range(3)])
    small = PairDataset(tmp_path / "set")
    monkeypatch.setattr(tables_module, "IN_MEMORY_BYTES", 0)
    large = PairDataset(tmp_path / "set")
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert [pair.winner_key for pair in large] == [pair.winner_key for pair in small]


def test_a_copy_in_another_process_reads_the_files_itself(write: Write) -> None:
    pairs = PairDataset(write(*(row(i % 100) for i in range(300))), random_flip=True)
    sent = pickle.dumps(pairs)
    assert encoded(image(0)) not in sent
    assert pickle.loads(sent).pair(7, draw=5).winner.tobytes() == pairs.pair(7, draw=5).winner.tobytes()


def test_index_out_of_range(write: Write) -> None:
    pairs = PairDataset(write(row(0)))
    assert len(list(pairs)) == 1
    for index in (-1, 1):
        with pytest.raises(IndexError, match="a set of 1 pairs"):
            pairs[index]


def test_broken_images_are_left_out_up_to_the_allowed_number(write: Write) -> None:
    whole = row(1)["jpg_0"]
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF  # header and end are intact: only decoding finds this
    rows = [row(0), row(1, jpg_1=bytes(damaged)), row(2), row(3, jpg_0=b"text"), row(4)]
    with pytest.warns(UserWarning, match=r"left out 2 broken rows \[1, 3\]"):
        pairs = PairDataset(write(*rows), max_broken=2)
    assert sorted(pairs.broken.found) == [1, 3]
    assert [pair.row for pair in pairs] == [0, 2, 4]
    with pytest.raises(InvalidInput, match=r"data.max_broken = 1: more rows than that are broken: \[1, 3\]"):
        PairDataset(write(*rows), max_broken=1)
    with pytest.raises(InvalidInput, match=r"every row that is no tie is broken: \[0\] \(1 corrupt image\)"):
        PairDataset(write(row(0, jpg_0=b"text")), max_broken=1)


def test_damage_inside_a_file_is_an_error_when_the_pair_is_read(write: Write) -> None:
    damaged = bytearray(row(1)["jpg_1"])
    damaged[len(damaged) // 2] ^= 0xFF
    pairs = PairDataset(write(row(0), row(1, jpg_1=bytes(damaged))))
    assert pairs[0].row == 0
    with pytest.raises(InvalidInput, match=r"row 1, column 'jpg_1' = .*is not an intact image"):
        pairs[1]


TRUNCATED = encoded(image(0))[:-20]
JPEG = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")

BAD_ROWS = {
    "label above one": (row(1, label_0=2.0, label_1=-1.0), r"row 1, column 'label_0' = 2.0: is not in \[0, 1\]"),
    "labels sum to two": (row(1, label_1=1.0), r"columns 'label_0' and 'label_1' = \(1.0, 1.0\): do not sum to 1"),
    "label missing": (row(1, label_0=None), r"row 1, column 'label_0' = None: is not a finite number"),
    "caption missing": (row(1, caption=None), r"row 1, column 'caption' = None: is not a string"),
    "image missing": (row(1, jpg_0=None), r"row 1, column 'jpg_0' = None: holds no encoded image bytes"),
    "image empty": (row(1, jpg_1=b""), r"row 1, column 'jpg_1'.*holds no encoded image bytes"),
    "image is text": (row(1, jpg_1=b"hello"), r"row 1, column 'jpg_1' = '5 bytes.*is not an intact image"),
    "image cut off": (row(1, jpg_0=TRUNCATED), r"row 1, column 'jpg_0'.*is not an intact image"),
    "photo cut off": (row(1, jpg_0=JPEG[: len(JPEG) // 2]), r"row 1, column 'jpg_0'.*is not an intact image"),
    "image of another size": (row(1, jpg_1=encoded(image(0, (9, 8)))), r"row 1, column 'jpg_1' = \(8, 9\).*resolution"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(write: Write, name: str) -> None:
    bad, message = BAD_ROWS[name]
    with pytest.raises(InvalidInput, match=message) as caught:
        PairDataset(write(row(0), bad))
    assert "Remedy: " in str(caught.value)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None])
def test_bad_scores(write: Write, score: float | None) -> None:
    path = write(row(0, score_0=0.0, score_1=1.0), row(1, score_0=0.0, score_1=score))
    for relabel in (False, True):
        with pytest.raises(InvalidInput, match=r"row 1, column 'score_1' = .*is not a finite number"):
            PairDataset(path, relabel_by_score=relabel)


def test_bad_column_types(write: Write) -> None:
    with pytest.raises(InvalidInput, match=r"row 0, column 'caption' = 7: is not a string"):
        PairDataset(write(row(0, caption=7)))
    with pytest.raises(InvalidInput, match=r"row 0, column 'label_0' = '1': is not a finite number"):
        PairDataset(write(row(0, label_0="1")))
    with pytest.raises(InvalidInput, match=r"row 0, column 'jpg_0' = 'cat.jpg': holds no encoded image bytes"):
        PairDataset(write(row(0, jpg_0="cat.jpg")))


@pytest.mark.parametrize("column", ["jpg_0", "jpg_1", "caption"])
def test_missing_column_lists_the_columns_and_the_remedy(write: Write, column: str) -> None:
    incomplete = {name: value for name, value in row(0).items() if name != column}
    found = ", ".join(repr(name) for name in incomplete)
    with pytest.raises(InvalidInput, match=rf"has no column '{column}'; its columns are \[{found}\].*data.columns"):
        PairDataset(write(incomplete))


def test_bad_mappings_and_scores_that_are_not_there(write: Write) -> None:
    path = write(row(0))
    with pytest.raises(InvalidInput, match="maps 'picture', which no pair has"):
        PairDataset(path, columns={"picture": "jpg_0"})
    with pytest.raises(InvalidInput, match="has no column 'reward_0'"):
        PairDataset(path, columns={"score_0": "reward_0", "score_1": "reward_1"})
    with pytest.raises(InvalidInput, match="has no column 'score_0'"):
        PairDataset(path, relabel_by_score=True)
    with pytest.raises(InvalidInput, match=r"\['score_0'\]: has no other side"):
        PairDataset(write(row(0, score_0=1.0)))


def test_sets_without_a_preference(tmp_path: Path, write: Write) -> None:
    with pytest.raises(InvalidInput, match="all 2 pairs are ties"):
        PairDataset(write(row(0, 0.5), row(1, 0.5)))
    empty = pa.Table.from_pylist([row(0)]).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(InvalidInput, match="holds no rows"):
        PairDataset(tmp_path / "empty.parquet")


def test_paths_that_hold_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"data.path = .*missing.parquet': does not exist"):
        PairDataset(tmp_path / "missing.parquet")
    with pytest.raises(InvalidInput, match=r"is a directory without \*.parquet, "):
        PairDataset(tmp_path)
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(InvalidInput, match="is not a readable parquet file"):
        PairDataset(tmp_path / "text.parquet")
    store(tmp_path / "truncated.parquet", [row(0)])
    (tmp_path / "truncated.parquet").write_bytes((tmp_path / "truncated.parquet").read_bytes()[:-50])
    with pytest.raises(InvalidInput, match="is not a readable parquet file"):
        PairDataset(tmp_path / "truncated.parquet")


def test_shards_must_agree(tmp_path: Path) -> None:
    store(tmp_path / "a.parquet", [row(0)])
    store(tmp_path / "b.parquet", [{name: value for name, value in row(0).items() if name != "caption"}])
    with pytest.raises(InvalidInput, match=r"b.parquet': has no column 'caption'"):
        PairDataset(tmp_path)
    store(tmp_path / "b.parquet", [row(0, label_0="yes")])
    with pytest.raises(InvalidInput, match="row 1, column 'label_0' = 'yes': is not a finite number"):
        PairDataset(tmp_path)
    store(tmp_path / "b.parquet", [row(0, jpg_0=7)])
    with pytest.raises(InvalidInput, match="cannot be read as one table"):
        PairDataset(tmp_path)
    store(tmp_path / "b.parquet", [row(0, score_0=1.0, score_1=0.0)])
    with pytest.raises(InvalidInput, match=r"b.parquet': has the column of 'score_0', unlike other files"):
        PairDataset(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": "ignore"}, "data.ties = 'ignore'"),
        ({"resolution": 0}, "data.resolution = 0"),
        ({"resolution": 8.0}, "data.resolution = 8.0"),
        ({"resolution": True}, "data.resolution = True"),
        ({"max_broken": -1}, "data.max_broken = -1"),
        ({"max_broken": 1.5}, "data.max_broken = 1.5"),
        ({"max_broken": True}, "data.max_broken = True"),
    ],
)
def test_bad_options(write: Write, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        PairDataset(write(row(0)), **options)


def test_writing_then_reading(tmp_path: Path) -> None:
    rows = [row(i, i % 2, score_0=float(i), score_1=0.5) for i in range(5)]
    rows[2]["jpg_0"] = image(2)  # a PIL image is encoded without loss
    assert write_pairs(tmp_path / "new" / "pairs.parquet", iter(rows)) == 5
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["pairs.parquet"]
    stored = pq.read_schema(tmp_path / "new" / "pairs.parquet")
    assert stored.names == ["jpg_0", "jpg_1", "label_0", "label_1", "caption", "score_0", "score_1"]
    pairs = PairDataset(tmp_path / "new" / "pairs.parquet")
    assert pairs[2].loser.tobytes() == image(2).tobytes()
    assert [pair.winner_score for pair in pairs] == [0.5, 1.0, 0.5, 3.0, 0.5]


def test_writing_streams_over_several_row_groups(tmp_path: Path) -> None:
    assert write_pairs(tmp_path / "many.parquet", (row(i % 50) for i in range(2500))) == 2500
    assert pq.ParquetFile(tmp_path / "many.parquet").num_row_groups == 3
    assert PairDataset(tmp_path / "many.parquet")[2499].caption == "caption 49"


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
def test_bad_rows_leave_no_file_behind(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        write_pairs(tmp_path / "pairs.parquet", rows)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_file_before_it(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", [row(0)])
    with pytest.raises(InvalidInput):
        write_pairs(tmp_path / "pairs.parquet", [row(0), row(1, caption=None)])
    assert len(PairDataset(tmp_path / "pairs.parquet")) == 1
