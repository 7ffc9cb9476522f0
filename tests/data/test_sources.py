"""Every format gives the same pairs: parquet, folder, ranked images, webdataset shards, datasets repositories."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastinvdpo.data import PairDataset, open_source, write_pairs
from fastinvdpo.data.score_range import METADATA
from fastinvdpo.data.sources import detect_format
from fastinvdpo.errors import InvalidInput
from tests.data.test_pairs import encoded, image, row, shades, store

COUNT = 6
LABELS = (1.0, 0.0, 0.5, 1.0, 0.0, 1.0)  # of image 0
Rows = list[dict[str, Any]]


def rows() -> Rows:
    return [row(i, LABELS[i], score_0=float(i), score_1=2.5) for i in range(COUNT)]


def write_images(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for i in range(COUNT):
        (root / "images" / f"{i}-0.png").write_bytes(encoded(image(i)))
        (root / "images" / f"{i}-1.png").write_bytes(encoded(image(i + 100)))


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def write_tar(path: Path, samples: Rows, more: dict[str, bytes] | None = None) -> Path:
    """A shard of samples with the keys 0, 1, …, and further members by name."""
    members = {f"{i}.{ending}": data for i, sample in enumerate(samples) for ending, data in sample.items()}
    with tarfile.open(path, "w") as tar:
        for name, data in (members | (more or {})).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def parquet(root: Path, rows: Rows) -> Path:
    return store(root / "pairs.parquet", rows)


def written(root: Path, rows: Rows) -> Path:
    write_pairs(root / "pairs.parquet", rows)
    return root / "pairs.parquet"


def parquet_shards(root: Path, rows: Rows) -> Path:
    root.mkdir(exist_ok=True, parents=True)
    for number, part in enumerate((rows[:2], rows[2:])):
        store(root / f"train-{number}.parquet", part)
    return root


def folder(root: Path, rows: Rows) -> Path:
    """What is bytes becomes a file."""
    lines = [{key: f"{i}.{key}" if isinstance(v, bytes) else v for key, v in one.items()} for i, one in enumerate(rows)]
    for i, one in enumerate(rows):
        for name, value in one.items():
            if isinstance(value, bytes):
                (root / f"{i}.{name}").write_bytes(value)
    write_lines(root / ("likes.jsonl" if "image" in rows[0] else "pairs.jsonl"), lines)
    return root


def webdataset(root: Path, rows: Rows) -> Path:
    for number, part in enumerate((rows[:2], rows[2:])):
        samples = []
        for one in part:
            told = {key: value for key, value in one.items() if not isinstance(value, bytes)}
            parts = {"png" if key == "image" else key: one[key] for key in one.keys() - told.keys()}
            samples.append({"json": json.dumps(told).encode(), **parts})
        write_tar(root / f"{number}.tar", samples)
    return root


def repository(root: Path, rows: Rows) -> Path:
    parquet_shards(root / "data", rows)
    store(root / "data" / "validation-0.parquet", rows[:1])
    return root


def saved(root: Path, rows: Rows) -> Path:
    datasets.Dataset.from_parquet(str(parquet(root, rows)), cache_dir=str(root)).save_to_disk(root / "saved")
    return root / "saved"


FORMATS: dict[str, tuple[Callable[[Path, Rows], Path], str]] = {
    **{f.__name__: (f, "parquet") for f in (parquet, written, parquet_shards)},
    **{f.__name__: (f, f.__name__) for f in (folder, webdataset)},
    **{f.__name__: (f, "datasets") for f in (repository, saved)},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.mark.parametrize("streaming", [False, True], ids=["at once", "streaming"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(root: Path, name: str, streaming: bool) -> None:
    write, kind = FORMATS[name]
    path = write(root, rows())
    assert detect_format(path) == kind
    if streaming and name == "saved":
        with pytest.raises(InvalidInput, match="only parquet can be read by row groups"):
            open_source(path, streaming=True)
        return
    source = open_source(path, streaming=streaming, shuffle_buffer=2)
    assert (source.format, source.streaming) == (kind, streaming)
    dataset = PairDataset(source)
    assert shades(dataset) == [(0, 100), (101, 1), (3, 103), (104, 4), (5, 105)]
    assert [pair.caption for pair in dataset] == [f"caption {i}" for i in (0, 1, 3, 4, 5)]
    assert [pair.winner_score for pair in dataset] == [0.0, 2.5, 3.0, 2.5, 5.0]
    assert [pair.row for pair in dataset] == [0, 1, 3, 4, 5]
    assert dataset.dropped_ties == 1 and dataset.image_size == (8, 8)
    assert dataset[2].winner_key == dataset.entry(2).keys[0]
    assert source.files() and all(file.is_file() for file in source.files())
    again = pickle.loads(pickle.dumps(dataset))
    assert again.pair(1, draw=3).winner.tobytes() == dataset.pair(1, draw=3).winner.tobytes()


def test_a_repository_has_splits_and_one_whose_path_datasets_would_read_as_a_pattern_is_refused(root: Path) -> None:
    for name in ("repo1", "repo[1]"):
        repository(root / name, rows())
    assert len(PairDataset(open_source(root / "repo1", split="validation"))) == 1
    for streaming in (False, True):
        with pytest.raises(InvalidInput, match=r"test"):
            PairDataset(open_source(root / "repo1", split="test", streaming=streaming))
        with pytest.raises(InvalidInput, match="which datasets reads as a pattern"):
            open_source(root / "repo[1]", streaming=streaming)


def test_streamed_parquet_keeps_few_groups_and_looks_at_no_image(root: Path) -> None:
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(20)]), root / "p.parquet", row_group_size=2)
    source = open_source(root / "p.parquet", streaming=True, shuffle_buffer=4)
    dataset = PairDataset(source)
    assert source.groups() == [2] * 10 and source.groups_per_window == 2
    assert dataset.groups() == [[2 * i, 2 * i + 1] for i in range(10)]
    assert [pair.caption for pair in dataset] == [f"caption {i}" for i in range(20)]
    assert len(source._loaded) == 4  # type: ignore[attr-defined]  # two windows of two groups
    path = store(root / "p.parquet", [row(0), row(1, jpg_0=b"text")])
    dataset = PairDataset(open_source(path, streaming=True), resolution=8)
    assert len(dataset) == 2 and dataset[0].row == 0
    with pytest.raises(InvalidInput, match=r"row 1, column 'jpg_0' = .*is not an intact image"):
        dataset[1]
    with pytest.warns(UserWarning, match=r"left out 1 broken rows"):
        assert len(PairDataset(open_source(path, streaming=True), max_broken=1)) == 1


def captions(path: Path, **options: Any) -> list[str]:
    dataset = PairDataset(open_source(path, **options))
    return [dataset.caption(i) for i in range(len(dataset))]


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_a_split_that_file_names_tell_is_read_alone(root: Path, suffix: str) -> None:
    for number, name in enumerate(("train-00000", "my_training.1", "val-0", "test-00000-of-00001")):
        if suffix == "parquet":
            store(root / f"{name}.parquet", [row(number)])
        else:
            members = {"winner.png": encoded(image(0)), "loser.png": encoded(image(1))}
            write_tar(root / f"{name}.tar", [{**members, "txt": f"caption {number}".encode()}])
    assert captions(root) == captions(root, split="train") == ["caption 1", "caption 0"]
    assert captions(root, split="validation") == captions(root, split="val") == ["caption 2"]
    assert captions(root / f"val-0.{suffix}") == ["caption 2"], "a file that is named counts"
    for split in ("no-such-split", "train[:50%]"):
        with pytest.raises(InvalidInput, match=r"is not a split of .*test, train, validation"):
            open_source(root, split=split)
    with pytest.raises(InvalidInput, match=r"data.split = 'test': is not a split of"):
        open_source(parquet(root.parent, rows()), split="test")
    (root / f"train-00000.{suffix}").rename(root / f"more.{suffix}")
    with pytest.raises(InvalidInput, match=rf"more.{suffix}, whose name has none"):
        open_source(root)


@pytest.mark.parametrize("way", ["memory", "mapped", "streaming"])
def test_paths_are_no_patterns(root: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shade, name in enumerate(("set1", "set2", "set[12]", "se*?")):
        (root / name).mkdir()
        store(root / name / "p[0].parquet", [row(shade)])
    monkeypatch.setattr("fastinvdpo.data.tables.IN_MEMORY_BYTES", 0 if way == "mapped" else 2**31)
    for shade, name in ((2, "set[12]"), (3, "se*?")):
        for path in (root / name, root / name / "p[0].parquet"):
            pair = PairDataset(open_source(path, streaming=way == "streaming"))[0]
            assert (pair.winner.getpixel((0, 0)), pair.caption) == (shade, f"caption {shade}")


def test_hidden_files_and_companions_of_a_mac_are_no_pairs(root: Path) -> None:
    junk = b"\0\x05\x16\x07\0\x02\0\0Mac OS X"
    store(root / "a.parquet", [row(0)])
    for name in ("._a.parquet", ".writing-b.parquet"):
        (root / name).write_bytes(junk)
    assert captions(root) == ["caption 0"]
    sample = {"winner.png": encoded(image(0)), "loser.png": encoded(image(1)), "txt": b"a"}
    companions = {f"._0.{ending}": junk for ending in sample} | {f"__MACOSX/0.{ending}": junk for ending in sample}
    assert captions(write_tar(root / "s.tar", [sample], companions)) == ["a"]


def test_a_scored_file_beside_its_input_is_not_read_twice(root: Path) -> None:
    store(root / "pairs.parquet", rows())
    table = pq.read_table(root / "pairs.parquet")
    pq.write_table(table.replace_schema_metadata({METADATA: b"{}"}), root / "scored.parquet")
    with pytest.raises(InvalidInput, match=r"scored\.parquet.*was written by fastinvdpo score, and others were not"):
        PairDataset(root)


def test_loading_scripts_and_pickles_are_not_run(root: Path) -> None:
    hit = root.parent / "hit"
    (root / "data").mkdir()
    (root / f"{root.name}.py").write_text(f"open({str(hit)!r}, 'w')")
    (root / "data" / "a.npy").write_bytes(b"\x93NUMPY\x01\0" + pickle.dumps(print))
    for kind in ("datasets", "auto", "webdataset"):
        with pytest.raises(InvalidInput, match=r"data\.path"):
            open_source(root, format=kind)
    assert not hit.exists()


@pytest.mark.parametrize("name", ["caption", "arrow"])
def test_damaged_text_and_offsets_are_refused(root: Path, name: str) -> None:
    damaged = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\x02\0\0\0"), pa.py_buffer(b"\xe9!"))
    table = pa.Table.from_pylist([row(0)]).drop_columns(["caption"]).append_column("caption", damaged)
    if name == "caption":
        pq.write_table(table, root / "a.parquet")
    else:
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(root)
    with pytest.raises(InvalidInput, match=r"is damaged .*UTF-8|UTF8"):
        PairDataset(root)


def test_formats_that_cannot_be_told_and_files_that_cannot_be_read(root: Path) -> None:
    for name in ("empty", "several"):
        (root / name).mkdir()
    for write in (parquet, webdataset):
        write(root / "several", rows())
    (root / "bad.tar").write_bytes(b"x" * 2000)
    (root / "bad.json").write_text('[{"rank": ')
    write_lines(root / "pairs.jsonl", [{}])
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("empty", {}, "so its format cannot be inferred"),
        ("several", {}, "could be read as parquet and as webdataset.*set data.format"),
        ("empty", {"format": "zip"}, "data.format = 'zip'"),
        ("bad.tar", {}, "bad.tar.*cannot be read as an uncompressed tar file"),
        ("bad.json", {}, "bad.json.*is not valid JSON"),
        ("empty", {"format": "folder"}, "holds no pairs.jsonl"),
        ("nowhere", {"format": "datasets"}, "cannot be loaded by datasets"),
        ("pairs.jsonl", {"image_root": root / "nowhere"}, "data.image_root"),
    ]
    for name, options, problem in refused:
        with pytest.raises(InvalidInput, match=problem):
            open_source(root / name, **options)
    assert open_source(root / "several", format="webdataset").format == "webdataset"
    with pytest.raises(InvalidInput, match=r"for a data set of the hub set data.format to datasets"):
        open_source("someone/pairs")
