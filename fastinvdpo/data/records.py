"""Pairs as JSON objects with images beside them: folders, ranked images (HPDv2), webdataset shards.

``datasets`` has loaders for these, which end at the first malformed object or infer one type a column from the first
rows, and copy all images. Here a bad row is counted and images stay where they are: files, or places in a tar file.
"""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count, islice
from pathlib import Path
from typing import Any

from fastinvdpo.data.broken import BrokenRow, broken, caught
from fastinvdpo.data.images import file_below, file_bytes, frames_in, placed_bytes
from fastinvdpo.data.rows import (
    IMAGES,
    MASKS,
    NOISES,
    PAIRS,
    SCORES,
    SEEDS,
    SOURCE,
    Form,
    PairSource,
    choices,
    number,
    stored_under,
)
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import UTF_16, decoded, read_bounded

_LARGEST_LISTING, _LARGEST_TEXT, _MOST_MEMBERS = 2**30, 2**24, 2**20  # bytes, bytes, a number
_RANKED = {"rank": -1.0, "human_preference": 1.0}  # and whether higher is better
_IMAGE_LISTS = ("image_path", "file_path", "images")
_KINDS = ("jpg", "jpeg", "png", "webp")
_ENDINGS = {
    **{
        side: (side, *(f"{number}.{kind}" for kind in _KINDS), *(f"{word}.{kind}" for kind in _KINDS))
        for number, (side, word) in enumerate(zip(IMAGES, ("winner", "loser"), strict=True))
    },
    **{name: (name, *(f"{name}.{kind}" for kind in _KINDS)) for name in (*MASKS, SOURCE)},
    **{name: (f"{name}.npy",) for name in NOISES},
    "image": _KINDS,
}
Rows = Iterator[tuple[str, dict[str, Any] | BrokenRow]]  # where each stands; its values by the schema, or what is wrong


@dataclass(eq=False)
class RecordSource(PairSource):
    """Rows in memory, images where they lie: a path below ``root``, or ``(file, offset, size)``.

    Args:
        listed: the files that list the pairs.
    """

    path: str
    format: str
    names: Mapping[str, str]
    rows: list[tuple[str, dict[str, Any] | BrokenRow]]
    listed: list[Path]
    root: Path | None = None
    streaming: bool = False
    form: Form = PAIRS

    def __len__(self) -> int:
        return len(self.rows)

    def _readable(self) -> list[dict[str, Any]]:
        return [values for _, values in self.rows if isinstance(values, dict)]

    def resolve(self, required: Sequence[str]) -> set[str]:
        # A row that lacks something is broken, not the whole set; what is optional is there when some row has it.
        optional = {*SCORES, *MASKS, *NOISES, *SEEDS}
        scored = {name for name in optional if any(values.get(name) is not None for values in self._readable())}
        for name in SCORES:
            if name in required and name not in scored:
                remedy = "add score_0 and score_1, or name yours in data.columns"
                raise invalid("data.path", self.path, f"no row has {name!r}", remedy)
        # A key of that name may hold another thing than an image, where none is demanded.
        places = (values[SOURCE] for values in self._readable() if values.get(SOURCE) is not None)
        if any(self.sources or SOURCE in self.names or self._is_image(place) for place in islice(places, 1)):
            scored.add(SOURCE)
        return self.choose_masks(set(self.form.schema) - optional - {SOURCE} | scored)

    def _is_image(self, place: Any) -> bool:
        found = caught(file_below, [self.root or Path()], place, SOURCE) if isinstance(place, str) else None
        return isinstance(place, tuple) or (isinstance(found, Path) and self.root is not None and found.is_file())

    def values(self, row: int) -> Mapping[str, Any]:
        values = self.rows[row][1]
        if isinstance(values, BrokenRow):
            raise values
        return values

    def _bytes(self, row: int, name: str) -> memoryview:
        where, place = self.where(row, name), self.values(row).get(name)
        if isinstance(place, tuple):
            file, offset, size = place
            return file_bytes(self.listed[file], where, offset, size)
        if not isinstance(place, str) or not place or self.root is None:
            remedy = "add it, or name yours in data.columns"
            raise broken("missing image", where, place, "names no image", remedy)
        return placed_bytes([self.root], place, where, self.frames if name in self.form.images else None)

    def files(self) -> list[Path]:
        images = set[Path]()
        names = (*self.form.images, *self.stored_beside, *(name for name in NOISES if name in self.stored))
        named = {str(values.get(name)) for values in self._readable() for name in names} if self.root else set()
        for place in named:
            try:
                image = file_below([self.root or Path()], place, self.path)
                images |= {image} if image.is_file() else set(frames_in(image)[: self.frames])
            except (BrokenRow, OSError):  # reported where the row is read
                continue
        return [*self.listed, *sorted(images)]

    def place(self, row: int) -> str:
        return f"row {row} ({self.rows[row][0]})"


