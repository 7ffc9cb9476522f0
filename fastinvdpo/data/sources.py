"""Open rows of any format; infer the format and the split from the path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fastinvdpo.data.records import RecordSource, folder_rows, looks_ranked, ranked_rows, shard_rows
from fastinvdpo.data.rows import FORMS, PAIRS, PairSource, WrongForm
from fastinvdpo.data.tables import TableSource, parquet_locations
from fastinvdpo.errors import invalid

FORMATS = ("parquet", "folder", "hpd", "webdataset", "datasets")
# Words in a file's name that name its split, as `datasets` reads them.
_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev")}
_SPLITS |= {"test": ("test", "testing", "eval", "evaluation")}


def open_source(
    path: str | Path,
    *,
    form: str = "pairs",
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    image_root: str | Path | None = None,
    rank_pairs: str = "all",
    **repository: str | None,
) -> PairSource:
    """The rows at ``path``.

    Args:
        form: what a row is: ``"pairs"``, ``"likes"``, one image that was liked or disliked, or ``"images"``, one with
            its caption.
        format: one of :data:`FORMATS`, or ``"auto"``: inferred from the path (:func:`detect_format`).
        columns: where the names of the schema are stored under other names.
        split: of a ``datasets`` repository, or of files in a directory, by their names.
        streaming: read images when they are needed; parquet in row groups where it lies, without a copy.
        shuffle_buffer: pairs that are mixed, and kept in memory, where parquet is streamed.
        image_root: directory that image paths are relative to; that of the file with the paths when None.
        rank_pairs: ``"all"`` pairs of a ranked list of images, or ``"best"`` against each of the rest.
        repository: ``revision`` and ``subset`` of a ``datasets`` repository.

    Raises:
        InvalidInput: nothing is there, the format cannot be inferred, or an option does not belong to it.
    """
    if unknown := repository.keys() - {"revision", "subset"}:
        raise TypeError(f"open_source() has no argument {min(unknown)!r}")
    if form not in FORMS:
        raise invalid("data.form", form, "is not known", f"use one of {', '.join(FORMS)}")
    names, shown, of = dict(columns or {}), str(path), FORMS[form]
    for name in names:
        if name not in of.schema:
            problem = f"maps {name!r}, which no row of {form} has"
            raise invalid("data.columns", names, problem, f"map from {of.schema}")
    if rank_pairs not in ("all", "best"):
        raise invalid("data.rank_pairs", rank_pairs, "is not a choice of pairs", "use 'all' or 'best'")
    kind = detect_format(path) if format == "auto" else format
    table = partial(TableSource, shown, kind, names, form=of, streaming=streaming, shuffle_buffer=shuffle_buffer)
    if kind == "parquet":
        return table(locations=[str(file) for file in files_of(path, ".parquet", split)])
    if kind == "datasets":
        options = {"revision": None, "subset": None, **repository, "split": split}
        if not streaming:
            return table(repository=options, image_root=image_root)
        return table(locations=parquet_locations(shown, options), image_root=image_root)
    if kind == "webdataset":
        files = files_of(path, ".tar", split)
        return RecordSource(shown, kind, names, list(shard_rows(files, names, of)), files, None, streaming, of)
    if kind not in FORMATS:
        raise invalid("data.format", format, "is not a known format", f"use 'auto' or one of {FORMATS}")
    if kind == "hpd" and of is not PAIRS:
        problem = f"ranks images against one another, and data.form is {form}"
        raise invalid("data.format", kind, problem, "set data.form to pairs")
    listing = Path(path) / of.listing if kind == "folder" and Path(path).is_dir() else Path(path)
    if not listing.is_file():
        remedy, others = "name the file that lists the rows", [file.listing for file in FORMS.values()]
        wrong = kind == "folder" and any((listing.parent / other).is_file() for other in others)
        error = invalid("data.path", shown, f"holds no {listing.name}", f"{remedy}, or what a row is with data.form")
        raise WrongForm(str(error)) if wrong else error
    root = Path(image_root) if image_root is not None else listing.parent
    if not root.is_dir():
        raise invalid("data.image_root", str(root), "is not a directory", "name the directory of the images")
    _of_split([listing], split, shown)
    rows = folder_rows(listing, names, of) if kind == "folder" else ranked_rows(listing, names, rank_pairs)
    return RecordSource(shown, kind, names, list(rows), [listing], root, streaming, of)


def detect_format(path: str | Path) -> str:
    """Which of :data:`FORMATS` a path holds. Raises ``InvalidInput`` saying why it cannot be inferred."""
    root = Path(path)
    if not root.exists():
        remedy = "name a parquet file, a directory of pairs, or a .json, .jsonl or .tar file"
        if str(path).count("/") <= 1 and not root.suffix:
            remedy += "; for a data set of the hub set data.format to datasets"
        raise invalid("data.path", str(path), "does not exist", remedy)
    suffix = root.suffix.lower()
    if not root.is_dir():
        if suffix in (".json", ".jsonl"):
            return "hpd" if looks_ranked(root) else "folder"
        return "webdataset" if suffix == ".tar" else "parquet"
    kinds = {"parquet": _visible(root, ".parquet"), "webdataset": _visible(root, ".tar")}
    kinds["folder"] = [file for form in FORMS.values() if (file := root / form.listing).is_file()]
    found = [kind for kind, files in kinds.items() if files]
    nested = (root / "data").is_dir() and _visible(root / "data", ".parquet")
    if not found and (nested or (root / "dataset_info.json").is_file()):
        found = ["datasets"]  # the layout of a repository, or what Dataset.save_to_disk wrote
    if len(found) == 1:
        return found[0]
    problem = f"is a directory without *.parquet, *.tar or {PAIRS.listing}, so its format cannot be inferred"
    remedy = "name a directory of shards, the .json file of ranked images, or set data.format"
    if found:
        problem, remedy = f"holds what could be read as {' and as '.join(found)}", "set data.format to one of them"
    raise invalid("data.path", str(root), problem, remedy)


def files_of(path: str | Path, suffix: str, split: str | None = None) -> list[Path]:
    """The file itself, or the files of a directory that end in ``suffix``, in the order of their names.

    Where names contain a split, only those of ``split`` count; None takes all, if they are of one split. Hidden files
    are left out: temporary ones, and the ``._`` companions that a Mac writes.

    Raises:
        InvalidInput: nothing is there, or no such split.
    """
    root = Path(path)
    found = [file for file in _visible(root, suffix) if file.is_file()] if root.is_dir() else [root]
    if not found:
        problem = f"is a directory without *{suffix} files"
        raise invalid("data.path", str(path), problem, "name a file, or a directory of shards")
    if found == [root] and not root.is_file():
        raise invalid("data.path", str(path), "does not exist", f"name a {suffix} file or a directory of them")
    return _of_split(found, split, str(path))


def _of_split(files: list[Path], split: str | None, path: str) -> list[Path]:
    splits: dict[Path, str | None] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        splits[file] = next((name for name, known in _SPLITS.items() if set(words) & set(known)), None)
    found = {name for name in splits.values() if name is not None}
    if files == [Path(path)] and split == "train":
        return files  # the default; a file that is named counts whatever its name
    if not found and split in (None, "train"):
        return files
    if None in splits.values() and found:
        unnamed = next(file.name for file, name in splits.items() if name is None)
        problem = f"has files of the split {', '.join(sorted(found))}, and {unnamed}, whose name has none"
        raise invalid("data.path", path, problem, "rename or move those that are not meant, or name one file")
    if split is None and len(found) == 1:
        return files
    wanted = next((name for name, words in _SPLITS.items() if split in words), None)
    if wanted not in found:
        problem = f"is not a split of {path}, whose file names have {', '.join(sorted(found)) or 'none'}"
        raise invalid("data.split", split, problem, "choose one of those, or name one file")
    return [file for file, name in splits.items() if name == wanted]


def _visible(root: Path, suffix: str) -> list[Path]:
    """The files of a directory that end in ``suffix``, in the order of their names; hidden ones are left out."""
    files = (file for file in root.iterdir() if not file.name.startswith("."))
    return sorted(file for file in files if file.name.lower().endswith(suffix))
