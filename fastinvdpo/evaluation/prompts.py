"""Prompt lists: a file, a column of a data set, or a published list by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow import ArrowException, parquet

from fastinvdpo._extras import require
from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.images import decode, file_below, file_bytes, image_bytes
from fastinvdpo.data.records import json_lines, parsed
from fastinvdpo.data.rows import DAMAGED, SOURCE, is_damaged
from fastinvdpo.data.sources import files_of
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import read_text

# Keys and columns that are looked for where none is named, in this order.
COLUMNS = ("prompt", "caption", "text", "Prompt")
_LARGEST_FILE = 2**28
_HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
_WITH_SOURCES = "name a .jsonl, .json or .parquet file with the key or column source beside the prompt"
_REMEDY = "name a .txt, .jsonl, .json or .parquet file, a directory of parquet shards, partiprompts or hpdv2"


def load_prompts(source: str | Path, *, column: str | None = None, limit: int | None = None) -> list[str]:
    """The prompts of ``source`` as they stand there, repeated ones included; the first ``limit`` of them.

    ``.txt``: one a line, empty lines left out. ``.jsonl`` and ``.json``: strings, or objects with the key ``column``.
    ``.parquet`` or a directory of shards: the column ``column``. Without ``column`` the first of ``prompt``,
    ``caption``, ``text`` that is there. ``partiprompts`` (PartiPrompts, arXiv 2206.10789) and ``hpdv2`` (the 3,200
    prompts of the HPSv2 benchmark, arXiv 2306.09341) come from the hub.

    Raises:
        InvalidInput: nothing is there, no such column, something that is no text, an empty prompt, or no prompt at all;
            a published list that cannot be reached.
    """
    if limit is not None and limit < 1:
        raise invalid("limit", limit, "leaves no prompt", "pass a positive number, or none for all")
    name, path = str(source), Path(source)
    if name in ("partiprompts", "hpdv2") and not path.exists():
        found = _from_hub(name)
    elif path.is_dir() or path.suffix == ".parquet":
        found = _column(path, column)
    elif path.suffix == ".txt":
        text = read_text(path, "prompts", _LARGEST_FILE, _REMEDY)
        found = [line.strip() for line in text.split("\n") if line.strip()]
    elif path.suffix == ".jsonl":
        found = [_entry(entry, f"{name}, line {line}", column) for line, entry in json_lines(path, "prompts")]
    elif path.suffix == ".json":
        found = _json_list(read_text(path, "prompts", _LARGEST_FILE, _REMEDY), name, column)
    else:
        raise invalid("prompts", name, "is no prompt list", _REMEDY)
    prompts = found if limit is None else found[:limit]
    if not prompts:
        raise invalid("prompts", name, "holds no prompt", "write at least one")
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompts, entry {number} of {name}"
        if not isinstance(prompt, str) or not prompt.strip():
            raise invalid(where, prompt, "is no prompt", "write text, or leave it out")
        if is_damaged(prompt):
            raise invalid(where, prompt, DAMAGED, "write it again as UTF-8")
    return prompts


class SourceImages(Sequence[Image.Image]):
    """Images that are decoded when they are taken."""

    def __init__(self, encoded: list[tuple[memoryview, str]]) -> None:
        self._encoded = encoded
        for one in encoded:
            decode(*one)  # raises

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return decode(*self._encoded[place])


def digest_of(images: Sequence[Image.Image]) -> str:
    """SHA-256 of the pixels."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def load_sources(source: str | Path, *, limit: int | None = None) -> SourceImages:
    """The images that stand beside the prompts of a ``.jsonl``, ``.json`` or parquet list: under the key ``source`` as
    paths below the list's folder, or in the column ``source`` as encoded images.

    Raises:
        InvalidInput: a list without them, or an entry whose image is missing or damaged.
    """
    path, found = Path(source), list[tuple[memoryview, str]]()
    if path.suffix in (".jsonl", ".json"):
        entries: Any = json_lines(path, "prompts")
        if path.suffix == ".json":
            entries = enumerate(parsed(read_text(path, "prompts", _LARGEST_FILE, _REMEDY).encode(), str(path)), start=1)
        for number, entry in islice(entries, limit):
            where = f"prompts, entry {number} of {path.name}, source"
            place = entry.get(SOURCE) if isinstance(entry, dict) else None
            if not isinstance(place, str):
                raise invalid(where, place, "names no image, and the model edits one", f"write a path under {SOURCE!r}")
            found.append((file_bytes(file_below([path.parent], place, where), where), where))
    elif path.is_dir() or path.suffix == ".parquet":
        for file in files_of(path, ".parquet"):
            table = parquet.read_table(file)
            where, column = f"prompts, {file}, source", _chosen(table.column_names, str(file), SOURCE)
            found += [(image_bytes(cell, where), where) for cell in table.column(column)]
    else:
        raise invalid("prompts", str(source), "holds no source images, and the model edits one a prompt", _WITH_SOURCES)
    return SourceImages(found[:limit])


def _json_list(text: str, name: str, column: str | None) -> list[Any]:
    found = parsed(text.encode("utf-8", "surrogatepass"), name)
    if not isinstance(found, list):
        raise invalid("prompts", name, "is not a JSON list", "write [...], or one entry a line in a .jsonl file")
    return [_entry(entry, f"{name}, entry {number}", column) for number, entry in enumerate(found, start=1)]


def _entry(entry: Any, where: str, column: str | None) -> Any:
    if isinstance(entry, BrokenRow):
        raise entry
    return entry[_chosen(list(entry), where, column)] if isinstance(entry, dict) else entry


def _column(path: Path, column: str | None) -> list[Any]:
    found: list[Any] = []
    for file in files_of(path, ".parquet"):
        try:
            table = parquet.ParquetFile(file)
            chosen = _chosen(table.schema_arrow.names, str(file), column)
            found += table.read(columns=[chosen]).column(chosen).to_pylist()
        except InvalidInput:
            raise
        except (OSError, ValueError, ArrowException) as error:
            raise invalid("prompts", str(file), f"cannot be read as parquet ({error})", _REMEDY) from error
    return found


def _chosen(names: list[str], where: str, column: str | None) -> str:
    wanted = COLUMNS if column is None else (column,)
    if found := next((name for name in wanted if name in names), None):
        return found
    problem = f"has none of {', '.join(wanted)}, only {', '.join(names)}"
    raise invalid("prompts", where, problem, "name the column that holds the prompts")


def _from_hub(name: str) -> list[Any]:
    datasets = require("datasets", extra="train", purpose="loading PartiPrompts")
    fsspec = require("fsspec", extra="train", purpose="loading the prompts of HPDv2")
    found: list[Any] = []
    try:
        if name == "partiprompts":
            return list(datasets.load_dataset("nateraw/parti-prompts", split="train")["Prompt"])
        for style in _HPD_STYLES:  # JSON lists of strings, which are no table
            location = f"hf://datasets/zhwang/HPDv2/benchmark/{style}.json"
            with fsspec.open(location, "r", encoding="utf-8") as file:
                found += _json_list(file.read(), location, None)
        return found
    except InvalidInput:
        raise
    except Exception as error:  # the clients of the hub raise many kinds where there is no connection
        problem = f"cannot be loaded from the hub ({type(error).__name__}: {error})"
        raise invalid("prompts", name, problem, "check the connection, or name a file with these prompts") from error
