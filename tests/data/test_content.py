"""Digests of what pairs hold: equal for equal pairs, however they are stored; another for every change of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from fastinvdpo.data import PairDataset, open_source
from fastinvdpo.data.content import content_at_hand, content_of
from fastinvdpo.data.rows import IMAGES
from fastinvdpo.io import Digests
from tests.data.test_pairs import encoded, image, row, store
from tests.data.test_sources import COUNT, FORMATS, _own_cache, folder, rows, write_lines  # noqa: F401


def content(path: Path, digests: Digests | None = None, **options: Any) -> dict[str, Any]:
    source = open_source(path, **options)
    source.resolve((*IMAGES, "caption"))
    return content_of(source, digests or Digests())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return content(store(tmp_path_factory.mktemp("set") / "pairs.parquet", rows()))


@pytest.mark.parametrize("name", FORMATS)
def test_equal_pairs_have_equal_digests_in_every_format(tmp_path: Path, name: str, expected: dict[str, Any]) -> None:
    root = tmp_path / "set"
    root.mkdir()
    assert content(FORMATS[name][0](root, rows())) == expected
    assert expected["data rows"] == COUNT


def test_only_a_change_of_rows_changes_the_digests(tmp_path: Path, expected: dict[str, Any]) -> None:
    path = store(tmp_path / "pairs.parquet", rows())
    pq.write_table(pq.read_table(path), path, compression="gzip", row_group_size=2)
    assert content(path) == content(path, streaming=True) == expected
    assert content(store(path, rows()[:-1])) != expected


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("captions", {"caption": "another"}),
        ("captions", {"caption": None}),
        ("winners", {"label_0": 0.0, "label_1": 1.0}),
        ("scores", {"score_1": 2.75}),
        ("images", {"jpg_1": encoded(image(77))}),
    ],
)
def test_a_change_of_one_row_changes_its_part(
    tmp_path: Path, part: str, change: dict[str, Any], expected: dict[str, Any]
) -> None:
    changed = rows()
    changed[3] |= change
    found = content(store(tmp_path / "pairs.parquet", changed))
    assert [name for name in expected if found[name] != expected[name]] == [f"data {part}"]


def test_images_are_read_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Digests, "settled_ns", 0)
    root = folder(tmp_path, rows())
    digests = Digests()
    first = content(root, digests)
    with monkeypatch.context() as patched:
        patched.setattr("fastinvdpo.data.records.RecordSource.encoded", lambda *arguments: pytest.fail("read again"))
        assert content(root, Digests(digests.remembered)) == first
    (root / "2.jpg_1").write_bytes(encoded(image(9)))
    replaced = content(root, Digests(digests.remembered))
    assert replaced["data images"] != first["data images"]
    # Two rows change places in the listing: the same files, in another order.
    lines = (root / "pairs.jsonl").read_text().splitlines()
    write_lines(root / "pairs.jsonl", [lines[1], lines[0], *lines[2:]])
    assert content(root, Digests(digests.remembered))["data images"] != replaced["data images"]


def test_images_that_a_repository_names_by_path_count(tmp_path: Path) -> None:
    images = {name: str(tmp_path / f"{name}.png") for name in IMAGES}
    for path in images.values():
        Path(path).write_bytes(encoded(image(0)))
    cells = {name: {"bytes": None, "path": path} for name, path in images.items()}
    datasets.Dataset.from_list([{**row(), **cells}]).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved", image_root=tmp_path)
    source.resolve(IMAGES)
    assert {str(file) for file in source.files()} >= set(images.values())
    digests = Digests()
    digests.settled_ns = 0
    before = content_of(source, digests)
    Path(images["jpg_1"]).write_bytes(encoded(image(50)))
    assert content_of(source, digests)["data images"] != before["data images"]


def test_pairs_at_hand_are_looked_at_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = rows()
    changed[3] |= {"caption": "another"}
    sets = [PairDataset(store(tmp_path / f"{i}.parquet", made)) for i, made in enumerate((rows(), rows(), changed))]
    one, same, other = map(content_at_hand, sets)
    assert one == same != other and one["data rows"] == COUNT - 1
    monkeypatch.setattr("fastinvdpo.data.content._LOOKED_AT", 2)
    assert any("of them" in name for name in content_at_hand(sets[0]))