def in_schema(
    stored: Any, where: str, names: Mapping[str, str], images: Mapping[str, Any] | None = None, form: Form = PAIRS
) -> dict[str, Any]:
    """The values of an object by the names of the schema and of ``form.choices``; what is missing is left out.

    ``winner`` and ``loser`` without two other images are the images themselves, 0 and 1 of the schema. ``images``:
    where the images lie, if not in the object.

    Raises:
        BrokenRow: not an object, or what reading it has raised.
    """
    if isinstance(stored, BrokenRow):
        raise stored
    if not isinstance(stored, Mapping):
        raise broken("malformed row", where, stored, "is not an object", "write an object with images and caption")
    row: dict[str, Any] = {}
    for name in form.schema:
        for key in stored_under(name, names):
            if name in row and key in stored and row[name] != stored[key]:
                problem = f"is another {name} than {row[name]!r}"
                remedy = f"keep one, or name the key that counts, as in data.columns.{name}={key}"
                raise broken("malformed row", f"{where}, {key}", stored[key], problem, remedy)
            if key in stored:
                row[name] = stored[key]
    others = choices(names, form)
    named = form is PAIRS and images is None and not row.keys() & set(IMAGES) and stored.keys() & {"winner", "loser"}
    row |= {key: stored[key] for key in others if key in stored and not (named and key != "label")}
    if named:
        row |= {"jpg_0": stored.get("winner"), "jpg_1": stored.get("loser"), **({"members": 0} if others else {})}
    return row | dict(images or {})


def folder_rows(listing: Path, names: Mapping[str, str], form: Form = PAIRS) -> Rows:
    """Of a file with one JSON object a line; see :func:`in_schema` for the keys."""
    for line, record in json_lines(listing):
        place = f"{listing.name}, line {line}"
        yield place, caught(in_schema, record, place, names, None, form)


def ranked_rows(listing: Path, names: Mapping[str, str], rank_pairs: str) -> Rows:
    """Of several images of a prompt with ranks, as HPDv2 stores them; each entry gives several rows.

    An entry has ``prompt``, image paths (``image_path``, ``file_path`` or ``images``), and ``rank`` (lower is better,
    equal ranks tie) or ``human_preference`` (higher is better). ``rank_pairs``: ``all`` pairs of an entry, or its
    ``best`` image against each of the rest.
    """
    for entry, record in _json_records(listing):
        place = f"{listing.name}, entry {entry}"
        try:
            images, orders, caption = _ranked(record, place, names)
        except BrokenRow as error:
            yield place, error
            continue
        best = max(range(len(images)), key=lambda i: orders[0][i])  # the first of several equally good ones
        pairs = [(best, other) for other in range(len(images)) if other != best]
        for first, second in combinations(range(len(images)), 2) if rank_pairs == "all" else pairs:
            sides = [(order[first] < order[second]) - (order[first] > order[second]) for order in orders]
            if min(sides) != max(sides):
                problem = f"contradict one another about images {first} and {second}"
                yield place, broken("malformed label", f"{place}, {' and '.join(_RANKED)}", None, problem, "correct it")
                continue
            label = 0.5 - sides[0] / 2
            labels = {"label_0": label, "label_1": 1.0 - label}
            yield place, {"jpg_0": images[first], "jpg_1": images[second], "caption": caption, **labels}


