"""Files: read within bounds, digests of them; paths as people write them."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastinvdpo.errors import InvalidInput, invalid

DIGEST = "sha256:"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SEAL = "digest of this file"
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{(\w+)\})")


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


def read_bounded(path: Path, limit: int, offset: int = 0, size: int = -1) -> bytes:
    """The content of a regular file, or ``size`` bytes from ``offset``, of at most ``limit`` bytes.

    Raises ``OSError`` for everything else.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit + 1 if size < 0 else min(size, limit + 1))
    except ValueError:
        raise OSError(errno.EINVAL, "holds NUL", str(path)) from None
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes", str(path))
    return data


def read_text(path: Path, argument: str, limit: int, remedy: str) -> str:
    """The text of a file: UTF-8, or by its byte order mark. Raises ``InvalidInput`` where there is none."""
    try:
        return decoded(read_bounded(path, limit))
    except (OSError, UnicodeError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        remedy = "save it as UTF-8" if isinstance(error, UnicodeError) else remedy
        raise invalid(argument, str(path), problem, remedy) from None


def read_object(path: Path, argument: str) -> dict[str, Any]:
    """The object in a small JSON file. Raises ``InvalidInput`` where there is none."""
    remedy = "download it or write it again"
    try:
        found = json.loads(read_text(path, argument, 2**26, remedy))
    except (json.JSONDecodeError, RecursionError) as error:
        raise invalid(argument, str(path), f"is not valid JSON ({error})", remedy) from None
    if not isinstance(found, dict):
        raise invalid(argument, str(path), "holds no JSON object", remedy)
    return found


def decoded(data: bytes) -> str:
    """Text of UTF-8, or by its byte order mark. Raises ``UnicodeDecodeError``."""
    return data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig")


def has_key(file: Path, key: str) -> bool:
    """Whether a file is a JSON object with such a key."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and key in content


def as_json(name: str, content: Mapping[str, Any]) -> str:
    """Indented JSON. Raises ``InvalidInput`` for NaN or infinity, which JSON lacks."""
    try:
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise invalid(name, dict(content), f"cannot be written as JSON ({error})", "leave the value out") from None


class Digests:
    """SHA-256 of files; what follows from files whose sizes, times and inodes are as remembered is not made again.

    Attributes:
        remembered: what was digested -> the files' sizes and times, digest; plain types for a JSON file.
        settled_ns: a younger file may be written again without a change of its times, and is not remembered.
    """

    settled_ns = 2_000_000_000

    def __init__(self, remembered: Mapping[str, Any] | None = None) -> None:
        self.remembered: dict[str, Any] = dict(remembered or {})

    def of(self, files: Iterable[Path]) -> str:
        """One digest of the contents of some files in their order."""
        with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter lock
            digests = list(threads.map(self.one, files))
        return DIGEST + hashlib.sha256("".join(digests).encode()).hexdigest()

    def one(self, file: Path) -> str:
        """The SHA-256 of a file, in hexadecimal."""
        return self.once(f"inode {file.stat().st_ino}", [file], lambda: file_digest(file))  # wherever it moves

    def once(self, name: str, files: Iterable[Path], make: Callable[[], str]) -> str:
        """What ``make`` gives; remembered as ``name`` until one of the files that it follows from changes."""
        found = [file.stat() for file in files]
        states = key_hash({"files": [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in found]})
        known = self.remembered.get(name)
        if known is None or known[0] != states:
            known = [states, make()]
            if time.time_ns() - max(max(s.st_mtime_ns, s.st_ctime_ns) for s in found) > self.settled_ns:
                self.remembered[name] = known
        return str(known[1])


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON keeps of ``content``, with a digest of it, for :func:`unsealed`."""
    kept = plain(content)
    return {**kept, _SEAL: key_hash(kept)}


def unsealed(path: Path) -> dict[str, Any]:
    """What :func:`sealed` was given, from a JSON file. One without a digest, of an earlier version, passes.

    Raises ``OSError`` or ``ValueError`` where it cannot be read or was changed.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    seal = content.pop(_SEAL, None)
    if seal is not None and seal != key_hash(content):
        raise ValueError("it was changed, or the disk damaged it: its digest is that of another content")
    return content


def key_hash(key: Mapping[str, Any]) -> str:
    """SHA-256 of a key: the entries that a result depends on, as plain types."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def check_same(argument: str, place: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``InvalidInput`` naming every entry in which the key of what is stored at ``place`` and ``now`` differ."""
    if different := differences(stored, now):
        problem = f"holds what was computed from something else; different are {', '.join(different)}"
        raise InvalidInput(
            f"{argument} = {str(place)!r}: {problem}. Remedy: restore those values, name another {argument}, or delete "
            "that one to have it computed again."
        )


def plain(key: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON keeps of a key."""
    found: dict[str, Any] = json.loads(json.dumps(key))
    return found


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``name (a there, b here)`` for every entry in which two keys differ."""
    absent = object()
    return [
        f"{name} ({_shown(stored.get(name, absent), absent)} there, {_shown(now.get(name, absent), absent)} here)"
        for name in dict.fromkeys([*stored, *now])
        if stored.get(name, absent) != now.get(name, absent)
    ]


def _shown(value: Any, absent: object) -> str:
    if isinstance(value, str) and value.startswith(DIGEST):
        return f"{value[: len(DIGEST) + 12]}…"
    return "absent" if value is absent else repr(value)
