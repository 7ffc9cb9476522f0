"""``fastinvdpo score``: preference scores of pairs, written beside them, and labels from scores.

The work is done in parts of a fixed number of rows, each a small file in ``<output>.parts``. Batches never reach over a
part, so that a part holds the same numbers however often the work was interrupted. The output is written from the parts
when all are there, and they are deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from pyarrow import ArrowException, parquet

from fastinvdpo._extras import require
from fastinvdpo.atomic import ELSEWHERE, atomic_file, clean_folder, make_directory, prepare_folder
from fastinvdpo.config.sections import DataSection
from fastinvdpo.data import PairSource
from fastinvdpo.data.broken import BrokenRow, BrokenRows, by_cause, read_ahead
from fastinvdpo.data.content import columns_of, content_of
from fastinvdpo.data.images import decode
from fastinvdpo.data.rows import IMAGES, LABELS
from fastinvdpo.data.score_range import METADATA, ScoreRange
from fastinvdpo.data.sources import detect_format
from fastinvdpo.data.writing import check_parquet_name
from fastinvdpo.errors import invalid
from fastinvdpo.evaluation.scored_table import write_scored
from fastinvdpo.evaluation.scorers import Scorer, check_scorers, in_batches
from fastinvdpo.io import Digests, check_same, key_hash, plain, sealed, unsealed
from fastinvdpo.output import MARK, OutputDirectory
from fastinvdpo.trainer.opening import open_data_source

FORMAT = 2  # 1: with a digest of the files
ROWS_PER_PART = 256
_MANIFEST = "manifest.json"
_READ_BY_SCORE = frozenset(
    {"path", "format", "split", "revision", "subset", "image_root", "rank_pairs", "columns", "max_broken"}
)
_ROWS_AHEAD = 16
_Identity: TypeAlias = tuple[bytes, str]  # SHA-256 of an image, caption


@dataclass(frozen=True)
class ScoreResult:
    """What :func:`score_pairs` wrote.

    Attributes:
        rows: rows of the data; pairs: those that are in the output. broken: the others, by cause.
        columns: of every scorer. ranges: κ of every scorer, over the pairs in the output.
        disagreed: how many rows are left out for want of agreement; dissent: in how many of them each scorer saw
            another winner, or none.
    """

    output: Path
    rows: int
    pairs: int
    broken: dict[str, int]
    columns: dict[str, tuple[str, str]]
    ranges: dict[str, ScoreRange]
    disagreed: int = 0
    dissent: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Path, found: Mapping[str, Any]) -> ScoreResult:
        """From the description in the file's metadata."""
        columns = {score["name"]: (score["columns"][0], score["columns"][1]) for score in found["scores"]}
        ranges = {score["name"]: ScoreRange(score["low"], score["high"]) for score in found["scores"]}
        disagreed = found.get("disagreed", 0), found.get("dissent", {})
        return cls(output, found["rows"], found["pairs"], found["broken"], columns, ranges, *disagreed)

    def __str__(self) -> str:
        lines = [f"{self.rows} rows: {self.pairs} pairs scored"]
        if self.broken:
            lines[0] += f", {sum(self.broken.values())} broken rows left out ({by_cause(self.broken)})"
        if self.disagreed:
            dissent = by_cause(self.dissent)
            lines[0] += f", {self.disagreed} without agreement left out (other winner or tie: {dissent})"
        lines[0] += f". Output: {self.output}"
        for name, (first, second) in self.columns.items():
            found = self.ranges[name]
            span = f"{found.low:.5g} to {found.high:.5g}, score_range {found.value:.5g}"
            lines.append(f"{name}: {first}, {second}, {span}")
        return "\n".join(lines)


def list_of_broken(output: Path) -> Path:
    """Where the broken rows are listed that an output leaves out."""
    return output.with_name(f"{output.name}.broken.jsonl")


