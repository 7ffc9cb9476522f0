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


def test_text_and_limits(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dög \r\na cat", "utf-8")
    for limit in (None, 2, 9):
        assert load_prompts(tmp_path / "p.txt", limit=limit) == WANTED[:limit]
    with pytest.raises(InvalidInput, match="limit = 0"):
        load_prompts(tmp_path / "p.txt", limit=0)
    (tmp_path / "p.txt").write_bytes("a caf\u00e9\u2028b\r\n".encode("utf-16"))  # encodings that name themselves
    (tmp_path / "p.jsonl").write_bytes('\ufeff"a caf\u00e9\u2028b"\n'.encode())
    assert load_prompts(tmp_path / "p.txt") == load_prompts(tmp_path / "p.jsonl") == ["a caf\u00e9\u2028b"]


@pytest.mark.parametrize("key", ["prompt", "caption", "text", "Prompt"])
def test_json_lines_and_lists(tmp_path: Path, key: str) -> None:
    entries: list[Any] = [{"id": 1, key: WANTED[0]}, WANTED[1], {key: WANTED[2], "other": "x"}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(entry) for entry in entries))
    (tmp_path / "p.json").write_text(json.dumps(entries))
    assert load_prompts(tmp_path / "p.jsonl") == load_prompts(tmp_path / "p.json") == WANTED
    (tmp_path / "q.jsonl").write_text(json.dumps({key: "not this", "other": "a fish"}))
    assert load_prompts(tmp_path / "q.jsonl", column="other") == ["a fish"]


def test_columns_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "hpdv2"  # a directory wins over a published list of its name
    shards.mkdir()
    tiny.write_data(tmp_path / "pairs.parquet", pairs=3)
    assert load_prompts(tmp_path / "pairs.parquet") == ["a zero", "a one", "a two"]
    for number, prompts in enumerate((WANTED[:2], WANTED[2:])):
        table = arrow.table({"words": prompts, "number": [0] * len(prompts)})
        parquet.write_table(table, shards / f"{number}.parquet")
    monkeypatch.chdir(tmp_path)
    assert load_prompts("hpdv2", column="words") == WANTED
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
        ("p.txt", b"caf\xe9", "Remedy: save it as UTF-8"),
        ("p.jsonl", "{", "line 1 = '1 bytes': is not valid JSON"),
        ("p.jsonl", '{"id": 1}', "has none of prompt"),
        ("p.jsonl", '"a"\n{"prompt": ""}', "entry 2 .*is no prompt"),
        ("p.jsonl", "7", "is no prompt"),
        ("p.jsonl", '"\\ud83d"', "damaged text"),
        ("p.jsonl", '"a\\u0000"', "damaged text"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "is not valid JSON"),
        ("p.jsonl", "[" * 99_999, "is not valid JSON"),
        ("p.json", '{"prompt": "a"}', "is not a JSON list"),
        ("p.parquet", "no parquet", "cannot be read as parquet"),
        ("p.parquet", None, "does not exist"),
        ("pipe.txt", None, "is no regular file"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidInput, match=message):
        load_prompts(tmp_path / name)


def test_published_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def load(name: str, split: str) -> Any:
        assert (name, split) == ("nateraw/parti-prompts", "train")
        return datasets.Dataset.from_dict({"Prompt": WANTED, "Category": ["x"] * 3})

    def opened(location: str, mode: str, encoding: str) -> Any:
        assert location.startswith("hf://datasets/zhwang/HPDv2/benchmark/")
        path = tmp_path / Path(location).name
        path.write_text(json.dumps([f"{path.stem} {number}" for number in range(2)]))
        return path.open(mode, encoding=encoding)

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("fsspec.open", opened)
    styles = ("anime", "concept-art", "paintings", "photo")
    assert load_prompts("partiprompts", limit=2) == WANTED[:2]
    assert load_prompts("hpdv2") == [f"{style} {number}" for style in styles for number in range(2)]
    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr("fsspec.open", offline)
    for name in ("partiprompts", "hpdv2"):
        with pytest.raises(InvalidInput, match=rf"prompts = '{name}': cannot be loaded from the hub .*no route.*Remed"):
            load_prompts(name)
