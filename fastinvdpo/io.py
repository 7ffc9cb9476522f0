"""Files: read within bounds, written completely or not at all, digests of them; paths as people write them."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastinvdpo.errors import invalid

TEMPORARY, DISCARDED = ".writing-", ".discarded-"
_DIGEST = "sha256:"
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{(\w+)\})")
# A file as young as this may be written again without a change of its times.
_SETTLED_NS = 2_000_000_000


def expand_path(text: str, argument: str) -> str:
    """A path with ``~``, ``$NAME`` and ``${NAME}`` as a shell expands them; ``$$`` stands for a dollar sign.

    Raises ``InvalidInput`` naming ``argument`` where there is no such variable or user, or the path holds NUL.
    """
    if "\0" in text:
        raise invalid(argument, text, "holds NUL", "write a path")
    head = text.partition("/")[0] if text.startswith("~") else ""
    tail = text[len(head) :]
    home = os.path.expanduser(head)
    if head and home == head:
        raise invalid(argument, text, "is the home directory of nobody here", f"write ./{text} for that name")

    def value(found: re.Match[str]) -> str:
        name = found[2] or found[3]
        if name is not None and name not in os.environ:
            problem = f"the environment variable {name} is not set"
            raise invalid(argument, text, problem, "set it, or write $$ for a dollar sign")
        return "$" if name is None else os.environ[name]

    return home + _VARIABLE.sub(value, tail)


def as_written(path: str) -> str:
    """The text that :func:`expand_path` turns into ``path``."""
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises ``OSError`` for everything else."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except ValueError:
        raise OSError(errno.EINVAL, "holds NUL", str(path)) from None
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes", str(path))
    return data


def read_text(path: Path, argument: str, limit: int, remedy: str) -> str:
    """The text of a file: UTF-8, or what its byte order mark tells. Raises ``InvalidInput`` where there is none."""
    try:
        return decoded(read_bounded(path, limit))
    except (OSError, UnicodeError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise invalid(argument, str(path), problem, remedy) from None


def decoded(data: bytes) -> str:
    """Text of UTF-8, or of what its byte order mark tells. Raises ``UnicodeDecodeError``."""
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


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
