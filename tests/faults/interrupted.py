"""Faults at file-system calls, over all commands: after each, the same command ends as one that met none, and leaves
nothing behind.

``make test-faults`` runs this file, by name, and ``make test-deep`` a few of the kills. KILLS, DISK and SIGNALS are how
many of each; SEED chooses them.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastinvdpo import cli
from tests import commands
from tests.trainer.forked import Server

COUNTS = {"kill": int(os.environ.get("KILLS", "400")), "disk": int(os.environ.get("DISK", "190"))}
COUNTS["signal"] = int(os.environ.get("SIGNALS", "100"))
SEED = int(os.environ.get("SEED", "0"))
# Names that Python reports to hooks before it does them, where they change the disk.
CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate", "fsync"}
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO)


class Faults:
    """Counts calls that change something below a directory, and at one of them does ``fault``."""

    def __init__(self, place: Path, at: int | None, fault: Callable[[], None]) -> None:
        self.count, self._place, self._at, self._fault = 0, str(place), at, fault

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CALLS or (event == "open" and not self._writes(arguments)):
            return
        paths = [os.fspath(part) for part in arguments[:2] if isinstance(part, str | os.PathLike)]
        if event != "fsync" and not any(os.path.abspath(path).startswith(self._place) for path in map(str, paths)):
            return
        self.count += 1
        if self.count == self._at:
            self._fault()

    @staticmethod
    def _writes(arguments: tuple[Any, ...]) -> bool:
        flags = arguments[2] if len(arguments) > 2 else 0
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def run(words: list[str], kind: str = "", at: int | None = None, detail: int = 0) -> list[int]:
    """The status of a command, and how many calls it made; a fault of some kind at one of them.

    ``detail``: the signal, the error's number, or 0 for a limit to the size of a file, ``at`` bytes.
    """

    def fault() -> None:
        if kind == "disk":
            raise OSError(detail, os.strerror(detail), "out")
        os.kill(os.getpid(), detail)

    faults, fsync = Faults(Path.cwd(), at, fault), os.fsync

    def counted(descriptor: int) -> None:
        faults("fsync", ())
        fsync(descriptor)

    if kind == "disk" and detail == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (at or 0, resource.RLIM_INFINITY))
    else:
        os.fsync = counted  # type: ignore[assignment]
        sys.addaudithook(faults)
    assert builtins.open is io.open
    status = cli.main(words)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return [status, faults.count]


def contents(place: Path) -> dict[str, bytes | None]:
    """The files of a run; of those that hold times, only that they are there."""
    timed = ("history.jsonl", "meta.json", "README.md", "manifest.json", ".fastinvdpo-run")
    files = [path for path in place.rglob("*") if path.is_file() or not any(path.iterdir())]
    kept = {path: None if path.name in timed or path.is_dir() else path.read_bytes() for path in files}
    return {str(path.relative_to(place)): content for path, content in kept.items()}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return commands.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def forks() -> Iterator[Server]:
    with closing(Server()) as server:
        yield server


@pytest.fixture(scope="module")
def whole(
    words: dict[str, list[str]], forks: Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, int]]:
    """Where each command was run without a fault, and the count of its calls."""
    found = {}
    for name, command in words.items():
        place = tmp_path_factory.mktemp(name)
        ended = forks.call(run, command, directory=place)
        assert ended.status == 0 and ended.result[0] == 0, ended.said
        found[name] = (place, ended.result[1])
    return found


def planned(kind: str, whole: dict[str, tuple[Path, int]]) -> list[tuple[str, int, int]]:
    """``(command, number of the call, detail)``, shared out by the count of calls, eight to each command at least."""
    chosen, total = random.Random(f"{SEED} {kind}"), sum(count for _, count in whole.values())
    plan = []
    for name, (place, count) in whole.items():
        for _ in range(max(min(8, COUNTS[kind] // len(whole)), round(COUNTS[kind] * count / total))):
            detail = {"kill": (signal.SIGKILL,), "signal": (signal.SIGINT, signal.SIGTERM), "disk": (0, *ERRORS)}[kind]
            picked = int(chosen.choice(detail))
            largest = max(path.stat().st_size for path in place.rglob("*") if path.is_file())
            plan.append((name, chosen.randint(1, count if picked else largest), picked))
    return plan


@pytest.mark.parametrize("kind", ["kill", "disk", "signal"])
def test_after_a_fault_the_same_command_ends_as_without_one(
    words: dict[str, list[str]], whole: dict[str, tuple[Path, int]], forks: Server, tmp_path: Path, kind: str
) -> None:
    wrong = []
    for number, (name, at, detail) in enumerate(planned(kind, whole)):
        place = tmp_path / str(number)
        place.mkdir()
        ended = forks.call(run, words[name], kind, at, detail, directory=place)
        told = f"{name}, {kind} {detail} at {at}"
        if kind == "disk" and ended.status == 0 and ended.result[0] == 2:
            errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
            if len(errors) != 1 or "Traceback" in ended.said:
                wrong.append(f"{told}: says {ended.said[-500:]}")
        elif not (ended.status == 0 and ended.result[0] in (0, 130)) and (kind == "disk" or ended.status != -detail):
            wrong.append(f"{told}: ended with {ended.status}, {ended.said[-800:]}")
        again = forks.call(run, words[name], directory=place)
        if again.status or (again.result[0] and not _refused_as_complete(name, again.said, ended.result)):
            wrong.append(f"{told}: then {again.said[-800:]}")
        elif contents(place) != contents(whole[name][0]):
            ours, theirs = contents(place), contents(whole[name][0])
            differing = [path for path in {*ours, *theirs} if ours.get(path, 0) != theirs.get(path, 0)]
            wrong.append(f"{told}: differs in {sorted(differing)}")
    print(f"seed {SEED}: {number + 1} of kind {kind}")
    assert not wrong, "\n".join(wrong)


def _refused_as_complete(name: str, said: str, result: list[int] | None) -> bool:
    """``data build`` replaces nothing, its own output neither; it was complete where the fault came after it."""
    return name == "build" and "is there already" in said
