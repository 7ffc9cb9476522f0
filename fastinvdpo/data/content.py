"""Digests of what pairs hold: captions, winners, scores and images of all rows, wherever they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from fastinvdpo.data.broken import or_cause, read_ahead
from fastinvdpo.data.rows import LIKES, NOISES, PAIRS, SEEDS, SOURCE, PairSource, Row
from fastinvdpo.errors import InvalidInput
from fastinvdpo.io import DIGEST, Digests, key_hash

# Of pairs that no source reads at most so many are looked at, evenly spaced: each may be made anew when it is read.
_LOOKED_AT = 4096
_ROWS_HASHED = 256  # at once; another number gives another digest


def content_of(source: PairSource, digests: Digests, *, images: bool = True) -> dict[str, Any]:
    """The number of rows, and a digest of each part of them; of a source that is resolved.

    Args:
        digests: remembers the digest of the images until one of the source's files changes.
        images: False leaves the images out, which are read for this.
    """
    readings: dict[str, Callable[[Row], Any]] = {"captions": Row.caption}
    readings |= {"winners": Row.winner, "scores": Row.scores} if source.form is PAIRS else {}
    readings |= {"likes": Row.liked} if source.form is LIKES else {}
    if set(SEEDS) <= source.stored:
        readings["seeds"] = lambda row: [row.values.get(name) for name in SEEDS]
    parts, places = {name: hashlib.sha256() for name in readings}, hashlib.sha256()
    for number in range(len(source)):
        record = or_cause(source.record, number)
        places.update(repr(record.values if isinstance(record, Row) else record).encode())
        for name, read in readings.items():
            value = or_cause(read, record) if isinstance(record, Row) else record
            parts[name].update(f"{value!r}\n".encode())
    found: dict[str, Any] = {f"data {name}": DIGEST + part.hexdigest() for name, part in parts.items()}
    large = {"data images": source.form.images}
    large |= {"data masks": source.mask_names} if source.mask_names is not None else {}
    large |= {"data sources": (SOURCE,)} if source.sources else {}
    large |= {"data noise": NOISES} if set(NOISES) <= source.stored else {}
    for name, columns in large.items():
        if not images:
            found[name] = "not hashed (output.data_hash)"
        elif source.remote:
            found[name] = "not hashed (read from a remote place)"
        else:
            found[name] = _of_images(source, columns, digests, places.hexdigest())
    return {"data rows": len(source), **found}


def content_at_hand(pairs: Any) -> dict[str, Any]:
    """As :func:`content_of`, for a data set without a source: of its pairs as they are read, at most 4096 of them."""
    total, digest = len(pairs), hashlib.sha256()
    seen = range(0, total, -(-total // _LOOKED_AT))
    for i in seen:
        pair = pairs.pair(i, draw=i)
        sides = (*pair.sides, *filter(None, [pair.source]))
        images = [image for side in sides for image in side.frames or (side.image,)]
        known = (pair.caption, *pair.judged, *(image.size for image in images))
        digest.update(repr(known).encode() + b"".join(image.tobytes() for image in images))
        digest.update(b"".join(side.mask.tobytes() for side in pair.sides if side.mask is not None))
    name = "data pairs" if len(seen) == total else f"data pairs, {len(seen)} of them"
    return {"data rows": total, name: DIGEST + digest.hexdigest()}


def columns_of(source: PairSource, digests: Digests) -> str:
    """A digest of all columns of a table but the images; of a source whose rows are no table, of masks and noise."""
    apart = [source.shown(name) for name in (*source.form.images, *NOISES)]
    stored = source.column_names()
    large = [name for name in (*(() if stored else source.stored_beside), *NOISES) if name in source.stored]

    def pieces() -> Iterable[bytes]:
        for number, table in enumerate(source.tables([name for name in stored if name not in apart])):
            if number == 0:
                yield str(table.schema.remove_metadata()).encode()
            yield from (f"{row!r}\n".encode("utf-8", "surrogatepass") for row in table.to_pylist())
        for row in range(len(source)) if large else ():
            yield repr([or_cause(_hashed, source, row, name) for name in large]).encode()

    return _once(source, digests, {"but": apart}, pieces)


def _of_images(source: PairSource, names: Sequence[str], digests: Digests, places: str) -> str:
    def pieces() -> Iterable[bytes]:
        hashes = (
            both
            for _, both in read_ahead(
                lambda row: [or_cause(_hashed, source, row, name) for name in names], range(len(source))
            )
        )
        while some := list(islice(hashes, _ROWS_HASHED)):
            yield repr(some).encode()

    return _once(source, digests, {"columns": [source.shown(name) for name in names], "places": places}, pieces)


def _hashed(source: PairSource, row: int, name: str) -> str:
    return hashlib.sha256(source.encoded(row, name)).hexdigest()


def _once(source: PairSource, digests: Digests, name: dict[str, Any], pieces: Callable[[], Iterable[bytes]]) -> str:
    """The digest of some pieces, made again when one of the source's files has changed."""

    def make() -> str:
        digest = hashlib.sha256()
        for piece in pieces():
            digest.update(piece)
        return DIGEST + digest.hexdigest()

    try:
        files = source.files()
    except InvalidInput:  # held in memory
        return make()
    named = {**name, "files": [str(file) for file in files], "split": source.split, "rows": len(source)}
    return digests.once(f"pairs {key_hash(named)}", files, make)