def open_to_score(data: DataSection) -> PairSource:
    """The rows to score; a local parquet file is read where it lies, a row group at a time."""
    if data.form != "pairs":
        raise invalid("data.form", data.form, "has no pairs to score", "score the pairs that the labels come from")
    if data.frames is not None:
        raise invalid("data.frames", data.frames, "is of videos, which are not scored here", "store your own scores")
    for name in sorted(data.model_fields_set - {"form"} - _READ_BY_SCORE):
        remedy = f"leave it out; what counts here is {', '.join(sorted(_READ_BY_SCORE))}"
        raise invalid(f"data.{name}", getattr(data, name), "changes nothing of what is scored", remedy)
    kind = detect_format(data.path) if data.format == "auto" else data.format
    return open_data_source(data.model_copy(update={"streaming": kind == "parquet", "shuffle_buffer": 1}))


def score_pairs(
    source: PairSource,
    scorers: Sequence[Scorer],
    output: Path,
    *,
    relabel: str | None = None,
    agree: int | str | None = None,
    named: bool = False,
    max_broken: int | float = 0,
    progress: bool = False,
) -> ScoreResult:
    """Score both images of every row and write the pairs with columns ``score_0, score_1``, float32, to parquet.

    Args:
        source: rows in any format; nothing but images and captions is looked at.
        scorers: with several, or with ``named``, the columns are ``score_NAME_0`` and ``score_NAME_1``.
        output: written atomically at the end; ``<output>.parts`` holds what is finished until then.
        relabel: name of a scorer: the image with its higher score becomes the winner, equal scores are a tie. The
            labels that were there move to ``original_label_0`` and ``original_label_1``.
        agree: with ``relabel``, at least 2, or ``"all"``: leave out the pairs in which fewer scorers, that one among
            them, give its winner the higher score. A scorer with equal scores votes for neither.
        max_broken: how many rows may be left out for a broken image or caption, a count or a share; they are listed in
            ``<output>.broken.jsonl``. Zero: the first one is an error.
        progress: show a progress bar.

    Raises:
        InvalidInput: a row is broken; a name, column or option cannot be used; the output lies among the data; output
            or parts belong to other scorers, data or options, naming what differs; another process is writing there.
    """
    stored = source.resolve((*IMAGES, "caption"))
    columns = _columns(scorers, named, source.column_names() or sorted(stored))
    if relabel is not None and relabel not in columns:
        raise invalid("relabel", relabel, "is the name of no scorer", f"use one of {', '.join(columns)}")
    check_parquet_name(output)
    place, own = output.resolve().parent, Path(source.path).resolve()
    if own.is_dir() and (place == own or (source.format == "datasets" and place.is_relative_to(own))):
        remedy = "name another directory: the next run would read the output"
        raise invalid("output", str(output), "lies among the files that are read", remedy)
    votes = _votes(agree, relabel, list(columns))
    parts = output.with_name(f"{output.name}.parts")
    manifest = _read_manifest(parts)
    digests = Digests(manifest["files"] if manifest else None)
    key = _key(source, scorers, digests)
    final = {**key, "columns": [list(pair) for pair in columns.values()], "relabel": relabel}
    final |= {"agree": votes} if votes else {}  # outputs of before there was this option still serve
    finished = _finished(output, final)
    if finished is not None and not (parts / MARK).is_file():
        clean_folder(output.parent)
        with suppress(OSError):  # there is none, or it holds something: killed after its mark was deleted, it is empty
            parts.rmdir()
        return finished
    _check_list(list_of_broken(output))
    prepare_folder(make_directory(output.parent))
    with OutputDirectory(parts, earlier=lambda path: manifest is not None) as begun:
        begun.claim(files=(_MANIFEST, "part-??????.json", ".lock"))
        if finished is not None:
            begun.remove()
            return finished
        if manifest is not None:
            check_same("output", parts, manifest["key"], key)
        with atomic_file(parts / _MANIFEST) as temporary:
            temporary.write_text(json.dumps(sealed({"key": key, "files": digests.remembered})))
        bad, rows, found = BrokenRows(max_broken, len(source)), list[int](), list[Any]()
        for part in _parts(source, scorers, parts, key_hash(key), progress):
            for line in part["broken"]:
                bad.add(line["row"], line["place"], BrokenRow(line["cause"], line["problem"]))
            rows += part["rows"]
            found += part["scores"]
        if not rows:
            problem = f"holds no row that can be scored: {bad.shown()}" if bad.found else "holds no rows"
            raise invalid("data.path", source.path, problem, "repair the data")
        scores = np.array(found)  # (rows, scorers, 2)
        kept, labels, dissent = _judged(scores, list(columns), relabel, votes)
        scores, chosen = scores[kept], [row for row, keep in zip(rows, kept, strict=True) if keep]
        description = {
            **{"key": final, "rows": len(source), "pairs": len(chosen), "broken": bad.counts()},
            **({"disagreed": len(rows) - len(chosen), "dissent": dissent} if votes else {}),
            "scores": [
                {
                    "name": name,
                    "columns": list(names),
                    "low": float(scores[:, i].min()),
                    "high": float(scores[:, i].max()),
                }
                for i, (name, names) in enumerate(columns.items())
            ],
        }
        added = {name: scores[:, i, side] for i, both in enumerate(columns.values()) for side, name in enumerate(both)}
        if bad.found:
            with atomic_file(list_of_broken(output)) as temporary:
                temporary.write_text(bad.listed(), "utf-8")
        with atomic_file(output, new=True) as temporary:
            write_scored(source, temporary, chosen, added, labels, {METADATA: json.dumps(description).encode()})
        begun.remove()
    return ScoreResult.of(output, description)


