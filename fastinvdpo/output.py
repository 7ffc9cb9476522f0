"""Output directories, which belong to the runs that wrote them."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastinvdpo.atomic import (
    ELSEWHERE,
    atomic_directory,
    atomic_file,
    discard,
    disk_errors,
    files_below,
    lock_file,
    make_directory,
    prepare_folder,
)
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import as_json, file_digest

MARK = ".fastinvdpo-run"
_HEADER = b'{"fastinvdpo": '


class OutputDirectory:
    """A directory that one process writes at a time, and which keeps what runs wrote apart from a user's files.

    The file ``.fastinvdpo-run`` in it is lock and record: after a line about the run, one for each set of names that
    were claimed, and one with size, time and digest of the files of each result, written before these take their
    names. A use as a context manager ends with :meth:`close`.

    Args:
        argument: names the directory in errors.
        earlier: whether an unmarked directory was written by an earlier version; all that is claimed is then taken for
            its own.
        reads: paths that the run reads.

    Raises:
        InvalidInput: it cannot be written, another process writes there, or it is one of ``reads``.
    """

    def __init__(
        self,
        path: str | Path,
        argument: str = "output",
        *,
        earlier: Callable[[Path], bool] = lambda path: False,
        reads: Sequence[str | Path | None] = (),
    ) -> None:
        self.path, self._argument, self._adopts = Path(path), argument, False
        real = Path(os.path.realpath(path))
        if any(read is not None and os.path.realpath(read) == str(real) for read in reads):
            raise invalid(argument, str(path), "is what the run reads", "name another directory")
        self._patterns: list[str] = []
        self._wrote: dict[str, list[list[Any]]] = {}
        self._made, self._mark = [folder for folder in (real, *real.parents) if not folder.exists()], -1
        try:
            make_directory(self.path)
            self._open()
            prepare_folder(self.path)
            marked = self._read()
            self._adopts = not marked and earlier(self.path)
            if not marked:
                self._append({"fastinvdpo": 1, "run": uuid.uuid4().hex})
        except InvalidInput:
            self.close()
            raise
        except OSError as error:
            self.close()
            problem = f"cannot be written ({error.strerror})"
            if self.path.exists() and not self.path.is_dir():
                problem = "is a file"
            raise invalid(argument, str(path), problem, "name a directory that can be, with room in it") from None

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write. Where nothing was written, nothing remains."""
        if self._mark < 0:
            return
        own = (path for pattern in (*self._patterns, *self._wrote) for path in self.path.glob(pattern))
        if next(own, None) is None and os.fstat(self._mark).st_nlink:
            (self.path / MARK).unlink()
        self._release()
        with suppress(OSError):  # holds something
            for folder in self._made:
                folder.rmdir()

    def _release(self) -> None:
        os.close(self._mark)
        self._mark = -1

    def claim(self, *names: str, files: Sequence[str] = ()) -> None:
        """Raise ``InvalidInput`` where something is in the way that no run wrote.

        Args:
            names: results, files or directories, each written at once by :meth:`file` or :meth:`directory`.
            files: patterns of files that are written one by one, or grow.
        """
        for name in names:
            self._check(name)
        for pattern in files:
            parent, known = self.path / pattern.split("/")[0], self._adopts or pattern in self._patterns
            found = next((path for path in self.path.glob(pattern) if not known or not path.is_file()), None)
            if found is None and "/" in pattern and parent.exists() and not parent.is_dir():
                found = parent
            if found is not None:
                raise invalid(self._argument, str(found), "is there, and was not written by fastinvdpo", ELSEWHERE)
        if new := [pattern for pattern in files if pattern not in self._patterns]:
            self._patterns += new
            self._append({"claimed": new})

    def file(self, name: str) -> AbstractContextManager[Path]:
        """As :func:`atomic_file`, for a result."""
        return atomic_file(self.path / name, ready=lambda new: self._record(name, new))

    def directory(self, name: str) -> AbstractContextManager[Path]:
        """As :func:`atomic_directory`, for a result; files in an older one that no run wrote are kept."""
        return atomic_directory(
            self.path / name, lambda inside: self.is_ours(f"{name}/{inside}"), lambda new: self._record(name, new)
        )

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """Write a result: text, or JSON, which raises ``InvalidInput`` for NaN or infinity."""
        with self.file(name) as partial:
            partial.write_text(content if isinstance(content, str) else as_json(name, content), "utf-8")

    def remove(self, name: str = "") -> None:
        """Delete what runs wrote below ``name``; without one, everything."""
        discard(self.path / name, lambda inside: self.is_ours(f"{name}/{inside}".strip("/")))
        if not name:
            self._made = self._made or [Path(os.path.realpath(self.path))]

    def is_ours(self, name: str) -> bool:
        """Whether a run wrote the file as it is now."""
        if any(fnmatchcase(name, pattern) for pattern in self._patterns):
            return True
        path, digest = self.path / name, None
        if not (known := self._wrote.get(name)) or not path.is_file():
            return False
        size, changed = path.stat().st_size, path.stat().st_mtime_ns
        for entry in known:
            if entry[:2] == [size, changed]:
                return True
            digest = digest or (file_digest(path) if entry[0] == size else None)
            if digest == entry[2]:
                return True
        return False

    def _check(self, name: str) -> None:
        path = self.path / name
        if not path.exists():
            return
        known = [key for key in self._wrote if key == name or key.startswith(f"{name}/")]
        if self._adopts and not known:
            self._record(name, path)
            return
        here = [f"{name}/{inside}".rstrip("/") for inside in files_below(path)]
        if (here and not known) or (path.is_dir() and path.suffix):  # a file is to be written there
            raise invalid(self._argument, str(path), "is there, and was not written by fastinvdpo", ELSEWHERE)
        for file in {*here} & {*known}:
            if not self.is_ours(file):
                problem = "is there, and was not written by fastinvdpo as it is now"
                raise invalid(self._argument, str(self.path / file), problem, ELSEWHERE)

    def _record(self, name: str, written: Path) -> None:
        """Note the files of a result that is about to take its name, where nothing is in its way."""
        if written != self.path / name:
            self._check(name)
        files = {}
        for inside in files_below(written):
            file, path = f"{name}/{inside}".rstrip("/"), written / inside
            if path.is_file() and not path.is_symlink():
                files[file] = [path.stat().st_size, path.stat().st_mtime_ns, file_digest(path)]
                self._wrote.setdefault(file, []).append(files[file])
        self._append({"wrote": files})

    def _open(self) -> None:
        """Open the mark and take its lock."""
        mark = self.path / MARK
        while True:
            self._mark = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            if lock_file(self._mark) is False:
                self._release()
                raise invalid(self._argument, str(self.path), "another process is writing there", "wait for it")
            if mark.exists() and os.path.samestat(os.fstat(self._mark), mark.stat()):
                return
            os.close(self._mark)  # the one who held it has just deleted it

    def _read(self) -> bool:
        """Read the mark; False for a new one."""
        mark = str(self.path / MARK)
        content = (self.path / MARK).read_bytes()
        if not content.startswith(_HEADER) and not _HEADER.startswith(content):
            self._release()
            raise invalid(self._argument, mark, "is there, and was not written by fastinvdpo", ELSEWHERE)
        lines = content.split(b"\n")
        os.ftruncate(self._mark, len(content) - len(lines[-1]))  # cut off by a kill
        try:
            for line in lines[1:-1]:
                entry = json.loads(line)
                self._patterns += entry.get("claimed", ())
                for file, found in entry.get("wrote", {}).items():
                    self._wrote.setdefault(file, []).append(found)
        except (ValueError, AttributeError, TypeError) as error:
            self._release()
            problem = f"is damaged ({error})"
            raise invalid(self._argument, mark, problem, "delete it, and move what the run wrote") from None
        return len(lines) > 1

    def _append(self, entry: Mapping[str, Any]) -> None:
        line, end = json.dumps(entry).encode() + b"\n", os.fstat(self._mark).st_size
        with disk_errors(self.path / MARK):
            try:
                if os.write(self._mark, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._mark)
            except OSError:
                os.ftruncate(self._mark, end)
                raise