def shard_rows(files: Sequence[Path], names: Mapping[str, str], form: Form = PAIRS) -> Rows:
    """Of webdataset shards: members that share the name up to the first dot make a row.

    One image (``KEY.jpg``) or two (``KEY.0.jpg`` and ``KEY.1.jpg``, ``KEY.jpg_0`` and ``KEY.jpg_1``, or
    ``KEY.winner.jpg`` and ``KEY.loser.jpg``; other kinds likewise), ``KEY.json`` with labels, caption and scores, and
    ``KEY.txt`` with the caption if the JSON has none. ``names`` maps images to endings, the rest to keys of the JSON.
    Headers and small members are read; images are jumped over.
    """
    for file, shard in enumerate(files):
        for key, sample in _samples(shard).items():
            place = f"{shard.name}, {key}"
            yield place, caught(_shard_row, file, sample, place, names, form)


def _shard_row(file: int, sample: _Sample, place: str, names: Mapping[str, str], form: Form) -> dict[str, Any]:
    members, texts = sample.members, sample.texts
    if sample.twice is not None:
        raise broken("malformed row", place, sample.twice, "is the name of two members", "write each member once")
    images, named = dict[str, Any](), False
    for name in (*form.images, *(name for name in (*MASKS, SOURCE, *NOISES) if name in form.schema)):
        found = [e for e in ((names[name],) if name in names else _ENDINGS[name]) if e in members]
        if len(found) > 1:
            raise broken("malformed row", place, found, f"are several images for {name}", "keep one, or name it")
        if found or name in form.images:
            images[name] = (file, *members[found[0]]) if found and members[found[0]][1] else None
        named |= any(ending.startswith(("winner.", "loser.")) for ending in found)
    stored = parsed(texts["json"], f"{place}.json") if "json" in texts else {}
    row = in_schema(stored, f"{place}.json", names, images, form)
    if "txt" in texts:
        try:
            caption = decoded(texts["txt"]).strip()
        except UnicodeDecodeError as error:
            problem, start = f"is not UTF-8 ({error.reason})", texts["txt"][:40]
            raise broken("malformed caption", f"{place}.txt", start, problem, "write it again as UTF-8") from None
        if str(row.setdefault("caption", caption)).strip() != caption:
            problem = f"is not the caption in {place}.json, {row['caption']!r}"
            raise broken("malformed caption", f"{place}.txt", caption, problem, "keep one of them")
    if named and choices(names):
        row["members"] = 0
    return row


@dataclass
class _Sample:
    """``members``: ending -> (offset, size); ``texts``: content of json and txt; ``twice``: a name that is repeated."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    twice: str | None = None


def _samples(shard: Path) -> dict[str, _Sample]:
    found: dict[str, _Sample] = {}
    end = 0
    try:
        with _Bounded(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for number_of_members in count():
                member = tar.next()
                if member is None:
                    break
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                if number_of_members == _MOST_MEMBERS or member.size < 0:
                    raise tarfile.TarError(f"more than {_MOST_MEMBERS:,} members, or one of a negative size")
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or member.issparse() or name.startswith(".") or "__MACOSX" in folder.split("/"):
                    continue
                stem, _, ending = name.partition(".")
                ending = ending.lower()
                sample = found.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
                if ending in sample.members:
                    sample.twice = member.name
                sample.members[ending] = (member.offset_data, member.size)
                if ending in ("json", "txt"):
                    file.seek(member.offset_data)
                    sample.texts[ending] = file.read(member.size)
            size = file.seek(0, 2)
            file.seek(end)
            rest = file.read(min(size - end, _LARGEST_TEXT)) if size > end else b""
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        problem = f"cannot be read as an uncompressed tar file ({error})"
        raise invalid("data.path", str(shard), problem, "write the shard again, without compression") from error
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        problem = "ends early: its last members are missing" if not any(rest) else "holds more after its end"
        raise invalid("data.path", str(shard), problem, "write the shard again, or copy it again")
    return found


class _Bounded(io.FileIO):
    """A regular file of which no more than :data:`_LARGEST_TEXT` bytes are read at once, whatever a header says."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise OSError(errno.EINVAL, "is no regular file")
        super().__init__(path)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_TEXT:
            raise tarfile.TarError(f"a header, a text or the end has more than {_LARGEST_TEXT:,} bytes")
        return super().read(size) or b""


