"""Writing preference pairs in the schema that :class:`fastinvdpo.data.PairDataset` reads."""

from __future__ import annotations

import io
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid

_REQUIRED = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
_SCORES = ("score_0", "score_1")
_ROWS_PER_GROUP = 1000


def write_pairs(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write pairs to one parquet file and return how many.

    Each row has ``jpg_0``, ``jpg_1`` (encoded bytes, or a PIL image, which becomes lossless PNG), ``label_0``,
    ``label_1``, ``caption``, and either in all rows or in none ``score_0``, ``score_1``. The file appears under its
    name only when it is complete; rows are streamed, so they need not fit into memory.

    Raises:
        InvalidInput: a missing or unknown key, or a value of the wrong kind, naming row and column; no rows at all.
    """
    arrow = require("pyarrow", extra="train", purpose="writing preference pairs")
    parquet = require("pyarrow.parquet", extra="train", purpose="writing preference pairs")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    writer: Any = None
    schema: Any = None
    count = 0
    group: list[dict[str, Any]] = []
    try:
        for count, row in enumerate(rows, start=1):
            if schema is None:
                schema = _schema(arrow, with_scores="score_0" in row)
                writer = parquet.ParquetWriter(partial, schema)
            group.append(_checked(row, count - 1, schema.names))
            if len(group) == _ROWS_PER_GROUP:
                writer.write_table(arrow.Table.from_pylist(group, schema=schema))
                group = []
        if schema is None:
            raise invalid("rows", count, "holds no pairs", "write at least one")
        if group:
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))
        writer.close()
        os.replace(partial, target)
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
    return count


def encode_png(image: Any) -> bytes:
    """The PIL image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _schema(arrow: Any, with_scores: bool) -> Any:
    kinds = {"jpg_0": arrow.binary(), "jpg_1": arrow.binary(), "caption": arrow.string()}
    names = (*_REQUIRED, *_SCORES) if with_scores else _REQUIRED
    return arrow.schema([(name, kinds.get(name, arrow.float64())) for name in names])


def _checked(row: Mapping[str, Any], number: int, names: list[str]) -> dict[str, Any]:
    if set(row) != set(names):
        problem = f"lacks {sorted(set(names) - set(row))} and has unknown {sorted(set(row) - set(names))}"
        raise invalid(f"rows[{number}]", sorted(row), problem, f"give exactly {names} in every row")
    return {name: _checked_value(name, row[name], number) for name in names}


def _checked_value(name: str, value: Any, number: int) -> Any:
    where = f"rows[{number}][{name!r}]"
    if name in ("jpg_0", "jpg_1"):
        data = encode_png(value) if hasattr(value, "save") else value
        if not isinstance(data, bytes) or not data:
            raise invalid(where, type(value).__name__, "is no image", "give encoded bytes or a PIL image")
        return data
    if name == "caption":
        if not isinstance(value, str):
            raise invalid(where, value, "is not a string", "give text")
        return value
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise invalid(where, value, "is not a finite number", "give a number")
    return float(value)
