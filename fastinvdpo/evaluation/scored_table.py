"""Writing pairs with columns added, beside all that were there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import parquet, types

from fastinvdpo._extras import require
from fastinvdpo.data import PairSource
from fastinvdpo.data.broken import BrokenRow, caught
from fastinvdpo.data.rows import CHOICES, IMAGES, LABELS, NOISES, SEEDS, TIE, caption_of, labels_of, winner_of
from fastinvdpo.errors import invalid

_ROWS_PER_PIECE = 256
_FEATURES = b"huggingface"
_BY_SIDE = {0: (1.0, 0.0), 1: (0.0, 1.0), TIE: (0.5, 0.5)}


def write_scored(
    source: PairSource,
    target: Path,
    rows: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    labels: Mapping[str, Sequence[float]],
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
    if stored not in table.column_names:
        return table.append_column(stored, labels)
    place = table.column_names.index(stored)
    before = table.column(place)
    table = table.set_column(place, stored, labels)
    original = f"original_{name}"
    return table if original in table.column_names else table.append_column(original, before)


def _pieces(source: PairSource, rows: Sequence[int]) -> Iterator[Any]:
    if not source.column_names():
        for start in range(0, len(rows), _ROWS_PER_PIECE):
            yield _built(source, rows[start : start + _ROWS_PER_PIECE])
        return
    start = taken = 0
    for table in source.tables():
        end = start + table.num_rows
        first = taken
        while taken < len(rows) and rows[taken] < end:
            taken += 1
        own = rows[first:taken]
        if len(own) < table.num_rows:
            table = table.take([row - start for row in own])
        if own:
            yield _with_bytes(source, table, own) if source.format == "datasets" else table
        start = end


def _built(source: PairSource, rows: Sequence[int]) -> Any:
    """The schema's columns of a source whose rows are no table. Labels that say nothing become null."""
    number, image = arrow.float64(), arrow.binary()
    kinds = {"jpg_0": image, "jpg_1": image, "label_0": number, "label_1": number, "caption": arrow.string()}
    kinds |= dict.fromkeys(source.stored_masks, image)
    columns: dict[str, list[Any]] = {name: [bytes(source.encoded(row, name)) for row in rows] for name in IMAGES}
    columns |= {name: [_encoded(source, row, name) for row in rows] for name in source.stored_masks}
    both = [_labels(source, row) for row in rows]
    columns |= {name: [labels[side] for labels in both] for side, name in enumerate(LABELS)}
    columns["caption"] = [caption_of(source.record(row), partial(source.where, row)) for row in rows]
    if set(NOISES) <= source.stored:
        kinds |= dict.fromkeys(NOISES, image)
        columns |= {name: [bytes(source.noise(row, side)) for row in rows] for side, name in enumerate(NOISES)}
    if set(SEEDS) <= source.stored:
        kinds |= dict.fromkeys(SEEDS, arrow.int64())
        columns |= {name: [source.record(row).get(name) for row in rows] for name in SEEDS}
    return arrow.table(columns, schema=arrow.schema(list(kinds.items())))


def _labels(source: PairSource, row: int) -> tuple[float | None, float | None]:
    record = source.record(row)
    try:
        side = winner_of(record, partial(source.where, row), source.names)
    except BrokenRow:
        return None, None
    return labels_of(record) if record.keys() & set(LABELS) else _BY_SIDE[side]


def _encoded(source: PairSource, row: int, name: str) -> bytes | None:
    """An image, or None where there is none: of the rows written here only a mask may be missing."""
    found = caught(source.encoded, row, name)
    return None if isinstance(found, BrokenRow) else bytes(found)


def _with_bytes(source: PairSource, table: Any, rows: Sequence[int]) -> Any:
    """A repository may name image files by paths, which mean nothing elsewhere."""
    for name in (*IMAGES, *source.stored_masks):
        place = table.column_names.index(source.shown(name))
        if name not in IMAGES and not types.is_struct(table.column(place).type):
            continue  # bytes already, or no mask at all
        data = arrow.array([_encoded(source, row, name) for row in rows], arrow.binary())
        table = table.set_column(place, table.column_names[place], data)
    return table


def _described(schema: Any) -> dict[bytes, bytes]:
    """The metadata that was there. What ``datasets`` stored of the columns is completed by it, since it reads no file
    whose columns are others; where it cannot, it is dropped, and ``datasets`` finds the types itself.
    """
    found = {**(schema.metadata or {})}
    if _FEATURES in found:
        datasets = require("datasets", extra="train", purpose="writing preference pairs")
        del found[_FEATURES]
        try:
            found |= datasets.Features.from_arrow_schema(schema).arrow_schema.metadata
        except (ValueError, KeyError, TypeError):  # a damaged description, or a type that datasets does not know
            return found
    return found