def _judged(
    scores: np.ndarray, names: Sequence[str], relabel: str | None, votes: int | None
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, int]]:
    """Which rows are kept, their labels from scores, and for how many of the others each scorer did not agree."""
    kept = np.ones(len(scores), dtype=bool)
    if relabel is None:
        return kept, {}, {}
    winners = np.sign(scores[..., 0] - scores[..., 1])  # 1: image 0, -1: image 1, 0: neither
    judge, dissent = winners[:, names.index(relabel)], dict[str, int]()
    if votes is not None:
        agrees = (winners == judge[:, None]) & (judge != 0)[:, None]
        kept = agrees.sum(1) >= votes
        if not kept.any():
            problem = f"is more than agree on any of {len(scores)} pairs"
            raise invalid("agree", votes, problem, "lower it, or look at the scores without it")
        dissent = {name: int(n) for name, n in zip(names, (~agrees[~kept]).sum(0), strict=True) if n}
    won = (1 + judge[kept]) / 2
    return kept, {"label_0": won, "label_1": 1 - won}, dissent


def _votes(agree: int | str | None, relabel: str | None, names: Sequence[str]) -> int | None:
    """How many scorers must agree; None: it does not matter. Raises ``InvalidInput`` for what cannot be agreed on."""
    if agree is None:
        return None
    if relabel is None:
        remedy = "name the scorer whose winner it is, with relabel"
        raise invalid("agree", agree, "keeps labels that scorers agree on, and none are made", remedy)
    votes = len(names) if agree == "all" else agree
    if type(votes) is not int or not 2 <= votes <= len(names):
        remedy = f"use 2 to {len(names)}, or all" if len(names) > 1 else "name several scorers"
        raise invalid("agree", agree, f"is no number of scorers that can agree, of {', '.join(names)}", remedy)
    return votes


def _parts(
    source: PairSource, scorers: Sequence[Scorer], directory: Path, identity: str, progress: bool
) -> Iterator[dict[str, Any]]:
    """All parts in order; those that are missing, damaged or another's are computed."""
    tqdm = require("tqdm.auto", extra="train", purpose="the progress bar").tqdm
    starts = range(0, len(source), ROWS_PER_PART)
    for start in tqdm(starts, desc="scoring", unit=f"part of {ROWS_PER_PART} rows", disable=not progress):
        path = directory / f"part-{start // ROWS_PER_PART:06d}.json"
        try:
            part = unsealed(path)
        except (OSError, ValueError):
            part = {}
        if part.get("hash") != identity or not {"rows", "scores", "broken"} <= part.keys():
            rows = range(start, min(start + ROWS_PER_PART, len(source)))
            part = {"hash": identity, **_scored(source, scorers, rows)}
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(sealed(part)))
        yield part


