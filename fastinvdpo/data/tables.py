"""Parquet files as one table: small ones in memory, large ones memory-mapped, so that rows can be read at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid

# Larger sets are converted once to memory-mapped Arrow files by `datasets` (its cache directory, HF_DATASETS_CACHE):
# parquet cannot read a single row, and every process of a run would otherwise hold its own copy.
IN_MEMORY_BYTES = 2 * 1024**3


def parquet_files(path: str | Path) -> list[Path]:
    """The file itself, or the ``*.parquet`` shards of a directory in the order of their names.

    Raises:
        InvalidInput: nothing is there, or a directory without shards.
    """
    root = Path(path)
    if root.is_dir():
        files = sorted(root.glob("*.parquet"))
        if not files:
            raise invalid(
                "data.path", str(path), "is a directory without *.parquet files", "name a directory of shards"
            )
        return files
    if not root.is_file():
        raise invalid("data.path", str(path), "does not exist", "name a parquet file or a directory of parquet shards")
    return [root]


def resolve_columns(
    files: Sequence[Path], names: Mapping[str, str], required: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """Which stored column serves each schema name; optional ones that are not stored are left out.

    Raises:
        InvalidInput: an unknown schema name is mapped, or a file lacks a required (or explicitly mapped) column.
    """
    parquet = require("pyarrow.parquet", extra="train", purpose="reading preference pairs")
    arrow = require("pyarrow", extra="train", purpose="reading preference pairs")
    known = (*required, *optional)
    for name in names:
        if name not in SCHEMA:
            raise invalid("data.columns", dict(names), f"maps {name!r}, which no pair has", f"map from {SCHEMA}")
    for file in files:
        try:
            found = parquet.read_schema(file).names
        except (arrow.ArrowInvalid, OSError) as error:
            raise invalid(
                "data.path", str(file), f"is not a readable parquet file ({error})", "write it again"
            ) from error
        for name in known:
            stored = names.get(name, name)
            if stored not in found and (name in required or name in names):
                raise invalid(
                    "data.path",
                    str(file),
                    f"has no column {stored!r}; its columns are {found}",
                    f"map your name with data.columns, such as {{{name}: {found[0] if found else 'my_column'}}}",
                )
    first = parquet.read_schema(files[0]).names
    return {name: names.get(name, name) for name in known if names.get(name, name) in first}


SCHEMA = ("jpg_0", "jpg_1", "label_0", "label_1", "caption", "score_0", "score_1")


def open_table(files: Sequence[Path], columns: Mapping[str, str]) -> Any:
    """One ``pyarrow.Table`` with the schema's names; memory-mapped when the files exceed :data:`IN_MEMORY_BYTES`."""
    arrow = require("pyarrow", extra="train", purpose="reading preference pairs")
    stored = list(dict.fromkeys(columns.values()))
    try:
        if sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES:
            table = _memory_mapped(files, stored)
        else:
            parquet = require("pyarrow.parquet", extra="train", purpose="reading preference pairs")
            table = arrow.concat_tables(
                [parquet.read_table(file, columns=stored, partitioning=None) for file in files],
                promote_options="permissive",
            )
    except (arrow.ArrowInvalid, arrow.ArrowTypeError, OSError) as error:
        shown = [str(file) for file in files]
        raise invalid("data.path", shown, f"cannot be read as one table ({error})", "write the files again") from error
    return arrow.table({name: table.column(column) for name, column in columns.items()})


def _memory_mapped(files: Sequence[Path], stored: list[str]) -> Any:
    datasets = require("datasets", extra="train", purpose="reading large sets of preference pairs")
    loaded = datasets.load_dataset("parquet", data_files=[str(file) for file in files], columns=stored, split="train")
    return loaded.data.table
