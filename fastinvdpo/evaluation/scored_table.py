"""Writing pairs with columns added, beside all that were there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import parquet, types

from fastinvdpo._extras import require
from fastinvdpo.data import PairSource
from fastinvdpo.data.broken import BrokenRow, caught
from fastinvdpo.data.rows import CHOICES, IMAGES, LABELS, MASKS, NOISES, SEEDS, SOURCE, TIE
from fastinvdpo.errors import invalid

_ROWS_PER_PIECE = 256
_FEATURES = b"huggingface"
_BY_SIDE = {0: (1.0, 0.0), 1: (0.0, 1.0), TIE: (0.5, 0.5)}


def write_scored(
    source: PairSource,
    target: Path,
    rows: Sequence[int],
    scores: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    metadata: Mapping[bytes, bytes],
) -> None:
    """Write ``rows`` of a source as one parquet file, with their scores in float32 columns of their own.

    A table keeps all its columns in their order and its row groups; other formats become the columns of the schema,
    with the images' bytes. ``labels`` (empty, or for ``label_0`` and ``label_1``) take the place of the stored ones;
    what named the winner before moves to ``original_label_0`` and the like.

    Raises:
        InvalidInput: the pieces of the table do not have the same columns.
    """
    writer: Any = None
    schema: Any = None
    written = 0
    try:
        for table in _pieces(source, rows):
            part = slice(written, written + table.num_rows)
            written += table.num_rows
            if labels:
                table = table.rename_columns([f"original_{n}" if n in CHOICES else n for n in table.column_names])
            for name, values in labels.items():
                table = _relabeled(table, source.shown(name), name, arrow.array(values[part], arrow.float64()))
            for name, values in scores.items():
                table = table.append_column(name, arrow.array(values[part], arrow.float32()))
            if writer is None:
                schema = table.schema.with_metadata({**_described(table.schema), **metadata})
                writer = parquet.ParquetWriter(target, schema)
            try:
                writer.write_table(table.select(schema.names).cast(schema))
            except (KeyError, arrow.ArrowInvalid, ValueError) as error:
                problem = f"its files hold columns of different kinds ({error})"
                raise invalid("data.path", source.path, problem, "write them with the same types") from error
    finally:
        if writer is not None:
            writer.close()


def _relabeled(table: Any, stored: str, name: str, labels: Any) -> Any:
    original, found = f"original_{name}", table.column_names
    if stored not in found:
        return table.append_column(stored, labels)
    if original not in found:
        table = table.append_column(original, table.column(stored))
    return table.set_column(found.index(stored), stored, labels)


def _pieces(source: PairSource, rows: Sequence[int]) -> Iterator[Any]:
    if not source.column_names():
        pieces = (rows[start : start + _ROWS_PER_PIECE] for start in range(0, len(rows), _ROWS_PER_PIECE))
        yield from map(partial(_built, source), pieces)
        return
    start = taken = 0
    for table in source.tables():
        end, first = start + table.num_rows, taken
        taken = bisect_left(rows, end, first)
        if own := rows[first:taken]:
            part = table if len(own) == table.num_rows else table.take([row - start for row in own])
            yield _with_bytes(source, part, own) if source.format == "datasets" else part
        start = end


def _built(source: PairSource, rows: Sequence[int]) -> Any:
    """The schema's columns of a source whose rows are no table. Labels that say nothing become null."""
    optional = [pair for pair in (NOISES, SEEDS) if set(pair) <= source.stored]
    names = [*IMAGES, *LABELS, "caption", *source.stored_beside, *(name for pair in optional for name in pair)]
    kinds = dict.fromkeys(LABELS, arrow.float64()) | dict.fromkeys(SEEDS, arrow.int64()) | {"caption": arrow.string()}
    cells = [_cells(source, row, names) for row in rows]
    schema = arrow.schema([(name, kinds.get(name, arrow.binary())) for name in names])
    return arrow.Table.from_pylist(cells, schema=schema)


def _cells(source: PairSource, row: int, names: Sequence[str]) -> dict[str, Any]:
    record = source.record(row)
    side, stored = caught(record.winner), record.values.keys() & set(LABELS)
    labels = (None, None) if isinstance(side, BrokenRow) else record.labels() if stored else _BY_SIDE[side]
    known = {"caption": record.caption(), **dict(zip(LABELS, labels, strict=True))}
    known |= {name: record.values.get(name) for name in SEEDS}
    return {name: known[name] if name in known else _encoded(source, row, name) for name in names}


def _encoded(source: PairSource, row: int, name: str) -> bytes | None:
    """An image, or None where there is none: of the rows written here only a mask or source may be missing."""
    try:
        return bytes(source.encoded(row, name))
    except BrokenRow:
        if name not in (*MASKS, SOURCE):
            raise
        return None


def _with_bytes(source: PairSource, table: Any, rows: Sequence[int]) -> Any:
    """A repository may name image files by paths, which mean nothing elsewhere."""
    for name in (*IMAGES, *source.stored_beside):
        place = table.column_names.index(source.shown(name))
        if name in IMAGES or types.is_struct(table.column(place).type):  # a mask may be bytes already, or none at all
            data = arrow.array([_encoded(source, row, name) for row in rows], arrow.binary())
            table = table.set_column(place, table.column_names[place], data)
    return table


def _described(schema: Any) -> dict[bytes, bytes]:
    """The metadata that was there. What ``datasets`` stored of the columns is completed by it, since it reads no file
    whose columns are others; where it cannot, it is dropped, and ``datasets`` finds the types itself.
    """
    found = {**(schema.metadata or {})}
    if found.pop(_FEATURES, None) is not None:
        datasets = require("datasets", extra="train", purpose="writing preference pairs")
        try:
            found |= datasets.Features.from_arrow_schema(schema).arrow_schema.metadata
        except (ValueError, KeyError, TypeError):  # a damaged description, or a type that datasets does not know
            return found
    return found
