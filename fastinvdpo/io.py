"""Files and directories that are there completely or not at all, whenever the process is killed; digests of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastinvdpo.errors import invalid

TEMPORARY, DISCARDED = ".writing-", ".discarded-"
_DIGEST = "sha256:"
# A file as young as this may be written again without a change of its times.
_SETTLED_NS = 2_000_000_000


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside ``target`` to write into; it takes the name ``target`` once everything is on the
    disk.

    An older ``target`` is replaced. After an error nothing remains of the attempt.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    discard(target)
    temporary.rename(target)
    _sync(target.parent)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` to write; it takes the name ``target`` once its content is on the disk."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        yield temporary
        _sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(target)
    _sync(target.parent)


def discard(directory: Path) -> None:
    """Delete a directory; it loses its name first, so a half-deleted one is never taken for a whole one. What a killed
    process has half-deleted goes too.
    """
    renamed = directory.with_name(f"{DISCARDED}{directory.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    if not directory.exists():
        return
    directory.rename(renamed)
    shutil.rmtree(renamed)


def clean_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in ``folder``."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith((TEMPORARY, DISCARDED)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, completely or not at all. Raises ``InvalidInput`` for NaN or infinity, which JSON lacks."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError as error:
        raise invalid(
            target.name, dict(content), f"cannot be written as JSON ({error})", "leave the value out"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as partial:
        partial.write_text(text + "\n")


@contextmanager
def only_writer(directory: Path, argument: str) -> Iterator[None]:
    """Hold the directory's lock, which the system drops with the process; leftovers of killed ones are deleted.

    Raises ``InvalidInput`` naming ``argument`` where another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on this system: two writers are then up to the user
        clean_leftovers(directory)
        yield
        return
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise invalid(argument, str(directory), "another process is writing there", "wait for it") from None
        clean_leftovers(directory)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Digests:
    """SHA-256 of files; one whose size, times and inode are as remembered is not read again.

    Attributes:
        remembered: path -> size, time of modification, time of change, inode, digest; plain types for a JSON file.
    """

    def __init__(self, remembered: Mapping[str, Any] | None = None) -> None:
        self.remembered: dict[str, Any] = dict(remembered or {})

    def of(self, files: Iterable[Path]) -> str:
        """One digest of the contents of some files in their order."""
        with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter lock
            digests = list(threads.map(self._file, files))
        return _DIGEST + hashlib.sha256("".join(digests).encode()).hexdigest()

    def _file(self, file: Path) -> str:
        name, status = str(file.resolve()), file.stat()
        identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self.remembered.get(name)
        if known is not None and known[:-1] == identity:
            return str(known[-1])
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
            self.remembered[name] = [*identity, digest.hexdigest()]
        return digest.hexdigest()


def key_hash(key: Mapping[str, Any]) -> str:
    """SHA-256 of a key: the entries that a result depends on, as plain types."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``name (a there, b here)`` for every entry in which two keys differ."""
    absent = object()
    return [
        f"{name} ({_shown(stored.get(name, absent), absent)} there, {_shown(now.get(name, absent), absent)} here)"
        for name in dict.fromkeys([*stored, *now])
        if stored.get(name, absent) != now.get(name, absent)
    ]


def _shown(value: Any, absent: object) -> str:
    if isinstance(value, str) and value.startswith(_DIGEST):
        return f"{value[: len(_DIGEST) + 12]}…"
    return "absent" if value is absent else repr(value)
