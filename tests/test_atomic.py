"""Files and directories that are there completely or not at all."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastinvdpo.atomic import atomic_directory, atomic_file, prepare_folder
from fastinvdpo.errors import InvalidInput


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with pytest.raises(RuntimeError), atomic_directory(target) as temporary:
        (temporary / "half").write_text("")
        assert not target.exists()
        raise RuntimeError
    assert names(tmp_path) == []
    for content in ("first", "second"):
        with atomic_directory(target, ours="sub/file".__eq__) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text(content)
        assert (target / "sub" / "file").read_text() == content
        assert names(tmp_path) == ["result"]


def test_what_is_not_ours_in_an_older_directory_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "result"
    (target / "empty").mkdir(parents=True)
    for name in ("old", "mine", "sub/mine"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(name)
    (target / "link").symlink_to("nowhere")
    with atomic_directory(target, ours="old".__eq__) as temporary:
        (temporary / "new").write_text("new")
    assert names(target) == ["empty", "link", "mine", "new", "sub"]
    assert (target / "sub" / "mine").read_text() == "sub/mine" and os.readlink(target / "link") == "nowhere"
    with pytest.raises(InvalidInput, match=r"mine'.*is in the way"), atomic_directory(target) as temporary:
        (temporary / "mine").write_text("another")
    assert (target / "mine").read_text() == "mine" and names(tmp_path) == ["result"]


def test_a_file_keeps_its_old_content_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old"
    with pytest.raises(FileExistsError, match="file"), atomic_file(target, new=True) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "old" and names(tmp_path) == ["file"]


def test_symbolic_links_are_written_through(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(disk / name)
    for _ in range(2):  # dangling links at first
        with atomic_file(tmp_path / "file") as partial:
            partial.write_text("content")
        with atomic_directory(tmp_path / "folder", ours="inside".__eq__) as temporary:
            (temporary / "inside").write_text("content")
        assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
        assert (disk / "file").read_text() == (disk / "folder" / "inside").read_text() == "content"


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_the_umask_decides_the_rights(tmp_path: Path, narrow_umask: None) -> None:
    with atomic_file(tmp_path / "file") as partial:
        save_file({"a": torch.zeros(1)}, partial)
    with atomic_directory(tmp_path / "folder") as temporary:
        save_file({"a": torch.zeros(1)}, temporary / "file")
    rights = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder", "folder/file")}
    assert rights == {"file": 0o640, "folder": 0o750, "folder/file": 0o640}


def test_leftovers_of_killed_processes_are_deleted_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def living() -> None:
        with atomic_file(tmp_path / "file") as partial:
            partial.write_text("whole")
            begun.set()
            ended.wait()

    writer = threading.Thread(target=living)
    writer.start()
    begun.wait()
    for name, complete in ((".fastinvdpo-aaaaaaaa.tmp", False), (".fastinvdpo-bbbbbbbb.tmp", True)):
        (tmp_path / name / "new" / f"{complete}").mkdir(parents=True)
        (tmp_path / name / "lock").touch()
        if complete:  # killed between the two renames
            (tmp_path / name / "old" / f"{complete}").mkdir(parents=True)
    (tmp_path / ".fastinvdpo-cccccccc.tmp").mkdir()
    (tmp_path / ".fastinvdpo-notes").mkdir()
    prepare_folder(tmp_path)
    ended.set()
    writer.join()
    assert names(tmp_path) == [".fastinvdpo-notes", "True", "file"]


def test_a_failed_write_names_the_target_whoever_wrote(tmp_path: Path) -> None:
    for error in (
        OSError(28, "No space left on device"),
        type("SafetensorError", (Exception,), {})("I/O error: No space left on device (os error 28)"),
        OSError("[Errno 28] Error writing bytes to file"),
    ):
        with (
            pytest.raises(OSError, match=r"No space left on device: .*result") as caught,
            atomic_file(tmp_path / "result"),
        ):
            raise error
        assert caught.value.errno == 28
    for other in (FileNotFoundError(2, "No such file", "data.png"), ValueError("[Errno 28]")):
        with pytest.raises(type(other)) as kept, atomic_file(tmp_path / "result"):
            raise other
        assert kept.value is other
    assert names(tmp_path) == []
