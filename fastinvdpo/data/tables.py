"""Pairs in the columns of tables: parquet files, and everything that ``datasets`` loads.

``datasets`` keeps large sets and repositories as memory-mapped Arrow files. Streaming reads parquet by row groups here:
the shuffle buffer of ``datasets`` is lost when a run resumes, and pairs would come in another order.
"""

from __future__ import annotations

import glob
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import compute, parquet, types

from fastinvdpo._extras import require
from fastinvdpo.data.broken import broken
from fastinvdpo.data.images import frames_in, image_bytes
from fastinvdpo.data.rows import FORMS, MASKS, NOISES, PAIRS, SOURCE, Form, PairSource, WrongForm, choices, stored_under
from fastinvdpo.data.score_range import METADATA
from fastinvdpo.errors import invalid

# Larger sets are converted once to memory-mapped Arrow files by `datasets` (its cache directory, HF_DATASETS_CACHE):
# parquet cannot read a single row, and every process of a run would otherwise hold its own copy.
IN_MEMORY_BYTES = 2 * 1024**3
_ROWS_PER_PIECE = 256


class TableSource(PairSource):
    """The columns of one or several tables.

    Args:
        locations: parquet files, local paths or addresses that fsspec knows, such as ``hf://``.
        repository: ``split, revision, subset`` of what ``datasets`` loads from ``path``, instead of ``locations``.
        image_root: directory of the images that a repository names by their paths, if not its own.
        shuffle_buffer: pairs that are mixed when streaming. Twice as many are kept, at least two row groups.
    """

    def __init__(
        self,
        path: str,
        format: str,
        names: Mapping[str, str],
        *,
        form: Form = PAIRS,
        locations: Sequence[str] = (),
        repository: Mapping[str, str | None] | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1,
        image_root: str | Path | None = None,
    ) -> None:
        self.path, self.format, self.names, self.streaming = path, format, dict(names), streaming
        self.form = form
        self._locations, self._repository = list(locations), repository
        self.remote = any("://" in location for location in self._locations)
        self.split = None if repository is None else repository["split"]
        self._image_root = Path(path if image_root is None else image_root)
        self._columns: dict[str, str] = {}
        self._values: dict[str, list[Any]] = {}
        self._dataset: Any = None
        self._loaded: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        found = {file: _from_file(file, lambda opened: opened.metadata) for file in self._locations}
        self._footers: list[Mapping[bytes, bytes]] = [metadata.metadata or {} for metadata in found.values()]
        self._schemas = {file: metadata.schema.to_arrow_schema() for file, metadata in found.items()}
        self._groups = [  # file, number of the row group in it, rows
            (file, number, metadata.row_group(number).num_rows)
            for file, metadata in found.items()
            for number in range(metadata.num_row_groups)
        ]
        if repository is not None:
            table = self._repository_table()
            self._schemas, self._groups = {path: table.schema}, [(path, 0, table.num_rows)]
        sizes = [rows for *_, rows in self._groups]
        self._starts = [0, *accumulate(sizes if streaming else [sum(sizes)])]
        self.groups_per_window = max(1, -(-shuffle_buffer // max([1, *sizes])))

    def __len__(self) -> int:
        return self._starts[-1]

    def resolve(self, required: Sequence[str]) -> set[str]:
        found = {file: self._found(file, schema, required) for file, schema in self._schemas.items()}
        self._columns = next(iter(found.values()))
        for file, columns in found.items():
            for name in sorted(columns.keys() ^ self._columns.keys()):
                problem = f"{'has' if name in columns else 'lacks'} the column of {name!r}, unlike other files"
                raise invalid("data.path", file, problem, "write all files with the same columns")
        scored = [METADATA in footer for footer in self._footers]
        if len(set(scored)) > 1:
            file, problem = self._locations[scored.index(True)], "was written by fastinvdpo score, and others were not"
            raise invalid("data.path", file, problem, "name one of the files, or move it")
        large = (*self.form.images, *MASKS, SOURCE, *NOISES)
        small = {name: column for name, column in self._columns.items() if name not in large}
        stored = list(dict.fromkeys(small.values()))
        tables = [_validated(_read(file, None, stored), file) for file in self._locations]
        tables = tables or [self._repository_table()]
        values = {column: [v for table in tables for v in table.column(column).to_pylist()] for column in stored}
        self._values = {name: values[column] for name, column in small.items()}
        return self.choose_masks(set(self._columns))

    def values(self, row: int) -> Mapping[str, Any]:
        return {name: values[row] for name, values in self._values.items()}

    def _bytes(self, row: int, name: str) -> memoryview:
        number, roots = bisect_right(self._starts, row) - 1, None
        cell, where = self._group(number).column(self._columns[name])[row - self._starts[number]], self.where(row, name)
        if name in NOISES and (not isinstance(cell, arrow.BinaryScalar | arrow.LargeBinaryScalar) or not cell.is_valid):
            remedy = "store the bytes of a .npy file in every row"
            raise broken("malformed noise", where, cell.as_py() and str(cell.type), "holds no bytes", remedy)
        if self.format == "datasets":  # which may name images below its place, or where `datasets` keeps what it loaded
            config = require("datasets", extra="train", purpose="reading preference pairs").config
            caches = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
            roots = [self._image_root, *map(Path, caches)]
        return image_bytes(cell, where, roots, self.frames if name in self.form.images else None)

    def groups(self) -> list[int] | None:
        return [rows for *_, rows in self._groups] if self.streaming else None

    def files(self) -> list[Path]:
        if self.remote:
            problem = "is read from a remote place, whose content cannot be hashed for a cache"
            raise invalid("data.streaming", True, problem, "set data.streaming to false, or cache.path to null")
        if self._locations:
            return [Path(location) for location in self._locations]
        table, images = self._repository_table(), set[str]()
        if not self._dataset.cache_files:
            remedy = "let datasets keep it on the disk (HF_DATASETS_IN_MEMORY_MAX_SIZE), or set cache.path to null"
            raise invalid("data.path", self.path, "is held in memory, where its content cannot be hashed", remedy)
        for column in (table.column(self.shown(name)) for name in (*self.form.images, *self._beside())):
            if types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
                bare = compute.is_null(compute.struct_field(column, "bytes"))  # stored by their paths alone
                images.update(path for path in compute.struct_field(column, "path").filter(bare).to_pylist() if path)
        own = [Path(entry["filename"]) for entry in self._dataset.cache_files]
        named = [
            [Path(path)] if Path(path).is_file() else frames_in(Path(path))[: self.frames] for path in sorted(images)
        ]
        return [*own, *(file for files in named for file in files)]

    def shown(self, name: str) -> str:
        return self._columns.get(name, self.names.get(name, name))

    def column_names(self) -> list[str]:
        first, schema = next(iter(self._schemas.items()))
        for file, found in self._schemas.items():
            if set(found.names) != set(schema.names):
                problem = f"its columns {found.names} are not those of {first}, {schema.names}"
                raise invalid("data.path", file, problem, "write files with the same columns")
        return list(schema.names)

    def tables(self, columns: list[str] | None = None) -> Iterator[Any]:
        if self._locations:
            yield from (_read(location, number, columns) for location, number, _ in self._groups)
        else:
            whole = self._repository_table()
            whole = whole if columns is None else whole.select(columns)
            yield from (whole.slice(start, _ROWS_PER_PIECE) for start in range(0, whole.num_rows, _ROWS_PER_PIECE))

    def footers(self) -> list[Mapping[bytes, bytes]]:
        return self._footers

    def _found(self, file: str, schema: Any, required: Sequence[str]) -> dict[str, str]:
        """Which column of a file serves each part of the schema."""
        found: dict[str, str] = {}
        for name in self.form.schema:
            for key in set(schema.names).intersection(stored_under(name, self.names)):
                if found.setdefault(name, key) != key:
                    problem = f"has two columns for {name}: {' and '.join(stored_under(name, self.names))}"
                    remedy = f"name the one that counts, as in data.columns.{name}={name}"
                    raise invalid("data.path", file, problem, remedy)
        others = choices(self.names, self.form)
        for name in others:
            if name in schema.names and not _holds_images(schema.field(name).type):
                found[name] = name
        if SOURCE in found and SOURCE not in self.names and not _holds_images(schema.field(found[SOURCE]).type):
            del found[SOURCE]
        label, columns = next(iter(self.form.labels), None), set(schema.names)
        says_who_won = any(name in found for name in (*self.form.labels, *others))
        for name in dict.fromkeys((*required, *self.names)):
            if name not in found and (name in self.names or not (name == label and says_who_won)):
                problem = f"has no column {self.names.get(name, name)!r}; its columns are {schema.names}"
                remedy = f"name yours with data.columns, as in {{{name}: YOUR_COLUMN}}"
                if name == label:
                    remedy = f"{self.form.remedy}, or {remedy}"
                for kind, form in FORMS.items() if name in self.form.images else ():
                    if all(set(stored_under(image, {})) & columns for image in form.images):
                        remedy = f"set data.form to {kind}, or {remedy}"
                        raise WrongForm(str(invalid("data.path", file, problem, remedy)))
                raise invalid("data.path", file, problem, remedy)
        return found

    def _beside(self) -> tuple[str, ...]:
        return (*(self.mask_names or ()), *((SOURCE,) if self.sources else ()))

    def _group(self, number: int) -> Any:
        """The images of a group, the masks if they are read, and the noise."""
        noises = [name for name in NOISES if name in self._columns]
        read = (*self.form.images, *self._beside(), *noises)
        columns = list(dict.fromkeys(self._columns[name] for name in read))
        with self._lock:  # a group is read by one thread, the others wait for it
            if number not in self._loaded:
                if not self._locations:
                    self._loaded[number] = self._repository_table()
                elif self.streaming:
                    self._loaded[number] = _read(*self._groups[number][:2], columns)
                else:
                    self._loaded[number] = _open_table(self._locations, columns)
                # Two windows: images of the next one may be read ahead of the last ones of this one.
                while len(self._loaded) > 2 * self.groups_per_window:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(number)
            return self._loaded[number]

    def _repository_table(self) -> Any:
        if self._dataset is None:
            assert self._repository is not None  # there are no locations
            self._dataset = _load(self.path, self._repository)
        return self._dataset.data.table

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the files themselves: a memory-mapped set must not be copied through a pipe.
        return {**self.__dict__, "_dataset": None, "_values": {}, "_loaded": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def parquet_locations(path: str, options: Mapping[str, str | None]) -> list[str]:
    """The parquet files of a repository, where they lie. Raises ``InvalidInput`` where it stores anything else."""
    splits = _datasets(path, "load_dataset_builder", options).config.data_files or {}
    if options["split"] not in splits:
        remedy = f"choose one of {', '.join(map(str, splits)) or 'none'}"
        raise invalid("data.split", options["split"], f"{path} has no such split", remedy)
    locations = [str(location) for location in splits[options["split"]]]
    other = next((location for location in locations if not location.endswith(".parquet")), None)
    if other is not None:
        problem = f"{path} stores {other}, and only parquet can be read by row groups"
        raise invalid("data.streaming", True, problem, "set data.streaming to false")
    return locations


def _holds_images(kind: Any) -> bool:
    return bool(types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _open_table(files: Sequence[str], stored: list[str]) -> Any:
    """One ``pyarrow.Table`` of the columns ``stored``; memory-mapped when the files exceed :data:`IN_MEMORY_BYTES`."""
    try:
        if sum(Path(file).stat().st_size for file in files) > IN_MEMORY_BYTES:
            datasets = require("datasets", extra="train", purpose="reading large sets of preference pairs")
            paths = [glob.escape(file) for file in files]
            return datasets.load_dataset("parquet", data_files=paths, columns=stored, split="train").data.table
        return arrow.concat_tables([_read(file, None, stored) for file in files], promote_options="permissive")
    except (arrow.ArrowInvalid, arrow.ArrowTypeError, OSError) as error:
        problem = f"cannot be read as one table ({error})"
        raise invalid("data.path", list(files), problem, "write the files again") from error


def _load(path: str, options: Mapping[str, str | None]) -> Any:
    """A split of a repository, or what ``Dataset.save_to_disk`` wrote."""
    if (Path(path) / "dataset_info.json").is_file() and (Path(path) / "state.json").is_file():
        found = _datasets(path, "load_from_disk", None)
        if options["split"] not in ("train", str(found.split)):  # the default; a directory that is named counts
            problem = f"is not the split that was saved in {path}, {found.split}"
            raise invalid("data.split", options["split"], problem, "leave it out, or name another directory")
    else:
        found = _datasets(path, "load_dataset", options, split=options["split"])
    _validated(found.data.table, path)
    return found if found._indices is None else found.flatten_indices()


def _datasets(path: str, function: str, options: Mapping[str, str | None] | None, **more: Any) -> Any:
    datasets = require("datasets", extra="train", purpose="data.format = datasets")
    which = {} if options is None else {"name": options["subset"], "revision": options["revision"]}
    place = str(Path(path).resolve())
    if which and Path(place).is_dir() and (glob.escape(place) != place or "::" in place):
        problem = "has a part with *, ?, [ or ::, which datasets reads as a pattern"
        raise invalid("data.path", path, problem, "rename it, or name its directory of parquet files")
    try:
        return getattr(datasets, function)(path, **which, **more)
    except Exception as error:  # its builders let through whatever the parsers of damaged files raise
        remedy = "check name, data.split, data.subset and data.revision, and whether the hub can be reached"
        problem = f"cannot be loaded by datasets ({type(error).__name__}: {_short(error)})"
        raise invalid("data.path", path, problem, remedy) from error


def _validated(table: Any, path: str) -> Any:
    """The table. Raises ``InvalidInput`` where reading it would fail, or end the process: damaged text or offsets."""
    try:
        table.validate(full=True)
    except arrow.ArrowException as error:
        raise invalid("data.path", path, f"is damaged ({_short(error)})", "write it again as UTF-8") from error
    return table


def _short(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if len(text) <= 300 else f"{text[:300]}…"


def _read(location: str, group: int | None, columns: list[str] | None = None) -> Any:
    """A row group, or the whole file."""

    def read(file: Any) -> Any:
        return file.read(columns=columns) if group is None else file.read_row_group(group, columns=columns)

    return _from_file(location, read)


def _from_file(location: str, read: Callable[[Any], Any]) -> Any:
    """What ``read`` finds in a parquet file. Raises ``InvalidInput`` for a damaged one, whether its footer or its data
    are.
    """
    try:
        with _open(location) as file:
            return read(parquet.ParquetFile(file))
    except (arrow.ArrowException, OSError, ValueError) as error:
        problem = f"is not a readable parquet file ({_short(error)})"
        raise invalid("data.path", location, problem, "write it again") from error


def _open(location: str) -> Any:
    if "://" in location:
        fsspec = require("fsspec", extra="train", purpose="reading pairs from a remote place")
        return fsspec.open(location, "rb").open()
    if not Path(location).is_file():
        raise OSError("is no regular file")
    return Path(location).open("rb")
