"""Digests of what pairs hold: captions, winners, scores and images of all rows, wherever they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from fastinvdpo.data.broken import BrokenRow, caught, read_ahead
from fastinvdpo.data.rows import NOISES, PAIRS, SEEDS, PairSource, caption_of, liked_of, scores_of, winner_of
from fastinvdpo.errors import InvalidInput
from fastinvdpo.io import DIGEST, Digests, key_hash

# Of pairs that no source reads at most so many are looked at, evenly spaced: each may be made anew when it is read.
_LOOKED_AT = 4096
_Read = Callable[[int, int], Any]  # the encoded bytes of a row's image or mask 0 or 1
_ROWS_HASHED = 256  # at once; another number gives another digest


def content_of(source: PairSource, digests: Digests, *, images: bool = True) -> dict[str, Any]:
    """The number of rows, and a digest of each part of them; of a source that is resolved.

    Args:
        digests: remembers the digest of the images until one of the source's files changes.
        images: False leaves the images out, which are read for this.
    """
    names = ("captions", "winners", "scores") if source.form is PAIRS else ("captions", "likes")
    names = (*names, *(("seeds",) if set(SEEDS) <= source.stored else ()))
    parts = {name: hashlib.sha256() for name in names}
    places = hashlib.sha256()
    for row in range(len(source)):
        where = partial(source.where, row)
        record = _or_cause(source.record, row)
        places.update(repr(record).encode())
        values: dict[str, Any] = dict.fromkeys(parts, record)
        if not isinstance(record, str):
            values = {"captions": _or_cause(caption_of, record, where)}
            if source.form is PAIRS:
                values["winners"] = _or_cause(winner_of, record, where, source.names)
                values["scores"] = _or_cause(scores_of, record, where)
                values["seeds"] = [record.get(name) for name in SEEDS]
            else:
                values["likes"] = _or_cause(liked_of, record, where)
        for name, part in parts.items():
            part.update(f"{values[name]!r}\n".encode())
    found: dict[str, Any] = {f"data {name}": DIGEST + part.hexdigest() for name, part in parts.items()}
    read: dict[str, tuple[_Read, tuple[str, ...]]] = {"data images": (source.image, source.form.images)}
    if source.mask_names is not None:
        read["data masks"] = source.mask, source.mask_names
    if set(NOISES) <= source.stored:
        read["data noise"] = source.noise, NOISES
    for name, (encoded, columns) in read.items():
        if not images:
            found[name] = "not hashed (output.data_hash)"
        elif source.remote:
            found[name] = "not hashed (read from a remote place)"
        else:
            found[name] = _of_images(source, encoded, columns, digests, places.hexdigest())
    return {"data rows": len(source), **found}


def content_at_hand(pairs: Any) -> dict[str, Any]:
    """As :func:`content_of`, for a data set without a source: of its pairs as they are read, at most 4096 of them."""
    total = len(pairs)
    seen = range(0, total, -(-total // _LOOKED_AT))
    digest = hashlib.sha256()
    for i in seen:
        pair = pairs.pair(i, draw=i)
        images = [side.image for side in pair.sides]
        known = (pair.caption, *pair.judged, *(image.size for image in images))
        digest.update(repr(known).encode() + b"".join(image.tobytes() for image in images))
        digest.update(b"".join(side.mask.tobytes() for side in pair.sides if side.mask is not None))
    name = "data pairs" if len(seen) == total else f"data pairs, {len(seen)} of them"
    return {"data rows": total, name: DIGEST + digest.hexdigest()}


def columns_of(source: PairSource, digests: Digests) -> str:
    """A digest of all columns of a table but the images; of a source whose rows are no table, of masks and noise."""
    apart = [source.shown(name) for name in (*source.form.images, *NOISES)]
    table = source.column_names()
    names = [name for name in table if name not in apart]
    large = [name for name in (*(() if table else source.stored_masks), *NOISES) if name in source.stored]

    def make() -> str:
        digest, schema = hashlib.sha256(), None
        for table in source.tables(names):
            if schema is None:
                schema = table.schema.remove_metadata()
                digest.update(str(schema).encode())
            for row in table.to_pylist():
                digest.update(f"{row!r}\n".encode("utf-8", "surrogatepass"))
        for number in range(len(source)) if large else ():
            digest.update(repr([_or_cause(_hashed, source, number, name) for name in large]).encode())
        return DIGEST + digest.hexdigest()

    return _once(source, digests, {"but": apart}, make)


def _hashed(source: PairSource, row: int, name: str) -> str:
    return hashlib.sha256(source.encoded(row, name)).hexdigest()


def _of_images(source: PairSource, encoded: _Read, names: Sequence[str], digests: Digests, places: str) -> str:
    def one(row: int, side: int) -> str:
        return hashlib.sha256(encoded(row, side)).hexdigest()

    def make() -> str:
        digest = hashlib.sha256()
        found = read_ahead(
            lambda row: [_or_cause(one, row, side) for side in range(len(source.form.images))], range(len(source))
        )
        hashes = (both for _, both in found)
        while some := list(islice(hashes, _ROWS_HASHED)):
            digest.update(repr(some).encode())
        return DIGEST + digest.hexdigest()

    columns = [source.shown(name) for name in names]
    return _once(source, digests, {"columns": columns, "places": places}, make)


def _once(source: PairSource, digests: Digests, name: dict[str, Any], make: Callable[[], str]) -> str:
    try:
        files = source.files()
    except InvalidInput:  # held in memory
        return make()
    named = {**name, "files": [str(file) for file in files], "split": source.split, "rows": len(source)}
    return digests.once(f"pairs {key_hash(named)}", files, make)


def _or_cause(read: Callable[..., Any], *arguments: Any) -> Any:
    """What ``read`` returns, or why the row is broken."""
    found = caught(read, *arguments)
    return found.cause if isinstance(found, BrokenRow) else found
