"""Files and directories that are there completely or not at all, whenever the process is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastinvdpo.errors import invalid

TEMPORARY, DISCARDED = ".writing-", ".discarded-"


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
