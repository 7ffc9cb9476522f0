"""Prompt lists: files, columns, and the published ones with a hub that the test plays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.prompts import load_prompts
from tests.trainer import tiny

WANTED = ["a cat", "a dög", "a cat"]


def test_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dög \r\na cat", "utf-8")
    assert load_prompts(tmp_path / "p.txt") == WANTED
    assert load_prompts(tmp_path / "p.txt", limit=2) == WANTED[:2]
    assert load_prompts(tmp_path / "p.txt", limit=9) == WANTED


@pytest.mark.parametrize("key", ["prompt", "caption", "text", "Prompt"])
def test_json_lines_and_lists(tmp_path: Path, key: str) -> None:
    entries: list[Any] = [{"id": 1, key: WANTED[0]}, WANTED[1], {key: WANTED[2], "other": "x"}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(entry) for entry in entries))
    (tmp_path / "p.json").write_text(json.dumps(entries))
    assert load_prompts(tmp_path / "p.jsonl") == load_prompts(tmp_path / "p.json") == WANTED
    (tmp_path / "q.jsonl").write_text(json.dumps({key: "not this", "other": "a fish"}))
    assert load_prompts(tmp_path / "q.jsonl", column="other") == ["a fish"]


def test_columns_of_data_sets(tmp_path: Path) -> None:
    tiny.write_data(tmp_path / "pairs.parquet", pairs=3)
    assert load_prompts(tmp_path / "pairs.parquet") == ["a zero", "a one", "a two"]
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, prompts in enumerate((WANTED[:2], WANTED[2:])):
        table = arrow.table({"words": prompts, "number": [0] * len(prompts)})
        parquet.write_table(table, shards / f"{number}.parquet")
    assert load_prompts(shards, column="words") == WANTED
    with pytest.raises(InvalidInput, match=r"has none of prompt, caption, text, Prompt, only words, number"):
        load_prompts(shards)
    with pytest.raises(InvalidInput, match=r"entry 1 of .* = 0: is no prompt"):
        load_prompts(shards, column="number")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", None, "cannot be read"),
        ("p.csv", "a", "is no prompt list"),
        ("p.jsonl", "{", "line 1 = '1 bytes': is not valid JSON"),
        ("p.jsonl", '{"id": 1}', "has none of prompt"),
        ("p.jsonl", '"a"\n{"prompt": ""}', "entry 2 .*is no prompt"),
        ("p.jsonl", "7", "is no prompt"),
        ("p.json", '{"prompt": "a"}', "is not a JSON list"),
        ("p.parquet", "no parquet", "cannot be read as parquet"),
        ("p.parquet", None, "does not exist"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=message):
        load_prompts(tmp_path / name)


def test_text_that_names_its_encoding_is_read_and_damaged_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("a caf\u00e9\u2028b\r\n".encode("utf-16"))
    (tmp_path / "p.jsonl").write_bytes('\ufeff"a caf\u00e9\u2028b"\n'.encode())
    assert load_prompts(tmp_path / "p.txt") == load_prompts(tmp_path / "p.jsonl") == ["a caf\u00e9\u2028b"]
    for text in ('"\\ud83d"', '"a\\u0000"', '{"prompt": "a", "prompt": "b"}', "[" * 99_999):
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(InvalidInput, match=r"damaged text|is not valid JSON"):
            load_prompts(tmp_path / "p.jsonl")
    os.mkfifo(tmp_path / "q.txt")
    with pytest.raises(InvalidInput, match="is no regular file"):
        load_prompts(tmp_path / "q.txt")


def test_a_limit_must_leave_something(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="limit = 0"):
        load_prompts(tmp_path / "p.txt", limit=0)


def test_partiprompts(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, split: str) -> Any:
        assert (name, split) == ("nateraw/parti-prompts", "train")
        return datasets.Dataset.from_dict({"Prompt": WANTED, "Category": ["x"] * 3})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_prompts("partiprompts", limit=2) == WANTED[:2]


def test_hpdv2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened(location: str, mode: str, encoding: str) -> Any:
        assert location.startswith("hf://datasets/zhwang/HPDv2/benchmark/")
        path = tmp_path / Path(location).name
        path.write_text(json.dumps([f"{path.stem} {number}" for number in range(2)]))
        return path.open(mode, encoding=encoding)

    monkeypatch.setattr("fsspec.open", opened)
    styles = ("anime", "concept-art", "paintings", "photo")
    assert load_prompts("hpdv2") == [f"{style} {number}" for style in styles for number in range(2)]


@pytest.mark.parametrize("name", ["partiprompts", "hpdv2"])
def test_published_lists_without_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr("fsspec.open", offline)
    with pytest.raises(InvalidInput, match=rf"prompts = '{name}': cannot be loaded from the hub .*no route.*Remedy: "):
        load_prompts(name)


def test_a_file_of_a_published_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "pairs.parquet", pairs=1)
    (tmp_path / "hpdv2").mkdir()
    (tmp_path / "pairs.parquet").rename(tmp_path / "hpdv2" / "0.parquet")
    assert load_prompts("hpdv2") == ["a zero"]