def _scored(source: PairSource, scorers: Sequence[Scorer], rows: range) -> dict[str, list[Any]]:
    """The ``rows`` that could be scored, their ``scores`` (by scorer, of both sides), and the ``broken`` ones."""
    batch = max(scorer.batch_size for scorer in scorers)
    known: dict[_Identity, list[float]] = {}
    pending: dict[_Identity, Image] = {}
    good: dict[int, list[_Identity]] = {}
    bad = BrokenRows(len(source), len(source))

    def score_a_batch() -> None:
        first = dict(list(pending.items())[:batch])
        images, captions = list(first.values()), [caption for _, caption in first]
        scores = [in_batches(scorer, images, captions) for scorer in scorers]
        known.update(zip(first, torch.stack(scores, 1).tolist(), strict=True))
        for identity in first:
            del pending[identity]

    for row, sides in read_ahead(partial(_decoded, source), rows, ahead=_ROWS_AHEAD):
        if isinstance(sides, BrokenRow):
            bad.add(row, source.place(row), sides)
            continue
        good[row] = [identity for identity, _ in sides]
        # An image that several pairs of a caption share is scored once.
        pending |= {identity: image for identity, image in sides if identity not in known}
        if len(pending) >= batch:
            score_a_batch()
    while pending:
        score_a_batch()
    scores = [list(zip(*(known[side] for side in sides), strict=True)) for sides in good.values()]
    return {"rows": list(good), "scores": scores, "broken": bad.lines()}


def _decoded(source: PairSource, row: int) -> list[tuple[_Identity, Image]]:
    caption = source.record(row).caption()
    data = {name: source.encoded(row, name) for name in IMAGES}
    return [
        ((hashlib.sha256(one).digest(), caption), decode(one, source.where(row, name))) for name, one in data.items()
    ]


def _columns(scorers: Sequence[Scorer], named: bool, taken: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The columns of every scorer."""
    columns: dict[str, tuple[str, str]] = {}
    for scorer in check_scorers(scorers):
        name = scorer.name
        if not re.fullmatch(r"[\w-]+", name):
            remedy = "give it a name of letters, digits, _ and -, with the option name"
            raise invalid("scorer", name, "cannot name columns", remedy)
        prefix = f"score_{name}_" if named or len(scorers) > 1 else "score_"
        columns[name] = (f"{prefix}0", f"{prefix}1")
        for column in columns[name]:
            if column in taken:
                remedy = "pass --named for columns with names, or give the scorer another one with the option name"
                raise invalid("scorer", name, f"the data has a column {column!r} already", remedy)
    return columns


def _key(source: PairSource, scorers: Sequence[Scorer], digests: Digests) -> dict[str, Any]:
    """What parts and output are made of: the content of the data, where columns stand, and the scorers' own keys."""
    if source.remote:
        source.files()  # raises
    key = {
        "format": FORMAT,
        "data format": source.format,
        "rows of a part": ROWS_PER_PART,
        **content_of(source, digests),
        "data columns": columns_of(source, digests),
        "data.columns": [source.shown(name) for name in (*IMAGES, *LABELS, "caption")],
        "scorers": [scorer.name for scorer in scorers],
        **{f"{scorer.name} {name}": value for scorer in scorers for name, value in scorer.key.items()},
    }
    return plain(key)


def _read_manifest(parts: Path) -> dict[str, Any] | None:
    path = parts / _MANIFEST
    if not path.is_file():
        return None
    try:
        found = unsealed(path)
        return {"key": dict(found["key"]), "files": dict(found["files"])}
    except (ValueError, KeyError, TypeError) as error:
        problem = f"its {_MANIFEST} cannot be read ({type(error).__name__}: {error})"
        raise invalid("output", str(parts), problem, "delete that directory") from None


def _finished(output: Path, key: Mapping[str, Any]) -> ScoreResult | None:
    """The result that is there already. Raises ``InvalidInput`` where something else is."""
    if not output.exists():
        return None
    try:
        found = json.loads((parquet.read_metadata(output).metadata or {})[METADATA])
    except (OSError, KeyError, ValueError, ArrowException):
        remedy = "name another output, or delete it"
        raise invalid("output", str(output), "is there, and fastinvdpo score did not write it", remedy) from None
    check_same("output", output, found["key"], key)
    return ScoreResult.of(output, found)


def _check_list(path: Path) -> None:
    """Raise ``InvalidInput`` where something is at ``path`` that is no list of broken rows."""
    try:
        lines = {frozenset(json.loads(line)) for line in path.read_text("utf-8").splitlines()}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):
        lines = set()
    if lines != {frozenset({"row", "place", "cause", "problem"})}:
        raise invalid("output", str(path), "is there, and was not written by fastinvdpo", ELSEWHERE)