def json_lines(path: Path, argument: str = "data.path") -> Iterator[tuple[int, Any]]:
    """``(line, value)`` of a JSON Lines file, lines counted from 1; empty ones are skipped. A line that is not JSON
    gives the ``BrokenRow`` that says so.
    """
    for line, text in enumerate(_lines(path, argument), start=1):
        if text.strip():
            yield line, caught(parsed, text, f"{path.name}, line {line}")


def _lines(path: Path, argument: str) -> Iterator[bytes]:
    """Line by line, since a listing may be larger than memory; UTF-16 at once."""
    try:
        with io.BufferedReader(_Bounded(path)) as file:
            if file.peek(2)[:2] in UTF_16:
                yield from _content(path, argument).splitlines()
                return
            while line := file.readline(_LARGEST_TEXT):
                if len(line) == _LARGEST_TEXT:
                    raise OSError(errno.EFBIG, f"a line has more than {_LARGEST_TEXT:,} bytes")
                yield line
    except OSError as error:
        raise _unreadable(path, argument, error) from None


def _json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a JSON list, or of JSON Lines, with their numbers counted from 1."""
    data = _content(path)
    if not data[:4096].lstrip(b"\xef\xbb\xbf\0 \t\r\n").startswith(b"["):
        yield from json_lines(path)
    else:
        yield from enumerate(parsed(data, path.name), start=1)


def _content(path: Path, argument: str = "data.path") -> bytes:
    """The bytes of a listing; UTF-16 as UTF-8."""
    try:
        data = read_bounded(path, _LARGEST_LISTING)
        return data.decode("utf-16").encode() if data.startswith(UTF_16) else data
    except (OSError, UnicodeError) as error:
        raise _unreadable(path, argument, error) from None


def _unreadable(path: Path, argument: str, error: OSError | UnicodeError) -> InvalidInput:
    problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return invalid(argument, str(path), problem, "name a readable file")


def looks_ranked(path: Path) -> bool:
    """Whether the first entry of a .json or .jsonl file ranks several images."""
    record = next(_json_records(path), (0, None))[1]
    return isinstance(record, Mapping) and any(key in record for key in _RANKED)


def _ranked(record: Any, where: str, names: Mapping[str, str]) -> tuple[list[Any], list[list[float]], Any]:
    """Images, how good they are by every order that is there (higher is better), and the prompt of an entry."""
    caption = in_schema(record, where, names).get("caption")
    images = next((record[name] for name in _IMAGE_LISTS if name in record), None)
    if not isinstance(images, list) or len(images) < 2:
        remedy = f"give at least two paths under one of {', '.join(_IMAGE_LISTS)}"
        raise broken("malformed row", f"{where}, images", images, "is not a list of several images", remedy)
    keys = [key for key in _RANKED if key in record]
    for key in keys or ["rank"]:
        ranks = record.get(key)
        if not isinstance(ranks, list) or len(ranks) != len(images) or any(number(rank) is None for rank in ranks):
            remedy = f"give one number for each of the {len(images)} images"
            raise broken("malformed label", f"{where}, {key}", ranks, "does not rank the images", remedy)
    return images, [[_RANKED[key] * float(rank) for rank in record[key]] for key in keys], caption


def parsed(data: bytes, where: str) -> Any:
    """The value of JSON text. Raises ``BrokenRow`` where it is not JSON, or an object has a key twice."""
    try:
        return json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON ({error})"
        raise broken("malformed row", where, f"{len(data)} bytes", problem, "write one object a line") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found
