"""Writing preference pairs in the schema that :class:`fastinvdpo.data.PairDataset` reads."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import parquet

from fastinvdpo.atomic import atomic_file
from fastinvdpo.data.rows import IMAGES, MASKS, NOISES, SCHEMA, SCORES, SEEDS, SOURCE, is_seed, number
from fastinvdpo.errors import invalid

_ROWS_PER_GROUP = 1000


def write_pairs(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, new: bool = False, metadata: Mapping[str, str] | None = None
) -> int:
    """Write pairs to one parquet file and return how many.

    Each row has ``jpg_0``, ``jpg_1`` (encoded bytes, or a PIL image, which becomes lossless PNG), ``label_0``,
    ``label_1``, ``caption``, and either in all rows or in none ``score_0``, ``score_1``; images ``mask`` or ``mask_0``,
    ``mask_1``, and ``source``, which both were edited from; and what the images were generated from, ``noise_0``,
    ``noise_1`` (arrays, or the bytes of .npy files) or ``seed_0``, ``seed_1``. The file appears under its name only
    when it is complete; rows are streamed, so they need not fit into memory.

    Args:
        new: raise ``FileExistsError`` rather than replace a file.
        metadata: stored with the columns.

    Raises:
        InvalidInput: a missing or unknown key, or a value of the wrong kind, naming row and column; no rows at all.
    """
    remaining = iter(rows)
    first = next(remaining, None)
    if first is None:
        raise invalid("rows", 0, "holds no pairs", "write at least one")
    together = {name: names[0] for names in (SCORES, MASKS[:1], MASKS[1:], (SOURCE,), NOISES, SEEDS) for name in names}
    names = [name for name in SCHEMA if together.get(name, name) in first or name not in together]
    kinds = dict.fromkeys((*IMAGES, *MASKS, SOURCE, *NOISES), arrow.binary()) | dict.fromkeys(SEEDS, arrow.int64())
    kinds["caption"] = arrow.string()
    schema = arrow.schema([(name, kinds.get(name, arrow.float64())) for name in names], metadata)
    numbered = enumerate(chain([first], remaining))
    count = 0
    with atomic_file(Path(path), new=new) as partial, parquet.ParquetWriter(partial, schema) as writer:
        while group := [_checked(row, i, names) for i, row in islice(numbered, _ROWS_PER_GROUP)]:
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def check_parquet_name(output: Path) -> None:
    """Raise ``InvalidInput`` for a name by which the data would not be found to be parquet."""
    if output.suffix != ".parquet":
        raise invalid("output", str(output), "is not the name of a parquet file", "let it end in .parquet")


def encode_png(image: Any) -> bytes:
    """The PIL image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _checked(row: Mapping[str, Any], i: int, names: list[str]) -> dict[str, Any]:
    if set(row) != set(names):
        problem = f"lacks {sorted(set(names) - set(row))} and has unknown {sorted(set(row) - set(names))}"
        raise invalid(f"rows[{i}]", sorted(row), problem, f"give exactly {names} in every row")
    return {name: _checked_value(name, row[name], f"rows[{i}][{name!r}]") for name in names}


def _checked_value(name: str, value: Any, where: str) -> Any:
    if name in (*IMAGES, *MASKS, SOURCE):
        data = encode_png(value) if hasattr(value, "save") else value
        if not isinstance(data, bytes) or not data:
            raise invalid(where, type(value).__name__, "is no image", "give encoded bytes or a PIL image")
        return data
    if name in NOISES:
        data = npy_bytes(value) if isinstance(value, np.ndarray) else value
        if not isinstance(data, bytes) or not data:
            raise invalid(where, type(value).__name__, "is no latent", "give an array, or the bytes of a .npy file")
        return data
    if name in SEEDS:
        if not is_seed(value):
            raise invalid(where, value, "is not the seed of a generator", "give a whole number")
        return value
    if name == "caption":
        if not isinstance(value, str):
            raise invalid(where, value, "is not a string", "give text")
        return value
    found = number(value.item() if hasattr(value, "item") else value)  # a number of numpy or torch
    if found is None:
        raise invalid(where, value, "is not a finite number", "give a number")
    return found
