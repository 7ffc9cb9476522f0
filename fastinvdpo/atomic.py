"""Files and directories that are there completely or not at all, whenever the process is killed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastinvdpo.errors import InvalidInput, invalid

_SCRATCH = re.compile(r"\.fastinvdpo-[a-z0-9_]{8}\.tmp")
ELSEWHERE = "name another directory, or move that file"


@contextmanager
def atomic_directory(
    target: Path, ours: Callable[[str], bool] = lambda name: False, ready: Callable[[Path], None] = lambda new: None
) -> Iterator[Path]:
    """A temporary directory to write into; it takes the name ``target`` once everything is on the disk.

    An older ``target`` is replaced, through a symbolic link where it is one. After an error nothing remains of the
    attempt.

    Args:
        ours: whether a file of the older one, by its path inside, may be replaced; the others are kept in the new one.
        ready: called with what was written, before it takes the name.

    Raises:
        InvalidInput: a file that is not ``ours`` has a name that is written. OSError: it could not be written.
    """
    target = Path(os.path.realpath(target))
    with _scratch(target.parent) as scratch:
        new = scratch / "new" / target.name
        new.mkdir(parents=True)
        with disk_errors(target):
            yield new
            _settle(new)
        ready(new)
        if target.exists():
            for name in files_below(target):
                if not ours(name):
                    _keep(target / name, new / name)
            (scratch / "old").mkdir()
            target.rename(scratch / "old" / target.name)
        new.rename(target)
        _sync(target.parent)


@contextmanager
def atomic_file(target: Path, *, new: bool = False, ready: Callable[[Path], None] = lambda new: None) -> Iterator[Path]:
    """A temporary path to write; it takes the name ``target`` once its content is on the disk.

    Args:
        new: raise ``FileExistsError`` rather than replace what has appeared there meanwhile.
        ready: called with what was written, before it takes the name.
    """
    target = Path(os.path.realpath(target))
    with _scratch(target.parent) as scratch:
        partial = scratch / "new" / target.name
        partial.parent.mkdir()
        with disk_errors(target):
            yield partial
            _settle(partial)
        ready(partial)
        if new:
            _publish_new(partial, target)
        else:
            partial.replace(target)
        _sync(target.parent)


def discard(target: Path, ours: Callable[[str], bool]) -> None:
    """Delete a directory, or of one that holds other files too, those that are ``ours`` by their paths inside.

    It loses its name first, so a half-deleted one is never taken for a whole one.
    """
    target = Path(os.path.realpath(target))
    names = list(files_below(target))
    own = list(filter(ours, names))
    if own and own == names:
        with _scratch(target.parent) as scratch:
            (scratch / "gone").mkdir()
            target.rename(scratch / "gone" / target.name)
        return
    for name in own:
        (target / name).unlink()
    folders = {folder for name in own for folder in (target / name).parents if folder.is_relative_to(target)}
    for folder in sorted(folders, reverse=True):
        with suppress(OSError):  # holds other files
            folder.rmdir()


def prepare_folder(folder: Path) -> None:
    """Raise ``OSError`` where nothing can be written in ``folder``, now rather than after the work; and clean it."""
    with disk_errors(folder), _scratch(folder) as scratch:
        (scratch / "probe").write_bytes(bytes(1 << 16))
        _sync(scratch / "probe")
    clean_folder(folder)


def clean_folder(folder: Path) -> None:
    """Delete what killed processes left half-written in ``folder`` and in the directories in it, where that is allowed.

    A directory that was about to be replaced by a complete one is replaced.
    """
    for parent in [folder, *(path for path in folder.iterdir() if path.is_dir() and not _SCRATCH.fullmatch(path.name))]:
        try:
            found = [path for path in parent.iterdir() if _SCRATCH.fullmatch(path.name) and not path.is_symlink()]
        except OSError:  # not this user's, or just deleted
            continue
        for scratch in found:
            with suppress(OSError), (scratch / "lock").open("r+b") as lock:
                if lock_file(lock.fileno()):
                    for old in scratch.glob("old/*"):
                        if not os.path.lexists(parent / old.name):
                            (scratch / "new" / old.name).rename(parent / old.name)
                    _delete(scratch)
            with suppress(OSError):  # killed before it was locked, and empty
                scratch.rmdir()


def make_directory(path: Path) -> Path:
    """The directory, made where it is missing, also behind a symbolic link."""
    os.makedirs(os.path.realpath(path), exist_ok=True)
    return path


def files_below(path: Path) -> Iterator[str]:
    """Paths inside a directory of all files, links and empty directories; of a file, the empty one."""
    if path.exists() and not path.is_dir():
        yield ""
    for folder, folders, files in os.walk(os.path.realpath(path)):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(folder, name), os.path.realpath(path))
        if not files and not folders and not os.path.samefile(folder, path):
            yield os.path.relpath(folder, os.path.realpath(path))


def _publish_new(partial: Path, target: Path) -> None:
    try:
        os.link(partial, target)
    except OSError:  # no such links here, or something is there
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        partial.rename(target)


def _keep(old: Path, new: Path) -> None:
    """Have a file, or what else there is, at a second place."""
    if old.is_dir() and not old.is_symlink():
        new.mkdir(parents=True, exist_ok=True)
        return
    if os.path.lexists(new):
        raise invalid("output", str(old), "was not written by fastinvdpo, and is in the way", ELSEWHERE)
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):  # no such links here
        shutil.copy2(old, new, follow_symlinks=False)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A private directory in ``folder``, which no one can have foreseen; locked as long as it is in use."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=".fastinvdpo-", suffix=".tmp", dir=folder))
        try:
            lock = os.open(scratch / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileNotFoundError:  # cleaned away before it was locked
            continue
        lock_file(lock)
        if (scratch / "lock").exists():
            break
        os.close(lock)
    try:
        yield scratch
    finally:
        with suppress(OSError):  # what remains, the next run deletes
            _delete(scratch)
        os.close(lock)


def _delete(scratch: Path) -> None:
    """The lock goes last: without it, only an empty directory is known for a leftover."""
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    (scratch / "lock").unlink()
    scratch.rmdir()


def lock_file(descriptor: int) -> bool | None:
    """Lock an open file; False where another process has it, None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else None
    return True


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Raise what libraries make of a failed write as ``OSError`` that names ``target``."""
    try:
        yield
    except (InvalidInput, KeyboardInterrupt):
        raise
    except Exception as error:
        number: int | None = None
        cause: BaseException | None = error
        while number is None and cause is not None:
            found = re.search(r"os error (\d+)|\[[Ee]rrno (\d+)\]", str(cause))
            number = int(found[1] or found[2]) if found else getattr(cause, "errno", None)
            cause = cause.__cause__ or cause.__context__
        own = isinstance(error, OSError) and error.filename and "/.fastinvdpo-" not in str(error.filename)
        foreign = (
            isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or "unexpected pos" in str(error)
        )
        if number is None or own or not foreign:
            raise
        raise OSError(number, os.strerror(number), str(target)) from error


def _settle(path: Path) -> None:
    """Put what was written onto the disk, with the rights that the umask leaves, which not every library minds."""
    rights = (path if path.is_dir() else path.parent).stat().st_mode & 0o666
    for file in [path, *path.rglob("*")]:
        if file.is_file() and not file.is_symlink():
            file.chmod(rights)
        _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
